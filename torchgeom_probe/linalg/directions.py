"""Where tangents come from: the basis, and orthonormal frames: random, of low frequencies, of the data."""

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
    # A column each, two at least, or one direction were x itself where x is torch.randn of the same seed.
    columns = torch.randn(num_inputs, max(2, num_directions), generator=generator, dtype=torch.float64, device="cpu")
    orthonormal, triangle = torch.linalg.qr(columns[:, :num_directions])
    # The sign that makes QR unique makes the frame Haar distributed (Mezzadri, arXiv:math-ph/0609050).
    return (orthonormal * triangle.diagonal().sign()).T.contiguous()


def smooth_frame(num_directions: int, shape: Sequence[int], *, seed: int) -> Float[Tensor, "k d"]:
    """Return k random orthonormal directions among the lowest spatial frequencies, as the rows of a float64 CPU tensor.

    Of [C, H, W] (or more axes) every axis but the first is space, of [H, W] or [L] every axis.  The frame is Haar
    distributed in the span of the first four cosines (DCT-II) of each axis of space; of more where k asks for them.

    Raises:
        ProbeError: k > d, or k < 1.

    >>> frame = smooth_frame(3, (2, 16, 16), seed=0).view(3, 2, 16, 16)
    >>> steps = frame.diff(dim=3)  # from a pixel to the next
    >>> bool(steps.square().sum() < 0.2 * frame.square().sum())
    True
    """
    channels, space = (shape[:1], shape[1:]) if len(shape) > 2 else ((), shape)
    lowest = 4
    while prod(channels) * prod(min(lowest, n) for n in space) < min(num_directions, prod(shape)):
        lowest += 1
    sizes = [min(lowest, n) for n in space]
    if num_directions > prod(shape):
        sizes = list(space)  # refused below, with the size of the whole space
    frame = orthonormal_frame(num_directions, prod(channels) * prod(sizes), seed=seed).view(-1, *channels, *sizes)
    for axis, n in enumerate(space):
        frame = torch.tensordot(frame, _cosines(sizes[axis], n), dims=([1 + len(channels)], [0]))  # moved to the end
    return frame.reshape(num_directions, -1)


def _cosines(count: int, length: int) -> Float[Tensor, "count length"]:
    """The first orthonormal cosines of the DCT-II."""
    frequency, place = torch.arange(count, dtype=torch.float64), torch.arange(length, dtype=torch.float64)
    waves = torch.cos(torch.pi * frequency[:, None] * (place + 0.5) / length)
    return waves / waves.norm(dim=1, keepdim=True)


def principal_frame(num_directions: int, points: Float[Tensor, "N ..."]) -> Float[Tensor, "k d"]:
    """Return the k leading principal directions of N points, as the rows of a float64 CPU tensor.

    Raises:
        ProbeError: points that span fewer directions about their mean.

    >>> points = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 1.0], [4.0, 0.1, 1.0]])
    >>> bool(principal_frame(1, points)[0, 0].abs() > 0.99)
    True
    """
    rows = points.detach().flatten(1).double().cpu()
    found = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    spanned = int((found.S > 1e-6 * found.S[:1]).sum())
    if num_directions > spanned:
        raise ProbeError(
            f"{len(rows)} points span {spanned} directions about their mean, and k={num_directions} principal ones "
            "were asked for.\n"
            f"Give more points:  Subspace(k={num_directions}, frame='data', frame_data=x), x of more than "
            f"{num_directions} samples; or fewer directions:  Subspace(k={max(1, spanned)}, frame='data')"
        )
    return found.Vh[:num_directions]


def basis(start: int, stop: int, shape: Sequence[int], *, like: Tensor) -> Float[Tensor, "k batch *shape"]:
    """Return the standard basis directions ``start … stop``, one per row, for every sample (an expanded view)."""
    num_inputs = prod(shape)
    rows = torch.zeros(stop - start, num_inputs, dtype=like.dtype, device=like.device)
    rows[torch.arange(stop - start, device=like.device), torch.arange(start, stop, device=like.device)] = 1
    return for_every_sample(rows, shape, like.shape[0])


def for_every_sample(rows: Float[Tensor, "k d"], shape: Sequence[int], batch: int) -> Tensor:
    """[k, d] → [k, B, *shape], the same directions at every sample (an expanded view)."""
    return rows.view(rows.shape[0], 1, *shape).expand(-1, batch, *shape)


class HasDirections:
    """What keeps right singular vectors of J, as directions of input space."""

    name: str
    estimand: str
    num_directions: int
    input_shape: tuple[int, ...]
    right_singular_vectors: Tensor | None

    def directions(self, k: int | None = None) -> Float[Tensor, "k batch *space"]:
        """[k, B, *x.shape[1:]]: the unit directions of ``singular_values``, in their order; the largest entry positive.

        Raises:
            ProbeError: an estimator that does not keep them, or keeps fewer.
        """
        found, most = self.right_singular_vectors, self.num_directions
        if found is None or not 1 <= (most if k is None else k) <= most:
            kept = "none" if found is None else str(most)
            raise ProbeError(
                f"layer {self.name!r} was measured as {self.estimand!r}, which keeps {kept} of its directions.\n"
                f"Measure with estimator=Directions(k={max(1, k or 4)})"
            )
        found = found[:, :k] if k else found[:, :most]
        signs = found.gather(2, found.abs().argmax(2, keepdim=True)).sign()
        found = (signs * found).transpose(0, 1)
        return found.reshape(*found.shape[:2], *self.input_shape)
