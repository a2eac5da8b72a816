"""How everything here is timed: one process, turn by turn, the smallest time of each, compared as ratios."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
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
    """

    quick: bool = False
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    turns: int = 6
    families: tuple[str, ...] = ()


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time one run: CPU seconds of this process on the CPU (other jobs on the machine count for little), wall time elsewhere."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.accelerator.synchronize()
    start = time.perf_counter()
    run()
    torch.accelerator.synchronize()
    return time.perf_counter() - start


def smallest(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    turns: int,
    *,
    slow_turns: int | None = None,
    quick_ones: tuple[str, ...] = (),
) -> dict[str, float]:
    """Time each run once a turn, in turn, and return the smallest time of each; with ``slow_turns`` all but ``quick_ones`` take fewer."""
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(turns):
        for name, run in runs.items():
            if slow_turns is None or name in quick_ones or turn < slow_turns:
                best[name] = min(best[name], seconds(run, device))
    return best


def circumstances(settings: Settings) -> str:
    """Describe versions, hardware and method, in a sentence each."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    on_gpu = settings.device.type == "cuda"
    hardware = (
        torch.cuda.get_device_name(settings.device) if on_gpu else f"{cpu}, {torch.get_num_threads()} thread"
    )
    clock = "wall time" if on_gpu else "process time"
    return (
        f"torchgeom_probe {torchgeom_probe.__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{hardware}; float32, eval mode; {clock}, smallest of {settings.turns} turns."
    )
