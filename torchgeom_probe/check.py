"""A check of the model before a long run: derivatives, samples and ops, on a few samples."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from torchgeom_probe.dual import recording
from torchgeom_probe.errors import LayerRefusal, ProbeError
from torchgeom_probe.jacobian.differences import difference_errors, in_float64
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.vjp import flat
from torchgeom_probe.shapes import Tensor

#: Added to the seed: x itself may be torch.randn of it, a direction that every normalisation is blind to.
_NOT_THE_USERS = 0x5EED


@dataclass(frozen=True)
class CheckReport:
    """What :meth:`~torchgeom_probe.GeometryProbe.check` found; ``str()`` says it in words.

    Attributes:
        engine: the engine that a measurement would use.
        difference_errors: entry → |D − Jv| relative to the larger, D the central difference along v.
        difference_tolerance: what kinks and rounding explain of it.
        adjoint_errors: entry → |⟨u, Jv⟩ − ⟨Jᵀu, v⟩| relative to |u||Jv|, the largest over the samples; empty where
            reverse mode cannot run.
        tolerance: what rounding explains of it.
        coupled_layers: entries in which one sample's output depends on the other samples.
        fused, fallback, refused: names of the ops of one pass.
        refusal: the error that a measurement would raise, or None.
        without_reverse: why reverse mode cannot run, or None; ``TopK``, ``LogDet`` and ``Trace`` need it.
    """

    engine: str
    difference_errors: dict[str, float] = field(default_factory=dict)
    difference_tolerance: float = 0.0
    adjoint_errors: dict[str, float] = field(default_factory=dict)
    tolerance: float = 0.0
    coupled_layers: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    fallback: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    refusal: str | None = None
    without_reverse: str | None = None

    @staticmethod
    def of(jacobians: Jacobians, *, seed: int) -> CheckReport:
        """Push one random direction, compare it with differences, pull a cotangent a layer, and note what every op did.

        Raises:
            LayerRefusal: layers that have nothing to measure.
        """
        plan = jacobians.plan
        generator = torch.Generator("cpu").manual_seed(seed + _NOT_THE_USERS)
        v = _drawn((1, jacobians.inputs.size, *plan.space), generator, jacobians.device, plan.dtype)
        pushed: dict[str, Tensor] = {}
        found = CheckReport(jacobians.engine, coupled_layers=list(plan.coupled))
        with recording() as ops:
            try:
                jacobians.push(v, lambda entry, blocks: pushed.update({entry: torch.cat(blocks, dim=2)}))
            except LayerRefusal:
                raise
            except ProbeError as error:
                found = replace(found, refusal=str(error))
        fused, fallback, refused = (sorted(ops[kind]) for kind in ("fused", "fallback", "refused"))
        found = replace(found, engine=jacobians.engine, fused=fused, fallback=fallback, refused=refused)
        if found.refusal is not None:
            return found
        first = {entry: jv[0] for entry, jv in pushed.items()}
        wide, exact = in_float64(jacobians, v[0], first)
        errors, tolerance = difference_errors(wide, v[0], first, exact)
        found = replace(found, difference_errors=errors, difference_tolerance=tolerance)
        # A model may round by a narrower type inside than its own, and over kinks: 1.6e-3 in a RegNet in float32.
        allowed = min(1e5 * max(torch.finfo(plan.dtype).eps, 1e-10), 0.3)
        try:
            adjoint = _adjoint_errors(jacobians, pushed, v, generator)
        except ProbeError as error:
            return replace(found, without_reverse=str(error))
        if wide.plan.dtype == torch.float64 and max(adjoint.values(), default=0.0) > allowed:
            # Nothing but rounding, where no direction moves a layer?  In float64 it is told from a wrong one.
            pushed = {entry: jv[None] for entry, jv in exact.items()}
            with contextlib.suppress(ProbeError):  # what cannot run so is as wrong as it was
                again = _adjoint_errors(wide, pushed, v.to(wide.plan.dtype), generator, still=True)
                adjoint = {entry: min(error, again[entry]) for entry, error in adjoint.items()}
        return replace(found, adjoint_errors=adjoint, tolerance=allowed)

    @property
    def ok(self) -> bool:
        """Whether a measurement can be trusted."""
        right = all(e <= self.difference_tolerance for e in self.difference_errors.values())
        adjoint = all(e <= self.tolerance for e in self.adjoint_errors.values())
        return self.refusal is None and not self.coupled_layers and right and adjoint

    def __str__(self) -> str:
        lines = [f"{'OK' if self.ok else 'NOT OK'}: engine {self.engine}"]
        for entry, error in self.difference_errors.items():
            said = [f"differences {_verdict(error, self.difference_tolerance)}"]
            if entry in self.adjoint_errors:
                said.append(f"adjoint {_verdict(self.adjoint_errors[entry], self.tolerance)}")
            lines.append(f"  {entry or '(model)'}: {', '.join(said)}")
        if self.coupled_layers:
            coupled = ", ".join(map(repr, self.coupled_layers))
            lines.append(f"  samples depend on each other in {coupled}: no metric per sample there")
        for kind in ("fused", "fallback", "refused"):
            names = getattr(self, kind)
            if names:
                lines.append(f"  {kind}: {', '.join(names)}")
        if self.without_reverse:
            lines.append(f"  reverse mode, which TopK, LogDet and Trace need, cannot run: {self.without_reverse}")
        if self.refusal:
            lines.append(self.refusal)
        return "\n".join(lines)


def _verdict(error: float, tolerance: float) -> str:
    return f"{error:.0e} ok" if error <= tolerance else f"{error:.1e} TOO LARGE (rounding explains {tolerance:.0e})"


def _adjoint_errors(
    jacobians: Jacobians, pushed: Mapping[str, Tensor], v: Tensor, generator: torch.Generator, *, still: bool = False
) -> dict[str, float]:
    """Relative to |u||Jv|, without what rounding leaves of a sum; ``still``: nor of a layer that nothing moves."""
    errors = {}
    batch = v.shape[1]
    with jacobians.pullback(compared=False) as back:
        inputs = _size(back.point[None, :batch])
        inputs = torch.where(inputs > 0, inputs, 1)
        for entry, jv in pushed.items():
            u = _drawn(tuple(jv.shape), generator, jv.device, jv.dtype)
            forward = (u.double() * jv.double()).sum(-1)
            pulled = back.pull(entry, u).double()
            reverse = flat(pulled * v.double()).sum(-1)
            rounding = _size(pulled)
            if still:
                rounding = rounding + _size(u) * _size(back.features[entry][None, :batch]) / inputs
            apart = (forward - reverse).abs() - 30 * torch.finfo(jv.dtype).eps * rounding * _size(v)
            errors[entry] = (apart.clamp_min(0) / (_size(u) * _size(jv)).clamp_min(1e-300)).max().item()
    return errors


def _size(t: Tensor) -> Tensor:
    """[k, B] of [k, B, …]."""
    return flat(t.detach().double()).norm(dim=-1)


def _drawn(shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
