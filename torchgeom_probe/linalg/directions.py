"""Where tangents come from: the basis, and random orthonormal frames."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Float, Tensor


def orthonormal_frame(num_directions: int, num_inputs: int, *, seed: int) -> Float[Tensor, "k d"]:
    """Return k random orthonormal directions of R^d, Haar distributed, as the rows of a float64 CPU tensor.

    Drawn from a generator of its own: the same seed gives the same frame on every device, in every process, for every
    layer and epoch (common random numbers), so that differences between them carry little noise.

    Raises:
        ProbeError: k > d, or k < 1.

    >>> frame = orthonormal_frame(3, 7, seed=0)
    >>> torch.allclose(frame @ frame.T, torch.eye(3, dtype=torch.float64))
    True
    """
    if num_directions < 1:
        raise ProbeError(f"k={num_directions} directions were asked for; at least one is needed.  Subspace(k=8)")
    if num_directions > num_inputs:
        raise ProbeError(
            f"k={num_directions} orthonormal directions were asked for in an input space of d={num_inputs} "
            "dimensions.\n"
            f"Write Subspace(k={num_inputs}) or fewer, or take all directions:  estimator=Exact()"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    gaussian = torch.randn(num_inputs, num_directions, generator=generator, dtype=torch.float64, device="cpu")
    orthonormal, triangle = torch.linalg.qr(gaussian)
    # The sign that makes QR unique makes the frame Haar distributed (Mezzadri, arXiv:math-ph/0609050).
    return (orthonormal * triangle.diagonal().sign()).T.contiguous()


def basis(start: int, stop: int, shape: Sequence[int], *, like: Tensor) -> Float[Tensor, "k batch *shape"]:
    """Return the standard basis directions ``start … stop``, one per row, for every sample (an expanded view)."""
    num_inputs = prod(shape)
    rows = torch.zeros(stop - start, num_inputs, dtype=like.dtype, device=like.device)
    rows[torch.arange(stop - start, device=like.device), torch.arange(start, stop, device=like.device)] = 1
    return for_every_sample(rows, shape, like.shape[0])


def for_every_sample(rows: Float[Tensor, "k d"], shape: Sequence[int], batch: int) -> Tensor:
    """[k, d] → [k, B, *shape], the same directions at every sample (an expanded view)."""
    return rows.view(rows.shape[0], 1, *shape).expand(-1, batch, *shape)
