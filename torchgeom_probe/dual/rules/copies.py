"""Copies, fills, changes of type, and new tensors, which the model may write duals to."""

from __future__ import annotations

from typing import Any

import torch

from torchgeom_probe.dual.ops import CONSTANT_IN_FIRST, MADE_LIKE
from torchgeom_probe.dual.passes import followed
from torchgeom_probe.dual.registry import aligned, any_dual, ndim_of, primal_of, register, rule, rule_of_each, with_rows
from torchgeom_probe.dual.tensor import RULES, DualTensor, Rule
from torchgeom_probe.errors import EngineRefusal
from torchgeom_probe.shapes import Tensor


@rule("Tensor.copy_")
def _copy(input: Any, other: Any, non_blocking: bool = False) -> Any:
    if not isinstance(input, DualTensor):
        return NotImplemented
    if isinstance(other, DualTensor):
        input.buffer.copy_(aligned(other, ndim_of(input)))
    else:
        input.buffer[1:].zero_()
        input.buffer[0].copy_(other)
    return input


@rule("zero_ fill_")
def _fill(input: Any, value: Any = 0) -> Any:
    if not isinstance(input, DualTensor):
        return NotImplemented
    if isinstance(value, DualTensor):
        return _copy(input, value)
    input.buffer[1:].zero_()
    input.buffer[0].fill_(value)
    return input


@rule_of_each(
    "Tensor.normal_ Tensor.uniform_ Tensor.bernoulli_ Tensor.random_ Tensor.exponential_ Tensor.cauchy_"
    " Tensor.log_normal_ Tensor.geometric_ logical_not_ logical_and_ logical_or_ logical_xor_ Tensor.eq_ Tensor.ne_"
    " Tensor.lt_ Tensor.le_ Tensor.gt_ Tensor.ge_ Tensor.not_equal_ Tensor.less_ Tensor.less_equal_ Tensor.greater_"
    " Tensor.greater_equal_ Tensor.floor_divide_ Tensor.__ifloordiv__ Tensor.heaviside_ Tensor.sign_ floor_ ceil_"
    " round_ trunc_ fix_"
)
def _constant_in_place(op: Any) -> Rule:
    def push(input: Any, *args: Any, **kwargs: Any) -> Any:
        # filled with numbers that do not depend on the input, or only in steps
        if not isinstance(input, DualTensor) or (op in CONSTANT_IN_FIRST and any_dual(*args, *kwargs.values())):
            return NotImplemented
        value = input.buffer.detach()  # which shares its memory: the steps of a function have no gradient
        op(value[0], *map(primal_of, args), **{key: primal_of(value) for key, value in kwargs.items()})
        value[1:].zero_()
        return input if not followed() else _copy(input, value[0].clone())

    return push


@rule("torch.normal")
def _normal(mean: Any, std: Any = 1.0, size: Any = None, *, generator: Any = None) -> Any:
    # y = μ + σ ε, for the ε that was drawn:  y' = μ' + σ' ε
    if size is not None:
        return NotImplemented
    if followed():
        raise EngineRefusal(
            "torch gives torch.normal(mean, std) no gradient.\nWrite  mean + std * torch.randn_like(std)"
        )
    like = primal_of(mean if isinstance(mean, Tensor) else std)
    shape = torch.broadcast_shapes(*(x.shape for x in (mean, std) if isinstance(x, Tensor)))
    return mean + std * like.new_empty(shape).normal_(generator=generator)


@rule("clone")
def _clone(input: DualTensor, *, memory_format: torch.memory_format | None = None) -> DualTensor:
    return DualTensor(_in_format(input.buffer, memory_format or torch.preserve_format, copy=True))


register(lambda input, memo: _clone(input), "Tensor.__deepcopy__")


@rule("Tensor.contiguous")
def _contiguous(input: DualTensor, memory_format: torch.memory_format = torch.contiguous_format) -> DualTensor:
    if input.is_contiguous(memory_format=memory_format):
        return input
    return _clone(input, memory_format=memory_format)


def _in_format(buffer: Tensor, memory_format: torch.memory_format, *, copy: bool) -> Tensor:
    if memory_format in (torch.preserve_format, torch.contiguous_format):
        return buffer.clone(memory_format=memory_format) if copy else buffer.contiguous()
    rows = buffer.flatten(0, 1)  # channels_last is a format of 4 axes: of the rows folded into the batch
    rows = rows.clone(memory_format=memory_format) if copy else rows.contiguous(memory_format=memory_format)
    return rows.unflatten(0, buffer.shape[:2])


def _cast_to(input: DualTensor, buffer: Tensor, memory_format: torch.memory_format | None) -> Any:
    if not (buffer.is_floating_point() or buffer.is_complex()):
        return buffer[0]
    if memory_format not in (None, torch.preserve_format) and not input.is_contiguous(memory_format=memory_format):
        buffer = _in_format(buffer, memory_format, copy=False)
    return input if buffer is input.buffer else DualTensor(buffer)


@rule("Tensor.to")
def _to(input: Any, *args: Any, memory_format: Any = None, **kwargs: Any) -> Any:
    args = tuple(primal_of(a) for a in args)
    kwargs = {key: primal_of(value) for key, value in kwargs.items()}
    if not isinstance(input, DualTensor):
        return input.to(*args, memory_format=memory_format, **kwargs)
    return _cast_to(input, input.buffer.to(*args, **kwargs), memory_format)


@rule_of_each(*(f"Tensor.{name}" for name in "float double half bfloat16 chalf cfloat cdouble cpu cuda".split()))
def _cast(op: Any) -> Rule:
    return lambda input, *args, memory_format=None, **kwargs: _cast_to(
        input, op(input.buffer, *args, **kwargs), memory_format
    )


@rule("Tensor.new_tensor")
def _new_tensor(input: Any, data: Any, **kwargs: Any) -> Any:
    if not isinstance(data, DualTensor):
        return NotImplemented
    place = {"dtype": kwargs.get("dtype") or data.dtype, "device": kwargs.get("device") or input.device}
    return _to(data, **place, copy=True)


register(lambda input, other: _to(input, dtype=other.dtype, device=other.device), "Tensor.type_as")


@rule("Tensor.type")
def _type(input: DualTensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:
        return input.primal.type()
    return _to(input, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


def _made_like(op: Any) -> Rule:
    def push(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, DualTensor) or any_dual(*args, *kwargs.values()):
            return NotImplemented
        value = op(input.primal, *args, **kwargs)
        smooth = value.is_floating_point() or value.is_complex()
        return DualTensor(with_rows(value, input.buffer.shape[0])) if smooth else value

    return push


RULES.update({_op: _made_like(_op) for _op in MADE_LIKE})
