"""The dual pass that is running: what its tensors and its rules share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torchgeom_probe.errors import ProbeError


class Key:
    """Which pass a DualTensor belongs to, in which thread, and whether another one tried to read it while it ran."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.running, self.read_elsewhere = True, False

    def outside(self) -> ProbeError:
        """The error for a tensor that is read outside of its pass."""
        self.read_elsewhere |= self.running and threading.get_ident() != self.thread
        if self.running and self.read_elsewhere:
            return ProbeError(
                "the model computes in threads of its own, where a dual pass does not follow it.\n"
                "Measure it with engine='vjp'"
            )
        return ProbeError(
            "the model kept a tensor of an earlier measurement (in a list, a cache or an object of its own) and "
            "computes with it now.\n"
            "Keep such state in a buffer or an attribute of the module, which a measurement puts back, or clear it "
            "after measuring."
        )


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
        graph: whether autograd follows the buffers (``graph.py``).
        batch_statistics: whether batch normalisation by the batch's statistics is let through, as constants along x.
        harmless: whether numbers may leave torch, or autograd, because nothing that a layer puts out depends on them.
    """

    key: Key = field(default_factory=Key)
    deferred: list[Any] | None = None
    known: Any = None
    low: Any = None
    used: dict[str, set[str]] | None = None
    at_end: contextlib.ExitStack | None = None
    graph: bool = False
    batch_statistics: bool = False
    harmless: bool = False


_OUTSIDE = Pass()
_CURRENT: ContextVar[Pass] = ContextVar("dual_pass", default=_OUTSIDE)  # each thread has its own

#: The pass that is running; outside of any, one in which nothing is deferred, known or recorded.
current_pass = _CURRENT.get


def followed() -> bool:
    """Whether autograd follows the buffers here: then no rule writes into memory that it may have saved."""
    return _CURRENT.get().graph and torch.is_grad_enabled()


@contextlib.contextmanager
def within(**changes: Any) -> Iterator[Pass]:
    """Run the body in the current pass with something about it changed."""
    token = _CURRENT.set(replace(_CURRENT.get(), **changes))
    try:
        yield _CURRENT.get()
    finally:
        _CURRENT.reset(token)


@contextlib.contextmanager
def dual_pass(**changes: Any) -> Iterator[Pass]:
    """Run the body as a pass of its own, whose tensors nothing outside of it can read.

    Raises:
        ProbeError: something tried, in another thread.
    """
    with contextlib.ExitStack() as at_end, within(key=Key(), deferred=[], at_end=at_end, **changes) as running:
        try:
            yield running
        finally:
            heard = running.key.outside() if running.key.read_elsewhere else None
            running.key.running = False
            if heard is not None:  # raised there, where nobody may have heard of it
                raise heard


@contextlib.contextmanager
def recording() -> Iterator[dict[str, set[str]]]:
    """Collect the names of the ops that run inside the body: ``"fused"``, ``"fallback"``, ``"refused"``."""
    used: dict[str, set[str]] = {"fused": set(), "fallback": set(), "refused": set()}
    with within(used=used):
        yield used
