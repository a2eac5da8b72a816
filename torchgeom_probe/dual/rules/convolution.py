"""Convolutions, pooling, padding and resampling: linear maps of a batch, with the rows folded into the batch axis."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from torchgeom_probe.dual.registry import any_dual, named, ndim_of, on_rows, rule
from torchgeom_probe.dual.tensor import RULES, DualTensor
from torchgeom_probe.errors import EngineRefusal
from torchgeom_probe.shapes import Tensor


def folded(x: DualTensor, ndim: int, op: Callable[[Tensor], Tensor]) -> DualTensor:
    """Run a batched linear op once, over R·B rows; an input without a batch axis has the rows as its batch."""
    b = x.buffer
    if b.ndim == ndim:  # unbatched
        return DualTensor(op(b))
    return DualTensor(op(b.flatten(0, 1)).unflatten(0, (b.shape[0], -1)))


class KnownPrimals:
    """What the convolutions of a pass make of its primal, in order: another pass at the same samples runs them on the tangents alone.

    For passes with as many rows: how many there are decides which convolutions take a batch norm in.
    """

    def __init__(self) -> None:
        self._known: list[Tensor] = []
        self._complete = False
        self._used = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Record in the first pass, and give back in the later ones."""
        self._used = 0
        token = _KNOWN.set(self)
        try:
            yield
            self._complete = True
        finally:
            _KNOWN.reset(token)
            if not self._complete:
                self._known.clear()

    def convolved(self, x: DualTensor, ndim: int, convolve: Callable[[Tensor], Tensor]) -> DualTensor:
        """Run a batched convolution, its primal from here where it is known."""
        if not self._complete:
            whole = folded(x, ndim, convolve)
            self._known.append(whole.primal.clone())
            return whole
        primal, self._used = self._known[self._used], self._used + 1
        samples = x.buffer.shape[1]
        pushed = convolve(x.buffer[1:].flatten(0, 1))
        out = _rows_like(pushed[:samples], x.buffer.shape[0])
        out[0].copy_(primal)
        out[1:].copy_(pushed.unflatten(0, (-1, samples)))
        return DualTensor(out)


_KNOWN: ContextVar[KnownPrimals | None] = ContextVar("known", default=None)


def _convolved(x: DualTensor, ndim: int, convolve: Callable[[Tensor], Tensor]) -> DualTensor:
    known = _KNOWN.get()
    if known is None or x.buffer.ndim == ndim:
        return folded(x, ndim, convolve)
    return known.convolved(x, ndim, convolve)


