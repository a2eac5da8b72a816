"""A check of the model before a long run: derivatives, samples and ops, on a few samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from torchgeom_probe.dual import recording
from torchgeom_probe.errors import EngineRefusal, LayerRefusal, ProbeError
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.shapes import Tensor


@dataclass(frozen=True)
class CheckReport:
    """What :meth:`~torchgeom_probe.GeometryProbe.check` found; ``str()`` says it in words.

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

    @staticmethod
    def of(jacobians: Jacobians, *, seed: int) -> CheckReport:
        """Push one random direction, pull one random cotangent a layer, and note what every op did.

        Raises:
            LayerRefusal: layers that have nothing to measure.
        """
        plan = jacobians.plan
        generator = torch.Generator("cpu").manual_seed(seed)
        v = _drawn((1, jacobians.inputs.size, *plan.space), generator, jacobians.device, plan.dtype)
        pushed: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        refusal = None
        with recording() as ops:
            try:
                jacobians.push(v, lambda entry, blocks: pushed.update({entry: torch.cat(blocks, dim=2)}))
            except LayerRefusal:
                raise
            except ProbeError as error:
                refusal = str(error)
            if refusal is None:
                try:
                    errors = _adjoint_errors(jacobians, pushed, v, generator)
                except (ProbeError, EngineRefusal) as error:
                    refusal = f"the adjoint check needs reverse mode, which cannot run: {error}"
        return CheckReport(
            engine=jacobians.engine,
            adjoint_errors=errors,
            tolerance=100 * torch.finfo(plan.dtype).eps * max(1.0, len(plan.features)) ** 0.5,
            coupled_layers=list(plan.coupled),
            fused=sorted(ops["fused"]),
            fallback=sorted(ops["fallback"]),
            refused=sorted(ops["refused"]),
            refusal=refusal,
        )

    @property
    def ok(self) -> bool:
        """Whether a measurement can be trusted."""
        exact = all(e <= self.tolerance for e in self.adjoint_errors.values())
        return self.refusal is None and not self.coupled_layers and exact

    def __str__(self) -> str:
        lines = [f"{'OK' if self.ok else 'NOT OK'}: engine {self.engine}"]
        for entry, error in self.adjoint_errors.items():
            too_large = f"TOO LARGE (rounding explains {self.tolerance:.0e})"
            verdict = "ok" if error <= self.tolerance else too_large
            lines.append(f"  {entry or '(model)'}: adjoint error {error:.1e} {verdict}")
        if self.coupled_layers:
            coupled = ", ".join(map(repr, self.coupled_layers))
            lines.append(f"  samples depend on each other in {coupled}: no metric per sample there")
        for kind in ("fused", "fallback", "refused"):
            names = getattr(self, kind)
            if names:
                lines.append(f"  {kind}: {', '.join(names)}")
        if self.refusal:
            lines.append(self.refusal)
        return "\n".join(lines)


def _adjoint_errors(
    jacobians: Jacobians, pushed: Mapping[str, Tensor], v: Tensor, generator: torch.Generator
) -> dict[str, float]:
    errors = {}
    with jacobians.pullback() as back:
        for entry, jv in pushed.items():
            u = _drawn(tuple(jv.shape), generator, jv.device, jv.dtype)
            forward = (u.double() * jv.double()).flatten(2).sum(-1)
            reverse = (back.pull(entry, u).double() * v.double()).flatten(2).sum(-1)
            scale = u.double().flatten(2).norm(dim=-1) * jv.double().flatten(2).norm(dim=-1)
            errors[entry] = ((forward - reverse).abs() / scale.clamp_min(1e-300)).max().item()
    return errors


def _drawn(shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
