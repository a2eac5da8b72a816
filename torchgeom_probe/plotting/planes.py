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
    entropy = Scale("log₁₀ (entropy / nat)" if drawn.log_entropy else "entropy [nat]", "magma")
    columns: list[tuple[Scale, Sequence[Tensor | np.ndarray]]] = [
        (entropy, [scan.entropy.log10() if drawn.log_entropy else scan.entropy for scan in drawn.every]),
        *((Scale(drawn.label(layer)), drawn.values(layer)) for layer in drawn.shown),
    ]
    rows = [[Map(s), *(Map(s, fields[i], scale) for scale, fields in columns)] for i, s in enumerate(drawn.every)]
    return plot_grid(
        rows[: len(drawn.scans)],
        like=rows[len(drawn.scans) :],
        row_names=drawn.names,
        column_names=["prediction", "entropy", *(layer or "model" for layer in drawn.shown)],
        images=drawn.images,
        class_names=drawn.class_names,
        title=drawn.title,
        note=style.note(drawn.scans[-1].report, drawn.shown),
    )


@dataclass(frozen=True, eq=False)
class Scale:
    """The colours of maps that compare: they span the central 99 % of what all maps of ONE Scale object hold.

    Args:
        label: with the unit, on the bar that these maps share.
        palette: ``"viridis"``, ``"magma"`` or any other of matplotlib's; ``"signed"`` for values of either sign over
            many orders: 0 is white, and the colour is the inverse hyperbolic sine of the value over its median size.
    """

    label: str
    palette: str = "viridis"


#: The scale of predictions: a colour a class.
CLASSES = Scale("class")


@dataclass(frozen=True, eq=False)
class Map:
    """One panel of :func:`plot_grid`: a field over a plane, with the boundaries of a scan drawn into it.

    Args:
        scan: whose slice it is over, and whose boundaries are drawn.
        field: [H, W]; None: the scan's predictions.
        scale: its colours.
    """

    scan: SliceScan
    field: Tensor | np.ndarray | None = None
    scale: Scale = CLASSES

    @property
    def values(self) -> np.ma.MaskedArray:
        """The field, in float64; what is not finite is masked."""
        field = self.scan.predictions if self.field is None else self.field
        return np.ma.masked_invalid(torch.as_tensor(field).detach().cpu().double().numpy())

    @property
    def plane(self) -> Plane:
        """What it is over; ProbeError where that is a line."""
        if not isinstance(self.scan.slice, Plane):
            raise ProbeError("a map is over a Plane, and this scan is of a Line.\nWrite:  tgp.plot(scan)")
        return self.scan.slice


