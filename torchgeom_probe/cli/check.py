"""``torchgeom-probe check``: derivatives, samples and ops, before a long run."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from torchgeom_probe.cli.models import add_json, add_probe, input_of, model_of, probe_options, show
from torchgeom_probe.probe import GeometryProbe


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser("check", help="check derivatives, samples and ops before a long run")
    add_probe(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what the check found; status 1 where it is not ok."""
    model, loaded = model_of(arguments)
    x = input_of(arguments, model, loaded)
    report = GeometryProbe(model, **probe_options(arguments)).check(x)
    show(arguments, str(report), {"ok": report.ok, **asdict(report)})
    return 0 if report.ok else 1
