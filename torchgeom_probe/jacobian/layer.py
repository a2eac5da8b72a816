"""One layer's Jacobian as two products, Jv and Jᵀu: what the matrix-free estimators iterate on.

Legend of axes: B samples, S some of them, b vectors, D inputs, N features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from torchgeom_probe.dual.rules.convolution import KnownPrimals
from torchgeom_probe.errors import EngineRefusal, ProbeError
from torchgeom_probe.jacobian.jacobians import EngineName, Jacobians
from torchgeom_probe.jacobian.vjp import Pullback, flat
from torchgeom_probe.linalg.directions import basis
from torchgeom_probe.linalg.gram import Factor, streamed_factor
from torchgeom_probe.shapes import Float, Tensor


class LayerJacobian:
    """J of one layer, scaled as the measurement asks: float64 vectors in and out, the model's own dtype inside.

    Attributes:
        products: how many Jv and Jᵀu have been formed, per sample.
        num_features, num_inputs: n and d.
    """

    def __init__(self, jacobians: Jacobians, saved: _Saved, entry: str) -> None:
        self._jacobians = jacobians.only([entry.split("#")[0]])
        self._saved = saved
        self.entry = entry
        self.num_features = jacobians.plan.features[entry]
        self.num_inputs = jacobians.plan.num_inputs
        self.products = 0
        self._scale = jacobians.scale(entry)
        self._known: tuple[int, KnownPrimals] | None = None
        self._some: tuple[list[int], LayerJacobian] | None = None

    @property
    def batch(self) -> int:
        """B, the samples of the chunk."""
        return self._jacobians.inputs.size

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return self._jacobians.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the products inside."""
        return self._jacobians.plan.dtype

    @property
    def eps(self) -> float:
        """The rounding of a product, relative to σ_1."""
        return torch.finfo(self.dtype).eps

    @property
    def engine(self) -> EngineName:
        """The engine that ran: where no forward product was needed, reverse mode."""
        return "vjp" if self._jacobians.engine == "auto" else self._jacobians.engine

    def push(self, vectors_SbD: Float[Tensor, "S b D"], *, at: list[int] | None = None) -> Float[Tensor, "S b N"]:
        """Jv, every sample's own vectors; of the samples ``at`` (ascending) alone: the others cost nothing."""
        plan, count = self._jacobians.plan, vectors_SbD.shape[1]
        self.products += count
        if at is not None and len(at) < self.batch:
            if not plan.random and not plan.whole:
                return self._at(at).push(vectors_SbD)
            whole = vectors_SbD.new_zeros(self.batch, *vectors_SbD.shape[1:])  # fewer would draw other numbers
            whole[at] = vectors_SbD
            vectors_SbD = whole
        directions = vectors_SbD.transpose(0, 1).reshape(count, self.batch, *plan.space).to(plan.dtype)
        pieces: list[Tensor] = []
        for part in directions.split(plan.directions_at_once(count, self.batch)):
            with self._known_primals(len(part)):
                pieces.append(self._pushed(part).double())
        pushed = torch.cat(pieces).transpose(0, 1) * self._scale
        return pushed if at is None or len(at) == self.batch else pushed[at]

    def _pushed(self, directions: Tensor) -> Tensor:
        """[k, B, n] of this layer alone, not scaled; a copy, since the next layer may write over it."""
        kept: list[Tensor] = []

        def keep(entry: str, blocks: list[Tensor]) -> None:
            if entry == self.entry:
                kept.append(torch.cat(blocks, dim=2))

        self._jacobians.push(directions, keep, until=self.entry)
        return kept[0]

    def _known_primals(self, rows: int) -> contextlib.AbstractContextManager[None]:
        plan = self._jacobians.plan
        if self._jacobians.engine != "fused" or plan.graph_bytes * self.batch > plan.budget // 4:
            return contextlib.nullcontext()
        # Those of one number of rows at a time: they take memory.
        if self._known is None or self._known[0] != rows:
            self._known = rows, KnownPrimals()
        return self._known[1].running()

    def _at(self, samples: list[int]) -> LayerJacobian:
        if self._some is None or self._some[0] != samples:
            self._some = samples, LayerJacobian(self._jacobians.at(samples), self._saved, self.entry)
        return self._some[1]

    def pull(self, vectors_SbN: Float[Tensor, "S b N"], *, at: list[int] | None = None) -> Float[Tensor, "S b D"]:
        """Jᵀu, every sample's own vectors; of the samples ``at`` alone, where it is given."""
        plan, count = self._jacobians.plan, vectors_SbN.shape[1]
        samples = list(range(self.batch)) if at is None else at
        back, among = self._saved.of(self._jacobians, self.entry, samples)
        cotangents = vectors_SbN.new_zeros(count, len(among), self.num_features, dtype=plan.dtype)
        place = [among.index(sample) for sample in samples]
        cotangents[:, place] = vectors_SbN.transpose(0, 1).to(plan.dtype)
        parts = cotangents.split(plan.directions_at_once(count, len(among)))
        pulled = torch.cat([flat(back.pull(self.entry, part))[:, place].double() for part in parts])
        self.products += count
        return pulled.transpose(0, 1) * self._scale

    def dense(self) -> Factor:
        """The factor of the whole J, by rows or by columns, whichever are fewer; streamed where J is too large."""
        plan = self._jacobians.plan
        by_rows = self.num_features <= self.num_inputs

        def rows(start: int, stop: int) -> Tensor:
            if by_rows:
                return flat(self._saved.whole.rows(self.entry, start, stop))
            like = torch.empty(self.batch, 0, dtype=plan.dtype, device=self.device)
            return self._pushed(basis(start, stop, plan.space, like=like))

        count, length = sorted((self.num_features, self.num_inputs))
        plan.refuse_too_long(self.entry, length, count)
        self.products += count
        factor = streamed_factor(
            rows,
            count=count,
            length=length,
            at_once=plan.directions_at_once(count, self.batch),
            batch=self.batch,
            budget=plan.budget,
            itemsize=plan.itemsize,
        )
        return factor.scaled(self._scale)


