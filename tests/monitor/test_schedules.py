"""Schedules on a clock of our own: what is due, and that a share of the time is kept."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.monitor.schedules import Budget, Clock, Every, LogSpaced


def steps_of(schedule, until):
    return [step for step in range(until) if schedule.due(step, Clock())]


def test_every():
    assert steps_of(Every(3), 10) == [0, 3, 6, 9]
    assert steps_of(Every(), 301) == [0, 100, 200, 300]


@pytest.mark.parametrize("per_decade", [1, 3, 10, 50])
def test_log_spaced_steps_are_the_rounded_powers(per_decade):
    wanted = {0} | {round(10 ** (i / per_decade)) for i in range(10 * per_decade)}
    assert steps_of(LogSpaced(per_decade), 3000) == sorted(step for step in wanted if step < 3000)


def simulated(schedule, *, step_seconds, probe_seconds, steps, pause_at=None, pause=0.0):
    """Run the schedule on a clock of our own; returns the steps probed and the share after each step."""
    training = spent = last = 0.0
    at_probe = None
    probed, shares = [], []
    for step in range(steps):
        if step:
            training += step_seconds
        if step == pause_at:
            training += pause
        since = math.inf if at_probe is None else training - at_probe
        if schedule.due(step, Clock(training, spent, last, since)):
            last = probe_seconds(len(probed))
            spent, at_probe = spent + last, training
            probed.append(step)
        shares.append(spent / (spent + training) if spent + training else 0.0)
    return probed, shares


@pytest.mark.parametrize(("share", "price"), [(0.02, 0.1), (0.05, 1.0), (0.2, 0.03)])
def test_a_budget_holds_and_is_used(share, price):
    probed, shares = simulated(Budget(share), step_seconds=0.05, probe_seconds=lambda _: price, steps=4000)
    assert probed[0] == 0
    assert len(probed) > 3
    assert max(shares[probed[1] :]) <= share + 1e-9
    assert shares[-1] > 0.7 * share


def test_a_budget_waits_out_a_first_probe_that_is_slow():
    probed, shares = simulated(
        Budget(0.02), step_seconds=0.05, probe_seconds=lambda i: 2.0 if i == 0 else 0.1, steps=6000
    )
    assert max(shares[probed[1] :]) <= 0.02 + 1e-9
    assert probed[1] * 0.05 >= 2.0 / 0.02 - 2.0


def test_an_idle_hour_is_not_spent_on_probes_in_a_row():
    budget = Budget(0.02)
    probed, _ = simulated(
        budget, step_seconds=0.05, probe_seconds=lambda _: 0.1, steps=3000, pause_at=1000, pause=3600.0
    )
    after = [step for step in probed if step >= 1000]
    assert after[0] == 1000
    assert min(b - a for a, b in pairwise(after)) >= 0.1 * 0.98 / 0.02 / 0.05 - 1


def test_a_budget_keeps_to_multiples():
    probed, _ = simulated(Budget(0.1, every=25), step_seconds=0.05, probe_seconds=lambda _: 0.2, steps=1000)
    assert len(probed) > 5
    assert all(step % 25 == 0 for step in probed)


def test_the_pause_of_a_budget_is_as_long_as_it_takes():
    budget = Budget(0.02)
    clock = Clock(training_seconds=90.0, probe_seconds=2.0, last_probe_seconds=1.0, since_last_probe=60.0)
    pause = budget.pause(clock)
    assert pause == pytest.approx(3.0 * 49 - 90.0)

    def after(seconds):
        return Clock(90.0 + seconds, 2.0, 1.0, 60.0 + seconds)

    assert not budget.due(7, after(pause - 1e-6))
    assert budget.due(7, after(pause + 1e-6))


def test_per_decade_is_a_count():
    with pytest.raises(ProbeError, match="per_decade is a whole number of 1 or more; got 0"):
        LogSpaced(0)
