"""What a model's forward pass and its hooks can write to: kept as it is, and put back.

From every module its attributes are followed through containers, objects, their classes, and functions (hooks, a
``forward``: closures, defaults, ``partial`` arguments, ``__self__``, the globals that their code names).  Of what is
found there containers and names keep what they hold, tensors and arrays their numbers, random generators their state.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import itertools
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from torchgeom_probe.model import kinds
from torchgeom_probe.model.generators import GENERATORS, same_numbers, state_of
from torchgeom_probe.model.identities import (
    CONTAINERS,
    Identities,
    fresh,
    get_attribute,
    get_item,
    getter,
    put_attribute,
    put_item,
    put_members,
)
from torchgeom_probe.model.said import CONSTRUCTORS, Said, called_unsaid, names_in
from torchgeom_probe.model.writes import written_in_place
from torchgeom_probe.shapes import Tensor

#: How far state is followed from a module.  A container of more than _MANY is kept, and what it holds not looked at.
_DEPTH = 32
_MANY = 1000
#: A tensor beside the buffers that is larger (a data set, say) is watched for writes like a parameter, not copied.
_LARGE_BYTES = 1 << 28
#: A tensor or array of more is copied for a measurement, and not kept until the next.
_LIGHT_BYTES = 1 << 20


class State:
    """Everything that a forward pass of a model may change, as it is now.

    Args:
        model: the model; its parameters are watched for writes, and have no copy.
        beside: containers that it writes to and does not lead to, and parameters that it writes to through ``.data``.

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
        self.functions: list[types.FunctionType] = []  # of the user's own, which a pass may call
        #: Where everything was found.
        self.identities = Identities()
        #: Whether it may be held for longer than a measurement: no copy is large, nothing belongs to a graph.
        self.light = True
        #: Whether all was followed to its end.
        self.whole = True
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[Tensor] = []
        self._numbers: list[Tensor] = []
        self._watched: list[Tensor] = []
        self._whole: list[Tensor] = []  # of which parts are among the tensors
        self._plain = True  # whether all tensors are what lies in memory
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._others: list[Callable[[], None]] = []
        self._moving: list[Callable[[], Any]] = []  # of what moves and stays where it is: counts
        self._iterators: list[tuple[Iterator[Any], Any]] = []
        self._generators: list[tuple[Callable[[], Any], Callable[[Any], Any], Any]] = []
        self._draws: bool | None = None
        self._seen: set[int] = set()
        self._classes: set[type] = set()
        self._said = Said()
        self._due: list[tuple[Any, int]] = []  # not looked at at once: one method leads to the next without end
        self._read: set[tuple[int, frozenset[str]]] = set()
        self._look(model, _DEPTH)
        of_all_modules = vars(nn.modules.module)
        self._look_at([of_all_modules["_global_forward_hooks"], of_all_modules["_global_forward_pre_hooks"]], _DEPTH)
        self._beside = list(beside)
        self._look_at(self._beside, _DEPTH)
        for parameter in [thing for thing in self._beside if isinstance(thing, nn.Parameter)]:
            self._copy(parameter)
        while self._due:
            self._look(*self._due.pop())
        self._note()

    def _note(self) -> None:
        """Note what is beside the numbers of tensors, and moves."""
        self._learn = list(map(_LEARNS, [*self.tensors, *self._whole]))
        self._gradients = list(map(_GRADIENT, self._watched))
        self._versions, self._watched_versions = kinds.versions(self._tensors), self._versions_of_watched()

    def _versions_of_watched(self) -> list[int]:
        return kinds.versions([*self._watched, *(g for g in self._gradients if g is not None)])

    def again(self, beside: Iterable[Any] = ()) -> bool:
        """Take this state anew, if all is found where it was: numbers alone may be others.  False: make a new one."""
        beside = list(beside)
        if not (self.light and len(beside) == len(self._beside) and all(map(is_, beside, self._beside))):
            return False
        if not self.identities.hold() or any(map(kinds.differ, self._lying(self._tensors), self._numbers)):
            return False
        with _disable_current_modes(), torch.no_grad():
            if self._tensors:
                torch._foreach_copy_(self._numbers, self._lying(self._tensors))
        self._note()
        self._arrays = [(array, array.copy()) for array, _ in self._arrays]
        self._generators = [(get, put, get()) for get, put, _ in self._generators]
        self.ran, self._draws = False, None
        return True

    @property
    def tensors(self) -> list[Tensor]:
        """What was found: buffers, parameters, and others."""
        return self._tensors + self._watched

    def start_again(self) -> None:
        """Make everything what it was, if a pass ran since."""
        if self.ran:
            self.put_back(generators=self.drew_random_numbers())
            self.ran = False

    def keep(self, container: Any) -> None:
        """Keep what another container holds now as well."""
        learn = dict(zip(map(id, [*self.tensors, *self._whole]), self._learn, strict=True))
        copied, watched = len(self._tensors), len(self._watched)
        self._container(container, _DEPTH)
        while self._due:
            self._look(*self._due.pop())
        del self._watched[watched:]  # too large for a copy, and not the model's
        self._versions += kinds.versions(self._tensors[copied:])
        self._learn = [learn.get(id(t), t.requires_grad) for t in (*self.tensors, *self._whole)]

    def keep_numbers(self, parameter: Tensor) -> bool:
        """Keep a parameter's numbers as well, as a buffer's are; whether that was new."""
        place = next((i for i, watched in enumerate(self._watched) if watched is parameter), None)
        if place is None or id(parameter) in self._seen or not kinds.is_plain(parameter):
            return False
        self._learn.insert(len(self._tensors), self._learn[len(self._tensors) + place])
        self._versions += kinds.versions([parameter])
        self._copy(parameter)
        return True

    def drew_random_numbers(self) -> bool:
        """Whether the first pass moved any generator; if it did not, the next ones need not put them back."""
        if self._draws is None:
            with _disable_current_modes():
                self._draws = any(not same_numbers(get(), state) for get, _, state in self._generators)
        return self._draws

    def put_back(self, *, generators: bool = True) -> None:
        """Make everything what it was.

        Raises:
            ProbeError: a parameter was written to.
        """
        if not self.identities.hold():
            for container in self.identities.empty:
                if container:
                    container.clear()
            for container, content in self._containers:
                if not kinds.same_content(container, content):
                    base = kinds.base_of(type(container))
                    base.clear(container)
                    (base.update if hasattr(base, "update") else base.extend)(container, content)
            for put in self._others:
                put()
        for put in self._moving:
            put()
        if not all(map(is_, map(_GRADIENT, self._watched), self._gradients)):
            for tensor, gradient in zip(self._watched, self._gradients, strict=True):
                tensor.grad = gradient
        for array, numbers in self._arrays:
            np.copyto(array, numbers)
        for _, set_state, state in self._generators if generators else ():
            set_state(state)
        if self._tensors:
            kinds.put_numbers(self._tensors, self._numbers, self._versions, plain=self._plain)
        for iterator, position in self._iterators:
            kinds.set_position(iterator, position)
        kinds.let_learn([*self.tensors, *self._whole], self._learn)
        now = self._versions_of_watched()
        if now != self._watched_versions:
            moved = zip(self._watched, self._watched_versions, now, strict=False)
            raise written_in_place(self.model, [tensor for tensor, before, after in moved if before != after])

    def _lying(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors if self._plain else list(map(kinds.memory, tensors))

    # The walk: a method for each kind of thing that holds state, found by _how.

    def _look(self, value: Any, depth: int) -> None:
        look = _how(type(value))
        if look is not None and id(value) not in self._seen:
            if depth <= 0:
                self.whole = False
                return
            self._seen.add(id(value))
            look(self, value, depth - 1)

    def _look_at(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            if _how(type(value)) is not None:
                self._look(value, depth)

    def _module(self, module: nn.Module, depth: int) -> None:
        attributes = vars(module)
        self.identities.other(type, module)
        self._keep(attributes)
        inner = module._modules, module._parameters, module._buffers
        for value in attributes.values():
            if type(value) in (dict, collections.OrderedDict, set):  # most of a module's own are empty
                if not value:
                    self.identities.empty.append(value)
                elif any(value is own for own in inner):
                    self._keep(value)
                else:
                    self._look(value, _DEPTH)
            elif _how(type(value)) is not None:
                self._look(value, _DEPTH)
        for parameter in inner[1].values():
            if parameter is not None:
                self._watched.append(parameter)
                self._attributes(parameter)
        table = inner[1].get("weight") if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else None
        if table is not None and module.max_norm is not None:
            self._copy(table)  # the rows that are looked up are shortened in place
        for buffer in inner[2].values():
            if buffer is not None and id(buffer) not in self._seen:
                self._copy(buffer)
                self._attributes(buffer)
        self._look_at(inner[0].values(), _DEPTH)
        self._class(type(module), _DEPTH, made=False)

    def _keep(self, container: Any) -> None:
        # Not its own methods: they may copy as they like, or import what they map to.
        base = kinds.base_of(type(container))
        inside = dict(base.items(container)) if isinstance(container, dict) else list(base.__iter__(container))
        if inside or type(container) not in CONTAINERS:
            self._containers.append((container, inside))
        self.identities.container(base, container)
        if len(inside) <= _MANY:
            held = inside.values() if isinstance(inside, dict) else inside
            self._due += self._said.say(text for text in held if type(text) is str)
        if isinstance(inside, dict) and itertools.count in map(type, inside.values()):
            for key, value in inside.items():
                self._count(put_item, container, key, value)

    def _container(self, container: Any, depth: int) -> None:
        self._keep(container)
        base = kinds.base_of(type(container))
        held = list(base.values(container) if isinstance(container, dict) else base.__iter__(container))
        self.whole &= len(held) <= _MANY or not any(map(_how, map(type, held)))
        if len(held) <= _MANY:
            self._look_at(held, depth)
        if type(container) not in CONTAINERS:
            self._object(container, depth)

    def _object(self, value: Any, depth: int) -> None:
        attributes = kinds.attributes_of(value)
        if attributes is not None:
            self._keep(attributes)
            self._look_at(list(attributes.values()), depth)
        for slot in kinds.slots(type(value)):
            self._look(self._name(get_attribute, put_attribute, value, slot), depth)
        self._class(type(value), depth, made=False)

    def _class(self, kind: type, depth: int, made: bool = True) -> None:
        own = kinds.own_classes(kind)
        for one in own:
            if one not in self._classes:
                self._classes.add(one)
                self.identities.container(types.MappingProxyType, vars(one))
                members = {key: v for key, v in vars(one).items() if not key.startswith("__") or callable(v)}
                self._others.append(functools.partial(put_members, one, members))
                self._look_at((v for key, v in members.items() if not self._said.waits(key, v, depth)), depth)
        unsaid = called_unsaid(kind) + [(one, key) for one in own if made for key in CONSTRUCTORS]
        self._look_at([vars(one)[key] for one, key in unsaid if key in vars(one)], depth)

    def _function(self, function: types.FunctionType, depth: int) -> None:
        if kinds.of_a_framework(function.__globals__.get("__name__", "")):
            self._look(vars(function).get("__wrapped__"), depth)  # the user's own, decorated by torch.no_grad()
            return
        self.functions.append(function)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            held = self._name(get_attribute, put_attribute, cell, "cell_contents")
            self._look(held, depth) if name != "__class__" else self._class(held, depth, made=False)  # of super()
        for get in _OF_A_FUNCTION:
            self._look(self.identities.other(get, function), depth)
        read, written, imported, strings = names_in(function.__code__)
        outside = function.__globals__
        self._due += self._said.say(read | strings)
        for name in kinds.resolved(imported, outside.get("__package__")):
            self._imported(name, read, depth)
        for name in written:
            self._name(get_item, put_item, outside, name)
        for name in read & outside.keys():
            self._global(outside, name, read, depth)

    def _global(self, outside: dict[str, Any], name: str, read: frozenset[str], depth: int) -> None:
        self.identities.name(outside, name)
        value = outside[name]
        if isinstance(value, types.ModuleType):
            self._inside(value, read, depth - 1)
        else:
            self._look(value, depth)

    def _inside(self, module: types.ModuleType, read: frozenset[str], depth: int) -> None:
        if not kinds.of_a_framework(module.__name__) and depth >= 0 and (id(module), read) not in self._read:
            self._read.add((id(module), read))  # modules name each other: without this once for every way there
            for name in read & vars(module).keys():
                self._name(get_item, put_item, vars(module), name)
                self._global(vars(module), name, read, depth)

    def _imported(self, name: str, read: frozenset[str], depth: int) -> None:
        if name in sys.modules:
            self._inside(sys.modules[name], read, depth)
        else:  # to look at it would be to run it; once it is there, it has another place
            self.identities.other(getter(get_item, name), sys.modules)

    def _name(self, get: Callable[..., Any], put: Callable[..., None], holder: Any, name: str) -> Any:
        value = self.identities.other(getter(get, name), holder)
        self._others.append(functools.partial(put, holder, name, value))
        self._count(put, holder, name, value)
        return value

    def _count(self, put: Callable[..., None], holder: Any, name: str, value: Any) -> None:
        if type(value) is itertools.count:
            self.light = False
            self._moving.append(functools.partial(put, holder, name, fresh(value)))

    def _context_variable(self, variable: contextvars.ContextVar[Any], depth: int) -> None:
        value = self.identities.other(kinds.value_of, variable)
        self._others.append(functools.partial(kinds.put_value, variable, value))
        self._look(value, depth)

    def _tensor(self, tensor: Tensor, depth: int) -> None:
        self.light &= tensor.grad_fn is None
        if tensor.is_meta:
            return
        large = kinds.is_plain(tensor) and tensor.untyped_storage().nbytes() > _LARGE_BYTES
        self._watched.append(tensor) if large else self._copy(tensor)
        self._attributes(tensor)

    def _copy(self, tensor: Tensor) -> None:
        self._seen.add(id(tensor))
        if not kinds.is_plain(tensor):
            self._whole.append(tensor)
        if tensor.layout is torch.sparse_coo:  # most of what writes to it gives it other parts
            self._moving.append(kinds.putter(tensor))
            self.light = False
        for part in kinds.parts(tensor):
            self._tensors.append(part)
            self._plain &= kinds.memory(part) is part
            self._numbers.append(kinds.memory(part.detach()).clone())
            self.light &= part.numel() * part.element_size() <= _LIGHT_BYTES

    def _attributes(self, tensor: Tensor) -> None:
        self._look(vars(tensor), _DEPTH) if vars(tensor) else self.identities.empty.append(vars(tensor))

    def _reference(self, reference: weakref.ref[Any], depth: int) -> None:
        target = reference()
        if isinstance(target, nn.Parameter):
            self.identities.other(weakref.ref.__call__, reference)
        elif target is not None:
            self.light = False  # to hold the target would be to keep it alive
            self._look(target, depth)

    def _proxy(self, proxy: Any, depth: int) -> None:
        self.light = False
        with contextlib.suppress(ReferenceError):
            self._look(proxy.__init__.__self__, depth)

    def _iterator(self, iterator: Iterator[Any], depth: int) -> None:
        self.light = False
        self._iterators.append((iterator, kinds.position(iterator)))

    def _numbers_of_python(self, numbers: Any, depth: int) -> None:
        self.light = False
        self._moving.append(functools.partial(numbers.__setitem__, slice(None), numbers[:]))

    def _array(self, array: np.ndarray, depth: int) -> None:
        if array.flags.writeable:
            self._arrays.append((array, array.copy()))
            self.light &= array.nbytes <= _LIGHT_BYTES and not array.dtype.hasobject
        if array.dtype.hasobject and array.size <= _MANY:
            self._look_at(array.flat, depth)

    def _generator(self, generator: Any, depth: int) -> None:
        get, put = state_of(generator)
        self._generators.append((get, put, get()))


_LEARNS = attrgetter("requires_grad")
_GRADIENT = vars(torch._C.TensorBase)["grad"].__get__  # without the warning for those that have none
_OF_A_FUNCTION = tuple(map(attrgetter, ("__code__", "__defaults__", "__kwdefaults__", "__dict__")))
_LOOKS: tuple[tuple[Any, Any], ...] = (
    ((nn.Parameter, types.ModuleType, random.SystemRandom), None),
    (nn.Module, State._module),
    (Tensor, State._tensor),
    (np.ndarray, State._array),
    (GENERATORS, State._generator),
    (CONTAINERS, State._container),
    ((tuple, frozenset), lambda state, values, depth: state._look_at(values, depth)),
    (types.FunctionType, State._function),
    (contextvars.ContextVar, State._context_variable),
    (kinds.CALLABLES, lambda state, one, depth: state._look_at([getattr(one, n, None) for n in kinds.WITHIN], depth)),
    (weakref.ref, State._reference),
    (weakref.ProxyTypes, State._proxy),
    (kinds.NUMBERS, State._numbers_of_python),
    (type, State._class),
)


@kinds.remembered
def _how(kind: type) -> Callable[[State, Any, int], None] | None:
    """How to look at a thing of this type; None where it holds nothing that a forward pass could change."""
    for looked_at, look in _LOOKS:
        if issubclass(kind, looked_at):
            return look
    return State._iterator if kinds.is_iterator(kind) else State._object if kinds.holds_attributes(kind) else None


def followed(kind: type) -> bool:
    """Whether what a thing of this type holds is looked at."""
    return _how(kind) is not None
