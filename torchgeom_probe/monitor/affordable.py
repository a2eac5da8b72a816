"""How many products a probe may take, where its time is limited."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from torchgeom_probe.estimators import Estimator, TopK
from torchgeom_probe.monitor.schedules import Budget, Clock, Schedule
from torchgeom_probe.report import GeometryReport


def affordable(estimator: Estimator, last: GeometryReport, schedule: Schedule, clock: Clock) -> Estimator:
    """The same with no more products than a budget has room for, at the price of the latest probe's.

    >>> import torch, torchgeom_probe as tgp
    >>> model, x = torch.nn.Linear(300, 250), torch.randn(2, 300)
    >>> last = tgp.measure(model, x, layers="", estimator=tgp.TopK(4, method="krylov"))
    >>> poor, rich = (Clock(seconds, last_probe_seconds=1.0, since_last_probe=seconds) for seconds in (0.0, 1e9))
    >>> [affordable(tgp.TopK(4), last, Budget(0.1), clock).max_products for clock in (poor, rich)]
    [1, None]
    """
    if not isinstance(estimator, TopK) or not isinstance(schedule, Budget):
        return estimator
    made = torch.stack([layer.num_products.double().mean() for layer in last.values()])
    products = schedule.allowance(clock) * float(made.mean()) / max(clock.last_probe_seconds, 1e-9)
    if products >= max(layer.num_features for layer in last.values()):
        return estimator
    return replace(estimator, max_products=max(1, int(min(products, estimator.max_products or math.inf))))
