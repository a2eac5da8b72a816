"""What the type of a thing says about the state in it: whose it is, what holds it, how it is read and put back."""

from __future__ import annotations

import array
import contextlib
import contextvars
import functools
import importlib.util
import inspect
import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter, is_
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.identities import CONTAINERS, MISSING
from torchgeom_probe.shapes import Tensor

#: Packages whose objects are none of a model's own state, and may be at work in another thread; but for some that hold
#: what a model or a hook puts there.
_FRAMEWORKS = {*sys.stdlib_module_names, "torch", "torchvision", "lightning", "pytorch_lightning", "tqdm", "numpy"}
_FRAMEWORKS |= {"tensorboard", "torchgeom_probe", "jaxtyping", "beartype", "pytest", "_pytest"}
# Of files, networks, tables, formulas and pictures: a library's code leads there, and no pass computes with them.
_FRAMEWORKS |= {"huggingface_hub", "requests", "urllib3", "filelock", "packaging", "yaml", "psutil"}
_FRAMEWORKS |= {f"{name}{version}" for name in ("httpx", "httpcore") for version in ("", "2")}
_FRAMEWORKS |= {"matplotlib", "pandas", "sympy"}
_HOLDERS = (
    "types",
    "collections",
    "argparse",
    "queue",
    "weakref",
    "_weakrefset",
    "_thread",
    "torch.distributions",
    "torch.quasirandom",
)
#: Numbers of Python's own that are written to in place.
NUMBERS = (bytearray, array.array)
CALLABLES: tuple[Any, ...] = (
    types.MethodType,
    types.BuiltinMethodType,
    functools.partial,
    property,
    functools.cached_property,
    staticmethod,
    classmethod,
)
#: What these are made of.
WITHIN = ("__self__", "__func__", "func", "args", "keywords", "fget", "fset", "fdel")
Answer = TypeVar("Answer", bound=Callable[..., Any])


def remembered(function: Answer) -> Answer:
    """Answer once for each type, name or code; not for ever, for types may be made without end."""
    return functools.lru_cache(maxsize=4096)(function)  # type: ignore[return-value]


@remembered
def of_a_framework(module: str) -> bool:
    """Whether a module's things are not the user's."""
    return module.split(".")[0] in _FRAMEWORKS


@remembered
def holds_attributes(kind: type) -> bool:
    """Whether things of this type have attributes or slots of the user's."""
    holds = kind.__dictoffset__ or slots(kind) or kind.__module__ == "_thread"
    return bool(holds) and (not of_a_framework(kind.__module__) or kind.__module__.startswith(_HOLDERS))


@remembered
def own_classes(kind: type) -> list[type]:
    """The user's classes that a class is made of."""
    return [one for one in kind.__mro__ if not of_a_framework(one.__module__)]


@remembered
def base_of(kind: type) -> Any:
    """Which of the container types a type is one of."""
    return next(base for base in CONTAINERS if issubclass(kind, base))


@remembered
def slots(kind: type) -> list[str]:
    """The names of its slots, but for those in whose place a subclass has put something else."""
    slotted = [vars(one) for one in kind.__mro__ if "__slots__" in vars(one)]
    found = [(key, v) for members in slotted for key, v in members.items() if isinstance(v, types.MemberDescriptorType)]
    return [key for key, v in found if inspect.getattr_static(kind, key) is v]


def attributes_of(value: Any) -> dict[str, Any] | None:
    """A thing's own attributes, without a call of its class's code."""
    try:
        base = threading.local if isinstance(value, threading.local) else object
        attributes = base.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return attributes if isinstance(attributes, dict) else None


def resolved(imported: Iterable[str], package: str | None) -> list[str]:
    """The full names of modules that code of a package imports."""
    relative = package or "__main__"
    return [importlib.util.resolve_name(name, relative) for name in imported if package or not name.startswith(".")]


