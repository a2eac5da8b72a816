"""What a measurement will take, said before it runs: rows, bytes, seconds, and why they are taken in this way."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from torchgeom_probe.estimators.base import Estimator, ProductCount
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.model.inputs import Inputs


@dataclass(frozen=True)
class Cost:
    """How a measurement will be made; ``str()`` says it in words.

    Attributes:
        samples: B.
        samples_at_once, directions_at_once: the chunks that fit the memory budget.
        products: entry → the products that it needs of one sample, and why.
        features: entry → n.
        num_inputs: d.
        rows: forward and reverse rows over all samples and layers: the primal rows, the pushes and the pulls.
        most_rows: the same where every layer takes the most products that it may.
        split: whether a sample's directions do not fit at once, so that what had to be forgotten is made again.
        bytes: peak memory of a chunk, estimated from that of a plain pass.
        budget: what it may be.
        seconds: expected for ``rows``, at the speed of a plain forward pass that was timed for this; less where the
            rows of a layer end there.
        engine: the engine asked for.
    """

    samples: int
    samples_at_once: int
    directions_at_once: int
    products: dict[str, ProductCount]
    features: dict[str, int]
    num_inputs: int
    rows: int
    most_rows: int
    split: bool
    bytes: int
    budget: int
    seconds: float
    engine: str

    @staticmethod
    def of(estimator: Estimator, plan: Plan, batch: int, *, seconds_per_row: float, engine: str) -> Cost:
        """Work out the chunks as a measurement does, and add up what they cost."""
        counts = estimator.cost(plan, engine=engine)
        wanted = max(count.at_once for count in counts.values())
        products = {entry: _by_engine(count, engine) for entry, count in counts.items()}
        at_once = plan.samples_at_once(wanted, batch)
        largest = max(count.pushes + count.pulls for count in products.values())
        directions = min(plan.directions_at_once(wanted, at_once), largest)
        shared = max((count.pushes for count in products.values() if count.shared), default=0)
        own = [count for count in products.values() if not count.shared]
        # Every pass carries its primal row; reverse mode saves one for all its pullbacks (a few, where copies pay).
        primals = -(-shared // directions) + bool(own)
        rows = batch * (primals + shared + sum(count.pushes + count.pulls for count in own))
        return Cost(
            samples=batch,
            samples_at_once=at_once,
            directions_at_once=directions,
            products=products,
            features=dict(plan.features),
            num_inputs=plan.num_inputs,
            rows=rows,
            most_rows=batch * (primals + shared + sum(count.most for count in own)),
            split=directions < shared,
            bytes=plan.bytes_of(at_once, directions),
            budget=plan.budget,
            seconds=rows * seconds_per_row,
            engine=engine,
        )

    def __str__(self) -> str:
        most = "" if self.most_rows == self.rows else f" (about {self.most_rows} at the most)"
        if self.split:
            most += ", or several times that: the tangents do not fit the budget together, and some are made again"
        chunks = -(-self.samples // self.samples_at_once)
        plural = "s" if chunks > 1 else ""
        lines = [
            f"{self.samples} samples of d = {self.num_inputs}, engine {self.engine}",
            f"  rows: {self.rows}{most}, in {chunks} chunk{plural} of up to {self.samples_at_once} samples x "
            f"{self.directions_at_once} directions at once",
            f"  memory: about {_amount(self.bytes)} at the peak, of a budget of {_amount(self.budget)}",
            f"  time: up to about {self.seconds:.2g} s, at the speed of a plain forward pass over as many rows"
            + ("; those of a layer end there" if any(not c.shared for c in self.products.values()) else ""),
        ]
        reasons: dict[str, list[str]] = {}
        for entry, count in self.products.items():
            reasons.setdefault(count.why, []).append(f"{entry or '(model)'} (n = {self.features[entry]})")
        lines += [f"  {', '.join(entries)}: {why}" for why, entries in reasons.items()]
        return "\n".join(lines)


@functools.singledispatch
def cost_of(x: Any, probe: Any) -> Any:
    """What measuring x will take: a batch, or what a room above registers, a data set."""
    return probe._cost(x)


def seconds_per_row(model: nn.Module, inputs: Inputs, plan: Plan) -> float:
    """The time of a row in a plain forward pass, over up to eight samples: the best of three."""
    few = inputs if plan.whole else inputs.repeated(8)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        few.run(model)
        if few.device.type != "cpu":
            torch.accelerator.synchronize(few.device)
        best = min(best, time.perf_counter() - start)
    return best / few.size


def _by_engine(count: ProductCount, engine: str) -> ProductCount:
    """What is one dual pass for all layers is a pass per layer in reverse mode."""
    if engine != "vjp" or not count.shared:
        return count
    return replace(count, shared=False, why=f"{count.pushes} directions by reverse mode, layer by layer")


def _amount(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
