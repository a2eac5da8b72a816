"""Scans as pictures: log-volume, predictions and entropy along a line or over a plane.

One style for all of them.  Log-volumes are drawn in viridis and entropies in magma, which are perceptually
uniform; maps of one kind share one colour scale, so that before and after compare; the class boundaries are
drawn into every map; the unit and the normalisation stand on every scale.  Points without a finite log-volume
stay grey.

A figure is a ``matplotlib.figure.Figure`` of its own: pyplot is not imported, and no global setting is read
or changed by it. matplotlib is imported on the first call; without it: ProbeError with the pip line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.plotting.files import save as save
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.scan import Line, Plane, SliceScan

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is optional: its types are for the type checker alone
    Figure = Any

Unit = Literal["nat", "log10"]

_BEFORE, _AFTER = "#7f7f7f", "#31688e"
_SMALL, _NORMAL, _LARGE = 8, 9.5, 12
#: How much of the width of a line's panels a small letter takes.
_LETTER = 0.01
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
    >>> from torchgeom_probe.slices.scan import scan
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> along = scan(model, Line(torch.zeros(2), torch.ones(2), steps=20), layers=["1"], progress=False)
    >>> figure = plot_line(along)
    >>> assert [axes.get_ylabel() for axes in figure.axes][:2] == ["1\nlog √det g [nat]", "entropy [nat]"]

    """
    scans = [before] if after is None else [before, after]
    return plot_lines(
        _comparable(scans, Line, "plot_line"),
        names=names[: len(scans)] if len(scans) > 1 else None,
        layers=layers,
        images=images,
        class_names=class_names,
        unit=unit,
        relative=relative,
        title=title,
    )


