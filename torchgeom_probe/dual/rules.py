"""The fused rules: op → what it does to a whole buffer ``[1 + k, *shape]`` at once.

A rule is called with the op's own arguments, at least one of them a DualTensor, and returns NotImplemented for what it does not
cover: the op then takes the per-op fallback, which is right for everything.  So each rule only buys speed.

Legend: R = 1 + k rows; ``p`` the primal (row 0), ``t`` the tangents (rows 1 … k), ``f'`` the derivative at p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from torchgeom_probe.dual.tensor import CONSTANT, CUTS, ESCAPES, METADATA, RULES, DualTensor
from torchgeom_probe.errors import EngineRefusal
from torchgeom_probe.shapes import Tensor

_NAMESPACES = (torch, torch.Tensor, F, torch._C._nn, torch.special, torch.linalg)
aten = torch.ops.aten


def _named(*names: str) -> list[Any]:
    """Every callable of torch that goes by one of these names; a leading ``Tensor.`` keeps to that class."""
    found = []
    for name in names:
        spaces: Sequence[Any] = _NAMESPACES
        if name.startswith("Tensor."):
            spaces, name = (torch.Tensor,), name.removeprefix("Tensor.")
        found += [getattr(space, name) for space in spaces if callable(getattr(space, name, None))]
    return found


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter the decorated function in the table under every op of these names."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for op in _named(*names):
            RULES[op] = function
        return function

    return enter


# ---------------------------------------------------------------------------------------------- shapes and alignment


def _aligned(x: DualTensor, ndim: int) -> Tensor:
    """The buffer with axes of size 1 put in behind the rows, so that it broadcasts against ``ndim`` primal axes."""
    missing = ndim - (x.buffer.ndim - 1)
    return x.buffer if missing <= 0 else x.buffer.reshape(x.buffer.shape[0], *[1] * missing, *x.buffer.shape[1:])


def _ndim(a: Any) -> int:
    return a.buffer.ndim - 1 if isinstance(a, DualTensor) else a.ndim if isinstance(a, Tensor) else 0


def _primal(a: Any) -> Any:
    return a.buffer[0] if isinstance(a, DualTensor) else a


def _at(dim: int) -> int:
    """The place of a primal axis in the buffer; negative axes count from the end in both."""
    return dim + 1 if dim >= 0 else dim


def _dims(dim: Any) -> list[int]:
    return [_at(d) for d in ((dim,) if isinstance(dim, int) else dim)]


def _sizes(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and isinstance(size[0], (tuple, list)) else size


def _written(x: DualTensor, value: Tensor, tangents: Tensor) -> DualTensor:
    """The in-place form's end: the result goes into the operand's own memory, where its views see it."""
    x.buffer[1:].copy_(tangents)
    x.buffer[0].copy_(value)
    return x


# ------------------------------------------------------------------------------ elementwise: f' once, on row 0 alone


def _pushed(x: DualTensor, value: Tensor, slope: Tensor, inplace: bool) -> DualTensor:
    b = x.buffer
    if inplace:
        b[1:].mul_(slope)
        b[0].copy_(value)
        return x
    out = torch.empty_like(b, dtype=value.dtype)
    torch.mul(b[1:], slope, out=out[1:])
    out[0].copy_(value)
    return DualTensor(out)


def _backward_slope(backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """f' from torch's own backward kernel of f: one pass, vectorised, exact."""
    return lambda p, *args, **kwargs: backward(torch.ones_like(p), p, *args, **kwargs)


#: name → (f, f'(p, y, *args)) with y = f(p); in-place forms (``name_`` and ``inplace=True``) come with the name.
_SLOPES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": lambda p, y: y * (1 - y),
    "tanh": lambda p, y: 1 - y * y,
    "exp": lambda p, y: y,
    "log": lambda p, y: p.reciprocal(),
    "sqrt": lambda p, y: 0.5 / y,
    "rsqrt": lambda p, y: -0.5 * y / p,
    "square": lambda p, y: 2 * p,
    "reciprocal": lambda p, y: -y * y,
    "sin": lambda p, y: p.cos(),
    "cos": lambda p, y: -p.sin(),
    "abs": lambda p, y: p.sign(),
    "erf": lambda p, y: 2 / math.sqrt(math.pi) * (-p * p).exp(),
    "gelu": lambda p, y, approximate="none": aten.gelu_backward(torch.ones_like(p), p, approximate=approximate),
    "silu": lambda p, y: aten.silu_backward(torch.ones_like(p), p),
    "mish": lambda p, y: aten.mish_backward(torch.ones_like(p), p),
    "softplus": lambda p, y, beta=1, threshold=20: aten.softplus_backward(torch.ones_like(p), p, beta, threshold),
    "hardswish": lambda p, y: aten.hardswish_backward(torch.ones_like(p), p),
    "hardsigmoid": lambda p, y: aten.hardsigmoid_backward(torch.ones_like(p), p),
    "relu6": lambda p, y: ((p > 0) & (p < 6)).to(p.dtype),
    "leaky_relu": lambda p, y, negative_slope=0.01: torch.where(p > 0, 1.0, negative_slope).to(p.dtype),
}

#: Elementwise without a formula of its own: f and f' together from one jvp with the tangent 1.
_BY_ONE_JVP = (
    "elu celu selu hardtanh softsign logsigmoid hardshrink softshrink tanhshrink threshold expm1 exp2 log2 log10 log1p sinh cosh"
    " asin acos atan asinh acosh atanh tan erfc erfinv sinc lgamma digamma logit nan_to_num clamp clamp_min clamp_max clip frac"
    " deg2rad rad2deg ndtr log_ndtr i0 i0e positive rrelu"
).split()


def _enter_elementwise() -> None:
    for name in [*_SLOPES, *_BY_ONE_JVP]:
        for op in _named(name):
            RULES[op] = _elementwise(name, op, writes=False)
            for twin in _named(name + "_"):
                RULES[twin] = _elementwise(name, op, writes=True)


def _elementwise(name: str, op: Any, *, writes: bool) -> Callable[..., Any]:
    formula = _SLOPES.get(name)

    def push(x: Any, *args: Any, inplace: bool = False, **kwargs: Any) -> Any:
        if not isinstance(x, DualTensor) or any(isinstance(a, DualTensor) for a in (*args, *kwargs.values())):
            return NotImplemented
        if name == "rrelu" and (kwargs.get("training") or (len(args) > 2 and args[2])):
            return NotImplemented  # a random slope per element: the fallback draws it once for all tangents
        p = x.primal
        if formula is None:
            value, slope = torch.func.jvp(lambda q: op(q, *args, **kwargs), (p,), (torch.ones_like(p),))
            if value.shape != p.shape:  # clamp with a larger bound
                return NotImplemented
        else:
            value = op(p, *args, **kwargs)
            slope = formula(p, value, *args, **kwargs)
        return _pushed(x, value, slope, inplace or writes)

    return push


_enter_elementwise()


@rule("relu", "relu_")
def _relu(x: DualTensor, inplace: bool = False) -> DualTensor:
    # f' = [p > 0]: torch's own masking kernel on all rows at once; row 0 becomes p [p > 0] = relu(p).
    return DualTensor(aten.threshold_backward(x.buffer, x.primal.expand_as(x.buffer), 0))


def _relu_in_place(x: DualTensor) -> DualTensor:
    x.buffer[1:].mul_(x.primal > 0)
    x.buffer[0].relu_()
    return x


for _op in _named("relu_"):
    RULES[_op] = _relu_in_place
RULES[F.relu] = lambda x, inplace=False: _relu_in_place(x) if inplace else _relu(x)


@rule("neg", "negative", "Tensor.__neg__")
def _neg(x: DualTensor) -> DualTensor:
    return DualTensor(-x.buffer)


@rule("pow", "Tensor.__pow__")
def _pow(x: Any, exponent: Any) -> Any:
    # (p^c)' = c p^(c-1)
    if not isinstance(x, DualTensor) or not isinstance(exponent, (int, float)):
        return NotImplemented
    if exponent == 0:
        return NotImplemented
    p = x.primal
    return _pushed(x, p.pow(exponent), exponent * p.pow(exponent - 1), False)


@rule("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def _dropout(x: DualTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return NotImplemented if training else x


# ---------------------------------------------------------------------------- arithmetic: linear, product, quotient


def _plain_dtype_wins(x: DualTensor, other: Any) -> bool:
    """Whether the plain operand is of a wider type than the buffer: then the op is not in-place safe."""
    return isinstance(other, Tensor) and torch.result_type(x.primal, other) != x.buffer.dtype


def _sum_of(a: Any, b: Any, alpha: Any = 1, *, writes: bool = False) -> Any:
    # (a + αb)' = a' + αb'; a plain operand is added to row 0 alone
    if isinstance(alpha, Tensor):
        return NotImplemented
    ndim = max(_ndim(a), _ndim(b))
    if isinstance(a, DualTensor) and isinstance(b, DualTensor):
        left, right = _aligned(a, ndim), _aligned(b, ndim)
        if writes:
            a.buffer.add_(right, alpha=alpha)
            return a
        return DualTensor(torch.add(left, right, alpha=alpha))
    if writes:
        if not isinstance(a, DualTensor):
            return NotImplemented
        a.buffer[0].add_(b, alpha=alpha)
        return a
    x, plain = (a, b) if isinstance(a, DualTensor) else (b, a)
    buffer = _aligned(x, ndim)
    value = torch.add(_primal(a), _primal(b), alpha=alpha)
    tangents = buffer[1:] * alpha if (x is b and alpha != 1) else buffer[1:]
    out = torch.empty((buffer.shape[0], *value.shape), dtype=value.dtype, device=value.device)
    if buffer.shape[1:] == value.shape:
        out = torch.empty_like(buffer, dtype=value.dtype)  # keeps the memory format
    out[0].copy_(value)
    out[1:].copy_(tangents)  # broadcasts
    return DualTensor(out)


@rule("add", "Tensor.__add__", "Tensor.__radd__")
def _add(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return _sum_of(a, b, alpha)


@rule("Tensor.add_", "Tensor.__iadd__")
def _add_in_place(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return _sum_of(a, b, alpha, writes=True)


@rule("sub", "subtract", "Tensor.__sub__")
def _sub(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return _sum_of(a, b, -alpha) if isinstance(b, (Tensor, int, float)) and not isinstance(b, bool) else NotImplemented


@rule("Tensor.sub_", "Tensor.__isub__")
def _sub_in_place(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return _sum_of(a, b, -alpha, writes=True)


@rule("rsub", "Tensor.__rsub__")
def _rsub(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return _sum_of(b, a, -alpha)


@rule("mul", "multiply", "Tensor.__mul__", "Tensor.__rmul__")
def _mul(a: Any, b: Any) -> Any:
    # (ab)' = a'b + ab'
    ndim = max(_ndim(a), _ndim(b))
    if isinstance(a, DualTensor) and isinstance(b, DualTensor):
        left, right = _aligned(a, ndim), _aligned(b, ndim)
        out = left * right[0]
        out[1:].addcmul_(right[1:], left[0])
        return DualTensor(out)
    x, plain = (a, b) if isinstance(a, DualTensor) else (b, a)
    if isinstance(plain, complex):
        return NotImplemented
    return DualTensor(_aligned(x, ndim) * plain)


@rule("Tensor.mul_", "Tensor.__imul__")
def _mul_in_place(a: Any, b: Any) -> Any:
    if not isinstance(a, DualTensor):
        return NotImplemented
    if isinstance(b, DualTensor):
        out = _mul(a, b).buffer
        return _written(a, out[0], out[1:])
    a.buffer.mul_(b)
    return a


@rule("div", "divide", "true_divide", "Tensor.__truediv__")
def _div(a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    # (a/b)' = (a' - (a/b) b') / b
    if rounding_mode is not None:
        return NotImplemented
    if not isinstance(b, DualTensor):
        return DualTensor(_aligned(a, max(_ndim(a), _ndim(b))) / b)
    ndim = max(_ndim(a), _ndim(b))
    below = _aligned(b, ndim)
    value = _primal(a) / below[0].reshape(b.buffer.shape[1:]) if not isinstance(a, DualTensor) else None
    if isinstance(a, DualTensor):
        above = _aligned(a, ndim)
        out = above / below[0]
        out[1:].sub_(below[1:] * (out[0] / below[0]))
        return DualTensor(out)
    assert value is not None
    return DualTensor(torch.cat([value[None], below[1:] * (-value / below[0])]))


@rule("Tensor.__rtruediv__", "Tensor.__rdiv__")
def _rdiv(a: Any, b: Any) -> Any:
    return _div(b, a)


@rule("Tensor.div_", "Tensor.__itruediv__")
def _div_in_place(a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    if not isinstance(a, DualTensor) or rounding_mode is not None:
        return NotImplemented
    if isinstance(b, DualTensor):
        out = _div(a, b).buffer
        return _written(a, out[0], out[1:])
    a.buffer.div_(b)
    return a


# ---------------------------------------------------------------------------------- products with weights, attention


@rule("linear")
def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    # (Wx + b)' = Wx'
    if isinstance(weight, DualTensor) or isinstance(bias, DualTensor):
        return NotImplemented
    out = F.linear(x.buffer, weight)
    if bias is not None:
        out[0].add_(bias)
    return DualTensor(out)


def _product(a: Any, b: Any, product: Callable[[Tensor, Tensor], Tensor]) -> DualTensor:
    # (a b)' = a'b + ab', batched over the rows by broadcasting
    ndim = max(_ndim(a), _ndim(b))
    left = _aligned(a, ndim) if isinstance(a, DualTensor) else a
    right = _aligned(b, ndim) if isinstance(b, DualTensor) else b
    if isinstance(a, DualTensor) and isinstance(b, DualTensor):
        out = product(left, right[0])
        out[1:].add_(product(left[0], right[1:]))
        return DualTensor(out)
    return DualTensor(product(left, right))


@rule("matmul", "Tensor.__matmul__", "bmm", "mm")
def _matmul(a: Any, b: Any) -> Any:
    if min(_ndim(a), _ndim(b)) < 2:
        return NotImplemented
    return _product(a, b, torch.matmul)


@rule("Tensor.__rmatmul__")
def _rmatmul(a: Any, b: Any) -> Any:
    return _matmul(b, a)


@rule("einsum")
def _einsum(equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return NotImplemented
    a, b = operands

    def rows_of(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.func.vmap(f)(x)

    # (a b)' = a'b + ab'
    if isinstance(a, DualTensor):
        right = _primal(b)
        out = rows_of(lambda r: torch.einsum(equation, r, right), a.buffer)
        if isinstance(b, DualTensor):
            out[1:].add_(rows_of(lambda r: torch.einsum(equation, a.primal, r), b.tangents))
        return DualTensor(out)
    return DualTensor(rows_of(lambda r: torch.einsum(equation, a, r), b.buffer))


def _softmax_rows(buffer: Tensor, dim: int) -> Tensor:
    # y = softmax(p);  y' = y (t - Σ y t)
    y = torch.softmax(buffer[0], dim)
    out = torch.empty_like(buffer)
    out[0].copy_(y)
    weighted = torch.mul(buffer[1:], y, out=out[1:])
    weighted.addcmul_(weighted.sum(dim, keepdim=True), y, value=-1)
    return out


@rule("softmax")
def _softmax(x: DualTensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if dim is None or x.buffer.ndim == 1:
        return NotImplemented
    if dim >= 0:
        dim -= x.buffer.ndim - 1  # negative: the same axis in the primal and in the buffer
    return DualTensor(_softmax_rows(x.buffer if dtype is None else x.buffer.to(dtype), dim))


@rule("log_softmax")
def _log_softmax(x: DualTensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    # y = log softmax(p);  y' = t - Σ e^y t
    if dim is None or x.buffer.ndim == 1:
        return NotImplemented
    if dim >= 0:
        dim -= x.buffer.ndim - 1
    b = x.buffer if dtype is None else x.buffer.to(dtype)
    y = torch.log_softmax(b[0], dim)
    out = torch.empty_like(b)
    torch.sub(b[1:], (b[1:] * y.exp()).sum(dim, keepdim=True), out=out[1:])
    out[0].copy_(y)
    return DualTensor(out)


@rule("scaled_dot_product_attention")
def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    # o = softmax(s q kᵀ + mask) v, by the product rule and the softmax rule
    if isinstance(attn_mask, DualTensor) or enable_gqa or dropout_p or _ndim(query) < 2:
        return NotImplemented
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores: Any = _product(_times(query, factor), _transposed(key), torch.matmul) if _any_dual(query, key) else None
    if scores is None:
        return NotImplemented  # attention weights that do not depend on the input
    mask = attn_mask
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.buffer.device).tril()
    buffer = scores.buffer
    if mask is not None:
        if mask.ndim > buffer.ndim - 1:
            return NotImplemented
        if mask.dtype == torch.bool:
            buffer[0].masked_fill_(~mask, float("-inf"))
        else:
            buffer[0].add_(mask)
    return _product(DualTensor(_softmax_rows(buffer, -1)), value, torch.matmul)


def _any_dual(*tensors: Any) -> bool:
    return any(isinstance(t, DualTensor) for t in tensors)


def _times(x: Any, factor: float) -> Any:
    return DualTensor(x.buffer * factor) if isinstance(x, DualTensor) else x * factor


def _transposed(x: Any) -> Any:
    return DualTensor(x.buffer.transpose(-2, -1)) if isinstance(x, DualTensor) else x.transpose(-2, -1)


# ------------------------------------------------------------ linear in the input, rows folded into the batch axis


def _folded(x: DualTensor, ndim: int, op: Callable[[Tensor], Tensor]) -> DualTensor:
    """Run a batched linear op once, over R·B rows; an input without a batch axis has the rows as its batch."""
    b = x.buffer
    if b.ndim == ndim:  # unbatched
        return DualTensor(op(b))
    rows = b.shape[0]
    return DualTensor(op(b.flatten(0, 1)).unflatten(0, (rows, -1)))


def _convolution(convolve: Any, spatial: int) -> Callable[..., Any]:
    def push(x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        # (w * x + b)' = w * x'
        if isinstance(weight, DualTensor) or isinstance(bias, DualTensor):
            return NotImplemented
        out = _folded(x, spatial + 2, lambda rows: convolve(rows, weight, None, *args, **kwargs))
        if bias is not None:
            out.buffer[0].add_(bias.reshape(-1, *[1] * spatial))
        return out

    return push


for _spatial in (1, 2, 3):
    for _stem in ("conv", "conv_transpose"):
        for _op in _named(f"{_stem}{_spatial}d"):
            RULES[_op] = _convolution(_op, _spatial)
    for _stem in ("avg_pool", "adaptive_avg_pool"):
        for _op in _named(f"{_stem}{_spatial}d"):
            RULES[_op] = lambda x, *args, _op=_op, _ndim=_spatial + 2, **kwargs: _folded(
                x, _ndim, lambda rows: _op(rows, *args, **kwargs)
            )

for _op in _named("unfold", "fold", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"):
    if _op is not torch.Tensor.unfold:
        RULES[_op] = lambda x, *args, _op=_op, **kwargs: (
            _folded(x, 4, lambda rows: _op(rows, *args, **kwargs)) if _ndim(x) >= 3 else NotImplemented
        )


@rule("interpolate")
def _interpolate(x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    if _ndim(x) < 3:
        return NotImplemented
    rows = x.buffer.shape[0]
    return DualTensor(F.interpolate(x.buffer.flatten(0, 1), *args, **kwargs).unflatten(0, (rows, -1)))


@rule("pad")
def _pad(x: DualTensor, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    if mode == "constant":
        if len(pad) > 2 * _ndim(x):
            return NotImplemented
        out = F.pad(x.buffer, pad)
        if value:
            out[0].copy_(F.pad(x.primal, pad, value=value))
        return DualTensor(out)
    if _ndim(x) < len(pad) // 2 + 2:
        return NotImplemented
    rows = x.buffer.shape[0]
    return DualTensor(F.pad(x.buffer.flatten(0, 1), pad, mode=mode).unflatten(0, (rows, -1)))


def _max_pooling(pool: Any, spatial: int) -> Callable[..., Any]:
    def push(x: DualTensor, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
        # y = p[argmax]; y' = t[argmax]: the primal's winners, gathered from the tangents
        if _ndim(x) != spatial + 2:
            return NotImplemented
        value, index = pool(x.primal, *args, return_indices=True, **kwargs)
        rows, start = x.buffer.shape[0], -spatial
        winners = index.flatten(start).expand(rows - 1, *index.flatten(start).shape)
        tangents = x.buffer[1:].flatten(start).gather(-1, winners).unflatten(-1, index.shape[start:])
        out = torch.empty((rows, *value.shape), dtype=value.dtype, device=value.device)
        if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous():
            out = out.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (rows, -1))
        out[0].copy_(value)
        out[1:].copy_(tangents)
        return (DualTensor(out), index) if return_indices else DualTensor(out)

    return push


for _spatial in (1, 2, 3):
    for _stem in ("max_pool", "adaptive_max_pool"):
        _op = getattr(F, f"{_stem}{_spatial}d")
        for _twin in _named(f"{_stem}{_spatial}d"):
            RULES[_twin] = _max_pooling(_op, _spatial)


# ------------------------------------------------------------------------------------------------------ normalisation


@rule("batch_norm")
def _batch_norm(
    x: DualTensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    # eval: y = s p + c with s = w / √(var + ε), c = b - s mean;  y' = s t
    if training or running_mean is None:
        raise EngineRefusal(
            "batch normalisation by the statistics of the batch couples the samples: no sample has a metric of its own.\n"
            "Measure in eval mode (mode='eval') with running statistics (track_running_stats=True)."
        )
    if _any_dual(running_mean, running_var, weight, bias):
        return NotImplemented
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    spread = (-1, *[1] * (_ndim(x) - 2))
    out = x.buffer * scale.reshape(spread).to(x.buffer.dtype)
    out[0].add_(shift.reshape(spread))
    return DualTensor(out)


def _standardised(buffer: Tensor, dims: list[int], eps: float) -> Tensor:
    # x̂ = (p - mean) r, r = 1/√(var + ε);  x̂' = r (c - x̂ mean(x̂ c)), c = t - mean t       (dims negative)
    variance, mean = torch.var_mean(buffer[0], dims, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + eps)
    hat = (buffer[0] - mean) * inverse
    out = torch.empty_like(buffer)
    out[0].copy_(hat)
    centred = torch.sub(buffer[1:], buffer[1:].mean(dims, keepdim=True), out=out[1:])
    centred.addcmul_((centred * hat).mean(dims, keepdim=True), hat, value=-1)
    centred.mul_(inverse)
    return out


@rule("layer_norm")
def _layer_norm(
    x: DualTensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    if _any_dual(weight, bias):
        return NotImplemented
    out = _standardised(x.buffer, [-1 - i for i in range(len(normalized_shape))], eps)
    if weight is not None:
        out.mul_(weight)
    if bias is not None:
        out[0].add_(bias)
    return DualTensor(out)


@rule("group_norm")
def _group_norm(
    x: DualTensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    if _any_dual(weight, bias) or _ndim(x) < 2:
        return NotImplemented
    b = x.buffer
    grouped = b.reshape(*b.shape[:2], num_groups, -1)
    out = _standardised(grouped, [-1], eps).reshape(b.shape)
    spread = (-1, *[1] * (b.ndim - 3))
    if weight is not None:
        out = out * weight.reshape(spread)
    if bias is not None:
        out[0].add_(bias.reshape(spread))
    return DualTensor(out)


@rule("instance_norm")
def _instance_norm(
    x: DualTensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    if not use_input_stats or _ndim(x) < 3 or running_mean is not None:
        return NotImplemented
    return _group_norm(x, x.shape[1], weight, bias, eps)


@rule("normalize")
def _normalize(x: DualTensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Any:
    # y = p / m, m = max(|p|, ε);  y' = (t - y m')/m, m' = Σ y t where |p| > ε
    if p != 2.0 or out is not None or not isinstance(dim, int):
        return NotImplemented
    axis = dim - _ndim(x) if dim >= 0 else dim
    length = torch.linalg.vector_norm(x.primal, dim=axis, keepdim=True)
    below = length.clamp_min(eps)
    result = x.buffer / below
    grows = (result[1:] * result[0]).sum(axis, keepdim=True) * (length > eps)
    result[1:].addcmul_(grows, result[0], value=-1)
    return DualTensor(result)


# --------------------------------------------------------------- views and copies: the same, one axis further right


@rule("Tensor.view", "reshape")
def _view(x: DualTensor, *size: Any, **kwargs: Any) -> Any:
    if kwargs:
        size = (kwargs["shape"] if "shape" in kwargs else kwargs.get("size"),)
    if isinstance(size[0], torch.dtype):
        return NotImplemented
    return DualTensor(x.buffer.reshape(x.buffer.shape[0], *_sizes(size)))


@rule("Tensor.view_as", "Tensor.reshape_as")
def _view_as(x: Any, other: Tensor) -> Any:
    return DualTensor(x.buffer.reshape(x.buffer.shape[0], *other.shape)) if isinstance(x, DualTensor) else NotImplemented


@rule("flatten")
def _flatten(x: DualTensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    return NotImplemented if _ndim(x) == 0 else DualTensor(x.buffer.flatten(_at(start_dim), _at(end_dim)))


@rule("unflatten")
def _unflatten(x: DualTensor, dim: int, sizes: Any) -> DualTensor:
    return DualTensor(x.buffer.unflatten(_at(dim), sizes))


@rule("permute")
def _permute(x: DualTensor, *dims: Any, **kwargs: Any) -> DualTensor:
    order = _sizes(dims) if dims else tuple(kwargs["dims"])
    return DualTensor(x.buffer.permute(0, *(d % _ndim(x) + 1 for d in order)))


@rule("transpose", "swapaxes", "swapdims")
def _transpose(x: DualTensor, dim0: Any, dim1: Any) -> Any:
    return NotImplemented if _ndim(x) < 2 else DualTensor(x.buffer.transpose(_at(dim0), _at(dim1)))


@rule("movedim", "moveaxis")
def _movedim(x: DualTensor, source: Any, destination: Any) -> DualTensor:
    return DualTensor(x.buffer.movedim(_dims(source), _dims(destination)))


@rule("t")
def _t(x: DualTensor) -> Any:
    return DualTensor(x.buffer.transpose(-2, -1)) if _ndim(x) == 2 else NotImplemented


RULES[torch.Tensor.mT.__get__] = lambda x: DualTensor(x.buffer.mT)
RULES[torch.Tensor.T.__get__] = _t


@rule("unsqueeze")
def _unsqueeze(x: DualTensor, dim: int) -> DualTensor:
    return DualTensor(x.buffer.unsqueeze(_at(dim)))


@rule("squeeze")
def _squeeze(x: DualTensor, dim: Any = None) -> Any:
    if dim is None:
        dim = [i for i, size in enumerate(x.buffer.shape[1:]) if size == 1]
    return DualTensor(x.buffer.squeeze(_dims(dim)) if _ndim(x) else x.buffer)


@rule("Tensor.expand", "broadcast_to")
def _expand(x: DualTensor, *size: Any) -> DualTensor:
    shape = _sizes(size)
    return DualTensor(_aligned(x, len(shape)).expand(x.buffer.shape[0], *shape))


@rule("Tensor.expand_as")
def _expand_as(x: Any, other: Tensor) -> Any:
    return _expand(x, *other.shape) if isinstance(x, DualTensor) else NotImplemented


@rule("Tensor.repeat", "tile")
def _repeat(x: DualTensor, *repeats: Any) -> DualTensor:
    times = _sizes(repeats)
    times = (1,) * (_ndim(x) - len(times)) + tuple(times)  # only tile() may be given fewer than there are axes
    return DualTensor(_aligned(x, len(times)).repeat(1, *times))


@rule("narrow")
def _narrow(x: DualTensor, dim: int, start: Any, length: int) -> DualTensor:
    return DualTensor(x.buffer.narrow(_at(dim), start, length))


@rule("select")
def _select(x: DualTensor, dim: int, index: int) -> DualTensor:
    return DualTensor(x.buffer.select(_at(dim), index))


@rule("index_select")
def _index_select(x: Any, dim: int, index: Tensor) -> Any:
    return DualTensor(x.buffer.index_select(_at(dim), index)) if _ndim(x) else NotImplemented


@rule("gather")
def _gather(x: Any, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    rows = x.buffer.shape[0]
    return DualTensor(x.buffer.gather(_at(dim), index.expand(rows, *index.shape))) if _ndim(x) else NotImplemented


def _pieces(op: Any) -> Callable[..., Any]:
    def push(x: DualTensor, arg: Any, dim: int = 0) -> tuple[DualTensor, ...]:
        return tuple(DualTensor(piece) for piece in op(x.buffer, arg, _at(dim)))

    return push


for _name in ("chunk", "split", "split_with_sizes", "tensor_split"):
    for _op in _named(_name):
        RULES[_op] = _pieces(_op)


@rule("unbind")
def _unbind(x: DualTensor, dim: int = 0) -> tuple[DualTensor, ...]:
    return tuple(DualTensor(piece) for piece in x.buffer.unbind(_at(dim)))


RULES[torch.Tensor.__iter__] = lambda x: iter(_unbind(x))


@rule("roll")
def _roll(x: DualTensor, shifts: Any, dims: Any = None) -> Any:
    return NotImplemented if dims is None or dims == () else DualTensor(x.buffer.roll(shifts, _dims(dims)))


@rule("flip")
def _flip(x: DualTensor, *dims: Any, **kwargs: Any) -> DualTensor:
    return DualTensor(x.buffer.flip(_dims(_sizes(dims) if dims else kwargs["dims"])))


def _with_rows(a: Any, rows: int, like: Tensor) -> Tensor:
    """A buffer for either kind of operand: a plain one gets zero tangents, which is what it has."""
    if isinstance(a, DualTensor):
        return a.buffer
    buffer = torch.zeros((rows, *a.shape), dtype=a.dtype, device=like.device)
    buffer[0].copy_(a)
    return buffer


def _joined(op: Any, at: Callable[[int], int]) -> Callable[..., Any]:
    def push(tensors: Any, dim: int = 0, **kwargs: Any) -> DualTensor:
        dim = kwargs.get("axis", dim)
        first = next(t for t in tensors if isinstance(t, DualTensor)).buffer
        return DualTensor(op([_with_rows(t, first.shape[0], first) for t in tensors], at(dim)))

    return push


for _op in _named("cat", "concat", "concatenate"):
    RULES[_op] = _joined(torch.cat, _at)
for _op in _named("stack"):
    RULES[_op] = _joined(torch.stack, _at)


def _index(index: Any) -> Any:
    """The same index behind a full slice of the rows; None where advanced indices would move axes about."""
    items = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, DualTensor) for i in items):
        return None
    if sum(isinstance(i, (Tensor, list)) or hasattr(i, "__array__") for i in items) > 1:
        return None
    if any(isinstance(i, bool) for i in items):
        return None
    return (slice(None), *items)


@rule("Tensor.__getitem__")
def _getitem(x: Any, index: Any) -> Any:
    if not isinstance(x, DualTensor):
        return NotImplemented
    behind = _index(index)
    return NotImplemented if behind is None else DualTensor(x.buffer[behind])


@rule("Tensor.__setitem__")
def _setitem(x: Any, index: Any, value: Any) -> Any:
    behind = _index(index)
    if not isinstance(x, DualTensor) or behind is None:
        return NotImplemented
    if isinstance(value, DualTensor):
        target = x.buffer[behind]
        x.buffer[behind] = _aligned(value, target.ndim - 1)
    else:
        x.buffer[behind] = 0
        x.buffer[0][behind[1:]] = value
    return None


@rule("Tensor.copy_")
def _copy(x: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(x, DualTensor):
        return NotImplemented
    if isinstance(source, DualTensor):
        x.buffer.copy_(_aligned(source, _ndim(x)))
    else:
        x.buffer[1:].zero_()
        x.buffer[0].copy_(source)
    return x


@rule("Tensor.zero_", "Tensor.fill_")
def _fill(x: DualTensor, value: Any = 0) -> Any:
    if isinstance(value, Tensor):
        return NotImplemented
    x.buffer[1:].zero_()
    x.buffer[0].fill_(value)
    return x


@rule("clone", "Tensor.contiguous")
def _clone(x: DualTensor, *, memory_format: torch.memory_format = torch.preserve_format) -> DualTensor:
    return DualTensor(_in_format(x.buffer, memory_format, copy=True))


RULES[torch.Tensor.contiguous] = lambda x, memory_format=torch.contiguous_format: (
    x if x.is_contiguous(memory_format=memory_format) else _clone(x, memory_format=memory_format)
)


def _in_format(buffer: Tensor, memory_format: torch.memory_format, *, copy: bool) -> Tensor:
    if memory_format in (torch.preserve_format, torch.contiguous_format):
        return buffer.clone(memory_format=memory_format) if copy else buffer.contiguous()
    folded = buffer.flatten(0, 1)  # channels_last is a format of 4 axes: of the rows folded into the batch
    folded = folded.clone(memory_format=memory_format) if copy else folded.contiguous(memory_format=memory_format)
    return folded.unflatten(0, (buffer.shape[0], -1))


@rule("Tensor.to")
def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, DualTensor):
        return x.to(*(_primal(a) for a in args), **kwargs)
    args = tuple(_primal(a) for a in args)
    memory_format = kwargs.pop("memory_format", None)
    target = torch.empty(0, dtype=x.buffer.dtype, device=x.buffer.device).to(*args, **kwargs)
    if not target.is_floating_point():
        return x.primal.to(*args, **kwargs)
    buffer = x.buffer.to(device=target.device, dtype=target.dtype, copy=bool(kwargs.get("copy")))
    if memory_format is not None and memory_format is not torch.preserve_format:
        buffer = _in_format(buffer, memory_format, copy=False)
    return x if buffer is x.buffer else DualTensor(buffer)


for _name in ("float", "double", "half", "bfloat16", "cpu", "cuda"):
    _op = getattr(torch.Tensor, _name)
    RULES[_op] = lambda x, *args, _op=_op, **kwargs: DualTensor(_op(x.buffer, *args, **kwargs))


@rule("Tensor.type_as")
def _type_as(x: Any, other: Tensor) -> Any:
    return _to(x, dtype=other.dtype, device=other.device) if isinstance(x, DualTensor) else x.to(other.dtype)


@rule("Tensor.type")
def _type(x: DualTensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:
        return x.primal.type()
    return _to(x, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


# ------------------------------------------------------------------------------------------------ sums and selections


def _reduction(op: Any) -> Callable[..., Any]:
    def push(x: DualTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Any:
        dim = axis if dim is None else dim
        if _ndim(x) == 0 or isinstance(dim, torch.dtype):
            return NotImplemented
        dims = list(range(1, x.buffer.ndim)) if dim is None or dim == () else _dims(dim)
        return DualTensor(op(x.buffer, dims, keepdim=keepdim, dtype=dtype))

    return push


for _name in ("sum", "mean"):
    for _op in _named(_name):
        RULES[_op] = _reduction(getattr(torch, _name))


@rule("cumsum")
def _cumsum(x: DualTensor, dim: int, *, dtype: Any = None) -> DualTensor:
    return DualTensor(x.buffer.cumsum(_at(dim), dtype=dtype))


for _name in ("tril", "triu"):
    for _op in _named(_name):
        RULES[_op] = lambda x, diagonal=0, _op=getattr(torch, _name): DualTensor(_op(x.buffer, diagonal))


@rule("where")
def _where(condition: Any, *branches: Any) -> Any:
    if len(branches) != 2 or isinstance(condition, DualTensor) or not _any_dual(*branches):
        return NotImplemented
    ndim = max(_ndim(condition), *(_ndim(b) for b in branches))
    value = torch.where(condition, *(_primal(b) for b in branches))
    zero = torch.zeros((), dtype=value.dtype, device=value.device)
    rows = [_aligned(b, ndim)[1:] if isinstance(b, DualTensor) else zero for b in branches]
    tangents = torch.where(condition, *rows)
    return DualTensor(torch.cat([value[None], tangents.expand(-1, *value.shape)]))


@rule("masked_fill")
def _masked_fill(x: Any, mask: Tensor, value: Any) -> Any:
    if not isinstance(x, DualTensor) or isinstance(value, DualTensor) or mask.ndim > _ndim(x):
        return NotImplemented
    out = x.buffer.masked_fill(mask, 0)
    out[0].masked_fill_(mask, value)
    return DualTensor(out)


@rule("Tensor.masked_fill_")
def _masked_fill_in_place(x: Any, mask: Tensor, value: Any) -> Any:
    if not isinstance(x, DualTensor) or isinstance(value, DualTensor) or mask.ndim > _ndim(x):
        return NotImplemented
    x.buffer.masked_fill_(mask, 0)
    x.buffer[0].masked_fill_(mask, value)
    return x


# -------------------------------------------------------------------- new tensors, which the model may write duals to


def _made_like(op: Any) -> Callable[..., Any]:
    def push(x: DualTensor, *args: Any, **kwargs: Any) -> Any:
        value = op(x.primal, *args, **kwargs)
        return DualTensor(_with_rows(value, x.buffer.shape[0], value)) if value.is_floating_point() else value

    return push


for _op in _named(
    "zeros_like", "ones_like", "empty_like", "full_like", "Tensor.new_zeros", "Tensor.new_ones", "Tensor.new_empty", "Tensor.new_full"
):
    RULES[_op] = _made_like(_op)


# ------------------------------------------------------------------------------------------- the other kinds of op


def _getters(*names: str) -> list[Any]:
    attributes = [getattr(torch.Tensor, name, None) for name in names]
    return [a.__get__ for a in attributes if a is not None]


METADATA.update(
    _getters(
        *"shape dtype device layout ndim requires_grad is_leaf grad grad_fn is_cuda is_cpu is_sparse is_quantized is_mkldnn is_meta"
        " is_mps is_xpu is_xla is_nested names itemsize nbytes _version _base output_nr retains_grad _backward_hooks".split()
    )
)
METADATA.update(
    _named(
        *"Tensor.size Tensor.dim Tensor.ndimension Tensor.stride Tensor.numel Tensor.nelement Tensor.element_size"
        " Tensor.is_contiguous Tensor.__len__ Tensor.__hash__ Tensor.get_device Tensor.storage_offset Tensor._is_view"
        " Tensor.is_inference Tensor.is_signed Tensor.is_same_size Tensor.is_shared Tensor.is_pinned Tensor.__repr__"
        " is_floating_point is_complex is_signed numel is_inference is_same_size get_device result_type can_cast"
        " Tensor.has_names Tensor.is_conj Tensor.is_neg is_conj is_neg Tensor._is_zerotensor _is_zerotensor".split()
    )
)
METADATA.add(torch.Tensor.__repr__)

CONSTANT.update(
    _named(
        *"eq ne lt le gt ge equal greater greater_equal less less_equal not_equal isnan isinf isfinite isposinf isneginf isclose"
        " allclose isin logical_and logical_or logical_not logical_xor any all argmax argmin argsort sign sgn signbit floor ceil"
        " round trunc fix floor_divide heaviside nonzero count_nonzero searchsorted bucketize bincount histc unique"
        " unique_consecutive rand_like randn_like randint_like bernoulli multinomial one_hot is_nonzero"
        " Tensor.__eq__ Tensor.__ne__ Tensor.__lt__ Tensor.__le__ Tensor.__gt__ Tensor.__ge__ Tensor.__bool__ Tensor.__contains__"
        " Tensor.__floordiv__ Tensor.__rfloordiv__ Tensor.long Tensor.int Tensor.short Tensor.char Tensor.byte Tensor.bool"
        " Tensor.__and__ Tensor.__or__ Tensor.__invert__ Tensor.new_tensor Tensor.nonzero_static".split()
    )
)

CUTS.update([*_named("detach", "Tensor.detach", "Tensor.detach_"), torch.Tensor.data.__get__])

ESCAPES.update(
    _named(
        *"Tensor.item Tensor.tolist Tensor.numpy Tensor.__array__ Tensor.__float__ Tensor.__int__ Tensor.__index__"
        " Tensor.__complex__ Tensor.data_ptr Tensor.untyped_storage Tensor.storage Tensor.__dlpack__ Tensor.__format__".split()
    )
)
