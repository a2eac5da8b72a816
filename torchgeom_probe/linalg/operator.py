"""What linear algebra asks of a Jacobian: its products.  A layer's Jacobian is one such operator, a matrix another.

Legend of axes: B samples, S some of them, b vectors, D inputs, N features.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from torchgeom_probe.linalg.gram import Factor
from torchgeom_probe.shapes import Float, Tensor


@runtime_checkable
class Operator(Protocol):
    """J [n, d] at every one of B samples, known by what it makes of vectors: float64 ones in and out."""

    @property
    def num_features(self) -> int:
        """The rows of J: n."""

    @property
    def num_inputs(self) -> int:
        """The columns of J: d."""

    @property
    def batch(self) -> int:
        """The samples: B."""

    @property
    def device(self) -> torch.device:
        """Where vectors are taken and given."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the products inside; what it rounds to is the resolution of singular values."""

    @property
    def eps(self) -> float:
        """The rounding of a product, relative to σ_1."""

    @property
    def products(self) -> int:
        """How many Jv and Jᵀu have been formed so far, per sample."""

    def push(self, vectors_SbD: Float[Tensor, "S b D"], *, at: list[int] | None = None) -> Float[Tensor, "S b N"]:
        """Jv, every sample's own vectors; of the samples ``at`` alone, where it is given."""

    def pull(self, vectors_SbN: Float[Tensor, "S b N"], *, at: list[int] | None = None) -> Float[Tensor, "S b D"]:
        """Jᵀu, every sample's own vectors; of the samples ``at`` alone, where it is given."""

    def dense(self) -> Factor:
        """The factor of the whole J, by rows or by columns, whichever are fewer."""


class MatrixOperator:
    """The operator of Jacobians that are known as matrices [B, n, d].

    >>> J = MatrixOperator(torch.tensor([[[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]]))
    >>> J.pull(J.push(torch.ones(1, 1, 3).double())).tolist(), J.products
    ([[[4.0, 9.0, 0.0]]], 2)
    >>> isinstance(J, Operator)
    True
    """

    def __init__(self, matrix_BND: Float[Tensor, "B N D"]) -> None:
        self.dtype = matrix_BND.dtype
        self.eps = torch.finfo(self.dtype).eps
        self.matrix = matrix_BND.double()
        self.batch, self.num_features, self.num_inputs = matrix_BND.shape
        self.device = matrix_BND.device
        self.products = 0

    def push(self, vectors_SbD: Float[Tensor, "S b D"], *, at: list[int] | None = None) -> Float[Tensor, "S b N"]:
        """Jv."""
        self.products += vectors_SbD.shape[1]
        return vectors_SbD @ (self.matrix if at is None else self.matrix[at]).mT

    def pull(self, vectors_SbN: Float[Tensor, "S b N"], *, at: list[int] | None = None) -> Float[Tensor, "S b D"]:
        """Jᵀu."""
        self.products += vectors_SbN.shape[1]
        return vectors_SbN @ (self.matrix if at is None else self.matrix[at])

    def dense(self) -> Factor:
        """The factor of the matrix itself."""
        self.products += min(self.num_features, self.num_inputs)
        return Factor.of([self.matrix.permute(2, 0, 1)])
