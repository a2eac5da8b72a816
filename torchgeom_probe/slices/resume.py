"""Going on after an interruption: the chunks of a long measurement that are done, and what tells it from others."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.files import decoded, digest, encoded, write_atomically, write_json
from torchgeom_probe.probe import GeometryProbe
from torchgeom_probe.progress import tqdm
from torchgeom_probe.shapes import Tensor

#: Tensors by name, and what JSON can hold: the contents of one file.
Contents: TypeAlias = tuple[dict[str, Tensor], dict[str, Any]]


class Parts:
    """The chunks of a measurement that are done, one file each, in ``<target>.parts`` with its settings beside them.

    ``target``: where the whole result will be.  Raises a ProbeError where the folder holds chunks of another one.
    """

    def __init__(self, target: Path, settings: Mapping[str, Any], *, what: str = "scan") -> None:
        self.folder, self.prefix = _folder(target), ""
        self._settings, stored = settings, self.stored_settings(target)
        if stored is not None:
            refuse_other(stored, settings, where=self.folder, what=what)

    @staticmethod
    def stored_settings(target: Path) -> dict[str, Any] | None:
        """Return the settings of an interrupted measurement with this target; None where there is none."""
        file = _folder(target) / "settings.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    @staticmethod
    def remove(target: Path) -> None:
        """Delete the folder, if there is one: the whole result is in its place."""
        shutil.rmtree(_folder(target), ignore_errors=True)

    def named(self, prefix: str) -> Parts:
        """Those of the same measurement that belong to what the prefix says; others are as if they were not there."""
        others = copy.copy(self)
        others.prefix = f"{prefix}-"
        return others

    def get(self, index: int) -> bytes | None:
        """Return what was put as this chunk, or None."""
        file = self._file(index)
        return file.read_bytes() if file.exists() else None

    def put(self, index: int, data: bytes) -> None:
        """Store a chunk, the settings before the first; it is on the disk when this returns."""
        if not (self.folder / "settings.json").exists():
            write_json(self.folder / "settings.json", self._settings)
        write_atomically(self._file(index), data)

    def _file(self, index: int) -> Path:
        return self.folder / f"{self.prefix}{index:06d}.safetensors"


def _folder(target: Path) -> Path:
    return target.with_name(f"{target.name}.parts")


def by_chunks(
    chunks: Iterable[tuple[int, Tensor]],
    measure: Callable[[Tensor], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
    parts: Parts | None,
    *,
    kind: str,
    desc: str,
    unit: str,
    progress: bool | None,
) -> Iterator[tuple[int, Contents]]:
    """Yield what was found at one chunk after the other, by number: what is stored of it, or what is measured now.

    Both went through the same bytes, so that a measurement which was interrupted ends as one that was not.
    """
    mine = list(chunks)
    hidden = None if progress is None else not progress  # None: tqdm shows its bar on a terminal alone
    with tqdm(total=sum(len(chunk) for _, chunk in mine), desc=desc, unit=unit, disable=hidden) as bar:
        for index, chunk in mine:
            data = None if parts is None else parts.get(index)
            if data is None:
                data = encoded(*measure(chunk), kind=kind)
                if parts is not None:
                    parts.put(index, data)
            yield index, decoded(data, kind=kind, origin=f"chunk {index}")
            bar.update(len(chunk))


def refuse_other(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, where: Path, what: str = "scan") -> None:
    """Refuse to go on with, or to take for this one, a measurement of other settings.

    Raises:
        ProbeError: the settings differ; the message names which, and how.
    """
    different = [key for key in {**wanted, **stored} if stored.get(key) != wanted.get(key)]
    if different:
        key = different[0]
        digests = key in ("model", "slice", "initial", "samples")
        how = "" if digests else f" ({key}={stored.get(key)!r}, now {wanted.get(key)!r})"
        ending = Path(where.name.removesuffix(".parts")).suffix
        raise ProbeError(
            f"{where} holds another {what}: its {', '.join(different)} differ{how}.\n"
            f"Save to another path, or delete what is there:  {what}(..., path='another{ending}')"
        )


def probe_settings(probe: GeometryProbe) -> dict[str, Any]:
    """Return what a probe measures and how, as JSON can hold it; equal in every process that measures the same."""
    return {
        "layers": sorted({*probe.layers, *probe.left_out}),  # what "auto" leaves out is known after the first chunk
        "estimator": repr(probe.estimator),
        "normalize": probe.normalize,
        "transform": in_words(probe.transforms),
        "engine": probe.engine,
        "source": probe.source,
        "wrt": in_words(probe.wrt),
        "mode": probe.mode,
        "precision": probe.precision,
    }


def in_words(value: Any) -> Any:
    """Say what an argument is, as JSON can hold it and the same in the next process: no memory addresses.

    >>> in_words({"a": nn.Identity(), "b": [print, 3]})
    {'a': 'Identity e399d9fdfb6477e4', 'b': ['builtins.print', 3]}
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} {state_digest(value)}"
    if isinstance(value, Mapping):
        return {str(key): in_words(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [in_words(entry) for entry in value]
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def state_digest(module: nn.Module) -> str:
    """Return 16 hexadecimal digits that tell a module's class, parameters and buffers from any other's."""
    return digest(type(module).__qualname__, {**dict(module.named_parameters()), **dict(module.named_buffers())})
