"""Files that are whole or not there, and the two formats that results are saved in.

Tensors with their metadata go to the safetensors format: any of its readers opens the file, nothing in it is executed
on loading, and equal contents give equal bytes.  Numbers alone go to JSON that every reader takes: no NaN, no Infinity.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor

#: The one key of a file's header, with all metadata as one text: safetensors writes several keys in any order.
_KEY = "torchgeom_probe"


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file at once or not at all, and make its folder; returns the path.

    The bytes go to a file beside it and are on the disk before that takes the place of the old one.  So a kill or a
    full disk leaves the old file whole, and never half of the new one.

    >>> import tempfile
    >>> write_atomically(tempfile.mkdtemp() + "/new/file", b"whole").read_bytes()
    b'whole'
    """
    with replacing(path) as beside:
        beside.write_bytes(data)
    return Path(path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a file beside another; what was written there then takes its place, at once or not at all.

    >>> import tempfile
    >>> with replacing(tempfile.mkdtemp() + "/file") as beside:
    ...     _ = beside.write_text("whole")
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def finite_or_null(value: Any) -> Any:
    """Return a value as JSON can hold it: None for every number that is not finite, lists for tuples and tensors.

    >>> finite_or_null({"median": math.nan, "interval": (0.5, math.inf), "rank": torch.tensor([2, 3])})
    {'median': None, 'interval': [0.5, None], 'rank': [2, 3]}
    """
    if isinstance(value, Mapping):
        return {str(key): finite_or_null(entry) for key, entry in value.items()}
    if isinstance(value, Tensor):
        return finite_or_null(value.tolist())
    if isinstance(value, (list, tuple)):
        return [finite_or_null(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write JSON for people and programs, at once or not at all; null stands where a number is not finite.

    >>> import tempfile
    >>> print(write_json(tempfile.mkdtemp() + "/x.json", {"a": math.nan}).read_text())
    {
     "a": null
    }
    <BLANKLINE>
    """
    text = json.dumps(finite_or_null(value), indent=1, ensure_ascii=False, allow_nan=False)
    return write_atomically(path, f"{text}\n".encode())


def encoded(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, kind: str) -> bytes:
    """Return tensors and metadata as the bytes of a safetensors file; equal contents give equal bytes.

    Args:
        tensors: name → tensor, on any device; the order of the names does not matter.
        metadata: what JSON can hold; null stands where a number is not finite.
        kind: what the file holds, such as ``"SliceScan"``; :func:`read` asks for it again.

    >>> one = encoded({"a": torch.ones(2), "b": torch.zeros(3)}, {"n": 3, "m": 5}, kind="Example")
    >>> assert one == encoded({"b": torch.zeros(3), "a": torch.ones(2)}, {"m": 5, "n": 3}, kind="Example")
    >>> decoded(one, kind="Example", origin="the bytes above")[1]
    {'m': 5, 'n': 3}
    """
    text = json.dumps({"kind": kind, "metadata": finite_or_null(metadata)}, sort_keys=True, allow_nan=False)
    # Copies: safetensors refuses tensors that share memory, as one value under two names does.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    return safetensors.torch.save(copies, {_KEY: text})


def decoded(data: bytes, *, kind: str, origin: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what :func:`encoded` was given, the tensors on the CPU.

    Args:
        data: the bytes.
        kind: what they must hold.
        origin: where they come from, for the error.

    Raises:
        ProbeError: bytes that are no safetensors file of this package, were cut short, or hold another kind.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
        found, metadata = header["kind"], header["metadata"]
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ProbeError(
            f"{origin} is no saved {kind}, or was cut short ({type(error).__name__}: {error}).\n"
            "Delete it, measure again and save the result:  result.save(path)"
        ) from error
    if found != kind:
        raise ProbeError(f"{origin} holds a {found}, not a {kind}.\nLoad it with:  {found}.load(path)")
    return tensors, metadata


def read(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of :func:`encoded` bytes: its tensors, on the CPU, and its metadata.

    Raises:
        ProbeError: no such file, and whatever :func:`decoded` refuses.
    """
    source = Path(path)
    if not source.is_file():
        raise ProbeError(f"{source} is no file, so there is no {kind} to load.\nSave one first:  result.save(path)")
    return decoded(source.read_bytes(), kind=kind, origin=str(source))


def digest(*parts: str | Tensor | Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that tell texts, tensors (type, shape and bits) and tensors by name apart.

    >>> digest("Linear", torch.zeros(3)) == digest("Linear", torch.zeros(3)) != digest("Linear", torch.zeros(3, 1))
    True
    """
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Mapping):
            for name in sorted(part):
                sha.update(f"{name} {digest(part[name])}\n".encode())
        elif isinstance(part, Tensor):
            sha.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
            sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha.update(f"{len(part)} {part}\n".encode())
    return sha.hexdigest()[:16]
