"""The time of a run, split into training and probing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import cache

import torch
from torch import nn

from torchgeom_probe.estimators import Subspace
from torchgeom_probe.monitor.schedules import Clock
from torchgeom_probe.probe import measure


class Stopwatch:
    """Splits the time since its start into training and probing; goes on from an earlier reading."""

    def __init__(self, earlier: Clock | None = None) -> None:
        self._before = earlier or Clock()  # what was read up to the moment below
        self._switched: float | None = None  # when the training, or the probe, that runs now began
        self._in_probe = False

    @property
    def running(self) -> bool:
        """Whether it was started, and not stopped."""
        return self._switched is not None

    def start(self, device: torch.device) -> None:
        """Let the time run, of training first."""
        _first_use(device)
        self._switched = time.perf_counter()

    def stop(self) -> None:
        """Let the time stand still."""
        self._before, self._switched = self.read(), None

    def read(self) -> Clock:
        """Return the seconds so far, those of a running probe included."""
        seconds = 0.0 if self._switched is None else time.perf_counter() - self._switched
        probing, training = (seconds, 0.0) if self._in_probe else (0.0, seconds)
        return Clock(
            training_seconds=self._before.training_seconds + training,
            probe_seconds=self._before.probe_seconds + probing,
            last_probe_seconds=self._before.last_probe_seconds,
            since_last_probe=self._before.since_last_probe + training,
        )

    @contextlib.contextmanager
    def probing(self, device: torch.device) -> Iterator[None]:
        """Count what runs inside as a probe, once the device has done what training still has in flight."""
        _synchronize(device)
        self._before, self._switched, self._in_probe = self.read(), time.perf_counter(), True
        try:
            yield
        finally:
            took = time.perf_counter() - self._switched
            total = self._before.probe_seconds + took
            self._before = Clock(self._before.training_seconds, total, took, since_last_probe=0.0)
            self._switched, self._in_probe = time.perf_counter(), False


@cache
def _first_use(device: torch.device) -> None:
    # The first forward derivative in a process makes torch import some 900 modules (about 4 s). That is no
    # cost of this model's probes: on a budget it would be the price that the second probe has to wait for.
    with contextlib.suppress(Exception):  # what is wrong will show in the first probe
        measure(nn.Tanh(), torch.zeros(1, 2, device=device), layers=[""], estimator=Subspace(k=1))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        synchronize = getattr(torch.get_device_module(device), "synchronize", None)
        if synchronize is not None:
            synchronize()
