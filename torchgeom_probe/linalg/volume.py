"""From singular values to a log-volume: what counts as zero, and what a matrix of deficient rank is replaced by.

Legend: B samples, r singular values, n rows and d columns of J.
"""

from __future__ import annotations

import torch

from torchgeom_probe.shapes import Float, Int, Tensor


def rank_tolerance(dtype: torch.dtype) -> float:
    """Singular values below this share of the largest are the rounding of tangents of this dtype, and count as zero."""
    # Behind a bottleneck the noise of deep float32 networks is a few eps (tests/jacobian/test_values.py: under 8).
    # In half precision a wider margin would swallow the spectrum itself.
    eps = torch.finfo(dtype).eps
    return (16 if eps < 1e-4 else 4) * eps


def log_volume(
    sigma: Float[Tensor, "batch r"], *, num_directions: int, tolerance: float
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return (log-volume, rank, log pseudo-volume), each [B], from singular values [B, r], in nats.

    The log-volume is Σ log σ_i; -inf where the rank falls short of ``num_directions``, nan where the singular values
    are not finite.  The rank counts what exceeds ``tolerance`` · σ_1, and is -1 where they are not finite.  The log
    pseudo-volume is the sum over those that count alone.

    >>> sigma = torch.tensor([[2.0, 1.0], [2.0, 0.0]])
    >>> volume, rank, pseudo = log_volume(sigma, num_directions=2, tolerance=1e-6)
    >>> volume.exp().tolist(), rank.tolist(), pseudo.exp().tolist()
    ([2.0, 0.0], [2, 1], [2.0, 2.0])
    """
    finite = sigma.isfinite().all(-1)
    top = sigma.amax(1, keepdim=True) if sigma.shape[1] else 0.0
    counted = (sigma > tolerance * top) & finite[:, None]
    rank = counted.sum(-1)
    log_pseudo_volume = torch.where(counted, sigma, 1.0).log().sum(-1)
    volume = torch.where(rank < num_directions, -torch.inf, log_pseudo_volume)
    return (
        torch.where(finite, volume, torch.nan),
        torch.where(finite, rank, -1),
        torch.where(finite, log_pseudo_volume, torch.nan),
    )


def regular(
    J: Float[Tensor, "batch n d"],
) -> tuple[Float[Tensor, "batch n d"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Scale each Jacobian to largest entry 1, and replace those of deficient rank by a stand-in of full rank.

    J is [B, n, d] with n ≥ d.  Returns the scaled Jacobians [B, n, d], the scale [B] and the defect [B], which is 0, or
    ``-inf`` where σ_min ≤ 4 d ε σ_max, or ``nan`` where J is not finite.  A stand-in instead of a mask afterwards,
    because a singular J leaves nan in the backward pass of QR even where its value is not used.  The scale keeps tiny
    and huge Jacobians from under- and overflowing; it carries no gradient and needs none.

    >>> J = torch.tensor([[[1e-30, 0.0], [0.0, 2e-30]], [[1.0, 1.0], [1.0, 1.0]]])
    >>> regular(J)[2].tolist()
    [0.0, -inf]
    """
    n, d = J.shape[1:]
    with torch.no_grad():
        stand_in = torch.eye(n, d, dtype=J.dtype, device=J.device)
        finite = J.isfinite().all(2).all(1)
        scale = J.abs().amax((1, 2))
        scale = torch.where(finite & (scale > 0), scale, torch.ones_like(scale))
        safe = torch.where(finite[:, None, None], J / scale[:, None, None], stand_in)
        sigma = torch.linalg.svdvals(torch.linalg.qr(safe).R)
        full_rank = sigma[:, -1] > 4 * d * torch.finfo(J.dtype).eps * sigma[:, 0]
        defect = torch.where(finite, torch.where(full_rank, 0.0, -torch.inf), torch.nan).to(J.dtype)
        usable = (finite & full_rank)[:, None, None]
    return torch.where(usable, J / scale[:, None, None], stand_in), scale, defect
