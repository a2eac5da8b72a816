"""When a recording is valid: what the pass depended on, sealed by identity, and what cannot be sealed.

The state that a measurement keeps (``model/state.py``) is everything that leads on from the model: attributes,
containers, objects, closures, defaults, classes, and the global names that its functions read.  Sealed are the
identities of all of it, what kind of tensors its tensors are, the code of torch's own modules, and torch's switches.
"""

from __future__ import annotations

import enum
import functools
import logging
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import nn

from torchgeom_probe.jacobian.replay.recorder import Ran, Refused
from torchgeom_probe.model.identities import MISSING, Identities
from torchgeom_probe.model.said import names_in
from torchgeom_probe.model.state import State, followed
from torchgeom_probe.shapes import Tensor

#: Packages whose code depends on its arguments alone, or on what is sealed besides.
_TRUSTED = {"torch", "numpy", "jaxtyping", "beartype", "typing_extensions", "functools", "typing", "contextlib", "enum"}
_TRUSTED |= {
    "collections",
    "abc",
    "types",
    "copy",
    "operator",
    "dataclasses",
    "numbers",
    "math",
    "itertools",
    "inspect",
}
_TRUSTED |= {"string", "re", "weakref", "_weakrefset", "importlib", "warnings", "builtins", "_operator", "_functools"}
_TRUSTED |= {"_collections", "_abc", "_weakref", "cmath"}
_OUR_ROOMS = tuple(f"torchgeom_probe.{room}" for room in ("dual", "errors", "jacobian", "linalg", "model"))
#: Functions of C that read what is no tensor's shape, or lead to what nothing here can follow, or say something.
_REFUSED = {"open", "input", "print", "eval", "exec", "compile", "__import__", "globals", "id", "hash"}
_REFUSED |= {"tolist", "numpy", "data_ptr", "_to_dlpack", "get_rng_state", "initial_seed", "_cdata"}
#: Names in code that read of a tensor what has no part in the seal.
_UNSEALED = {
    "_version",
    "grad",
    "grad_fn",
    "is_leaf",
    "data_ptr",
    "untyped_storage",
    "storage",
    "__cuda_array_interface__",
}
#: Functions that may read an attribute whose name no code says.
_BY_NAME = {"getattr", "vars", "dir", "__getattribute__", "attrgetter", "methodcaller"}

_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type(...), type(NotImplemented), enum.Enum,
    np.generic, np.dtype, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.finfo,
    torch.iinfo, types.ModuleType, types.BuiltinFunctionType, types.WrapperDescriptorType,
    types.MethodDescriptorType, types.CodeType, type, nn.Parameter, types.GetSetDescriptorType,
    types.MemberDescriptorType, types.MethodWrapperType, types.ClassMethodDescriptorType, logging.Logger,
    torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops._OpNamespace, torch._ops._Ops,
)  # fmt: skip
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_KIND = attrgetter("dtype", "shape", "device", "requires_grad", "layout")


class Seal:
    """Everything that a recorded pass depended on, as it was before that pass.

    Args:
        state: what leads on from the model, kept before the pass.
        ran: the code that ran in it.

    Raises:
        Refused: something that cannot be sealed.
    """

    def __init__(self, state: State, ran: Ran) -> None:
        if not (state.whole and state.light):
            raise Refused("holds more than is followed, or what belongs to a graph")
        self.state = state
        modules = list(state.model.modules())
        _refuse_hooks(modules)
        users = _untrusted(ran)
        _refuse_unknown(users, ran, state)
        self._code = Identities()
        for kind in {
            kind for module in modules for kind in type(module).__mro__ if kind.__module__.startswith("torch.")
        }:
            self._code.container(types.MappingProxyType, vars(kind))
        for code, outside in ran.codes.items():
            if not _home(outside).startswith(_OUR_ROOMS):
                _names_sealed(self._code, outside, code.co_names, code in users)
        names = {name for code in users for name in _words(code)}
        by_name = any(name in _BY_NAME for code in users for _, name, _ in ran.builtins.get(code, ()))
        if by_name:
            _refuse_modules_by_name(users)
        _refuse_opaque(state, modules, names, by_name)
        self._tensors = list(readable(state).values())
        self._kinds = list(map(_KIND, self._tensors))
        self._strided = [tensor for tensor in self._tensors if tensor.layout is torch.strided]
        self._lie = _lying(self._strided)
        self._types = list(map(type, self._tensors))
        if any(kind not in (Tensor, nn.Parameter) for kind in self._types):
            raise Refused("holds tensors of a class of its own")
        #: where a CUDA graph would read them
        self._on_gpu = [tensor for tensor in self._tensors if tensor.is_cuda]
        self._pointers = [tensor.data_ptr() for tensor in self._on_gpu]
        self._switches = _switches()

    def holds(self) -> bool:
        """Whether all of it is as it was; modules' own ``training`` as in the pass."""
        return (
            self._switches == _switches()
            and self.state.identities.hold()
            and self._code.hold()
            and list(map(_KIND, self._tensors)) == self._kinds
            and _lying(self._strided) == self._lie
            and list(map(type, self._tensors)) == self._types
            and [tensor.data_ptr() for tensor in self._on_gpu] == self._pointers
        )


