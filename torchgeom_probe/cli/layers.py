"""``torchgeom-probe layers``: the names that ``--layers`` takes."""

from __future__ import annotations

import argparse
from typing import Any

from torchgeom_probe.cli.models import add_json, add_model, model_of, show
from torchgeom_probe.model.layers import resolve
from torchgeom_probe.model.stages import stage_layers


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser("layers", help="list the names that --layers takes")
    add_model(parser)
    parser.add_argument("--match", default="**", metavar="GLOB", help="only these (default: all)")
    add_json(parser)
    # A tag names weights; for the names of layers they are not fetched.
    parser.set_defaults(run=run, tag_fetches=False)


def run(arguments: argparse.Namespace) -> None:
    """Print a line a layer, a star where ``auto`` takes it."""
    model, _ = model_of(arguments)
    chosen = set(stage_layers(model))
    lines = [
        "  name                                      type                 parameters   (* = a stage, what 'auto' takes)"
    ]
    found = []
    for name, module in resolve(model, ["", arguments.match]).items():
        count, kind = sum(parameter.numel() for parameter in module.parameters()), type(module).__name__
        lines.append(f"{'*' if name in chosen else ' '} {name or '(the whole model)':<41} {kind:<20} {count:>10}")
        found.append({"name": name, "type": kind, "parameters": count, "stage": name in chosen})
    show(arguments, "\n".join(lines), {"layers": found})
