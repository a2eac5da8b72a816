"""From k tangents to a small factor with the same singular values, and from that to a log-volume.

Legend: K tangents, B samples, N features; r = min(K, N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from torchgeom_probe.shapes import Float, Tensor

#: Bytes that a block may take while it is widened to float64: on a CPU it should stay near the cache.
_BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}


@dataclass(frozen=True, eq=False)
class Factor:
    """A matrix [B, r, r] per sample whose singular values are those of the tangents: ``triangle`` itself, or √ of ``gram``'s eigenvalues.

    float64 tangents are reduced by QR: ``triangle``.  Narrower ones are widened, block by block, to a float64 Gram matrix on the
    smaller side: it resolves σ/σ_max down to 1e-8, far below the 1e-7 that float32 tangents hold (a float32 Gram matrix
    would lose everything below 3e-4 σ_max to rounding).  No step waits for the device.

    >>> tangents = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]).unsqueeze(1)      # K = 2, B = 1, N = 3
    >>> Factor.of([tangents]).singular_values().round(decimals=6).tolist()
    [[3.0, 2.0]]
    """

    gram: Float[Tensor, "batch r r"] | None = None
    triangle: Float[Tensor, "batch r r"] | None = None
    #: of the tangents, whose rounding is the resolution of the singular values; None: that of the input
    dtype: torch.dtype | None = None

    @staticmethod
    def of(blocks_KBN: Sequence[Tensor]) -> Factor:
        """Reduce the tangents of one layer, given as blocks [K, B, N_i] of its features."""
        dtype = max((block.dtype for block in blocks_KBN), key=lambda d: torch.finfo(d).eps)
        num_tangents = blocks_KBN[0].shape[0]
        num_features = sum(block.shape[2] for block in blocks_KBN)
        if blocks_KBN[0].dtype == torch.float64:
            whole_KBN = blocks_KBN[0] if len(blocks_KBN) == 1 else torch.cat(list(blocks_KBN), dim=2)
            tall = whole_KBN.permute(1, 2, 0) if num_features >= num_tangents else whole_KBN.permute(1, 0, 2)
            return Factor(triangle=torch.linalg.qr(tall, mode="r").R, dtype=dtype)
        if num_features < num_tangents:
            whole_KBN = blocks_KBN[0] if len(blocks_KBN) == 1 else torch.cat(list(blocks_KBN), dim=2)
            return Factor(gram=_gram(whole_KBN.permute(2, 1, 0)), dtype=dtype)
        gram = _gram(blocks_KBN[0])
        for block in blocks_KBN[1:]:
            gram = gram + _gram(block)
        return Factor(gram=gram, dtype=dtype)

    def scaled(self, scale: float) -> Factor:
        """The factor of the tangents times a number."""
        if scale == 1:
            return self
        return replace(
            self,
            gram=None if self.gram is None else self.gram * scale**2,
            triangle=None if self.triangle is None else self.triangle * scale,
        )

    def singular_values(self) -> Float[Tensor, "batch r"]:
        """[B, r] float64, descending; nan for a sample whose factor is not finite."""
        matrix = self.triangle if self.triangle is not None else self.gram
        assert matrix is not None
        finite = matrix.isfinite().all(-1).all(-1)
        matrix = torch.where(finite[:, None, None], matrix, 0.0)
        if self.triangle is not None:
            sigma = torch.linalg.svdvals(matrix)
        else:
            sigma = torch.linalg.eigvalsh(matrix).flip(-1).clamp_min(0).sqrt()
        return torch.where(finite[:, None], sigma, torch.nan)


def _gram(rows_RBM: Tensor) -> Tensor:
    """[B, R, R] float64 inner products of the rows, widened a block at a time: of samples, and of a large sample's features."""
    rows_BRM = rows_RBM.transpose(0, 1)
    block = _BLOCK_BYTES.get(rows_BRM.device.type, 64 << 20)
    per_feature = 8 * max(rows_BRM.shape[1], 1)
    features = max(64, block // per_feature)
    samples = max(1, block // (per_feature * max(rows_BRM.shape[2], 1)))
    grams = []
    for chunk in rows_BRM.split(samples):
        total: Tensor | None = None
        for part in chunk.split(features, dim=2):
            wide = part.double()
            total = wide @ wide.mT if total is None else total.baddbmm_(wide, wide.mT)
            del wide  # before the next one is made
        assert total is not None
        grams.append(total)
    return grams[0] if len(grams) == 1 else torch.cat(grams)


def rank_tolerance(dtype: torch.dtype) -> float:
    """Singular values below this share of the largest are the rounding of the tangents, and count as zero."""
    # Behind a bottleneck the noise of deep float32 networks is a few eps (tests/jacobian/test_values.py: under 8).  In half precision a wider
    # margin would swallow the spectrum itself.
    eps = torch.finfo(dtype).eps
    return (16 if eps < 1e-4 else 4) * eps


def log_volume(
    sigma: Float[Tensor, "batch r"], *, num_directions: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log-volume, rank, log pseudo-volume), each [B], from singular values [B, r], in nats.

    The log-volume is -inf where the rank falls short of ``num_directions``, nan where the singular values are not finite.
    """
    finite = sigma.isfinite().all(-1)
    top = sigma[:, :1] if sigma.shape[1] else sigma.new_zeros(sigma.shape[0], 1)
    counted = (sigma > tolerance * top) & finite[:, None]
    rank = counted.sum(-1)
    log_pseudo_volume = torch.where(counted, sigma, 1.0).log().sum(-1)
    volume = torch.where(rank < num_directions, -torch.inf, log_pseudo_volume)
    return (
        torch.where(finite, volume, torch.nan),
        torch.where(finite, rank, -1),
        torch.where(finite, log_pseudo_volume, torch.nan),
    )
