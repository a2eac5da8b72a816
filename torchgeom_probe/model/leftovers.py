"""What a pass leaves where nothing leads to from the model: found after a plain run, taken out, and named."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from torchgeom_probe.dual.ops import as_called
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.kinds import attributes_of
from torchgeom_probe.model.state import State
from torchgeom_probe.shapes import Tensor

#: Model → the containers that were found: kept with the rest of its state from then on.
FOUND: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
_GRADIENT: Any = vars(torch._C.TensorBase)["grad"].__get__
_ADVICE = (
    "Let it write to what a measurement finds and puts back exactly: an attribute of a module or of the hook's own "
    "object, or a list or dict that it names."
)
_CONTAINERS = (list, dict, set, collections.deque)


@contextlib.contextmanager
def taken_out(state: State | None, ours: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
    """Run the body, a plain pass of a model; what it leaves alive, but for ``ours``, is taken out of what holds it.

    A model of torch's own modules without hooks leaves nothing, and costs nothing here.

    Raises:
        ProbeError: it cannot be taken out.
    """
    if state is None or not state.functions:
        yield
        return
    with _Made() as made:
        yield
    state.start_again()
    known = {id(tensor) for tensor in ours()}
    if any(id(tensor) not in known for tensor in made.alive()):
        gc.collect()  # a cycle is no holder
        left = [tensor for tensor in made.alive() if id(tensor) not in known and not _cached(tensor)]
        if left:
            holders = _take_out(state, left)
            left.clear()
            if not holders or any(id(tensor) not in known and not _cached(tensor) for tensor in made.alive()):
                _refuse(state)


class _Made(TorchFunctionMode):
    """Remembers, weakly, every tensor and array that the ops of this thread make."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = as_called(func, kwargs)
        out = func(*args, **kwargs)
        if func != _GRADIENT:  # that was there before
            given = {id(a) for a in (*args, *kwargs.values())}  # an op in place makes nothing
            self._made += [
                weakref.ref(leaf)
                for leaf in ([out] if isinstance(out, Tensor) else tree_leaves(out))
                if isinstance(leaf, (Tensor, np.ndarray)) and id(leaf) not in given
            ]
        return out

    def alive(self) -> list[Any]:
        return [tensor for tensor in (reference() for reference in self._made) if tensor is not None]


def _take_out(state: State, left: list[Any]) -> list[Any]:
    holders, inside = _holders(left)
    for holder in holders:
        if isinstance(holder, dict):
            for key in [key for key, value in holder.items() if id(value) in inside]:
                del holder[key]
        else:
            kept = [value for value in holder if id(value) not in inside]
            holder.clear()
            (holder.update if isinstance(holder, set) else holder.extend)(kept)
        state.keep(holder)
    FOUND.setdefault(state.model, []).extend(holders)
    if holders:
        where = ", ".join(sorted({_named(holder) for holder in holders}))
        warnings.warn(
            f"{_writers(state.model)} leaves tensors of the measurement in {where}, which nothing leads to from the "
            "model.  They are taken out again, after this and every measurement; what they took the place of is "
            f"gone.\n{_ADVICE}",
            stacklevel=3,
        )
    return holders


def _refuse(state: State) -> None:
    raise ProbeError(
        f"{_writers(state.model)} leaves tensors of the measurement in a place from where they cannot be taken back.\n"
        f"{_ADVICE}"
    )


def _cached(tensor: Any) -> bool:
    """Whether it is what ``functools.lru_cache`` remembers of a function: the same whoever asks first."""
    return any(isinstance(referrer, functools._lru_cache_wrapper) for referrer in gc.get_referrers(tensor))


def _holders(left: list[Any]) -> tuple[list[Any], set[int]]:
    """The containers that hold any of these, through tuples; and the ids of all that is inside them on the way."""
    holders: list[Any] = []
    inside: set[int] = set()
    wanted = left
    for _ in range(3):
        inside |= {id(thing) for thing in wanted}
        referrers = [r for r in gc.get_referrers(*wanted) if r is not wanted and r is not left]
        found = [referrer if isinstance(referrer, _CONTAINERS) else _attributes(referrer) for referrer in referrers]
        holders += [h for i, h in enumerate(found) if h is not None and not any(h is o for o in (*holders, *found[:i]))]
        wanted = [r for r in referrers if isinstance(r, tuple)]
        del referrers  # a list that holds the tuples as well
        if not wanted:
            break
    # What belongs to a thing of C alone (the list inside of a queue) is not ours to shorten.
    return [holder for holder in holders if all(map(_of_python, gc.get_referrers(holder)))], inside


def _attributes(thing: Any) -> dict[str, Any] | None:
    return None if isinstance(thing, types.ModuleType) else attributes_of(thing)


def _of_python(owner: Any) -> bool:
    plain = (*_CONTAINERS, tuple, types.CellType, types.FrameType, types.GeneratorType, types.MethodType)
    return isinstance(owner, plain) or hasattr(owner, "__dict__")


def _named(holder: Any) -> str:
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is holder:
                return f"{module.__name__}.{name}"
    return f"a {type(holder).__name__}"


def _writers(model: nn.Module) -> str:
    hooks = [
        f"{getattr(hook, '__qualname__', type(hook).__name__)!r} of {name or 'the model'!r}"
        for name, module in model.named_modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]
    if not hooks:
        return "the forward pass"
    return f"the forward hook {hooks[0]}" if len(hooks) == 1 else f"one of the forward hooks {', '.join(hooks[:3])}"
