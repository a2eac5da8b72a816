"""From tangents to a small factor with the same singular values: whole, or streamed where they do not fit into memory.

Legend: K tangents, B samples, N features; r = min(K, N).  Where two sets of rows meet: P and Q of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torchgeom_probe.shapes import Float, Tensor

#: Bytes that a block may take while it is widened to float64: on a CPU it should stay near the cache.
_BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
#: Small matrix products that keep a device busy, and the features that each of them has at least.  One product a sample
#: would leave most of a GPU's processors without work.
_SIDE_BY_SIDE = {"cuda": 1024}
_SHORTEST_PIECE = 1024


@dataclass(frozen=True, eq=False)
class Factor:
    """A matrix [B, r, r] per sample with the tangents' singular values: ``triangle``'s, or √ of ``gram``'s eigenvalues.

    float64 tangents are reduced by QR: ``triangle``.  Narrower ones are widened, block by block, to a float64 Gram
    matrix on the smaller side.  It resolves σ/σ_max down to 1e-8, far below the 1e-7 that float32 tangents hold; a
    float32 Gram matrix would lose everything below 3e-4 σ_max to rounding.  No step waits for the device.

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
        by_features = sum(block.shape[2] for block in blocks_KBN) < blocks_KBN[0].shape[0]
        exact = blocks_KBN[0].dtype == torch.float64
        if (by_features or exact) and len(blocks_KBN) > 1:
            blocks_KBN = [torch.cat(list(blocks_KBN), dim=2)]
        if exact:
            tall = blocks_KBN[0].permute(1, 0, 2) if by_features else blocks_KBN[0].permute(1, 2, 0)
            finite = tall.sum((1, 2)).isfinite()  # LAPACK drops a nan at the head of a single column
            triangle = torch.linalg.qr(tall, mode="r").R
            return Factor(triangle=torch.where(finite[:, None, None], triangle, torch.nan), dtype=dtype)
        sides = [block.permute(2, 1, 0) for block in blocks_KBN] if by_features else blocks_KBN
        gram = inner_products(sides[0], sides[0])
        for side in sides[1:]:
            gram = gram + inner_products(side, side)
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


def singular_values(factors: Mapping[str, Factor]) -> dict[str, Float[Tensor, "batch r"]]:
    """Those of many factors, the equally large ones in one call: one small matrix costs what hundreds of them do."""
    alike: dict[Any, list[str]] = {}
    for entry, factor in factors.items():
        shape = (factor.triangle if factor.gram is None else factor.gram).shape  # type: ignore[union-attr]
        alike.setdefault((factor.gram is None, shape), []).append(entry)
    found: dict[str, Tensor] = {}
    for (by_triangle, shape), entries in alike.items():
        name = "triangle" if by_triangle else "gram"
        matrices = torch.cat([getattr(factors[entry], name) for entry in entries])
        whole = Factor(triangle=matrices) if by_triangle else Factor(gram=matrices)
        found.update(zip(entries, whole.singular_values().split(shape[0]), strict=True))
    return found


