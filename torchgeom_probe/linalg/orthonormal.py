"""Orthonormal rows of a block, batched over samples, by float64 Gram matrices.

Legend: B samples, b rows of the block, m rows that are there already, X their length.
"""

from __future__ import annotations

import torch

from torchgeom_probe.shapes import Float, Tensor


def orthonormal(
    rows_BbX: Float[Tensor, "B b X"],
    against_BmX: Float[Tensor, "B m X"] | None,
    *,
    eps: float,
    noise: Tensor | float = 0.0,
) -> Float[Tensor, "B b X"]:
    """Return orthonormal rows that span the given ones outside of ``against``; zero rows where they are dependent.

    Two rounds of projection and of orthonormalisation.  A direction that is left with less than 32·eps of the longest
    row, or with less than ``noise``, holds nothing but rounding, and becomes a zero row: it adds nothing to any factor.

    Args:
        rows_BbX: the block.
        against_BmX: orthonormal (or zero) rows; None: there are none.
        eps: the rounding of the rows, relative to their length.
        noise: what the rows' rounding amounts to, where more is known of it; broadcast to [B, b, 1].

    >>> rank_two = torch.tensor([[[3.0, 0.0, 0.0], [1.0, 0.0, 1.0], [2.0, 0.0, 1.0]]], dtype=torch.float64)
    >>> rows = orthonormal(rank_two, None, eps=1e-15)
    >>> torch.allclose(rows @ rows.mT, torch.diag(torch.tensor([1.0, 1.0, 0.0]).double()))
    True
    """
    length = rows_BbX.norm(dim=2, keepdim=True)
    noise = torch.as_tensor(noise, dtype=length.dtype, device=length.device)
    floor = torch.maximum(32 * eps * length.amax(1, keepdim=True), noise)
    rows = _rotated(_projected(rows_BbX, against_BmX), floor)
    # What is left after the first round is orthonormal but for rounding, or zero.
    return _rotated(_projected(rows, against_BmX), torch.full_like(floor, 0.1**0.5)).flip(1)


def _rotated(rows_BbX: Tensor, floor: Tensor) -> Tensor:
    """The rows in the basis where they are orthogonal, ascending, at length 1; those not longer than ``floor`` at 0."""
    values, basis = torch.linalg.eigh(_finite(rows_BbX @ rows_BbX.mT))
    values = values[:, :, None]
    keep = values.clamp_min(0).sqrt() > floor
    return torch.where(keep, (basis.mT @ rows_BbX) / values.clamp_min(1e-300).sqrt(), 0.0)


def _projected(rows_BbX: Tensor, against_BmX: Tensor | None) -> Tensor:
    if against_BmX is None or not against_BmX.shape[1]:
        return rows_BbX
    return rows_BbX - (rows_BbX @ against_BmX.mT) @ against_BmX


def _finite(gram: Tensor) -> Tensor:
    # LAPACK refuses nan; a diverged sample must not take its neighbours with it.
    finite = gram.isfinite().all(-1).all(-1)[:, None, None]
    return torch.where(finite, gram, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
