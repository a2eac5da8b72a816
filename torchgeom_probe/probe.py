"""GeometryProbe: the registry of hooks on a model's layers; the one file that wires the stages together.

x → directions → dual forward pass → per-layer factor → LayerGeometry → report.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from torchgeom_probe.check import CheckReport
from torchgeom_probe.errors import LayerRefusal, ProbeError, refuse_unknown
from torchgeom_probe.estimators import Estimator
from torchgeom_probe.estimators.base import estimator_of
from torchgeom_probe.estimators.cost import Cost, cost_of, seconds_per_row
from torchgeom_probe.estimators.options import (
    ProbeOptions,
    in_place_of,
    progress_bar,
    refuse_options,
    refuse_other_samples,
    refuse_rounded,
)
from torchgeom_probe.jacobian.jacobians import EngineName, Jacobians
from torchgeom_probe.jacobian.plan import Plan, coupled_samples, make_plan
from torchgeom_probe.jacobian.replay.replays import NotReplayedError, Replays
from torchgeom_probe.model.hooked import HookedModel, Transform
from torchgeom_probe.model.inputs import Inputs, Wrt
from torchgeom_probe.model.isolation import Kept, Mode, measuring, replaying
from torchgeom_probe.model.layers import LayerSpec, named, resolve, resolved_source, resolved_transforms
from torchgeom_probe.model.wrappers import refuse_unhookable, unwrapped
from torchgeom_probe.report import GeometryReport, LayerGeometry
from torchgeom_probe.shapes import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

_T = TypeVar("_T")


class GeometryProbe:
    """Measures the volume element of chosen layers of a model, in one dual forward pass for all of them.

    With J = ∂Φ/∂x for a layer's feature map Φ: R^d → R^n (its output, flattened per sample) and g = JᵀJ, √det g is how
    much the layer magnifies the input space around x.  The layers are resolved here, once; hooks sit on the model only
    while :meth:`measure` runs, so an ordinary forward pass costs nothing and the model can be copied, pickled and
    compiled meanwhile.

    Args:
        model: any ``nn.Module``; behind ``torch.compile`` or DistributedDataParallel the user's own module is probed.
        options: ``layers``, ``estimator``, ``normalize`` … as :func:`measure` has them.

    Attributes:
        wrapped: the model as it was given, with what wraps it.
        left_out: layers that ``"auto"`` would take and that have nothing to measure → why.

    Raises:
        ProbeError: a layer or source that the model does not have, an unknown engine or mode, a model that cannot be
            hooked.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Sigmoid())
    >>> with GeometryProbe(model, layers=["1", "3"], estimator="subspace:2") as probe:
    ...     report = probe.measure(torch.randn(7, 2))
    >>> report["3"].log_volume.shape, report["3"].engine
    (torch.Size([7]), 'fused')
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerSpec = "auto",
        estimator: Estimator | str | None = None,
        normalize: bool = True,
        transform: Transform | Mapping[str, Transform] | None = None,
        engine: EngineName = "auto",
        source: str | nn.Module | None = None,
        wrt: Wrt | None = None,
        memory_budget: int | None = None,
        mode: Mode = "eval",
        replay: bool = True,
        precision: Literal["bf16"] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in ProbeOptions.__annotations__}
        self._given = ProbeOptions(**given)  # type: ignore[typeddict-item]
        if not isinstance(model, nn.Module):
            raise ProbeError(
                f"model is a {type(model).__name__}, not an nn.Module.\n"
                "Wrap a function in one:  a Module whose forward calls it."
            )
        self.wrapped = model
        model = unwrapped(model)
        refuse_unhookable(model)
        refuse_options(engine, mode, memory_budget, source, wrt, precision)
        chosen = resolve(model, layers)
        self.left_out: dict[str, str] = {}
        self._named = named(model, layers)
        self.estimator = estimator_of(estimator)
        self.normalize = normalize
        self.engine: EngineName = engine
        self.wrt = wrt
        self.memory_budget = memory_budget
        self.mode: Mode = mode
        transforms = resolved_transforms(model, chosen, transform)
        self._hooked = HookedModel(model, chosen, **resolved_source(model, source), transforms=transforms)
        self._memory: dict[Any, Tensor] = {}
        self._kept = Kept(beside=list(transforms.values()))
        self._replays = Replays(self._kept) if replay else None
        self.precision = precision
        self._engine_that_runs: EngineName = engine if precision is None else "fused"
        self._closed = False
        scripted = {n: "is scripted" for n, m in chosen.items() if isinstance(m, torch.jit.ScriptModule)}
        if scripted:
            names = ", ".join(map(repr, scripted))
            self._leave_out(
                LayerRefusal(f"layers {names} are scripted: hooks do not see into them.\nName others.", scripted)
            )

    def __repr__(self) -> str:
        model = type(self._hooked.model).__name__
        return f"GeometryProbe({model}, layers={self.layers}, estimator={self.estimator})"

    @property
    def layers(self) -> list[str]:
        """The names of the layers that are measured."""
        return list(self._hooked.layers)

    @property
    def model(self) -> nn.Module:
        """The user's own module."""
        return self._hooked.model

    @property
    def transforms(self) -> Mapping[str, Transform]:
        """Layer → what maps its output before it is flattened."""
        return self._hooked.transforms

    @property
    def source(self) -> str | None:
        """The module whose output is the space that is pulled back to; None: the model's input."""
        return self._hooked.source_name

    def __enter__(self) -> GeometryProbe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def like(self, model: nn.Module | None = None, **changes: Unpack[ProbeOptions]) -> GeometryProbe:
        """Make another probe, of another model or with some options changed, whose plans are its own."""
        own = self._hooked.model if model is None else model
        return GeometryProbe(own, **{**self._given, "estimator": self.estimator, **changes})

    def close(self) -> None:
        """Let go of the model; measuring afterwards raises."""
        self._closed = True
        self._memory.clear()
        self._kept = Kept()
        self._replays = None

    def measure(
        self,
        x: Any,
        *,
        directions: Tensor | None = None,
        start: Mapping[str, LayerGeometry] | None = None,
        progress: bool | None = None,
    ) -> GeometryReport:
        """Measure every layer at a batch of samples.

        Args:
            x: [B, ...], or a tuple of the model's positional arguments, or a dict of its keyword arguments; one
                floating tensor among them, or else a probe with ``wrt`` or ``source``.
            directions: [k, B, *x.shape[1:]], the caller's own tangents: the short form of
                ``estimator=Along(directions)``.
            start: the report of an earlier measurement of the same samples, from which an estimator may start: ``TopK``
                does, from its singular vectors, and needs fewer products.
            progress: show a progress bar over the chunks; by default only on a terminal and only if it takes more than
                a second.

        Raises:
            ProbeError: an integer input, k > d, a layer that never fired, a tangent that was lost, an op without a
                derivative, ….
        """
        self._refuse_closed()
        estimator = None if directions is None else in_place_of(self.estimator, directions)
        if self._replays is not None and start is None:
            replayed = self._replayed(self._replays, x, estimator, progress)
            if replayed is not None:
                return replayed
        with measuring(self._hooked.model, mode=self.mode, kept=self._kept):
            return self._leaving_out(lambda: self._measured(*self._planned(x), estimator, start, progress))

    def _leaving_out(self, run: Callable[[], _T]) -> _T:
        while True:
            try:
                return copy_context().run(run)  # what the model sets of context variables ends with it
            except LayerRefusal as refusal:
                self._leave_out(refusal)

    def _replayed(
        self, replays: Replays, x: Any, estimator: Estimator | None, progress: bool | None
    ) -> GeometryReport | None:
        """A report without the model; None where it takes part."""
        if not replays.next_report():
            return None
        inputs = self._hooked.inputs(x, self.wrt)
        if (plan := self._kept.found.get(inputs.key())) is None:
            return None
        with replaying(self._kept, mode=self.mode):
            replays.alone = True
            try:
                return self._measured(inputs.cut_at(plan.per_sample), plan, estimator, None, progress)
            except NotReplayedError:
                return None
            finally:
                replays.alone = False

    def _measured(
        self,
        inputs: Inputs,
        plan: Plan,
        estimator: Estimator | None,
        start: Mapping[str, LayerGeometry] | None,
        progress: bool | None,
    ) -> GeometryReport:
        if plan.coupled:
            self._refuse_coupled(inputs, plan)
        if start is not None:
            refuse_other_samples(start, inputs, plan)
        estimator = estimator or self._settled(inputs)
        rows = max(count.at_once for count in estimator.cost(plan, engine=self._engine_that_runs).values())
        at_once = plan.samples_at_once(rows, inputs.size)
        parts: list[GeometryReport] = []
        begun = time.perf_counter()
        with progress_bar(inputs.size, progress) as bar:
            done = 0
            while done < inputs.size:
                stop = min(done + at_once, inputs.size)
                chunk = inputs.chunk(done, stop)
                begin = None if start is None else {e: g.samples(done, stop) for e, g in start.items()}
                jacobians = self._jacobians(chunk, plan, self._engine_that_runs)
                try:
                    found = estimator.estimate(jacobians, start=begin)
                    if self.precision is not None:
                        if plan.reference:
                            refuse_rounded(found, estimator.estimate(self._jacobians(chunk, plan, "fused", low=None)))
                        found = {e: replace(g, engine=f"{g.engine}, bf16 tangents") for e, g in found.items()}
                    found = {entry: g.defined_where(jacobians.defined(entry)) for entry, g in found.items()}
                    parts.append(GeometryReport(found, left_out=self.left_out))
                except torch.OutOfMemoryError as error:
                    if at_once == 1 or plan.whole:
                        raise ProbeError(
                            "out of memory with a single sample at a time.\n"
                            "Give a smaller memory_budget= (directions are then taken in chunks too), pool the "
                            "features with transform=, or take fewer directions: Subspace(k=...)"
                        ) from error
                    at_once = max(1, at_once // 2)
                    continue
                self._engine_that_runs = "fused" if jacobians.engine == "replay" else jacobians.engine
                plan = replace(plan, reference={})  # compared: the next passes need not wait for it
                self._kept.found[inputs.key()] = plan
                bar.update(stop - done)
                done = stop
        report = GeometryReport.joined(parts)
        report.seconds = time.perf_counter() - begun
        return report

    def _refuse_coupled(self, inputs: Inputs, plan: Plan) -> None:
        """Say what couples the samples: an op that a pass refuses by name, or else the layer where it shows."""
        direction = torch.zeros(1, inputs.size, *plan.space, dtype=plan.dtype, device=inputs.device)
        with contextlib.suppress(LayerRefusal):
            self._jacobians(inputs, plan, self.engine).push(direction, lambda entry, blocks: None)
        raise coupled_samples(plan.coupled[0])

    def _jacobians(
        self, inputs: Inputs, plan: Plan, engine: EngineName, *, low: torch.dtype | None = torch.bfloat16
    ) -> Jacobians:
        low = None if self.precision is None else low
        options = {"normalize": self.normalize, "memory": self._memory, "replays": self._replays, "low": low}
        return Jacobians(self._hooked, inputs, plan, engine, **options)  # type: ignore[arg-type]

    def _planned(self, x: Any) -> tuple[Inputs, Plan]:
        inputs = self._hooked.inputs(x, self.wrt)
        plan = self._kept.found.get(inputs.key())
        if plan is None:
            plan = make_plan(self._hooked, inputs, memory_budget=self.memory_budget)
        return inputs.cut_at(plan.per_sample), plan

    def _settled(self, inputs: Inputs) -> Estimator:
        self.estimator = self.estimator.settled(inputs)
        return self.estimator

    def _may_go_without(self, refusal: LayerRefusal) -> bool:
        return not self._named & refusal.layers.keys() and "" not in refusal.layers

    def _leave_out(self, refusal: LayerRefusal) -> None:
        """Go on without the layers that have nothing to measure, if nobody named them."""
        if not self._may_go_without(refusal):
            raise refusal
        left = self._hooked.without(set(refusal.layers))
        self._hooked = left if left.layers else replace(left, layers={"": left.model})
        self.left_out.update(refusal.layers)
        self._kept.found.clear()
        listed = "; ".join(f"{name!r} ({why})" for name, why in refusal.layers.items())
        instead = "" if left.layers else "; the model's own output takes their place"
        warnings.warn(f"layers='auto' leaves out {listed}{instead}", stacklevel=4)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ProbeError("this probe is closed.\nMake a new one:  GeometryProbe(model, layers=...)")

    def cost(self, x: Any) -> Any:
        """Say what ``measure(x)`` will take, without measuring: rows, bytes, seconds, chunks, and why.

        The seconds are rows times the time of a row in a plain forward pass, run for this on up to eight samples.  Of a
        DataLoader or Dataset: what ``measure_dataset`` takes, from a few seconds of it.

        >>> probe = GeometryProbe(nn.Sequential(nn.Linear(5, 3), nn.Tanh()), layers="*", estimator="subspace:2")
        >>> cost = probe.cost(torch.randn(7, 5))
        >>> assert (cost.rows, cost.samples_at_once) == (21, 7)  # the primal and 2 directions each, in one pass
        >>> print(cost)                                    # doctest: +ELLIPSIS
        7 samples of d = 5, engine auto
          rows: 21, in 1 chunk of up to 7 samples x 2 directions at once
        ...
          0 (n = 3), 1 (n = 3): 2 directions, one dual pass for all layers
        """
        return cost_of(x, self)

    def _cost(self, x: Any) -> Cost:
        self._refuse_closed()
        with measuring(self._hooked.model, mode=self.mode, kept=self._kept):
            inputs, plan = self._leaving_out(lambda: self._planned(x))
            seconds = copy_context().run(seconds_per_row, self._hooked.model, inputs, plan)
            estimator, engine = self._settled(inputs), self._engine_that_runs
            return Cost.of(estimator, plan, inputs.size, seconds_per_row=seconds, engine=engine)

    def check(self, x: Any, *, seed: int = 0) -> CheckReport:
        """Check the model before a long run: derivatives, samples and ops, on at most four samples.

        Per layer one Jv against central differences, which know of no derivative, and the adjoint identity
        ⟨u, Jv⟩ = ⟨Jᵀu, v⟩ with reverse mode; whether the samples of a batch leave each other alone; and which op takes
        a fused rule, which falls back to torch's derivative of it and which is refused.  A dozen plain passes.

        >>> probe = GeometryProbe(nn.Sequential(nn.Linear(3, 5), nn.Tanh()), layers="*")
        >>> probe.check(torch.randn(2, 3)).ok
        True
        """
        self._refuse_closed()
        with measuring(self._hooked.model, mode=self.mode, kept=self._kept):
            return copy_context().run(self._checked, x, seed)

    def _checked(self, x: Any, seed: int) -> CheckReport:
        while True:
            try:
                inputs, plan = self._planned(x)
                few = inputs if plan.whole else inputs.chunk(0, 4)
                jacobians = Jacobians(self._hooked, few, plan, self._engine_that_runs, memory=self._memory)
                return CheckReport.of(jacobians, seed=seed)
            except LayerRefusal as refusal:
                if not self._may_go_without(refusal):
                    return CheckReport(self.engine, refusal=str(refusal))
                self._leave_out(refusal)


def probe_of(model_or_probe: nn.Module | GeometryProbe, options: ProbeOptions, *, replay: bool = True) -> GeometryProbe:
    """The probe that a verb was given, or a new one on the model; one that is resumed to the same bits never replays.

    Raises:
        ProbeError: options beside a probe, which has its own; an option that no probe has.
    """
    refuse_unknown(options, measure, *ProbeOptions.__annotations__)
    if not isinstance(model_or_probe, GeometryProbe):
        return GeometryProbe(model_or_probe, **{"replay": replay, **options})  # type: ignore[arg-type]
    if options:
        raise ProbeError(
            f"a probe that is already made has its own options; {', '.join(f'{name}=' for name in options)} came "
            "beside it.\n"
            "Give them to GeometryProbe(model, ...), or pass the model in place of the probe."
        )
    return model_or_probe


def measure(
    model_or_probe: nn.Module | GeometryProbe,
    x: Any,
    *,
    directions: Tensor | None = None,
    start: Mapping[str, LayerGeometry] | None = None,
    progress: bool | None = None,
    **options: Unpack[ProbeOptions],
) -> GeometryReport:
    """Measure how much each layer of a model magnifies its input space around a batch of samples.

    >>> model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
    >>> report = measure(model, torch.randn(5, 2))
    >>> report["2"].log_volume.shape
    torch.Size([5])

    Of each layer's feature map Φ: R^d → R^n with J = ∂Φ/∂x and g = JᵀJ: by default log √det g itself where
    d ≤ 16; otherwise log √det VᵀgV on a random frame V of 8 directions, with the scale ½ log(tr g/d) and the effective
    dimension (tr g)²/tr g² of g.  All layers come from one dual forward pass, and the model is left as it was.

    Args:
        model_or_probe: any ``nn.Module``; or a :class:`GeometryProbe`, which plans once for many measurements.
        x: [B, ...], a tuple of the model's positional arguments, or a dict of its keyword arguments.
        directions: [k, B, *x.shape[1:]], tangents of your own: the short form of ``estimator=Along(directions)``.
        start: an earlier report on the same samples; ``TopK`` starts from it.
        progress: show a progress bar over chunks of samples; by default on a terminal, after a second.
        layers: names, globs (``*`` within a level, ``**`` across), modules, module types, a callable ``(name, module)
            -> bool``, a sequence of these, ``""`` (the model itself) or ``"auto"``: its stages, without those that have
            nothing to measure (they never run, do not depend on x, have no axis of samples), which one warning and the
            report name; the model's output where none is left.
        estimator: what to estimate: ``Exact()``, ``TopK(k=10)``, …, or a name: ``"exact"``, ``"topk:10"``,
            ``"logdet:1e-6"``.  By default :class:`~torchgeom_probe.estimators.Auto`: ``Exact()`` where d ≤ 16, and
            ``Subspace()`` otherwise.
        normalize: divide J by √n, the paper's convention (the default).
        transform: maps a layer's output before it is flattened (pooling, say); a callable, or a dict layer → callable.
        engine: ``"fused"``, ``"functorch"``, ``"vjp"``, or ``"auto"``: the first of them, in this order, that can run
            the model.  ``"vjp"`` is what training sees: the surrogate gradients of ``torch.autograd.Function``.
        source: a module, or its name; its output, instead of the model's input, is the space that the metric is pulled
            back to: the embedding of a token model.
        wrt: which of several floating arguments the metric lives on, by name or place; several of them are one space.
        memory_budget: bytes that a measurement may use; default: half of what is free.  Samples, then directions, are
            taken in chunks to keep to it; the results do not depend on the chunking.
        mode: ``"eval"`` measures in eval mode whatever mode the model is in; ``"as_is"`` keeps it.
        replay: of a probe: run a shape's second pass again from a record of it, while all that it depended on is as it
            was.
        precision: ``"bf16"`` takes tangents in bfloat16 inside of products, without reverse mode.  Depthwise models
            gain nothing; a layer that is 0.02 nats off in the first measurement of a shape is refused.

    Raises:
        ProbeError: what cannot be measured, with its likely cause and the line to write.

    Cost: one plain pass to plan by, and a dual pass over (1 + k)·B rows; ``GeometryProbe.cost(x)`` says it beforehand.
    """
    if isinstance(model_or_probe, nn.Module):
        options["replay"] = False  # one report: nothing to replay
    probe = probe_of(model_or_probe, options)
    return probe.measure(x, directions=directions, start=start, progress=progress)
