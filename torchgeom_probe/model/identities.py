"""What was found where, held by identity and compared in C: whether anything has another place or holder since."""

from __future__ import annotations

import ast
import collections
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, count, repeat
from operator import is_, itemgetter
from typing import Any

#: The container types that state is kept in; a subclass is read by its base's methods, which run none of its own code.
CONTAINERS: tuple[Any, ...] = (collections.OrderedDict, dict, list, set, collections.deque)
_MAPPINGS: tuple[Any, ...] = (collections.OrderedDict, dict, types.MappingProxyType)


MISSING = object()


class Identities:
    """What containers, attributes, cells and global names held; ``hold()`` says whether they do still.

    >>> attributes = {"scale": 1}
    >>> found = Identities()
    >>> found.container(dict, attributes)
    >>> found.hold()
    True
    >>> attributes["scale"] = 1.0
    >>> found.hold()
    False
    """

    def __init__(self) -> None:
        self.empty: list[Any] = []
        #: base type → (containers of it, their lengths, keys and values, one after the other)
        self._containers: dict[Any, tuple[list[Any], list[int], list[Any], list[Any]]] = {}
        #: id of a namespace → (itself, name → value)
        self._names: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        #: getter → (what it is asked of, what it gave)
        self._others: dict[Callable[[Any], Any], tuple[list[Any], list[Any]]] = {}

    def container(self, base: Any, container: Any) -> None:
        """Note what a container of that base type holds."""
        if type(container) in CONTAINERS and not container:
            self.empty.append(container)
            return
        held, lengths, keys, values = self._containers.setdefault(base, ([], [], [], []))
        held.append(container)
        lengths.append(base.__len__(container))
        if base in _MAPPINGS:
            keys.extend(base.__iter__(container))
        values.extend(_values(base)(container))

    def name(self, namespace: dict[str, Any], name: str) -> None:
        """Note the value that a module's global name has; it has one."""
        self._names.setdefault(id(namespace), (namespace, {}))[1][name] = namespace[name]

    def other(self, get: Callable[[Any], Any], holder: Any) -> Any:
        """Note what ``get(holder)`` gives, and return it."""
        value = get(holder)
        holders, values = self._others.setdefault(get, ([], []))
        holders.append(holder)
        values.append(value)
        return value

    def found(self) -> Iterator[tuple[Any, Any, Any]]:
        """(holder, name or None, value) of everything that was noted."""
        for base, (held, lengths, keys, values) in self._containers.items():
            each = chain.from_iterable(map(repeat, held, lengths))
            yield from zip(each, keys if base in _MAPPINGS else repeat(None), values, strict=False)
        for namespace, names in self._names.values():
            yield from zip(repeat(namespace), names.keys(), names.values(), strict=False)
        for holders, values in self._others.values():
            yield from zip(holders, repeat(None), values, strict=False)

    def hold(self) -> bool:
        """Whether everything is where it was."""
        if any(self.empty):
            return False
        for base, (held, lengths, keys, values) in self._containers.items():
            if list(map(base.__len__, held)) != lengths:
                return False
            if keys and list(chain.from_iterable(map(base.__iter__, held))) != keys:
                return False
            if not all(map(is_, chain.from_iterable(map(_values(base), held)), values)):
                return False
        for namespace, names in self._names.values():
            if not names.keys() <= namespace.keys() or not all(map(is_, _items(namespace, names), names.values())):
                return False
        return all(all(map(is_, map(get, holders), values)) for get, (holders, values) in self._others.items())


def _values(base: Any) -> Callable[[Any], Iterable[Any]]:
    return base.values if base in _MAPPINGS else base.__iter__


def _items(namespace: dict[str, Any], names: dict[str, Any]) -> Iterable[Any]:
    return itemgetter(*names)(namespace) if len(names) > 1 else map(namespace.__getitem__, names)


@functools.cache
def getter(get: Callable[..., Any], name: str) -> Callable[[Any], Any]:
    """``get`` of one name."""
    return functools.partial(get, name=name)


def get_attribute(holder: Any, name: str) -> Any:
    """An attribute, or MISSING."""
    try:
        return object.__getattribute__(holder, name)  # a slot that holds nothing is no call of the user's __getattr__
    except (AttributeError, ValueError):  # a slot, or a cell, that holds nothing yet
        return MISSING


def put_attribute(holder: Any, name: str, value: Any) -> None:
    """Make an attribute what it was."""
    if not _is(get_attribute(holder, name), value):
        object.__delattr__(holder, name) if value is MISSING else object.__setattr__(holder, name, fresh(value))


def get_item(holder: dict[str, Any], name: str) -> Any:
    """An item, or MISSING."""
    return holder.get(name, MISSING)


def put_item(holder: dict[str, Any], name: str, value: Any) -> None:
    """Make an item what it was."""
    if not _is(holder.get(name, MISSING), value):
        if value is MISSING:
            del holder[name]
        else:
            holder[name] = fresh(value)


def fresh(value: Any) -> Any:
    """A count of its own, which stands where this one does; another value as it is."""
    # By its text: Python 3.14 copies no itertools.
    return count(*ast.literal_eval(f"({repr(value)[6:-1]},)")) if type(value) is count else value


def _is(now: Any, value: Any) -> bool:
    return now is value or (type(now) is type(value) is count and repr(now) == repr(value))


def put_members(kind: type, members: Mapping[str, Any]) -> None:
    """Make a class's members what they were."""
    now = dict(vars(kind))
    for name, value in members.items():
        if now.get(name, MISSING) is not value:
            type.__setattr__(kind, name, value)
    for name in now.keys() - members.keys():
        if not name.startswith("__"):
            type.__delattr__(kind, name)
