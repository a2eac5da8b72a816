"""Figures as files: PNG, PDF and SVG that are the same again, small PNGs for a page."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.files import write_atomically
from torchgeom_probe.plotting.style import Figure

# Ending → the time of day, which is left out: equal figures give equal PNG and PDF.
_DATES: dict[str, dict[str, Any]] = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 160) -> Path:
    """Write a figure as .png, .pdf or .svg, by the ending of the path; returns the path.

    Raises:
        ProbeError: another ending.

    >>> import tempfile
    >>> from matplotlib.figure import Figure
    >>> save(Figure(), tempfile.mkdtemp() + "/empty.png").read_bytes()[1:4]
    b'PNG'
    """
    ending = Path(path).suffix
    if ending.lower() not in _DATES:
        seen = ending or "file without an ending"
        raise ProbeError(f"a figure is no {seen}.\nWrite:  save(figure, 'map.png')  or .pdf or .svg")
    return write_atomically(path, _rendered(figure, ending.lower(), dpi).getvalue())


def small_png(figure: Figure, limit: int) -> bytes:
    """Return a figure as a PNG of at most ``limit`` bytes, at the highest resolution that fits; else at the lowest.

    In all its colours where it is then as wide as a page; else of 256, which bands smooth fields.

    >>> from matplotlib.figure import Figure
    >>> len(small_png(Figure(), 20_000)) <= 20_000
    True
    """
    pillow = optional("PIL.Image", extra="figures")
    for dpi, whole in ((115, True), (100, True), (115, False), (90, False), (70, False), (50, False)):
        image = pillow.open(_rendered(figure, ".png", dpi)).convert("RGB")
        image = image if whole else image.quantize(256, method=pillow.Quantize.MEDIANCUT, dither=pillow.Dither.NONE)
        buffer = io.BytesIO()
        image.save(buffer, format="png", optimize=True)
        if buffer.tell() <= limit:
            break
    return buffer.getvalue()


def _rendered(figure: Figure, ending: str, dpi: int) -> io.BytesIO:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending[1:], dpi=dpi, metadata=_DATES[ending])
    return buffer
