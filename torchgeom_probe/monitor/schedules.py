"""When a monitor probes: every so many steps, at steps on a logarithmic axis, or for a share of the run's time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

from torchgeom_probe.errors import ProbeError


@dataclass(frozen=True)
class Clock:
    """What a schedule may know beside the step: seconds spent, since the first step that the monitor saw.

    Attributes:
        training_seconds: wall-clock time outside of probes.
        probe_seconds: wall-clock time inside of probes, writers included.
        last_probe_seconds: what the latest probe took; 0 before the first.
        since_last_probe: training seconds since the latest probe; infinite before the first.
    """

    training_seconds: float = 0.0
    probe_seconds: float = 0.0
    last_probe_seconds: float = 0.0
    since_last_probe: float = math.inf


@runtime_checkable
class Schedule(Protocol):
    """When to probe: anything with ``due``; it is asked after every training step, so it has to be quick."""

    def due(self, step: int, clock: Clock) -> bool:
        """Whether to probe now, ``step`` training steps after the start."""


@dataclass(frozen=True)
class Every:
    """Probe every ``steps`` training steps: 0, n, 2n, ….  For once an epoch: ``Every(len(train_loader))``.

    Raises:
        ProbeError: ``steps`` is not an integer of 1 or more.

    >>> [step for step in range(10) if Every(4).due(step, Clock())]
    [0, 4, 8]
    """

    steps: int = 100

    def __post_init__(self) -> None:
        refuse_unless_count("every", self.steps, example="every=100")

    def due(self, step: int, clock: Clock) -> bool:
        """Whether ``step`` is a multiple of n."""
        return step % self.steps == 0


@dataclass(frozen=True)
class LogSpaced:
    """Probe at 0 and at steps equally spaced on a logarithmic axis, ``per_decade`` for each factor of ten.

    Most of the change in a network's geometry happens early: 10 a decade spends 50 probes on 100 000 steps.

    Raises:
        ProbeError: ``per_decade`` is not an integer of 1 or more.

    >>> [step for step in range(101) if LogSpaced(per_decade=3).due(step, Clock())]
    [0, 1, 2, 5, 10, 22, 46, 100]
    """

    per_decade: int = 10

    def __post_init__(self) -> None:
        refuse_unless_count("per_decade", self.per_decade, example="LogSpaced(per_decade=10)")

    def due(self, step: int, clock: Clock) -> bool:
        """Whether ``step`` is 0 or the nearest integer to a power of 10^(1/per_decade)."""
        if step < 1:
            return step == 0
        nearest = round(self.per_decade * math.log10(step))
        # Rounding to an integer step can move the exponent by one where the steps are sparse in it.
        return any(round(10 ** (i / self.per_decade)) == step for i in (nearest - 1, nearest, nearest + 1) if i >= 0)


@dataclass(frozen=True)
class Budget:
    """Probe as often as a share of the run's time allows: ``Budget(0.02)`` for two per cent.

    The first probe is due at once, and its cost is the first estimate.  Each next one is due when (a) the time spent on
    probes, this one included, is at most ``share`` of all the time so far, and (b) the training since the latest probe
    has paid for one probe.  (b) keeps an idle hour (a notebook, an evaluation) from being spent on probes in a row. So
    the share holds from the second probe on; the first alone can exceed it, in a run shorter than its cost / share.

    Args:
        share: of the wall-clock time, between 0 and 1.
        every: probe at multiples of this many steps only.

    Raises:
        ProbeError: ``share`` does not lie between 0 and 1; ``every`` is not an integer of 1 or more.

    >>> busy = Clock(training_seconds=90.0, probe_seconds=2.0, last_probe_seconds=1.0, since_last_probe=60.0)
    >>> Budget(0.02).due(700, busy), Budget(0.05).due(700, busy)
    (False, True)
    """

    share: float
    every: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share < 1:
            raise ProbeError(
                "max_overhead is the share of the run's time that probes may take, between 0 and 1; got "
                f"{self.share!r}.\n"
                "For two per cent write:  max_overhead=0.02"
            )
        refuse_unless_count("every", self.every, example="every=1")

    def due(self, step: int, clock: Clock) -> bool:
        """Whether one more probe, at the price of the latest, keeps within the share."""
        if step % self.every:
            return False
        return self.pause(clock) <= 0

    def pause(self, clock: Clock) -> float:
        """Seconds of training before which no probe will be due: the monitor does not ask again until then.

        >>> Budget(0.1).pause(Clock(9.0, probe_seconds=1.0, last_probe_seconds=1.0, since_last_probe=9.0))
        9.0
        """
        if math.isinf(clock.since_last_probe):
            return 0.0
        price = clock.last_probe_seconds
        per_second = (1 - self.share) / self.share  # of training, for a second of probing
        all_paid = (clock.probe_seconds + price) * per_second - clock.training_seconds
        this_paid = price * per_second - clock.since_last_probe
        return max(0.0, all_paid, this_paid)

    def allowance(self, clock: Clock) -> float:
        """Seconds that a probe may take now and keep within the share; before the first probe there is no telling.

        >>> round(Budget(0.1).allowance(Clock(90.0, probe_seconds=2.0, since_last_probe=9.0)), 6)
        8.0
        """
        if math.isinf(clock.since_last_probe):
            return math.inf
        return max(0.0, clock.training_seconds * self.share / (1 - self.share) - clock.probe_seconds)


def schedule_of(every: int | None, max_overhead: float | None, schedule: Schedule | None) -> Schedule:
    """Return the schedule that a monitor's three arguments ask for: one of them, or ``max_overhead`` with ``every``."""
    if schedule is not None:
        if every is not None or max_overhead is not None:
            raise ProbeError(
                "schedule= stands in place of every= and max_overhead=; pass one or the other.\n"
                "Both limits in one:  schedule=tgp.Budget(0.02, every=100)"
            )
        if not callable(getattr(schedule, "due", None)):
            raise ProbeError(
                f"a schedule has a method due(step, clock); {schedule!r} has none.\nWrite:  schedule=tgp.Every(100)"
            )
        return schedule
    if max_overhead is not None:
        return Budget(max_overhead, every=1 if every is None else every)
    return Every() if every is None else Every(every)


def refuse_unless_count(name: str, value: Any, *, example: str) -> None:
    """Raise a ProbeError unless ``value`` is an integer of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ProbeError(f"{name} is a whole number of 1 or more; got {value!r}.\nWrite:  {example}")
