"""Fields over planes as maps: a row a field with one colour scale, a column a scan; all have class boundaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.plotting import style
from torchgeom_probe.plotting.style import NORMAL, SMALL, Figure, Images, Scans, mpl
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.slice import Plane


@dataclass(frozen=True, eq=False)
class Row:
    """Maps with one colour scale: what each of several scans has over its plane.

    Args:
        title: beside the row; of a single scan above its map.
        scans: one a column; their class boundaries are drawn.
        fields: [H, W] of each; None: their predictions, a colour a class.
        label: with the unit, on the colour bar.
        palette: one of matplotlib's, over the central 99 % of the values; ``"signed"`` for values of either sign over
            many orders: 0 is white, and the colour is the inverse hyperbolic sine of the value over its median size.
    """

    title: str
    scans: Sequence[SliceScan]
    fields: Sequence[Tensor | np.ndarray] | None = None
    label: str = "class"
    palette: str = "viridis"

    @property
    def values(self) -> list[np.ma.MaskedArray]:
        """The fields in float64; what is not finite is masked."""
        fields = [scan.predictions for scan in self.scans] if self.fields is None else self.fields
        return [np.ma.masked_invalid(torch.as_tensor(field).detach().cpu().double().numpy()) for field in fields]


def plot_maps(drawn: Scans) -> Figure:
    """Draw scans of one plane: predictions, entropy, the log-volume of each layer; of several scans a column each.

    The maps of one field share a colour scale; it spans the central 99 % of the finite values, and its ends are arrows
    where values lie beyond.  White lines are the class boundaries of the map's own scan; a, b, c mark the samples.
    """
    scans, rows = drawn.scans, []
    if drawn.decided:
        entropies = [scan.entropy.log() if drawn.log_entropy else scan.entropy for scan in scans]
        label = "ln (entropy / nat)" if drawn.log_entropy else "entropy [nat]"
        rows = [Row("prediction", scans), Row("entropy", scans, entropies, label, "magma")]
    rows += [Row(style.titled(la), scans, drawn.values(la), drawn.label(la)) for la in drawn.shown]
    return plot_grid(
        rows,
        column_names=drawn.names,
        images=drawn.images,
        class_names=drawn.class_names,
        title=drawn.title,
        note=style.note(scans[-1].report, drawn.shown),
    )


def plot_grid(
    rows: Sequence[Row],
    *,
    column_names: Sequence[str] | None = None,
    images: Images = None,
    class_names: Sequence[str] | None = None,
    corners: bool = True,
    title: str | None = None,
    note: str | None = None,
    panel: float = 1.9,
) -> Figure:
    """Draw rows of maps over planes, as wide as a page, the bar of each row at its right.

    The maps of a single scan are drawn in reading order instead, each with its title above and its bar below.
    ``images``: the samples as pictures, drawn below the maps; "auto" takes them from the slice.  ``corners``: mark the
    samples in the maps.  ``note``: below, in small letters.  ``panel``: the side of a map in inches, at most.

    Raises:
        ProbeError: no maps, rows that differ in length, names that do not fit, a scan of a line, no matplotlib.

    >>> import torch, torchgeom_probe as tgp
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> plane = Plane(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), steps=12)
    >>> found = tgp.scan(net, plane, layers=["1"], progress=False)
    >>> figure = plot_grid([Row("how sure", [found], [found.margin], "margin")])
    >>> assert [axes.get_title() for axes in figure.axes[:1]] == ["how sure"]
    """
    _refuse_ragged(rows, column_names)
    count = len(rows[0].scans)
    single = count == 1
    columns = count if not single else 4 if len(rows) > 5 else len(rows)
    height = math.ceil(len(rows) / columns) if single else len(rows)
    pictures, beside = style.pictures(rows[0].scans[0], images), 0.0 if single else 0.75
    panel = min(panel, (style.PAGE - 0.4 - beside) / columns)
    shape = [panel] * height + [0.85] * bool(pictures)
    bars_below = 0.9 * height if single else 0.0
    figure = style.new_figure(panel * columns + 0.4 + beside, sum(shape) + 0.75 + bars_below)
    panels = figure.subplots(len(shape), columns, squeeze=False, height_ratios=shape)
    present = torch.cat([scan.predictions.flatten() for row in rows for scan in row.scans]).unique().tolist()
    names, places = [style.class_name(label, class_names) for label in present], iter(panels[:height].flat)
    for row in rows:
        colours = _colours(row, present)
        shown = [
            _show_map(axes, scan, field, colours, plain=row.fields is None, corners=corners, height=height)
            for scan, field, axes in zip(row.scans, row.values, places)  # noqa: B905 - a row takes its places only
        ]
        _draw_bar(figure, shown, row, "bottom" if single else "right", names)
        name = shown[0].axes.set_title if single else shown[0].axes.set_ylabel
        name(row.title, fontsize=NORMAL + 0.5)
    for axes in places:
        axes.set_axis_off()
    for axes, name in zip(panels[0], [] if single else column_names or [], strict=False):
        axes.set_title(name, fontsize=NORMAL + 0.5)
    if pictures:
        _draw_pictures(panels[-1], pictures)
    style.finish(figure, title, "\n".join(filter(None, [note, _legend(rows, corners)])))
    return figure


def _refuse_ragged(rows: Sequence[Row], column_names: Sequence[str] | None) -> None:
    lengths = [len(row.values) for row in rows]
    if len({*lengths, *(len(row.scans) for row in rows)}) != 1 or not lengths[0]:
        raise ProbeError(f"rows of {lengths} maps: a grid has as many, at least one, in every row.")
    if column_names is not None and len(column_names) != lengths[0]:
        raise ProbeError(f"{len(column_names)} column names for {lengths[0]} columns: give one each, or None.")
    if not all(isinstance(scan.slice, Plane) for row in rows for scan in row.scans):
        raise ProbeError("a map is over a Plane, and this scan is of a Line.\nWrite:  tgp.plot(scan)")


def _legend(rows: Sequence[Row], corners: bool) -> str:
    """What lines, letters and grey cells are, as far as there are any."""
    words = ["lines: class boundaries"]
    if any(len(scan.predictions.unique()) == 1 for row in rows for scan in row.scans):
        words.append("no line: one class is predicted everywhere")
    if corners:
        words.append("a, b, c: the samples")
    if any(np.ma.getmaskarray(field).any() for row in rows for field in row.values):
        words.append("grey: not finite (√det g = 0)")
    return "; ".join(words)


def _draw_pictures(row: Any, pictures: Sequence[np.ndarray]) -> None:
    """The samples side by side in the last row."""
    for axes in row[1:]:
        axes.remove()
    row[0].set_subplotspec(row[0].get_subplotspec().get_gridspec()[-1, :])
    row[0].set_axis_off()
    for i, (name, picture) in enumerate(zip("abc", pictures, strict=False)):
        inset = row[0].inset_axes((0.1 + 0.3 * i, 0.0, 0.2, 0.85), anchor="C")
        style.show_picture(inset, picture, name, size=SMALL)


def _colours(row: Row, present: Sequence[int]) -> dict[str, Any]:
    """Return the colour map, and the norm from values to it, that the maps of a row share."""
    if row.fields is None:
        return style.class_colours(present)
    colours, values = mpl("matplotlib.colors"), np.ma.concatenate([field.ravel() for field in row.values]).compressed()
    values = values if len(values) else np.zeros(1)  # all maps are grey: any scale will do
    low, high = np.quantile(values, [0.005, 0.995])
    # A constant field is one colour in the middle of a scale, not an amplified rounding error.
    least = 1e-4 * max(1.0, abs(low))
    if high - low <= least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    norm, palette = colours.Normalize(low, high), row.palette
    if palette == "signed":
        width = float(np.median(np.abs(values))) or 1.0
        largest = max(abs(low), abs(high), 2 * width)
        norm, palette = colours.AsinhNorm(width, vmin=-largest, vmax=largest), "coolwarm"
    cmap = mpl("matplotlib").colormaps[palette].with_extremes(bad="#bdbdbd")
    beyond = int((values < norm.vmin).any()) + 2 * int((values > norm.vmax).any())
    cmap.colorbar_extend = ("neither", "min", "max", "both")[beyond]
    return {"cmap": cmap, "norm": norm}


def _show_map(
    axes: Any, scan: SliceScan, field: Any, colours: dict[str, Any], *, plain: bool, corners: bool, height: int
) -> Any:
    """Draw a field with the boundaries of its scan, black where it is ``plain`` predictions; returns the image."""
    plane: Any = scan.slice
    low, high = plane.extent
    half_step = (high - low) / (plane.steps - 1) / 2
    frame, ticks = (low - half_step, high + half_step), [low, (low + high) / 2, high]
    axes.set(xlim=frame, ylim=frame, xticks=ticks, yticks=ticks)
    place = axes.get_subplotspec()
    axes.tick_params(labelsize=SMALL, labelbottom=place.rowspan.stop == height, labelleft=place.is_first_col())
    _draw_boundaries(axes, scan, plain)
    dot = {"boxstyle": "circle,pad=0.12", "facecolor": "white", "linewidth": 0.7}
    for (u, v), name in zip(plane.corners.tolist() if corners else [], "abc", strict=False):
        if low <= u <= high and low <= v <= high:
            axes.text(u, v, name, ha="center", va="center", fontsize=SMALL - 1, bbox=dot)
    return axes.imshow(field, origin="lower", extent=2 * frame, interpolation="nearest", **colours)


def _draw_bar(figure: Any, shown: Sequence[Any], row: Row, location: str, class_names: Sequence[str]) -> None:
    size = {"shrink": 0.9, "aspect": 14} if location == "right" else {"shrink": 0.92, "aspect": 18}
    bar = figure.colorbar(shown[-1], ax=[image.axes for image in shown], location=location, pad=0.03, **size)
    label = row.label.replace(" − ", "\n− ") if location == "right" else row.label  # no longer than its bar
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    low, high = bar.norm.vmin, bar.norm.vmax
    if row.fields is None:
        crowded = location == "bottom" and sum(map(len, class_names)) + 2 * len(class_names) > 30
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        edges = bar.norm.boundaries
        bar.set_ticks((edges[:-1] + edges[1:]) / 2, labels=class_names, **turned)
        bar.ax.tick_params(length=0)
    elif row.palette == "signed":
        decade = 10.0 ** math.floor(math.log10(high))
        bar.set_ticks([-decade, 0, decade], labels=[f"−{decade:g}", "0", f"{decade:g}"])
    elif high - low < 1e-2 * max(1.0, abs(low)):  # nearly constant: one tick, for two would read the same
        bar.set_ticks([(low + high) / 2], labels=[f"{(low + high) / 2:.5g}".replace("-", "−")])
    else:
        bar.ax.locator_params(nbins=4)
    bar.ax.minorticks_off()


def _draw_boundaries(axes: Any, scan: SliceScan, plain: bool) -> None:
    labels, margin = scan.predictions.numpy(), scan.margin.numpy()
    plane: Any = scan.slice
    ticks = np.linspace(plane.extent[0], plane.extent[1], plane.steps)
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
