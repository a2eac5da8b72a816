"""One layer's Jacobian as two products, Jv and Jᵀu, at every sample of a chunk; what the matrix-free estimators iterate on.

Legend of axes: B samples, b vectors, D inputs, N features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from torchgeom_probe.dual.rules.convolution import KnownPrimals
from torchgeom_probe.errors import EngineRefusal, ProbeError
from torchgeom_probe.jacobian.jacobians import Linearization
from torchgeom_probe.jacobian.vjp import Pullback
from torchgeom_probe.linalg.gram import Factor, streamed_factor
from torchgeom_probe.shapes import Float, Tensor


class LayerJacobian:
    """J of one layer: float64 vectors in and out, the model's own dtype inside.

    Attributes:
        products: how many Jv and Jᵀu have been formed, per sample.
        num_features, num_inputs: n and d.
    """

    def __init__(self, linear: Linearization, back: Pullback, entry: str) -> None:
        self.linear = linear.only([entry.split("#")[0]])
        self.back = back
        self.entry = entry
        self.num_features = linear.plan.features[entry]
        self.num_inputs = linear.plan.num_inputs
        self.products = 0
        self._known: tuple[int, KnownPrimals] | None = None
        self._some: tuple[list[int], LayerJacobian] | None = None

    @property
    def batch(self) -> int:
        """B, the samples of the chunk."""
        return self.linear.batch.size

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return self.linear.device

    @property
    def eps(self) -> float:
        """The rounding of a product, relative to σ_1."""
        return torch.finfo(self.linear.plan.dtype).eps

    def push(
        self, vectors_BbD: Float[Tensor, "B b D"], *, at: list[int] | None = None
    ) -> Float[Tensor, "B b N"]:
        """Jv, every sample's own vectors; ``at``: the others are not needed, and are zero where that saves their rows."""
        if at is not None and len(at) < self.batch and not self.linear.plan.random:
            some = self._at(at)
            found = vectors_BbD.new_zeros(*vectors_BbD.shape[:2], self.num_features)
            found[at] = some.push(vectors_BbD[at])
            self.products += vectors_BbD.shape[1]
            return found
        plan = self.linear.plan
        count = vectors_BbD.shape[1]
        directions = vectors_BbD.transpose(0, 1).reshape(count, self.batch, *plan.space).to(plan.dtype)
        pieces: list[Tensor] = []

        def keep(entry: str, blocks: list[Tensor]) -> None:
            if entry == self.entry:
                whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
                pieces.append(whole.to(torch.float64, copy=True))  # the next layer may write over it

        for part in directions.split(plan.directions_at_once(count, self.batch)):
            with self._known_primals(len(part)):
                self.linear.push(part, keep, until=self.entry)
        self.products += count
        return torch.cat(pieces).transpose(0, 1)

    def _known_primals(self, rows: int) -> contextlib.AbstractContextManager[None]:
        plan = self.linear.plan
        if self.linear.engine != "fused" or plan.graph_bytes * self.batch > plan.budget // 4:
            return contextlib.nullcontext()
        if (
            self._known is None or self._known[0] != rows
        ):  # those of one number of rows at a time: they take memory
            self._known = rows, KnownPrimals()
        return self._known[1].running()

    def _at(self, samples: list[int]) -> LayerJacobian:
        if self._some is None or self._some[0] != samples:
            self._some = samples, LayerJacobian(self.linear.at(samples), self.back, self.entry)
        return self._some[1]

    def pull(self, vectors_BbN: Float[Tensor, "B b N"]) -> Float[Tensor, "B b D"]:
        """Jᵀu, every sample's own vectors."""
        plan = self.linear.plan
        count = vectors_BbN.shape[1]
        cotangents = vectors_BbN.transpose(0, 1).to(plan.dtype)
        pulled = [
            self.back.pull(self.entry, part).flatten(2).double()
            for part in cotangents.split(plan.directions_at_once(count, self.batch))
        ]
        self.products += count
        return torch.cat(pulled).transpose(0, 1)

    def dense(self) -> Factor:
        """The factor of the whole J, by rows or by columns, whichever are fewer; streamed where J does not fit into memory."""
        plan, linear = self.linear.plan, self.linear
        by_rows = self.num_features <= self.num_inputs

        def rows(start: int, stop: int) -> Tensor:
            if by_rows:
                return self.back.rows(self.entry, start, stop).flatten(2)
            identity = torch.zeros(stop - start, self.num_inputs, dtype=plan.dtype, device=linear.device)
            identity[:, start:stop].fill_diagonal_(1)
            kept: list[Tensor] = []

            def keep(entry: str, blocks: list[Tensor]) -> None:
                if entry == self.entry:
                    kept.append(torch.cat(blocks, dim=2).clone())  # the next layer may write over it

            directions = identity.view(-1, 1, *plan.space).expand(-1, self.batch, *plan.space)
            linear.push(directions, keep, until=self.entry)
            return kept[0]

        count, length = sorted((self.num_features, self.num_inputs))
        plan.refuse_too_long(self.entry, length, count)
        self.products += count
        return streamed_factor(
            rows,
            count=count,
            length=length,
            at_once=plan.directions_at_once(count, self.batch),
            batch=self.batch,
            budget=plan.budget,
            itemsize=plan.itemsize,
        )


@contextlib.contextmanager
def jacobians(linear: Linearization, *, estimator: str, at_once: int) -> Iterator[dict[str, LayerJacobian]]:
    """The layers' Jacobians over one saved primal pass, which lasts as long as the body; ``at_once`` cotangents pulled together.

    Raises:
        ProbeError: reverse mode cannot run the model.
    """
    try:
        with linear.pullback(at_once) as back:
            maps = {entry: LayerJacobian(linear, back, entry) for entry in linear.plan.features}
            yield maps
            ran = [m.linear.engine for m in maps.values() if m.linear.engine != "auto"]
            linear.engine = ran[0] if ran else linear.engine
    except EngineRefusal as error:
        raise ProbeError(
            f"{estimator} needs both directions of differentiation, Jv and Jᵀu, and one of them cannot run this model:\n{error}\n"
            "Take an estimator that needs forward mode alone:  estimator=Subspace(k=8) or estimator=Exact()"
        ) from error


def engine_of(linear: Linearization) -> str:
    """The name for the result: where no forward product was needed, reverse mode is what ran."""
    return "vjp" if linear.engine == "auto" else linear.engine
