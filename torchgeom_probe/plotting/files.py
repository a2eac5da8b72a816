"""Figures as files: PNG, PDF and SVG that are the same again, small PNGs for a page, animations."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.files import write_atomically
from torchgeom_probe.plotting.style import Figure

_DATES: dict[str, dict[str, Any]] = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 160) -> Path:
    """Write a figure as .png, .pdf or .svg, by the ending of the path; returns the path.

    Raises:
        ProbeError: another ending.

    >>> import tempfile
    >>> from matplotlib.figure import Figure
    >>> save(Figure(), tempfile.mkdtemp() + "/empty.png").stat().st_size > 0
    True

    """
    return write_atomically(path, rendered(figure, ending=Path(path).suffix, dpi=dpi))


def rendered(figure: Figure, *, ending: str = ".png", dpi: int = 160) -> bytes:
    r"""Return a figure as the bytes of a .png, .pdf or .svg file; equal figures give equal PNG and PDF.

    >>> from matplotlib.figure import Figure
    >>> rendered(Figure())[:4]
    b'\x89PNG'
    """
    if ending.lower() not in _DATES:
        seen = ending or "file without an ending"
        raise ProbeError(f"a figure is no {seen}.\nWrite:  save(figure, 'map.png')  or .pdf or .svg")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending.lower()[1:], dpi=dpi, metadata=_DATES[ending.lower()])
    return buffer.getvalue()


def small_png(figure: Figure, limit: int) -> bytes:
    """Return a figure as a PNG of 256 colours of at most ``limit`` bytes, at the highest resolution that fits.

    >>> from matplotlib.figure import Figure
    >>> len(small_png(Figure(), 20_000)) <= 20_000
    True
    """
    for dpi in (130, 115, 100, 90, 80, 70, 60, 50):
        buffer = io.BytesIO()
        _palette_image(figure, dpi).save(buffer, format="png", optimize=True)
        if buffer.tell() <= limit:
            break
    return buffer.getvalue()


def animated(frames: Iterable[Figure], *, seconds: float = 0.6, dpi: int = 80) -> bytes:
    """Return figures of one size as an animated GIF, the last one held; equal figures give equal bytes.

    Raises:
        ProbeError: no frame.

    >>> from matplotlib.figure import Figure
    >>> animated([Figure(), Figure()])[:6]
    b'GIF89a'

    """
    images = [_palette_image(figure, dpi) for figure in frames]
    if not images:
        raise ProbeError("an animation of no frames.\nGive one figure an epoch:  animated([figure_0, figure_1])")
    times = [round(1000 * seconds)] * (len(images) - 1) + [4 * round(1000 * seconds)]
    buffer = io.BytesIO()
    images[0].save(buffer, "gif", save_all=True, append_images=images[1:], duration=times, loop=0, disposal=2)
    return buffer.getvalue()


def _palette_image(figure: Figure, dpi: int) -> Any:
    pillow = optional("PIL.Image", extra="figures")
    image = pillow.open(io.BytesIO(rendered(figure, dpi=dpi))).convert("RGB")
    return image.quantize(256, method=pillow.Quantize.MEDIANCUT, dither=pillow.Dither.NONE)
