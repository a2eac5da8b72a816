"""What a pass leaves where nothing leads to from the model: found after a plain run, taken out, and named."""

from __future__ import annotations

import collections
import contextlib
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

from torchgeom_probe.model.state import State
from torchgeom_probe.shapes import Tensor

#: Model → the containers that were found: kept with the rest of its state from then on.
FOUND: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
_CONTAINERS = (list, dict, set, collections.deque)


@contextlib.contextmanager
def taken_out(state: State | None, ours: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
    """Run the body, a plain pass of a model; what it leaves alive, but for ``ours``, is taken out of what holds it.

    A model of torch's own modules without hooks leaves nothing, and costs nothing here.
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
        left = [tensor for tensor in made.alive() if id(tensor) not in known]
        if left:
            _take_out(state, left)


class _Made(TorchFunctionMode):
    """Remembers, weakly, every tensor and array that the ops of this thread make."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.grad.__get__:  # type: ignore[attr-defined]  # that was there before
            given = {id(a) for a in (*args, *(kwargs or {}).values())}  # an op in place makes nothing
            self._made += [
                weakref.ref(leaf)
                for leaf in ([out] if isinstance(out, Tensor) else tree_leaves(out))
                if isinstance(leaf, (Tensor, np.ndarray)) and id(leaf) not in given
            ]
        return out

    def alive(self) -> list[Any]:
        return [tensor for tensor in (reference() for reference in self._made) if tensor is not None]


def _take_out(state: State, left: list[Any]) -> None:
    holders, inside = _holders(left)
    for holder in holders:
        kept = [v for v in (holder.items() if isinstance(holder, dict) else holder)]
        kept = [v for v in kept if id(v[1] if isinstance(holder, dict) else v) not in inside]
        holder.clear()
        (holder.extend if isinstance(holder, (list, collections.deque)) else holder.update)(kept)
        state.keep(holder)
    FOUND.setdefault(state.model, []).extend(holders)
    if holders:
        where = ", ".join(sorted({_named(holder) for holder in holders}))
        became = "It was taken out, and is from now on; an entry that it took the place of is gone"
    else:
        where, became = "a place of its own", "It could not be taken out, and a loss that reads it will fail"
    warnings.warn(
        f"{_writers(state.model)} leaves {len(left)} tensor{'s' if len(left) > 1 else ''} of the measurement in {where}, "
        f"which nothing leads to from the model.  {became}.\n"
        "Let it write to what a measurement finds and puts back exactly: an attribute of a module or of the hook's own "
        "object, or a list or dict that it names.",
        stacklevel=2,
    )


def _holders(left: list[Any]) -> tuple[list[Any], set[int]]:
    """The containers that hold any of these, through tuples; and the ids of all that is inside them on the way."""
    holders: list[Any] = []
    inside: set[int] = set()
    wanted = left
    for _ in range(3):
        inside |= {id(thing) for thing in wanted}
        referrers = [r for r in gc.get_referrers(*wanted) if r is not wanted and r is not left]
        own = [r if isinstance(r, _CONTAINERS) else vars(r) for r in referrers if _may_hold(r)]
        holders += [r for r in own if not any(r is other for other in holders)]
        wanted = [r for r in referrers if isinstance(r, tuple)]
        del referrers, own  # they hold the tuples as well
        if not wanted:
            break
    return holders, inside


def _may_hold(referrer: Any) -> bool:
    return isinstance(referrer, _CONTAINERS) or (
        isinstance(getattr(referrer, "__dict__", None), dict) and not isinstance(referrer, (types.ModuleType, type))
    )


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
