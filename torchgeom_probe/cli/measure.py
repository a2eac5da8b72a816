"""``torchgeom-probe measure``: the volume element of layers, as a table and as files."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from torchgeom_probe.cli.models import (
    add_estimator,
    add_json,
    add_probe,
    estimator_of,
    input_of,
    is_trained,
    model_of,
    probe_options,
    show,
)
from torchgeom_probe.probe import measure


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser("measure", help="measure the volume element of layers")
    add_probe(parser)
    add_estimator(parser)
    parser.add_argument("--no-normalize", action="store_true", help="do not divide the Jacobian by √n")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write report.csv and report.json there")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table, write the files that were asked for."""
    model, loaded = model_of(arguments)
    x = input_of(arguments, model, loaded)
    began = time.perf_counter()
    options = {**probe_options(arguments), "normalize": not arguments.no_normalize}
    report = measure(model, x, estimator=estimator_of(arguments), **options)
    lines = [report.summary(), f"{len(x)} samples in {time.perf_counter() - began:.2f} s"]
    if loaded is not None and not is_trained(arguments):
        lines.append("The weights are random: --pretrained or --checkpoint FILE for trained ones.")
    if arguments.out is not None:
        table = report.to_csv(arguments.out / "report.csv")
        lines.append(f"Wrote {table} and {report.to_json(arguments.out / 'report.json')}")
    show(arguments, "\n".join(lines), report.to_dict())
