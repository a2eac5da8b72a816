"""tr g and tr g² from the singular values of J on random orthonormal frames: scale and effective dimension of g.

Legend: F frames, B samples, r singular values, k directions; s = tr VᵀgV and q = tr (VᵀgV)² of a frame V.

A frame is Haar distributed, not k independent vectors.  With P = VVᵀ a random projection,

    E P_ij P_kl = a δ_ij δ_kl + b (δ_ik δ_jl + δ_il δ_jk),   b = k(d − k) / (d(d − 1)(d + 2)),   a = k²/d² − 2b/d,

which follows from tr P = k and P² = P.  So E s² = a (tr g)² + 2b tr g² and E q = b (tr g)² + (a + b) tr g², and the
solution of these two for (tr g)² and tr g² has no bias.  The off-diagonals of VᵀgV are in it: the average of their
squares over all rotations of the frame within its span is proportional to q − s²/k, and that to the estimate of
tr g² − (tr g)²/d.  Its sign is right for every frame, so the ratio (tr g)²/tr g² always lies between 1 and d.
"""

from __future__ import annotations

from functools import cache

import torch

from torchgeom_probe.linalg.directions import orthonormal_frame
from torchgeom_probe.shapes import Float, Tensor

#: Fewer directions have too few off-diagonals (6) for an effective dimension with an error.
FEWEST = 4
_NAMES = ("scale", "scale_error", "effective_dimension", "effective_dimension_error")
#: Rotations of the frame that the jackknife is averaged over.
_ROTATIONS = 16


def frame_moments(sigma: Float[Tensor, "F B r"], *, num_directions: int, num_inputs: int) -> dict[str, Tensor]:
    """Estimate the scale and the effective dimension of g from the singular values of JV on F random k-frames.

    Returns, each [B], ``scale`` = ½ log(tr g / d), in nats, and ``effective_dimension`` = (tr g)² / tr g², from 1 (rank
    1) to d (isotropic), with their standard errors ``scale_error`` and ``effective_dimension_error``; of fewer than 4
    directions the scale alone.

    ``tr g`` and ``tr g²`` are without bias; the logarithm and the ratio have one of second order.  The standard error
    of the scale is that of a χ² with the frame's degrees of freedom; that of the effective dimension comes from leaving
    out one direction at a time, averaged over rotations of the frame.  Both are 0 at k = d.

    >>> g = torch.diag(torch.arange(1.0, 61.0, dtype=torch.float64))
    >>> frames = torch.stack([orthonormal_frame(8, 60, seed=seed) for seed in range(4)])
    >>> sigma = torch.linalg.eigvalsh(frames @ g @ frames.mT).flip(1).sqrt()[:, None]
    >>> found = frame_moments(sigma, num_directions=8, num_inputs=60)
    >>> true = g.trace().square() / g.square().trace()
    >>> bool((found["effective_dimension"] - true).abs() < 3 * found["effective_dimension_error"])
    True
    """
    k, d, frames = num_directions, num_inputs, len(sigma)
    energies = sigma.double().square()
    s, q = energies.sum(2), energies.square().sum(2)
    scale = (s.mean(0) / k).log() / 2
    if k == d:
        dimension = (s.square() / q).mean(0)
        zero = torch.zeros_like(scale)
        return dict(zip(_NAMES, (scale, zero, dimension, zero), strict=True))
    if k < FEWEST:  # their own spread says too little: as if g had rank 1
        return {"scale": scale, "scale_error": _log_spread(torch.full_like(scale, 2 / (k * frames)))}
    square_of_trace, trace_of_square = (part.mean(0) for part in _unbiased(s, q, k, d))
    # Var s = 2b (tr g² − (tr g)²/d), over (E s)²
    anisotropy = (trace_of_square - square_of_trace / d).clamp_min(0)
    variance = 2 * _haar(k, d)[1] * anisotropy / (square_of_trace * (k / d) ** 2) / frames
    dimension = square_of_trace / trace_of_square
    of_square, of_ratio = (part.mean(0) / frames for part in _jackknife(energies, s, q, k, d))
    # tr g² is itself uncertain, and too small where the frame misses a leading direction: its upper end is taken.
    error = _log_spread(variance * of_square.sqrt().exp())
    return dict(zip(_NAMES, (scale, error, dimension, dimension * of_ratio.sqrt()), strict=True))


def _haar(k: int, d: int) -> tuple[float, float]:
    b = k * (d - k) / (d * (d - 1) * (d + 2))
    return k * k / d**2 - 2 * b / d, b


def _unbiased(s: Tensor, q: Tensor, k: int, d: int) -> tuple[Tensor, Tensor]:
    """(tr g)² and tr g² of every frame."""
    a, b = _haar(k, d)
    scale = (a - b) * (a + 2 * b)
    return ((a + b) * s.square() - 2 * b * q) / scale, (a * q - b * s.square()) / scale


def _jackknife(energies: Tensor, s: Tensor, q: Tensor, k: int, d: int) -> tuple[Tensor, Tensor]:
    """[F, B] each: the variances of the logarithms of tr g² and of the effective dimension, a direction left out each.

    The frame without its i-th direction is a Haar (k − 1)-frame.  Of a rotation R of the frame only R² is needed: VᵀgV
    has the diagonal R² σ² and the squared lengths of rows R² σ⁴.
    """
    weights = _rotations(k, energies.device)[:, : energies.shape[2]]
    diagonal, rows = energies @ weights.mT, energies.square() @ weights.mT
    less_s, less_q = s[..., None] - diagonal, q[..., None] - 2 * rows + diagonal.square()
    square_of_trace, trace_of_square = _unbiased(less_s, less_q, k - 1, d)

    def variance(values: Tensor) -> Tensor:
        each = values.unflatten(-1, (_ROTATIONS, k))
        return each.var(-1, correction=0).mean(-1) * (k - 1) * (1 - k / d)  # 1 − k/d: without replacement

    return variance(trace_of_square.log()), variance((square_of_trace / trace_of_square).log())


@cache
def _rotations(k: int, device: torch.device) -> Float[Tensor, "rows k"]:
    return torch.cat([orthonormal_frame(k, k, seed=seed) for seed in range(_ROTATIONS)]).square().to(device)


def _log_spread(variance: Tensor) -> Tensor:
    """Standard deviation of ½ log of a χ² variable with that relative variance; no more than at rank 1."""
    return torch.special.polygamma(1, 1 / variance.clamp(1e-30, 2)).sqrt() / 2
