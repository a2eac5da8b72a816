"""``torchgeom-probe dataset``: every image of a folder, a row an image, resumable, also by several processes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from torchgeom_probe.cli.models import add_estimator, add_layers, add_model, estimator_of, model_of, probe_options
from torchgeom_probe.dataset.stream import measure_dataset
from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.plotting.files import save
from torchgeom_probe.plotting.plot import plot


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser(
        "dataset",
        help="measure every image of a folder (needs the extras 'timm', 'dataset' and 'figures')",
        description="Stopped or killed, the same command goes on where it was; torchrun -m torchgeom_probe.cli.main "
        "dataset ... shares the images over processes.  The name of an image's folder is its label.",
    )
    add_model(parser)
    add_layers(parser)
    add_estimator(parser)
    parser.add_argument("--images", nargs="+", required=True, metavar="PATH", help="directories or files of images")
    parser.add_argument("--batch-size", type=int, default=16, help="images a batch (default 16)")
    parser.add_argument("--workers", type=int, default=1, help="processes that load images (default 1)")
    parser.add_argument("--out", type=Path, default=Path("torchgeom_runs/dataset"), metavar="DIR")
    parser.set_defaults(run=run, resumes=True)


def run(arguments: argparse.Namespace) -> None:
    """Print a summary; write ``table.parquet`` and ``dataset.png``."""
    if arguments.device == "cuda":  # under torchrun a card for each process
        arguments.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    model, loaded = model_of(arguments)
    if loaded is None:
        raise ProbeError("dataset takes a model that knows its own preprocessing.\nWrite --model timm:NAME")
    images = optional("torchgeom_probe.integrations.timm", extra="timm").ImageFiles(arguments.images, loaded.transform)
    own = Path(os.path.abspath(arguments.out))
    images.files = [file for file in images.files if own not in Path(os.path.abspath(file)).parents]  # what it draws
    table = measure_dataset(
        model,
        images,
        path=arguments.out,
        label=1,
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        estimator=estimator_of(arguments),
        **probe_options(arguments),
    )
    if int(os.environ.get("RANK", 0)) == 0 and table.complete:
        print(table.compact())
        several = table.to_pandas(["label"])["label"].nunique() > 1
        figure = plot(table, by="label" if several else None, title=arguments.model)
        print(f"Wrote {arguments.out / 'table.parquet'} and {save(figure, arguments.out / 'dataset.png')}.")