def plot_lines(
    scans: Sequence[SliceScan],
    *,
    names: Sequence[str] | None = None,
    like: Sequence[SliceScan] | None = None,
    layers: Sequence[str] | None = None,
    images: Sequence[Tensor | np.ndarray] | Literal["auto"] | None = "auto",
    class_names: Sequence[str] | None = None,
    unit: Unit = "nat",
    relative: bool = False,
    title: str | None = None,
) -> Figure:
    """Draw any number of scans of one line over each other: :func:`plot_line` over the epochs of a training.

    Two scans are grey and blue; more have the colours of viridis in their order, the last one on top.

    Args:
        scans: of one line, in their order.
        names: of the scans.
        like: scans whose values the axes span, too: for frames of an animation give all of its scans.
        layers: as in :func:`plot_line`; so are the other options.
        images: the two samples.
        class_names: the name of each class index.
        unit: of the log-volume.
        relative: each log-volume minus its median over the slice.
        title: above the figure.

    Raises:
        ProbeError: as :func:`plot_line`; no scans; a number of names other than that of scans.

    >>> from torchgeom_probe.slices.scan import scan
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> along = scan(net, Line(torch.zeros(2), torch.ones(2), steps=20), layers=["1"], progress=False)
    >>> figure = plot_lines([along] * 3, names=["epoch 0", "epoch 1", "epoch 2"])
    >>> assert [line.get_label() for line in figure.axes[0].lines[:3]] == ["epoch 0", "epoch 1", "epoch 2"]

    """
    scans = _comparable(scans, Line, "plot_lines")
    every = [*scans, *(() if like is None else _comparable(like, Line, "plot_lines"))]
    chosen = _layers(every, layers)
    pictures = _pictures(scans[-1], images)
    figure = _figure(7.0, 1.55 * (len(chosen) + 1) + 0.35 * len(scans) + (1.1 if pictures else 0) + 0.9)
    heights = [1.55] * (len(chosen) + 1) + [0.3] * len(scans) + ([1.1] if pictures else [])
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    t = scans[-1].slice.grid()[:, 0].numpy()
    half_step = (t[1] - t[0]) / 2
    changes = _changes(scans[-1]) * (t[1] - t[0]) + half_step
    styles = _styles(scans, names)

    panels: list[Any] = []
    for row, layer in enumerate(chosen):
        axes = figure.add_subplot(grid[row], sharex=panels[0] if panels else None)
        for scan, style in zip(scans, styles, strict=True):
            axes.plot(t, _finite(_volume(scan, layer, unit, relative)), **style)
        if like is not None:
            _span(axes, [_volume(scan, layer, unit, relative) for scan in every])
        label = _volume_label(unit, relative).replace(" − ", "\n− ")
        axes.set_ylabel(f"{layer or 'model'}\n{label}", fontsize=_NORMAL)
        panels.append(axes)
    axes = figure.add_subplot(grid[len(chosen)], sharex=panels[0])
    for scan, style in zip(scans, styles, strict=True):
        axes.plot(t, scan.entropy.numpy(), **style)
    if like is not None:
        _span(axes, [scan.entropy.numpy() for scan in every])
    axes.set_ylabel("entropy [nat]", fontsize=_NORMAL)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    panels.append(axes)
    for axes in panels:
        for change in changes:
            axes.axvline(change, color="black", linewidth=0.9, linestyle=":")
        axes.tick_params(labelsize=_SMALL, labelbottom=False)
        axes.grid(alpha=0.25, linewidth=0.6)
    if names is not None:
        panels[0].legend(
            fontsize=_SMALL,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=min(len(scans), 5),
            frameon=False,
        )

    for row, (scan, style) in enumerate(zip(scans, styles, strict=True)):
        axes = figure.add_subplot(grid[len(chosen) + 1 + row], sharex=panels[0])
        present = _classes([scan])
        colours, norm = _class_colours(present)
        axes.imshow(
            _class_index(scan, present)[None],
            aspect="auto",
            cmap=colours,
            norm=norm,
            interpolation="nearest",
            extent=(t[0] - half_step, t[-1] + half_step, 0, 1),
        )
        for start, end, index in _runs(scan.predictions.numpy()):
            name = _class_name(index, class_names)
            if end - start >= _LETTER * (len(name) + 1) * len(t):  # else it would run over its neighbours
                middle = (t[start] + t[end - 1]) / 2
                axes.text(
                    middle,
                    0.5,
                    name,
                    ha="center",
                    va="center",
                    fontsize=_SMALL,
                    clip_on=True,
                )
        axes.set_yticks([])
        axes.set_ylabel(
            "class" if names is None else f"class\n{style['label']}",
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
    _finish(figure, title, _note(scans[-1], chosen))
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
    >>> from torchgeom_probe.slices.scan import scan
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> plane = Plane(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), steps=12)
    >>> figure = plot_plane(scan(model, plane, layers=["1"], progress=False))
    >>> assert [axes.get_title() for axes in figure.axes[:3]] == ["prediction", "entropy", "1"]

    """
    scans = _comparable([before] if after is None else [before, after], Plane, "plot_plane")
    return plot_maps(
        scans,
        names=names[: len(scans)] if len(scans) > 1 else None,
        layers=layers,
        images=images,
        class_names=class_names,
        unit=unit,
        relative=relative,
        share_layers=share_layers,
        log_entropy=log_entropy,
        title=title,
    )


def plot_maps(
    scans: Sequence[SliceScan],
    *,
    names: Sequence[str] | None = None,
    like: Sequence[SliceScan] | None = None,
    layers: Sequence[str] | None = None,
    images: Sequence[Tensor | np.ndarray] | Literal["auto"] | None = "auto",
    class_names: Sequence[str] | None = None,
    unit: Unit = "nat",
    relative: bool = False,
    share_layers: bool = False,
    log_entropy: bool = False,
    title: str | None = None,
) -> Figure:
    """Draw any number of scans of one plane, a row a scan: predictions, entropy, the log-volume of each layer.

    :func:`plot_plane` over more than two networks: the epochs of a training, the widths of a layer.

    Args:
        scans: of one plane, top row first.
        names: of the rows.
        like: scans whose values the colour scales span, too: for frames of an animation give all of its scans.
        layers: as in :func:`plot_plane`; so are the other options.
        images: the three samples.
        class_names: the name of each class index.
        unit: of the log-volume.
        relative: each log-volume minus its median over the slice.
        share_layers: one colour scale for all layers.
        log_entropy: log10 of the entropy.
        title: above the figure.

    Raises:
        ProbeError: as :func:`plot_plane`; no scans; a number of names other than that of scans.

    >>> import torch
    >>> from torchgeom_probe.slices.scan import scan
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> plane = Plane(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), steps=12)
    >>> found = scan(net, plane, layers=["1"], progress=False)
    >>> figure = plot_maps([found] * 3, names=["epoch 0", "epoch 1", "epoch 2"])
    >>> assert [axes.get_ylabel() for axes in figure.axes[:9:3]] == ["epoch 0", "epoch 1", "epoch 2"]

    """
    scans = _comparable(scans, Plane, "plot_maps")
    every = [*scans, *(() if like is None else _comparable(like, Plane, "plot_maps"))]
    chosen = _layers(every, layers)

    def entropy(scan: SliceScan) -> np.ndarray:
        values = scan.entropy.numpy().astype(np.float64)
        with np.errstate(divide="ignore"):
            return np.log10(values) if log_entropy else values

    volumes = {layer: [_volume(scan, layer, unit, relative) for scan in every] for layer in chosen}
    everything = [field for fields in volumes.values() for field in fields]
    class_scale = Scale("class", "classes")
    entropy_scale = Scale(
        "log₁₀ (entropy / nat)" if log_entropy else "entropy [nat]",
        "magma",
        _limits([entropy(scan) for scan in every]),
    )
    label = _volume_label(unit, relative)
    shared = Scale(label, "viridis", _limits(everything)) if share_layers else None
    scales = {layer: shared or Scale(label, "viridis", _limits(volumes[layer])) for layer in chosen}
    return plot_grid(
        [
            [
                Map(scan, None, class_scale),
                Map(scan, entropy(scan), entropy_scale),
                *(Map(scan, volumes[layer][row], scales[layer]) for layer in chosen),
            ]
            for row, scan in enumerate(scans)
        ],
        row_names=names,
        column_names=["prediction", "entropy", *(layer or "model" for layer in chosen)],
        images=images,
        class_names=class_names,
        classes_of=every,
        title=title,
        note=_note(scans[-1], chosen),
    )


@dataclass(frozen=True, eq=False)
class Scale:
    """The colours of maps that compare: all maps of ONE Scale object have its limits and share its bar.

    Args:
        label: with the unit, on the bar.
        palette: ``"viridis"``, ``"magma"`` or any other of matplotlib's; ``"classes"`` for predictions;
            ``"signed"`` for values of either sign over many orders: 0 is white, and the colour is the inverse
            hyperbolic sine of the value over its median size.
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
        assert self.field is not None
        return torch.as_tensor(self.field).detach().cpu().double().numpy()


