"""What goes wrong inside a probe: counted and shown once, so that it ends no training; or raised."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Literal

from torchgeom_probe.errors import ProbeError

# Between a failure and the training loop there are frames of ours, of contextlib, and of the optimizer's hook.
_BETWEEN = ["torchgeom_probe", "contextlib", "torch"]


class Failures:
    """How many exceptions there were, and the last of them; with ``on_error="raise"`` they are raised as well."""

    def __init__(self, on_error: Literal["warn", "raise"]) -> None:
        if on_error not in ("warn", "raise"):
            raise ProbeError(f"on_error is 'warn' or 'raise'; got {on_error!r}.")
        self.on_error = on_error
        self.count = 0
        self.last: Exception | None = None
        self._shown: set[tuple[str, str]] = set()

    @contextlib.contextmanager
    def counted(self, doing: str, step: int, *, raised: bool = False) -> Iterator[None]:
        """Do something named ``doing`` that may fail; ``raised``: whatever ``on_error`` says."""
        try:
            yield
        except Exception as error:
            self.count += 1
            self.last = error
            if self.on_error == "raise" or raised:
                raise
            kind = (doing, type(error).__name__)
            if kind not in self._shown:
                self._shown.add(kind)
                loop = _training_loop()
                text = (
                    f"torchgeom_probe.Monitor, step {step}: {doing} failed, and training goes on (shown once, counted "
                    "in monitor.failures; on_error='raise' stops here).\n"
                    f"{type(error).__name__}: {error}"
                )
                warnings.warn_explicit(text, RuntimeWarning, loop.f_code.co_filename, loop.f_lineno)


def _training_loop() -> FrameType:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        frame = frame.f_back
    return frame
