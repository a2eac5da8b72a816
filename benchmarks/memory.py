"""Peak memory of a measurement, against the limit: a plain forward pass over as many rows."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.limit import loop_of_jvp, made, vmapped_jvp
from benchmarks.timing import Settings
from torchgeom_probe import GeometryProbe, Subspace
from torchgeom_probe.jacobian.memory import LiveBytes
from torchgeom_probe.model.isolation import measuring

TITLE = "Peak memory"
METHOD = "peak of one run after a run to warm up, each in a process of its own"
NOTE = """\
How far memory rises in one run above model, inputs and directions, over that of a plain forward pass without gradients
of (1 + k)·B rows; "50 layers": or all that there are. "vmap(jvp)" and "loop of jvp" keep the output's tangents alone.
On the CPU resident memory (`VmHWM`), in brackets the tensors alive; on CUDA `torch.cuda.max_memory_allocated`."""

#: (model, B, k)
CASES = [
    ("resnet50", 8, 2),
    ("resnet50", 2, 16),
    ("vit_tiny_patch16_224", 2, 16),
    ("convnext_tiny", 2, 16),
    ("densenet121", 2, 16),
    ("efficientnet_b0", 2, 16),
]
QUICK = [("test_resnet", 2, 3)]
CONTENDERS = ("limit", "1 layer", "50 layers", "vmap(jvp)", "loop of jvp")
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Peak:
    """Bytes above the baseline: ``resident`` of the process (or of the GPU's allocator), ``live`` of the tensors."""

    resident: float
    live: float


def runs_of(contender: str, model: nn.Module, x: Tensor, v: Tensor) -> Callable[[], Any]:
    """Make what is measured: a function without arguments."""
    if contender == "limit":

        def plain() -> Tensor:
            with torch.no_grad():
                return model(torch.cat([x[None], v]).flatten(0, 1))

        return plain
    if contender in ("1 layer", "50 layers"):
        layers = hooked(model, int(contender.split()[0]))
        probe = GeometryProbe(model, layers=layers, estimator=Subspace(len(v)), memory_budget=1 << 40)
        return partial(probe.measure, x, progress=False)
    push = {"vmap(jvp)": vmapped_jvp, "loop of jvp": loop_of_jvp}[contender]

    def pushed() -> Tensor:
        with measuring(model):
            return push(model, x, v)

    return pushed


def hooked(model: nn.Module, count: int) -> list[str]:
    """Names of ``count`` layers, or of all if there are fewer, evenly spread, the last one among them."""
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, nn.LayerNorm, nn.GroupNorm)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    count = min(count, len(names))
    return [names[(i + 1) * len(names) // count - 1] for i in range(count)]


def peak(contender: str, name: str, batch: int, k: int, device: torch.device) -> Peak:
    """Measure one contender; called in a process of its own."""
    torch.set_num_threads(1)
    model, size = made(name, device)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator).to(device)
    v = torch.randn(k, *x.shape, generator=generator).to(device)
    run = runs_of(contender, model, x, v)
    run()  # plans, kernels and frames are there
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return Peak(torch.cuda.max_memory_allocated(device) - before, math.nan)
    resident = _resident_rise(run)
    with LiveBytes([*model.parameters(), *model.buffers(), x, v]) as live:
        run()
    return Peak(resident, live.peak)


def _resident_rise(run: Callable[[], Any]) -> float:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # not Linux, or not allowed
        return math.nan
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    yield f"| model | B, k | limit [MB] | {' | '.join(CONTENDERS[1:])} |"
    yield "|---|---|---|" + "---|" * (len(CONTENDERS) - 1)
    os.environ.update({key: os.environ.get(key, value) for key, value in _MALLOC.items()})
    # A server that has imported everything once, and a process of its own for each figure.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory", "timm"])
    for name, batch, k in QUICK if settings.quick else CASES:
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            peaks = [pool.submit(peak, c, name, batch, k, settings.device).result() for c in CONTENDERS]
        limit = peaks[0]
        cells = " | ".join(_over(p, limit) for p in peaks[1:])
        yield f"| {name} | {batch}, {k} | {_megabytes(limit)} | {cells} |"


def _megabytes(limit: Peak) -> str:
    figures = [f"{value / 1e6:.1f}" for value in (limit.resident, limit.live) if not math.isnan(value)]
    return figures[0] if len(figures) == 1 else f"{figures[0]} ({figures[1]})"


def _over(rise: Peak, limit: Peak) -> str:
    pairs = ((rise.resident, limit.resident), (rise.live, limit.live))
    figures = [f"{a / b:.2f}" for a, b in pairs if not (math.isnan(a) or math.isnan(b))]
    return figures[0] if len(figures) == 1 else f"{figures[0]} ({figures[1]})"
