"""Elementwise functions: f and f' once, on row 0 alone, and one multiplication for all tangents: y' = f'(p) t."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from torchgeom_probe.dual.graph import Pushed, refuse_no_gradient
from torchgeom_probe.dual.ops import inplace_at, ops_named
from torchgeom_probe.dual.passes import followed
from torchgeom_probe.dual.registry import any_dual, register, rule, rule_of_each
from torchgeom_probe.dual.tensor import RULES, DualTensor, Rule
from torchgeom_probe.shapes import Tensor

aten = torch.ops.aten


def pushed(
    x: DualTensor, function: Callable[[Tensor], tuple[Tensor, Tensor]], *, writes: bool = False, op: Any = None
) -> Any:
    """Value in row 0, slope times the tangents in the others, from ``function(p) -> (value, slope)``."""
    b = x.buffer
    if followed():
        b = b.clone() if writes else b
        with torch.enable_grad():
            p = b[0].detach().requires_grad_()
            at_p = p, *function(p)
        if at_p[1].shape != p.shape:
            return NotImplemented
        refuse_no_gradient(op, at_p[1], p)
        if writes:
            x.buffer.copy_(Pushed.apply(b, at_p))
            return x
        return DualTensor(Pushed.apply(b, at_p))
    value, slope = function(b[0])
    if value.shape != b.shape[1:]:  # clamp with a larger bound
        return NotImplemented
    if writes:
        b[1:].mul_(slope)
        b[0].copy_(value)
        return x
    out = torch.empty_like(b, dtype=value.dtype)
    torch.mul(b[1:], slope, out=out[1:])
    out[0].copy_(value)
    return DualTensor(out)


def _one(p: Tensor) -> Tensor:
    return p.new_ones(()).expand_as(p)  # no memory: torch's own backward kernels of f turn it into f'


def _silu_slope(p: Tensor) -> Tensor:
    return torch.sigmoid(p) * (1 + p * torch.sigmoid(-p))


def _mish_slope(p: Tensor) -> Tensor:
    t = torch.tanh(torch.nn.functional.softplus(p))
    return t + p * torch.sigmoid(p) * (1 - t * t)


def _sinc_slope(p: Tensor) -> Tensor:
    """−π j₁(πp); by its series near 0, where (cos v − sin v / v) / v cancels and torch's own slope has slope nan."""
    v = math.pi * p
    near = v.abs() < 0.25
    far = torch.where(near, 1.0, v)
    s = v * v
    series = -v / 3 * (1 - s / 10 * (1 - s / 28 * (1 - s / 54 * (1 - s / 88))))
    return math.pi * torch.where(near, series, (far.cos() - far.sin() / far) / far)


#: name → f'(p, y, *args) with y = f(p).  The in-place forms (``name_`` and ``inplace=True``) come with the name.
SLOPES: dict[str, Callable[..., Tensor]] = {
    # Not y (1 - y), not 1 - y²: they cancel where the unit saturates, and leave no digit of a small slope.
    "sigmoid": lambda p, y: y * torch.sigmoid(-p),
    "expit": lambda p, y: y * torch.sigmoid(-p),
    "tanh": lambda p, y: 4 * torch.sigmoid(2 * p) * torch.sigmoid(-2 * p),
    "exp": lambda p, y: y,
    "log": lambda p, y: p.reciprocal(),
    "sqrt": lambda p, y: 0.5 / y,
    "rsqrt": lambda p, y: -0.5 * y / p,
    "square": lambda p, y: 2 * p,
    "reciprocal": lambda p, y: -y * y,
    "sin": lambda p, y: p.cos(),
    "cos": lambda p, y: -p.sin(),
    "sinc": lambda p, y: _sinc_slope(p),
    "abs": lambda p, y: p.sign(),
    "absolute": lambda p, y: p.sign(),
    "Tensor.__abs__": lambda p, y: p.sign(),
    "erf": lambda p, y: 2 / math.sqrt(math.pi) * (-p * p).exp(),
    "gelu": lambda p, y, approximate="none": aten.gelu_backward(_one(p), p, approximate=approximate),
    # torch's kernels of these have no derivative in turn
    "silu": lambda p, y: aten.silu_backward(_one(p), p) if not p.requires_grad else _silu_slope(p),
    "mish": lambda p, y: aten.mish_backward(_one(p), p) if not p.requires_grad else _mish_slope(p),
    "softplus": lambda p, y, beta=1, threshold=20: aten.softplus_backward(_one(p), p, beta, threshold),
    "hardswish": lambda p, y: aten.hardswish_backward(_one(p), p),
    "hardsigmoid": lambda p, y: aten.hardsigmoid_backward(_one(p), p.detach()),
    "relu6": lambda p, y: aten.hardtanh_backward(_one(p), p, 0, 6),
    "leaky_relu": lambda p, y, negative_slope=0.01: aten.leaky_relu_backward(_one(p), p, negative_slope, False),
}

