"""Convolutions: the rows are folded into the batch axis, and a batch norm that follows is taken into the weight."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from torchgeom_probe.dual.graph import shifted
from torchgeom_probe.dual.passes import current_pass, followed, within
from torchgeom_probe.dual.registry import any_dual, apart, folded, lowered, rows_like, rule_of_each
from torchgeom_probe.dual.tensor import DualTensor, Rule
from torchgeom_probe.errors import EngineRefusal
from torchgeom_probe.shapes import Tensor


class KnownPrimals:
    """What the convolutions of a pass make of its primal, in order.

    Another pass at the same samples, with as many rows, runs its convolutions on the tangents alone.  As many, because
    their number decides which convolutions take a batch norm in.
    """

    def __init__(self) -> None:
        self._known: list[Tensor] = []
        self._complete = False
        self._used = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Record in the first pass, and give back in the later ones."""
        self._used = 0
        try:
            with within(known=self):
                yield
            self._complete = True
        finally:
            if not self._complete:
                self._known.clear()

    def convolved(self, x: DualTensor, convolve: Callable[[Tensor], Tensor]) -> DualTensor:
        """Run a batched convolution, its primal from here where it is known."""
        if not self._complete:
            whole = folded(x, convolve)
            self._known.append(whole.primal.clone())
            return whole
        primal, self._used = self._known[self._used], self._used + 1
        samples = x.buffer.shape[1]
        pushed = convolve(x.buffer[1:].flatten(0, 1))
        out = rows_like(pushed[:samples], x.buffer.shape[0])
        out[0].copy_(primal)
        out[1:].copy_(pushed.unflatten(0, (x.buffer.shape[0] - 1, samples)))
        return DualTensor(out)


@dataclass
class Convolution:
    """A convolution that has yet to run: a batch norm right after it costs nothing once the weight takes it in."""

    convolve: Callable[..., Tensor]
    input: DualTensor
    weight: Tensor
    bias: Tensor | None
    arguments: tuple[Any, ...]
    #: how many numbers the result holds
    size: int
    #: versions of what it is made from: a write to one of them in the meantime shows
    versions: tuple[int, ...]
    #: whether autograd follows it, wherever it runs
    graph: bool

    def __call__(self) -> Tensor:
        """(w * x + b)' = w * x'."""
        return self._run(self.weight, self.bias)

    def scaled(self, scale: Tensor, shift: Tensor) -> Tensor:
        """Make s (w * x + b) + c, per channel, as a convolution with the weight s w."""
        weight = self.weight * scale.reshape(-1, *[1] * (self.weight.ndim - 1))
        return self._run(weight, shift if self.bias is None else torch.addcmul(shift, scale, self.bias))

    @property
    def can_be_scaled(self) -> bool:
        """Whether that costs less than a pass over the result, and its rounding is as small."""
        narrow = torch.finfo(self.weight.dtype).eps > 1e-6
        return not narrow and self.size >= 2 * self.weight.numel()

    def _run(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.versions != _versions(self.input, self.weight, self.bias):
            raise EngineRefusal(
                "the model writes in place to the input of a convolution, and uses the convolution's result after that"
                " as well as before.\nMeasure with engine='functorch', or write that op out of place."
            )
        autocast = torch.autocast(self.weight.device.type, enabled=False)  # as it was where the model called it
        with torch.set_grad_enabled(self.graph), autocast:
            return _convolved(self.input, weight, bias, self.convolve, self.arguments).buffer


def _convolved(
    x: DualTensor, weight: Tensor, bias: Tensor | None, convolve: Callable[..., Tensor], arguments: tuple[Any, ...]
) -> DualTensor:
    def on_batch(rows: Tensor) -> Tensor:
        out = convolve(rows, weight.to(rows.dtype), None, *arguments)
        return shifted(out, shift, len(rows) // x.buffer.shape[0]) if graph and shift is not None else out

    low, graph = lowered(x), followed()
    shift = None if bias is None else bias.reshape(-1, *[1] * (weight.ndim - 2))
    known: KnownPrimals | None = current_pass().known
    if x.buffer.ndim == weight.ndim:  # without a batch axis the rows are the batch
        out = DualTensor(on_batch(x.buffer))
    elif low is not None:
        out = apart(x, on_batch, low, fold=True)
    else:
        out = folded(x, on_batch) if known is None else known.convolved(x, on_batch)
    if shift is not None and not graph:
        out.buffer[0].add_(shift)
    return out


def _versions(x: DualTensor, *constants: Tensor | None) -> tuple[int, ...]:
    return x.buffer._version, *(-1 if c is None or c.is_inference() else c._version for c in constants)


def _convolution(convolve: Any, spatial: int, *, defers: bool) -> Rule:
    def push(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, *further: Any, **kwargs: Any
    ) -> Any:
        if any_dual(weight, bias):
            return NotImplemented
        arguments = (stride, padding, *further)
        dilation = further[0] if further else kwargs.get("dilation", 1)
        bound = functools.partial(convolve, **kwargs)
        # Whether a tensor of inference mode was written to cannot be told, nor, under autocast, the type of the result.
        at_once = input.buffer.is_inference() or torch.is_autocast_enabled(input.buffer.device.type)
        may_wait = defers and current_pass().deferred is not None and not at_once
        shape = _result_shape(input, weight, spatial, stride, padding, dilation) if may_wait else None
        if shape is None:
            return _convolved(input, weight, bias, bound, arguments)
        size = input.buffer.shape[0] * math.prod(shape)
        make = Convolution(
            bound, input, weight, bias, arguments, size, _versions(input, weight, bias), torch.is_grad_enabled()
        )
        return DualTensor.deferred(make, shape, _strides(shape, _channels_last(input, weight)), input.buffer)

    return push


def _result_shape(
    input: DualTensor, weight: Tensor, spatial: int, stride: Any, padding: Any, dilation: Any
) -> tuple[int, ...] | None:
    """The shape of a batched convolution's result; None where it runs at once, as a wrong call does."""
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
    if min(places) < 1 or not weight.numel() or shape[1] % weight.shape[1]:
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


for _spatial in (1, 2, 3):
    rule_of_each(f"conv{_spatial}d")(functools.partial(_convolution, spatial=_spatial, defers=True))
    rule_of_each(f"conv_transpose{_spatial}d")(functools.partial(_convolution, spatial=_spatial, defers=False))
