"""What a probe is asked for, and what of it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from torch import nn

from torchgeom_probe.errors import LayerRefusal, ProbeError
from torchgeom_probe.estimators.along import Along
from torchgeom_probe.estimators.auto import Auto
from torchgeom_probe.estimators.base import Estimator
from torchgeom_probe.estimators.subspace import Subspace
from torchgeom_probe.jacobian.jacobians import EngineName
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.model.hooked import Transform
from torchgeom_probe.model.inputs import Inputs, Wrt
from torchgeom_probe.model.isolation import Mode
from torchgeom_probe.model.layers import LayerSpec
from torchgeom_probe.progress import tqdm
from torchgeom_probe.report import LayerGeometry
from torchgeom_probe.shapes import Tensor

ENGINES = ("auto", "fused", "functorch", "vjp")
#: What a value in bfloat16 may be off, in nats.
ROUNDED = 0.02


class ProbeOptions(TypedDict, total=False):
    """The options of :class:`GeometryProbe`, which every verb takes beside its own arguments."""

    layers: LayerSpec
    estimator: Estimator | str | None
    normalize: bool
    transform: Transform | Mapping[str, Transform] | None
    engine: EngineName
    source: str | nn.Module | None
    wrt: Wrt | None
    memory_budget: int | None
    mode: Mode
    replay: bool
    precision: Literal["bf16"] | None


def refuse_options(engine: Any, mode: Any, memory_budget: Any, source: Any, wrt: Any, precision: Any) -> None:
    """Refuse options of a probe that have no such value, or do not go together."""
    if engine not in ENGINES:
        raise ProbeError(f"engine={engine!r} is unknown.\nWrite one of {', '.join(map(repr, ENGINES))}.")
    if mode not in ("eval", "as_is"):
        raise ProbeError(f"mode={mode!r} is unknown.\nWrite mode='eval' (the default) or mode='as_is'.")
    if memory_budget is not None and (not isinstance(memory_budget, int) or memory_budget < 1):
        raise ProbeError(
            f"memory_budget={memory_budget!r}: it is a number of bytes.\nWrite, for instance, memory_budget=2 * 2**30."
        )
    if precision not in (None, "bf16") or (precision is not None and engine not in ("auto", "fused")):
        raise ProbeError(
            f"precision={precision!r} with engine={engine!r}: tangents of another type are there in bfloat16, by the "
            "fused engine.\nWrite precision='bf16', or leave it out: the model's own."
        )
    if source is not None and wrt is not None:
        raise ProbeError(f"source={source!r} and wrt={wrt!r} each say where the metric lives.\nLeave one of them out.")


def in_place_of(estimator: Estimator, directions: Tensor) -> Along:
    """The estimator that ``measure(x, directions=V)`` is the short form of."""
    if not isinstance(estimator, (Auto, Subspace, Along)):
        raise ProbeError(
            f"directions= are an estimator of their own, and this probe has {estimator}.\n"
            "Write GeometryProbe(model, ..., estimator=Along(directions)), or leave its estimator out"
        )
    return Along(directions)


def refuse_other_samples(start: Mapping[str, LayerGeometry], inputs: Inputs, plan: Plan) -> None:
    """Refuse to start from a report of other samples or layers."""
    for entry in plan.features:
        if entry not in start:
            raise ProbeError(
                f"start= has no layer {entry!r}; it has {list(start)}.\n"
                "Pass the report of the same probe:  report = probe.measure(x, start=report)"
            )
        samples, d = len(start[entry].value), start[entry].num_inputs
        if (samples, d) != (inputs.size, plan.num_inputs):
            raise ProbeError(
                f"start= was measured on {samples} samples of {d} numbers; x has {inputs.size} of {plan.num_inputs}.\n"
                "A start needs the same samples in the same order:  probe.measure(x, start=report_of_the_same_x)"
            )


def refuse_rounded(found: Mapping[str, LayerGeometry], exact: Mapping[str, LayerGeometry]) -> None:
    """Refuse the layers whose value in bfloat16 is another than in the model's own precision."""
    apart = {e: float((g.value - exact[e].value).nan_to_num(0.0).abs().max()) for e, g in found.items()}
    off = {entry: error for entry, error in apart.items() if error > ROUNDED}
    if off:
        first = next(iter(off))
        raise LayerRefusal(
            f"with precision='bf16' the value of layer {first!r} is {off[first]:.3f} nats off, more than {ROUNDED}.\n"
            "Leave precision= out, take fewer directions (Subspace(k=4)), or name other layers.",
            {entry.split("#")[0]: f"{error:.3f} nats off in bfloat16" for entry, error in off.items()},
        )


def progress_bar(total: int, progress: bool | None) -> tqdm:
    """A bar over the samples."""
    # disable=None: off where the output is no terminal; delay: a bar that would flash by is not drawn.
    return tqdm(
        total=total,
        desc="measure",
        unit="sample",
        leave=False,
        delay=0 if progress else 1,
        disable=None if progress is None else not progress,
    )
