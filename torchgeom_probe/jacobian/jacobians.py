"""The Jacobians of all layers at one batch of samples, as linear maps: what an estimator works with.

Engines, chunks of directions and groups of layers are settled here; an estimator sees J and nothing of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from torchgeom_probe.dual.one_op import refuse_another_adjoint, waves
from torchgeom_probe.dual.passes import within
from torchgeom_probe.errors import EngineRefusal, ProbeError, first_line
from torchgeom_probe.jacobian import functorch, fused, vjp
from torchgeom_probe.jacobian.plan import Plan, coupled_samples
from torchgeom_probe.jacobian.replay.replays import NotReplayedError, Replays
from torchgeom_probe.jacobian.vjp import Reached
from torchgeom_probe.linalg.gram import Factor, streamed_factor
from torchgeom_probe.model.hooked import HookedModel
from torchgeom_probe.model.inputs import Inputs
from torchgeom_probe.model.isolation import measuring, same_random_numbers
from torchgeom_probe.model.sharded import comes_and_goes, gathered
from torchgeom_probe.shapes import Tensor

EngineName = Literal["auto", "fused", "functorch", "vjp", "replay"]
_PUSHES: dict[str, Callable[..., None]] = {"fused": fused.push, "functorch": functorch.push, "vjp": vjp.push}


class Jacobians:
    """J = ∂Φ/∂x of every hooked layer at a batch of samples; divided by √n where ``normalize``.

    Attributes:
        hooked, inputs: the model and the samples.
        plan: the sizes: entries and their features, the space, the memory budget.
        engine: the engine asked for; after the first push, under ``"auto"``, the one that ran.
        normalize: whether every J is divided by √n, the paper's convention: here, once, and nowhere else.
        low: the type that products take the tangents in; None: their own.
        finite: entry → [B], whether the layer's own values are finite there; of every layer that a pass has reached.
    """

    def __init__(
        self,
        hooked: HookedModel,
        inputs: Inputs,
        plan: Plan,
        engine: EngineName,
        *,
        normalize: bool = False,
        memory: dict[Any, Tensor] | None = None,
        finite: dict[str, Tensor] | None = None,
        replays: Replays | None = None,
        low: torch.dtype | None = None,
    ) -> None:
        self.hooked = hooked
        self.inputs = inputs
        self.plan = plan
        self.engine: EngineName = engine
        self.normalize = normalize
        self._memory = {} if memory is None else memory
        self.finite = {} if finite is None else finite
        self._replays = replays
        self.low = low

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return self.inputs.device

    def scale(self, entry: str) -> float:
        """What J of an entry is multiplied by: 1/√n or 1."""
        return self.plan.features[entry] ** -0.5 if self.normalize else 1.0

    def remembered(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that is made once in the life of a probe, such as random directions."""
        key = (key, self.plan.space, self.plan.dtype, self.device)
        if key not in self._memory:
            self._memory[key] = make().to(device=self.device, dtype=self.plan.dtype)
        return self._memory[key]

    def factors(self, num_directions: int, directions: Callable[[int, int], Tensor]) -> dict[str, Factor]:
        """Per entry, the factor of JV for all k directions; ``directions(start, stop)`` gives some, [·, B, *space].

        One pass where they fit into memory at once.  Otherwise several: the tangents of all of them are kept, because
        their cross terms are part of the metric, and layers are taken in groups that fit.
        """
        at_once = self.plan.directions_at_once(num_directions, self.inputs.size)
        done: dict[str, Factor] = {}
        if at_once == num_directions and self._may_replay:
            assert self._replays is not None
            (done, finite), replayed = self._replays.pushed(
                self.inputs, directions(0, num_directions), self._in_one_pass, (*self.plan.features, self.plan.layout)
            )
            self.finite.update(finite)
            self.engine = "replay" if replayed else "fused"
        elif at_once == num_directions:
            done, _ = self._in_one_pass(self.inputs, directions(0, num_directions))
        else:
            done.update(self._factors_in_chunks(num_directions, directions, at_once))
        if self.low is not None:  # the singular values resolve what its rounding leaves
            done = {entry: replace(factor, dtype=self.low) for entry, factor in done.items()}
        return {entry: factor.scaled(self.scale(entry)) for entry, factor in done.items()}

    @property
    def _may_replay(self) -> bool:
        """Whether a pass may be recorded: not the first of a shape, which finds the engine and is compared."""
        return self._replays is not None and self.engine in ("fused", "replay") and not self.plan.reference

    def _in_one_pass(self, inputs: Inputs, directions: Tensor) -> tuple[dict[str, Factor], dict[str, Tensor]]:
        """The factors of all directions together, not scaled, and at which samples the layers' values are finite."""
        done: dict[str, Factor] = {}
        one = self._with(self.hooked, inputs, self.plan)
        one.push(directions, lambda entry, blocks: done.update({entry: Factor.of(blocks)}), any_order=True)
        self.engine = one.engine
        self.finite.update(one.finite)
        return done, one.finite

    def energies(self, directions: Tensor) -> dict[str, Tensor]:
        """|Jv|² of every layer for directions [s, B, *space], float64 [s, B]; in one pass where memory allows."""
        found: dict[str, list[Tensor]] = {}

        def keep(entry: str, blocks: list[Tensor]) -> None:
            squares = [torch.linalg.vector_norm(block, dim=2, dtype=torch.float64).square() for block in blocks]
            found.setdefault(entry, []).append(torch.stack(squares).sum(0) * self.scale(entry) ** 2)

        for part in directions.split(self.plan.directions_at_once(directions.shape[0], self.inputs.size)):
            self.push(part, keep)
        return {entry: torch.cat(parts) for entry, parts in found.items()}

    def _factors_in_chunks(
        self, num_directions: int, directions: Callable[[int, int], Tensor], at_once: int
    ) -> Iterator[tuple[str, Factor]]:
        for group in self.plan.layer_groups(num_directions, self.inputs.size):
            length = self.plan.features[group[0]]
            if num_directions * length * self.plan.itemsize * self.inputs.size > self.plan.budget:
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
            batch=self.inputs.size,
            budget=self.plan.budget,
            itemsize=self.plan.itemsize,
        )

    def push(self, directions: Tensor, sink: fused.Sink, *, until: str | None = None, any_order: bool = False) -> None:
        """JV of every layer, handed to the sink layer by layer as blocks [k, B, n_i].

        ``any_order``: the sink does not mind in which order the features come.  ``until`` names the last entry that is
        wanted, where it is not the last of all: the dual pass ends there, and the rest of the model is not run.
        """
        fired: set[str] = set()
        last = list(self.plan.features)[-1] if until is None else until

        def noting(entry: str, blocks: list[Tensor]) -> None:
            fired.add(entry)
            if sum(block.shape[2] for block in blocks) != self.plan.features.get(entry, 0) > 0:
                raise coupled_samples(entry)
            sink(entry, blocks)
            if entry == last:
                raise Reached

        with contextlib.suppress(Reached):
            self._push(directions, noting, any_order)
        odd = fired ^ self.plan.features.keys()
        if until is None and odd:
            raise ProbeError(
                f"{min(odd)!r} fired for some samples only: the model calls a module a different number of times for "
                "different samples.\n"
                "Measure one sample at a time:  [probe.measure(x[i : i + 1]) for i in range(len(x))]"
            )

    def defined(self, entry: str) -> Tensor | None:
        """[B], at which samples J is defined: where the layer's own values and the input are finite; None: at all.

        A tangent does not tell: behind a ReLU that of a nan is 0.  On a GPU always a tensor, which nobody waits for.
        """
        if self.inputs.point is not None:
            self._see(fused.START, [self.inputs.point])
        defined = self.finite[entry] & self.finite.get(fused.START, self.finite[entry])
        return None if defined.device.type == "cpu" and bool(defined.all()) else defined

    def _see(self, entry: str, leaves: Sequence[Tensor]) -> None:
        """Note where a layer's own values [B, ...] are not finite; once, and without waiting for the device."""
        if entry not in self.finite:
            # Of the means, which nan and infinity end up in: 200 times as fast as asking every number.
            wide = [leaf.unsqueeze(1) if leaf.ndim == 1 else leaf for leaf in leaves if leaf.numel()]
            means = [values.mean(tuple(range(1, values.ndim))).isfinite() for values in wide]
            everywhere = torch.ones(len(leaves[0]), dtype=torch.bool, device=leaves[0].device)  # of no features at all
            self.finite[entry] = torch.stack([everywhere, *means]).all(0)

    def _seer(self, engine: str) -> fused.Seer:
        """Sees the values of one pass of an engine, which must be the plain pass's."""
        # Fewer samples draw other numbers.
        known = self.plan.reference if not self.plan.random or self.inputs.size == self.inputs.total else {}

        def see(entry: str, leaves: list[Tensor]) -> None:
            self._see(entry, leaves)
            if entry in known:
                _refuse_another_value(engine, entry, leaves, known[entry])

        return see

    def _push(self, directions: Tensor, sink: fused.Sink, any_order: bool) -> None:
        self._refuse_alone()
        if self.engine != "auto":
            self._guarded("fused" if self.engine == "replay" else self.engine, directions, sink, any_order)
            return
        refusals = []
        names: tuple[EngineName, ...] = ("fused", "functorch", "vjp")
        for engine in names:
            try:
                self._guarded(engine, directions, sink, any_order)
            except EngineRefusal as refusal:
                refusals.append(f"  {engine}: {first_line(refusal)}")
                continue
            except Reached:
                self.engine = engine
                raise
            self.engine = engine
            return
        raise ProbeError(
            "no engine can differentiate this model:\n" + "\n".join(refusals) + "\n"
            "Measure the layers before that op, or give the op a derivative:  torch.autograd.Function with a backward"
        )

    def _refuse_alone(self) -> None:
        """Raise where the model's own code would run and may not."""
        if self._replays is not None and self._replays.alone:
            raise NotReplayedError

    def _guarded(self, engine: str, directions: Tensor, sink: fused.Sink, any_order: bool) -> None:
        """Run one engine; what breaks in it is a refusal of that engine: the plain pass is known to run."""
        plan, see = self.plan, self._seer(engine)
        options: dict[str, Any] = {}
        if engine == "fused":
            options = {"any_order": any_order, "layout": plan.layout, "low": self.low}
        if engine == "functorch" and (plan.reference or (plan.random and not self.inputs.start)):
            functorch.refuse_threads(self.hooked, self.inputs)
        try:
            # The same random numbers in every pass: directions that are pushed apart must be pushed through the same
            # function.
            with same_random_numbers(directions.device), within(harmless=plan.harmless):
                _PUSHES[engine](self.hooked, self.inputs, directions, sink, see=see, **options)
        except (ProbeError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            others = " or ".join(repr(name) for name in ("auto", *_PUSHES) if name != engine)
            raise EngineRefusal(
                f"the engine {engine!r} failed on this model ({first_line(error)}).\nTry another:  engine={others}"
            ) from error

    @contextlib.contextmanager
    def pullback(self, at_once: int = 1, *, compared: bool = True, until: str | None = None) -> Iterator[vjp.Pullback]:
        """Reverse mode at these samples: Jᵀu of every layer, not scaled; ``compared`` with the dual pass.

        The primal pass ends with the entry ``until``, or with the last one: nothing after it is asked for.

        ``at_once`` cotangents go together where the saved pass fits so often.
        """
        self._refuse_alone()
        if self.low is not None:
            raise ProbeError(
                "precision='bf16' is for estimators of dual passes alone; this one needs reverse mode as well.\n"
                "Write estimator=Subspace(k=8), or leave precision= out"
            )
        model, copies = self.hooked.model, self.plan.copies(at_once, self.inputs.size, self.device)
        if comes_and_goes(model):  # what is saved reads the weights again
            whole = self.pullback(at_once, compared=compared, until=until)
            with gathered(model), measuring(model, mode="as_is"), whole as back:
                yield back
            return
        options: Any = {"copies": copies, "layout": self.plan.layout, "see": self._seer("vjp")}
        options["until"] = until or list(self.plan.features)[-1]
        with contextlib.ExitStack() as pass_:
            try:
                pass_.enter_context(within(harmless=self.plan.harmless))
                back = pass_.enter_context(vjp.pullback(self.hooked, self.inputs, **options))
            except (ProbeError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise vjp.refused(error) from error
            if compared and self.engine in ("auto", "fused", "replay"):
                self._refuse_surrogates(back)
            yield back

    def _refuse_surrogates(self, back: vjp.Pullback) -> None:
        """Compare reverse mode with the dual pass, by one product each: a backward may be another function's.

        A straight-through estimator or a gradient reversal gives what training wants, which is no Jᵀ.
        """
        shape = (1, self.inputs.size, *self.plan.space)
        v = waves(torch.empty(shape, dtype=self.plan.dtype, device=self.device))
        pushed: dict[str, Tensor] = {}
        try:
            self._guarded("fused", v, lambda entry, blocks: pushed.update({entry: torch.cat(blocks, dim=2)}), False)
        except EngineRefusal:
            return
        for entry, jv in pushed.items():

            def pull(us: Sequence[Tensor], entry: str = entry) -> list[Tensor]:
                return [back.pull(entry, us[0])]

            why = (
                f"reverse mode gives layer {entry!r} another derivative than that of the function that runs: an op "
                "has a surrogate gradient (straight-through, gradient reversal, clipping).\n"
                "Measure with forward mode:  estimator=Subspace(k=8)"
            )
            refuse_another_adjoint([jv], [v], pull, why)

    def only(self, layers: list[str]) -> Jacobians:
        """The same with fewer entries, of those layers alone."""
        hooked = self.hooked.without(set(self.hooked.layers) - set(layers))
        features = {e: n for e, n in self.plan.features.items() if e.split("#")[0] in hooked.layers}
        return self._with(hooked, self.inputs, replace(self.plan, features=features), self.finite)

    def at(self, samples: list[int]) -> Jacobians:
        """The same at some of the samples; not for a model that draws random numbers, which then are others."""
        # The reference is of the batch's own first samples.
        return self._with(self.hooked, self.inputs.at(samples), replace(self.plan, reference={}))

    def _with(
        self, hooked: HookedModel, inputs: Inputs, plan: Plan, finite: dict[str, Tensor] | None = None
    ) -> Jacobians:
        options = {
            "normalize": self.normalize,
            "memory": self._memory,
            "finite": finite,
            "replays": self._replays,
            "low": self.low,
        }
        return Jacobians(hooked, inputs, plan, self.engine, **options)  # type: ignore[arg-type]


def _refuse_another_value(engine: str, entry: str, values: list[Tensor], reference: Tensor) -> None:
    """Refuse an engine whose layer has another value than the plain model's [m, n]: it differentiates another function.

    That is the case where an op writes in place through a view that the pass had to copy, and where numbers are drawn
    in the order of memory for a tensor that lies there in another order.
    """
    value = torch.cat([leaf.reshape(leaf.shape[0], -1) for leaf in values], dim=1)[: len(reference)]
    expected = reference[: len(value)]
    # Of the finite ones: a sample that is not says nothing of the others' rounding.
    scale = expected.nan_to_num(posinf=0.0, neginf=0.0).abs().amax() if expected.numel() else expected.sum()
    # Rounding moves a deep network's output by a tiny share of its size, a write that was lost by a large one.
    eps = torch.finfo(value.dtype).eps
    allowed = (1e-6 if eps < 1e-12 else max(1e-2, 8 * eps)) * scale
    if ((value - expected).abs() > allowed).any():
        other = "fused" if engine == "vjp" else "vjp"
        raise EngineRefusal(
            f"the engine {engine!r} gives layer {entry!r} another value than the model's plain forward pass: an op "
            "writes in place through a view, draws random numbers in the order of memory, or the model asks whether "
            "gradients are wanted.\n"
            "Write or draw out of place (torch.randn(x.shape) for torch.randn_like(x)), or measure with "
            f"engine={other!r}."
        )
