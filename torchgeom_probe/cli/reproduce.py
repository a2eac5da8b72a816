"""``torchgeom-probe reproduce``: the paper's figures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torchgeom_probe.reproduce import run as figures
from torchgeom_probe.reproduce.settings import Settings


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser(
        "reproduce",
        help="the paper's figures, one command each, with a study of its decision boundaries (needs the extra 'all')",
        description="Trains, scans, tests and draws a figure of the paper.  Stopped or killed, the same command "
        "goes on where it was, and ends with the same results.",
    )
    parser.add_argument("figures", nargs="+", metavar="FIGURE", help="fig1 … fig6, regimes, or all")
    parser.add_argument(
        "--preset",
        choices=("embedded", "paper"),
        default="embedded",
        help="embedded: data of the installed packages, minutes on two cores (default); paper: the paper's data and "
        "training",
    )
    parser.add_argument("--data", choices=("digits", "mnist5k", "mnist"), help="the digits of fig2 (see demo --help)")
    parser.add_argument(
        "--data-root", type=Path, default=Path("data"), metavar="DIR", help="where the paper's data sets are or go"
    )
    parser.add_argument("--epochs", type=int, help="in place of the figure's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seeds",
        type=int,
        help="networks that the study of decision boundaries compares (default: fig1, fig2: 8; fig3, fig4: 3; else 1)",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small version that takes seconds a figure")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="default torchgeom_runs/reproduce (-paper, -quick); figure N goes to DIR/figN",
    )
    parser.add_argument("--gallery", type=Path, metavar="DIR", help="also write small PNGs of the main pictures there")
    parser.set_defaults(run=run, resumes=True)


def run(arguments: argparse.Namespace) -> None:
    """Make the figures that were named."""
    if arguments.out is None:
        suffix = ("-paper" if arguments.preset == "paper" else "") + ("-quick" if arguments.quick else "")
        arguments.out = Path(f"torchgeom_runs/reproduce{suffix}")
    settings = Settings(**{key: value for key, value in vars(arguments).items() if key in Settings.__annotations__})
    figures.reproduce(arguments.figures, settings)