def plot_grid(
    rows: Sequence[Sequence[Map]],
    *,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    images: Sequence[Tensor | np.ndarray] | Literal["auto"] | None = None,
    class_names: Sequence[str] | None = None,
    classes_of: Sequence[SliceScan] | None = None,
    corners: bool = True,
    title: str | None = None,
    note: str | None = None,
    panel: float = 2.45,
) -> Figure:
    """Draw a grid of maps over planes, in the one style of this module.

    A scale that has whole columns has its bar below them, one that has whole rows to the right of them.

    Args:
        rows: the maps, row by row, as many in each.
        row_names: at the left.
        column_names: above.
        images: the samples as pictures, drawn into the maps of predictions; "auto" takes them from the slice.
        class_names: the name of each class index.
        classes_of: the scans whose classes are on the class bar; None: those of the maps.
        corners: mark the samples of the slice.
        title: above the figure.
        note: below it, in small letters.
        panel: the side of a map in inches.

    Raises:
        ProbeError: no maps, rows that differ in length, names that do not fit, images that are no pictures, no
            matplotlib.

    >>> from torchgeom_probe.slices.scan import scan
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> plane = Plane(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), steps=12)
    >>> found = scan(net, plane, layers=["1"], progress=False)
    >>> figure = plot_grid([[Map(found, found.margin, Scale("margin"))]], column_names=["how sure"])
    >>> assert [axes.get_title() for axes in figure.axes[:1]] == ["how sure"]

    """
    grid = [list(row) for row in rows]
    if not grid or not grid[0] or len({len(row) for row in grid}) != 1:
        raise ProbeError(
            f"rows of {[len(row) for row in grid]} maps: a grid has as many, at least one, in every row."
        )
    columns = len(grid[0])
    for what, names, count in (("row", row_names, len(grid)), ("column", column_names, columns)):
        if names is not None and len(names) != count:
            raise ProbeError(f"{len(names)} {what} names for {count} {what}s: give one each, or None.")
    maps = [entry for row in grid for entry in row]
    pictures = _pictures(maps[0].scan, images)
    below, beside = _bars(grid)
    figure = _figure(
        panel * columns + 0.4 + 0.75 * bool(beside), panel * len(grid) + 0.55 + 0.9 * bool(below)
    )
    panels = [
        [figure.add_subplot(len(grid), columns, r * columns + c + 1) for c in range(columns)]
        for r in range(len(grid))
    ]
    scans = [entry.scan for entry in maps] if classes_of is None else list(classes_of)
    shown: dict[Scale, Any] = {}
    for row, axes_row in zip(grid, panels, strict=True):
        for entry, axes in zip(row, axes_row, strict=True):
            shown[entry.scale] = _show_map(axes, entry, maps, scans)
    for places, location in ((below, "bottom"), (beside, "right")):
        for scale, cells in places.items():
            where = [panels[r][c] for r, c in cells]
            if scale.palette == "classes":
                _class_bar(figure, shown[scale], where, _classes(scans), class_names)
            else:
                fields = [entry.values for entry in maps if entry.scale is scale]
                wide = location == "bottom" and len({c for _, c in cells}) > 1
                bar = figure.colorbar(
                    shown[scale],
                    ax=where,
                    location=location,
                    extend=_extension(fields, shown[scale].get_clim()),
                    shrink=0.6 if wide else 0.92,
                    aspect=30 if wide else 18,
                    pad=0.03,
                )
                bar.set_label(scale.label, fontsize=_NORMAL)
                bar.ax.tick_params(labelsize=_SMALL)
                if scale.palette == "signed":
                    _few_ticks(bar, shown[scale].get_clim()[1])
                else:
                    bar.ax.locator_params(nbins=4)

    for r, row in enumerate(grid):
        for c, entry in enumerate(row):
            axes, plane, plain = panels[r][c], _plane(entry.scan), entry.field is None
            _draw_boundaries(axes, entry.scan, plain=plain)
            if corners:
                _draw_corners(axes, plane, pictures if plain else [])
            low, high = plane.extent
            half_step = (high - low) / (plane.steps - 1) / 2
            axes.set_xlim(low - half_step, high + half_step)
            axes.set_ylim(low - half_step, high + half_step)
            axes.set_xticks([low, (low + high) / 2, high])
            axes.set_yticks([low, (low + high) / 2, high])
            axes.tick_params(labelsize=_SMALL, labelbottom=r == len(grid) - 1, labelleft=c == 0)
            if r == 0 and column_names is not None:
                axes.set_title(column_names[c], fontsize=_NORMAL + 0.5)
        if row_names is not None:
            panels[r][0].set_ylabel(row_names[r], fontsize=_LARGE - 1)
    _finish(figure, title, note)
    return figure


