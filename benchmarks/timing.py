"""How everything here is timed: one process, turn by turn, the smallest time of each, compared as ratios."""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import torchgeom_probe


@dataclass(frozen=True)
class Settings:
    """What the command line asks of every table.

    Attributes:
        quick: miniature models, one turn or two: seconds in all, for a check that the command runs.
        device: where the models run.
        turns: how often each is timed; the smallest time counts.
        families: the models of the table "limit"; empty for all of them.
        finished: lines that the page already has of this table, measured under the same circumstances: no need to
            measure them again.
    """

    quick: bool = False
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    turns: int = 6
    families: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time one run: CPU seconds of this process on one thread (other jobs count for little), wall time elsewhere."""
    clock = time.perf_counter if by_the_wall(device) else time.process_time
    if device.type != "cpu":
        torch.accelerator.synchronize()
    start = clock()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return clock() - start


def by_the_wall(device: torch.device) -> bool:
    """Whether a run is timed by the wall: CPU seconds of several threads add up."""
    return device.type != "cpu" or torch.get_num_threads() > 1


def smallest(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    turns: int,
    *,
    slow_turns: int | None = None,
    quick_ones: tuple[str, ...] = (),
    inside: Mapping[str, Callable[[], contextlib.AbstractContextManager[Any]]] | None = None,
) -> dict[str, float]:
    """Time each run once a turn, in turn, and return the smallest time of each.

    With ``slow_turns`` all but ``quick_ones`` take fewer.

    ``inside`` gives a run the context that it needs: entered and left outside of the clock, and for that run alone.
    """
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(turns):
        for name, run in runs.items():
            if slow_turns is None or name in quick_ones or turn < slow_turns:
                with (inside or {}).get(name, contextlib.nullcontext)():
                    best[name] = min(best[name], seconds(run, device))
    return best


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Fit log y = slope · log x + constant by least squares: the power with which y grows.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread


def circumstances(settings: Settings, method: str | None = None) -> str:
    """Describe versions, hardware and method, in a sentence each; ``method`` in place of the smallest time."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    on_gpu = settings.device.type == "cuda"
    threads = torch.get_num_threads()
    hardware = (
        torch.cuda.get_device_name(settings.device)
        if on_gpu
        else f"{cpu}, {threads} thread{'s' if threads > 1 else ''}"
    )
    clock = f"{'wall' if by_the_wall(settings.device) else 'process'} time, smallest of {settings.turns} turns"
    return (
        f"torchgeom_probe {torchgeom_probe.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}; "
        f"{hardware}; float32, eval mode; {method or clock}."
    )
