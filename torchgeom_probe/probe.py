"""GeometryProbe: the registry of hooks on a model's layers; the one file that wires the stages together.

x → directions → dual forward pass → per-layer factor → LayerGeometry → report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves
from tqdm import tqdm

from torchgeom_probe.dual import recording
from torchgeom_probe.errors import EngineRefusal, ProbeError
from torchgeom_probe.estimators import Estimator, Exact, Subspace, TopK
from torchgeom_probe.estimators.cost import Forecast
from torchgeom_probe.estimators.subspace import along
from torchgeom_probe.estimators.topk import start_from
from torchgeom_probe.jacobian.compiled import CompiledPasses
from torchgeom_probe.jacobian.jacobians import EngineName, Linearization
from torchgeom_probe.jacobian.plan import Plan, make_plan
from torchgeom_probe.linalg import directions as tangents
from torchgeom_probe.linalg.spectrum import SpectralDensity
from torchgeom_probe.model.hooked import Batch, Task, Transform, features
from torchgeom_probe.model.isolation import Mode, measuring, unwrapped
from torchgeom_probe.model.layers import LayerSpec, close_names, resolve
from torchgeom_probe.report import GeometryReport, LayerGeometry
from torchgeom_probe.shapes import Tensor

_ENGINES = ("auto", "fused", "functorch", "vjp")


class GeometryProbe:
    """Measures the volume element of chosen layers of a model, in one dual forward pass for all of them.

    With J = ∂Φ/∂x for a layer's feature map Φ: R^d → R^n (its output, flattened per sample) and g = JᵀJ, √det g is how much the layer
    magnifies the input space around x.  The layers are resolved here, once; hooks sit on the model only while :meth:`measure` runs,
    so an ordinary forward pass costs nothing and the model can be copied, pickled and compiled meanwhile.

    Args:
        model: any ``nn.Module``; behind ``torch.compile`` or DistributedDataParallel the user's own module is probed.
        layers: names, globs (``*`` within a level, ``**`` across), modules, module types, a callable ``(name, module) -> bool``, a
            sequence of these, ``""`` (the model itself) or ``"auto"`` (its stages).
        estimator: what to estimate: ``Exact()``, ``Subspace(k, seed)`` (the default), ….
        normalize: divide J by √n, the paper's convention.
        transform: maps a layer's output before it is flattened (pooling, say); a callable, or a dict layer → callable.
        engine: ``"fused"``, ``"functorch"``, ``"vjp"``, or ``"auto"``: the first of them, in this order, that can run the model.
        source: a module's name; its output, instead of the model's input, is the space that the metric is pulled back to.
        memory_budget: bytes that a measurement may use; default: half of what is free.  Samples, then directions, are taken in
            chunks to keep to it; the results do not depend on the chunking.
        mode: ``"eval"`` measures in eval mode whatever mode the model is in; ``"as_is"`` keeps it.
        compile: trace the whole dual pass, hooks and reductions included, and compile it with Inductor (on CUDA, under CUDA graphs;
            on a CPU the eager pass is the faster one).  Once per shape: it takes half a minute to five, so it pays where one shape is
            measured many times.  The weights are inputs of the compiled code, which so follows the optimizer.  The first measurement
            of a shape is still the eager pass, which checks the model; what cannot be compiled runs eagerly, with one warning that
            says why.

    Raises:
        ProbeError: a layer or source that the model does not have, an unknown engine or mode, a model that cannot be hooked.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Sigmoid())
    >>> with GeometryProbe(model, layers=["1", "3"], estimator=Subspace(k=2)) as probe:
    ...     report = probe.measure(torch.randn(7, 2))
    >>> report["3"].log_volume.shape, report["3"].engine
    (torch.Size([7]), 'fused')
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerSpec = "auto",
        estimator: Estimator | None = None,
        normalize: bool = True,
        transform: Transform | Mapping[str, Transform] | None = None,
        engine: EngineName = "auto",
        source: str | nn.Module | None = None,
        memory_budget: int | None = None,
        mode: Mode = "eval",
        compile: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ProbeError(
                f"model is a {type(model).__name__}, not an nn.Module.\nWrap a function in one:  a Module whose forward calls it."
            )
        model = unwrapped(model)
        _refuse_unhookable(model)
        if engine not in _ENGINES:
            raise ProbeError(f"engine={engine!r} is unknown.\nWrite one of {', '.join(map(repr, _ENGINES))}.")
        if mode not in ("eval", "as_is"):
            raise ProbeError(f"mode={mode!r} is unknown.\nWrite mode='eval' (the default) or mode='as_is'.")
        if estimator is None:
            estimator = Subspace()
        if not isinstance(estimator, Estimator):
            raise ProbeError(
                f"estimator={estimator!r} is no estimator.\nWrite, for instance, estimator=Subspace(k=8) or estimator=Exact()."
            )
        if memory_budget is not None and (not isinstance(memory_budget, int) or memory_budget < 1):
            raise ProbeError(
                f"memory_budget={memory_budget!r}: it is a number of bytes.\nWrite, for instance, memory_budget=2 * 2**30."
            )
        if compile and (engine not in ("auto", "fused") or not isinstance(estimator, (Subspace, Exact))):
            raise ProbeError(
                f"compile=True compiles the dual pass of Subspace and Exact; this probe has engine={engine!r} and {estimator}.\n"
                "Leave it out, or write GeometryProbe(model, ..., estimator=Subspace(), engine='fused', compile=True)"
            )
        chosen = resolve(model, layers)
        self.estimator = estimator
        self.normalize = normalize
        self.engine: EngineName = engine
        self.memory_budget = memory_budget
        self.mode: Mode = mode
        self._task = Task(
            model,
            chosen,
            **_resolved_source(model, source),
            transforms=_resolved_transforms(model, chosen, transform),
        )
        self._compiled = CompiledPasses(self._task) if compile else None
        self._plans: dict[Any, Plan] = {}
        self._engine_that_runs: EngineName = engine
        self._closed = False

    @property
    def layers(self) -> list[str]:
        """The names of the layers that are measured."""
        return list(self._task.layers)

    def __enter__(self) -> GeometryProbe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model; measuring afterwards raises."""
        self._closed = True
        self._compiled = None
        self._plans.clear()

    def measure(
        self,
        x: Any,
        *,
        directions: Tensor | None = None,
        warm: GeometryReport | None = None,
        progress: bool | None = None,
    ) -> GeometryReport:
        """Measure every layer at a batch of samples.

        Args:
            x: [B, ...], or a tuple of the model's positional arguments, or a dict of its keyword arguments; exactly one floating
                tensor among them, unless the probe has a ``source``.
            directions: [k, B, *x.shape[1:]], the caller's own tangents (with the estimator Subspace): the volume of what they span.
            warm: the report of an earlier measurement of the same samples (with the estimator TopK), to start from its singular vectors.
            progress: show a progress bar over the chunks; by default only on a terminal and only if it takes more than a second.

        Raises:
            ProbeError: an integer input, k > d, a layer that never fired, a tangent that was lost, an op without a derivative, ….
        """
        if self._closed:
            raise ProbeError("this probe is closed.\nMake a new one:  GeometryProbe(model, layers=...)")
        if directions is not None and not isinstance(self.estimator, Subspace):
            raise ProbeError(
                f"directions= go with the estimator Subspace; this probe has {self.estimator}.\n"
                "Write GeometryProbe(model, ..., estimator=Subspace())"
            )
        if warm is not None and not isinstance(self.estimator, TopK):
            raise ProbeError(
                f"warm= goes with the estimator TopK; this probe has {self.estimator}.\n"
                "Leave it out, or write GeometryProbe(model, ..., estimator=TopK())"
            )
        task = self._task
        batch = Batch.of(x, task)
        with measuring(task.model, mode=self.mode):
            plan = self._planned(batch)
            start_vectors = None if warm is None else start_from(warm, plan, batch.size)
            if directions is not None:
                like = torch.empty((batch.size, *plan.space), dtype=plan.dtype, device=batch.device)
                directions = tangents.checked(directions, like)
            rows = self.estimator.num_rows(plan) if directions is None else directions.shape[0]
            at_once = plan.samples_at_once(rows, batch.size)
            parts: list[dict[str, LayerGeometry]] = []
            with _bar(batch.size, progress) as bar:
                start = 0
                while start < batch.size:
                    stop = min(start + at_once, batch.size)
                    try:
                        parts.append(
                            self._measured(
                                batch.chunk(start, stop),
                                plan,
                                directions,
                                start_vectors,
                                start,
                                stop,
                                at_once,
                            )
                        )
                    except torch.OutOfMemoryError as error:
                        if at_once == 1:
                            raise ProbeError(
                                "out of memory with a single sample at a time.\nGive a smaller memory_budget= (directions are then taken "
                                "in chunks too), pool the features with transform=, or take fewer directions: Subspace(k=...)"
                            ) from error
                        at_once = max(1, at_once // 2)
                        continue
                    bar.update(stop - start)
                    start = stop
        return GeometryReport({entry: _joined([part[entry] for part in parts]) for entry in parts[0]})

    def _measured(
        self,
        chunk: Batch,
        plan: Plan,
        directions: Tensor | None,
        start_vectors: Mapping[str, Tensor] | None,
        start: int,
        stop: int,
        at_once: int,
    ) -> dict[str, LayerGeometry]:
        # A last chunk that is smaller than the others is not worth a compilation of its own.
        compiled = self._compiled if start == 0 or stop - start == at_once else None
        linear = Linearization(self._task, chunk, plan, self._engine_that_runs, compiled=compiled)
        if start_vectors is not None and isinstance(self.estimator, TopK):
            warm = {entry: vectors[start:stop] for entry, vectors in start_vectors.items()}
            measured = self.estimator.estimate(linear, normalize=self.normalize, warm=warm)
        elif directions is None:
            measured = self.estimator.estimate(linear, normalize=self.normalize)
        else:
            measured = along(directions[:, start:stop], linear, normalize=self.normalize)
        self._engine_that_runs = linear.engine
        plan.reference.clear()  # compared: the next passes need not wait for it
        if linear.ran_compiled:
            measured = {entry: replace(result, engine="compiled") for entry, result in measured.items()}
        return measured

    def _planned(self, batch: Batch) -> Plan:
        leaves, spec = tree_flatten((batch.args, dict(batch.kwargs)))
        key = (
            str(spec),
            *(
                (tuple(v.shape[1:]), v.shape[0] == 1, v.dtype, v.device) if isinstance(v, Tensor) else repr(v)
                for v in leaves
            ),
        )
        if key not in self._plans:
            try:
                self._plans[key] = make_plan(self._task, batch, memory_budget=self.memory_budget)
            except ProbeError:
                raise
            except Exception as error:
                shapes = [
                    tuple(v.shape)
                    for v in tree_leaves((batch.args, dict(batch.kwargs)))
                    if isinstance(v, Tensor)
                ]
                raise ProbeError(
                    f"the model's own forward pass fails on x of shape {shapes[0] if len(shapes) == 1 else shapes}: "
                    f"{type(error).__name__}: {error}\nRun it by hand:  model.eval(); model(x)"
                ) from error
        return self._plans[key]

    def plan(self, x: Any) -> Forecast:
        """Say what ``measure(x)`` will take, without measuring: rows, bytes, seconds, chunks, forward or reverse mode per layer and why.

        The seconds are rows times the time of a row in a plain forward pass, which is run for this on up to eight samples.

        >>> probe = GeometryProbe(nn.Sequential(nn.Linear(5, 3), nn.Tanh()), layers="*", estimator=Subspace(k=2))
        >>> forecast = probe.plan(torch.randn(7, 5))
        >>> forecast.rows, forecast.samples_at_once        # 7 samples, the primal and 2 directions each, in one pass
        (21, 7)
        >>> print(forecast)                                # doctest: +ELLIPSIS
        7 samples of d = 5, engine auto
          rows: 21, in 1 chunk of up to 7 samples x 2 directions at once
        ...
          0 (n = 3), 1 (n = 3): 2 directions, one dual pass for all layers
        """
        if self._closed:
            raise ProbeError("this probe is closed.\nMake a new one:  GeometryProbe(model, layers=...)")
        batch = Batch.of(x, self._task)
        with measuring(self._task.model, mode=self.mode):
            plan = self._planned(batch)
            return Forecast.of(
                self.estimator,
                plan,
                batch.size,
                seconds_per_row=_seconds_per_row(self._task, batch),
                engine=self._engine_that_runs,
                compiled=self._compiled is not None,
            )

    def check(self, x: Any, *, seed: int = 0) -> CheckReport:
        """Check the model before a long run: derivatives, samples and ops, on at most four samples.

        Per layer the adjoint identity ⟨u, Jv⟩ = ⟨Jᵀu, v⟩ between the dual pass and reverse mode; whether the samples of a batch leave each
        other alone; and which op takes a fused rule, which falls back to ``vmap(jvp)`` and which is refused.

        >>> probe = GeometryProbe(nn.Sequential(nn.Linear(3, 5), nn.Tanh()), layers="*")
        >>> probe.check(torch.randn(2, 3)).ok
        True
        """
        task = self._task
        batch = Batch.of(x, task).chunk(0, 4)
        with measuring(task.model, mode=self.mode), recording() as ops:
            plan = self._planned(batch)
            coupled = _coupled(task, batch)
            linear = Linearization(task, batch, plan, self.engine)
            generator = torch.Generator("cpu").manual_seed(seed)
            v = torch.randn(
                1, batch.size, *plan.space, generator=generator, dtype=torch.float64, device="cpu"
            )
            v = v.to(device=batch.device, dtype=plan.dtype)
            pushed: dict[str, Tensor] = {}
            refusal = None
            try:
                linear.push(v, lambda entry, blocks: pushed.update({entry: torch.cat(blocks, dim=2).clone()}))
            except ProbeError as error:
                refusal = str(error)
            errors: dict[str, float] = {}
            if refusal is None:
                try:
                    errors = _adjoint_errors(linear, pushed, v, generator)
                except (ProbeError, EngineRefusal) as error:
                    refusal = f"the adjoint check needs reverse mode, which cannot run: {error}"
        tolerance = 100 * torch.finfo(plan.dtype).eps * max(1.0, len(plan.features)) ** 0.5
        return CheckReport(
            engine=linear.engine,
            adjoint_errors=errors,
            tolerance=tolerance,
            coupled_layers=coupled,
            fused=sorted(ops["fused"]),
            fallback=sorted(ops["fallback"]),
            refused=sorted(ops["refused"]),
            refusal=refusal,
        )


def measure(
    model: nn.Module,
    x: Any,
    *,
    layers: LayerSpec = "auto",
    estimator: Estimator | None = None,
    normalize: bool = True,
    transform: Transform | Mapping[str, Transform] | None = None,
    engine: EngineName = "auto",
    source: str | nn.Module | None = None,
    memory_budget: int | None = None,
    mode: Mode = "eval",
    directions: Tensor | None = None,
    progress: bool | None = None,
) -> GeometryReport:
    """Measure a model once: :class:`GeometryProbe` and its ``measure`` in one call, with the same arguments.

    >>> report = measure(nn.Linear(2, 3), torch.zeros(5, 2), layers="")
    Traceback (most recent call last):
        ...
    torchgeom_probe.errors.ProbeError: k=8 orthonormal directions were asked for in an input space of d=2 dimensions.
    Write Subspace(k=2) or fewer, or take all directions:  estimator=Exact()
    >>> measure(nn.Linear(2, 3), torch.zeros(5, 2), layers="", estimator=Subspace(k=2))[""].rank.tolist()
    [2, 2, 2, 2, 2]
    """
    with GeometryProbe(
        model,
        layers=layers,
        estimator=estimator,
        normalize=normalize,
        transform=transform,
        engine=engine,
        source=source,
        memory_budget=memory_budget,
        mode=mode,
    ) as probe:
        return probe.measure(x, directions=directions, progress=progress)


@dataclass(frozen=True)
class CheckReport:
    """What :meth:`GeometryProbe.check` found; ``str()`` says it in words.

    Attributes:
        engine: the engine that a measurement would use.
        adjoint_errors: entry → |⟨u, Jv⟩ − ⟨Jᵀu, v⟩| relative to |u||Jv|, the largest over the samples.
        tolerance: what rounding explains.
        coupled_layers: entries in which one sample's output depends on the other samples.
        fused, fallback, refused: names of the ops of one pass.
        refusal: the error that a measurement would raise, or None.
    """

    engine: str
    adjoint_errors: dict[str, float]
    tolerance: float
    coupled_layers: list[str]
    fused: list[str]
    fallback: list[str]
    refused: list[str]
    refusal: str | None

    @property
    def ok(self) -> bool:
        """Whether a measurement can be trusted."""
        return (
            self.refusal is None
            and not self.coupled_layers
            and all(e <= self.tolerance for e in self.adjoint_errors.values())
        )

    def __str__(self) -> str:
        lines = [f"{'OK' if self.ok else 'NOT OK'}: engine {self.engine}"]
        for entry, error in self.adjoint_errors.items():
            verdict = (
                "ok" if error <= self.tolerance else f"TOO LARGE (rounding explains {self.tolerance:.0e})"
            )
            lines.append(f"  {entry or '(model)'}: adjoint error {error:.1e} {verdict}")
        if self.coupled_layers:
            lines.append(
                f"  samples depend on each other in {', '.join(map(repr, self.coupled_layers))}: no metric per sample there"
            )
        for kind in ("fused", "fallback", "refused"):
            names = getattr(self, kind)
            if names:
                lines.append(f"  {kind}: {', '.join(names)}")
        if self.refusal:
            lines.append(self.refusal)
        return "\n".join(lines)


def _seconds_per_row(task: Task, batch: Batch) -> float:
    few = batch.repeated(8)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        few.run(task.model)
        if few.device.type != "cpu":
            torch.accelerator.synchronize(few.device)
        best = min(best, time.perf_counter() - start)
    return best / few.size


def _adjoint_errors(
    linear: Linearization, pushed: Mapping[str, Tensor], v: Tensor, generator: torch.Generator
) -> dict[str, float]:
    errors = {}
    with linear.pullback() as back:
        for entry, jv in pushed.items():
            u = torch.randn(jv.shape, generator=generator, dtype=torch.float64, device="cpu").to(
                device=jv.device, dtype=jv.dtype
            )
            forward = (u.double() * jv.double()).flatten(2).sum(-1)
            reverse = (back.pull(entry, u).double() * v.double()).flatten(2).sum(-1)
            scale = (u.double().flatten(2).norm(dim=-1) * jv.double().flatten(2).norm(dim=-1)).clamp_min(
                1e-300
            )
            errors[entry] = ((forward - reverse).abs() / scale).max().item()
    return errors


def _coupled(task: Task, batch: Batch) -> list[str]:
    """Entries whose output at sample 0 changes when the other samples are replaced by copies of it."""
    if batch.size < 2:
        return []

    def outputs(of: Batch) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def on_output(entry: str, layer: str, output: Any) -> None:
            flats = features(task.leaves(layer, output), layer=layer, batch=of.size)
            seen[entry] = torch.cat(flats, dim=1)[0].clone()

        with task.hooked(on_output):
            of.run(task.model)
        return seen

    def copies(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch.size:
            return value[:1].expand_as(value).clone()
        return value

    alone = replace(
        batch,
        args=tuple(map(copies, batch.args)),
        kwargs={k: copies(v) for k, v in batch.kwargs.items()},
        point=None,
    )
    together, apart = outputs(batch), outputs(alone)
    return [
        entry
        for entry, y in together.items()
        if (y - apart[entry]).abs().max() > 1e-3 * y.abs().max().clamp_min(torch.finfo(y.dtype).tiny)
    ]


def _refuse_unhookable(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ProbeError(
            "the model is a ScriptModule: hooks do not fire inside it.\nProbe the nn.Module that it was made from."
        )
    wrapped = next(
        (n for n, m in model.named_modules() if type(m).__name__ == "FullyShardedDataParallel"), None
    )
    parts = next((n for n, p in model.named_parameters() if type(p.data).__name__ == "DTensor"), None)
    sharded = None
    if parts is not None:
        sharded = f"parameter {parts!r} is a DTensor (FSDP2 or tensor parallel)"
    elif wrapped is not None:
        sharded = f"{repr(wrapped) if wrapped else 'the model'} is a FullyShardedDataParallel"
    if sharded is not None:
        raise ProbeError(
            f"{sharded}: its ops need every rank at once.\n"
            "Gather the model first (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) into a "
            "plain copy, and probe that."
        )


def _resolved_source(model: nn.Module, source: str | nn.Module | None) -> dict[str, Any]:
    if source is None:
        return {}
    found = resolve(model, source)
    if len(found) != 1:
        raise ProbeError(
            f"source={source!r} names {len(found)} modules ({', '.join(map(repr, list(found)[:5]))}); it takes one.\n"
            f"Write, for instance, source={next(iter(found))!r}"
        )
    name, module = next(iter(found.items()))
    return {"source_name": name, "source": module}


def _resolved_transforms(
    model: nn.Module, layers: Mapping[str, nn.Module], transform: Transform | Mapping[str, Transform] | None
) -> dict[str, Callable[[Any], Any]]:
    if transform is None:
        return {}
    if not isinstance(transform, Mapping):
        return {"*": transform}
    found: dict[str, Transform] = {}
    for key, function in transform.items():
        names = [name for name in resolve(model, key) if name in layers]
        if not names:
            near = close_names(key, list(layers))
            raise ProbeError(
                f"transform= has the key {key!r}, which is none of the layers measured ({', '.join(map(repr, list(layers)[:8]))}).\n"
                f"Write one of them as the key{': ' + repr(near[0]) if near else ''}, or add {key!r} to layers=."
            )
        found.update(dict.fromkeys(names, function))
    return found


def _joined(parts: Sequence[LayerGeometry]) -> LayerGeometry:
    if len(parts) == 1:
        return parts[0]
    values: dict[str, Any] = {
        f.name: torch.cat([getattr(part, f.name) for part in parts])
        for f in fields(LayerGeometry)
        if isinstance(getattr(parts[0], f.name), Tensor)
    }
    densities = [part.spectrum for part in parts if part.spectrum is not None]
    if densities:
        values["spectrum"] = SpectralDensity.joined(densities)
    return replace(parts[0], **values)


def _bar(total: int, progress: bool | None) -> tqdm:
    # disable=None: off where the output is no terminal; delay: a bar that would flash by is not drawn.
    return tqdm(
        total=total,
        desc="measure",
        unit="sample",
        leave=False,
        delay=0 if progress else 1,
        disable=None if progress is None else not progress,
    )
