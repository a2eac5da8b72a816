"""What a hook notes for a test: a measurement puts every list back that it can find, and so it would a note."""

from __future__ import annotations

from queue import Empty, SimpleQueue
from typing import Any


class Notes:
    """Takes what hooks append, also inside a measurement, out of its reach."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._read: list[Any] = []

    def append(self, note: Any) -> None:
        self._queue.put(note)

    def read(self) -> list[Any]:
        """All notes so far."""
        while True:
            try:
                self._read.append(self._queue.get_nowait())
            except Empty:
                return self._read
