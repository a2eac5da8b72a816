"""The one exception type, and the one place where an optional package is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType


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