class _Saved:
    """The saved primal pass of all samples, and one of those that a layer still asks for, where they are few.

    Attributes:
        whole: that of all samples and layers.
    """

    def __init__(self, whole: Pullback, at_once: int) -> None:
        self.whole, self._at_once = whole, at_once
        self._narrow: tuple[str, list[int], Pullback] | None = None
        self._open = contextlib.ExitStack()

    def of(self, jacobians: Jacobians, entry: str, samples: list[int]) -> tuple[Pullback, list[int]]:
        """A pullback of these samples at least, and which ones it has.

        To save a pass costs about what a pull costs: a third of the samples done is worth it.
        """
        has = list(range(jacobians.inputs.size))
        if self._narrow is not None and self._narrow[0] == entry and set(samples) <= set(self._narrow[1]):
            has = self._narrow[1]
        if 3 * len(samples) <= 2 * len(has) and not (jacobians.plan.random or jacobians.plan.whole):
            self.close()
            few = jacobians.at(samples)
            back = self._open.enter_context(few.pullback(self._at_once, compared=False, until=entry))
            self._narrow, has = (entry, samples, back), samples
        return (self.whole if self._narrow is None or has is not self._narrow[1] else self._narrow[2]), has

    def close(self) -> None:
        """Let go of the narrow one."""
        self._narrow = None
        self._open.close()


@contextlib.contextmanager
def layer_jacobians(jacobians: Jacobians, *, estimator: str, at_once: int) -> Iterator[dict[str, LayerJacobian]]:
    """The layers' Jacobians over one saved primal pass, which lasts as long as the body.

    Raises:
        ProbeError: reverse mode cannot run the model.
    """
    try:
        with jacobians.pullback(at_once) as back, contextlib.closing(_Saved(back, at_once)) as saved:
            maps = {entry: LayerJacobian(jacobians, saved, entry) for entry in jacobians.plan.features}
            yield maps
            ran = [m.engine for m in maps.values() if m._jacobians.engine != "auto"]
            jacobians.engine = ran[0] if ran else jacobians.engine
    except EngineRefusal as error:
        raise ProbeError(
            f"{estimator} needs both directions of differentiation, Jv and Jᵀu, and one of them cannot run this "
            f"model:\n{error}\n"
            "Take an estimator that needs forward mode alone:  estimator=Subspace(k=8) or estimator=Exact()"
        ) from error


def pushed_together(jacobians: Jacobians, maps: Mapping[str, LayerJacobian], vectors_BbD: Tensor) -> dict[str, Tensor]:
    """Jv of every layer [B, b, N], in one pass for all of them."""
    plan, count, batch = jacobians.plan, vectors_BbD.shape[1], jacobians.inputs.size
    directions = vectors_BbD.transpose(0, 1).reshape(count, batch, *plan.space).to(plan.dtype)
    kept: dict[str, list[Tensor]] = {entry: [] for entry in maps}

    def keep(entry: str, blocks: list[Tensor]) -> None:
        kept[entry].append(torch.cat(blocks, dim=2).double())

    for part in directions.split(plan.directions_at_once(count, batch)):
        jacobians.push(part, keep)
    for jacobian in maps.values():
        jacobian.products += count
    return {entry: torch.cat(parts).transpose(0, 1) * jacobians.scale(entry) for entry, parts in kept.items()}