def plot_grid(
    rows: Sequence[Sequence[Map]],
    *,
    like: Sequence[Sequence[Map]] = (),
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    images: Images = None,
    class_names: Sequence[str] | None = None,
    corners: bool = True,
    title: str | None = None,
    note: str | None = None,
    panel: float = 2.45,
) -> Figure:
    """Draw a grid of maps over planes.

    A scale that has whole columns has its bar below them, one that has whole rows to the right of them.

    Args:
        rows: the maps, row by row, as many in each.
        like: rows that are not drawn, and whose values and classes the scales span, too.
        row_names: at the left.
        column_names: above.
        images: the samples as pictures, drawn into the maps of predictions; "auto" takes them from the slice.
        class_names: the name of each class index.
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
    lengths = [len(row) for row in rows]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ProbeError(f"rows of {lengths} maps: a grid has as many, at least one, in every row.")
    for what, names, count in (("row", row_names, len(rows)), ("column", column_names, lengths[0])):
        if names is not None and len(names) != count:
            raise ProbeError(f"{len(names)} {what} names for {count} {what}s: give one each, or None.")
    maps = [entry for row in rows for entry in row]
    spanned = [*maps, *(entry for row in like for entry in row)]
    present = torch.cat([entry.scan.predictions.flatten() for entry in spanned]).unique().tolist()
    pictures, bars = style.pictures(maps[0].scan, images), _bars(rows)
    beside, below = "right" in bars.values(), "bottom" in bars.values()
    figure = style.new_figure(panel * lengths[0] + 0.4 + 0.75 * beside, panel * len(rows) + 0.55 + 0.9 * below)
    panels = figure.subplots(len(rows), lengths[0], squeeze=False)
    colours = {scale: _colours(scale, [e.values for e in spanned if e.scale is scale], present) for scale in bars}
    shown: dict[Scale, list[Any]] = {scale: [] for scale in bars}
    for entry, axes in zip(maps, panels.flat, strict=True):
        shown[entry.scale].append(_show_map(axes, entry, colours[entry.scale]))
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


def _colours(scale: Scale, fields: Sequence[np.ma.MaskedArray], present: Sequence[int]) -> dict[str, Any]:
    """Return the colour map, and the norm from values to it, that the maps of a scale share."""
    if scale is CLASSES:
        return style.class_colours(present)
    colours, values = mpl("matplotlib.colors"), np.ma.concatenate([field.ravel() for field in fields]).compressed()
    values = values if len(values) else np.zeros(1)  # all maps are grey: any scale will do
    low, high = np.quantile(values, [0.005, 0.995])
    # A constant field is one colour in the middle of a scale, not an amplified rounding error.
    least = 1e-4 * max(1.0, abs(low))
    if high - low <= least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    norm = colours.Normalize(low, high)
    if scale.palette == "signed":
        width = float(np.median(np.abs(values))) or 1.0
        largest = max(abs(low), abs(high), 2 * width)
        norm = colours.AsinhNorm(width, vmin=-largest, vmax=largest)
    palette = {"signed": "coolwarm"}.get(scale.palette, scale.palette)
    cmap = mpl("matplotlib").colormaps[palette].with_extremes(bad="#bdbdbd")
    beyond = int((values < norm.vmin).any()) + 2 * int((values > norm.vmax).any())
    cmap.colorbar_extend = ("neither", "min", "max", "both")[beyond]
    return {"cmap": cmap, "norm": norm}


def _show_map(axes: Any, entry: Map, colours: dict[str, Any]) -> Any:
    (low, high), place = entry.plane.extent, axes.get_subplotspec()
    half_step = (high - low) / (entry.plane.steps - 1) / 2
    frame, ticks = (low - half_step, high + half_step), [low, (low + high) / 2, high]
    axes.set(xlim=frame, ylim=frame, xticks=ticks, yticks=ticks)
    axes.tick_params(labelsize=SMALL, labelbottom=place.is_last_row(), labelleft=place.is_first_col())
    return axes.imshow(entry.values, origin="lower", extent=2 * frame, interpolation="nearest", **colours)


def _bars(rows: Sequence[Sequence[Map]]) -> dict[Scale, str]:
    """Return where the bar of each scale is: below the columns that are all its own, else right of its rows."""
    columns: dict[Scale, list[int]] = {}
    for row in rows:
        for column, entry in enumerate(row):
            columns.setdefault(entry.scale, []).append(column)
    whole = {scale for scale, found in columns.items() if len(found) == len(rows) * len(set(found))}
    return {scale: "bottom" if scale in whole or scale is CLASSES else "right" for scale in columns}


def _draw_bar(figure: Any, shown: Sequence[Any], scale: Scale, location: str, class_names: Sequence[str]) -> None:
    axes = [image.axes for image in shown]
    wide = location == "bottom" and len({a.get_subplotspec().colspan.start for a in axes}) > 1
    shape = {"shrink": 0.6, "aspect": 30} if wide else {"shrink": 0.92, "aspect": 18}
    bar = figure.colorbar(shown[-1], ax=axes, location=location, pad=0.03, **shape)
    bar.set_label(scale.label, fontsize=NORMAL)
    bar.ax.tick_params(labelsize=SMALL)
    if scale is CLASSES:
        crowded = sum(map(len, class_names)) + 2 * len(class_names) > 30
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        edges = bar.norm.boundaries
        bar.set_ticks((edges[:-1] + edges[1:]) / 2, labels=class_names, **turned)
        bar.ax.tick_params(length=0)
    elif scale.palette == "signed":
        decade = 10.0 ** math.floor(math.log10(bar.norm.vmax))
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


def _draw_corners(axes: Any, entry: Map, pictures: Sequence[np.ndarray]) -> None:
    low, high = entry.plane.extent
    side = 0.2 * (high - low)
    dot = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "linewidth": 0.8}
    for i, ((u, v), name) in enumerate(zip(entry.plane.corners.tolist(), "abc", strict=True)):
        if pictures and low <= u <= high and low <= v <= high:
            inset = axes.inset_axes((u - side / 2, v - side / 2, side, side), transform=axes.transData)
            style.show_picture(inset, pictures[i], name, size=SMALL, pad=1.5)
        elif low <= u <= high and low <= v <= high:
            axes.text(u, v, name, ha="center", va="center", fontsize=SMALL, bbox=dot)
