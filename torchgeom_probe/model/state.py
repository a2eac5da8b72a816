"""What a model's forward pass and its hooks can write to: kept as it is, and put back.

From every module its attributes are followed through containers, objects, their classes, and functions (hooks, a
``forward``: closures, defaults, ``partial`` arguments, ``__self__``, the globals that their code names).  Of what is
found there containers and names keep what they hold, tensors and arrays their numbers, random generators their state.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import copy
import dis
import functools
import itertools
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from operator import is_
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor

#: How far state is followed from a module.  A container of more than _MANY is kept, and what it holds not looked at.
_DEPTH = 8
_MANY = 1000
#: A tensor beside the buffers that is larger (a data set, say) is watched for writes like a parameter, not copied.
_LARGE_BYTES = 1 << 28
#: Packages whose objects are none of a model's own state, and may be at work in another thread; but for some that hold
#: what a model or a hook puts there.
_FRAMEWORKS = {*sys.stdlib_module_names, "torch", "torchvision", "lightning", "pytorch_lightning", "tqdm", "numpy"}
_FRAMEWORKS |= {"tensorboard", "torchgeom_probe"}
_HOLDERS = ("types", "collections", "argparse", "weakref", "_weakrefset", "torch.distributions")
_MISSING = object()
Answer = TypeVar("Answer", bound=Callable[..., Any])


class State:
    """Everything that a forward pass of a model may change, as it is now.

    Args:
        model: the model; its parameters are watched for writes, and have no copy.
        beside: containers that the model writes to and that cannot be found from it.

    >>> model = nn.Linear(2, 3)
    >>> model.seen = [1]
    >>> _ = model.register_forward_hook(lambda module, args, out: module.seen.append(out))
    >>> state = State(model)
    >>> _ = model(torch.zeros(4, 2))
    >>> state.put_back()
    >>> model.seen
    [1]
    """

    def __init__(self, model: nn.Module, beside: Iterable[Any] = ()) -> None:
        self.model = model
        #: Whether a pass ran since; who runs one says so.
        self.ran = False
        #: Functions of the user's own that a pass may call.
        self.functions: list[types.FunctionType] = []
        self._empty: list[Any] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, int]] = []
        self._watched: list[tuple[Tensor, int]] = []
        self._others: list[Callable[[], Any]] = []
        self._generators: list[tuple[Callable[[], Any], Callable[[Any], Any], Any]] = []
        self._draws: bool | None = None
        self._seen: set[int] = set()
        self._classes: set[type] = set()
        self._look(model, _DEPTH)
        of_all_modules = vars(nn.modules.module)
        self._look_at([of_all_modules["_global_forward_hooks"], of_all_modules["_global_forward_pre_hooks"]], _DEPTH)
        self._look_at(beside, _DEPTH)

    def start_again(self) -> None:
        """Make everything what it was, if a pass ran since."""
        if self.ran:
            self.put_back(generators=self.drew_random_numbers())
            self.ran = False

    def keep(self, container: Any) -> None:
        """Keep what another container holds now as well."""
        self._container(container, _DEPTH)

    def drew_random_numbers(self) -> bool:
        """Whether the first pass moved any generator; if it did not, the next ones need not put them back."""
        if self._draws is None:
            with _disable_current_modes():
                self._draws = any(not _same_numbers(get(), state) for get, _, state in self._generators)
        return self._draws

    def put_back(self, *, generators: bool = True) -> None:
        """Make everything what it was.

        Raises:
            ProbeError: a parameter was written to.
        """
        for container in self._empty:
            if container:
                container.clear()
        for container, content in self._containers:
            if not _same(container, content):
                base = _base(type(container))
                base.clear(container)
                (base.update if hasattr(base, "update") else base.extend)(container, content)
        for put in self._others:
            put()
        for _, set_state, state in self._generators if generators else ():
            set_state(state)
        self._put_numbers_back()
        written = [tensor for tensor, version in self._watched if _version(tensor) != version]
        if written:
            named = [name for name, p in self.model.named_parameters() if any(p is t for t in written)]
            raise ProbeError(
                f"the model's forward pass writes to its own parameters in place ({', '.join(named[:3])}), also in "
                "eval mode, so it cannot be measured without being changed.\n"
                "Do that in the training step instead, or behind  if self.training:"
                if named
                else f"the forward pass writes in place to a tensor of {list(written[0].shape)} that is no buffer.\n"
                "Make it one:  self.register_buffer(name, tensor, persistent=False)"
            )

    def _put_numbers_back(self) -> None:
        if not self._tensors:
            return
        # Through .data, and the versions set back: a backward pass that the user has still to make is untouched.
        plain = [kept for kept in self._tensors if not kept[0].is_inference()]
        moved = [(tensor, version) for tensor, _, version in plain if tensor._version != version]
        with _disable_current_modes(), torch.no_grad():
            if plain:  # torch takes no empty list
                torch._foreach_copy_([tensor.data for tensor, _, _ in plain], [value for _, value, _ in plain])
            for tensor, version in moved:
                torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
            if len(plain) < len(self._tensors):
                with torch.inference_mode():
                    for tensor, value, _ in self._tensors:
                        if tensor.is_inference():
                            tensor.copy_(value)

    # The walk: a method for each kind of thing that holds state, found by _how.

    def _look(self, value: Any, depth: int) -> None:
        look = _how(type(value))
        if look is not None and depth > 0 and id(value) not in self._seen:
            self._seen.add(id(value))
            look(self, value, depth - 1)

    def _look_at(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            if _how(type(value)) is not None:
                self._look(value, depth)

    def _module(self, module: nn.Module, depth: int) -> None:
        attributes = vars(module)
        self._keep(attributes)
        inner = module._modules, module._parameters, module._buffers
        for value in attributes.values():
            if type(value) in _DICTS:  # most of a module's own are empty
                if not value:
                    self._empty.append(value)
                elif any(value is own for own in inner):
                    self._keep(value)
                else:
                    self._look(value, _DEPTH)
            elif _how(type(value)) is not None:
                self._look(value, _DEPTH)
        self._watched += [(p, _version(p)) for p in inner[1].values() if p is not None]
        for buffer in inner[2].values():
            if buffer is not None and id(buffer) not in self._seen:
                self._copy(buffer)
        self._look_at(inner[0].values(), _DEPTH)
        self._class(type(module), _DEPTH)

    def _keep(self, container: Any) -> None:
        base = _base(type(container))  # not its own methods: a class derived from dict may copy as it likes
        inside = dict(base.items(container)) if isinstance(container, dict) else list(base.__iter__(container))
        self._containers.append((container, inside))
        if isinstance(inside, dict):
            counts = [(key, v) for key, v in inside.items() if type(v) is itertools.count]
            self._others += [functools.partial(_put_item, container, key, _fresh(v)) for key, v in counts]

    def _container(self, container: Any, depth: int) -> None:
        self._keep(container)
        if len(container) <= _MANY:
            self._look_at(list(container.values() if isinstance(container, dict) else container), depth)
        if type(container) not in _CONTAINERS:
            self._object(container, depth)

    def _object(self, value: Any, depth: int) -> None:
        if isinstance(getattr(value, "__dict__", None), dict):
            self._keep(vars(value))
            self._look_at(list(vars(value).values()), depth)
        for slot in _slots(type(value)):
            self._look(self._name(_get_attribute, _put_attribute, value, slot), depth)
        self._class(type(value), depth)

    def _class(self, kind: type, depth: int) -> None:
        for one in _own_classes(kind):
            if one in self._classes:
                continue
            self._classes.add(one)
            members = {key: v for key, v in vars(one).items() if not key.startswith("__") or callable(v)}
            self._others.append(functools.partial(_put_members, one, members))
            self._look_at(members.values(), depth)

    def _function(self, function: types.FunctionType, depth: int) -> None:
        if _of_a_framework(function.__globals__.get("__name__", "")):
            self._look(vars(function).get("__wrapped__"), depth)  # the user's own, decorated by torch.no_grad()
            return
        self.functions.append(function)
        for cell in function.__closure__ or ():
            self._look(self._name(_get_attribute, _put_attribute, cell, "cell_contents"), depth)
        self._look_at((function.__defaults__, function.__kwdefaults__, vars(function)), depth)
        read, written = _names(function.__code__)
        outside = function.__globals__
        for name in written:
            self._name(_get_item, _put_item, outside, name)
        for name in read & outside.keys():
            value = outside[name]
            if isinstance(value, types.ModuleType) and not _of_a_framework(value.__name__):
                for inner in read & vars(value).keys():
                    self._look(self._name(_get_item, _put_item, vars(value), inner), depth)
            else:
                self._look(value, depth)

    def _name(self, get: Callable[..., Any], put: Callable[..., None], holder: Any, name: str) -> Any:
        value = get(holder, name)
        self._others.append(functools.partial(put, holder, name, _fresh(value)))
        return value

    def _context_variable(self, variable: contextvars.ContextVar[Any], depth: int) -> None:
        with contextlib.suppress(LookupError):  # nothing yet, and no default
            self._others.append(functools.partial(variable.set, variable.get()))
            self._look(variable.get(), depth)

    def _within(self, value: Any, depth: int) -> None:
        self._look_at([getattr(value, name, None) for name in _WITHIN], depth)

    def _tensor(self, tensor: Tensor, depth: int) -> None:
        if type(tensor) is not Tensor or tensor.is_meta or tensor.layout is not torch.strided or tensor.is_nested:
            return
        if tensor.untyped_storage().nbytes() > _LARGE_BYTES:
            self._watched.append((tensor, _version(tensor)))
        else:
            self._copy(tensor)

    def _copy(self, tensor: Tensor) -> None:
        self._seen.add(id(tensor))
        self._tensors.append((tensor, tensor.detach().clone(), _version(tensor)))

    def _array(self, array: np.ndarray, depth: int) -> None:
        if array.flags.writeable:
            self._others.append(functools.partial(np.copyto, array, array.copy()))
        if array.dtype.hasobject and array.size <= _MANY:
            self._look_at(array.flat, depth)

    def _generator(self, generator: Any, depth: int) -> None:
        get: Callable[[], Any]
        if isinstance(generator, random.Random):
            get, put = generator.getstate, generator.setstate
        elif isinstance(generator, (np.random.Generator, np.random.BitGenerator)):
            bits = getattr(generator, "bit_generator", generator)
            get, put = functools.partial(getattr, bits, "state"), functools.partial(setattr, bits, "state")
        elif isinstance(generator, np.random.RandomState):
            get, put = functools.partial(generator.get_state, legacy=False), generator.set_state
        else:
            get, put = generator.get_state, generator.set_state
        self._generators.append((get, put, get()))


_DICTS = (dict, collections.OrderedDict)
_CONTAINERS: tuple[Any, ...] = (collections.OrderedDict, dict, list, set, collections.deque)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)
_CALLABLES: tuple[Any, ...] = (
    types.MethodType,
    types.BuiltinMethodType,
    functools.partial,
    property,
    functools.cached_property,
    staticmethod,
    classmethod,
)
#: What these are made of.
_WITHIN = ("__self__", "__func__", "func", "args", "keywords", "fget")
_LOOKS: tuple[tuple[Any, Any], ...] = (
    ((nn.Parameter, types.ModuleType, random.SystemRandom), None),
    (nn.Module, State._module),
    (Tensor, State._tensor),
    (np.ndarray, State._array),
    (_GENERATORS, State._generator),
    (_CONTAINERS, State._container),
    ((tuple, frozenset), lambda state, values, depth: state._look_at(values, depth)),
    (types.FunctionType, State._function),
    (contextvars.ContextVar, State._context_variable),
    (_CALLABLES, State._within),
    (weakref.ref, lambda state, reference, depth: state._look(reference(), depth)),
    (type, State._class),
)


def _remembered(function: Answer) -> Answer:
    """Answer once for each type, name or code; not for ever, for types may be made without end."""
    return functools.lru_cache(maxsize=4096)(function)  # type: ignore[return-value]


@_remembered
def _how(kind: type) -> Callable[[State, Any, int], None] | None:
    """How to look at a thing of this type; None where it holds nothing that a forward pass could change."""
    for kinds, look in _LOOKS:
        if issubclass(kind, kinds):
            return look
    holds = (kind.__dictoffset__ or _slots(kind)) and (
        not _of_a_framework(kind.__module__) or kind.__module__.startswith(_HOLDERS)
    )
    return State._object if holds else None


@_remembered
def _of_a_framework(module: str) -> bool:
    return module.split(".")[0] in _FRAMEWORKS


@_remembered
def _own_classes(kind: type) -> list[type]:
    return [one for one in kind.__mro__ if not _of_a_framework(one.__module__)]


@_remembered
def _base(kind: type) -> Any:
    return next(base for base in _CONTAINERS if issubclass(kind, base))


@_remembered
def _slots(kind: type) -> list[str]:
    slotted = [vars(one) for one in kind.__mro__ if "__slots__" in vars(one)]
    return [key for members in slotted for key, v in members.items() if isinstance(v, types.MemberDescriptorType)]


@_remembered
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Every name that a function's code reads from outside, and the globals that it binds; inner functions' too."""
    written = {i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")}
    read = set(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more = _names(inner)
            read, written = read | more[0], written | more[1]
    return frozenset(read), frozenset(written)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _same_numbers(state: Any, other: Any) -> bool:
    if isinstance(state, dict):
        return all(_same_numbers(value, other[key]) for key, value in state.items())
    if isinstance(state, (Tensor, np.ndarray)):
        return bool((state == other).all())
    return state == other


def _get_attribute(holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name)
    except (AttributeError, ValueError):  # a slot, or a cell, that holds nothing yet
        return _MISSING


def _put_attribute(holder: Any, name: str, value: Any) -> None:
    if not _is(_get_attribute(holder, name), value):
        object.__delattr__(holder, name) if value is _MISSING else object.__setattr__(holder, name, _fresh(value))


def _get_item(holder: dict[str, Any], name: str) -> Any:
    return holder.get(name, _MISSING)


def _put_item(holder: dict[str, Any], name: str, value: Any) -> None:
    if not _is(holder.get(name, _MISSING), value):
        if value is _MISSING:
            del holder[name]
        else:
            holder[name] = _fresh(value)


def _fresh(value: Any) -> Any:
    """A count that nobody moves; another value as it is."""
    return copy.copy(value) if type(value) is itertools.count else value


def _is(now: Any, value: Any) -> bool:
    return now is value or (type(now) is itertools.count and repr(now) == repr(value))


def _put_members(kind: type, members: Mapping[str, Any]) -> None:
    now = dict(vars(kind))
    for name, value in members.items():
        if now.get(name, _MISSING) is not value:
            type.__setattr__(kind, name, value)
    for name in now.keys() - members.keys():
        if not name.startswith("__"):
            type.__delattr__(kind, name)


def _same(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    base = _base(type(container))
    same = all(map(is_, base.__iter__(container), content))
    return same and (not isinstance(container, dict) or all(map(is_, base.values(container), content.values())))
