"""What a whole data set takes: loading, a plain forward pass, measure_dataset; two processes; ImageNet-1k, computed."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchgeom_probe.integrations.timm import ImageFiles, load, load_pretrained_efficientnet_lite0
from torchvision.transforms.functional import to_pil_image

import torchgeom_probe as tgp
from benchmarks.frames import crops
from benchmarks.timing import Settings

TITLE = "A whole data set"
NOTE = """\
JPEG crops of photographs, five stages, `Subspace(k)`, loading in the same process. CPU seconds of the loader alone, of
a plain pass over loaded batches, of `measure_dataset`; "rows": what it takes beside loading, over as many plain rows.
"two": one process's CPU seconds over those of the slower of two that share the run. "foreseen": CPU time over
`probe.cost(loader)`'s.

Below it a computation, no measurement: ImageNet-1k (1.28 million images of 224², k = 8), a plain row of 8.2e9
(ResNet-50) or 35e9 (ViT-B/16) operations at an assumed 2.7e13 a second, "rows" as measured here, loading that keeps up,
n GPUs n times as fast."""
METHOD = "CPU time of the process, smallest of the turns"

_FLOPS = {"ResNet-50": 8.2e9, "ViT-B/16": 35e9}
_FLOPS_A_SECOND, _IMAGES, _K = 2.7e13, 1_281_167, 8


def table(settings: Settings) -> Iterator[str]:
    yield "| network | images | k | loader [s] | forward [s] | measure_dataset [s] | rows | two | foreseen |"
    yield "|---|---|---|---|---|---|---|---|---|"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        each, size = (1, 64) if settings.quick else (16, 320)
        for place, crop in enumerate(crops(each, size, seed=0)[0]):
            to_pil_image(crop / 2 + 0.5).save(Path(folder) / f"{place:03d}.jpg")
        for name, k in (("resnet18", 2),) if settings.quick else (("resnet18", 2), ("efficientnet-lite0", 8)):
            loaded = load_pretrained_efficientnet_lite0() if name == "efficientnet-lite0" else load(name)
            data = ImageFiles(folder, loaded.transform)
            found = _row(loaded.model, data, k, settings.turns)
            rows.append(found["rows"])
            cells = [f"{found[c]:.2f}" for c in ("loader", "forward", "measure", "rows", "two", "foreseen")]
            yield f"| {name} | {len(data)} | {k} | {' | '.join(cells)} |"
    yield ""
    yield "| ImageNet-1k, k = 8 | 1 GPU [h] | 8 GPUs [h] | 64 GPUs [h] |"
    yield "|---|---|---|---|"
    for name, flops in _FLOPS.items():
        hours = _IMAGES * (_K + 2) * rows[-1] * flops / _FLOPS_A_SECOND / 3600
        yield f"| {name} | {hours:.2f} | {hours / 8:.2f} | {hours / 64:.3f} |"


def _row(model: nn.Module, data: ImageFiles, k: int, turns: int) -> dict[str, float]:
    loader = DataLoader(data, 4)
    batches = [x for x, _ in loader]
    probe = tgp.GeometryProbe(model, estimator=tgp.Subspace(k=k))

    def forward() -> None:
        with torch.no_grad():
            for x in batches:
                model(x)

    runs: dict[str, Callable[[], Any]] = {"loader": lambda: list(loader), "forward": forward}
    runs["measure"] = lambda: tgp.measure_dataset(probe, loader, path=tempfile.mkdtemp(), label=1, progress=False)
    began = time.process_time(), time.perf_counter()
    foreseen = probe.cost(loader).seconds
    foreseen *= (time.process_time() - began[0]) / (time.perf_counter() - began[1])  # the share that this process had
    found = {name: min(_cpu(run) for _ in range(min(2, turns))) for name, run in runs.items()}
    rows = (found["measure"] - found["loader"]) / ((k + 2) * found["forward"])
    return found | {
        "rows": rows,
        "two": found["measure"] / _two(probe, loader),
        "foreseen": found["measure"] / foreseen,
    }


def _cpu(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def _two(probe: tgp.GeometryProbe, loader: DataLoader) -> float:
    """CPU seconds of the slower of two processes that share a run."""
    context: Any = multiprocessing.get_context("fork")
    path, queue = tempfile.mkdtemp(), context.SimpleQueue()
    workers = [context.Process(target=_share, args=(rank, probe, loader, path, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(queue.get() for _ in workers)


def _share(rank: int, probe: tgp.GeometryProbe, loader: DataLoader, path: str, queue: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    queue.put(_cpu(lambda: tgp.measure_dataset(probe, loader, path=path, label=1, progress=False)))
