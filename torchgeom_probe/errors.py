"""The one exception type, and the places where an optional package and an unknown option are refused."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any


class ProbeError(Exception):
    """A measurement was refused: what we saw, the likely cause, and the line to write.

    Everything that this package raises on purpose is a ``ProbeError``, so one ``except`` is enough.

    >>> import torch, torchgeom_probe as tgp
    >>> try:
    ...     tgp.measure(torch.nn.Linear(3, 5), torch.zeros(2, 3), layers=[])
    ... except tgp.ProbeError as error:
    ...     assert "layers" in str(error)
    """


class EngineRefusal(ProbeError):
    """One engine cannot run this model; ``engine="auto"`` goes on to the next one."""


class LayerRefusal(ProbeError):
    """Some layers have nothing to measure; ``layers="auto"`` leaves them out and goes on.

    Attributes:
        layers: name → why, in a few words.
    """

    def __init__(self, message: str, layers: dict[str, str]) -> None:
        super().__init__(message)
        self.layers = layers


def first_line(error: BaseException) -> str:
    """The first line of an error, with its type where it is not our own.

    >>> first_line(KeyError("a"))
    "KeyError: 'a'"
    """
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, ProbeError) else f"{type(error).__name__}: {lines[0]}"


def optional(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or raise a ProbeError with the pip line that brings it.

    >>> optional("math", extra="figures").floor(1.5)
    1
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A broken import INSIDE an installed package is its own problem and must not be blamed on a missing extra.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        package = module.split(".")[0]
        raise ProbeError(
            f"this needs the package {package!r}, which is not installed.\n"
            f"Install it with:  python -m pip install 'torchgeom_probe[{extra}]'"
        ) from error


def refuse_unknown(options: Iterable[str], verb: Callable[..., Any], *more: str) -> None:
    """Raise a ProbeError, with the closest name, for an option that is no keyword of a verb and none of ``more``.

    >>> def scan(model, *, path=None, progress=None): ...
    >>> try:
    ...     refuse_unknown(["pathh"], scan, "layers")
    ... except ProbeError as error:
    ...     print(error)
    'pathh' is no option of scan; they are path, progress, layers.
    Did you mean path=?
    """
    parameters = inspect.signature(verb).parameters.values()
    known = list(dict.fromkeys([*(p.name for p in parameters if p.kind is p.KEYWORD_ONLY), *more]))
    odd = next((name for name in options if name not in known), None)
    if odd is not None:
        near = difflib.get_close_matches(odd, known, n=1, cutoff=0.5)
        if odd in ("y", "label", "labels", "target", "targets"):
            near = []  # which layers= is near to
        advice = f"Did you mean {near[0]}=?" if near else "Leave it out."
        raise ProbeError(f"{odd!r} is no option of {verb.__name__}; they are {', '.join(known)}.\n{advice}")
