"""``torchgeom-probe scan``: the line or the plane between photographs through a network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torchgeom_probe.cli.models import add_model, is_trained, model_of
from torchgeom_probe.plotting.photographs import scan_photographs


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser(
        "scan",
        help="the line or plane between two or three photographs through a network: maps of every stage (needs 'all')",
        description="No training.  Stopped or killed, the same command goes on where it was.",
    )
    add_model(parser)
    parser.add_argument(
        "--images", nargs="+", required=True, metavar="PATH", help="two image files: a line; three: a plane"
    )
    parser.add_argument("--layers", nargs="+", default=["auto"], metavar="NAME", help="default: the stages")
    parser.add_argument(
        "--grid", type=int, help="points of the line (default 64), or along a side of the plane (24)"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=224,
        help="pixels a side, for models that timm does not know (default 224)",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="points a chunk (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, where none are loaded")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("torchgeom_runs/scan"), metavar="DIR")
    parser.set_defaults(run=run, resumes=True)


def run(arguments: argparse.Namespace) -> None:
    """Scan, draw and say."""
    model, loaded = model_of(arguments)
    scan_photographs(
        model,
        arguments.images,
        loaded=loaded,
        trained=is_trained(arguments),
        layers=arguments.layers,
        grid=arguments.grid,
        batch_size=arguments.batch_size,
        size=arguments.size,
        device=arguments.device,
        out=arguments.out,
    )
