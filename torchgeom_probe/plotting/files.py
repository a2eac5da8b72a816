"""Figures as files: PNG, PDF and SVG that are the same again, small PNGs for a page, animations.

matplotlib and Pillow are imported on the first call; without them: ProbeError with the pip line.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchgeom_probe.errors import ProbeError, optional

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is optional: its types are for the type checker alone
    Figure = Any


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 160) -> Path:
    """Write a figure as .png, .pdf or .svg, by the ending of the path; returns the path.

    Equal figures give equal bytes as PNG and PDF: no date is written into them.

    Raises:
        ProbeError: another ending.

    >>> import tempfile
    >>> from matplotlib.figure import Figure
    >>> save(Figure(), tempfile.mkdtemp() + "/empty.png").stat().st_size > 0
    True

    """
    target = Path(path)
    data = rendered(figure, ending=target.suffix, dpi=dpi)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return target


def rendered(figure: Figure, *, ending: str = ".png", dpi: int = 160) -> bytes:
    r"""Return a figure as the bytes of a .png, .pdf or .svg file; equal figures give equal PNG and PDF.

    >>> from matplotlib.figure import Figure
    >>> rendered(Figure())[:4]
    b'\x89PNG'
    """
    dates: dict[str, dict[str, Any]] = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    if ending.lower() not in dates:
        raise ProbeError(
            f"a figure is no {ending or 'file without an ending'}.\nWrite:  save(figure, 'map.png')  "
            "or .pdf or .svg"
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending.lower()[1:], dpi=dpi, metadata=dates[ending.lower()])
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

    (Pillow writes it, as matplotlib's ``PillowWriter`` has it do, but each frame is a figure of its own.)

    Raises:
        ProbeError: no frame.

    >>> from matplotlib.figure import Figure
    >>> animated([Figure(), Figure()])[:6]
    b'GIF89a'
    """
    images = [_palette_image(figure, dpi) for figure in frames]
    if not images:
        raise ProbeError(
            "an animation of no frames.\nGive one figure an epoch:  animated([figure_0, figure_1])"
        )
    milliseconds = round(1000 * seconds)
    durations = [milliseconds] * (len(images) - 1) + [4 * milliseconds]
    buffer = io.BytesIO()
    images[0].save(
        buffer, format="gif", save_all=True, append_images=images[1:], duration=durations, loop=0, disposal=2
    )
    return buffer.getvalue()


def _palette_image(figure: Figure, dpi: int) -> Any:
    pillow = optional("PIL.Image", extra="figures")
    image = pillow.open(io.BytesIO(rendered(figure, dpi=dpi))).convert("RGB")
    return image.quantize(256, method=pillow.Quantize.MEDIANCUT, dither=pillow.Dither.NONE)
