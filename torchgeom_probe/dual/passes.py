"""The dual pass that is running: what its tensors and its rules share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Pass:
    """One dual forward pass.

    Attributes:
        key: which pass it is: a DualTensor can be read in its own pass alone.
        deferred: at most one tensor, which the op that takes it builds (:meth:`DualTensor.deferred`); None outside of a
            pass, where nothing is deferred.
        known: primals that passes at the same samples share (``KnownPrimals`` of ``rules/convolution.py``).
        low: the type that products with weights, and of attention, take float32 tangents in; None: their own.
        used: the names of the ops that ran, by what became of them (:func:`recording`).
        at_end: what to do when the pass ends, the last first; None outside of a pass.
    """

    key: object = field(default_factory=object)
    deferred: list[Any] | None = None
    known: Any = None
    low: Any = None
    used: dict[str, set[str]] | None = None
    at_end: contextlib.ExitStack | None = None


_OUTSIDE = Pass()
_CURRENT: ContextVar[Pass] = ContextVar("dual_pass", default=_OUTSIDE)  # each thread has its own

#: The pass that is running; outside of any, one in which nothing is deferred, known or recorded.
current_pass = _CURRENT.get


@contextlib.contextmanager
def within(**changes: Any) -> Iterator[Pass]:
    """Run the body in the current pass with something about it changed."""
    token = _CURRENT.set(replace(_CURRENT.get(), **changes))
    try:
        yield _CURRENT.get()
    finally:
        _CURRENT.reset(token)


@contextlib.contextmanager
def dual_pass(low: Any = None) -> Iterator[Pass]:
    """Run the body as a pass of its own, whose tensors nothing outside of it can read."""
    with contextlib.ExitStack() as at_end, within(key=object(), deferred=[], at_end=at_end, low=low) as running:
        yield running


@contextlib.contextmanager
def recording() -> Iterator[dict[str, set[str]]]:
    """Collect the names of the ops that run inside the body: ``"fused"``, ``"fallback"``, ``"refused"``."""
    used: dict[str, set[str]] = {"fused": set(), "fallback": set(), "refused": set()}
    with within(used=used):
        yield used
