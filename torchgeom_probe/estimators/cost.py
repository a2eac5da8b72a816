"""What a measurement will take, said before it runs: rows, bytes, seconds, and why they are taken in this way."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torchgeom_probe.estimators import Estimator
from torchgeom_probe.estimators.base import Work
from torchgeom_probe.jacobian.plan import Plan


@dataclass(frozen=True)
class Forecast:
    """How a measurement will be made; ``str()`` says it in words.

    Attributes:
        samples: B.
        samples_at_once, directions_at_once: the chunks that fit the memory budget.
        work: entry → the products that it needs of one sample, and why.
        features: entry → n.
        num_inputs: d.
        rows: forward and reverse rows over all samples and layers: the primal rows, the pushes and the pulls.
        split: whether a sample's directions do not fit at once, so that what had to be forgotten is made again.
        most_rows: the same where every layer takes the most products that it may.
        bytes: peak memory of a chunk, estimated from that of a plain pass.
        budget: what it may be.
        seconds: expected for ``rows``, at the speed of a plain forward pass that was timed for this.
        engine: the engine asked for.
        compiled: whether the dual pass is compiled, from the second measurement on.
    """

    samples: int
    samples_at_once: int
    directions_at_once: int
    work: dict[str, Work]
    features: dict[str, int]
    num_inputs: int
    rows: int
    most_rows: int
    split: bool
    bytes: int
    budget: int
    seconds: float
    engine: str
    compiled: bool

    @staticmethod
    def of(
        estimator: Estimator, plan: Plan, batch: int, *, seconds_per_row: float, engine: str, compiled: bool
    ) -> Forecast:
        """Work out the chunks as a measurement does, and add up what they cost."""
        work = {entry: _by_engine(w, engine) for entry, w in estimator.work(plan, engine=engine).items()}
        wanted = estimator.num_rows(plan)
        at_once = plan.samples_at_once(wanted, batch)
        directions = min(
            plan.directions_at_once(wanted, at_once), max(w.pushes + w.pulls for w in work.values())
        )
        shared = max((w.pushes for w in work.values() if w.shared), default=0)
        passes = -(-shared // directions)
        own = [w for w in work.values() if not w.shared]
        # Every pass carries its primal row; reverse mode saves one for all its pullbacks (a few, where copies pay).
        primals = passes + bool(own)
        rows = batch * (primals + shared + sum(w.pushes + w.pulls for w in own))
        most = batch * (primals + shared + sum(w.most for w in own))
        return Forecast(
            samples=batch,
            samples_at_once=at_once,
            directions_at_once=directions,
            work=work,
            features=dict(plan.features),
            num_inputs=plan.num_inputs,
            rows=rows,
            most_rows=most,
            split=directions < shared,
            bytes=plan.bytes_of(at_once, directions),
            budget=plan.budget,
            seconds=rows * seconds_per_row,
            engine=engine,
            compiled=compiled and not own and directions >= shared,
        )

    def __str__(self) -> str:
        most = "" if self.most_rows == self.rows else f" (about {self.most_rows} at the most)"
        if self.split:
            most += ", or several times that: the tangents do not fit the budget together, and some are made again"
        chunks = -(-self.samples // self.samples_at_once)
        lines = [
            f"{self.samples} samples of d = {self.num_inputs}, engine {self.engine}{', compiled' if self.compiled else ''}",
            f"  rows: {self.rows}{most}, in {chunks} chunk{'s' if chunks > 1 else ''} of up to {self.samples_at_once} samples"
            f" x {self.directions_at_once} directions at once",
            f"  memory: about {_amount(self.bytes)} at the peak, of a budget of {_amount(self.budget)}",
            f"  time: about {self.seconds:.2g} s, at the speed of a plain forward pass over as many rows",
        ]
        reasons: dict[str, list[str]] = {}
        for entry, work in self.work.items():
            reasons.setdefault(work.why, []).append(f"{entry or '(model)'} (n = {self.features[entry]})")
        lines += [f"  {', '.join(entries)}: {why}" for why, entries in reasons.items()]
        return "\n".join(lines)


def _by_engine(work: Work, engine: str) -> Work:
    """What is one dual pass for all layers is a pass per layer in reverse mode."""
    if engine != "vjp" or not work.shared:
        return work
    return replace(work, shared=False, why=f"{work.pushes} directions by reverse mode, layer by layer")


def _amount(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
