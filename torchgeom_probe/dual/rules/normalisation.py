"""Normalisation in eval mode: batch norm is affine; the others have one symmetric Jacobian per group of features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from torchgeom_probe.dual.graph import BatchNormed, Standardised, shifted
from torchgeom_probe.dual.passes import current_pass, followed
from torchgeom_probe.dual.registry import any_dual, ndim_of, register, row_by_row, rule, wide
from torchgeom_probe.dual.tensor import DualTensor
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor

aten = torch.ops.aten


@rule("F.batch_norm")
def _batch_norm(
    input: DualTensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    # y = s p + c with s = w / √(var + ε), c = b - s mean;  y' = s t.  A deferred convolution takes s into its weight.
    by_the_batch = training or running_mean is None
    if by_the_batch and current_pass().batch_statistics and not any_dual(weight, bias):
        running = running_mean, running_var
        return DualTensor(BatchNormed.apply(input.buffer, weight, bias, running, momentum, eps))
    if by_the_batch:
        raise ProbeError(
            "batch normalisation by the statistics of the batch couples the samples: no sample has a metric of its own."
            "\nMeasure in eval mode (mode='eval') with running statistics (track_running_stats=True)."
        )
    if any_dual(running_mean, running_var, weight, bias):
        return NotImplemented
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    convolution = input.taken()
    if convolution is not None and convolution.can_be_scaled and scale.dtype == convolution.weight.dtype:
        return DualTensor(convolution.scaled(scale, shift))
    spread = (-1, *[1] * (ndim_of(input) - 2))
    out = input.buffer * scale.reshape(spread).to(input.buffer.dtype)
    out = shifted(out, shift.reshape(spread))
    return DualTensor(out)


register(
    lambda input, weight, bias, mean, var, *more: _batch_norm(input, mean, var, weight, bias, *more[:3]),
    "torch.batch_norm",
)


def _standardised(buffer: Tensor, axes: int, eps: float, weight: Tensor | None = None) -> Tensor:
    """The rows of a buffer made zero-mean, unit-variance over its last axes, then times the weight (without a bias)."""
    # x̂ = (p - mean) r, r = 1/√(var + ε);  x̂' = r (c - x̂ mean(x̂ c)), c = t - mean t
    if followed():
        out = Standardised.apply(buffer.flatten(-axes), eps).view(buffer.shape)
        return out if weight is None else out * weight
    if row_by_row(buffer):
        return _standardised_by_kernel(buffer, axes, eps, weight)
    dims = list(range(-axes, 0))
    p = wide(buffer[0])
    variance, mean = torch.var_mean(p, dims, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + eps)
    hat = ((p - mean) * inverse).to(buffer.dtype)
    out = buffer.new_empty(buffer.shape)
    out[0].copy_(hat)
    centred = torch.sub(buffer[1:], buffer[1:].mean(dims, keepdim=True), out=out[1:])
    centred.addcmul_((centred * hat).mean(dims, keepdim=True), hat, value=-1)
    centred.mul_(inverse.to(buffer.dtype))
    return out if weight is None else out.mul_(weight)


def _standardised_by_kernel(buffer: Tensor, axes: int, eps: float, weight: Tensor | None) -> Tensor:
    # The Jacobian of x̂ is symmetric: given a tangent, torch's own backward kernel is the forward derivative.
    p, shape = buffer[0].contiguous(), list(buffer.shape[-axes:])
    value, mean, inverse = torch.native_layer_norm(p, shape, weight, None, eps)
    out = buffer.new_empty(buffer.shape)
    out[0] = value
    for row in range(1, buffer.shape[0]):
        hat = aten.native_layer_norm_backward(
            buffer[row].contiguous(), p, shape, mean, inverse, None, None, [True, False, False]
        )[0]
        if weight is None:
            out[row] = hat
        else:
            torch.mul(hat, weight, out=out[row])
    return out


@rule("layer_norm")
def _layer_norm(
    input: DualTensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    if any_dual(weight, bias):
        return NotImplemented
    out = _standardised(input.buffer, len(normalized_shape), eps, weight)
    if bias is not None:
        out = shifted(out, bias)
    return DualTensor(out)


@rule("group_norm")
def _group_norm(
    input: DualTensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    if any_dual(weight, bias) or ndim_of(input) < 2 or not input.numel():
        return NotImplemented
    b = input.buffer
    out = _standardised(b.unflatten(2, (num_groups, -1)).flatten(3), 1, eps).reshape(b.shape)
    spread = (-1, *[1] * (b.ndim - 3))
    if weight is not None:
        out = out * weight.reshape(spread) if followed() else out.mul_(weight.reshape(spread))
    if bias is not None:
        out = shifted(out, bias.reshape(spread))
    return DualTensor(out)


@rule("F.instance_norm")
def _instance_norm(
    input: DualTensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if ndim_of(input) < 3:
        return NotImplemented
    if any_dual(running_mean, running_var):  # torch writes their values alone; by the rules of the parts
        out = F.instance_norm(input, None, None, weight, bias, True, momentum, eps)
        axes = list(range(2, input.ndim))
        for running, seen in ((running_mean, input.mean(axes)), (running_var, input.var(axes))):
            now: Any = torch.lerp(running, seen.mean(0), momentum)
            running.copy_(now if isinstance(running, DualTensor) else now.primal)
        return out
    if running_mean is not None and not followed():
        return NotImplemented
    if running_mean is not None:  # which this writes to, as a plain pass does
        F.instance_norm(input.primal.detach(), running_mean, running_var, None, None, True, momentum, eps)
    return _group_norm(input, input.shape[1], weight, bias, eps)


register(
    lambda input, weight, bias, mean, var, *more: _instance_norm(input, mean, var, weight, bias, *more[:3]),
    "torch.instance_norm",
)


@rule("rms_norm")
def _rms_norm(input: DualTensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    # x̂ = r p, r = 1/√(mean p² + ε);  x̂' = r t - x̂ mean(x̂ r t)
    if any_dual(weight):
        return NotImplemented
    b, dims = input.buffer, list(range(-len(normalized_shape), 0))
    squares = wide(b[0]).square().mean(dims, keepdim=True)
    out = b * torch.rsqrt(squares + (torch.finfo(squares.dtype).eps if eps is None else eps)).to(b.dtype)
    if followed():
        out = _without_own_share(out, (out[1:] * out[0]).mean(dims, keepdim=True))
        return DualTensor(out if weight is None else out * weight)
    out[1:].addcmul_((out[1:] * out[0]).mean(dims, keepdim=True), out[0], value=-1)
    return DualTensor(out if weight is None else out.mul_(weight))


def _without_own_share(rows: Tensor, share: Tensor) -> Tensor:
    return torch.cat([rows[:1], rows[1:] - share * rows[0]])


@rule("F.normalize")
def _normalize(input: DualTensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Any:
    # y = p / m, m = max(|p|, ε);  y' = (t - y m')/m, m' = Σ y t where |p| > ε
    if p != 2.0 or not isinstance(dim, int) or input.buffer.is_complex():
        return NotImplemented
    axis = dim - ndim_of(input) if dim >= 0 else dim
    length = torch.linalg.vector_norm(input.primal, dim=axis, keepdim=True)
    result = input.buffer / length.clamp_min(eps)
    grows = (result[1:] * result[0]).sum(axis, keepdim=True) * (length > eps)
    if followed():
        return DualTensor(_without_own_share(result, grows))
    result[1:].addcmul_(grows, result[0], value=-1)
    return DualTensor(result)
