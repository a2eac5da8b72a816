"""``torchgeom-probe boundary``: does a network magnify near its decision boundaries, over many pairs of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torchgeom_probe.boundary.design import CONTRASTS
from torchgeom_probe.boundary.population import boundary_study
from torchgeom_probe.cli.models import (
    add_probe,
    add_study,
    estimator_of,
    input_of,
    is_trained,
    model_of,
    probe_options,
    study_options,
    untrained_of,
)
from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.plotting.files import save
from torchgeom_probe.plotting.plot import plot


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser(
        "boundary",
        help="test whether a network magnifies near its decision boundaries",
        description="Lines between images that are predicted as different classes.  Give images that the network was "
        "not trained on.  Stopped or killed, the same command goes on where it was.",
    )
    add_probe(parser)
    add_study(parser, pairs=200)
    parser.add_argument("--contrast", choices=list(CONTRASTS), default="mirror")
    parser.add_argument("--estimator", metavar="NAME", help="also the contrast of this volume: topk:10, subspace:8, …")
    parser.add_argument("-k", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("torchgeom_runs/boundary"), metavar="DIR")
    parser.set_defaults(run=run, resumes=True)


def run(arguments: argparse.Namespace) -> None:
    """Print the table and what it is of; write ``study.json`` and ``profile.png`` and ``.pdf``."""
    optional("matplotlib", extra="figures")
    own_file = arguments.model.partition(":")[0].endswith(".py")  # whose factory may return a trained model
    if not is_trained(arguments) and not own_file:
        raise ProbeError(
            f"{arguments.model} would have random weights, whose boundaries nothing was learned of.\n"
            "Give trained ones:  --checkpoint trained.pth, or --pretrained"
        )
    model, loaded = model_of(arguments)
    initial = untrained_of(arguments)
    x = input_of(arguments, model, loaded)
    options = probe_options(arguments)
    if arguments.estimator is not None:
        options["estimator"] = estimator_of(arguments)
    study = boundary_study(
        model,
        x,
        initial=initial,
        contrast=arguments.contrast,
        path=arguments.out / "study.json",
        **study_options(arguments),
        **options,
    )
    print(study)
    figure = plot(study, title=f"Near the decision boundaries of {arguments.model}")
    written = [save(figure, arguments.out / f"profile{ending}") for ending in (".png", ".pdf")]
    print(f"Wrote {', '.join(map(str, [arguments.out / 'study.json', *written]))}.")
