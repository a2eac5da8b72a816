"""Fields over a plane as maps in a grid; maps that compare share a colour scale, every map has the class boundaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.plotting import style
from torchgeom_probe.plotting.style import LARGE, NORMAL, SMALL, Figure, Images, Scans, mpl
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.slice import Plane


def plot_maps(drawn: Scans) -> Figure:
    """Draw scans of one plane, a row a scan: predictions, entropy, the log-volume of each layer.

    Every column has one colour scale for all rows; it spans the central 99 % of the finite values, and its ends are
    arrows where values lie beyond.  White lines are the class boundaries of the row's own scan; a, b, c mark the
    samples.  Points without a finite value are grey.
    """
    with np.errstate(divide="ignore"):
        entropies = [np.log10(s.entropy.numpy()) if drawn.log_entropy else s.entropy.numpy() for s in drawn.every]
    label = "log₁₀ (entropy / nat)" if drawn.log_entropy else "entropy [nat]"
    layers = {layer: drawn.values(layer) for layer in drawn.shown}
    shared = Scale(drawn.label(drawn.shown[-1]), limits=_limits([f for fields in layers.values() for f in fields]))
    columns: list[tuple[Sequence[Any], Scale]] = [
        ([None] * len(drawn.scans), Scale("class", "classes")),
        (entropies, Scale(label, "magma", _limits(entropies))),
        *((f, shared if drawn.share_layers else Scale(drawn.label(n), limits=_limits(f))) for n, f in layers.items()),
    ]
    return plot_grid(
        [[Map(scan, fields[i], scale) for fields, scale in columns] for i, scan in enumerate(drawn.scans)],
        row_names=drawn.names,
        column_names=["prediction", "entropy", *(layer or "model" for layer in drawn.shown)],
        images=drawn.images,
        class_names=drawn.class_names,
        classes_of=drawn.every,
        title=drawn.title,
        note=style.note(drawn.scans[-1].report, drawn.shown),
    )


@dataclass(frozen=True, eq=False)
class Scale:
    """The colours of maps that compare: all maps of ONE Scale object have its limits and share its bar.

    Args:
        label: with the unit, on the bar.
        palette: ``"viridis"``, ``"magma"`` or any other of matplotlib's; ``"classes"`` for predictions; ``"signed"``
            for values of either sign over many orders: 0 is white, and the colour is the inverse hyperbolic sine of
            the value over its median size.
        limits: (low, high); None: the central 99 % of the maps' finite values.

    """

    label: str
    palette: str = "viridis"
    limits: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Map:
    """One panel of :func:`plot_grid`: a field over a plane, with the boundaries of a scan drawn into it.

    Args:
        scan: whose slice it is over, and whose boundaries are drawn.
        field: [H, W]; None: the scan's predictions.
        scale: its colours.

    """

    scan: SliceScan
    field: Tensor | np.ndarray | None
    scale: Scale

    @property
    def values(self) -> np.ndarray:
        """The field as a float64 array."""
        return torch.as_tensor(self.field).detach().cpu().double().numpy()

    @property
    def plane(self) -> Plane:
        """What it is over; ProbeError where that is a line."""
        if not isinstance(self.scan.slice, Plane):
            raise ProbeError("a map is over a Plane, and this scan is of a Line.\nWrite:  tgp.plot(scan)")
        return self.scan.slice

    @property
    def frame(self) -> tuple[float, float]:
        """The range of both axes: half a grid step beyond the outer points."""
        low, high = self.plane.extent
        half_step = (high - low) / (self.plane.steps - 1) / 2
        return low - half_step, high + half_step


def plot_grid(
    rows: Sequence[Sequence[Map]],
    *,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    images: Images = None,
    class_names: Sequence[str] | None = None,
    classes_of: Sequence[SliceScan] = (),
    corners: bool = True,
    title: str | None = None,
    note: str | None = None,
    panel: float = 2.45,
) -> Figure:
    """Draw a grid of maps over planes.

    A scale that has whole columns has its bar below them, one that has whole rows to the right of them.

    Args:
        rows: the maps, row by row, as many in each.
        row_names: at the left.
        column_names: above.
        images: the samples as pictures, drawn into the maps of predictions; "auto" takes them from the slice.
        class_names: the name of each class index.
        classes_of: scans whose classes are on the class bar, too.
        corners: mark the samples of the slice.
        title: above the figure.
        note: below it, in small letters.
        panel: the side of a map in inches.

    Raises:
        ProbeError: no maps, rows that differ in length, names that do not fit, a scan of a line, no matplotlib.

    >>> import torch, torchgeom_probe as tgp
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> plane = Plane(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), steps=12)
    >>> found = tgp.scan(net, plane, layers=["1"], progress=False)
    >>> figure = plot_grid([[Map(found, found.margin, Scale("margin"))]], column_names=["how sure"])
    >>> assert [axes.get_title() for axes in figure.axes[:1]] == ["how sure"]

    """
    grid = [list(row) for row in rows]
    if not grid or not grid[0] or len({len(row) for row in grid}) != 1:
        raise ProbeError(f"rows of {[len(row) for row in grid]} maps: a grid has as many, at least one, in every row.")
    for what, names, count in (("row", row_names, len(grid)), ("column", column_names, len(grid[0]))):
        if names is not None and len(names) != count:
            raise ProbeError(f"{len(names)} {what} names for {count} {what}s: give one each, or None.")
    maps = [entry for row in grid for entry in row]
    pictures = style.pictures(maps[0].scan, images)
    present = style.classes([*(entry.scan for entry in maps), *classes_of])
    bars = _bars(grid)
    beside, below = "right" in bars.values(), "bottom" in bars.values()
    figure = style.new_figure(panel * len(grid[0]) + 0.4 + 0.75 * beside, panel * len(grid) + 0.55 + 0.9 * below)
    panels = figure.subplots(len(grid), len(grid[0]), squeeze=False)
    shown: dict[Scale, list[Any]] = {scale: [] for scale in bars}
    for entry, axes in zip(maps, panels.flat, strict=True):
        alike = [other.values for other in maps if other.scale is entry.scale and other.field is not None]
        shown[entry.scale].append(_show_map(axes, entry, alike, present))
        _draw_boundaries(axes, entry)
        if corners:
            _draw_corners(axes, entry, pictures if entry.field is None else [])
    for scale, location in bars.items():
        _draw_bar(figure, shown[scale], scale, location, [style.class_name(c, class_names) for c in present])
    for axes, name in zip(panels[0], column_names or [], strict=False):
        axes.set_title(name, fontsize=NORMAL + 0.5)
    for axes, name in zip(panels[:, 0], row_names or [], strict=False):
        axes.set_ylabel(name, fontsize=LARGE - 1)
    style.finish(figure, title, note)
    return figure


def _show_map(axes: Any, entry: Map, alike: Sequence[np.ndarray], present: Sequence[int]) -> Any:
    (low, high), place = entry.plane.extent, axes.get_subplotspec()
    axes.set(xticks=[low, (low + high) / 2, high], yticks=[low, (low + high) / 2, high])
    axes.tick_params(labelsize=SMALL, labelbottom=place.is_last_row(), labelleft=place.is_first_col())
    options: dict[str, Any] = {"origin": "lower", "extent": 2 * entry.frame}
    if entry.field is None:
        return style.show_classes(axes, entry.scan.predictions.numpy(), present, **options)
    low, high = _limits(alike) if entry.scale.limits is None else entry.scale.limits
    palette = {"signed": "coolwarm"}.get(entry.scale.palette, entry.scale.palette)
    options["cmap"] = mpl("matplotlib").colormaps[palette].with_extremes(bad="#bdbdbd")
    if entry.scale.palette == "signed":
        width = float(np.median(np.abs(_finite(alike)))) if len(_finite(alike)) else 0.0
        width = width or 1.0  # no values, or more than half of them are 0
        largest = max(abs(low), abs(high), 2 * width)
        options["norm"] = mpl("matplotlib.colors").AsinhNorm(width, vmin=-largest, vmax=largest)
    else:
        options |= {"vmin": low, "vmax": high}
    return axes.imshow(np.ma.masked_invalid(entry.values), interpolation="nearest", **options)


def _finite(fields: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([field[np.isfinite(field)] for field in fields])


def _limits(fields: Sequence[np.ndarray]) -> tuple[float, float]:
    values = _finite(fields)
    if not len(values):
        return 0.0, 1.0
    low, high = (float(q) for q in np.quantile(values, [0.005, 0.995]))
    # A constant field is one colour in the middle of a scale, not an amplified rounding error.
    least = 1e-4 * max(1.0, abs(low))
    return (low, high) if high - low > least else ((low + high - least) / 2, (low + high + least) / 2)


def _bars(grid: Sequence[Sequence[Map]]) -> dict[Scale, str]:
    """Return where the bar of each scale is: below the columns that are all its own, else right of its rows."""
    columns: dict[Scale, list[int]] = {}
    for row in grid:
        for column, entry in enumerate(row):
            columns.setdefault(entry.scale, []).append(column)
    whole = {s for s, c in columns.items() if s.palette == "classes" or len(c) == len(grid) * len(set(c))}
    return {scale: "bottom" if scale in whole else "right" for scale in columns}


def _draw_bar(figure: Any, shown: Sequence[Any], scale: Scale, location: str, class_names: Sequence[str]) -> None:
    axes = [image.axes for image in shown]
    wide = location == "bottom" and len({a.get_subplotspec().colspan.start for a in axes}) > 1
    options: dict[str, Any] = {"shrink": 0.6, "aspect": 30} if wide else {"shrink": 0.92, "aspect": 18}
    if scale.palette == "classes":
        options |= {"ticks": range(len(class_names))}
    else:
        low, high = shown[-1].get_clim()
        finite = np.ma.concatenate([image.get_array().ravel() for image in shown]).compressed()
        beyond = bool((finite < low).any()), bool((finite > high).any())
        options["extend"] = {(False, False): "neither", (True, False): "min", (False, True): "max"}.get(beyond, "both")
    bar = figure.colorbar(shown[-1], ax=axes, location=location, pad=0.03, **options)
    bar.set_label(scale.label, fontsize=NORMAL)
    bar.ax.tick_params(labelsize=SMALL)
    if scale.palette == "classes":
        crowded = sum(map(len, class_names)) + 2 * len(class_names) > 30
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        bar.ax.set_xticklabels(class_names, **turned)
        bar.ax.tick_params(length=0)
    elif scale.palette == "signed":
        decade = 10.0 ** math.floor(math.log10(high))
        bar.set_ticks([-decade, 0, decade], labels=[f"−{decade:g}", "0", f"{decade:g}"])
    else:
        bar.ax.locator_params(nbins=4)
    bar.ax.minorticks_off()


def _draw_boundaries(axes: Any, entry: Map) -> None:
    labels, margin = entry.scan.predictions.numpy(), entry.scan.margin.numpy()
    ticks, plain = np.linspace(*entry.plane.extent, entry.plane.steps), entry.field is None
    around = mpl("matplotlib.patheffects").withStroke(linewidth=2.2, foreground=(0, 0, 0, 0.55))
    classes = np.unique(labels)
    # Between two classes one line is enough; among more, each class has its outline.
    for label in classes[1:] if len(classes) <= 2 else classes:
        # The margin falls to 0 on both sides of a boundary: signed by the class it crosses 0 there, between the points.
        signed = np.ma.masked_invalid(np.where(labels == label, margin, -margin))
        lines = axes.contour(ticks, ticks, signed, levels=[0.0], colors=["k" if plain else "w"], linewidths=1.0)
        if not plain:
            lines.set_path_effects([around])
    axes.set(xlim=entry.frame, ylim=entry.frame)


def _draw_corners(axes: Any, entry: Map, pictures: Sequence[np.ndarray]) -> None:
    low, high = entry.plane.extent
    side = 0.2 * (high - low)
    around = mpl("matplotlib.patheffects").withStroke(linewidth=1.6, foreground="black")
    for i, ((u, v), name) in enumerate(zip(entry.plane.corners.tolist(), "abc", strict=True)):
        if not (low <= u <= high and low <= v <= high):
            continue
        if pictures:
            inset = axes.inset_axes((u - side / 2, v - side / 2, side, side), transform=axes.transData)
            style.show_picture(inset, pictures[i], name, size=SMALL, pad=1.5)
            continue
        axes.plot([u], [v], "o", markersize=4, color="white", markeredgecolor="black", markeredgewidth=0.8)
        # Towards the middle where the sample lies at an edge.
        right, above = u > high - side / 2, v > high - side / 2
        place = {"xytext": (-4 if right else 4, -4 if above else 3), "textcoords": "offset points"}
        place |= {"ha": "right" if right else "left", "va": "top" if above else "bottom"}
        axes.annotate(name, (u, v), fontsize=NORMAL, color="white", path_effects=[around], **place)
