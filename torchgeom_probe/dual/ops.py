"""Torch's ops by name, and what a dual pass must know of them: which ask, detach, leave torch or write in place."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F

NAMESPACES = {
    "torch": torch,
    "Tensor": torch.Tensor,
    "F": F,
    "nn": torch._C._nn,
    "special": torch.special,
    "linalg": torch.linalg,
    "fft": torch.fft,
    "VF": torch._C._VariableFunctions,  # what torch's functions of Python call with a list of tensors
}


def ops_named(*names: str) -> list[Any]:
    """Every op of torch by these names, in all its namespaces, or in one: ``Tensor.add``, ``F.relu``.

    A string may hold several names.  A property of Tensor stands for its ``__get__``: what an access arrives as.
    """
    found = []
    for name in " ".join(names).split():
        space, _, tail = name.rpartition(".")
        for holder in [NAMESPACES[space]] if space else NAMESPACES.values():
            attribute = getattr(holder, tail, None)
            found.append(attribute if callable(attribute) else getattr(attribute, "__get__", None))
    return [op for op in found if op is not None]


def _of_tensor(names: str) -> list[Any]:
    return ops_named(*(f"Tensor.{name}" for name in names.split()))


#: Ops that ask about a tensor (shape, device, …) and never touch its numbers.
METADATA = {
    *_of_tensor(
        "shape dtype device layout ndim requires_grad is_leaf grad grad_fn is_cuda is_cpu is_sparse is_quantized"
        " is_mkldnn is_meta is_mps is_xpu is_xla is_nested names itemsize nbytes _version _base output_nr retains_grad"
        " _backward_hooks size dim ndimension stride numel nelement element_size is_contiguous __len__ __hash__"
        " storage_offset _is_view is_shared is_pinned __repr__ has_names"
    ),
    *ops_named(
        "is_floating_point is_complex is_signed numel is_inference is_same_size get_device result_type can_cast"
        " is_conj is_neg _is_zerotensor"
    ),
}

#: Ops that make a tensor by another's shape, type and device.
MADE_LIKE = {
    *ops_named("zeros_like ones_like empty_like full_like"),
    *_of_tensor("new_zeros new_ones new_empty new_full"),
}

#: Ops whose result is piecewise constant in the input (comparisons, argmax, random fills): its derivative IS zero.
CONSTANT = {
    *ops_named(
        "eq ne lt le gt ge equal greater greater_equal less less_equal not_equal isnan isinf isfinite isposinf"
        " isneginf isclose allclose isin logical_and logical_or logical_not logical_xor any all argmax argmin argsort"
        " sign signbit floor ceil round trunc fix floor_divide heaviside nonzero count_nonzero searchsorted bucketize"
        " bincount histc rand_like randn_like randint_like bernoulli multinomial one_hot is_nonzero isreal argwhere"
        " nonzero_static linalg.matrix_rank"
    ),
    *_of_tensor(
        "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __bool__ __contains__ __floordiv__ __rfloordiv__ __and__ __or__"
        " __invert__ long int short char byte bool new_tensor"
    ),
}

#: Ops that detach a tensor from its derivative on purpose.
DETACHES = {*ops_named("detach"), *_of_tensor("detach_ data")}

#: Ops that take numbers out of torch: no derivative can follow them there.
ESCAPES = {
    *_of_tensor(
        "item tolist numpy __array__ __float__ __int__ __index__ __complex__ __format__ __dlpack__ data_ptr storage"
        " untyped_storage"
    )
}

#: Ops whose rules take a deferred tensor (:meth:`DualTensor.deferred`) as it is; every other op has it built first.
TAKES_DEFERRED = {*ops_named("F.batch_norm torch.batch_norm")}

_NOT_IN_PLACE = {"__invert__", "__index__", "__int__", "__iter__"}


def mutates(func: Any, args: Any = (), kwargs: Any = None) -> bool:
    """Whether the op writes to its first argument."""
    schema = getattr(func, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = name_of(func)
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    if name.endswith("_") or (kwargs and kwargs.get("inplace")):
        return True
    place = inplace_at(func)
    return place is not None and len(args) > place and bool(args[place])


@functools.cache
def inplace_at(func: Any) -> int | None:
    """Where ``inplace`` stands among a function's arguments: modules such as nn.ELU pass it by position."""
    if not inspect.isfunction(func):
        return None
    try:
        names = list(inspect.signature(func).parameters)
    except ValueError:  # a wrapper of something written in C
        return None
    return names.index("inplace") if "inplace" in names else None


def name_of(func: Any) -> str:
    """Return the op's name, as a user would write it."""
    name = getattr(func, "__name__", None) or str(func)
    if name == "__get__":  # a property, such as Tensor.data
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name