def _lying(tensors: list[Tensor]) -> list[list[Any]]:
    """What a program that has been written down takes as given of tensors in memory."""
    return [list(map(ask, tensors)) for ask in (Tensor.stride, Tensor.storage_offset, Tensor.is_conj, Tensor.is_neg)]


def readable(state: State) -> Mapping[int, Tensor]:
    """Id → tensor of all that a sealed pass may read from where it lies."""
    return {id(tensor): tensor for tensor in (*state.model.parameters(), *state.tensors)}


def _switches() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.get_num_threads(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._functorch.maybe_current_level(),
    )


def _home(outside: Mapping[str, Any]) -> str:
    """The module that a code's globals belong to."""
    return str(outside.get("__name__", ""))


def _untrusted(ran: Ran) -> dict[types.CodeType, dict[str, Any]]:
    """The code that may depend on more than is sealed: users', and what of the standard library it calls."""
    doubtful = {code: outside for code, outside in ran.codes.items() if not _trusted(_home(outside))}
    found = {c: o for c, o in doubtful.items() if _home(o).split(".")[0] not in sys.stdlib_module_names}
    while more := {c: o for c, o in doubtful.items() if c not in found and found.keys() & ran.callers.get(c, set())}:
        found |= more
    return found


def _trusted(module: str) -> bool:
    return module.split(".")[0] in _TRUSTED or module.startswith(_OUR_ROOMS)


def _refuse_hooks(modules: Iterable[nn.Module]) -> None:
    of_all = vars(nn.modules.module)
    if any(of_all[f"_global{hooks}"] for hooks in _HOOKS) or any(
        getattr(module, hooks) for module in modules for hooks in _HOOKS
    ):
        raise Refused("has hooks, whose code is not the model's")


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _inner(constant)


def _words(code: types.CodeType) -> set[str]:
    """Every name that a piece of code says, in strings as well."""
    return {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}


def _refuse_unknown(users: Mapping[types.CodeType, Any], ran: Ran, state: State) -> None:
    """Refuse code that ran and that nothing leads to, or that asks what is not sealed."""
    known = {inner for function in state.functions for inner in _inner(function.__code__)}
    for code, outside in users.items():
        if code not in known:
            raise Refused(f"runs {code.co_name!r} of {_home(outside)}, which nothing leads to")
        if odd := _UNSEALED & set(code.co_names):
            raise Refused(f"{code.co_name!r} asks for {min(odd)!r} of a tensor")
        anywhere = "import_module" in code.co_names or any(outside.get(name) is sys for name in code.co_names)
        if anywhere or "sys" in names_in(code).imported:
            raise Refused(f"{code.co_name!r} may read any module")
        for module, name, owner in ran.builtins.get(code, ()):
            home = module or owner.__module__
            if name in _REFUSED or not _trusted(home):
                raise Refused(f"{code.co_name!r} calls {home}.{name}")


def _names_sealed(identities: Identities, outside: dict[str, Any], names: Iterable[str], users: bool) -> None:
    """Seal the global names that a code says; of torch's own what is code, and not what a measurement sets."""
    for name in names:
        value = outside.get(name)
        if name in outside and (users or isinstance(value, _CODE)):
            identities.name(outside, name)
        if isinstance(value, types.ModuleType) and value.__name__.split(".")[0] == "torch":
            _names_sealed(identities, vars(value), set(names) - {name}, False)


def _refuse_modules_by_name(users: Mapping[types.CodeType, dict[str, Any]]) -> None:
    for code, outside in users.items():
        for value in (outside.get(name) for name in code.co_names):
            if isinstance(value, types.ModuleType) and not _trusted(value.__name__):
                raise Refused(f"{code.co_name!r} may read any name of {value.__name__}")


def _refuse_opaque(state: State, modules: list[nn.Module], names: set[str], by_name: bool) -> None:
    """Refuse what holds state that nothing here looks into, unless no code that ran says the name that leads to it."""
    attributes = {id(vars(module)) for module in modules}
    for holder, name, value in state.identities.found():
        if _sealable(value):
            continue
        if isinstance(holder, types.MappingProxyType) and (str(name).startswith("__") or name == "_abc_impl"):
            continue
        if name not in names and (
            (id(holder) in attributes and not by_name) or (isinstance(holder, dict) and "__builtins__" in holder)
        ):
            continue
        raise Refused(f"may read {name or 'a value'} of type {type(value).__qualname__}, which may change unseen")


def _sealable(value: Any) -> bool:
    if isinstance(value, (torch.jit.ScriptModule, torch.jit.ScriptFunction, np.ndarray)):
        return False
    if value is MISSING:
        return True
    if isinstance(value, (tuple, frozenset)):
        return all(map(_sealable, value))
    if isinstance(value, weakref.ref):
        return isinstance(value(), nn.Parameter)
    if isinstance(value, functools._lru_cache_wrapper):  # what it remembers is its own
        return value.__module__.split(".")[0] in _TRUSTED
    return isinstance(value, _CONSTANTS) or followed(type(value))
