"""The Gram matrix of rows that need not fit into memory together: in blocks, with what is forgotten made again."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torchgeom_probe.linalg.gram import Factor
from torchgeom_probe.shapes import Tensor

#: Bytes of the float64 copy of a block of columns: on a CPU it should stay near the cache.
_WIDE_BYTES = {"cpu": 8 << 20}


def streamed_factor(
    rows: Callable[[int, int], Tensor],
    *,
    count: int,
    length: int,
    at_once: int,
    batch: int,
    budget: int,
    itemsize: int,
) -> Factor:
    """Factor of ``count`` rows of a given length; ``rows(start, stop)`` makes some of them, [·, B, length], ``at_once`` at most.

    Where all rows fit into the budget each is made once.  Where not, a block of them is held while the later ones pass by, made
    again for every block: (1 + count/block)/2 times the products, and never more than the budget.  The inner products are summed in
    float64, a block of columns at a time.
    """
    per_row = batch * length * itemsize
    if count * per_row <= budget:
        whole = rows(0, min(at_once, count))
        if at_once < count:
            first, whole = whole, whole.new_empty(count, *whole.shape[1:])
            whole[:at_once] = first
            for start in range(at_once, count, at_once):
                whole[start : start + at_once] = rows(start, min(start + at_once, count))
        if whole.dtype == torch.float64 or length < count:
            return Factor.of([whole])
        return Factor(gram=inner_products(whole, whole))
    if length < count:
        return Factor(gram=_columns_gram(rows, count, min(at_once, max(1, int(budget / 2 // per_row)))))
    held = max(1, int(budget / 4 // per_row))
    passing = max(1, min(at_once, held))
    gram: Tensor | None = None
    for start in range(0, count, held):
        stop = min(start + held, count)
        block: Tensor | None = None
        for a in range(start, count, passing):
            b = min(a + passing, count)
            fresh = rows(a, b)
            if gram is None:
                gram = torch.zeros(batch, count, count, dtype=torch.float64, device=fresh.device)
            if a < stop:
                block = block if block is not None else fresh.new_empty(stop - start, *fresh.shape[1:])
                known = min(b, stop)
                block[a - start : known - start] = fresh[: known - a]
                products = inner_products(block[: known - start], fresh)
                gram[:, start:known, a:b] = products
                gram[:, a:b, start:known] = products.mT
            else:
                assert block is not None
                products = inner_products(block, fresh)
                gram[:, start:stop, a:b] = products
                gram[:, a:b, start:stop] = products.mT
    assert gram is not None
    return Factor(gram=gram)


def _columns_gram(rows: Callable[[int, int], Tensor], count: int, at_once: int) -> Tensor:
    """[B, length, length] of the columns, which needs every row once."""
    total: Tensor | None = None
    for start in range(0, count, at_once):
        wide_BRN = rows(start, min(start + at_once, count)).double().transpose(0, 1)
        total = wide_BRN.mT @ wide_BRN if total is None else total + wide_BRN.mT @ wide_BRN
    assert total is not None
    return total


def inner_products(left_PBN: Tensor, right_QBN: Tensor) -> Tensor:
    """[B, P, Q] float64 inner products of rows, widened a block of columns at a time."""
    wide = _WIDE_BYTES.get(left_PBN.device.type, 256 << 20)
    length = left_PBN.shape[2]
    columns = max(64, wide // (8 * max(1, left_PBN.shape[1] * max(left_PBN.shape[0], right_QBN.shape[0]))))
    total = left_PBN.new_zeros(left_PBN.shape[1], left_PBN.shape[0], right_QBN.shape[0], dtype=torch.float64)
    for start in range(0, length, columns):
        a = left_PBN[:, :, start : start + columns].double().transpose(0, 1)
        b = a if right_QBN is left_PBN else right_QBN[:, :, start : start + columns].double().transpose(0, 1)
        total += a @ b.mT
    return total
