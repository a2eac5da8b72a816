"""Indexing: reading and writing by an index that is the same in every row."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch

from torchgeom_probe.dual.registry import (
    aligned,
    any_dual,
    at,
    ndim_of,
    primal_of,
    register,
    rows_of,
    rule,
    rule_of_each,
    with_rows,
)
from torchgeom_probe.dual.tensor import DualTensor, Rule
from torchgeom_probe.shapes import Tensor


@rule("index_select")
def _index_select(input: Any, dim: int, index: Tensor) -> Any:
    return DualTensor(input.buffer.index_select(at(dim), index)) if ndim_of(input) else NotImplemented


register(lambda input, index: DualTensor(input.buffer.reshape(rows_of(input), -1)[:, index]), "take")


@rule("gather")
def _gather(input: Any, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    if ndim_of(input) == 0 or index.ndim != ndim_of(input):
        return NotImplemented
    return DualTensor(input.buffer.gather(at(dim), index.expand(rows_of(input), *index.shape)))


def _index(index: Any) -> tuple[Any, int] | None:
    """The same index behind a full slice of the rows, and where the rows end up; None where that is not plain."""
    items = tuple(_plain_int(i) for i in index) if isinstance(index, tuple) else (_plain_int(index),)
    # Torch applies ints before it tells tensors apart, lets "..." cover nothing, and may take a list for a tuple.
    # Where that could matter, each row is indexed by itself.
    if any(isinstance(i, bool) or (isinstance(i, Tensor) and i.ndim == 0) for i in items):
        return None
    if isinstance(index, list) and any(isinstance(i, (list, tuple, slice, Tensor)) for i in index):
        return None
    arrays = [isinstance(i, (Tensor, list, tuple, range)) or hasattr(i, "__array__") for i in items]
    advanced = [n for n, is_array in enumerate(arrays) if is_array]
    if not advanced or advanced[-1] - advanced[0] < len(advanced):
        return (slice(None), *items), 0
    if not all(isinstance(i, slice) for n, i in enumerate(items) if n not in advanced):
        return None
    # Apart from each other: the axes that they make together go to the front, before the rows.
    joint = [torch.as_tensor(items[n]) for n in advanced]
    if any(i.dtype == torch.bool for i in joint):
        return None
    return (slice(None), *items), len(torch.broadcast_shapes(*(i.shape for i in joint)))


def _plain_int(item: Any) -> Any:
    """Torch takes a whole number in a 0-dim tensor, or of numpy, for an int: such an index gives a view."""
    whole = isinstance(item, Integral) and not isinstance(item, bool)
    if isinstance(item, Tensor) and item.ndim == 0 and not isinstance(item, DualTensor):
        whole = item.dtype not in (torch.bool, torch.uint8)
    return int(item) if whole else item


@rule("Tensor.__getitem__")
def _getitem(input: Any, index: Any) -> Any:
    if not isinstance(input, DualTensor) or any_dual(*(index if isinstance(index, tuple) else (index,))):
        return NotImplemented
    found = _index(index)
    if found is None:
        return DualTensor(torch.stack([row[index] for row in input.buffer.unbind()]))
    return DualTensor(input.buffer[found[0]].movedim(found[1], 0))


@rule("Tensor.__setitem__")
def _setitem(input: Any, index: Any, value: Any) -> Any:
    if not isinstance(input, DualTensor) or any_dual(*(index if isinstance(index, tuple) else (index,))):
        return NotImplemented
    found = _index(index)
    if found is None:  # torch's own indexing, row by row
        values = value.buffer if isinstance(value, DualTensor) else [value, *[0] * (rows_of(input) - 1)]
        for row, of_row in enumerate(values):
            input.buffer[row][index] = of_row
        return input
    behind, place = found
    if isinstance(value, DualTensor):
        ndim = input.buffer[behind].ndim - 1
        source = aligned(value, ndim)
        while source.ndim - 1 > ndim and source.shape[1] == 1:  # too many leading axes of size 1 are allowed
            source = source.squeeze(1)
        input.buffer[behind] = source.movedim(0, place)
    else:
        input.buffer[behind] = 0
        input.buffer[0][behind[1:]] = value
    return input  # never seen: an assignment has no value


def _index_op(op: Any) -> Rule:
    # a dual or a plain source into a dual or a plain tensor: the same on each row, the index of scatter repeated
    def push(input: Any, dim: int, index: Tensor, source: Any = None, **kwargs: Any) -> Any:
        source = kwargs.pop("src", source)
        known = not any_dual(*kwargs.values()) and not set(kwargs) - {"alpha"}
        if not isinstance(source, Tensor) or not known or ndim_of(input) == 0:
            return NotImplemented
        scatters = op.__name__.startswith("scatter")
        if ndim_of(source) != ndim_of(input) or (scatters and index.ndim != ndim_of(input)):
            return NotImplemented
        rows = rows_of(input, source)
        where = index.expand(rows, *index.shape) if scatters else index
        return DualTensor(op(with_rows(input, rows), at(dim), where, with_rows(source, rows), **kwargs))

    return push


for _name in ("scatter", "scatter_add", "index_add", "index_copy"):
    rule(_name, in_place=f"{_name}_")(_index_op(getattr(torch, _name)))


@rule_of_each("select_scatter slice_scatter")
def _written_at(op: Any) -> Rule:
    # of a vmap of these torch's gradient is wrong: one call on all rows
    def push(input: Any, src: Any, dim: int = 0, *where: Any, **kwargs: Any) -> Any:
        rows = rows_of(input, src)
        return DualTensor(op(with_rows(input, rows), with_rows(src, rows), at(dim), *where, **kwargs))

    return push


@rule("masked_select")
def _masked_select(input: Any, mask: Tensor) -> Any:
    shape = torch.broadcast_shapes(mask.shape, input.shape)
    return DualTensor(aligned(input, len(shape)).expand(rows_of(input), *shape)[:, mask.expand(shape)])


@rule("index_fill", in_place="Tensor.index_fill_")
def _index_fill(input: Any, dim: int, index: Tensor, value: Any) -> Any:
    # by the rule of where: y' is 0 in the places filled with a number, the value's own tangent in those of a dual
    chosen = torch.zeros_like(primal_of(input), dtype=torch.bool).index_fill_(dim, index, True)
    return torch.where(chosen, value, input)