def inner_products(left_PBN: Float[Tensor, "P B N"], right_QBN: Float[Tensor, "Q B N"]) -> Float[Tensor, "B P Q"]:
    """float64 inner products of rows, widened a block at a time: of samples, and of a large sample's features."""
    symmetric = right_QBN is left_PBN
    left_BPN, right_BQN = left_PBN.transpose(0, 1), right_QBN.transpose(0, 1)
    batch, rows, length = left_BPN.shape
    columns = right_BQN.shape[1]
    block = _BLOCK_BYTES.get(left_PBN.device.type, 64 << 20)
    # Eight bytes a number, and an eighth of that for `_pieces`.
    per_feature = 9 * max(1, rows if symmetric else rows + columns)
    samples = max(1, block // (per_feature * max(1, length)))
    # Of many rows a good number of features together, or the result would be read and written more often than they.
    features = max(64, block // per_feature, min(rows, columns, 1024))
    products = torch.zeros(batch, rows, columns, dtype=torch.float64, device=left_PBN.device)
    for first in range(0, batch, samples):
        some = slice(first, first + samples)
        for start in range(0, length, features):
            left = left_BPN[some, :, start : start + features]
            right = left if symmetric else right_BQN[some, :, start : start + features]
            _add_products(products[some], left, right)
    return products


def _add_products(total_BPQ: Tensor, left_BPN: Tensor, right_BQN: Tensor) -> None:
    """Add left·rightᵀ to the total, in float64; on a GPU as the sum over pieces of the features, side by side."""
    symmetric = right_BQN is left_BPN
    pieces = _pieces(left_BPN, right_BQN)
    length = left_BPN.shape[2]
    even = length - length % pieces
    if pieces > 1:
        left = _in_pieces(left_BPN[:, :, :even], pieces)
        right = left if symmetric else _in_pieces(right_BQN[:, :, :even], pieces)
        total_BPQ += torch.bmm(left, right.mT).unflatten(0, (-1, pieces)).sum(1)
        if even == length:
            return
        left_BPN, right_BQN = left_BPN[:, :, even:], right_BQN[:, :, even:]
    left = left_BPN.double()
    right = left if symmetric else right_BQN.double()
    total_BPQ.baddbmm_(left, right.mT)


def _pieces(left_BPN: Tensor, right_BQN: Tensor) -> int:
    """How many pieces of its features a sample's product is made of: 1 where the device is busy with one.

    A piece is at least eight times as long as it has rows, so that the products of all take an eighth of what the rows
    take.
    """
    batch, rows, length = left_BPN.shape
    shortest = max(_SHORTEST_PIECE, 8 * max(rows, right_BQN.shape[1]))
    pieces = min(_SIDE_BY_SIDE.get(left_BPN.device.type, 1) // batch, length // shortest)
    return 1 << max(0, pieces.bit_length() - 1)  # a power of two divides most numbers of features


def _in_pieces(rows_BRN: Tensor, pieces: int) -> Tensor:
    """[B·pieces, R, N/pieces] float64: the features' pieces become entries of the batch."""
    pieces_BpRn = rows_BRN.unflatten(2, (pieces, -1)).transpose(1, 2)
    return pieces_BpRn.to(torch.float64, memory_format=torch.contiguous_format).flatten(0, 1)


def streamed_factor(
    rows: Callable[[int, int], Tensor], *, count: int, length: int, at_once: int, batch: int, budget: int, itemsize: int
) -> Factor:
    """Factor of rows that need not fit into memory together.

    Where all fit into the budget each is made once.  Where not, a block of them is held while the later ones pass by,
    made again for every block: (1 + count/block)/2 times the products, and never more than the budget.

    Args:
        rows: ``rows(start, stop)`` makes some of them, [stop − start, B, length].
        count: how many there are.
        length: of each.
        at_once: how many may be made together.
        batch: B.
        budget: bytes for the rows that are held.
        itemsize: bytes of a number of theirs.

    >>> J = torch.randn(5, 1, 40)
    >>> sizes = {"count": 5, "length": 40, "batch": 1, "itemsize": 4}
    >>> streamed = streamed_factor(lambda start, stop: J[start:stop], **sizes, at_once=2, budget=4 * 40 * 4)
    >>> torch.allclose(streamed.singular_values(), Factor.of([J]).singular_values())
    True
    """
    per_row = batch * length * itemsize
    if count * per_row <= budget:
        return Factor.of([_together(rows, count, at_once)])
    if length < count:
        # On the side of the columns every row is needed once.
        at_once = min(at_once, max(1, int(budget / 2 // per_row)))
        gram: Tensor | float = 0.0
        for start in range(0, count, at_once):
            some_NBR = rows(start, min(start + at_once, count)).permute(2, 1, 0)
            gram = gram + inner_products(some_NBR, some_NBR)
        assert isinstance(gram, Tensor)
        return Factor(gram=gram)
    held = max(1, int(budget / 4 // per_row))
    return Factor(gram=_gram_in_blocks(rows, count, held, min(at_once, held)))


def _together(rows: Callable[[int, int], Tensor], count: int, at_once: int) -> Tensor:
    first = rows(0, min(at_once, count))
    if at_once >= count:
        return first
    whole = first.new_empty(count, *first.shape[1:])
    whole[:at_once] = first
    for start in range(at_once, count, at_once):
        whole[start : start + at_once] = rows(start, min(start + at_once, count))
    return whole


def _gram_in_blocks(rows: Callable[[int, int], Tensor], count: int, held: int, passing: int) -> Float[Tensor, "B K K"]:
    """Hold a block of rows, and let it and all later rows pass by it."""
    gram: Tensor | None = None
    for start in range(0, count, held):
        stop = min(start + held, count)
        block: Tensor | None = None
        for a in range(start, count, passing):
            b = min(a + passing, count)
            fresh = rows(a, b)
            if gram is None:
                gram = fresh.new_zeros(fresh.shape[1], count, count, dtype=torch.float64)
            if block is None:
                block = fresh.new_empty(stop - start, *fresh.shape[1:])
            known = min(b, stop)  # rows of the block that have been made
            if a < stop:
                block[a - start : known - start] = fresh[: known - a]
            products = inner_products(block[: known - start], fresh)
            gram[:, start:known, a:b] = products
            gram[:, a:b, start:known] = products.mT
    assert gram is not None
    return gram