#: Elementwise without a formula of its own: f and f' together from one jvp with the tangent 1.
BY_ONE_JVP = (
    "elu celu selu hardtanh softsign logsigmoid hardshrink softshrink tanhshrink threshold expm1 exp2 log2 log10 log1p"
    " sinh cosh asin acos atan asinh acosh atanh arcsin arccos arctan arcsinh arccosh arctanh tan erfc erfinv"
    " lgamma digamma logit nan_to_num clamp clamp_min clamp_max clip frac deg2rad rad2deg ndtr ndtri log_ndtr i0 i0e i1"
    " i1e erfcx entr rrelu mvlgamma float_power gammaln psi"
).split()


def _elementwise(op: Any, formula: Callable[..., Tensor] | None, *, writes: bool) -> Rule:
    place = inplace_at(op)

    def push(input: Any, *args: Any, inplace: bool = False, **kwargs: Any) -> Any:
        if not isinstance(input, DualTensor) or any_dual(*args, *kwargs.values()):
            return NotImplemented
        if place is not None and len(args) >= place:
            inplace, args = args[place - 1], args[: place - 1]
        if input.buffer.is_complex():  # these are derivatives along the real axis
            if "silu" not in op.__name__:
                return NotImplemented
            out = input * torch.sigmoid(input)  # torch's own derivative takes the conjugate slope
            return input.copy_(out) if inplace or writes else out
        if followed() and any(getattr(a, "requires_grad", False) for a in (*args, *kwargs.values())):
            return NotImplemented  # a bound that is learned

        def function(p: Tensor) -> tuple[Tensor, Tensor]:
            if formula is None:
                return torch.func.jvp(lambda q: op(q, *args, **kwargs), (p,), (torch.ones_like(p),))[:2]
            value = op(p, *args, **kwargs)
            return value, formula(p, value, *args, **kwargs)

        try:
            return pushed(input, function, writes=inplace or writes, op=op)
        except NotImplementedError:  # no forward derivative in this type
            return NotImplemented

    return push


def register_slope(name: str, formula: Callable[..., Tensor] | None) -> None:
    """Register an elementwise function, in place too, by its f'(p, y, *args); without one f' comes from a jvp."""
    for op in ops_named(name):
        RULES[op] = _elementwise(op, formula, writes=False)
        register(_elementwise(op, formula, writes=True), f"{name}_")


for _name in [*SLOPES, *BY_ONE_JVP]:
    register_slope(_name, SLOPES.get(_name))


@rule("relu")
def _relu(input: DualTensor, inplace: bool = False) -> DualTensor:
    # f' = [p > 0]: torch's own masking kernel on all rows at once; row 0 becomes p [p > 0] = relu(p)
    if inplace:
        return _relu_in_place(input)
    return DualTensor(aten.threshold_backward(input.buffer, input.primal.detach().expand_as(input.buffer), 0))


@rule("relu_")
def _relu_in_place(input: DualTensor) -> DualTensor:
    if followed():
        input.buffer.mul_(input.primal.detach() > 0)
        return input
    t, p = input.tangents, input.primal
    aten.threshold_backward.grad_input(t, p.expand_as(t), 0, grad_input=t)
    p.relu_()
    return input


@rule("prelu")
def _prelu(input: Any, weight: Any) -> Any:
    # y = s p with s = 1 where p > 0, the channel's weight elsewhere: every row times s
    if not isinstance(input, DualTensor) or isinstance(weight, DualTensor):
        return NotImplemented
    p = input.primal
    shape = [1] * p.ndim
    if p.ndim >= 2:
        shape[1] = -1
    elif weight.numel() > 1:
        return NotImplemented
    return DualTensor(input.buffer * torch.where(p > 0, 1.0, weight.reshape(shape)).to(p.dtype))


@rule("glu")
def _glu(input: DualTensor, dim: int = -1) -> Any:
    # glu(a, b) = a σ(b), by the rules of its parts
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


#: what a dropped unit of alpha dropout becomes, negative: SELU's α λ
_SELU = 1.7580993408473766


@rule_of_each(
    "dropout dropout_ dropout1d dropout2d dropout3d feature_dropout feature_dropout_ alpha_dropout alpha_dropout_"
    " feature_alpha_dropout feature_alpha_dropout_"
)
def _dropout(op: Any) -> Rule:
    name = op.__name__
    drop, writes = (getattr(torch, name[:-1]), True) if name.endswith("_") else (op, False)

    def push(
        input: DualTensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, train: bool = True
    ) -> Any:
        # affine in the input once the mask is drawn, which is one for all rows, drawn as a plain pass draws it
        if not (training and train) or p == 0:
            return input
        if input.buffer.is_complex():
            return NotImplemented

        def function(q: Tensor) -> tuple[Tensor, Tensor]:
            if "alpha" not in name:
                slope = drop(torch.ones_like(q), p, True)
                return q * slope, slope
            shift = drop(torch.zeros_like(q), p, True)  # above 0 where it is kept (Klambauer et al., arXiv:1706.02515)
            slope = (shift > 0).to(q.dtype) / math.sqrt((_SELU * _SELU * p + 1) * (1 - p) or 1)
            return q * slope + shift, slope

        return pushed(input, function, writes=writes or inplace)

    return push
