"""Event files → an index of the geometry in them, kept up as they grow; values are read when they are looked at.

TensorBoard's own store keeps ten steps of a plugin's tensors.  So the files are walked once, each from where the last
walk stopped, and of each probe its step, its place and its statistics are kept; the rest stays on disk.  What is kept
is bounded: :data:`MOST` probes a run (beyond it every second one is let go) and :data:`CACHE` bytes of values.

The format is that of ``integrations/tensorboard_packed.py``.  Legend of axes: L layers, S numbers.
"""

from __future__ import annotations

import json
import os
import re
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.io_wrapper import IsSummaryEventsFile
from tensorboard.compat import tf
from tensorboard.compat.proto import event_pb2

MOST = 2048  # steps of one thing in one run
CACHE = 64 << 20  # bytes
_CHUNK = 4 << 20
_LARGEST = 256 << 20  # bytes of a record; what claims to be larger is no event file
_OURS = b"\x0a\x08geometry"  # PluginData.plugin_name, as it stands in a record
_SMALL = 160  # bytes: the start of a session, and a scalar
_SCALAR = re.compile(r"([a-z]\w*)/(\d\d+_[\w.-]+)$")  # of a log without packed summaries
_BESIDE = re.compile(r".*_(band|histogram)$|geometry$")


@dataclass(frozen=True)
class Place:
    """Where a record lies."""

    path: str
    start: int
    size: int


@dataclass
class Kept:
    """A record of the index: its place, its head, and of a probe the statistics [L, S]."""

    place: Place
    head: dict[str, Any]
    statistics: np.ndarray | None = None


@dataclass
class Run:
    """What one directory holds: (kind, tag) → step → record; the scalars of old logs; how far its files are read."""

    records: dict[tuple[str, str], dict[int, Kept]] = field(default_factory=dict)
    scalars: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    told: bool = False  # the writer's text is there
    offsets: dict[str, int] = field(default_factory=dict)

    def steps(self, kind: str, tag: str = "") -> list[int]:
        """The steps of one thing, ascending."""
        return sorted(self.records.get((kind, tag), ()))

    def purge(self, step: int) -> None:
        """Forget what a resumed run writes anew."""
        known: list[dict[int, Any]] = [*self.records.values()]
        for series in known + [series for labels in self.scalars.values() for series in labels.values()]:
            for later in [other for other in series if other >= step]:
                del series[later]


