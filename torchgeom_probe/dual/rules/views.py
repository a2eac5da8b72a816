"""Views, copies, indexing and new tensors: the same on every row, one axis further right.  A view stays a view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchgeom_probe.dual.registry import (
    aligned,
    all_at,
    any_dual,
    at,
    enter,
    getters,
    in_place_of,
    named,
    ndim_of,
    on_rows,
    primal_of,
    rows_of,
    rule,
    sizes,
    with_rows,
)
from torchgeom_probe.dual.tensor import MADE_LIKE, RULES, DualTensor
from torchgeom_probe.shapes import Tensor

# --------------------------------------------------------------------------------------------------------------- shapes


def _shape_of(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    found = arguments or tuple(keywords.values())
    return NotImplemented if isinstance(found[0], torch.dtype) else sizes(found)


@rule("Tensor.view", "reshape")
def _view(input: DualTensor, *size: Any, **kwargs: Any) -> Any:
    shape = _shape_of(size, kwargs)
    return (
        shape if shape is NotImplemented else DualTensor(input.buffer.reshape(input.buffer.shape[0], *shape))
    )


@rule("Tensor.view_as", "Tensor.reshape_as")
def _view_as(input: Any, other: Tensor) -> Any:
    if not isinstance(input, DualTensor):
        return input.reshape(other.shape)
    return DualTensor(input.buffer.reshape(input.buffer.shape[0], *other.shape))


@rule("flatten")
def _flatten(input: DualTensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    return (
        _ravel(input) if ndim_of(input) == 0 else DualTensor(input.buffer.flatten(at(start_dim), at(end_dim)))
    )


@rule("ravel")
def _ravel(input: DualTensor) -> DualTensor:
    return DualTensor(input.buffer.reshape(input.buffer.shape[0], -1))


@rule("unflatten")
def _unflatten(input: DualTensor, dim: int, sizes: Any) -> DualTensor:
    return DualTensor(input.buffer.unflatten(at(dim), sizes))


@rule("permute")
def _permute(input: DualTensor, *dims: Any, **kwargs: Any) -> DualTensor:
    order = sizes(dims) if dims else tuple(kwargs["dims"])
    return DualTensor(input.buffer.permute(0, *(d % ndim_of(input) + 1 for d in order)))


@rule("transpose", "swapaxes", "swapdims")
def _transpose(input: DualTensor, dim0: Any, dim1: Any) -> Any:
    return NotImplemented if ndim_of(input) < 2 else DualTensor(input.buffer.transpose(at(dim0), at(dim1)))


@rule("movedim", "moveaxis")
def _movedim(input: DualTensor, source: Any, destination: Any) -> DualTensor:
    return DualTensor(input.buffer.movedim(all_at(source), all_at(destination)))


@rule("t")
def _t(input: DualTensor) -> Any:
    return DualTensor(input.buffer.transpose(-2, -1)) if ndim_of(input) == 2 else input


def _matrix_transpose(input: DualTensor) -> DualTensor:
    return DualTensor(input.buffer.mT)


def _reversed_axes(input: DualTensor) -> DualTensor:
    return DualTensor(input.buffer.permute(0, *range(ndim_of(input), 0, -1)))


for _op in getters("mT"):
    RULES[_op] = _matrix_transpose
for _op in getters("T"):
    RULES[_op] = _reversed_axes


@rule("unsqueeze")
def _unsqueeze(input: DualTensor, dim: int) -> DualTensor:
    return DualTensor(input.buffer.unsqueeze(at(dim)))


@rule("squeeze")
def _squeeze(input: DualTensor, dim: Any = None) -> Any:
    if dim is None:
        dim = [i for i, size in enumerate(input.buffer.shape[1:]) if size == 1]
    return DualTensor(input.buffer.squeeze(all_at(dim)) if ndim_of(input) else input.buffer)


@rule("Tensor.expand", "broadcast_to")
def _expand(input: DualTensor, *size: Any, implicit: bool = False, **kwargs: Any) -> DualTensor:
    shape = _shape_of(size, kwargs)
    return DualTensor(aligned(input, len(shape)).expand(input.buffer.shape[0], *shape))


@rule("Tensor.expand_as")
def _expand_as(input: Any, other: Tensor) -> Any:
    return _expand(input, *other.shape) if isinstance(input, DualTensor) else input.expand(other.shape)


@rule("Tensor.repeat", "tile")
def _repeat(input: DualTensor, *repeats: Any, **kwargs: Any) -> DualTensor:
    times = _shape_of(repeats, kwargs)
    times = (1,) * (ndim_of(input) - len(times)) + tuple(
        times
    )  # only tile() may be given fewer than there are axes
    return DualTensor(aligned(input, len(times)).repeat(1, *times))


@rule("repeat_interleave")
def _repeat_interleave(
    input: Any, repeats: Any = None, dim: int | None = None, *, output_size: Any = None
) -> Any:
    if not isinstance(input, DualTensor) or ndim_of(input) == 0:
        return NotImplemented
    b = input.buffer if dim is not None else input.buffer.flatten(1)
    return DualTensor(b.repeat_interleave(repeats, 1 if dim is None else at(dim), output_size=output_size))


@rule("roll")
def _roll(input: DualTensor, shifts: Any, dims: Any = None) -> Any:
    return (
        NotImplemented if dims is None or dims == () else DualTensor(input.buffer.roll(shifts, all_at(dims)))
    )


@rule("flip")
def _flip(input: DualTensor, *dims: Any, **kwargs: Any) -> DualTensor:
    return DualTensor(input.buffer.flip(all_at(_shape_of(dims, kwargs))))


def _on_last_axes(op: Any) -> Callable[..., Any]:
    return lambda input, diagonal=0: DualTensor(op(input.buffer, diagonal))


for _op in named("tril", "triu"):
    RULES[_op] = _on_last_axes(_op)

#: Linear in the first argument, each row by itself: no rule of their own pays.
ON_EACH_ROW = (
    "Tensor.unfold diagonal diag diag_embed rot90 flipud fliplr hsplit vsplit dsplit adjoint real imag conj"
    " resolve_conj resolve_neg view_as_real view_as_complex take_along_dim atleast_1d atleast_2d"
    " atleast_3d fft.fft fft.ifft fft.fft2 fft.ifft2 fft.fftn fft.ifftn fft.rfft fft.irfft fft.rfft2 fft.irfft2 fft.rfftn"
    " fft.irfftn fft.hfft fft.ihfft fft.fftshift fft.ifftshift linalg.diagonal Tensor.sum_to_size"
).split()

for _op in named(*ON_EACH_ROW):
    RULES[_op] = on_rows(_op)
for _op in getters("mH", "H", "real", "imag"):
    RULES[_op] = on_rows(_op)


# ------------------------------------------------------------------------------------------------- pieces and joins


@rule("narrow")
def _narrow(input: DualTensor, dim: int, start: Any, length: int) -> DualTensor:
    return DualTensor(input.buffer.narrow(at(dim), start, length))


@rule("select")
def _select(input: DualTensor, dim: int, index: int) -> DualTensor:
    return DualTensor(input.buffer.select(at(dim), index))


@rule("index_select")
def _index_select(input: Any, dim: int, index: Tensor) -> Any:
    return DualTensor(input.buffer.index_select(at(dim), index)) if ndim_of(input) else NotImplemented


@rule("take")
def _take(input: Any, index: Tensor) -> Any:
    return DualTensor(input.buffer.flatten(1)[:, index]) if isinstance(input, DualTensor) else NotImplemented


@rule("conj_physical")
def _conj_physical(input: DualTensor) -> DualTensor:
    return DualTensor(input.buffer.conj_physical())


@rule("gather")
def _gather(input: Any, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    rows = input.buffer.shape[0]
    return (
        DualTensor(input.buffer.gather(at(dim), index.expand(rows, *index.shape)))
        if ndim_of(input)
        else NotImplemented
    )


def _pieces(op: Any) -> Callable[..., Any]:
    def push(input: DualTensor, *args: Any, dim: int = 0, **kwargs: Any) -> tuple[DualTensor, ...]:
        how, dim = args[:1], args[1] if len(args) > 1 else dim
        return tuple(DualTensor(piece) for piece in op(input.buffer, *how, dim=at(dim), **kwargs))

    return push


for _name in ("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"):
    for _op in named(_name):
        RULES[_op] = _pieces(_op)


@rule("unbind")
def _unbind(input: DualTensor, dim: int = 0) -> tuple[DualTensor, ...]:
    return tuple(DualTensor(piece) for piece in input.buffer.unbind(at(dim)))


enter(lambda input: iter(_unbind(input)), "Tensor.__iter__")


def _joined(op: Any) -> Callable[..., Any]:
    def push(tensors: Any, dim: int = 0, *, axis: int | None = None) -> Any:
        rows = rows_of(*tensors)
        dim = dim if axis is None else axis
        return DualTensor(op([with_rows(t, rows) for t in tensors], at(dim)))

    return push


enter(_joined(torch.cat), "cat", "concat", "concatenate")
enter(_joined(torch.stack), "stack")


def _stacked(op: Any) -> Callable[..., Any]:
    def push(tensors: Any) -> Any:
        rows = rows_of(*tensors)
        return DualTensor(torch.func.vmap(lambda *parts: op(parts))(*(with_rows(t, rows) for t in tensors)))

    return push


for _name in ("hstack", "vstack", "dstack", "row_stack"):
    enter(_stacked(getattr(torch, _name)), _name)


@rule("column_stack")
def _column_stack(tensors: Any) -> Any:
    return torch.cat([t.reshape(t.shape[0], -1) if t.ndim < 2 else t for t in tensors], dim=1)


# ------------------------------------------------------------------------------------------------------------- indexing


def _index(index: Any) -> tuple[Any, int] | None:
    """The same index behind a full slice of the rows, and where the rows end up; None where that is not plain."""
    items = index if isinstance(index, tuple) else (index,)
    # Ints are applied before tensors are told apart, 0-dim tensors count as ints, and "..." may cover nothing: where that could
    # matter each row is indexed by itself.
    if any(isinstance(i, (DualTensor, bool)) or (isinstance(i, Tensor) and i.ndim == 0) for i in items):
        return None
    advanced = [
        n for n, i in enumerate(items) if isinstance(i, (Tensor, list, range)) or hasattr(i, "__array__")
    ]
    if not advanced or advanced[-1] - advanced[0] < len(advanced):
        return (slice(None), *items), 0
    if not all(isinstance(i, slice) for n, i in enumerate(items) if n not in advanced):
        return None
    # Apart from each other: the axes that they make together go to the front, before the rows.
    joint = [torch.as_tensor(items[n]) for n in advanced]
    if any(i.dtype == torch.bool for i in joint):
        return None
    return (slice(None), *items), len(torch.broadcast_shapes(*(i.shape for i in joint)))


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
        for number, row in enumerate(input.buffer.unbind()):
            row[index] = (
                value.buffer[number] if isinstance(value, DualTensor) else value if number == 0 else 0
            )
        return input
    behind, place = found
    if isinstance(value, DualTensor):
        ndim = input.buffer[behind].ndim - 1
        source = aligned(value, ndim)
        while (
            source.ndim - 1 > ndim and source.shape[1] == 1
        ):  # leading axes of size 1 are allowed to be too many
            source = source.squeeze(1)
        input.buffer[behind] = source.movedim(0, place)
    else:
        input.buffer[behind] = 0
        input.buffer[0][behind[1:]] = value
    return input  # never seen: an assignment has no value


def _index_op(name: str) -> Callable[..., Any]:
    """scatter, index_add and their like, of a dual or a plain source into a dual: the same on each row, the index repeated."""
    op = getattr(torch, name)

    def push(input: Any, dim: int, index: Tensor, source: Any = None, **kwargs: Any) -> Any:
        source = kwargs.pop("src", source)
        if (
            not isinstance(source, Tensor)
            or any_dual(*kwargs.values())
            or set(kwargs) - {"alpha"}
            or ndim_of(input) == 0
        ):
            return NotImplemented
        rows = rows_of(input, source)
        where = index.expand(rows, *index.shape) if name.startswith("scatter") else index
        return DualTensor(op(with_rows(input, rows), at(dim), where, with_rows(source, rows), **kwargs))

    return push


for _name in ("scatter", "scatter_add", "index_add", "index_copy"):
    enter(_index_op(_name), _name)
    enter(in_place_of(_index_op(_name)), f"{_name}_")


@rule("masked_select")
def _masked_select(input: Any, mask: Tensor) -> Any:
    return (
        DualTensor(input.buffer[:, mask])
        if isinstance(input, DualTensor) and mask.shape == input.shape
        else NotImplemented
    )


@rule("broadcast_tensors")
def _broadcast_tensors(*tensors: Any) -> Any:
    operands = _listed(tensors)
    shape = torch.broadcast_shapes(*(t.shape for t in operands))
    return tuple(t.expand(shape) for t in operands)


@rule("meshgrid")
def _meshgrid(*tensors: Any, indexing: str = "ij") -> Any:
    axes = _listed(tensors)
    if any(t.ndim != 1 for t in axes) or indexing not in ("ij", None):
        return NotImplemented
    shape = [t.shape[0] for t in axes]
    return tuple(
        t.reshape([-1 if i == j else 1 for j in range(len(axes))]).expand(shape) for i, t in enumerate(axes)
    )


def _listed(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors


# ---------------------------------------------------------------------------------------------------- copies and types


@rule("Tensor.copy_")
def _copy(input: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(input, DualTensor):
        return NotImplemented
    if isinstance(source, DualTensor):
        input.buffer.copy_(aligned(source, ndim_of(input)))
    else:
        input.buffer[1:].zero_()
        input.buffer[0].copy_(source)
    return input


@rule("zero_", "fill_")
def _fill(input: DualTensor, value: Any = 0) -> Any:
    if isinstance(value, DualTensor):
        return _copy(input, value)
    input.buffer[1:].zero_()
    input.buffer[0].fill_(value)
    return input


def _drawn(op: Any) -> Callable[..., Any]:
    def push(input: Any, *args: Any, **kwargs: Any) -> Any:
        # filled with numbers that do not depend on the input
        if not isinstance(input, DualTensor) or any_dual(*args, *kwargs.values()):
            return NotImplemented
        op(input.buffer[0], *args, **kwargs)
        input.buffer[1:].zero_()
        return input

    return push


for _name in (
    "normal_",
    "uniform_",
    "bernoulli_",
    "random_",
    "exponential_",
    "cauchy_",
    "log_normal_",
    "geometric_",
):
    enter(_drawn(getattr(torch.Tensor, _name)), f"Tensor.{_name}")


@rule("clone")
def _clone(input: DualTensor, *, memory_format: torch.memory_format = torch.preserve_format) -> DualTensor:
    return DualTensor(_in_format(input.buffer, memory_format, copy=True))


@rule("Tensor.contiguous")
def _contiguous(
    input: DualTensor, memory_format: torch.memory_format = torch.contiguous_format
) -> DualTensor:
    return (
        input
        if input.is_contiguous(memory_format=memory_format)
        else _clone(input, memory_format=memory_format)
    )


def _in_format(buffer: Tensor, memory_format: torch.memory_format, *, copy: bool) -> Tensor:
    if memory_format in (torch.preserve_format, torch.contiguous_format):
        return buffer.clone(memory_format=memory_format) if copy else buffer.contiguous()
    folded = buffer.flatten(0, 1)  # channels_last is a format of 4 axes: of the rows folded into the batch
    folded = (
        folded.clone(memory_format=memory_format) if copy else folded.contiguous(memory_format=memory_format)
    )
    return folded.unflatten(0, (buffer.shape[0], -1))


@rule("Tensor.to")
def _to(input: Any, *args: Any, memory_format: Any = None, **kwargs: Any) -> Any:
    args = tuple(primal_of(a) for a in args)
    kwargs = {key: primal_of(value) for key, value in kwargs.items()}
    if not isinstance(input, DualTensor):
        return input.to(*args, **kwargs)
    buffer = input.buffer.to(*args, **kwargs)
    if not (buffer.is_floating_point() or buffer.is_complex()):
        return buffer[0]
    if memory_format is not None and memory_format is not torch.preserve_format:
        buffer = _in_format(buffer, memory_format, copy=False)
    return input if buffer is input.buffer else DualTensor(buffer)


def _cast(op: Any) -> Callable[..., Any]:
    def push(input: DualTensor, *args: Any, **kwargs: Any) -> DualTensor:
        buffer = op(input.buffer, *args, **kwargs)
        return input if buffer is input.buffer else DualTensor(buffer)

    return push


for _name in ("float", "double", "half", "bfloat16", "cfloat", "cdouble", "cpu", "cuda"):
    enter(_cast(getattr(torch.Tensor, _name)), f"Tensor.{_name}")


@rule("Tensor.type_as")
def _type_as(input: Any, other: Tensor) -> Any:
    return _to(input, dtype=other.dtype, device=other.device)


@rule("Tensor.type")
def _type(input: DualTensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:
        return input.primal.type()
    return _to(input, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


# -------------------------------------------------------------------- new tensors, which the model may write duals to


def _made_like(op: Any) -> Callable[..., Any]:
    def push(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, DualTensor) or any_dual(*args, *kwargs.values()):
            return NotImplemented
        value = op(input.primal, *args, **kwargs)
        return DualTensor(with_rows(value, input.buffer.shape[0])) if value.is_floating_point() else value

    return push


for _op in named(
    *"zeros_like ones_like empty_like full_like Tensor.new_zeros Tensor.new_ones Tensor.new_empty Tensor.new_full".split()
):
    MADE_LIKE.add(_op)
    RULES[_op] = _made_like(_op)
