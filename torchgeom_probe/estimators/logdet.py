"""log det(g + εI): the log-volume with a floor under the small singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn import functional

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators.base import Estimator, ProductCount, conventions, counted, dense_count
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.layer import LayerJacobian, layer_jacobians
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.krylov import Leading, leading
from torchgeom_probe.linalg.lanczos import Bidiagonalisation, rademacher
from torchgeom_probe.linalg.spectrum import SpectralDensity
from torchgeom_probe.report import LayerGeometry
from torchgeom_probe.shapes import Tensor

#: Leading directions that deflate="auto" takes out.
_AUTO_DEFLATION = 10
#: The quadrature's error that is let stand, as a share of the probes' standard error.
_QUADRATURE_SHARE = 0.1


@dataclass(frozen=True)
class LogDet(Estimator):
    """log det(g + εI) by stochastic Lanczos quadrature: finite at any rank, and without forming J.

    Definition: ``log_det`` = log det(g + εI_d) = Σ_i log(λ_i + ε) over all d eigenvalues of g = JᵀJ (of JᵀJ/n when
    normalised), in nats; ``log_volume`` = ½ ``log_det``, which tends to log √det g as ε → 0 where n ≥ d.  Where n < d,
    log det(g + εI_d) = (d − n) log ε + log det(JJᵀ + εI_n) exactly: the first term is the same at every point, and the
    iteration is on the smaller of g and JJᵀ always.

    How: per probe z of random signs, m steps of Golub-Kahan with full reorthogonalisation; Gauss and Gauss-Radau
    quadrature bracket zᵀ log(K + ε) z, and m grows until the bracket is a tenth of the standard error.  With ``tol``,
    probes are added until the standard error of ``log_det`` is below it.  The same probes serve all samples, all layers
    of a size and all epochs, so DIFFERENCES between points are sharper than the values: compare, with one seed.

    Where the exact value is cheaper it is taken, and ``estimand`` says so: n or d small, or no end in sight at the
    price of the dense Jacobian.  At n = 512 that is nearly always so for ε below 1e-2 of λ_1.  Steep spectra gain from
    ``deflate``: the leading singular vectors are found first (as :class:`TopK` does) and counted exactly, and probes
    see the rest.

    Bias: that of the quadrature, part of ``std_error``.  Variance: 2(‖A‖²_F − Σ A_ii²) per probe, A = log(K + ε).
    ``std_error`` is that of ``log_volume``; of ``log_det`` it is twice that.  Cost:
    ``num_products`` = 2 · steps · probes per sample and layer. ``report.density(layer)`` is the spectral density of the
    same run; ``singular_values`` [B, 1] its largest Ritz value (≤ σ_1).

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
        exact = self._exact_at_once(smaller)
        found = self._exact(jacobian) if exact else self._stochastic(jacobian, smaller)
        floor = f"{self.eps:g} λ_1" if self.relative else f"{self.eps:g}"
        return LayerGeometry(
            **conventions(jacobians, jacobian.entry, jacobian.engine),
            estimand=f"½ log det(g + εI), ε = {floor} ({found.how})",
            value=torch.where(found.log_det.isfinite(), found.log_det / 2, torch.nan),
            singular_values=found.largest,
            num_directions=jacobian.num_inputs,
            std_error=found.error / 2,
            extras={"log_det": found.log_det, "num_products": found.products},
            spectrum=found.density,
        )

    def _exact(self, jacobian: LayerJacobian) -> _Found:
        sigma = jacobian.dense().singular_values()
        eigenvalues = sigma.square()
        eps = self._eps(eigenvalues[:, :1])
        log_det = (eigenvalues + eps).log().sum(1) + (jacobian.num_inputs - sigma.shape[1]) * eps[:, 0].log()
        return _Found(
            log_det,
            torch.zeros_like(log_det),
            counted(log_det, jacobian.products),
            sigma[:, :1],
            SpectralDensity.of_singular_values(sigma, jacobian.num_inputs),
            "exact, from all singular values",
        )

    def _stochastic(self, jacobian: LayerJacobian, smaller: int) -> _Found:
        limit = smaller if self.method == "auto" else math.inf
        top: Leading | None = None
        if self.deflate != "auto" and self.deflate > 0:
            top = _leading(jacobian, self.deflate, self.seed)
        sample = _Sample(self, jacobian, top)
        finished = sample.draw(limit)
        while self.tol is not None and finished and not sample.settled(self.tol):
            needed = sample.probes_needed(self.tol)
            price = needed * 2 * sample.steps
            if self.deflate == "auto" and sample.top is None:
                rank = min(_AUTO_DEFLATION, smaller // 4)
                deflated = sample.probes_needed(self.tol, without=rank) * 2 * sample.steps + 8 * rank + 16
                if deflated < price and jacobian.products + deflated < limit:
                    sample = _Sample(self, jacobian, _leading(jacobian, rank, self.seed))
                    finished = sample.draw(limit)
                    continue
            if jacobian.products + 0.9 * price > limit:
                finished = False
                break
            finished = sample.draw(limit)
        if not finished and self.method == "auto":
            return self._exact(jacobian)
        return sample.found()

    def _eps(self, largest: Tensor) -> Tensor:
        """ε of every sample, [B, 1]."""
        return self.eps * largest.clamp_min(1e-300) if self.relative else torch.full_like(largest, self.eps)


@dataclass(frozen=True, eq=False)
class _Found:
    log_det: Tensor
    error: Tensor
    products: Tensor
    largest: Tensor
    density: SpectralDensity
    how: str


def _leading(jacobian: LayerJacobian, rank: int, seed: int) -> Leading:
    smaller = min(jacobian.num_features, jacobian.num_inputs)
    generator = torch.Generator().manual_seed(seed)
    block = min(4, smaller)
    start = torch.randn(block, jacobian.num_inputs, generator=generator, dtype=torch.float64).to(jacobian.device)
    start = start.expand(jacobian.batch, -1, -1)
    return leading(jacobian, start, k=rank, block=block, tolerance=1e-3, max_products=4 * smaller, generator=generator)


class _Sample:
    """The probes drawn so far for one layer, and what they say."""

    def __init__(self, estimator: LogDet, jacobian: LayerJacobian, top: Leading | None) -> None:
        self.estimator = estimator
        self.jacobian = jacobian
        self.top = top
        self.smaller = min(jacobian.num_features, jacobian.num_inputs)
        self.steps = 0
        self.eps: Tensor | None = None
        self._values: list[Tensor] = []
        self._masses: list[Tensor] = []
        self._halves: list[Tensor] = []
        self._nodes: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._largest: Tensor | None = None
        #: [B], what the value still moved by with λ_1 in the last step, where ε is relative to it.
        self._drift: Tensor | float = 0.0

    def draw(self, limit: float) -> bool:
        """Run another set of probes; False where the price of the dense Jacobian was reached first."""
        probes = rademacher(self.estimator.probes, self.smaller, seed=self.estimator.seed + 7919 * len(self._values))
        few_features = self.jacobian.num_features < self.jacobian.num_inputs
        deflated = None if self.top is None else self.top.left if few_features else self.top.vectors
        if deflated is not None and self.top is not None:
            deflated = deflated[:, : self.top.values.shape[1]]
        run = Bidiagonalisation(self.jacobian, probes.to(self.jacobian.device), deflated)
        previous = math.inf
        while True:
            nodes, weights = run.quadrature()
            if self.eps is None or not self._values:
                largest = nodes.amax((1, 2))[:, None]
                if self.top is not None:
                    largest = torch.maximum(largest, self.top.values[:, :1].square())
                eps, before = self.estimator._eps(largest), self.eps
                self._largest, self.eps = largest.sqrt(), eps
                if self.estimator.relative:
                    # ε moves with the largest Ritz value, and log det by tr ε(g + ε)⁻¹ times as much: up to d times.
                    share = eps[:, :, None] / (nodes + eps[:, :, None])
                    pull = (self.jacobian.num_inputs - self.smaller) + (weights * share).sum(2).mean(1)
                    moved = torch.inf if before is None else (eps / before).log().abs()[:, 0]
                    self._drift = pull * moved
            lower, upper = run.bracket(self._function)
            half = (upper - lower).clamp_min(0).mean(1) / 2
            half = half + self._drift
            if run.steps >= min(self.estimator.steps, self.smaller):
                break
            excess = self._excess(half, (lower + upper) / 2, run.mass)
            if excess <= 1:
                break
            # The bracket narrows geometrically or faster (hence the half): is the end in sight at the dense Jacobian's
            # price?
            rate = previous / excess if run.steps >= 6 else math.inf
            steps_left = 2 * math.log(excess) / math.log(rate) if 1 < rate < math.inf else 0 if rate > 1 else math.inf
            if self.jacobian.products + self.estimator.probes * max(2, steps_left) > limit:
                return False
            previous = excess
            run.step()
            if run.steps < min(self.smaller, 32) and run.steps % 2:
                run.step()
        self.steps = max(self.steps, run.steps)
        self._values.append((lower + upper) / 2)
        self._masses.append(run.mass)
        self._halves.append((upper - lower).clamp_min(0) / 2)
        nodes, weights = run.quadrature()
        self._nodes.append(nodes)
        self._weights.append(weights)
        return True

    def _excess(self, half: Tensor, values: Tensor, mass: Tensor) -> float:
        """By how much the widest bracket exceeds what is let stand: the round's one synchronisation."""
        spread = _corrected(values, mass, self._left()).std(1) / math.sqrt(values.shape[1])
        allowed = torch.maximum(_QUADRATURE_SHARE * spread, 1e-7 * self.smaller + 1e-4 * values.mean(1).abs())
        if self.estimator.tol is not None:
            allowed = allowed.clamp_min(self.estimator.tol / 3)
        return float(torch.nan_to_num(half / allowed, nan=0.0).max())

    def _function(self, nodes: Tensor) -> Tensor:
        assert self.eps is not None
        return (nodes + self.eps[:, :, None]).log()

    def _left(self) -> int:
        return self.smaller - (0 if self.top is None else self.top.values.shape[1])

    def _trace(self) -> tuple[Tensor, Tensor]:
        """[B] estimate of tr log(K + ε) outside of what is deflated, and its standard error, the quadrature's too."""
        values = _corrected(torch.cat(self._values, 1), torch.cat(self._masses, 1), self._left())
        half = torch.cat(self._halves, 1).mean(1)
        spread = values.var(1)
        if self.estimator.tol is not None:
            # A few probes know their own spread badly, and those that happen to agree must not end the search.
            spread = torch.maximum(spread, 0.8 * self._predicted(0))
        variance = spread / values.shape[1] + (half + self._drift).square()
        if self.top is not None:
            variance = variance + (2 * self.top.bound).square()
        return values.mean(1), variance.sqrt()

    def settled(self, tol: float) -> bool:
        """Whether every sample's standard error is within ``tol``."""
        return not bool((self._trace()[1] > tol).any())  # a diverged sample is not waited for

    def probes_needed(self, tol: float, *, without: int = 0) -> int:
        """How many more probes their spread asks for; ``without``: with so many leading directions deflated."""
        spread = _corrected(torch.cat(self._values, 1), torch.cat(self._masses, 1), self._left()).var(1)
        # Of a few probes the spread is known badly; the spectrum that they have seen says what to expect of it.
        spread = torch.maximum(spread, 0.8 * self._predicted(0))
        drawn = sum(v.shape[1] for v in self._values)
        if without:
            spread = spread * (self._predicted(without) / self._predicted(0).clamp_min(1e-300)).clamp_max(1.0)
            drawn = 0
        return max(1, math.ceil(torch.nan_to_num(spread / tol**2).max().item()) - drawn)

    def _predicted(self, without: int) -> Tensor:
        """2(‖A‖²_F − (tr A)²/N) less its leading directions: of spread-out eigenvectors the variance."""
        probes = sum(n.shape[1] for n in self._nodes)
        nodes = torch.cat([n.flatten(1) for n in self._nodes], 1)
        weights = torch.cat([w.flatten(1) for w in self._weights], 1) / probes
        nodes, order = nodes.sort(1, descending=True)
        weights = weights.gather(1, order)
        weights = torch.minimum((weights.cumsum(1) - without).clamp_min(0), weights)
        assert self.eps is not None
        values = (nodes + self.eps).log()
        total = weights.sum(1).clamp_min(1e-300)
        return 2 * ((weights * values.square()).sum(1) - (weights * values).sum(1).square() / total).clamp_min(0)

    def found(self) -> _Found:
        """What the probes say, with the deflated directions and the (d − n) log ε term put back."""
        trace, error = self._trace()
        assert self.eps is not None
        assert self._largest is not None
        probes = sum(v.shape[1] for v in self._values)
        log_det = trace + (self.jacobian.num_inputs - self.smaller) * self.eps[:, 0].log()
        nodes, weights = _stacked(self._nodes), _stacked(self._weights)
        # The mass of a probe outside of the deflated directions varies; their number does not.
        weights = weights * (self._left() / weights.sum(2, keepdim=True).clamp_min(1e-300))
        how = f"stochastic Lanczos quadrature, {probes} probes"
        if self.top is not None:
            eigenvalues = self.top.values.square()
            log_det = log_det + (eigenvalues + self.eps).log().sum(1)
            top = eigenvalues[:, None].expand(-1, probes, -1)
            nodes, weights = torch.cat([nodes, top], 2), torch.cat([weights, torch.ones_like(top)], 2)
            how += f", {eigenvalues.shape[1]} directions deflated"
        zeros = self.jacobian.num_inputs - self.smaller
        nodes, weights = functional.pad(nodes, (0, 1)), functional.pad(weights, (0, 1), value=float(zeros))
        density = SpectralDensity(nodes, weights, self.jacobian.num_inputs, exact=False)
        products = counted(log_det, self.jacobian.products)
        return _Found(log_det, error, products, self._largest, density, how)


def _corrected(values_Bs: Tensor, masses_Bs: Tensor, dimension: int) -> Tensor:
    """Use that E|z|² is known outside of deflated directions: a control variate, its slope from the other probes.

    Without it deflation would undo what random signs are chosen for: that the identity's share of log(K + ε) has no
    variance.
    """
    level = values_Bs / masses_Bs.clamp_min(1e-300)
    count = values_Bs.shape[1]
    others = (level.sum(1, keepdim=True) - level) / (count - 1)
    return values_Bs - others * (masses_Bs - dimension)


def _stacked(parts: list[Tensor]) -> Tensor:
    width = max(p.shape[2] for p in parts)
    return torch.cat([functional.pad(p, (0, width - p.shape[2])) for p in parts], 1)