class Index:
    """The runs under some directories: ``update()`` reads on, ``unpacked()`` reads values.

    Args:
        directories: path → the name that its runs go by, or None; any that TensorBoard itself can read.
    """

    def __init__(self, directories: dict[str, str | None]) -> None:
        self.runs: dict[str, Run] = {}
        self.lock = threading.RLock()
        self.read, self.total = 0, 0  # bytes of the walk that is under way, or was the last
        self._directories = directories
        self._heads: dict[bytes, dict[str, Any]] = {}
        self._cache: OrderedDict[tuple[Place, str], np.ndarray] = OrderedDict()
        self._cached = 0

    def update(self) -> None:
        """Read what is new in the event files."""
        files = {run: {path: _size(path) for path in paths} for run, paths in self._files().items()}
        with self.lock:
            for name, run in list(self.runs.items()):
                if any(files.get(name, {}).get(path, -1) < end for path, end in run.offsets.items()):
                    del self.runs[name]  # deleted, or begun anew
            known = {path: end for run in self.runs.values() for path, end in run.offsets.items()}
        grown = [(n, p, known.get(p, 0), size) for n, own in files.items() for p, size in own.items()]
        self.read, self.total = 0, sum(size - start for _, _, start, size in grown)
        for name, path, start, size in grown:
            for begin, end, records in _chunks(path, start, size):
                with self.lock:
                    run = self.runs.setdefault(name, Run())
                    for offset, record in records:
                        self._take(run, record, Place(path, offset, len(record)))
                    run.offsets[path] = end
                self.read += end - begin
        self.read = self.total

    def _files(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for directory, name in self._directories.items():
            for folder, _, files in tf.io.gfile.walk(directory):
                relative = os.path.relpath(folder, directory)
                run = relative if name is None else os.path.normpath(os.path.join(name, relative))
                own = [os.path.join(folder, file) for file in sorted(files, key=_parts) if IsSummaryEventsFile(file)]
                if own:
                    found.setdefault(run, []).extend(own)
        return found

    def unpacked(self, kept: Kept, *names: str) -> dict[str, np.ndarray]:
        """Return those of these arrays that the record has, read from its file or remembered."""
        with self.lock:
            have = {n: self._cache[kept.place, n] for n in names if (kept.place, n) in self._cache}
        if missing := [name for name in names if name in kept.head["arrays"] and name not in have]:
            event = _parsed(_bytes(kept.place.path, kept.place.start, kept.place.size))
            (value,) = [v for v in event.summary.value if v.metadata.plugin_data.plugin_name == "geometry"]
            fresh = _arrays(kept.head, value.tensor.string_val, missing)
            with self.lock:
                for name, array in fresh.items():
                    self._cached += 0 if (kept.place, name) in self._cache else array.nbytes
                    self._cache[kept.place, name] = array
                while self._cached > CACHE:
                    self._cached -= self._cache.popitem(last=False)[1].nbytes
            have |= fresh
        return have

    def _take(self, run: Run, record: bytes, place: Place) -> None:
        if _OURS not in record and len(record) > _SMALL and b"geometry/conventions" not in record:
            return
        try:
            event = _parsed(record)
            if event.session_log.status == event_pb2.SessionLog.START:
                run.purge(event.step)
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "geometry":
                    self._keep(run, event.step, value, place)
                elif value.tag.startswith("geometry/conventions"):
                    run.told = True
                elif value.WhichOneof("value") == "simple_value" and (found := _SCALAR.match(value.tag)):
                    if not _BESIDE.match(found[1]) and not run.steps("probe"):
                        series = run.scalars.setdefault(found[1], {}).setdefault(found[2], {})
                        series[event.step] = value.simple_value
                        _thinned(series)
        except (ValueError, LookupError, TypeError, AttributeError, zlib.error):  # damaged, or of a later version
            return

    def _keep(self, run: Run, step: int, value: Any, place: Place) -> None:
        packed, kind = value.tensor.string_val, value.metadata.plugin_data.content.decode()
        # Most heads of a run are the same.
        head = self._heads.get(packed[0])
        if head is None:
            head = json.loads(zlib.decompress(packed[0]))
            self._heads = {packed[0]: head, **dict(list(self._heads.items())[:63])}
        kept = Kept(place, head)
        if kind == "probe":
            kept.statistics = _arrays(head, packed, ["statistics"])["statistics"]
            run.scalars.clear()
        elif "range" in head["arrays"]:
            kept.statistics = _arrays(head, packed, ["range"])["range"]
        series = run.records.setdefault((kind, head["tag"]), {})
        series[step] = kept
        _thinned(series)


def _parts(file: str) -> list[str | int]:
    # Files are read in the order in which they were begun: …tfevents.SECONDS.HOST.PROCESS.9 before …10.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file)]


def _thinned(series: dict[int, Any]) -> None:
    if len(series) > MOST:
        for step in sorted(series)[1:-1:2]:
            del series[step]


def _arrays(head: dict[str, Any], packed: Any, names: list[str]) -> dict[str, np.ndarray]:
    found = {}
    for name, data in zip(head["arrays"], packed[1:], strict=True):
        if name in names:
            dtype, shape = head["arrays"][name]
            found[name] = np.frombuffer(zlib.decompress(data), dtype).reshape(shape)
    return found


def _parsed(record: bytes) -> Any:
    try:
        return event_pb2.Event.FromString(record)
    except Exception as error:  # protobuf's own class goes by several names
        raise ValueError("no event") from error


def _chunks(path: str, start: int, size: int) -> Iterator[tuple[int, int, list[tuple[int, bytes]]]]:
    """Yield (start, end, the whole records in between); a record that is cut short waits until it has grown."""
    wanted = _CHUNK
    while start < size:
        data = _bytes(path, start, min(wanted, size - start))
        at, records = 0, list[tuple[int, bytes]]()
        while at + 12 <= len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            if length > _LARGEST:
                yield start, size, records
                return
            if at + 16 + length > len(data):
                break
            records.append((start + at + 12, data[at + 12 : at + 12 + length]))
            at += 16 + length
        if at:
            yield start, start + at, records
            start, wanted = start + at, _CHUNK
        elif len(data) < wanted:
            return
        else:
            wanted *= 2


def _size(path: str) -> int:
    try:
        return tf.io.gfile.stat(path).length
    except Exception:  # gone since it was listed; each file system has errors of its own
        return 0


def _bytes(path: str, start: int, size: int) -> bytes:
    if "://" not in path:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)
    if not hasattr(tf.io.gfile, "get_filesystem"):  # TensorFlow is installed
        with tf.io.gfile.GFile(path, "rb") as file:
            file.seek(start)
            return file.read(size)
    # Each file system of TensorBoard calls the place to go on from by a name of its own.
    goes_on = {"opaque_offset": start, "byte_offset": start}
    return tf.io.gfile.get_filesystem(path).read(path, True, size, goes_on)[0][:size]
