"""Torch's ops by name, and what a pass must know of them: which ask, draw, leave torch, or write, and where."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import FrameType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor

NAMESPACES = {
    "torch": torch,
    "Tensor": torch.Tensor,
    "F": F,
    "nn": torch._C._nn,
    "special": torch.special,
    "linalg": torch.linalg,
    "fft": torch.fft,
    "higher_order": torch.ops.higher_order,
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
        "shape dtype device layout ndim requires_grad is_leaf grad grad_fn is_cuda is_cpu is_sparse is_quantized "
        "is_mkldnn is_meta is_mps is_xpu is_xla is_nested names itemsize nbytes _version _base output_nr retains_grad "
        "_backward_hooks size dim ndimension stride numel nelement element_size is_contiguous __len__ __hash__ "
        "storage_offset _is_view is_shared is_pinned __repr__ has_names"
    ),
    *ops_named(
        "is_floating_point is_complex is_signed numel is_inference is_same_size get_device result_type can_cast "
        "is_conj is_neg _is_zerotensor"
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
        " sign signbit floor ceil round trunc fix floor_divide nonzero count_nonzero searchsorted bucketize"
        " histc rand_like randn_like randint_like bernoulli multinomial one_hot is_nonzero poisson"
        " isreal argwhere nonzero_static linalg.matrix_rank"
        # piecewise constant as it runs; the gradient that torch gives it is a surrogate
        " fused_moving_avg_obs_fake_quant"
    ),
    *_of_tensor(
        "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __bool__ __contains__ __floordiv__ __rfloordiv__ __and__ __or__"
        " __invert__ long int short char byte bool"
    ),
}

#: Ops whose result is so in their first argument alone (in a weight or a scale it is linear).
CONSTANT_IN_FIRST = {
    *ops_named("bincount heaviside heaviside_ fake_quantize_per_tensor_affine fake_quantize_per_channel_affine")
}

#: Ops that stop a gradient.  What they put out is what they take in, so its derivative passes through them.
DETACHES = {*ops_named("detach"), *_of_tensor("detach_ data requires_grad_"), torch.ops.aten.detach.default}

#: Ops that take numbers out of torch: no derivative can follow them there.
ESCAPES = {
    *_of_tensor(
        "item tolist numpy __array__ __float__ __int__ __index__ __complex__ __format__ __dlpack__ data_ptr storage "
        "untyped_storage"
    ),
    torch.ops.aten._local_scalar_dense.default,
}

#: Ops that take a second tensor for its shape, type or device alone.
TAKES_A_SHAPE = {*ops_named("type_as expand_as view_as reshape_as resize_as resize_as_"), *_of_tensor("to")}

#: Ops that put out one tensor for each that they take, or a permutation beside what has a derivative.
ONE_FOR_EACH = {*ops_named("broadcast_tensors meshgrid atleast_1d atleast_2d atleast_3d linalg.lu lu_unpack")}

#: Ops whose rules take a deferred tensor (:meth:`DualTensor.deferred`) as it is; every other op has it built first.
TAKES_DEFERRED = {*ops_named("F.batch_norm torch.batch_norm")}

_OF_A_SCHEMA = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_NOT_IN_PLACE = {"__invert__", "__index__", "__int__", "__iter__"}


@functools.cache
def meaning_of(func: Any) -> Any:
    """The op by which these sets know ``func``: of an aten op, which comes from C++, the one of its name in Python."""
    if not isinstance(func, _OF_A_SCHEMA) or func in DETACHES | ESCAPES:
        return func
    space, _, name = str(func).partition(".")
    name = name.split(".")[0]
    return getattr(torch.Tensor, name, getattr(torch, name, func)) if space == "aten" else func


#: NumPy's names for arguments, which torch's own parser takes for its own in every op written in C++
#: (``numpy_compatibility_arg_names`` in torch/csrc/utils/python_arg_parser.cpp).
_NUMPY = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}


def in_torchs_spelling(func: Any, kwargs: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The arguments by torch's names, where they came by NumPy's; ``known`` are names that are meant as they are."""
    if inspect.isfunction(func) or not any(name in _NUMPY and name not in known for name in kwargs):
        return kwargs
    return {name if name in known else _NUMPY.get(name, name): value for name, value in kwargs.items()}


#: Functions whose check for overrides hands on all arguments but one.
LEFT_OUT = {F.l1_loss: "weight", torch.chain_matmul: "out"}