def is_plain(tensor: Tensor) -> bool:
    """Whether its numbers lie in memory as its shape and strides say, and its class has no ideas of its own."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested


def parts(tensor: Tensor) -> list[Tensor]:
    """Plain tensors in whose memory its numbers lie: itself; of another kind (nested, a subclass) others, or none."""
    if is_plain(tensor):
        return [tensor]
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad(), contextlib.suppress(Exception):
        whole = tensor.detach()
        if whole.is_nested:
            found = list(whole.unbind())
        elif whole.layout in (torch.sparse_csr, torch.sparse_bsr):
            found = [whole.crow_indices(), whole.col_indices(), whole.values()]
        elif whole.layout in (torch.sparse_csc, torch.sparse_bsc):
            found = [whole.ccol_indices(), whole.row_indices(), whole.values()]
        else:
            found = [whole.as_subclass(Tensor)] if whole.data_ptr() else []
        return [part for part in found if is_plain(part)]
    return []


def putter(tensor: Tensor) -> Callable[[], None]:
    """What makes a sparse tensor what it is now."""
    numbers, version = tensor.detach().clone(), tensor._version

    def put() -> None:
        if tensor._version != version:
            with _disable_current_modes(), torch.no_grad():
                tensor.copy_(numbers)
            torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))

    return put


def let_learn(tensors: list[Tensor], learn: list[bool]) -> None:
    """Say again which tensors require a gradient; what a pass with gradients has written to is made a leaf.

    Raises:
        ProbeError: it is a view of a tensor that was written to, and has a graph of its own.
    """
    for tensor, learns in zip(tensors, learn, strict=True):
        if tensor.requires_grad is learns:
            continue
        try:
            for one in (tensor, tensor._base):  # a view asks the tensor that it is a view of
                if one is not None and one.requires_grad is not learns:
                    if not learns and not one.is_leaf:
                        one.detach_()
                    one.requires_grad_(learns)
        except RuntimeError as error:
            raise ProbeError(
                f"the forward pass writes what depends on the input to a view of {list(tensor.shape)}, which cannot be "
                "put back.\n"
                "Write under torch.no_grad(), or to the tensor that it is a view of"
            ) from error


def memory(tensor: Tensor) -> Tensor:
    """What lies in memory of a tensor: not conjugated, without the axes along which it only repeats (``expand``)."""
    if tensor.is_conj():
        tensor = tensor.conj()
    if tensor.is_neg():
        tensor = tensor._neg_view()
    if tensor.layout is not torch.strided or 0 not in tensor.stride():
        return tensor
    return tensor[tuple(slice(None if step else 1) for step in tensor.stride())]


def is_iterator(kind: type) -> bool:
    """Whether it is a generator, or one of Python's own iterators but a count, whose place is in no attribute."""
    return issubclass(kind, Iterator) and kind.__module__ in ("builtins", "itertools") and kind is not itertools.count


def position(value: Any) -> Any:
    """What tells where an iterator or generator stands."""
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        return frame and (frame.f_lasti, *((name, id(local)) for name, local in frame.f_locals.items()))
    if isinstance(value, Iterator) and hasattr(value, "__reduce__"):
        with contextlib.suppress(TypeError):  # since Python 3.14 those of itertools do not say it
            return position(value.__reduce__()[1:])
    if isinstance(value, tuple):
        return tuple(map(position, value)) if len(value) < 8 else len(value)
    return value if isinstance(value, int) else len(value) if isinstance(value, (list, str, bytes)) else None


def set_position(iterator: Any, before: Any) -> None:
    """Put an iterator back to a place of :func:`position`.

    Raises:
        ProbeError: it has moved, and does not go back.
    """
    if position(iterator) == before:
        return
    if hasattr(iterator, "__setstate__") and isinstance(before[-1], int):
        iterator.__setstate__(before[-1])
    if position(iterator) != before:
        raise ProbeError(
            f"the forward pass takes from an iterator ({type(iterator).__name__}) that cannot be put back, so a "
            "measurement would use up what is the training's.\n"
            "Keep a list and the place in it instead:  self.at += 1; self.items[self.at]"
        )


def differ(tensor: Tensor, copy: Tensor) -> bool:
    """Whether a tensor lies or is otherwise than its copy."""
    same = tensor.shape == copy.shape and tensor.dtype == copy.dtype and tensor.device == copy.device
    return not same or tensor.is_inference()


def versions(tensors: list[Tensor]) -> list[int]:
    """How often each was written to; -1 where nobody counts."""
    try:
        return list(map(attrgetter("_version"), tensors))
    except RuntimeError:  # tensors of inference mode have none
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def put_numbers(tensors: list[Tensor], numbers: list[Tensor], versions_then: list[int], *, plain: bool) -> None:
    """Copy numbers back to where they lay; ``plain``: :func:`memory` of each is itself.

    Through .data, and the versions set back: a backward pass that the user has still to make is untouched.
    """
    kept = list(zip(tensors, numbers, versions_then, strict=True))
    counted = [(tensor, own) for tensor, own, version in kept if version >= 0]
    moved = [(tensor, version) for tensor, _, version in kept if version >= 0 and tensor._version != version]
    with _disable_current_modes(), torch.no_grad():
        if counted:  # torch takes no empty list
            into = [tensor.data if plain else memory(tensor.data) for tensor, _ in counted]
            torch._foreach_copy_(into, [own for _, own in counted])
        for tensor, version in moved:
            torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
        for tensor, own in [(tensor, own) for tensor, own, version in kept if version < 0]:
            with torch.inference_mode():
                memory(tensor).copy_(own)


def value_of(variable: contextvars.ContextVar[Any]) -> Any:
    """What a context variable holds here, or MISSING."""
    try:
        return variable.get()
    except LookupError:  # nothing yet, and no default
        return MISSING


def put_value(variable: contextvars.ContextVar[Any], value: Any) -> None:
    """Make a context variable what it was; one that held nothing cannot be emptied."""
    if value is not MISSING and value_of(variable) is not value:
        variable.set(value)


def same_content(container: Any, content: Any) -> bool:
    """Whether a container holds what it held, in the same order."""
    if len(container) != len(content):
        return False
    base = base_of(type(container))
    same = all(map(is_, base.__iter__(container), content))
    return same and (not isinstance(container, dict) or all(map(is_, base.values(container), content.values())))
