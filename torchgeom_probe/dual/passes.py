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
        key: which pass it is: a DualTensor lives no longer than its own.
        deferred: the one tensor, if any, that is built by the op that takes it (:meth:`DualTensor.deferred`); None
            outside of any pass, where nothing is deferred.
        known: what an earlier pass at the same samples made (``KnownPrimals`` of ``rules/convolution.py``), if it is kept.
        used: the names of the ops that ran, where somebody asks for them (:func:`recording`).
    """

    key: object = field(default_factory=object)
    deferred: list[Any] | None = None
    known: Any = None
    used: dict[str, set[str]] | None = None


_CURRENT: ContextVar[Pass] = ContextVar("dual_pass", default=Pass())  # noqa: B039  (frozen, and nothing is deferred in it)

#: The pass that is running in this thread.
current_pass = _CURRENT.get


@contextlib.contextmanager
def within(**changes: Any) -> Iterator[Pass]:
    """Run the body in the current pass with something about it changed."""
    token = _CURRENT.set(replace(_CURRENT.get(), **changes))
    try:
        yield _CURRENT.get()
    finally:
        _CURRENT.reset(token)


def dual_pass() -> contextlib.AbstractContextManager[Pass]:
    """Run the body as a pass of its own."""
    return within(key=object(), deferred=[])


@contextlib.contextmanager
def recording() -> Iterator[dict[str, set[str]]]:
    """Collect the names of the ops that run inside the body: ``"fused"``, ``"fallback"``, ``"refused"``."""
    used: dict[str, set[str]] = {"fused": set(), "fallback": set(), "refused": set()}
    with within(used=used):
        yield used
