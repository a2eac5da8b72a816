"""What a monitor costs a training: between its probes, and with them, on a budget."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torchgeom_probe.integrations.tensorboard import TensorBoardWriter
from torchgeom_probe.integrations.timm import cifar_resnet

import torchgeom_probe as tgp
from benchmarks.timing import Settings, smallest

TITLE = "What a monitor costs a training"
NOTE = """\
First table: training steps without a monitor and with one whose probe is not due, in ms, and the monitor's own work
after a step, timed alone. Second: a training with `max_overhead=0.02` and charts; "share, by the wall": time inside of
`monitor.step()` by a clock of its own; "reported": `monitor.overhead`."""

METHOD = "first table: process time, smallest of ten turns for each of the others' one; second: wall time of one run"

SHARE = 0.02
CALLS = 2000


def mlp() -> tuple[nn.Module, list[str], tuple[int, ...]]:
    layers = [nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers), ["1", "3"], (64,)


def resnet() -> tuple[nn.Module, list[str], tuple[int, ...]]:
    model = cifar_resnet("resnet18", channels=(16, 32, 64, 128))
    return model, ["layer1", "layer2", "layer3", "layer4"], (3, 32, 32)


#: heading → (model, layers, shape of a sample), samples a batch, steps a turn, seconds of the second table
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, list[str], tuple[int, ...]]], int, int, float]] = {
    "MLP 64-256-256-10": (mlp, 128, 50, 30.0),
    "CIFAR ResNet-18, 16-128 channels": (resnet, 32, 1, 120.0),
}


class Training:
    """Steps of a classifier on noise."""

    def __init__(
        self, make: Callable[[], tuple[nn.Module, list[str], tuple[int, ...]]], batch: int, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        model, self.layers, shape = make()
        self.model = model.to(device).train()
        self.x: Tensor = torch.randn(batch, *shape).to(device)
        self.y = torch.randint(0, 10, (batch,)).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def steps(self, count: int) -> None:
        """Make so many."""
        for _ in range(count):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()


def between(name: str, settings: Settings) -> str:
    """One row of the first table."""
    make, batch, count, _ = MODELS[name]
    bare, followed = (Training(make, batch, settings.device) for _ in range(2))
    with tgp.Monitor(followed.model, followed.x[:16], layers=followed.layers, every=10**9) as monitor:
        monitor.follow(followed.optimizer)

        followed_by = monitor._followed
        assert followed_by is not None

        def alone() -> None:
            for _ in range(CALLS):
                followed_by._after_step(followed.optimizer)

        runs = {"without": lambda: bare.steps(count), "with": lambda: followed.steps(count), "alone": alone}
        for run in runs.values():
            run()
        best = smallest(runs, settings.device, 2 if settings.quick else 10 * settings.turns)
    step = best["without"] / count
    ratio, own = best["with"] / best["without"], best["alone"] / CALLS
    probed = 1e3 * best["with"] / count
    return f"| {name} | {1e3 * step:.3f} | {probed:.3f} | {ratio:.3f} | {1e6 * own:.1f} | {own / step:.2%} |"


def on_a_budget(name: str, settings: Settings) -> str:
    """One row of the second table."""
    make, batch, _, duration = MODELS[name]
    duration = 2.0 if settings.quick else duration
    training = Training(make, batch, settings.device)
    with tempfile.TemporaryDirectory() as folder:
        writer = TensorBoardWriter(Path(folder))
        monitor = tgp.Monitor(
            training.model, training.x[:16], layers=training.layers, max_overhead=SHARE, writer=writer
        )
        tgp.Monitor(training.model, training.x[:1], layers=training.layers).probe_now()  # torch's imports
        inside, began = 0.0, time.perf_counter()
        while time.perf_counter() - began < duration:
            training.steps(1)
            entered = time.perf_counter()
            monitor.step()
            inside += time.perf_counter() - entered
        whole = time.perf_counter() - began
        monitor.close()
    return (
        f"| {name} | {whole:.0f} | {monitor.steps} | {monitor.probes} | {SHARE:.1%} | {inside / whole:.2%} | "
        f"{monitor.overhead:.2%} |"
    )


def table(settings: Settings) -> Iterator[str]:
    """Yield both tables line by line."""
    names = list(MODELS)[:1] if settings.quick else list(MODELS)
    yield "| model | step without [ms] | step with [ms] | ratio | the monitor alone [µs] | of a step |"
    yield "|---|---|---|---|---|---|"
    for name in names:
        yield between(name, settings)
    yield ""
    yield "| model | seconds | steps | probes | allowed | share, by the wall | share, reported |"
    yield "|---|---|---|---|---|---|---|"
    for name in names:
        yield on_a_budget(name, settings)
