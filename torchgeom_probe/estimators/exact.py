"""All d input directions: the metric itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators.base import Estimator, ProductCount, from_singular_values, resolution
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.jacobian.vjp import flat
from torchgeom_probe.linalg.directions import basis
from torchgeom_probe.linalg.gram import Factor, singular_values, streamed_factor
from torchgeom_probe.linalg.moments import frame_moments
from torchgeom_probe.linalg.spectrum import SpectralDensity
from torchgeom_probe.report import LayerGeometry
from torchgeom_probe.shapes import Tensor

FULL = "log √det g, all d directions"
FEW_FEATURES = "log √det JJᵀ (n < d: g is singular, √det g = 0)"
#: Every copy of the saved pass is a row of the forward pass: it is made for as many rows of J.
_ROWS_A_COPY = 8


@dataclass(frozen=True)
class Exact(Estimator):
    """The exact volume element: √det g where n ≥ d; where n < d, g is singular and √det JJᵀ stands for it.

    Definition: Σ_i log σ_i over all min(n, d) singular values of J (of J/√n when normalised), in nats.  Where n ≥ d
    this is log √det g, g = JᵀJ.  Where n < d, √det g is 0; ``estimand`` says that √det JJᵀ stands in its place: the
    volume magnification of the n-dimensional orthogonal complement of J's kernel.  ``scale`` = ½ log(tr g/d), in nats,
    and ``effective_dimension`` = (tr g)²/tr g² come beside it.

    Cost: one dual pass over d directions per sample, for all layers; or, if all layers together have fewer than d
    features, one pullback per feature.  Bias and variance: none but rounding.

    Memory: the probe's ``memory_budget`` is kept at any size.  Where the Jacobian of one sample fits (512 features of
    224 x 224 images: 0.3 GiB) its rows are made once; where it does not, its Gram matrix is accumulated in float64
    block by block, and rows that had to be forgotten are made again: with room for a c-th of them, about (c + 1)/2
    times the products (and, in float64, σ below 1e-8 of the largest are then lost).

    >>> import torch, torchgeom_probe as tgp
    >>> scale = torch.nn.Linear(3, 3, bias=False)
    >>> _ = scale.weight.data.copy_(2 * torch.eye(3))
    >>> report = tgp.measure(scale, torch.zeros(5, 3), layers="", estimator=tgp.Exact(), normalize=False)
    >>> torch.allclose(report[""].log_volume.exp(), torch.tensor(8.0, dtype=torch.float64))       # 2³
    True
    """

    def cost(self, plan: Plan, *, engine: str = "auto") -> dict[str, ProductCount]:
        """All d directions in one dual pass for all layers, or a pullback a feature where those are fewer."""
        d, total = plan.num_inputs, sum(plan.features.values())
        if _by_reverse_mode(plan, engine):
            fewer = f", fewer than d = {d} directions" if total < d else ""
            why = f"the layers have {total} features in all{fewer}: a pullback a feature"
            return {entry: ProductCount(0, n, n, False, d, why) for entry, n in plan.features.items()}
        why = f"all d = {d} directions, one dual pass for all layers; they have {total} features"
        return dict.fromkeys(plan.features, ProductCount(d, 0, d, True, d, why))

    def estimate(
        self, jacobians: Jacobians, *, start: Mapping[str, LayerGeometry] | None = None
    ) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk; an earlier result is of no use to it."""
        plan = jacobians.plan
        d = plan.num_inputs
        factors: dict[str, Factor] = {}
        engine = "vjp"
        if _by_reverse_mode(plan, jacobians.engine):
            try:
                factors = _by_rows(jacobians)
            except ProbeError:
                if jacobians.engine == "vjp":
                    raise  # asked for by name; under "auto" the dual pass may do what reverse mode cannot
        if not factors:
            like = torch.empty(jacobians.inputs.size, 0, dtype=plan.dtype, device=jacobians.device)
            factors = jacobians.factors(d, lambda start, stop: basis(start, stop, plan.space, like=like))
            engine = jacobians.engine
        sigma = singular_values(factors)
        return {
            entry: from_singular_values(
                jacobians,
                entry,
                sigma[entry],
                estimand=FULL if n >= d else FEW_FEATURES,
                engine=engine,
                num_directions=d,
                full_rank=min(n, d),
                tolerance=resolution(plan.dtype, factors[entry]),
                spectrum=SpectralDensity.of_singular_values(sigma[entry], d),
                extras=_whole(sigma[entry], d),
            )
            for entry, n in plan.features.items()
        }


def _whole(sigma: Tensor, d: int) -> dict[str, Tensor]:
    """What a frame can only estimate, without its errors."""
    moments = frame_moments(sigma[None], num_directions=d, num_inputs=d)
    return {name: moments[name] for name in ("scale", "effective_dimension")}


def _by_reverse_mode(plan: Plan, engine: str) -> bool:
    # A pullback costs about what a row of the dual pass costs (benchmarks, "stages"), so the smaller count wins.
    return engine == "vjp" or (engine == "auto" and sum(plan.features.values()) < plan.num_inputs)


def _by_rows(jacobians: Jacobians) -> dict[str, Factor]:
    """Rows of J by pullbacks over one saved pass; where they do not fit together, in blocks (``linalg.gram``)."""
    plan = jacobians.plan
    factors: dict[str, Factor] = {}
    with jacobians.pullback(max(plan.features.values()) // _ROWS_A_COPY) as back:
        for entry, n in plan.features.items():
            plan.refuse_too_long(entry, plan.num_inputs, n)
            factor = streamed_factor(
                lambda start, stop, entry=entry: flat(back.rows(entry, start, stop)),  # type: ignore[misc]
                count=n,
                length=plan.num_inputs,
                at_once=plan.directions_at_once(n, jacobians.inputs.size),
                batch=jacobians.inputs.size,
                budget=plan.budget,
                itemsize=plan.itemsize,
            )
            factors[entry] = factor.scaled(jacobians.scale(entry))
    return factors
