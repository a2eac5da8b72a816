"""Scans of a line: the log-volume of each layer against t, with the entropy and the predicted classes below."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from torchgeom_probe.plotting import style
from torchgeom_probe.plotting.style import AFTER, BEFORE, NORMAL, SMALL, Figure, Scans
from torchgeom_probe.slices.result import SliceScan

#: How much of the width of the panels a small letter takes.
_LETTER = 0.01


def plot_lines(drawn: Scans) -> Figure:
    """Draw scans of one line over each other.

    One panel a layer, then the entropy in nats, then a strip of the predicted classes per scan, then the samples at the
    two ends.  Dotted lines mark where the last scan's prediction changes.  Two scans are grey and blue; more have the
    colours of viridis in their order, the last one on top.
    """
    scans, names = drawn.scans, drawn.names or [""] * len(drawn.scans)
    pictures = style.pictures(scans[-1], drawn.images)
    labels = [f"{layer or 'model'}\n{drawn.label(layer)}".replace(" − ", "\n− ") for layer in drawn.shown]
    fields = [*(drawn.values(layer) for layer in drawn.shown), [scan.entropy.numpy() for scan in drawn.every]]
    heights = [1.55] * len(fields) + [0.3] * len(scans) + [1.1] * bool(pictures)
    figure = style.new_figure(7.0, sum(heights) + 0.05 * len(scans) + 0.9)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    curves = [style | {"label": name} for style, name in zip(_styles(len(scans)), names, strict=True)]
    panels: list[Any] = []
    for row, (label, values) in enumerate(zip([*labels, "entropy [nat]"], fields, strict=True)):
        panels.append(figure.add_subplot(grid[row], sharex=panels[0] if panels else None))
        _draw_curves(panels[-1], scans[-1], values, curves, whole=bool(drawn.like))
        panels[-1].set_ylabel(label, fontsize=NORMAL)
    panels[-1].set_ylim(bottom=min(0.0, panels[-1].get_ylim()[0]))
    if drawn.names is not None:
        columns = min(len(scans), 5)
        panels[0].legend(fontsize=SMALL, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False)
    for row, (scan, name) in enumerate(zip(scans, names, strict=True)):
        strip = figure.add_subplot(grid[len(fields) + row], sharex=panels[0])
        _draw_classes(strip, scan, drawn.class_names)
        strip.set_ylabel(f"class\n{name}".strip(), fontsize=SMALL, rotation=0, ha="right", va="center")
        strip.tick_params(labelsize=SMALL, labelbottom=row == len(scans) - 1)
    strip.set_xlabel("t, from sample a (0) to sample b (1)", fontsize=NORMAL)
    panels[0].set_xlim(*_frame(scans[-1]))
    if pictures:
        ends = figure.add_subplot(grid[-1])
        ends.set_axis_off()
        for left, anchor, name, picture in zip((0.0, 0.8), "WE", "ab", pictures, strict=True):
            inset = ends.inset_axes((left, 0.0, 0.2, 0.86), anchor=anchor)
            style.show_picture(inset, picture, name, size=NORMAL, pad=2)
    figure.align_ylabels(panels)
    style.finish(figure, drawn.title, style.note(scans[-1].report, drawn.shown))
    return figure


def _frame(scan: SliceScan) -> tuple[float, float]:
    """Half a step beyond both ends."""
    half_step = 0.5 / (scan.slice.steps - 1)
    return -half_step, 1 + half_step


def _draw_curves(
    axes: Any, scan: SliceScan, fields: Sequence[np.ndarray], curves: Sequence[dict[str, Any]], *, whole: bool
) -> None:
    """Draw the first fields, one a curve, and mark where the class changes; ``whole``: the axis spans all fields."""
    t = scan.slice.grid()[:, 0].numpy()
    for field, curve in zip(fields, curves, strict=False):
        axes.plot(t, np.where(np.isfinite(field), field, np.nan), **curve)
    finite = np.concatenate([field[np.isfinite(field)] for field in fields])
    if whole and len(finite):
        margin = 0.05 * max(float(np.ptp(finite)), 1e-6)
        axes.set_ylim(finite.min() - margin, finite.max() + margin)
    for change in np.flatnonzero(np.diff(scan.predictions.numpy())):
        axes.axvline(t[change : change + 2].mean(), color="black", linewidth=0.9, linestyle=":")
    axes.tick_params(labelsize=SMALL, labelbottom=False)
    axes.grid(alpha=0.25, linewidth=0.6)


def _draw_classes(axes: Any, scan: SliceScan, names: Sequence[str] | None) -> None:
    t, labels = scan.slice.grid()[:, 0].numpy(), scan.predictions.numpy()
    style.show_classes(axes, labels[None], style.classes([scan]), aspect="auto", extent=(*_frame(scan), 0, 1))
    for start, end in pairwise([0, *(np.flatnonzero(np.diff(labels)) + 1), len(labels)]):
        name = style.class_name(int(labels[start]), names)
        if end - start >= _LETTER * (len(name) + 1) * len(t):  # else it would run over its neighbours
            middle = (t[start] + t[end - 1]) / 2
            axes.text(middle, 0.5, name, ha="center", va="center", fontsize=SMALL, clip_on=True)
    axes.set_yticks([])


def _styles(count: int) -> list[dict[str, Any]]:
    if count <= 2:
        before = {"linewidth": 1.4, "linestyle": "--", "color": BEFORE}
        return [before, {"linewidth": 1.8, "linestyle": "-", "color": AFTER}][2 - count :]
    colours = style.mpl("matplotlib").colormaps["viridis"](0.92 * (1 - np.arange(count) / (count - 1)))
    styles: list[dict[str, Any]] = [{"linewidth": 1.4, "linestyle": "-", "color": colour} for colour in colours]
    styles[0]["linestyle"], styles[-1]["linewidth"] = "--", 1.8
    return styles
