"""``torchgeom-probe directions``: what a network's stages feel most in images, as pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torchgeom_probe.cli.models import add_probe, input_of, model_of, probe_options
from torchgeom_probe.errors import optional
from torchgeom_probe.estimators import Directions
from torchgeom_probe.plotting.directions import plot_directions
from torchgeom_probe.plotting.files import save
from torchgeom_probe.probe import measure


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser(
        "directions", help="draw the directions that layers feel most (needs the extra 'figures')"
    )
    add_probe(parser)
    parser.add_argument("-k", type=int, default=4, help="directions a layer (default 4)")
    parser.add_argument("--smallest", action="store_true", help="those that are felt least; layers with n >= d alone")
    parser.add_argument("--out", type=Path, default=Path("torchgeom_runs/directions"), metavar="DIR")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table; write ``directions.safetensors`` and a picture an image."""
    optional("matplotlib", extra="figures")
    model, loaded = model_of(arguments)
    x = input_of(arguments, model, loaded)
    estimator = Directions(k=arguments.k, smallest=arguments.smallest, seed=arguments.seed)
    report = measure(model, x, estimator=estimator, **probe_options(arguments))
    print(report)
    written = [report.save(arguments.out / "directions.safetensors")]
    for sample in range(len(x)):
        figure = plot_directions(report, x, sample=sample, title=arguments.model)
        written.append(save(figure, arguments.out / f"directions_{sample}.png"))
    print(f"Wrote {', '.join(map(str, written))}.")
