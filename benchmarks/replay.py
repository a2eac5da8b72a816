"""What a user pays for a report, over a plain forward pass of as many rows: eager, replayed, with bfloat16 tangents."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.limit import FAMILIES, QUICK, made, stages
from benchmarks.timing import Settings, smallest
from torchgeom_probe import GeometryProbe, ProbeError, Subspace

TITLE = "A report, over a plain forward pass"
NOTE = """\
All of `probe.measure(x)`, up to five stages hooked, `estimator=Subspace(k)`, over a plain forward pass without
gradients of (1 + k)·B rows: **below 1.00 a report of B samples and k directions costs less than that pass.** "replay":
a live probe from its third report of a shape on. "eager": `replay=False`, and `tgp.measure(model, x)`. "bf16": replay
with `precision="bf16"`; a dash: refused, a layer would be off by more than 0.02 nats. The audited replays (1st, 2nd,
4th, 8th …) take the time of both and are left out. Where MKL beats oneDNN, replay is eager's own calls without their
Python."""
RESUMES = True

SHAPES = [(8, 2), (2, 4), (2, 16), (1, 64)]
COLUMNS: dict[str, dict[str, Any]] = {"eager": {"replay": False}, "replay": {}, "bf16": {"precision": "bf16"}}
MORE = ("ghostnet_100", "repghostnet_100", "pvt_v2_b0", "mobilenetv2_100")
#: Reports before the clock, so that those on it are replayed and not audited: replays 9 to 15 of 16.
_BEFORE = 10


def ratios(model: nn.Module, size: int, batch: int, k: int, settings: Settings) -> tuple[float, dict[str, float]]:
    """Measure the limit in seconds, and each way's time over it; nan for what is refused."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator).to(settings.device)
    rows = torch.randn((1 + k) * batch, 3, size, size, generator=generator).to(settings.device)

    def plain() -> Tensor:
        with torch.no_grad():
            return model(rows)

    runs: dict[str, Callable[[], Any]] = {"limit": plain}
    with contextlib.ExitStack() as stack:
        for name, options in COLUMNS.items():
            probe = stack.enter_context(GeometryProbe(model, layers=stages(model), estimator=Subspace(k), **options))
            run = functools.partial(probe.measure, x, progress=False)
            try:
                for _ in range(2 if name == "eager" else _BEFORE):
                    run()
            except ProbeError as error:
                print(f"({name}: {str(error).splitlines()[0]})")
                continue
            runs[name] = run
        best = smallest(runs, settings.device, min(settings.turns, 6))
    return best["limit"], {name: best.get(name, math.nan) / best["limit"] for name in COLUMNS}


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line, and the geometric means."""
    header = f"| model | input | B, k | limit [s] | {' | '.join(COLUMNS)} |"
    yield header
    yield "|---|---|---|---|" + "---|" * len(COLUMNS)
    known = settings.finished if header in settings.finished else ()
    cells: list[list[str]] = []
    for name in QUICK if settings.quick else settings.families or (*FAMILIES, *MORE):
        model, size = made(name, settings.device)
        for batch, k in [(2, 3)] if settings.quick else SHAPES:
            row = f"| {name} | {size} | {batch}, {k} |"
            line = next((line for line in known if line.startswith(row)), None)
            if line is None:
                limit, times = ratios(model, size, batch, k, settings)
                found = " | ".join("–" if math.isnan(times[c]) else f"{times[c]:.2f}" for c in COLUMNS)
                line = f"{row} {limit:.3f} | {found} |"
            cells.append([cell.strip() for cell in line.split("|")[5:-1]])
            yield line
    means = [_geometric_mean([float(row[i]) for row in cells if row[i] != "–"]) for i in range(len(COLUMNS))]
    yield f"| **geometric mean** | | of {len(cells)} rows | | {' | '.join(f'**{mean:.2f}**' for mean in means)} |"


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan
