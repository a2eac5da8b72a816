"""Fields over a plane as maps in a grid; maps that compare share a colour scale, every map has the class boundaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.plotting import style
from torchgeom_probe.plotting.style import NORMAL, SMALL, Figure, Images, Scans, mpl
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.slice import Plane


def plot_maps(drawn: Scans) -> Figure:
    """Draw scans of one plane: predictions, entropy, the log-volume of each layer; of several scans a column each.

    The maps of one field share a colour scale; it spans the central 99 % of the finite values, and its ends are arrows
    where values lie beyond.  White lines are the class boundaries of the map's own scan; a, b, c mark the samples.
    """
    entropy = Scale("ln (entropy / nat)" if drawn.log_entropy else "entropy [nat]", "magma")
    fields: list[tuple[str, Scale, Sequence[Any]]] = []
    if drawn.decided:
        entropies = [scan.entropy.log() if drawn.log_entropy else scan.entropy for scan in drawn.scans]
        fields = [("prediction", CLASSES, [None] * len(entropies)), ("entropy", entropy, entropies)]
    fields += [(style.titled(la), Scale(drawn.label(la)), drawn.values(la)) for la in drawn.shown]
    maps = [[Map(s, values[i], scale) for i, s in enumerate(drawn.scans)] for _, scale, values in fields]
    titles, rows = [name for name, *_ in fields], cast("list[list[Map | None]]", maps)
    names: dict[str, Any] = {"row_names": titles, "column_names": drawn.names}
    if len(drawn.scans) == 1:  # its fields in reading order
        wide, names = 4 if len(rows) > 5 else len(rows), {}
        singles = [replace(row[0], title=title) for row, title in zip(maps, titles, strict=True)]
        padded = [*singles, *[None] * (-len(singles) % wide)]
        rows = [padded[i : i + wide] for i in range(0, len(padded), wide)]
    return plot_grid(
        rows,
        images=drawn.images,
        class_names=drawn.class_names,
        title=drawn.title,
        note=style.note(drawn.scans[-1].report, drawn.shown),
        **names,
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
        title: above it.
    """

    scan: SliceScan
    field: Tensor | np.ndarray | None = None
    scale: Scale = CLASSES
    title: str | None = None

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
    rows: Sequence[Sequence[Map | None]],
    *,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    images: Images = None,
    class_names: Sequence[str] | None = None,
    corners: bool = True,
    title: str | None = None,
    note: str | None = None,
    panel: float = 1.9,
) -> Figure:
    """Draw a grid of maps over planes, as wide as a page.

    A scale that has whole columns has its bar below them, any other to the right of its maps.

    Args:
        rows: the maps, row by row, as many in each; None leaves a place empty.
        row_names: at the left.
        column_names: above.
        images: the samples as pictures, drawn below the maps; "auto" takes them from the slice.
        class_names: the name of each class index.
        corners: mark the samples of the slice.
        title: above the figure.
        note: below it, in small letters.
        panel: the side of a map in inches, at most.

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
    places = [entry for row in rows for entry in row]
    maps = [entry for entry in places if entry is not None]
    present = torch.cat([entry.scan.predictions.flatten() for entry in maps]).unique().tolist()
    pictures, bars = style.pictures(maps[0].scan, images), _bars(rows)
    beside, below, height = "right" in bars.values(), "bottom" in bars.values(), len(rows)
    panel = min(panel, (style.PAGE - 0.4 - 0.75 * beside) / lengths[0])
    shape = [panel] * height + [0.85] * bool(pictures)
    bars_below = below * (height if any(entry.title for entry in maps) else 1)
    figure = style.new_figure(panel * lengths[0] + 0.4 + 0.75 * beside, sum(shape) + 0.75 + 0.9 * bars_below)
    panels = figure.subplots(len(shape), lengths[0], squeeze=False, height_ratios=shape)
    colours = {scale: _colours(scale, [e.values for e in maps if e.scale is scale], present) for scale in bars}
    shown: dict[Scale, list[Any]] = {scale: [] for scale in bars}
    for entry, axes in zip(places, panels[:height].flat, strict=True):
        if entry is None:
            axes.set_axis_off()
            continue
        shown[entry.scale].append(_show_map(axes, entry, colours[entry.scale], first=height == len(shape)))
        _draw_boundaries(axes, entry)
        if corners:
            _mark_samples(axes, entry)
        if entry.title is not None:
            axes.set_title(entry.title, fontsize=NORMAL + 0.5)
    for scale, location in bars.items():
        _draw_bar(figure, shown[scale], scale, location, [style.class_name(c, class_names) for c in present])
    for axes, name in zip(panels[0], column_names or [], strict=False):
        axes.set_title(name, fontsize=NORMAL + 0.5)
    for axes, name in zip(panels[:, 0], row_names or [], strict=False):
        axes.set_ylabel(name, fontsize=NORMAL + 0.5)
    if pictures:
        _draw_pictures(figure, panels[-1], pictures)
    style.finish(figure, title, "\n".join(filter(None, [note, _legend(maps, corners)])))
    return figure


def _legend(maps: Sequence[Map], corners: bool) -> str:
    """What lines, letters and grey cells are, as far as there are any."""
    words = ["lines: class boundaries"]
    if any(len(entry.scan.predictions.unique()) == 1 for entry in maps):
        words.append("no line: one class is predicted everywhere")
    if corners:
        words.append("a, b, c: the samples")
    if any(np.ma.getmaskarray(entry.values).any() for entry in maps):
        words.append("grey: not finite (√det g = 0)")
    return "; ".join(words)


def _draw_pictures(figure: Any, row: Any, pictures: Sequence[np.ndarray]) -> None:
    """The samples side by side in the last row."""
    for axes in row[1:]:
        axes.remove()
    row[0].set_subplotspec(row[0].get_subplotspec().get_gridspec()[-1, :])
    row[0].set_axis_off()
    for i, (name, picture) in enumerate(zip("abc", pictures, strict=False)):
        inset = row[0].inset_axes((0.1 + 0.3 * i, 0.0, 0.2, 0.85), anchor="C")
        style.show_picture(inset, picture, name, size=SMALL, pad=2.0)


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


def _show_map(axes: Any, entry: Map, colours: dict[str, Any], *, first: bool) -> Any:
    (low, high), place = entry.plane.extent, axes.get_subplotspec()
    frame, ticks = _frame(entry.plane), [low, (low + high) / 2, high]
    axes.set(xlim=frame, ylim=frame, xticks=ticks, yticks=ticks)
    last = place.rowspan.stop == place.get_gridspec().nrows - (not first)
    axes.tick_params(labelsize=SMALL, labelbottom=last, labelleft=place.is_first_col())
    return axes.imshow(entry.values, origin="lower", extent=2 * frame, interpolation="nearest", **colours)


def _frame(plane: Plane) -> tuple[float, float]:
    """From the first cell's outer edge to the last one's."""
    low, high = plane.extent
    half_step = (high - low) / (plane.steps - 1) / 2
    return low - half_step, high + half_step


def _bars(rows: Sequence[Sequence[Map | None]]) -> dict[Scale, str]:
    """Return where the bar of each scale is: below a titled map or columns all its own, else right of its maps."""
    columns: dict[Scale, list[int]] = {}
    for row in rows:
        for column, entry in enumerate(row):
            if entry is not None:
                columns.setdefault(entry.scale, []).append(column)
    whole = {scale for scale, found in columns.items() if len(found) == len(rows) * len(set(found))}
    across = {scale for scale, found in columns.items() if len(set(found)) == len(rows[0]) > 1}
    titled = {entry.scale for row in rows for entry in row if entry is not None and entry.title}
    return {scale: "bottom" if scale in (whole - across) | titled else "right" for scale in columns}


def _draw_bar(figure: Any, shown: Sequence[Any], scale: Scale, location: str, class_names: Sequence[str]) -> None:
    axes = [image.axes for image in shown]
    wide = location == "bottom" and len({a.get_subplotspec().colspan.start for a in axes}) > 1
    shape = {"shrink": 0.6, "aspect": 30} if wide else {"shrink": 0.92, "aspect": 18}
    if location == "right":
        shape = {"shrink": 0.9, "aspect": 14}
    bar = figure.colorbar(shown[-1], ax=axes, location=location, pad=0.03, **shape)
    label = scale.label.replace(" − ", "\n− ") if location == "right" else scale.label  # no longer than its bar
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    low, high = bar.norm.vmin, bar.norm.vmax
    if scale is CLASSES:
        crowded = location == "bottom" and sum(map(len, class_names)) + 2 * len(class_names) > 30
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        edges = bar.norm.boundaries
        bar.set_ticks((edges[:-1] + edges[1:]) / 2, labels=class_names, **turned)
        bar.ax.tick_params(length=0)
    elif scale.palette == "signed":
        decade = 10.0 ** math.floor(math.log10(high))
        bar.set_ticks([-decade, 0, decade], labels=[f"−{decade:g}", "0", f"{decade:g}"])
    elif high - low < 1e-2 * max(1.0, abs(low)):  # nearly constant: one tick, for two would read the same
        bar.set_ticks([(low + high) / 2], labels=[f"{(low + high) / 2:.5g}".replace("-", "−")])
    else:
        bar.ax.locator_params(nbins=4)
    bar.ax.minorticks_off()


def _draw_boundaries(axes: Any, entry: Map) -> None:
    labels, margin = entry.scan.predictions.numpy(), entry.scan.margin.numpy()
    ticks, plain = np.linspace(*entry.plane.extent, entry.plane.steps), entry.field is None
    ticks = np.array([2 * ticks[0] - ticks[1], *ticks, 2 * ticks[-1] - ticks[-2]])  # so that lines reach the frame
    around = mpl("matplotlib.patheffects").withStroke(linewidth=2.2, foreground=(0, 0, 0, 0.55))
    classes = np.unique(labels)
    # Between two classes one line is enough; among more, each class has its outline.
    for label in classes[1:] if len(classes) <= 2 else classes:
        # The margin falls to 0 on both sides of a boundary: signed by the class it crosses 0 there, between the points.
        signed = np.pad(np.where(labels == label, margin, -margin), 1, mode="reflect", reflect_type="odd")
        signed = np.ma.masked_invalid(signed)
        lines = axes.contour(ticks, ticks, signed, levels=[0.0], colors=["k" if plain else "w"], linewidths=1.0)
        if not plain:
            lines.set_path_effects([around])


def _mark_samples(axes: Any, entry: Map) -> None:
    low, high = entry.plane.extent
    dot = {"boxstyle": "circle,pad=0.12", "facecolor": "white", "linewidth": 0.7}
    for (u, v), name in zip(entry.plane.corners.tolist(), "abc", strict=True):
        if low <= u <= high and low <= v <= high:
            axes.text(u, v, name, ha="center", va="center", fontsize=SMALL - 1, bbox=dot)
