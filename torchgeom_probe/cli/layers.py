"""``torchgeom-probe layers``: the names that ``--layers`` takes."""

from __future__ import annotations

import argparse
from typing import Any

from torchgeom_probe.cli.models import add_model, model_of
from torchgeom_probe.model.layers import resolve
from torchgeom_probe.model.stages import stage_layers


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser("layers", help="list the names that --layers takes")
    add_model(parser)
    parser.add_argument("--match", default="**", metavar="GLOB", help="only these (default: all)")
    # A tag names weights; for the names of layers they are not fetched.
    parser.set_defaults(run=run, tag_fetches=False)


def run(arguments: argparse.Namespace) -> None:
    """Print a line a layer, a star where ``auto`` takes it."""
    model, _ = model_of(arguments)
    chosen = set(stage_layers(model))
    print(
        "  name                                      type                 parameters   (* = a stage, what 'auto' takes)"
    )
    for name, module in resolve(model, ["", arguments.match]).items():
        count = sum(parameter.numel() for parameter in module.parameters())
        star, shown = "*" if name in chosen else " ", name or "(the whole model)"
        print(f"{star} {shown:<41} {type(module).__name__:<20} {count:>10}")
