"""Views and what joins them: the same on every row, one axis further right.  A view stays a view."""

from __future__ import annotations

import functools
from typing import Any

import torch

from torchgeom_probe.dual.registry import (
    aligned,
    all_at,
    at,
    listed,
    ndim_of,
    on_rows,
    register,
    rows_of,
    rule,
    rule_of_each,
    with_rows,
)
from torchgeom_probe.dual.tensor import DualTensor, Rule
from torchgeom_probe.errors import EngineRefusal
from torchgeom_probe.shapes import Tensor

# --------------------------------------------------------------------------------------------------------------- shapes


def _shape_of(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    found = arguments or tuple(keywords.values())
    return NotImplemented if found and isinstance(found[0], torch.dtype) else listed(found)


@rule("Tensor.view reshape")
def _view(input: DualTensor, *size: Any, **kwargs: Any) -> Any:
    shape = _shape_of(size, kwargs)
    if shape is NotImplemented:
        return NotImplemented
    return DualTensor(input.buffer.reshape(input.buffer.shape[0], *shape))


register(lambda input, other: torch.reshape(input, other.shape), "Tensor.view_as Tensor.reshape_as")
# a copy of a strided tensor, even where a view could be had
register(lambda input: input.contiguous().reshape(-1), "ravel")
register(lambda input, dim, sizes: DualTensor(input.buffer.unflatten(at(dim), sizes)), "unflatten")
register(lambda input: DualTensor(input.buffer.transpose(-2, -1)) if ndim_of(input) == 2 else input, "t")
register(lambda input: DualTensor(input.buffer.mT) if ndim_of(input) > 1 else NotImplemented, "Tensor.mT")
register(lambda input: DualTensor(input.buffer.permute(0, *range(ndim_of(input), 0, -1))), "Tensor.T")
register(lambda input, dim: DualTensor(input.buffer.unsqueeze(at(dim))), "unsqueeze")
register(lambda input, dim, start, length: DualTensor(input.buffer.narrow(at(dim), start, length)), "narrow")
register(lambda input, dim, index: DualTensor(input.buffer.select(at(dim), index)), "select")
register(lambda input: DualTensor(input.buffer.conj_physical()), "conj_physical")


@rule("flatten")
def _flatten(input: DualTensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    if ndim_of(input) == 0:
        return input.reshape(1)
    return DualTensor(input.buffer.flatten(at(start_dim), at(end_dim)))


@rule("permute")
def _permute(input: DualTensor, *dims: Any, **kwargs: Any) -> DualTensor:
    order = _shape_of(dims, kwargs)
    return DualTensor(input.buffer.permute(0, *(d % ndim_of(input) + 1 for d in order)))


@rule("transpose swapdims")
def _transpose(input: DualTensor, dim0: Any, dim1: Any) -> DualTensor:
    return DualTensor(input.buffer.transpose(at(dim0), at(dim1)) if ndim_of(input) else input.buffer)


register(lambda input, axis0, axis1: _transpose(input, axis0, axis1), "swapaxes")


@rule("movedim moveaxis")
def _movedim(input: DualTensor, source: Any, destination: Any) -> DualTensor:
    return DualTensor(input.buffer.movedim(all_at(source), all_at(destination)) if ndim_of(input) else input.buffer)


@rule("squeeze")
def _squeeze(input: DualTensor, dim: Any = None) -> Any:
    if dim is None:
        dim = [i for i, size in enumerate(input.buffer.shape[1:]) if size == 1]
    return DualTensor(input.buffer.squeeze(all_at(dim)) if ndim_of(input) else input.buffer)


@rule("Tensor.expand broadcast_to")
def _expand(input: DualTensor, *size: Any, implicit: bool = False, **kwargs: Any) -> DualTensor:
    shape = _shape_of(size, kwargs)
    return DualTensor(aligned(input, len(shape)).expand(input.buffer.shape[0], *shape))


register(lambda input, other: input.expand(other.shape), "Tensor.expand_as")


@rule("Tensor.repeat tile")
def _repeat(input: DualTensor, *repeats: Any, **kwargs: Any) -> DualTensor:
    times = tuple(_shape_of(repeats, kwargs))
    times = (1,) * (ndim_of(input) - len(times)) + times  # tile() may be given fewer than there are axes
    return DualTensor(aligned(input, len(times)).repeat(1, *times))


@rule("repeat_interleave")
def _repeat_interleave(input: Any, repeats: Any = None, dim: int | None = None, *, output_size: Any = None) -> Any:
    if not isinstance(input, DualTensor) or ndim_of(input) == 0:
        return NotImplemented
    b = input.buffer if dim is not None else input.buffer.flatten(1)
    return DualTensor(b.repeat_interleave(repeats, 1 if dim is None else at(dim), output_size=output_size))


@rule("roll")
def _roll(input: DualTensor, shifts: Any, dims: Any = None) -> Any:
    b = input.buffer
    if dims is None or dims in ((), []):
        return DualTensor(b.reshape(len(b), -1).roll(shifts, 1).reshape(b.shape))
    return DualTensor(b.roll(shifts, all_at(dims))) if ndim_of(input) else NotImplemented


@rule("flip")
def _flip(input: DualTensor, *dims: Any, **kwargs: Any) -> Any:
    return DualTensor(input.buffer.flip(all_at(_shape_of(dims, kwargs)))) if ndim_of(input) else NotImplemented


@rule_of_each("tril triu")
def _on_last_axes(op: Any) -> Rule:
    return lambda input, diagonal=0: DualTensor(op(input.buffer, diagonal))


# Linear in the first argument, each row by itself: no rule of their own pays.
rule_of_each(
    "Tensor.unfold diagonal linalg.diagonal diag diag_embed rot90 flipud fliplr hsplit vsplit dsplit adjoint Tensor.mH"
    " Tensor.H real imag conj resolve_conj resolve_neg view_as_real view_as_complex take_along_dim Tensor.sum_to_size"
    " fft.fft fft.ifft fft.fft2 fft.ifft2 fft.fftn fft.ifftn fft.rfft"
    " fft.irfft fft.rfft2 fft.irfft2 fft.rfftn fft.irfftn fft.hfft fft.ihfft fft.fftshift fft.ifftshift"
)(on_rows)


@rule_of_each("atleast_1d atleast_2d atleast_3d")
def _at_least(op: Any) -> Rule:
    def push(*tensors: Any) -> Any:
        if len(tensors) == 1 and isinstance(tensors[0], DualTensor):
            return on_rows(op)(tensors[0])
        return tuple(op(t) for t in listed(tensors))

    return push


# of the plain tensor: the wrapper has no memory
register(lambda input: input.buffer.storage_offset(), "Tensor.storage_offset")


@rule("as_strided")
def _as_strided(input: DualTensor, size: Any, stride: Any, storage_offset: int | None = None) -> Any:
    # Places in memory: each row must be laid out in a stretch of its own, as the plain tensor is in its memory.
    b = input.buffer
    apart, start = b.stride(0), b.storage_offset()
    offset = start if storage_offset is None else storage_offset
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if start >= apart or reach >= apart or b.untyped_storage().nbytes() != len(b) * apart * b.itemsize:
        raise EngineRefusal(
            "as_strided() reaches into memory that is laid out otherwise in a dual pass.\nUse a view that names its"
            " axes (x[..., ::2], x.unfold(...), x.diagonal()), or measure with engine='vjp'."
        )
    return DualTensor(b.as_strided((len(b), *size), (apart, *stride), offset))


@rule("as_strided_scatter")
def _as_strided_scatter(input: Any, src: Any, size: Any, stride: Any, storage_offset: int | None = None) -> DualTensor:
    # torch's own derivative adds what it should replace
    out = DualTensor(with_rows(input, rows_of(input, src)).clone())
    _as_strided(out, size, stride, storage_offset).copy_(src)
    return out


# ------------------------------------------------------------------------------------------------- pieces and joins


@rule_of_each("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split")
def _pieces(op: Any) -> Rule:
    def push(input: DualTensor, *args: Any, dim: int = 0, **kwargs: Any) -> Any:
        how, dim = args[:1], args[1] if len(args) > 1 else dim
        if len(how) + len(kwargs) != 1:  # how many or how large, by whatever name
            return NotImplemented
        return tuple(DualTensor(piece) for piece in op(input.buffer, *how, dim=at(dim), **kwargs))

    return push


register(lambda input, dim=0: tuple(map(DualTensor, input.buffer.unbind(at(dim)))), "unbind")
register(lambda input: iter(input.unbind()), "Tensor.__iter__")


@rule("cat concat concatenate")
def _cat(tensors: Any, dim: int = 0) -> Any:
    rows, empty = rows_of(*tensors), [t.shape == (0,) for t in tensors]
    parts = [with_rows(t, rows) for t in tensors]
    if any(empty) and any(t.ndim > 1 for t in tensors):  # torch leaves these out, but for their type
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
        parts = [part.to(dtype) for part, is_empty in zip(parts, empty, strict=True) if not is_empty]
    return DualTensor(torch.cat(parts, at(dim)))


def _with_rows_of_each(tensors: Any) -> list[Tensor]:
    rows = rows_of(*tensors)
    return [with_rows(t, rows) for t in tensors]


register(lambda tensors, dim=0: DualTensor(torch.stack(_with_rows_of_each(tensors), at(dim))), "stack")


@rule_of_each("hstack vstack dstack row_stack")
def _stacked(op: Any) -> Rule:
    together = torch.func.vmap(lambda *parts: op(parts))
    return lambda tensors: DualTensor(together(*_with_rows_of_each(tensors)))


register(lambda tensors: torch.cat([t.reshape(-1, 1) if t.ndim < 2 else t for t in tensors], dim=1), "column_stack")


@rule("torch.broadcast_tensors")
def _broadcast_tensors(*tensors: Any) -> Any:
    operands = listed(tensors)
    shape = torch.broadcast_shapes(*(t.shape for t in operands))
    return tuple(t.expand(shape) for t in operands)


@rule("torch.meshgrid")
def _meshgrid(*tensors: Any, indexing: str = "ij") -> Any:
    axes = listed(tensors)
    if any(t.ndim != 1 for t in axes) or indexing not in ("ij", None):
        return NotImplemented
    shape = [t.shape[0] for t in axes]
    return tuple(t.reshape([-1 if i == j else 1 for j in range(len(axes))]).expand(shape) for i, t in enumerate(axes))