@dataclass
class Convolution:
    """A convolution that has yet to run: an affine map of its channels right after it costs nothing once its weight takes it in."""

    convolve: Callable[..., Tensor]
    input: DualTensor
    weight: Tensor
    bias: Tensor | None
    arguments: tuple[Any, ...]
    #: numbers of the result, and what was written to so far of what it is made from
    size: int
    versions: tuple[int, ...]

    def __call__(self) -> Tensor:
        """(w * x + b)' = w * x'."""
        return self._run(self.weight, self.bias)

    def scaled(self, scale: Tensor, shift: Tensor) -> Tensor:
        """Make s (w * x + b) + c, per channel, as a convolution with the weight s w."""
        spread = (-1, *[1] * (self.weight.ndim - 1))
        return self._run(
            self.weight * scale.reshape(spread),
            shift if self.bias is None else torch.addcmul(shift, scale, self.bias),
        )

    @property
    def can_be_scaled(self) -> bool:
        """Whether that costs less than a pass over the result, and its rounding is as small."""
        narrow = torch.finfo(self.weight.dtype).eps > 1e-6
        return not narrow and self.size >= 2 * self.weight.numel()

    def _run(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.versions != _versions(self.input, self.weight, self.bias):
            raise EngineRefusal(
                "the model writes in place to the input of a convolution, and uses the convolution's result after that as well as before.\n"
                "Measure with engine='functorch', or write that op out of place."
            )
        out = _convolved(
            self.input, weight.ndim, lambda rows: self.convolve(rows, weight, None, *self.arguments)
        )
        if bias is not None:
            out.buffer[0].add_(bias.reshape(-1, *[1] * (weight.ndim - 2)))
        return out.buffer


def _versions(x: DualTensor, *constants: Tensor | None) -> tuple[int, ...]:
    return x.buffer._version, *(-1 if c is None or c.is_inference() else c._version for c in constants)


def _convolution(convolve: Any, spatial: int, *, waits: bool) -> Callable[..., Any]:
    def push(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        *further: Any,
        **kwargs: Any,
    ) -> Any:
        if any_dual(weight, bias):
            return NotImplemented
        arguments = (stride, padding, *further)
        dilation = further[0] if further else kwargs.get("dilation", 1)
        bound = functools.partial(convolve, **kwargs)
        # A tensor of inference mode does not tell whether it was written to.
        may_wait = waits and not input.buffer.is_inference()
        shape = _result_shape(input, weight, spatial, stride, padding, dilation) if may_wait else None
        if shape is None:
            out = _convolved(input, spatial + 2, lambda rows: bound(rows, weight, None, *arguments))
            if bias is not None:
                out.buffer[0].add_(bias.reshape(-1, *[1] * spatial))
            return out
        rows = input.buffer.shape[0]
        made = Convolution(
            bound, input, weight, bias, arguments, rows * math.prod(shape), _versions(input, weight, bias)
        )
        return DualTensor.waiting(made, shape, _strides(shape, _channels_last(input, weight)), input.buffer)

    return push


def _result_shape(
    input: DualTensor, weight: Tensor, spatial: int, stride: Any, padding: Any, dilation: Any
) -> tuple[int, ...] | None:
    """The shape of a batched convolution's result; None for what a batch norm does not follow, or a wrong call: that runs at once."""
    shape = input.buffer.shape[1:]
    if len(shape) != spatial + 2 or weight.ndim != spatial + 2 or isinstance(padding, str):
        return None
    per_axis = [
        (v,) * spatial if isinstance(v, int) else tuple(v) * (spatial if len(v) == 1 else 1)
        for v in (stride, padding, dilation)
    ]
    places = [
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(shape[2:], weight.shape[2:], *per_axis, strict=True)
    ]
    if min(places, default=1) < 1 or shape[1] % weight.shape[1] or weight.shape[0] < 1:
        return None
    return (shape[0], weight.shape[0], *places)


def _channels_last(input: DualTensor, weight: Tensor) -> bool:
    return weight.ndim == 4 and any(
        v.is_contiguous(memory_format=torch.channels_last) and not v.is_contiguous() for v in (input, weight)
    )


def _strides(shape: tuple[int, ...], channels_last: bool) -> list[int]:
    order = [0, 2, 3, 1] if channels_last else list(range(len(shape)))
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return strides


def _folded_rule(op: Any, ndim: int) -> Callable[..., Any]:
    def push(input: DualTensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, DualTensor) or any_dual(*args, *kwargs.values()):
            return NotImplemented
        if ndim_of(input) not in (ndim - 1, ndim):
            return NotImplemented
        return folded(input, ndim, lambda rows: op(rows, *args, **kwargs))

    return push


for _spatial in (1, 2, 3):
    for _stem in ("conv", "conv_transpose"):
        for _op in named(f"{_stem}{_spatial}d"):
            RULES[_op] = _convolution(_op, _spatial, waits=_stem == "conv")
    for _stem in ("avg_pool", "adaptive_avg_pool"):
        for _op in named(f"{_stem}{_spatial}d"):
            RULES[_op] = _folded_rule(_op, _spatial + 2)

for _op in named("F.unfold", "nn.im2col", "F.fold", "nn.col2im"):
    RULES[_op] = _folded_rule(_op, 3 if "fold" == _op.__name__ or "col2im" in _op.__name__ else 4)

# These take any number of axes in front of the last three.
for _op in named("pixel_shuffle", "pixel_unshuffle"):
    RULES[_op] = lambda input, factor, _op=_op: DualTensor(_op(input.buffer, factor))

for _op in named("channel_shuffle", "grid_sample", "grid_sampler"):
    RULES[_op] = on_rows(_op)


@rule("interpolate")
def _interpolate(input: DualTensor, *args: Any, **kwargs: Any) -> Any:
    # linear in the input in every mode
    if ndim_of(input) < 3:
        return NotImplemented
    rows = input.buffer.shape[0]
    return DualTensor(F.interpolate(input.buffer.flatten(0, 1), *args, **kwargs).unflatten(0, (rows, -1)))


@rule("pad")
def _pad(input: DualTensor, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    if mode == "constant":
        if len(pad) > 2 * ndim_of(input):
            return NotImplemented
        out = F.pad(input.buffer, pad)
        if value:
            out[0].copy_(F.pad(input.primal, pad, value=value))
        return DualTensor(out)
    if ndim_of(input) < len(pad) // 2 + 2:
        return NotImplemented
    rows = input.buffer.shape[0]
    return DualTensor(F.pad(input.buffer.flatten(0, 1), pad, mode=mode).unflatten(0, (rows, -1)))


def _max_pooling(pool: Any, spatial: int, *, with_indices: bool) -> Callable[..., Any]:
    def push(input: DualTensor, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
        # y = p[argmax]; y' = t[argmax]: the primal's winners, gathered from the tangents
        if ndim_of(input) != spatial + 2:
            return NotImplemented
        value, index = pool(input.primal, *args, return_indices=True, **kwargs)
        rows, start = input.buffer.shape[0], -spatial
        out = _rows_like(value, rows)
        out[0].copy_(value)
        winners = index.flatten(start)
        out[1:] = (
            input.tangents.flatten(start)
            .gather(-1, winners.expand(rows - 1, *winners.shape))
            .view(rows - 1, *index.shape)
        )
        return (DualTensor(out), index) if return_indices or with_indices else DualTensor(out)

    return push


def _rows_like(value: Tensor, rows: int) -> Tensor:
    """An empty buffer [rows, *value.shape] whose rows lie as the value does."""
    last = value.is_contiguous(memory_format=torch.channels_last) if value.ndim == 4 else False
    if last and not value.is_contiguous():
        flat = torch.empty(
            (rows * len(value), *value.shape[1:]),
            dtype=value.dtype,
            device=value.device,
            memory_format=torch.channels_last,
        )
        return flat.unflatten(0, (rows, -1))
    return value.new_empty((rows, *value.shape))


for _spatial in (1, 2, 3):
    for _stem in ("max_pool", "adaptive_max_pool"):
        _op = getattr(F, f"{_stem}{_spatial}d")
        for _twin in named(f"{_stem}{_spatial}d"):
            if _twin not in (
                getattr(torch, "adaptive_max_pool1d", None),
                getattr(torch._C._nn, f"{_stem}{_spatial}d", None),
            ):
                RULES[_twin] = _max_pooling(_op, _spatial, with_indices=False)
        for _twin in named(f"{_stem}{_spatial}d_with_indices"):
            if _twin.__module__ == "torch.nn.functional":
                RULES[_twin] = _max_pooling(_op, _spatial, with_indices=True)
