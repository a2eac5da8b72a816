"""log det(g + εI): the log-volume with a floor under the small singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch.nn import functional

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators.base import Estimator, ProductCount, conventions, counted, dense_count
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.layer import LayerJacobian, layer_jacobians
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.krylov import leading, random_block
from torchgeom_probe.linalg.lanczos import Bidiagonalisation, rademacher
from torchgeom_probe.linalg.spectrum import SpectralDensity
from torchgeom_probe.report import LayerGeometry
from torchgeom_probe.shapes import Float, Tensor

#: Leading directions that deflate="auto" takes out.
_AUTO_DEFLATION = 10
#: The quadrature's error that is let stand, as a share of the probes' standard error.
_QUADRATURE_SHARE = 0.1


@dataclass(frozen=True)
class LogDet(Estimator):
    """log det(g + εI) by stochastic Lanczos quadrature: finite at any rank, and without forming J.

    Definition: ``log_det`` = log det(g + εI_d) = Σ_i log(λ_i + ε) over all d eigenvalues of g = JᵀJ (of JᵀJ/n when
    normalised), in nats; ``half_log_det`` = ½ ``log_det`` is the value, and tends to log √det g as ε → 0 where n ≥ d.
    Where n < d, log det(g + εI_d) = (d − n) log ε + log det(JJᵀ + εI_n) exactly: the first term is the same at every
    point, and the iteration is on the smaller of g and JJᵀ always.

    How: per probe z of random signs, m steps of Golub-Kahan with full reorthogonalisation; Gauss and Gauss-Radau
    quadrature bracket zᵀ log(K + ε) z, and m grows until the bracket is a tenth of the standard error.  With ``tol``,
    probes are added until the standard error of ``log_det`` is below it.  The same probes serve all samples, all layers
    of a size and all epochs, so DIFFERENCES between points are sharper than the values: compare, with one seed.

    Where the exact value is cheaper it is taken, and ``estimand`` says so: n or d small, or no end in sight at the
    price of the dense Jacobian.  At n = 512 that is nearly always so for ε below 1e-2 of λ_1.  Steep spectra gain from
    ``deflate``: the leading singular vectors are found first (as :class:`TopK` does) and counted exactly, and probes
    see the rest.

    Bias: that of the quadrature, part of ``std_error``.  Variance: 2(‖A‖²_F − Σ A_ii²) per probe, A = log(K + ε).
    ``std_error`` is that of ``half_log_det``; of ``log_det`` it is twice that.  Cost: ``num_products`` = 2 · steps ·
    probes per sample and layer.  ``report.density(layer)`` is the spectral density of the same run;
    ``singular_values`` [B, 1] its largest Ritz value (≤ σ_1).

    Source: Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017); Golub and Meurant, Matrices, Moments and
    Quadrature (2010).

    Args:
        eps: ε, in the units of λ = σ² (after normalisation).
        relative: ε is ``eps`` times the sample's own λ_1: free of scale, but then not the same ε at every point.
        probes: random vectors (at least 4), and how many are added at a time under ``tol``.
        steps: Lanczos steps at most.
        tol: standard error of ``log_det`` to reach, in nats; by default the probes given are all.
        deflate: how many leading directions to take out; ``"auto"``: 10 where, under ``tol``, the first probes predict
            that it pays.
        seed: of the probes.
        method: ``"auto"``, or ``"lanczos"`` or ``"exact"`` to insist.

    Raises:
        ProbeError: eps ≤ 0, fewer than 4 probes, deflate too large for a layer; an op without a forward or a reverse
            derivative.

    >>> import torch, torchgeom_probe as tgp
    >>> model = torch.nn.Linear(400, 300, bias=False)
    >>> estimator = tgp.LogDet(eps=0.1, probes=16, method="lanczos")
    >>> g = tgp.measure(model, torch.zeros(1, 400), layers="", estimator=estimator, normalize=False)[""]
    >>> gram = model.weight.double().T @ model.weight.double() + 0.1 * torch.eye(400, dtype=torch.float64)
    >>> bool((g.log_det - torch.logdet(gram)).abs() < 4 * 2 * g.std_error)
    True
    """

    eps: float = 1e-6
    relative: bool = False
    probes: int = 10
    steps: int = 96
    tol: float | None = None
    deflate: int | Literal["auto"] = "auto"
    seed: int = 0
    method: Literal["auto", "lanczos", "exact"] = "auto"
    argument: ClassVar[str] = "eps"

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise ProbeError(
                f"LogDet(eps={self.eps}): ε is a positive number; without it log det g is −inf wherever n < d.\n"
                "Write LogDet(eps=1e-6)"
            )
        if self.probes < 4:
            raise ProbeError(
                f"LogDet(probes={self.probes}): a standard error needs at least 4 probes.\nWrite LogDet(probes=10)"
            )
        if self.steps < 1:
            raise ProbeError(f"LogDet(steps={self.steps}): at least one step is needed.\nWrite LogDet(steps=96)")
        if self.tol is not None and not self.tol > 0:
            raise ProbeError(f"LogDet(tol={self.tol}): a positive number of nats.\nWrite tol=0.5, or leave it out.")
        if self.deflate != "auto" and (not isinstance(self.deflate, int) or self.deflate < 0):
            raise ProbeError(f"LogDet(deflate={self.deflate!r}): a number of directions, or 'auto'.\nWrite deflate=10")
        if self.method not in ("auto", "lanczos", "exact"):
            raise ProbeError(f"LogDet(method={self.method!r}) is unknown.\nWrite 'auto', 'lanczos' or 'exact'.")

    def cost(self, plan: Plan, *, engine: str = "auto") -> dict[str, ProductCount]:
        """Per layer: Lanczos runs from the probes, at most the products of the dense Jacobian; or that at once."""
        # The probes, the graph saved for reverse mode, and the Krylov vectors.
        vectors = 2 * 8 * self.probes * min(self.steps, 32) * (plan.num_inputs + max(plan.features.values()))
        rows = self.probes + 48 + int(vectors / max(plan.row_bytes, 1) / 2)
        found = {}
        for entry, n in plan.features.items():
            smaller = min(n, plan.num_inputs)
            if self.deflate != "auto" and self.deflate >= smaller:
                raise ProbeError(
                    f"LogDet(deflate={self.deflate}): layer {entry!r} has {smaller} singular values in all.\n"
                    "Write fewer, or method='exact'."
                )
            if self._exact_at_once(smaller):
                why = "the exact value is cheaper than Lanczos runs"
                found[entry] = dense_count(n, plan.num_inputs, at_once=rows, why=why)
            else:
                most = smaller if self.method == "auto" else 2 * self.probes * self.steps
                half = min(self.probes * min(self.steps, 16), most // 2)
                after = ", then the exact value" if self.method == "auto" else ""
                why = (
                    f"Lanczos runs from {self.probes} probes, Jv and Jᵀu in turn, about {most} products at the "
                    f"most{after}"
                )
                found[entry] = ProductCount(half, half, most + (smaller if after else 0), False, rows, why)
        return found

    def _exact_at_once(self, smaller: int) -> bool:
        return self.method == "exact" or (self.method == "auto" and smaller <= 16 * self.probes)

    def estimate(
        self, jacobians: Jacobians, *, start: Mapping[str, LayerGeometry] | None = None
    ) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk; an earlier result is of no use to it."""
        with layer_jacobians(jacobians, estimator=f"LogDet(eps={self.eps:g})", at_once=self.probes) as maps:
            return {entry: self._layer(jacobians, jacobian) for entry, jacobian in maps.items()}

    def _layer(self, jacobians: Jacobians, jacobian: LayerJacobian) -> LayerGeometry:
        smaller = min(jacobian.num_features, jacobian.num_inputs)
        found = self._exact(jacobian) if self._exact_at_once(smaller) else self._stochastic(jacobian, smaller)
        floor = f"{self.eps:g} λ_1" if self.relative else f"{self.eps:g}"
        value = torch.where(found.log_det.isfinite(), found.log_det / 2, torch.nan)
        if self.relative:  # of J = 0 ε is 0, too
            value = value.masked_fill(found.largest[:, 0] == 0, -torch.inf)
        return LayerGeometry(
            **conventions(jacobians, jacobian.entry, jacobian.engine),
            quantity="half_log_det",
            estimand=f"½ log det(g + εI), ε = {floor} ({found.how})",
            value=value,
            singular_values=found.largest,
            num_directions=jacobian.num_inputs,
            std_error=found.error / 2,
            extras={"log_det": found.log_det, "num_products": counted(found.log_det, jacobian.products)},
            spectrum=found.density,
        )

    def _exact(self, jacobian: LayerJacobian) -> _Found:
        sigma = jacobian.dense().singular_values()
        eigenvalues = sigma.square()
        eps = self.floor(eigenvalues[:, :1])
        log_det = (eigenvalues + eps).log().sum(1) + (jacobian.num_inputs - sigma.shape[1]) * eps[:, 0].log()
        density = SpectralDensity.of_singular_values(sigma, jacobian.num_inputs)
        how = "exact, from all singular values"
        return _Found(log_det, torch.zeros_like(log_det), sigma[:, :1], density, how)

    def _stochastic(self, jacobian: LayerJacobian, smaller: int) -> _Found:
        limit = smaller if self.method == "auto" else math.inf
        drawn = _Probes(self, jacobian, limit, deflate=0 if self.deflate == "auto" else self.deflate)
        finished = drawn.draw()
        while self.tol is not None and finished and not drawn.settled(self.tol):
            price = drawn.price(self.tol)
            rank = min(_AUTO_DEFLATION, smaller // 4)
            deflated = drawn.price(self.tol, without=rank) + 8 * rank + 16
            may_deflate = self.deflate == "auto" and not drawn.deflated
            if may_deflate and deflated < price and jacobian.products + deflated < limit:
                drawn = _Probes(self, jacobian, limit, deflate=rank)
            elif jacobian.products + 0.9 * price > limit:
                finished = False
                break
            finished = drawn.draw()
        return drawn.found() if finished or self.method != "auto" else self._exact(jacobian)

    def floor(self, largest: Float[Tensor, "batch 1"]) -> Float[Tensor, "batch 1"]:
        """ε of every sample, of the largest eigenvalue of its g."""
        return self.eps * largest.clamp_min(1e-300) if self.relative else torch.full_like(largest, self.eps)


class _Found(NamedTuple):
    log_det: Tensor
    error: Tensor  # of log_det
    largest: Tensor  # singular value, [B, 1]
    density: SpectralDensity
    how: str


class _Probes:
    """The probes drawn so far for one layer, and what they say of tr log(K + ε), K the smaller of g and JJᵀ.

    Attributes:
        deflated: how many leading directions are counted exactly; the probes see what lies outside of them.
        steps: of the longest run so far.
        nodes, weights: [B, s, m], the Gauss quadrature of every probe.
        half: [B, s], half the gap between Gauss and Gauss-Radau, in whose middle a probe's value is taken.
        eps: [B, 1], ε; it is settled by the first set of probes.
    """

    def __init__(self, estimator: LogDet, jacobian: LayerJacobian, limit: float, *, deflate: int) -> None:
        self.estimator, self.jacobian, self.limit, self.deflated = estimator, jacobian, limit, deflate
        self.smaller = min(jacobian.num_features, jacobian.num_inputs)
        self.steps = 0
        nothing = torch.zeros(jacobian.batch, 0, dtype=torch.float64, device=jacobian.device)
        self.nodes, self.weights, self.half = nothing[:, :, None], nothing[:, :, None], nothing
        self._eigenvalues, self._directions, self._bound = nothing, None, nothing.sum(1)
        if deflate:
            block, generator = min(4, self.smaller), torch.Generator().manual_seed(estimator.seed)
            start = random_block(jacobian, block, generator)
            most = min(4 * self.smaller, limit - jacobian.products)
            options: dict[str, Any] = {"k": deflate, "block": block, "tolerance": 2e-3 * deflate, "max_products": most}
            top = leading(jacobian, start, generator=generator, **options)
            vectors = top.left if jacobian.num_features < jacobian.num_inputs else top.vectors
            self._eigenvalues, self._directions, self._bound = top.values.square(), vectors[:, :deflate], 2 * top.bound
        self.eps = torch.zeros_like(self._bound)[:, None]
        self._largest = self.eps
        #: [B], what the value still moved by with λ_1 in the last step, where ε is relative to it.
        self._drift = torch.zeros_like(self._bound)

    def draw(self) -> bool:
        """Run another set of probes; False where the price of the dense Jacobian was reached first."""
        settings, drawn = self.estimator, self.half.shape[1]
        signs = rademacher(settings.probes, self.smaller, seed=settings.seed + 7919 * (drawn // settings.probes))
        run = Bidiagonalisation(self.jacobian, signs.to(self.jacobian.device), self._directions)
        excess = math.inf
        while True:
            nodes, weights = run.quadrature()
            if not drawn:
                self._settle_eps(nodes, weights)
            upper = self._form(nodes, weights)
            half = (upper - self._form(*run.quadrature(radau=True))).clamp_min(0) / 2
            before, excess = excess, self._excess(upper - half, half, run.mass)
            if excess <= 1 or run.steps >= min(settings.steps, self.smaller):
                break
            # Is the end in sight at the dense Jacobian's price?  A round is two steps; brackets narrow geometrically or
            # faster: half of the products that the last rate asks for.
            rate = before / excess if run.steps >= 6 else math.inf
            rounds = math.log(excess) / math.log(rate) if rate > 1 else math.inf
            if self.jacobian.products + 2 * settings.probes * max(1, rounds) > self.limit:
                return False
            run.step()
            if run.steps < min(self.smaller, 32) and run.steps % 2:
                run.step()
        self.steps = max(self.steps, run.steps)
        self.nodes, self.weights = _stacked(self.nodes, nodes), _stacked(self.weights, weights)
        self.half = torch.cat([self.half, half], 1)
        return True

    def _settle_eps(self, nodes: Tensor, weights: Tensor) -> None:
        largest = torch.cat([nodes.flatten(1), self._eigenvalues], 1).amax(1, keepdim=True)
        before, self.eps, self._largest = self.eps, self.estimator.floor(largest), largest.sqrt()
        if self.estimator.relative:
            # ε moves with the largest Ritz value, and log det by tr ε(g + ε)⁻¹ times as much: up to d times.
            share = self.eps[:, :, None] / (nodes + self.eps[:, :, None])
            pull = self._zeros + (weights * share).sum(2).mean(1)
            self._drift = pull * (self.eps / before).log().abs()[:, 0]  # inf at first

    def _excess(self, values: Tensor, half: Tensor, mass: Tensor) -> float:
        """By how much the widest bracket exceeds what is let stand: the round's one synchronisation."""
        spread = self._corrected(values, mass).std(1) / math.sqrt(values.shape[1])
        allowed = torch.maximum(_QUADRATURE_SHARE * spread, 1e-7 * self.smaller + 1e-4 * values.mean(1).abs())
        if self.estimator.tol is not None:
            allowed = allowed.clamp_min(self.estimator.tol / 3)
        return float(torch.nan_to_num((half.mean(1) + self._drift) / allowed, nan=0.0).max())

    @property
    def _zeros(self) -> int:
        """The eigenvalues of g that are zero because it is larger than K."""
        return self.jacobian.num_inputs - self.smaller

    def _form(self, nodes: Tensor, weights: Tensor) -> Tensor:
        """[B, s], zᵀ log(K + ε) z."""
        return (weights * (nodes + self.eps[:, :, None]).log()).sum(2)

    def _corrected(self, values_Bs: Tensor, masses_Bs: Tensor) -> Tensor:
        """Use that E|z|² is known outside of deflated directions: a control variate, its slope from the other probes.

        Without it deflation would undo what random signs are chosen for: that the identity's share of log(K + ε) has no
        variance.
        """
        level = values_Bs / masses_Bs.clamp_min(1e-300)
        others = (level.sum(1, keepdim=True) - level) / (values_Bs.shape[1] - 1)
        return values_Bs - others * (masses_Bs - (self.smaller - self.deflated))

    def _values(self) -> tuple[Tensor, Tensor]:
        """[B, s] what each probe says of tr log(K + ε) outside of what is deflated; [B] their variance."""
        values = self._corrected(self._form(self.nodes, self.weights) - self.half, self.weights.sum(2))
        variance = values.var(1)
        if self.estimator.tol is not None:
            # A few probes know their own spread badly, and those that happen to agree must not end the search: the
            # spectrum that they have seen says what to expect.
            variance = torch.maximum(variance, 0.8 * self._predicted(0))
        return values, variance

    def _trace(self) -> tuple[Tensor, Tensor]:
        """[B] estimate of tr log(K + ε) outside of what is deflated, and its standard error, the quadrature's too."""
        values, variance = self._values()
        bias = self.half.mean(1) + self._drift
        return values.mean(1), (variance / values.shape[1] + bias.square() + self._bound.square()).sqrt()

    def settled(self, tol: float) -> bool:
        """Whether every sample's standard error is within ``tol``."""
        return not bool((self._trace()[1] > tol).any())  # a diverged sample is not waited for

    def price(self, tol: float, *, without: int = 0) -> int:
        """The products of as many more probes as ``tol`` asks for; ``without``: of all anew, with so many deflated."""
        values, variance = self._values()
        drawn = 0 if without else values.shape[1]
        if without:
            variance = variance * (self._predicted(without) / self._predicted(0).clamp_min(1e-300)).clamp_max(1.0)
        needed = math.ceil(torch.nan_to_num(variance / tol**2).max().item())
        return max(1, needed - drawn) * 2 * self.steps

    def _predicted(self, without: int) -> Tensor:
        """2(‖A‖²_F − (tr A)²/N) less its leading directions: of spread-out eigenvectors the variance."""
        nodes, order = self.nodes.flatten(1).sort(1, descending=True)
        weights = (self.weights / self.half.shape[1]).flatten(1).gather(1, order)
        weights = torch.minimum((weights.cumsum(1) - without).clamp_min(0), weights)
        values = (nodes + self.eps).log()
        total = weights.sum(1).clamp_min(1e-300)
        return 2 * ((weights * values.square()).sum(1) - (weights * values).sum(1).square() / total).clamp_min(0)

    def found(self) -> _Found:
        """What the probes say, with the deflated directions and the (d − n) log ε term put back."""
        trace, error = self._trace()
        log_det = trace + (self._eigenvalues + self.eps).log().sum(1) + self._zeros * self.eps[:, 0].log()
        count = self.half.shape[1]
        # The mass of a probe outside of the deflated directions varies; their number does not.
        mass = self.weights.sum(2, keepdim=True).clamp_min(1e-300)
        weights = self.weights * ((self.smaller - self.deflated) / mass)
        top = self._eigenvalues[:, None].expand(-1, count, -1)
        nodes = functional.pad(torch.cat([self.nodes, top], 2), (0, 1))
        weights = functional.pad(torch.cat([weights, torch.ones_like(top)], 2), (0, 1), value=float(self._zeros))
        density = SpectralDensity(nodes, weights, self.jacobian.num_inputs, exact=False)
        how = f"stochastic Lanczos quadrature, {count} probes"
        if self.deflated:
            how += f", {self.deflated} directions deflated"
        return _Found(log_det, error, self._largest, density, how)


def _stacked(first_Bsm: Tensor, second_Bsm: Tensor) -> Tensor:
    """Both sets of probes, the shorter runs padded with nodes of weight zero."""
    width = max(first_Bsm.shape[2], second_Bsm.shape[2])
    return torch.cat([functional.pad(part, (0, width - part.shape[2])) for part in (first_Bsm, second_Bsm)], 1)
