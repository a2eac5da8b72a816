"""What code says by name, and with it which methods a forward pass may call.

A class has more methods than any pass calls: a library's models know how to be saved, quantised and sent away.  So a
member of a class is looked at once code that a pass may run says its name, or where torch or Python call it unsaid:
what overrides a member of theirs, and ``__call__`` and its like.  For ``getattr`` a string says a name, in code or as
an attribute's value; one that ends in ``_`` says all that begin so (``getattr(self, f"forward_{mode}")``).
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterable
from typing import Any, NamedTuple

from torchgeom_probe.model.kinds import of_a_framework, own_classes, remembered

#: Said by calling the class, which is a value then.
CONSTRUCTORS = frozenset({"__init__", "__new__", "__post_init__", "__init_subclass__", "__set_name__"})


class Names(NamedTuple):
    """What a function's code says.

    Attributes:
        read: every name that it takes from outside: a global, an attribute of anything.
        written: the globals that it binds.
        imported: modules, as ``import`` has them, with a dot before for each package to go up.
        strings: what may be a name, for ``getattr``.
    """

    read: frozenset[str]
    written: frozenset[str]
    imported: frozenset[str]
    strings: frozenset[str]


@functools.lru_cache(maxsize=1 << 16)  # a library has some ten thousand functions
def names_in(code: types.CodeType) -> Names:
    """The names that a function's code says, inner functions' too."""
    instructions = list(dis.get_instructions(code))
    written = {i.argval for i in instructions if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")}
    # What was put on the stack before: how far to go up, and what to take from the module.
    imports = zip(instructions, instructions[2:], strict=False)
    imported = {"." * up.argval + i.argval for up, i in imports if i.opname == "IMPORT_NAME"}
    strings = {text for text in code.co_consts if isinstance(text, str) and text.isidentifier()}
    names = Names(*map(frozenset, (code.co_names, written, imported, strings)))
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names = Names(*map(frozenset.union, names, names_in(inner)))
    return names


class Said:
    """The names that were said so far, and the members that wait for theirs.

    >>> said = Said()
    >>> said.waits("forward", "what a member is", 3)
    True
    >>> said.say({"forward", "relu"})
    [('what a member is', 3)]
    >>> said.waits("relu", "another", 3)
    False
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._beginnings: tuple[str, ...] = ()
        self._waiting: dict[str, list[tuple[Any, int]]] = {}

    def waits(self, name: str, value: Any, depth: int) -> bool:
        """Whether a member's name was not said yet; then it is kept until it is."""
        if name in self._names or name.startswith(self._beginnings):
            return False
        self._waiting.setdefault(name, []).append((value, depth))
        return True

    def say(self, names: Iterable[str]) -> list[tuple[Any, int]]:
        """What waited for these names."""
        new = set(names) - self._names
        self._names |= new
        beginnings = tuple(name for name in new if name.endswith("_") and name.strip("_"))
        self._beginnings += beginnings
        said = new & self._waiting.keys()
        if beginnings:
            said |= {name for name in self._waiting if name.startswith(beginnings)}
        return [member for name in said for member in self._waiting.pop(name)]


@remembered
def called_unsaid(kind: type) -> list[tuple[type, str]]:
    """The members of a class that torch or Python may call: the user's class that has it, and its name."""
    theirs = {name for one in kind.__mro__ if of_a_framework(one.__module__) for name in vars(one)}
    return [
        (one, name)
        for one in own_classes(kind)
        for name, value in vars(one).items()
        if (callable(value) if name.startswith("__") else name in theirs) and name not in CONSTRUCTORS
    ]
