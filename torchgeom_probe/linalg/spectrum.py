"""The spectral density of g = JᵀJ as a quadrature: nodes and weights of a Lanczos run, or the eigenvalues themselves.

Legend of axes: B samples, s probes, m nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Float, Tensor


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """How the d eigenvalues λ of g are distributed: point masses per probe, of d in all, zero eigenvalues included.

    Definition: tr f(g) = mean over probes of Σ_j weights_j f(nodes_j).  From a Lanczos run of m steps that is Gauss
    quadrature, exact per probe for polynomials up to degree 2m − 1 (so for tr g and tr g²); from
    :class:`~torchgeom_probe.Exact` it is the spectrum itself.  Eigenvalues are those of g as it was measured: of JᵀJ/n
    when normalised.

    Attributes:
        nodes: [B, s, m], eigenvalues (λ = σ²), not sorted.
        weights: [B, s, m], how many eigenvalues each stands for.
        num_inputs: d.
        exact: whether the nodes are all the eigenvalues.

    Bias: none in tr g and tr g²; the quadrature's in other functions.  Variance: from the s probes; each estimate comes
    with a standard error [B] (zero where exact).  Cost: none beyond the measurement.

    >>> density = SpectralDensity.of_singular_values(torch.tensor([[2.0, 1.0, 1.0]]), num_inputs=5)
    >>> ratio, error = density.participation_ratio()          # (4 + 1 + 1)² / (16 + 1 + 1)
    >>> ratio.item(), error.item()
    (2.0, 0.0)
    """

    nodes: Float[Tensor, "batch s m"]
    weights: Float[Tensor, "batch s m"]
    num_inputs: int
    exact: bool

    @staticmethod
    def of_singular_values(sigma: Float[Tensor, "batch r"], num_inputs: int) -> SpectralDensity:
        """Make it from all min(n, d) singular values; the remaining d − r eigenvalues are zero."""
        nodes = functional.pad(sigma.square(), (0, 1))
        weights = torch.ones_like(nodes)
        weights[:, -1] = num_inputs - sigma.shape[1]
        return SpectralDensity(nodes[:, None], weights[:, None], num_inputs, exact=True)

    @staticmethod
    def joined(parts: Sequence[SpectralDensity]) -> SpectralDensity:
        """The densities of several chunks of samples as one."""
        probes = max(p.nodes.shape[1] for p in parts)
        width = max(p.nodes.shape[2] for p in parts)

        def padded(values: Tensor, fill: float) -> Tensor:
            values = functional.pad(values, (0, width - values.shape[2]), value=fill)
            return values if values.shape[1] == probes else values.expand(-1, probes, -1)

        return SpectralDensity(
            torch.cat([padded(p.nodes, 0.0) for p in parts]),
            torch.cat([padded(p.weights, 0.0) for p in parts]),
            parts[0].num_inputs,
            exact=all(p.exact for p in parts),
        )

    def expectation(
        self, function: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Return tr f(g) [B] and its standard error [B]."""
        each = (self.weights * function(self.nodes)).sum(-1)
        return each.mean(-1), self._error(each)

    def trace(self) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Return tr g = ‖J‖²_F [B] and its standard error [B]."""
        return self.expectation(lambda nodes: nodes)

    def log_det(self, eps: float) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Return log det(g + εI) [B], in nats, for any ε, and its standard error [B]."""
        if not eps > 0:
            raise ProbeError(
                f"eps={eps}: the determinant needs a positive ε where g is singular.\nWrite log_det(eps=1e-6)"
            )
        return self.expectation(lambda nodes: (nodes + eps).log())

    def participation_ratio(self) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Return (tr g)²/tr g² [B], how many eigenvalues carry the trace, and its standard error [B] (jackknife)."""
        return self._of_moments(
            lambda moments: moments[0].square() / moments[1].clamp_min(1e-300), [lambda x: x, torch.square]
        )

    def effective_rank(self) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Return exp(entropy of λ/Σλ) [B] (Roy and Vetterli 2007), and its standard error [B] (jackknife)."""

        def from_moments(moments: Sequence[Tensor]) -> Tensor:
            total = moments[0].clamp_min(1e-300)
            return torch.where(moments[0] > 0, (total.log() - moments[1] / total).exp(), 0.0)

        return self._of_moments(from_moments, [lambda x: x, lambda x: torch.xlogy(x, x)])

    def counts_above(self, eigenvalues: Float[Tensor, " p"]) -> Float[Tensor, "batch p"]:
        """Return how many eigenvalues of g exceed each of the given ones, [B, p]: the cumulative density."""
        above = self.nodes[..., None] > eigenvalues.to(self.nodes)
        return (self.weights[..., None] * above).sum(2).mean(1)

    def per_decade(self, log10_eigenvalues: Float[Tensor, " p"], width: float = 0.1) -> Float[Tensor, "batch p"]:
        """Return the density over log10 λ, [B, p], per decade, smoothed by a Gaussian of that width (in decades)."""
        if not width > 0:
            raise ProbeError(f"width={width}: the smoothing is a positive number of decades.\nWrite width=0.1")
        place = self.nodes.clamp_min(1e-300).log10()[..., None] - log10_eigenvalues.to(self.nodes)
        kernel = (-0.5 * (place / width).square()).exp() / (width * (2 * torch.pi) ** 0.5)
        return (self.weights[..., None] * kernel).sum(2).mean(1)

    def _of_moments(
        self, statistic: Callable[[Sequence[Tensor]], Tensor], functions: Sequence[Callable[[Tensor], Tensor]]
    ) -> tuple[Tensor, Tensor]:
        each = [(self.weights * f(self.nodes)).sum(-1) for f in functions]
        value = statistic([e.mean(-1) for e in each])
        probes = self.nodes.shape[1]
        if probes == 1 or self.exact:
            return value, self._error(each[0])
        others = statistic([(e.sum(-1, keepdim=True) - e) / (probes - 1) for e in each])
        spread = (others - others.mean(-1, keepdim=True)).square().sum(-1)
        return value, ((probes - 1) / probes * spread).sqrt()

    def _error(self, each: Tensor) -> Tensor:
        probes = each.shape[-1]
        if self.exact:
            return torch.zeros_like(each[..., 0])
        if probes == 1:
            return torch.full_like(each[..., 0], torch.nan)
        return each.std(-1) / probes**0.5