def as_called(func: Any, kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The keywords, with the one that torch itself leaves out on the way: it stands in the function's own frame."""
    kwargs, name = kwargs or {}, LEFT_OUT.get(func)
    if name is None or name in kwargs:
        return kwargs
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not func.__code__:
        frame = frame.f_back
    return kwargs if frame is None or name not in frame.f_locals else {**kwargs, name: frame.f_locals[name]}


def is_constant(known: Any, args: Any, kwargs: Any, carries: Callable[[Any], bool]) -> bool:
    """Whether the result has the derivative zero: by steps, or because it takes no more than a shape, type or device.

    ``carries`` says which arguments carry a derivative.
    """
    further = any(map(carries, [*args[1:], *(value for name, value in kwargs.items() if name != "input")]))
    if known in MADE_LIKE or known in CONSTANT_IN_FIRST or known is torch.Tensor.new_tensor:
        return not further
    return known in CONSTANT or (known in TAKES_A_SHAPE and not carries(args[0]))


def reads_bits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the op shows a floating tensor's bits as whole numbers, as ``h.view(torch.int32)`` does."""
    if meaning_of(func) is not torch.Tensor.view:
        return False
    dtypes = [a for a in (*args[1:], *(kwargs or {}).values()) if isinstance(a, torch.dtype)]
    return any(not (dtype.is_floating_point or dtype.is_complex) for dtype in dtypes)


def mutates(func: Any, args: Any = (), kwargs: Any = None) -> bool:
    """Whether the op writes to its first argument."""
    if isinstance(func, _OF_A_SCHEMA):
        return any(place == 0 for place, _ in _written(func))
    name = name_of(func)
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    if name.endswith("_") or (kwargs and kwargs.get("inplace")):
        return True
    place = inplace_at(func)
    return place is not None and len(args) > place and bool(args[place])


@functools.cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """(place, name) of every argument that an op with a schema writes to."""
    if isinstance(func, torch._ops.OpOverloadPacket):
        func = getattr(func, func.overloads()[0])
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


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


def smooth(value: Any) -> bool:
    """Whether it is a tensor that can have a derivative."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


@functools.cache
def body_of(func: Any) -> Callable[..., Any] | None:
    """A Python function of torch without its check for overrides: its body then runs op by op; None for others."""
    if not inspect.isfunction(func):
        return None
    checks = {name: _never for name in func.__code__.co_names if name.startswith("has_torch_function")}
    if not checks:
        return None
    opened = FunctionType(
        func.__code__, {**func.__globals__, **checks}, func.__name__, func.__defaults__, func.__closure__
    )
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened


def _never(*_: Any) -> bool:
    return False


_OF_ARGUMENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "F.cross_entropy F.nll_loss F.linear_cross_entropy": lambda given: given.get("weight"),
    "F.soft_margin_loss": lambda given: given.get("target"),
    "F.embedding": lambda given: None if given.get("max_norm") is None else given["weight"],
    "cov": lambda given: given.get("aweights"),
}
#: ops → of the arguments by name, the one that torch takes for a constant in forward mode
DROPPED = {op: argument for names, argument in _OF_ARGUMENTS.items() for op in ops_named(names)}


def refuse_dropped(func: Any, args: Any, kwargs: Any, carries: Callable[[Any], bool]) -> None:
    """Raise where an argument that torch drops the derivative of carries one."""
    if func in DROPPED:
        names = list(inspect.signature(func).parameters) if inspect.isfunction(func) else ["input"]
        if carries(DROPPED[func](dict(zip(names, args, strict=False)) | kwargs)):
            raise ProbeError(
                f"torch drops the derivative of {name_of(func)!r} by one of its arguments (a class weight, a target, a"
                " table that max_norm= rescales), and here it depends on the input: any engine would read it as zero.\n"
                "Write this op out in the model with elementwise ones."
            )


def _takes_for_a_number(func: Any, args: Any, kwargs: Any, carries: Callable[[Any], bool]) -> bool:
    """Whether torch reads one of the tensors that carry a derivative as a plain number (alpha=, a slope, a bound).

    It does so of 0-dim ones without a graph, and its parser refuses those with one: asked here without any numbers.
    """
    leaves, spec = tree_flatten((args, kwargs))
    if not any(smooth(a) and a.ndim == 0 and carries(a) for a in leaves):
        return False
    shadows = [
        a
        if not isinstance(a, Tensor)
        else _NUMBERS[a.dtype]
        if smooth(a) and a.ndim == 0 and carries(a)
        else torch.empty(a.shape, dtype=a.dtype, device="meta")
        for a in leaves
    ]
    shadow_args, shadow_kwargs = tree_unflatten(shadows, spec)
    try:
        func(*shadow_args, **shadow_kwargs)
    except TypeError:
        return True
    except Exception:  # there is more to the op than shapes
        pass
    return False


_NUMBERS = {
    dtype: torch.empty((), dtype=dtype, device="meta", requires_grad=True)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
}


def unfollowable(func: Any, args: Any, kwargs: Any, carries: Callable[[Any], bool]) -> ProbeError | None:
    """The error for an op that no derivative can follow; None for the others.

    ``carries`` says which arguments carry a derivative.
    """
    if meaning_of(func) in ESCAPES or reads_bits(func, args, kwargs):
        return ProbeError(
            f".{name_of(func)}() takes numbers that depend on the input out of torch, or reads their bits: what the "
            "model computes from them has no derivative, in any engine.\n"
            "Keep the value a floating tensor: write  x * y.max()  for  x * y.max().item()"
        )
    if isinstance(func, _OF_A_SCHEMA):
        for place, name in _written(func):
            if place > 0 or not _has_a_derivative(func):
                return ProbeError(
                    f"the op {name_of(func)!r} writes its result into its argument {name!r}, where no derivative can "
                    "follow it, in any engine.\n"
                    "Let it return the result:  custom_op(..., mutates_args=()) with register_autograd; or call it in "
                    "a torch.autograd.Function with a backward"
                )
    if _takes_for_a_number(func, args, kwargs, carries):
        return ProbeError(
            f"the op {name_of(func)!r} takes a tensor that depends on the input for a plain number (alpha=, a slope, a "
            "fill): torch drops its derivative, in any engine.\n"
            "Write the op out with tensors:  x + alpha * y  for  torch.add(x, y, alpha=alpha)"
        )
    return None


@functools.cache
def _has_a_derivative(func: Any) -> bool:
    """Whether an op in place tells autograd what it does: of the others torch leaves the derivative as it was."""
    name = torch._ops.OpOverload.name(func) if isinstance(func, torch._ops.OpOverload) else func._qualified_op_name
    keys = ("CompositeImplicitAutograd", "Autograd", "AutogradCPU", "AutogradCUDA")
    known = any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)
    return name.startswith("aten::") or (known and name.split(".")[0] not in torch._library.custom_ops.OPDEFS)
