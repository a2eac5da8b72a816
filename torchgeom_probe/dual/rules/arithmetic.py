"""Arithmetic: sums, products, quotients, powers and choices of two operands, with broadcasting and type promotion."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from torchgeom_probe.dual.graph import refuse_no_gradient, shifted
from torchgeom_probe.dual.ops import ops_named
from torchgeom_probe.dual.passes import followed
from torchgeom_probe.dual.registry import (
    aligned,
    any_dual,
    in_place_of,
    joined,
    ndim_of,
    operands,
    primal_of,
    register,
    rule,
    rule_of_each,
)
from torchgeom_probe.dual.rules.elementwise import pushed
from torchgeom_probe.dual.tensor import RULES, DualTensor, Rule
from torchgeom_probe.shapes import Tensor


@rule("add Tensor.__add__ Tensor.__radd__")
def _add(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    # (a + αb)' = a' + αb'; a plain operand is added to row 0 alone
    if any_dual(alpha):
        return NotImplemented
    left, right = operands(input, other)
    if isinstance(input, DualTensor) and isinstance(other, DualTensor):
        return DualTensor(torch.add(left, right, alpha=alpha))
    x = left if isinstance(input, DualTensor) else right
    if followed():
        plain, sign = (other, alpha) if x is left else (input, 1)
        rows = x if x is left or alpha == 1 else x * alpha
        shape = torch.broadcast_shapes(x.shape[1:], getattr(plain, "shape", ()))
        dtype = torch.result_type(primal_of(input), primal_of(other))
        return DualTensor(
            shifted(rows.expand(len(x), *shape).to(dtype, copy=True), plain if sign == 1 else plain * sign)
        )
    value = torch.add(primal_of(input), primal_of(other), alpha=alpha)
    # empty_like keeps the memory format, which only fits where nothing was broadcast
    same = x.shape[1:] == value.shape
    out = torch.empty_like(x, dtype=value.dtype) if same else value.new_empty((x.shape[0], *value.shape))
    out[0].copy_(value)
    out[1:].copy_(x[1:] if x is left or alpha == 1 else x[1:] * alpha)  # broadcasts
    return DualTensor(out)


@rule("Tensor.add_ Tensor.__iadd__")
def _add_in_place(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    if not isinstance(input, DualTensor) or any_dual(alpha) or ndim_of(other) > ndim_of(input):
        return NotImplemented
    if isinstance(other, DualTensor):
        input.buffer.add_(operands(input, other)[1], alpha=alpha)
    else:
        shifted(input.buffer, other if alpha == 1 else other * alpha)
    return input


@rule("sub subtract Tensor.__sub__")
def _sub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return NotImplemented if isinstance(other, bool) else _add(input, other, alpha=-alpha)


@rule("Tensor.sub_ Tensor.subtract_ Tensor.__isub__")
def _sub_in_place(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return NotImplemented if isinstance(other, bool) else _add_in_place(input, other, alpha=-alpha)


@rule("rsub Tensor.__rsub__")
def _rsub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return NotImplemented if isinstance(other, bool) else _add(other, input, alpha=-alpha)


@rule("mul multiply Tensor.__mul__ Tensor.__rmul__")
def _mul(input: Any, other: Any) -> Any:
    # (ab)' = a'b + ab'
    left, right = operands(input, other)
    if isinstance(input, DualTensor) and isinstance(other, DualTensor):
        out = left * right[0]
        out[1:].addcmul_(right[1:], left[0])
        return DualTensor(out)
    return DualTensor(left * right)


@rule("Tensor.mul_ Tensor.multiply_ Tensor.__imul__")
def _mul_in_place(input: Any, other: Any) -> Any:
    if not isinstance(input, DualTensor) or ndim_of(other) > ndim_of(input):
        return NotImplemented
    if followed():
        return in_place_of(_mul)(input, other)
    if not isinstance(other, DualTensor):
        input.buffer.mul_(other)
        return input
    if torch._C._is_alias_of(input.buffer, other.buffer):  # type: ignore[attr-defined]
        return in_place_of(_mul)(input, other)
    right = operands(input, other)[1]
    input.tangents.mul_(right[0]).addcmul_(right[1:], input.primal)
    input.primal.mul_(right[0])
    return input


@rule(
    "div divide true_divide Tensor.__truediv__ Tensor.__div__",
    in_place="Tensor.div_ Tensor.divide_ Tensor.true_divide_ Tensor.__itruediv__ Tensor.__idiv__",
)
def _div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    # (a/b)' = (a' - (a/b) b') / b, in this order: a'/b and its counterpart overflow where b is small
    if rounding_mode is not None:
        return NotImplemented
    left, right = operands(input, other)
    if not isinstance(other, DualTensor):
        return DualTensor(left / right)
    if not isinstance(input, DualTensor):
        value = left / right[0]
        return joined(value, right[1:] * (-value / right[0]))
    value = left[0] / right[0]
    tangents = torch.addcmul(left[1:], right[1:], value, value=-1).div_(right[0])
    return joined(value, tangents)


register(lambda input, other: _div(other, input), "Tensor.__rtruediv__ Tensor.__rdiv__")


rule("neg negative Tensor.__neg__", in_place="neg_ negative_")(lambda input: DualTensor(-input.buffer))
register(lambda input: input, "positive Tensor.__pos__")


@rule("pow Tensor.__pow__", in_place="Tensor.pow_ Tensor.__ipow__")
def _pow(input: Any, exponent: Any) -> Any:
    # (p^c)' = c p^(c-1);  (b^p)' = b^p log b;  of two duals  (p^q)' = p^q (q' log p + q p'/p)  is left to the fallback
    if isinstance(input, DualTensor) and isinstance(exponent, (int, float)) and exponent != 0:
        return pushed(input, lambda p: (p.pow(exponent), p.pow(exponent - 1).mul_(exponent)))
    constant = isinstance(exponent, Tensor) and not (isinstance(exponent, DualTensor) or exponent.requires_grad)
    if isinstance(input, DualTensor) and constant and not exponent.is_complex():
        # torch's own derivative of this has the gradient NaN below 0
        return pushed(
            input, lambda p: (p.pow(exponent), (p.pow(exponent - 1) * exponent).masked_fill(exponent == 0, 0))
        )
    if isinstance(exponent, DualTensor) and isinstance(input, (int, float)) and input > 0:
        return pushed(exponent, lambda p: ((value := torch.pow(input, p)), value * math.log(input)))
    return NotImplemented


register(lambda input, exponent: _pow(exponent, input), "Tensor.__rpow__")


@rule_of_each("maximum minimum")
def _extremum(choose: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    # y' is that of the operand chosen; where both are equal, torch takes the mean
    def push(input: Any, other: Any) -> Any:
        if not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return NotImplemented
        left, right = operands(input, other)
        a, b = (v[0] if isinstance(o, DualTensor) else v for v, o in ((left, input), (right, other)))
        value = choose(a, b)
        ties = (a == b).to(value.dtype) / 2
        from_left = torch.where(a == b, ties, (value == a).to(value.dtype))
        tangents: Any = 0
        if isinstance(input, DualTensor):
            tangents = left[1:] * from_left
        if isinstance(other, DualTensor):
            tangents = tangents + right[1:] * (1 - from_left)
        return joined(value, tangents)

    return push


# ------------------------------------------------------------------------------------- by the rules of their own parts


rule("addcmul", in_place="addcmul_")(lambda input, tensor1, tensor2, *, value=1: input + tensor1 * tensor2 * value)
rule("addcdiv", in_place="addcdiv_")(lambda input, tensor1, tensor2, *, value=1: input + tensor1 / tensor2 * value)
rule("lerp", in_place="lerp_")(lambda input, end, weight: input + (end - input) * weight)


# ------------------------------------------------------------------------------------------------------------- choices


@rule("where")
def _where(condition: Any, input: Any = None, other: Any = None) -> Any:
    # y' is that of the branch taken; a plain branch has none
    if input is None or isinstance(condition, DualTensor) or not any_dual(input, other):
        return NotImplemented
    value: Any = torch.where(condition, primal_of(input), primal_of(other))
    zero = value.new_zeros(())
    rows = [aligned(b, value.ndim)[1:] if isinstance(b, DualTensor) else zero for b in (input, other)]
    tangents: Any = torch.where(condition, *rows)
    return joined(value, tangents.expand(-1, *value.shape))


register(lambda input, condition, other: _where(condition, input, other), "Tensor.where")


@rule_of_each("masked_fill Tensor.masked_fill_")
def _masked_fill(op: Any) -> Rule:
    # row 0 takes the value where the mask is, the tangents 0
    def push(input: Any, mask: Tensor, value: Any) -> Any:
        if not isinstance(input, DualTensor) or isinstance(value, DualTensor) or mask.ndim > ndim_of(input):
            return NotImplemented
        out = op(input.buffer, mask, 0)
        out[0].masked_fill_(mask, value)
        return input if out is input.buffer else DualTensor(out)

    return push


# torch.cond runs one of two functions, in a form that torch cannot differentiate forward
register(lambda pred, chosen, other, operands: (chosen if pred else other)(*operands), "higher_order.cond")


# -------------------------------------------------------------------------------------- smooth functions of two numbers

#: names → (∂f/∂a, ∂f/∂b) at a, b with y = f(a, b)
PARTIALS: dict[str, Callable[..., tuple[Any, Any]]] = {
    # through hypot: a² + b² overflows where the slope does not
    "atan2 arctan2": lambda a, b, y: (b / (r := torch.hypot(a, b)) / r, -a / r / r),
    "hypot": lambda a, b, y: (a / y, b / y),
    "logaddexp": lambda a, b, y: ((a - y).exp(), (b - y).exp()),
    "logaddexp2": lambda a, b, y: ((a - y).exp2(), (b - y).exp2()),
    "remainder Tensor.__mod__": lambda a, b, y: (1, -(a / b).floor()),
    "fmod": lambda a, b, y: (1, -(a / b).trunc()),
    "copysign": lambda a, b, y: ((y / a).masked_fill(a == 0, 0), 0),
    "nextafter": lambda a, b, y: (1, 0),
}


def smooth_binary(op: Any, partials: Callable[..., tuple[Any, Any]]) -> Rule:
    """The rule of a function of two numbers, from both partial derivatives at a, b with y = f(a, b)."""

    def push(input: Any, other: Any) -> Any:
        # y' = ∂f/∂a a' + ∂f/∂b b'
        value = op(primal_of(input), primal_of(other))
        if followed():
            refuse_no_gradient(op, value, primal_of(input), primal_of(other))
        slopes = partials(primal_of(input), primal_of(other), value)
        tangents: Any = 0
        for x, operand, slope in zip((input, other), operands(input, other), slopes, strict=True):
            if isinstance(x, DualTensor):
                tangents = tangents + operand[1:] * slope
        return joined(value, tangents.expand(-1, *value.shape))

    return push


for _names, _partials in PARTIALS.items():
    rule_of_each(_names)(functools.partial(smooth_binary, partials=_partials))
    for _op in ops_named(_names):
        register(in_place_of(RULES[_op]), f"Tensor.{_op.__name__}_")
