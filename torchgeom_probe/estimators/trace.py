"""tr g = ‖J‖²_F: how much the layer stretches lengths, on average over directions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators.base import Estimator, Work
from torchgeom_probe.jacobian.jacobians import Linearization
from torchgeom_probe.jacobian.layer import LayerJacobian, engine_of, jacobians
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.directions import basis, for_every_sample
from torchgeom_probe.linalg.lanczos import rademacher
from torchgeom_probe.linalg.orthonormal import orthonormal
from torchgeom_probe.linalg.volume import rank_tolerance
from torchgeom_probe.report import LayerGeometry
from torchgeom_probe.shapes import Tensor


@dataclass(frozen=True)
class Trace(Estimator):
    """tr g = ‖J‖²_F by random probes, with a standard error.

    Definition: ``trace`` [B] = tr g = Σ σ_i² (of J/√n when normalised).  ``log_volume`` = ½ log(tr g / d), in nats: the root mean square
    stretch of a random direction, which is the 1-volume that :class:`Subspace` with k = 1 estimates; it is no volume element.

    How: ``"hutchinson"``: mean of |Jz|² over random signs z.  ``"hutch++"``: the range of g is sketched first, tr g within it counted
    exactly, and probes see the rest.  Both are unbiased.

    Bias: none in ``trace``; of second order in ``log_volume``.  Variance: hutchinson 2(‖g‖²_F − Σ
    g_ii²)/probes, so a relative standard error of
    √(2/(probes · participation ratio)); hutch++ falls like 1/probes² in all for decaying spectra, and gains nothing on flat ones.
    ``trace_std_error`` and (by the delta method) ``std_error`` come from the spread of the probes; zero where d ≤ probes and the basis
    itself is taken.  Cost: hutchinson one dual pass over ``probes`` directions for ALL layers; hutch++ 3 · probes Jv and probes Jᵀu per
    layer, and reverse mode must be able to run.

    For the participation ratio, the effective rank and the whole spectral density see :class:`LogDet` and
    ``report.density(layer)``; for the local Lipschitz constant σ_1, with a bound, ``TopK(k=1)``.

    Source: Hutchinson, Commun. Stat. Simul. Comput. 18 (1989); Meyer, Musco, Musco and Woodruff, Hutch++ (arXiv:2010.09649).

    Args:
        method: ``"hutch++"`` or ``"hutchinson"``.
        probes: random vectors (of each kind, for hutch++), at least 2.
        seed: of the probes, the same for all samples, layers and epochs.

    Raises:
        ProbeError: probes < 2, an unknown method; for hutch++ an op without a reverse derivative.

    >>> import torch, torchgeom_probe as tgp
    >>> model = torch.nn.Linear(100, 30, bias=False)
    >>> g = tgp.measure(model, torch.zeros(2, 100), layers="", estimator=tgp.Trace(probes=16), normalize=False)[""]
    >>> bool((g.trace - model.weight.double().square().sum()).abs().max() < 4 * g.trace_std_error.max())
    True
    """

    method: Literal["hutch++", "hutchinson"] = "hutch++"
    probes: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("hutch++", "hutchinson"):
            raise ProbeError(f"Trace(method={self.method!r}) is unknown.\nWrite 'hutch++' or 'hutchinson'.")
        if self.probes < 2:
            raise ProbeError(
                f"Trace(probes={self.probes}): a standard error needs at least 2 probes.\nWrite Trace(probes=16)"
            )

    def num_rows(self, plan: Plan) -> int:
        """Rows that one sample needs at once: the probes, and for hutch++ the graph saved for reverse mode."""
        return min(self.probes, plan.num_inputs) + (48 if self.method == "hutch++" else 0)

    def work(self, plan: Plan, *, engine: str = "auto") -> dict[str, Work]:
        """Hutchinson: one dual pass for all layers; Hutch++: per layer a sketch, its span and the probes."""
        d, p = plan.num_inputs, self.probes
        if d <= p:
            return {
                e: Work(d, 0, d, True, f"all d = {d} directions are no more than the probes")
                for e in plan.features
            }
        if self.method == "hutchinson":
            return {
                e: Work(p, 0, p, True, f"{p} probes, one dual pass for all layers") for e in plan.features
            }
        why = f"a sketch of {p}, its span by reverse mode, and {p} probes of the rest"
        return {e: Work(3 * p, p, 4 * p, False, why) for e in plan.features}

    def estimate(self, linear: Linearization, *, normalize: bool) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk."""
        if linear.plan.num_inputs <= self.probes:
            return self._all_directions(linear, normalize)
        if self.method == "hutchinson":
            return self._hutchinson(linear, normalize)
        with jacobians(linear, estimator="Trace(method='hutch++')", at_once=self.probes // 4) as maps:
            measured = {entry: self._hutch_plus_plus(jacobian, normalize) for entry, jacobian in maps.items()}
        engine = engine_of(linear)
        return {entry: replace(result, engine=engine) for entry, result in measured.items()}

    def _all_directions(self, linear: Linearization, normalize: bool) -> dict[str, LayerGeometry]:
        d = linear.plan.num_inputs
        like = torch.empty(linear.batch.size, 0, dtype=linear.plan.dtype, device=linear.device)
        energies = _energies(linear, basis(0, d, linear.plan.space, like=like))
        return {
            entry: self._geometry(
                entry, energy.sum(0), torch.zeros_like(energy[0]), d, "all d directions", linear, normalize
            )
            for entry, energy in energies.items()
        }

    def _hutchinson(self, linear: Linearization, normalize: bool) -> dict[str, LayerGeometry]:
        plan = linear.plan
        signs = rademacher(self.probes, plan.num_inputs, seed=self.seed).to(
            device=linear.device, dtype=plan.dtype
        )
        energies = _energies(linear, for_every_sample(signs, plan.space, linear.batch.size))
        how = f"Hutchinson, {self.probes} probes"
        return {
            entry: self._geometry(
                entry,
                energy.mean(0),
                energy.std(0) / math.sqrt(self.probes),
                self.probes,
                how,
                linear,
                normalize,
            )
            for entry, energy in energies.items()
        }

    def _hutch_plus_plus(self, jacobian: LayerJacobian, normalize: bool) -> LayerGeometry:
        signs = rademacher(2 * self.probes, jacobian.num_inputs, seed=self.seed).to(jacobian.linear.device)
        sketch, probes = signs.expand(jacobian.batch, -1, -1).split(self.probes, dim=1)
        span = orthonormal(jacobian.pull(jacobian.push(sketch)), None, eps=jacobian.eps)
        within = jacobian.push(span).square().sum((1, 2))
        rest = probes - (probes @ span.mT) @ span
        energy = jacobian.push(rest).square().sum(2)
        trace = within + energy.mean(1)
        # Rounding of the products, so that a sketch that holds everything does not claim to be exact.
        error = energy.std(1) / math.sqrt(self.probes) + 8 * jacobian.eps * trace
        how = f"Hutch++, {self.probes} probes"
        return self._geometry(
            jacobian.entry,
            trace,
            error,
            self.probes,
            how,
            jacobian.linear,
            normalize,
            products=jacobian.products,
        )

    def _geometry(
        self,
        entry: str,
        trace: Tensor,
        error: Tensor,
        directions: int,
        how: str,
        linear: Linearization,
        normalize: bool,
        *,
        products: int | None = None,
    ) -> LayerGeometry:
        n, d = linear.plan.features[entry], linear.plan.num_inputs
        if normalize:
            trace, error = trace / n, error / n
        volume = (trace / d).log() / 2
        finite = trace.isfinite()
        products = directions if products is None else products
        return LayerGeometry(
            name=entry,
            estimand=f"½ log(tr g / d), the root mean square stretch of a direction ({how})",
            engine=linear.engine,
            log_volume=torch.where(finite, volume, torch.nan),
            singular_values=trace.new_zeros(trace.shape[0], 0),
            rank=torch.where(finite, (trace > 0).long(), -1),
            log_pseudo_volume=torch.where(finite, torch.where(trace > 0, volume, 0.0), torch.nan),
            num_features=n,
            num_inputs=d,
            num_directions=directions,
            normalized=normalize,
            rank_tolerance=rank_tolerance(linear.plan.dtype),
            std_error=torch.where(trace > 0, error / (2 * trace), 0.0),
            trace=trace,
            trace_std_error=error,
            num_products=torch.full_like(trace, products, dtype=torch.long),
        )


def _energies(linear: Linearization, directions: Tensor) -> dict[str, Tensor]:
    """|Jv|² of every layer for directions [s, B, *space], float64 [s, B]; one dual pass, or a few where memory asks for it."""
    found: dict[str, list[Tensor]] = {}

    def keep(entry: str, blocks: list[Tensor]) -> None:
        energy = sum(torch.linalg.vector_norm(block, dim=2, dtype=torch.float64).square() for block in blocks)
        assert isinstance(energy, Tensor)
        found.setdefault(entry, []).append(energy)

    for part in directions.split(linear.plan.directions_at_once(directions.shape[0], linear.batch.size)):
        linear.push(part, keep)
    return {entry: torch.cat(parts) for entry, parts in found.items()}
