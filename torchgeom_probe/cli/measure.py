"""``torchgeom-probe measure``: the volume element of layers, as a table and as files."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from torchgeom_probe.cli.models import add_json, add_probe, estimator_of, input_of, is_trained, model_of, show
from torchgeom_probe.probe import GeometryProbe


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser("measure", help="measure the volume element of layers")
    add_probe(parser)
    parser.add_argument(
        "--estimator",
        metavar="NAME",
        help="auto (default: exact where d <= 16, else subspace; with -k subspace), exact, subspace, topk, logdet, "
        "trace, …; with its number topk:10, or more subspace:k=4,seed=1",
    )
    parser.add_argument("-k", type=int, help="directions of subspace, singular values of topk")
    parser.add_argument("--no-normalize", action="store_true", help="do not divide the Jacobian by √n")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write report.csv and report.json there")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table, write the files that were asked for."""
    model, loaded = model_of(arguments)
    x = input_of(arguments, model, loaded)
    began = time.perf_counter()
    with GeometryProbe(
        model,
        layers=arguments.layers,
        estimator=estimator_of(arguments),
        normalize=not arguments.no_normalize,
        engine=arguments.engine,
        source=arguments.source,
    ) as probe:
        report = probe.measure(x)
    lines = [report.summary(), f"{len(x)} samples in {time.perf_counter() - began:.2f} s"]
    if loaded is not None and not is_trained(arguments):
        lines.append("The weights are random: --pretrained or --checkpoint FILE for trained ones.")
    if arguments.out is not None:
        table = report.to_csv(arguments.out / "report.csv")
        lines.append(f"Wrote {table} and {report.to_json(arguments.out / 'report.json')}")
    show(arguments, "\n".join(lines), report.to_dict())
