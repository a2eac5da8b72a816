"""Stochastic Lanczos quadrature: Golub-Kahan bidiagonalisation from random probes, and what it says of tr f(K).

K = A Aᵀ is the smaller of J Jᵀ and g = JᵀJ: A = J if n < d, else Jᵀ.

Legend of axes: B samples, s probes, m steps, X the smaller space (features if n < d, else inputs), Y the other one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from torchgeom_probe.linalg.operator import Operator
from torchgeom_probe.shapes import Float, Tensor


def rademacher(count: int, length: int, *, seed: int) -> Float[Tensor, "s X"]:
    """Random signs from a generator of their own: the same for every sample, every layer of that size and every epoch.

    >>> rademacher(2, 3, seed=0).abs().tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count, length), generator=generator, dtype=torch.int8).double() * 2 - 1


@dataclass(eq=False)
class Bidiagonalisation:
    """The Krylov spaces of s probes z, grown step by step, with full reorthogonalisation and outside of ``deflated``.

    From u_1 = z/|z| on:
        α_j p_j = Aᵀ u_j − β_j p_{j−1},   β_{j+1} u_{j+1} = A p_j − α_j u_j.
    With L, lower bidiagonal, α on its diagonal and β below, T = L Lᵀ is what Lanczos would make of K: without squaring
    A.

    Attributes:
        jacobian: J.
        probes: the vectors z.
        deflated: orthonormal directions of the smaller space that are left out.
        mass: [B, s], |z|² of what is left of the probes: the sum of the quadrature's weights.

    >>> from torchgeom_probe.linalg.operator import MatrixOperator
    >>> J = torch.diag(torch.tensor([1.0, 2.0, 3.0]).double())[None]
    >>> run = Bidiagonalisation(MatrixOperator(J), torch.ones(1, 3, dtype=torch.float64))
    >>> run.step()
    >>> nodes, weights = run.quadrature()          # of m = 2 nodes: exact up to degree 3
    >>> round((weights * nodes**3).sum().item(), 6)          # 1 + 4³ + 9³
    794.0
    """

    jacobian: Operator
    probes: Float[Tensor, "s X"]
    deflated: Float[Tensor, "B k X"] | None = None
    _diagonal: list[Tensor] = field(default_factory=list, init=False)
    _below: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        start = self._outside(self.probes.expand(self.jacobian.batch, -1, -1))
        norm = start.norm(dim=2, keepdim=True)
        self.mass = norm[:, :, 0].square()
        self._u = (start / norm.clamp_min(1e-300))[:, :, None]
        self._p = start.new_zeros(*start.shape[:2], 0, 0)
        self._scale = start.new_zeros(*start.shape[:2], 1)
        self._half_step()

    @property
    def steps(self) -> int:
        """m, the nodes of the quadrature so far."""
        return len(self._diagonal)

    def step(self) -> None:
        """One more step: a product with A and one with Aᵀ for every probe."""
        forward = self._apply(self._p[:, :, -1], to_smaller=True) - self._diagonal[-1] * self._u[:, :, -1]
        forward = self._outside(forward)
        forward, beta = self._normalised(_reorthogonalised(forward, self._u))
        self._below.append(beta)
        self._u = torch.cat([self._u, forward[:, :, None]], dim=2)
        self._half_step()

    def _half_step(self) -> None:
        backward = self._apply(self._u[:, :, -1], to_smaller=False)
        if self._below:
            backward = _reorthogonalised(backward - self._below[-1] * self._p[:, :, -1], self._p)
        backward, alpha = self._normalised(backward)
        self._diagonal.append(alpha)
        backward = backward[:, :, None]
        self._p = torch.cat([self._p, backward], dim=2) if self._below else backward

    def _apply(self, vectors: Tensor, *, to_smaller: bool) -> Tensor:
        few_features = self.jacobian.num_features < self.jacobian.num_inputs
        return self.jacobian.push(vectors) if to_smaller == few_features else self.jacobian.pull(vectors)

    def _outside(self, vectors: Tensor) -> Tensor:
        if self.deflated is None:
            return vectors
        for _ in range(2):
            vectors = vectors - (vectors @ self.deflated.mT) @ self.deflated
        return vectors

    def _normalised(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        norm = vectors.norm(dim=2, keepdim=True)
        self._scale = torch.maximum(self._scale, norm)
        # What is left of an exhausted space is rounding; a zero vector decouples it from the quadrature.
        alive = ~(norm <= 4 * self.jacobian.eps * self._scale)  # nan is no breakdown: it must show
        return torch.where(alive, vectors / norm.clamp_min(1e-300), 0.0), torch.where(alive, norm, 0.0)

    def quadrature(self, *, radau: bool = False) -> tuple[Float[Tensor, "B s m"], Float[Tensor, "B s m"]]:
        """Return (nodes, weights) for eigenvalues of K: zᵀ f(K) z ≈ Σ_j weights_j f(nodes_j).

        Gauss by default, exact for polynomials up to degree 2m − 1.  ``radau`` prescribes a node at 0, the lower end of
        the spectrum.  Of f = log(· + ε) the even derivatives are negative and the odd ones positive, so Gauss is above
        the true value and Radau below it (Golub and Meurant, Matrices, Moments and Quadrature, 2010).
        """
        diagonal = torch.cat(self._diagonal, dim=2)
        if radau:
            diagonal = torch.cat([diagonal[:, :, :-1], torch.zeros_like(diagonal[:, :, -1:])], dim=2)
        matrix = torch.diag_embed(diagonal)
        if self._below:
            matrix = matrix + torch.diag_embed(torch.cat(self._below, dim=2), offset=-1)
        vectors, values, _ = torch.linalg.svd(torch.nan_to_num(matrix))
        nodes = torch.where(matrix.isfinite().all(-1).all(-1)[:, :, None], values.square(), torch.nan)
        return nodes, vectors[:, :, 0].square() * self.mass[:, :, None]


def _reorthogonalised(vectors: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        vectors = vectors - ((basis @ vectors[..., None]) * basis).sum(2)
    return vectors