# --- what is drawn ------------------------------------------------------------------------------------------


def _comparable(scans: Sequence[SliceScan], kind: type, verb: str) -> list[SliceScan]:
    scans = list(scans)
    if not scans:
        raise ProbeError(f"{verb} got no scans.\nScan first:  scan(model, plane, layers=...)")
    for scan in scans:
        if not isinstance(scan.slice, kind):
            other = "plot_plane" if kind is Line else "plot_line"
            raise ProbeError(
                f"{verb} draws a {kind.__name__} and got a scan of a {type(scan.slice).__name__}.\nWrite:  "
                f"scan.plot()  or  {other}(scan)"
            )
    first = scans[0].slice
    for later in scans[1:]:
        other_slice = later.slice
        same = first.shape == other_slice.shape and all(
            torch.equal(x, y) for x, y in zip(first.samples, other_slice.samples, strict=True)
        )
        if same and torch.equal(first.grid(), other_slice.grid()):
            continue
        raise ProbeError(
            "the scans are of different slices, so they cannot be drawn point by point.\n"
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


def _span(axes: Any, fields: Sequence[np.ndarray]) -> None:
    values = np.concatenate([field[np.isfinite(field)] for field in fields])
    if len(values):
        margin = 0.05 * max(float(np.ptp(values)), 1e-6)
        axes.set_ylim(values.min() - margin, values.max() + margin)


def _styles(scans: Sequence[SliceScan], names: Sequence[str] | None) -> list[dict[str, Any]]:
    if names is not None and len(names) != len(scans):
        raise ProbeError(f"{len(names)} names for {len(scans)} scans: give one each, or None.")
    labels = [""] * len(scans) if names is None else list(names)
    styles: list[dict[str, Any]] = [{"linewidth": 1.4, "linestyle": "-"} for _ in scans]
    styles[-1] |= {"color": _AFTER, "linewidth": 1.8}
    if len(scans) == 2:
        styles[0] |= {"color": _BEFORE, "linestyle": "--"}
    elif len(scans) > 2:
        palette = optional("matplotlib", extra="figures").colormaps["viridis"]
        for i, style in enumerate(styles):
            style["color"] = palette(0.92 * (1 - i / (len(scans) - 1)))
        styles[0]["linestyle"] = "--"
    return [style | {"label": label} for style, label in zip(styles, labels, strict=True)]


def _classes(scans: Sequence[SliceScan]) -> list[int]:
    return sorted({int(c) for scan in scans for c in scan.predictions.unique()})


def _class_colours(present: Sequence[int]) -> tuple[Any, Any]:
    """Return colour map and norm: entry i of the map is class ``present[i]``."""
    colours = optional("matplotlib.colors", extra="figures")
    palette = colours.ListedColormap(["#ffffff" if c < 0 else _CLASSES[c % len(_CLASSES)] for c in present])
    return palette, colours.BoundaryNorm(np.arange(len(present) + 1) - 0.5, len(present))


def _class_index(scan: SliceScan, present: list[int]) -> np.ndarray:
    return np.searchsorted(present, scan.predictions.numpy())


def _show_map(axes: Any, entry: Map, maps: Sequence[Map], scans: Sequence[SliceScan]) -> Any:
    low, high = _plane(entry.scan).extent
    half_step = (high - low) / (_plane(entry.scan).steps - 1) / 2
    options: dict[str, Any] = {"origin": "lower", "interpolation": "nearest"}
    options["extent"] = (low - half_step, high + half_step, low - half_step, high + half_step)
    if entry.field is None:
        present = _classes(scans)
        palette, norm = _class_colours(present)
        return axes.imshow(_class_index(entry.scan, present), cmap=palette, norm=norm, **options)
    fields = [other.values for other in maps if other.scale is entry.scale]
    signed = entry.scale.palette == "signed"
    colour_maps = optional("matplotlib", extra="figures").colormaps
    palette = colour_maps["coolwarm" if signed else entry.scale.palette].with_extremes(bad="#bdbdbd")
    low, high = _limits(fields) if entry.scale.limits is None else entry.scale.limits
    if signed:
        sizes = np.concatenate([np.abs(field[np.isfinite(field)]) for field in fields])
        width = float(np.median(sizes)) if len(sizes) and np.median(sizes) > 0 else 1.0
        largest = max(abs(low), abs(high), 2 * width)
        norm = optional("matplotlib.colors", extra="figures").AsinhNorm(width, vmin=-largest, vmax=largest)
        return axes.imshow(np.ma.masked_invalid(entry.values), cmap=palette, norm=norm, **options)
    return axes.imshow(np.ma.masked_invalid(entry.values), cmap=palette, vmin=low, vmax=high, **options)


def _bars(grid: Sequence[Sequence[Map]]) -> tuple[dict[Scale, list], dict[Scale, list]]:
    """Return the cells of each scale: those with a bar below their columns, and those with one beside their rows."""
    cells: dict[Scale, list[tuple[int, int]]] = {}
    for r, row in enumerate(grid):
        for c, entry in enumerate(row):
            cells.setdefault(entry.scale, []).append((r, c))
    below: dict[Scale, list] = {}
    beside: dict[Scale, list] = {}
    for scale, places in cells.items():
        whole_columns = len(places) == len(grid) * len({c for _, c in places})
        (below if whole_columns else beside)[scale] = places
    return below, beside


def _few_ticks(bar: Any, largest: float) -> None:
    decade = 10.0 ** math.floor(math.log10(largest))
    bar.set_ticks([-decade, 0, decade])
    bar.set_ticklabels([f"−{decade:g}", "0", f"{decade:g}"])
    bar.ax.minorticks_off()


def _plane(scan: SliceScan) -> Plane:
    if not isinstance(scan.slice, Plane):
        raise ProbeError(
            f"a map is over a Plane, and this scan is of a {type(scan.slice).__name__}.\nWrite:  plot_line(scan)"
        )
    return scan.slice


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


def _finish(figure: Any, title: str | None, note: str | None) -> None:
    if title is not None:
        figure.suptitle(
            title + "\n", fontsize=_LARGE, linespacing=0.6
        )  # the empty line keeps it off the column titles
    if note is not None:
        figure.supxlabel(note, fontsize=_SMALL - 0.5, color="#555555")


def _note(scan: SliceScan, layers: Sequence[str]) -> str:
    shown = [scan.report[layer] for layer in layers]
    scaling = {True: "J divided by √n", False: "J not divided by √n"}
    notes = list(dict.fromkeys(f"{layer.estimand}; {scaling[layer.normalized]}" for layer in shown))
    return "volume: " + " | ".join(notes)
