"""Scans as pictures: log-volume, predictions and entropy along a line or over a plane.

One style for all of them.  Log-volumes are drawn in viridis and entropies in magma, which are perceptually
uniform; maps of one kind share one colour scale, so that before and after compare; the class boundaries are
drawn into every map; the unit and the normalisation stand on every scale.  Points without a finite log-volume
stay grey.

A figure is a ``matplotlib.figure.Figure`` of its own: pyplot is not imported, and no global setting is read
or changed by it. matplotlib is imported on the first call; without it: ProbeError with the pip line.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices import Line, Plane, SliceScan

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is optional: its types are for the type checker alone
    Figure = Any

Unit = Literal["nat", "log10"]

_BEFORE, _AFTER = "#7f7f7f", "#31688e"
_SMALL, _NORMAL, _LARGE = 8, 9.5, 12
# Class c has the colour c mod 20, light enough for a contour and a picture on it.
_CLASSES = (
    "#aec7e8 #ffbb78 #98df8a #ff9896 #c5b0d5 #c49c94 #f7b6d2 #c7c7c7 #dbdb8d #9edae5 "
    "#7fa7d4 #f2a65a #73c378 #e57373 #a58ac2 #a87f72 #e58fbf #a0a0a0 #bcbd55 #63b9c9"
).split()


def plot_line(
    before: SliceScan,
    after: SliceScan | None = None,
    *,
    layers: Sequence[str] | None = None,
    images: Sequence[Tensor | np.ndarray] | Literal["auto"] | None = "auto",
    class_names: Sequence[str] | None = None,
    unit: Unit = "nat",
    relative: bool = False,
    title: str | None = None,
    names: tuple[str, str] = ("before training", "after training"),
) -> Figure:
    r"""Draw the log-volume of each layer along a line, with the entropy and the predicted classes below.

    One panel a layer, then the entropy in nats, then a strip of the predicted classes per scan, then the
    samples at the two ends.  Dotted lines mark where the (last) scan's prediction changes.

    Args:
        before: the scan to draw, or the untrained network's where ``after`` is given.
        after: the trained network's scan of the same line.
        layers: which, in which order; None: all.
        images: the two samples, as [H, W], [1, H, W], [3, H, W] or [H, W, 3]; "auto" takes them from the line
            where they look like pictures; None draws none.
        class_names: the name of each class index.
        unit: of the log-volume: ``"nat"`` or ``"log10"``.
        relative: draw each log-volume minus its median over the slice, so that its pattern shows even where
            training has moved its level by more than the pattern's range.
        title: above the figure.
        names: what the two scans are called.

    Raises:
        ProbeError: scans that are not of one line, an unknown layer or unit, images that are no pictures, no
            matplotlib.

    >>> import torch
    >>> from torchgeom_probe.slices import scan
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> along = scan(model, Line(torch.zeros(2), torch.ones(2), steps=20), layers=["1"], progress=False)
    >>> figure = plot_line(along)
    >>> assert [axes.get_ylabel() for axes in figure.axes][:2] == ["1\nlog √det g [nat]", "entropy [nat]"]

    """
    scans = _comparable(before, after, Line, "plot_line")
    chosen = _layers(scans, layers)
    pictures = _pictures(scans[-1], images)
    figure = _figure(7.0, 1.55 * (len(chosen) + 1) + 0.35 * len(scans) + (1.1 if pictures else 0) + 0.9)
    heights = [1.55] * (len(chosen) + 1) + [0.3] * len(scans) + ([1.1] if pictures else [])
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    t = scans[-1].slice.grid()[:, 0].numpy()
    half_step = (t[1] - t[0]) / 2
    changes = _changes(scans[-1]) * (t[1] - t[0]) + half_step
    styles = _styles(len(scans), names)

    panels: list[Any] = []
    for row, layer in enumerate(chosen):
        axes = figure.add_subplot(grid[row], sharex=panels[0] if panels else None)
        for scan, style in zip(scans, styles, strict=True):
            axes.plot(t, _finite(_volume(scan, layer, unit, relative)), **style)
        label = _volume_label(unit, relative).replace(" − ", "\n− ")
        axes.set_ylabel(f"{layer or 'model'}\n{label}", fontsize=_NORMAL)
        panels.append(axes)
    axes = figure.add_subplot(grid[len(chosen)], sharex=panels[0])
    for scan, style in zip(scans, styles, strict=True):
        axes.plot(t, scan.entropy.numpy(), **style)
    axes.set_ylabel("entropy [nat]", fontsize=_NORMAL)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    panels.append(axes)
    for axes in panels:
        for change in changes:
            axes.axvline(change, color="black", linewidth=0.9, linestyle=":")
        axes.tick_params(labelsize=_SMALL, labelbottom=False)
        axes.grid(alpha=0.25, linewidth=0.6)
    if len(scans) > 1:
        panels[0].legend(
            fontsize=_SMALL, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False
        )

    for row, (scan, style) in enumerate(zip(scans, styles, strict=True)):
        axes = figure.add_subplot(grid[len(chosen) + 1 + row], sharex=panels[0])
        colours, norm, present = _class_colours([scan])
        axes.imshow(
            _class_index(scan, present)[None],
            aspect="auto",
            cmap=colours,
            norm=norm,
            interpolation="nearest",
            extent=(t[0] - half_step, t[-1] + half_step, 0, 1),
        )
        for start, end, index in _runs(scan.predictions.numpy()):
            if end - start >= 0.04 * len(t):
                middle = (t[start] + t[end - 1]) / 2
                axes.text(
                    middle,
                    0.5,
                    _class_name(index, class_names),
                    ha="center",
                    va="center",
                    fontsize=_SMALL,
                    clip_on=True,
                )
        axes.set_yticks([])
        axes.set_ylabel(
            "class" if len(scans) == 1 else f"class\n{style['label']}",
            fontsize=_SMALL,
            rotation=0,
            ha="right",
            va="center",
        )
        axes.tick_params(labelsize=_SMALL, labelbottom=row == len(scans) - 1)
        panels.append(axes)
    panels[0].set_xlim(t[0] - half_step, t[-1] + half_step)
    panels[-1].set_xlabel("t, from sample a (0) to sample b (1)", fontsize=_NORMAL)
    if pictures:
        axes = figure.add_subplot(grid[-1])
        axes.set_axis_off()
        for place, name, picture in zip((0.0, 1.0), "ab", pictures, strict=True):
            inset = axes.inset_axes((place * 0.8, 0.0, 0.2, 0.86))
            inset.set_anchor("W" if place == 0 else "E")
            _show_picture(inset, picture)
            inset.set_title(name, fontsize=_NORMAL, pad=2)
    figure.align_ylabels(panels[: len(chosen) + 1])
    _finish(figure, scans, chosen, title)
    return figure


def plot_plane(
    before: SliceScan,
    after: SliceScan | None = None,
    *,
    layers: Sequence[str] | None = None,
    images: Sequence[Tensor | np.ndarray] | Literal["auto"] | None = "auto",
    class_names: Sequence[str] | None = None,
    unit: Unit = "nat",
    relative: bool = False,
    share_layers: bool = False,
    log_entropy: bool = False,
    title: str | None = None,
    names: tuple[str, str] = ("before training", "after training"),
) -> Figure:
    """Draw maps over a plane: predictions, entropy and the log-volume of each layer, a row a scan.

    Every column has one colour scale for both rows; it spans the central 99 % of the finite values, and its
    ends are arrows where values lie beyond.  White lines are the class boundaries of the row's own scan; a,
    b, c mark the samples.

    Args:
        before: the scan to draw, or the untrained network's where ``after`` is given.
        after: the trained network's scan of the same plane.
        layers: which, in which order; None: all.
        images: the three samples, as [H, W], [1, H, W], [3, H, W] or [H, W, 3], drawn where they lie in the
            map of the predictions; "auto" takes them from the plane where they look like pictures; None draws
            none.
        class_names: the name of each class index.
        unit: of the log-volume: ``"nat"`` or ``"log10"``.
        relative: draw each log-volume minus its median over the slice, so that its pattern shows even where
            training has moved its level by more than the pattern's range.
        share_layers: one colour scale for all layers, too (for layers of like volume, as after pooling to one
            size).
        log_entropy: draw log10 of the entropy, as the paper does: a confident network's entropy spans many
            orders.
        title: above the figure.
        names: what the two scans are called.

    Raises:
        ProbeError: scans that are not of one plane, an unknown layer or unit, images that are no pictures, no
            matplotlib.

    >>> import torch
    >>> from torchgeom_probe.slices import scan
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> plane = Plane(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), steps=12)
    >>> figure = plot_plane(scan(model, plane, layers=["1"], progress=False))
    >>> assert [axes.get_title() for axes in figure.axes[:3]] == ["prediction", "entropy", "1"]

    """
    scans = _comparable(before, after, Plane, "plot_plane")
    chosen = _layers(scans, layers)
    pictures = _pictures(scans[-1], images)
    plane = scans[-1].slice
    assert isinstance(plane, Plane)
    low, high = plane.extent
    half_step = (high - low) / (plane.steps - 1) / 2
    extent = (low - half_step, high + half_step, low - half_step, high + half_step)
    columns = 2 + len(chosen)
    figure = _figure(2.45 * columns + 0.4, 2.45 * len(scans) + 1.45)
    panels = [
        [figure.add_subplot(len(scans), columns, r * columns + c + 1) for c in range(columns)]
        for r in range(len(scans))
    ]

    volumes = {layer: [_volume(scan, layer, unit, relative) for scan in scans] for layer in chosen}
    everything = [field for fields in volumes.values() for field in fields]
    entropies = [scan.entropy.numpy().astype(np.float64) for scan in scans]
    if log_entropy:
        with np.errstate(divide="ignore"):
            entropies = [np.log10(entropy) for entropy in entropies]
    entropy_label = "log₁₀ (entropy / nat)" if log_entropy else "entropy [nat]"
    fields = [("entropy", entropies, "magma", entropy_label, _limits(entropies))]
    fields += [
        (
            layer or "model",
            volumes[layer],
            "viridis",
            _volume_label(unit, relative),
            _limits(everything if share_layers else volumes[layer]),
        )
        for layer in chosen
    ]

    colours, norm, present = _class_colours(scans)
    for row, scan in enumerate(scans):
        shown = panels[row][0].imshow(
            _class_index(scan, present),
            origin="lower",
            extent=extent,
            cmap=colours,
            norm=norm,
            interpolation="nearest",
        )
    _class_bar(figure, shown, [row[0] for row in panels], present, class_names)
    for column, (_, maps, colour_map, label, limits) in enumerate(fields, start=1):
        palette = optional("matplotlib", extra="figures").colormaps[colour_map].with_extremes(bad="#bdbdbd")
        for row, field in enumerate(maps):
            shown = panels[row][column].imshow(
                np.ma.masked_invalid(field),
                origin="lower",
                extent=extent,
                cmap=palette,
                vmin=limits[0],
                vmax=limits[1],
                interpolation="nearest",
            )
        bar = figure.colorbar(
            shown,
            ax=[row[column] for row in panels],
            location="bottom",
            extend=_extension(maps, limits),
            shrink=0.92,
            aspect=18,
            pad=0.03,
        )
        bar.set_label(label, fontsize=_NORMAL)
        bar.ax.tick_params(labelsize=_SMALL)
        bar.ax.locator_params(nbins=5)

    for row, scan in enumerate(scans):
        for column, axes in enumerate(panels[row]):
            _draw_boundaries(axes, scan, plain=column == 0)
            _draw_corners(axes, plane, pictures if column == 0 else [])
            axes.set_xlim(extent[:2])
            axes.set_ylim(extent[2:])
            axes.set_xticks([low, (low + high) / 2, high])
            axes.set_yticks([low, (low + high) / 2, high])
            axes.tick_params(labelsize=_SMALL, labelbottom=row == len(scans) - 1, labelleft=column == 0)
            if row == 0:
                axes.set_title(["prediction", *(name for name, *_ in fields)][column], fontsize=_NORMAL + 0.5)
        if len(scans) > 1:
            panels[row][0].set_ylabel(names[row], fontsize=_LARGE - 1)
    _finish(figure, scans, chosen, title)
    return figure


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


# --- what is drawn ------------------------------------------------------------------------------------------


def _comparable(before: SliceScan, after: SliceScan | None, kind: type, verb: str) -> list[SliceScan]:
    scans = [before] if after is None else [before, after]
    for scan in scans:
        if not isinstance(scan.slice, kind):
            other = "plot_plane" if kind is Line else "plot_line"
            raise ProbeError(
                f"{verb} draws a {kind.__name__} and got a scan of a {type(scan.slice).__name__}.\nWrite:  "
                f"scan.plot()  or  {other}(scan)"
            )
    if len(scans) == 2 and (
        scans[0].slice.shape != scans[1].slice.shape
        or any(
            not torch.equal(x, y) for x, y in zip(scans[0].slice.samples, scans[1].slice.samples, strict=True)
        )
        or not torch.equal(scans[0].slice.grid(), scans[1].slice.grid())
    ):
        raise ProbeError(
            "the two scans are of different slices, so they cannot be drawn point by point.\n"
            "Scan both networks over one slice:  before = scan(net0, plane, ...); after = scan(net, plane, "
            "...)"
        )
    return scans


def _layers(scans: Sequence[SliceScan], layers: Sequence[str] | None) -> list[str]:
    common = [name for name in scans[-1].report if all(name in scan.report for scan in scans)]
    if layers is None:
        chosen = common
    else:
        chosen = [layers] if isinstance(layers, str) else list(layers)
    unknown = [name for name in chosen if name not in common]
    if unknown or not chosen:
        raise ProbeError(
            f"layers={chosen}: {', '.join(map(repr, unknown)) or 'none'} to draw.\nThe scans share the "
            f"layers {common}."
        )
    return chosen


def _volume(scan: SliceScan, layer: str, unit: Unit, relative: bool) -> np.ndarray:
    if unit not in ("nat", "log10"):
        raise ProbeError(
            f"unit={unit!r} is unknown. Write unit='nat' (natural log, the default) or unit='log10'."
        )
    volume = scan.log_volume[layer].double().numpy()
    if relative and np.isfinite(volume).any():
        volume = volume - np.median(volume[np.isfinite(volume)])
    return volume if unit == "nat" else volume / math.log(10)


def _volume_label(unit: Unit, relative: bool) -> str:
    label = "log √det g" if unit == "nat" else "log₁₀ √det g"
    return label + (" − median" if relative else "") + (" [nat]" if unit == "nat" else "")


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _limits(fields: Sequence[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate([field[np.isfinite(field)] for field in fields])
    if not len(values):
        return 0.0, 1.0
    low, high = (float(q) for q in np.quantile(values, [0.005, 0.995]))
    # A constant field is one colour in the middle of a scale, not an amplified rounding error.
    least = 1e-4 * max(1.0, abs(low))
    return (low, high) if high - low > least else ((low + high - least) / 2, (low + high + least) / 2)


def _extension(fields: Sequence[np.ndarray], limits: tuple[float, float]) -> str:
    below = any((field[np.isfinite(field)] < limits[0]).any() for field in fields)
    above = any((field[np.isfinite(field)] > limits[1]).any() for field in fields)
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[
        below, above
    ]


def _changes(scan: SliceScan) -> np.ndarray:
    labels = scan.predictions.numpy()
    return np.flatnonzero(labels[1:] != labels[:-1])


def _runs(labels: np.ndarray) -> list[tuple[int, int, int]]:
    edges = [0, *(np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist(), len(labels)]
    return [(start, end, int(labels[start])) for start, end in pairwise(edges)]


def _pictures(scan: SliceScan, images: Any) -> list[np.ndarray]:
    samples = scan.slice.samples
    if images is None:
        return []
    if isinstance(images, str):
        if images != "auto":
            raise ProbeError(
                f"images={images!r}: give the samples as pictures, images='auto', or images=None for none."
            )
        return [_picture(s) for s in samples] if all(_is_picture(s.shape) for s in samples) else []
    if len(images) != len(samples) or not all(_is_picture(tuple(image.shape)) for image in images):
        raise ProbeError(
            f"images has the shapes {[tuple(getattr(i, 'shape', ())) for i in images]}; a "
            f"{type(scan.slice).__name__} has "
            f"{len(samples)} samples, each drawn as [H, W], [1, H, W], [3, H, W] or [H, W, 3].\n"
            "Shape them so:  images=[sample.reshape(8, 8) for sample in plane.samples]"
        )
    return [_picture(image) for image in images]


def _is_picture(shape: Sequence[int]) -> bool:
    if len(shape) == 2:
        return min(shape) >= 4
    return len(shape) == 3 and (shape[0] in (1, 3) or shape[2] == 3) and sorted(shape)[1] >= 4


def _picture(image: Any) -> np.ndarray:
    pixels = torch.as_tensor(image).detach().double().cpu().numpy()
    if pixels.ndim == 3:
        pixels = (
            pixels[0]
            if pixels.shape[0] == 1
            else np.moveaxis(pixels, 0, -1)
            if pixels.shape[0] == 3
            else pixels
        )
    span = np.ptp(pixels)
    return (pixels - pixels.min()) / span if span > 0 else np.zeros_like(pixels)


# --- how it is drawn ----------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    optional("matplotlib", extra="figures")
    figures = optional("matplotlib.figure", extra="figures")
    figure = figures.Figure(figsize=(width, height), layout="compressed", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.06)
    return figure


def _styles(count: int, names: tuple[str, str]) -> list[dict[str, Any]]:
    trained = {"color": _AFTER, "linewidth": 1.8, "label": names[1]}
    if count == 1:
        return [trained]
    return [{"color": _BEFORE, "linewidth": 1.4, "linestyle": "--", "label": names[0]}, trained]


def _class_colours(scans: Sequence[SliceScan]) -> tuple[Any, Any, list[int]]:
    """Return colour map, norm and class indices: entry i of the map is class ``present[i]``."""
    colours = optional("matplotlib.colors", extra="figures")
    present = sorted({int(c) for scan in scans for c in scan.predictions.unique()})
    palette = colours.ListedColormap(["#ffffff" if c < 0 else _CLASSES[c % len(_CLASSES)] for c in present])
    return palette, colours.BoundaryNorm(np.arange(len(present) + 1) - 0.5, len(present)), present


def _class_index(scan: SliceScan, present: list[int]) -> np.ndarray:
    return np.searchsorted(present, scan.predictions.numpy())


def _class_name(label: int, class_names: Sequence[str] | None) -> str:
    if label < 0:
        return "not finite"
    return str(label) if class_names is None or label >= len(class_names) else str(class_names[label])


def _class_bar(
    figure: Any, shown: Any, axes: Any, present: list[int], class_names: Sequence[str] | None
) -> None:
    bar = figure.colorbar(
        shown, ax=axes, location="bottom", ticks=range(len(present)), shrink=0.92, aspect=18, pad=0.03
    )
    labels = [_class_name(c, class_names) for c in present]
    crowded = sum(map(len, labels)) + 2 * len(labels) > 30
    bar.ax.set_xticklabels(
        labels,
        rotation=45 if crowded else 0,
        ha="right" if crowded else "center",
        rotation_mode="anchor" if crowded else None,
    )
    bar.ax.tick_params(labelsize=_SMALL, length=0)
    bar.ax.minorticks_off()
    bar.set_label("class", fontsize=_NORMAL)


def _draw_boundaries(axes: Any, scan: SliceScan, *, plain: bool) -> None:
    effects = optional("matplotlib.patheffects", extra="figures")
    labels, margin = scan.predictions.numpy(), scan.margin.numpy()
    plane = scan.slice
    assert isinstance(plane, Plane)
    ticks = np.linspace(*plane.extent, plane.steps)
    classes = np.unique(labels)
    # Between two classes one line is enough; among more, each class has its outline.
    for label in classes[1:] if len(classes) == 2 else classes if len(classes) > 2 else []:
        # The margin falls to 0 on both sides of a boundary: signed by the class it crosses 0 there, between
        # the points.
        signed = np.ma.masked_invalid(np.where(labels == label, margin, -margin))
        lines = axes.contour(
            ticks, ticks, signed, levels=[0.0], colors=["black" if plain else "white"], linewidths=1.0
        )
        if not plain:
            lines.set_path_effects([effects.withStroke(linewidth=2.2, foreground=(0, 0, 0, 0.55))])


def _draw_corners(axes: Any, plane: Plane, pictures: Sequence[np.ndarray]) -> None:
    effects = optional("matplotlib.patheffects", extra="figures")
    low, high = plane.extent
    side = 0.2 * (high - low)
    for i, ((u, v), name) in enumerate(zip(plane.corners.tolist(), "abc", strict=True)):
        if not (low <= u <= high and low <= v <= high):
            continue
        if pictures:
            inset = axes.inset_axes((u - side / 2, v - side / 2, side, side), transform=axes.transData)
            _show_picture(inset, pictures[i])
            inset.set_title(name, fontsize=_SMALL, pad=1.5)
        else:
            axes.plot(
                [u],
                [v],
                marker="o",
                markersize=4,
                color="white",
                markeredgecolor="black",
                markeredgewidth=0.8,
            )
            # Towards the middle where the sample lies at an edge.
            right, above = u > high - side / 2, v > high - side / 2
            axes.annotate(
                name,
                (u, v),
                xytext=(-4 if right else 4, -4 if above else 3),
                textcoords="offset points",
                ha="right" if right else "left",
                va="top" if above else "bottom",
                fontsize=_NORMAL,
                color="white",
                path_effects=[effects.withStroke(linewidth=1.6, foreground="black")],
            )


def _show_picture(axes: Any, picture: np.ndarray) -> None:
    axes.imshow(picture, cmap="gray" if picture.ndim == 2 else None, vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _finish(figure: Any, scans: Sequence[SliceScan], layers: Sequence[str], title: str | None) -> None:
    if title is not None:
        figure.suptitle(
            title + "\n", fontsize=_LARGE, linespacing=0.6
        )  # the empty line keeps it off the column titles
    shown = [scans[-1].report[layer] for layer in layers]
    scaling = {True: "J divided by √n", False: "J not divided by √n"}
    notes = list(dict.fromkeys(f"{layer.estimand}; {scaling[layer.normalized]}" for layer in shown))
    figure.supxlabel("volume: " + " | ".join(notes), fontsize=_SMALL - 0.5, color="#555555")
