"""Products with weights and of two duals: linear, matmul, einsum and whatever else is linear in each operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from torchgeom_probe.dual.graph import shifted
from torchgeom_probe.dual.registry import (
    aligned,
    any_dual,
    apart,
    lowered,
    ndim_of,
    primal_of,
    register,
    row_by_row,
    rule,
    rule_of_each,
)
from torchgeom_probe.dual.tensor import DualTensor, Rule
from torchgeom_probe.shapes import Tensor


@rule("linear")
def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    # (Wx + b)' = Wx';  of a dual weight by the rules of the parts
    if any_dual(weight, bias):
        out = torch.matmul(input, weight.mT) if ndim_of(weight) == 2 else torch.matmul(input, weight)
        return out if bias is None else out + bias
    low = lowered(input)
    if low is not None:
        out = apart(input, lambda rows: F.linear(rows, weight.to(rows.dtype)), low).buffer
    else:
        out = F.linear(input.buffer, weight)
    if bias is not None:
        out = shifted(out, bias)
    return DualTensor(out)


@rule("matmul bmm mm Tensor.__matmul__")
def _matmul(input: Any, other: Any) -> Any:
    # (a b)' = a'b + ab', batched over the rows by broadcasting
    ndim = max(ndim_of(input), ndim_of(other))
    if min(ndim_of(input), ndim_of(other)) < 2:
        return multilinear(torch.matmul, input, other)
    left = aligned(input, ndim) if isinstance(input, DualTensor) else input
    right = aligned(other, ndim) if isinstance(other, DualTensor) else other
    low = lowered(input) or lowered(other)
    if not (isinstance(input, DualTensor) and isinstance(other, DualTensor)):
        if low is not None and isinstance(input, DualTensor):
            return apart(DualTensor(left), lambda rows: torch.matmul(rows, right.to(rows.dtype)), low)
        if low is not None:
            return apart(DualTensor(right), lambda rows: torch.matmul(left.to(rows.dtype), rows), low)
        return DualTensor(torch.matmul(left, right))
    if low is not None:
        a, b = left.to(low), right.to(low)
        out = torch.matmul(left[0], right[0]).expand(len(left), *[-1] * (ndim)).clone()
        out[1:].copy_(torch.matmul(a[1:], b[0]).add_(torch.matmul(a[0], b[1:])))
        return DualTensor(out)
    if left.shape[1:-2] == right.shape[1:-2] and ndim > 2 and row_by_row(left):
        return DualTensor(_batched(left, right))
    out = torch.matmul(left, right[0])
    out[1:].add_(torch.matmul(left[0], right[1:]))
    return DualTensor(out)


def _batched(left: Tensor, right: Tensor) -> Tensor:
    # No row of either operand is repeated to broadcast it, and the second product adds to the first in place.
    shape = (*left.shape[:-1], right.shape[-1])
    left, right = left.flatten(1, -3), right.flatten(1, -3)
    out = left.new_empty((*left.shape[:-1], right.shape[-1]))
    torch.bmm(left[0], right[0], out=out[0])
    for row in range(1, out.shape[0]):
        torch.bmm(left[row], right[0], out=out[row])
        out[row].baddbmm_(left[0], right[row])
    return out.view(shape)


register(lambda input, other: _matmul(other, input), "Tensor.__rmatmul__")


def multilinear(op: Callable[..., Tensor], *factors: Any) -> Any:
    """The product rule for any op that is linear in each of its operands: one term for each that is dual."""
    if not any_dual(*factors):
        return NotImplemented
    primals = [primal_of(f) for f in factors]
    out: Any = None
    for i, factor in enumerate(factors):
        if not isinstance(factor, DualTensor):
            continue

        def on_row(row: Tensor, i: int = i) -> Tensor:
            return op(*primals[:i], row, *primals[i + 1 :])

        if out is None:
            out = torch.func.vmap(on_row)(factor.buffer)
        else:
            out[1:].add_(torch.func.vmap(on_row)(factor.tangents))
    return DualTensor(out)


@rule_of_each("mv dot vdot inner outer ger kron torch.tensordot cross vecdot")
def _bilinear_op(op: Any) -> Rule:
    def push(a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        if any_dual(*args, *kwargs.values()):
            return NotImplemented
        return multilinear(lambda p, q: op(p, q, *args, **kwargs), a, b)

    return push


@rule("torch.einsum")
def _einsum(equation: Any, *factors: Any) -> Any:
    if len(factors) == 1 and isinstance(factors[0], (list, tuple)):
        factors = tuple(factors[0])
    if not isinstance(equation, str):
        return NotImplemented
    return multilinear(lambda *operands: torch.einsum(equation, *operands), *factors)


# ------------------------------------------------------------------------------------- by the rules of their own parts


def _plus_product(product: Callable[[Any, Any], Any]) -> Rule:
    def push(input: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        out = product(a, b) if alpha == 1 else product(a, b) * alpha
        return out if beta == 0 else out + (input if beta == 1 else input * beta)

    return push


rule("addmm", in_place="addmm_")(_plus_product(torch.mm))
rule("baddbmm", in_place="baddbmm_")(_plus_product(torch.bmm))
rule("addmv", in_place="addmv_")(_plus_product(torch.mv))
rule("addr", in_place="addr_")(_plus_product(torch.outer))
rule("addbmm")(_plus_product(lambda a, b: torch.bmm(a, b).sum(0)))


@rule("bilinear")
def _bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    # y = aᵀ W b + c;  y' = a'ᵀ W b + aᵀ W b'
    if any_dual(weight, bias):
        return NotImplemented
    out = multilinear(lambda a, b: torch.einsum("...i,oij,...j->...o", a, weight, b), input1, input2)
    if bias is not None:
        shifted(out.buffer, bias)
    return out
