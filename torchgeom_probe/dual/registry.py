"""How a rule gets into the table, and the few moves that the rules share.

A rule is called with the op's own arguments, at least one of them a DualTensor.  It returns NotImplemented for what it
does not cover: then the op falls back to its derivative in torch (``one_op.py``).  So a rule buys speed, and what torch
has no derivative of, or a wrong one.

Legend, for all rules: R = 1 + k rows; p is the primal (row 0), t the tangents (rows 1 … k), f' the derivative at p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves, tree_map

from torchgeom_probe.dual.ops import ops_named
from torchgeom_probe.dual.passes import current_pass, followed
from torchgeom_probe.dual.tensor import RULES, DualTensor, Rule
from torchgeom_probe.shapes import Tensor

_Make = TypeVar("_Make", bound=Callable[..., Rule])


def register(function: Rule, *names: str) -> None:
    """Register a rule in the table for every op of these names."""
    RULES.update(dict.fromkeys(ops_named(*names), function))


def rule(*names: str, in_place: str = "") -> Callable[[Rule], Rule]:
    """Register the decorated rule for every op of these names, and its in-place form for those of ``in_place``."""

    def registered(function: Rule) -> Rule:
        register(function, *names)
        register(in_place_of(function), in_place)
        return function

    return registered


def rule_of_each(*names: str) -> Callable[[_Make], _Make]:
    """Register a rule of its own for every op of these names: the decorated function makes it from the op."""

    def registered(make: _Make) -> _Make:
        RULES.update({op: make(op) for op in ops_named(*names)})
        return make

    return registered


def in_place_of(function: Rule) -> Rule:
    """The in-place form of a rule: its result goes into the first operand's own memory, where its views see it."""

    def push(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, DualTensor):
            return NotImplemented
        given = DualTensor(input.buffer.clone()) if followed() else input  # autograd may save it
        out = function(given, *(given if a is input else a for a in args), **kwargs)
        if not isinstance(out, DualTensor) or out.buffer.shape != input.buffer.shape:
            return NotImplemented
        if out.buffer.is_complex() and not input.buffer.is_complex():
            return NotImplemented
        input.buffer.copy_(out.buffer)
        return input

    return push


def on_rows(op: Any) -> Rule:
    """The rule of any op that is linear in its first argument: run it on each row.  A view stays a view."""

    def push(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, DualTensor) or any_dual(*tree_leaves((args, kwargs))):
            return NotImplemented
        out = torch.func.vmap(lambda row: op(row, *args, **kwargs))(input.buffer)
        return tree_map(DualTensor, out)

    return push


def folded(x: DualTensor, op: Callable[[Tensor], Tensor]) -> DualTensor:
    """Run an op that is linear in a batch once, over R·B rows."""
    return DualTensor(op(x.buffer.flatten(0, 1)).unflatten(0, x.buffer.shape[:2]))


def lowered(x: Any) -> Any:
    """The narrower type that products take this tensor's tangents in; None: their own."""
    return current_pass().low if isinstance(x, DualTensor) and x.buffer.dtype == torch.float32 else None


def apart(x: DualTensor, op: Callable[[Tensor], Tensor], low: torch.dtype, *, fold: bool = False) -> DualTensor:
    """Run an op that is linear: on the primal as it is, on the tangents in a narrower type (``fold``: as a batch)."""
    primal, tangents = op(x.buffer[0]), x.buffer[1:].to(low)
    pushed = op(tangents.flatten(0, 1)).unflatten(0, tangents.shape[:2]) if fold else op(tangents)
    out = rows_like(primal, x.buffer.shape[0])
    out[0].copy_(primal)
    out[1:].copy_(pushed)
    return DualTensor(out)


def on_batch(op: Any, ndim: int) -> Rule:
    """The rule of an op that is linear in a batch of ``ndim`` axes; without a batch axis the rows are the batch."""

    def push(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, DualTensor) or any_dual(*args, *kwargs.values()):
            return NotImplemented
        if ndim_of(input) == ndim - 1:
            return DualTensor(op(input.buffer, *args, **kwargs))
        return folded(input, lambda rows: op(rows, *args, **kwargs)) if ndim_of(input) == ndim else NotImplemented

    return push


# ---------------------------------------------------------------------------------------------- shapes and alignment


