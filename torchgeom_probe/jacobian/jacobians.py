"""The Jacobians of all layers at one batch of samples, as linear maps: what an estimator works with.

Engines, chunks of directions and groups of layers are settled here; an estimator sees J and nothing of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import torch

from torchgeom_probe.errors import EngineRefusal, ProbeError
from torchgeom_probe.jacobian import functorch, fused, vjp
from torchgeom_probe.jacobian.compiled import CompiledPasses
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.gram import Factor, streamed_factor
from torchgeom_probe.model.hooked import Batch, Task
from torchgeom_probe.model.isolation import same_random_numbers
from torchgeom_probe.shapes import Tensor

EngineName = Literal["auto", "fused", "functorch", "vjp"]
_PUSHES = {"fused": fused.push, "functorch": functorch.push, "vjp": vjp.push}


class Linearization:
    """J = ∂Φ/∂x of every hooked layer at the samples of ``batch``.

    Attributes:
        plan: the sizes: entries and their features, the space, the memory budget.
        engine: the engine asked for; after the first push, under ``"auto"``, the one that ran.
        ran_compiled: whether the factors came from a compiled pass.
    """

    def __init__(
        self,
        task: Task,
        batch: Batch,
        plan: Plan,
        engine: EngineName,
        *,
        compiled: CompiledPasses | None = None,
    ) -> None:
        self.task = task
        self.batch = batch
        self.plan = plan
        self.engine: EngineName = engine
        self._compiled = compiled
        self.ran_compiled = False

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return self.batch.device

    def factors(self, num_directions: int, directions: Callable[[int, int], Tensor]) -> dict[str, Factor]:
        """Per entry, the factor of JV for all k directions; ``directions(start, stop)`` gives some of them, [·, B, *space].

        One pass where they fit into memory at once.  Otherwise several: the tangents of all of them are kept, because their cross
        terms are part of the metric, and layers are taken in groups that fit.
        """
        at_once = self.plan.directions_at_once(num_directions, self.batch.size)
        if at_once == num_directions:
            pushed = directions(0, num_directions)
            # The first pass of a plan is eager: it compares with the plain model, and finds the engine that can run it.
            if self._compiled is not None and self.engine == "fused" and not self.plan.reference:
                compiled = self._compiled.factors(self.batch, pushed, self.plan)
                if compiled is not None:
                    self.ran_compiled = True
                    return compiled
            done: dict[str, Factor] = {}

            def reduce(entry: str, blocks: list[Tensor]) -> None:
                done[entry] = Factor.of(blocks)

            self.push(pushed, reduce, any_order=True)
            return done
        if self._compiled is not None:
            self._compiled.refuse("not all directions fit into the memory budget at once")
        return dict(self._factors_in_chunks(num_directions, directions, at_once))

    def _factors_in_chunks(
        self, num_directions: int, directions: Callable[[int, int], Tensor], at_once: int
    ) -> Iterator[tuple[str, Factor]]:
        for group in self.plan.layer_groups(num_directions, self.batch.size):
            length = self.plan.features[group[0]]
            if num_directions * length * self.plan.itemsize * self.batch.size > self.plan.budget:
                yield group[0], self._streamed(group[0], num_directions, directions, at_once)
                continue
            for entry, tangents in self._kept(group, num_directions, directions, at_once).items():
                yield entry, Factor.of([tangents])

    def _kept(
        self, group: list[str], num_directions: int, directions: Callable[[int, int], Tensor], at_once: int
    ) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for start in range(0, num_directions, at_once):
            stop = min(start + at_once, num_directions)

            def keep(entry: str, blocks: list[Tensor], start: int = start, stop: int = stop) -> None:
                if entry not in group:
                    return
                whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
                if entry not in kept:
                    kept[entry] = whole.new_empty(num_directions, *whole.shape[1:])
                kept[entry][start:stop] = whole  # copied: the next layer may write over it

            self.push(directions(start, stop), keep)
        return kept

    def _streamed(
        self, entry: str, num_directions: int, directions: Callable[[int, int], Tensor], at_once: int
    ) -> Factor:
        def tangents(start: int, stop: int) -> Tensor:
            made: list[Tensor] = []

            def keep(fired: str, blocks: list[Tensor]) -> None:
                if fired == entry:
                    made.append(torch.cat(blocks, dim=2))  # a copy: the next layer may write over it

            self.push(directions(start, stop), keep, until=entry)
            return made[0]

        return streamed_factor(
            tangents,
            count=num_directions,
            length=self.plan.features[entry],
            at_once=at_once,
            batch=self.batch.size,
            budget=self.plan.budget,
            itemsize=self.plan.itemsize,
        )

    def push(
        self, directions: Tensor, sink: fused.Sink, *, until: str | None = None, any_order: bool = False
    ) -> None:
        """JV of every layer, handed to the sink layer by layer as blocks [k, B, n_i].

        ``any_order``: the sink does not mind in which order the features come.  ``until`` names the last entry that is wanted: the dual
        pass ends there, and what comes after it in the model is not run.
        """
        if until is not None:
            with contextlib.suppress(_Reached):
                self.push(directions, _ending_at(until, sink))
            return
        fired: set[str] = set()

        def noting(entry: str, blocks: list[Tensor]) -> None:
            fired.add(entry)
            sink(entry, blocks)

        self._push(directions, noting, any_order)
        odd = fired ^ self.plan.features.keys()
        if odd:
            raise ProbeError(
                f"{min(odd)!r} fired for some samples only: the model calls a module a different number of times for different "
                "samples.\nMeasure one sample at a time:  [probe.measure(x[i : i + 1]) for i in range(len(x))]"
            )

    def _push(self, directions: Tensor, sink: fused.Sink, any_order: bool) -> None:
        if self.engine != "auto":
            _guarded(self.engine, self.task, self.batch, directions, sink, self.plan, any_order)
            return
        refusals = []
        names: tuple[EngineName, ...] = ("fused", "functorch", "vjp")
        for engine in names:
            try:
                _guarded(engine, self.task, self.batch, directions, sink, self.plan, any_order)
            except EngineRefusal as refusal:
                refusals.append(f"  {engine}: {_first_line(refusal)}")
                continue
            except _Reached:
                self.engine = engine
                raise
            self.engine = engine
            return
        raise ProbeError(
            "no engine can differentiate this model:\n" + "\n".join(refusals) + "\n"
            "Measure the layers before that op, or give the op a derivative (torch.autograd.Function with jvp and vmap)."
        )

    @contextlib.contextmanager
    def pullback(self, at_once: int = 1) -> Iterator[vjp.Pullback]:
        """Reverse mode at these samples: Jᵀu of every layer, ``at_once`` cotangents together where the saved pass fits so often."""
        copies = self.plan.copies(at_once, self.batch.size, self.device)
        own_layout = not self.plan.writes_through_views
        try:
            with vjp.pullback(self.task, self.batch, copies=copies, own_layout=own_layout) as back:
                yield back
        except (ProbeError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            raise EngineRefusal(
                f"reverse mode failed ({_first_line(error)}).\nMeasure with forward mode:  GeometryProbe(model, ..., engine='fused')"
            ) from error

    def only(self, layers: list[str]) -> Linearization:
        """The same with fewer entries, of those layers alone."""
        modules = {name: module for name, module in self.task.layers.items() if name in layers}
        features = {e: n for e, n in self.plan.features.items() if e.split("#")[0] in modules}
        return Linearization(
            replace(self.task, layers=modules), self.batch, replace(self.plan, features=features), self.engine
        )

    def at(self, samples: list[int]) -> Linearization:
        """The same at some of the samples; not for a model that draws random numbers, which then are others."""
        plan = replace(self.plan, reference={})  # of the batch's own first samples
        return Linearization(self.task, self.batch.at(samples), plan, self.engine)


class _Reached(
    BaseException
):  # no Exception: neither the model's nor our own error handling may take it for a failure
    pass


def _ending_at(entry: str, sink: fused.Sink) -> fused.Sink:
    def ending(fired: str, blocks: list[Tensor]) -> None:
        sink(fired, blocks)
        if fired == entry:
            raise _Reached

    return ending


def _guarded(
    engine: str,
    task: Task,
    batch: Batch,
    directions: Tensor,
    sink: fused.Sink,
    plan: Plan,
    any_order: bool,
) -> None:
    """Run one engine; what breaks in it, on a model whose plain forward pass is known to run, is a refusal of that engine."""
    try:
        # The same random numbers in every pass: directions that are pushed apart must be pushed through the same function.
        with same_random_numbers(directions.device):
            if engine == "fused":
                fused.push(
                    task,
                    batch,
                    directions,
                    sink,
                    reference=plan.reference,
                    any_order=any_order,
                    own_layout=not plan.writes_through_views,
                )
            else:
                _PUSHES[engine](task, batch, directions, sink)
    except (ProbeError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise EngineRefusal(
            f"the engine {engine!r} failed on this model ({_first_line(error)}).\nTry another:  engine='auto', 'functorch' or 'vjp'"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (
        text.splitlines()[0]
        if isinstance(error, ProbeError)
        else f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    )
