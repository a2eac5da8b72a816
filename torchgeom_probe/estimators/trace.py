"""tr g = ‖J‖²_F: how much the layer stretches lengths, on average over directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators.base import Estimator, ProductCount, conventions, counted
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.layer import LayerJacobian, layer_jacobians, pushed_together
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.directions import for_every_sample
from torchgeom_probe.linalg.lanczos import rademacher
from torchgeom_probe.linalg.orthonormal import orthonormal
from torchgeom_probe.report import LayerGeometry
from torchgeom_probe.shapes import Tensor


@dataclass(frozen=True)
class Trace(Estimator):
    """tr g = ‖J‖²_F by random probes, with a standard error.

    Definition: ``trace`` [B] = tr g = Σ σ_i² (of J/√n when normalised).  ``scale`` = ½ log(tr g / d), in nats: the log
    of the root mean square stretch of a random direction; it is no volume element.

    How: ``"hutchinson"``: mean of |Jz|² over random signs z.  ``"hutch++"``: the range of g is sketched first, tr g
    within it counted exactly, and probes see the rest.  Both are unbiased.

    Bias: none in ``trace``; of second order in ``scale``. Variance: hutchinson 2(‖g‖²_F − Σ g_ii²)/probes, so a
    relative standard error of √(2/(probes · participation ratio)); hutch++ falls like 1/probes² in all for decaying
    spectra, and gains nothing on flat ones. ``trace_std_error`` and (by the delta method) ``std_error`` come from the
    spread of the probes; zero where d ≤ probes and the basis itself is taken.  Cost: hutchinson one dual pass over
    ``probes`` directions for ALL layers; hutch++ 3 · probes Jv and probes Jᵀu per layer, and reverse mode must be able
    to run.

    For the participation ratio, the effective rank and the whole spectral density see :class:`LogDet` and
    ``report.density(layer)``; for the local Lipschitz constant σ_1, with a bound, ``TopK(k=1)``.

    Source: Hutchinson, Commun. Stat. Simul. Comput. 18 (1989); Meyer, Musco, Musco and Woodruff, Hutch++
    (arXiv:2010.09649).

    Args:
        method: ``"hutchinson"`` or ``"hutch++"``.
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

    method: Literal["hutchinson", "hutch++"] = "hutchinson"
    probes: int = 16
    seed: int = 0
    argument: ClassVar[str] = "probes"

    def __post_init__(self) -> None:
        if self.method not in ("hutch++", "hutchinson"):
            raise ProbeError(f"Trace(method={self.method!r}) is unknown.\nWrite 'hutchinson' or 'hutch++'.")
        if self.probes < 2:
            raise ProbeError(
                f"Trace(probes={self.probes}): a standard error needs at least 2 probes.\nWrite Trace(probes=16)"
            )

    def cost(self, plan: Plan, *, engine: str = "auto") -> dict[str, ProductCount]:
        """Hutchinson: one dual pass for all layers; Hutch++: per layer a sketch, its span and the probes."""
        d, p = plan.num_inputs, self.probes
        # For hutch++ the graph that is saved for reverse mode, too.
        rows = min(p, d) + (48 if self.method == "hutch++" else 0)
        if d <= p:
            each = ProductCount(d, 0, d, True, rows, f"all d = {d} directions are no more than the probes")
        elif self.method == "hutchinson":
            each = ProductCount(p, 0, p, True, rows, f"{p} probes, one dual pass for all layers")
        else:
            why = f"a sketch of {p}, its span by reverse mode, and {p} probes of the rest"
            each = ProductCount(3 * p, p, 4 * p, False, rows, why)
        return dict.fromkeys(plan.features, each)

    def estimate(
        self, jacobians: Jacobians, *, start: Mapping[str, LayerGeometry] | None = None
    ) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk; an earlier result is of no use to it."""
        plan = jacobians.plan
        d, p = plan.num_inputs, self.probes
        if d > p and self.method == "hutch++":
            with layer_jacobians(jacobians, estimator="Trace(method='hutch++')", at_once=p // 4) as maps:
                signs = rademacher(2 * p, d, seed=self.seed).to(jacobians.device)
                sketches = pushed_together(jacobians, maps, signs[:p].expand(jacobians.inputs.size, -1, -1))
                return {e: self._hutch_plus_plus(jacobians, m, signs[p:], sketches[e]) for e, m in maps.items()}
        whole = d <= p
        if whole:
            rows, count, how = torch.eye(d), d, "all d directions"
        else:
            rows = jacobians.remembered(("signs", p, self.seed), lambda: rademacher(p, d, seed=self.seed))
            count, how = p, f"Hutchinson, {p} probes"
        energies = jacobians.energies(for_every_sample(rows, plan.space, jacobians.inputs.size))
        found = {}
        for entry, energy in energies.items():
            trace = energy.sum(0) if whole else energy.mean(0)
            error = torch.zeros_like(trace) if whole else energy.std(0) / math.sqrt(p)
            made = conventions(jacobians, entry, jacobians.engine)
            found[entry] = _geometry(made, trace, error, count, how, products=count)
        return found

    def _hutch_plus_plus(
        self, jacobians: Jacobians, jacobian: LayerJacobian, probes: Tensor, sketch: Tensor
    ) -> LayerGeometry:
        span = orthonormal(jacobian.pull(sketch), None, eps=jacobian.eps)
        within = jacobian.push(span).square().sum((1, 2))
        probes = probes.expand(jacobian.batch, -1, -1)
        rest = probes - (probes @ span.mT) @ span
        energy = jacobian.push(rest).square().sum(2)
        trace = within + energy.mean(1)
        # Rounding of the products, so that a sketch that holds everything does not claim to be exact.
        error = energy.std(1) / math.sqrt(self.probes) + 8 * jacobian.eps * trace
        how = f"Hutch++, {self.probes} probes"
        made = conventions(jacobians, jacobian.entry, jacobian.engine)
        return _geometry(made, trace, error, self.probes, how, products=jacobian.products)


def _geometry(
    made: Mapping[str, Any], trace: Tensor, error: Tensor, directions: int, how: str, *, products: int
) -> LayerGeometry:
    scale = (trace / made["num_inputs"]).log() / 2
    return LayerGeometry(
        **made,
        estimand=f"½ log(tr g / d), the root mean square stretch of a direction ({how})",
        quantity="scale",
        value=torch.where(trace.isfinite(), scale, torch.nan),
        singular_values=trace.new_zeros(len(trace), 0),
        num_directions=directions,
        std_error=torch.where(trace > 0, error / (2 * trace), 0.0),
        extras={"trace": trace, "trace_std_error": error, "num_products": counted(trace, products)},
    )