def aligned(x: DualTensor, ndim: int) -> Tensor:
    """The buffer with axes of size 1 put in behind the rows, so that it broadcasts against ``ndim`` primal axes."""
    b, missing = x.buffer, ndim + 1 - x.buffer.ndim
    return b if missing <= 0 else b.reshape(b.shape[0], *[1] * missing, *b.shape[1:])


def operands(a: Any, b: Any) -> tuple[Any, Any]:
    """Two operands of a binary op, ready to broadcast and of the type that torch promotes their primals to."""
    ndim = max(ndim_of(a), ndim_of(b))
    left = aligned(a, ndim) if isinstance(a, DualTensor) else a
    right = aligned(b, ndim) if isinstance(b, DualTensor) else b
    if getattr(left, "dtype", None) != getattr(right, "dtype", None):
        # The rows give a 0-dim primal an axis, which would change what torch promotes to.
        dtype = torch.result_type(primal_of(a), primal_of(b))
        left = left.to(dtype) if isinstance(a, DualTensor) else left
        right = right.to(dtype) if isinstance(b, DualTensor) else right
    return left, right


def wide(x: Tensor) -> Tensor:
    """In float32 where its type is narrower: as torch's own kernels hold their sums."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def ndim_of(a: Any) -> int:
    """Axes of the primal; 0 for a number."""
    return a.buffer.ndim - 1 if isinstance(a, DualTensor) else a.ndim if isinstance(a, Tensor) else 0


def primal_of(a: Any) -> Any:
    """Row 0 of a DualTensor; anything else as it is."""
    return a.buffer[0] if isinstance(a, DualTensor) else a


def any_dual(*values: Any) -> bool:
    """Whether one of the values is a DualTensor."""
    return any(isinstance(v, DualTensor) for v in values)


def rows_of(*values: Any) -> int:
    """R of the first DualTensor among the values."""
    return next(v for v in values if isinstance(v, DualTensor)).buffer.shape[0]


def with_rows(a: Any, rows: int) -> Tensor:
    """The buffer of a dual operand, or one for a plain operand: its tangents ARE zero."""
    if isinstance(a, DualTensor):
        return a.buffer
    buffer = rows_like(a, rows)
    buffer[0].copy_(a)
    buffer[1:].zero_()
    return buffer


def rows_like(value: Tensor, rows: int) -> Tensor:
    """An empty buffer [rows, *value.shape] whose rows lie as the value does."""
    if value.is_contiguous():
        return value.new_empty((rows, *value.shape))
    strides = torch.empty_like(value, device="meta").stride()  # its own, where it is dense
    return value.new_empty_strided((rows, *value.shape), (value.numel(), *strides))


def joined(value: Tensor, tangents: Tensor) -> DualTensor:
    """The rows put together, each laid out as the value is: what is a view of the plain tensor is one of this."""
    if value.is_contiguous():
        return DualTensor(torch.cat([value[None], tangents]))
    out = rows_like(value, len(tangents) + 1)
    out[0].copy_(value)
    out[1:].copy_(tangents)
    return DualTensor(out)


def at(dim: int) -> int:
    """The place of a primal axis in the buffer; negative axes count from the end in both."""
    return dim + 1 if dim >= 0 else dim


def from_end(dim: int, ndim: int) -> int:
    """An axis as a negative number: the same axis in the primal and in the buffer."""
    return dim - ndim if dim >= 0 else dim


def all_at(dim: int | Sequence[int]) -> list[int]:
    """The places of primal axes in the buffer."""
    return [at(d) for d in ((dim,) if isinstance(dim, int) else dim)]


def reduced(dim: Any, ndim: int) -> list[int]:
    """The axes that a reduction runs over, counted from the end: all of them for None, ``()`` and ``[]``."""
    given = (dim,) if isinstance(dim, int) else dim
    return [from_end(d, ndim) for d in given or range(ndim)]


def listed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """``(2, 3)`` from either way to write it: ``f(2, 3)`` or ``f((2, 3))``."""
    return tuple(arguments[0]) if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)) else arguments


def row_by_row(buffer: Tensor) -> bool:
    """Whether a loop over the rows beats one broadcasting kernel: on the CPU, with rows that outweigh a call."""
    return buffer.device.type == "cpu" and buffer.numel() >= _ROW_NUMBERS * buffer.shape[0] and not followed()


_ROW_NUMBERS = 1 << 13
