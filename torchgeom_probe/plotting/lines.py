"""Scans of a line: the log-volume of each layer against t, with the entropy and the predicted classes below."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, repeat
from typing import Any

import numpy as np

from torchgeom_probe.plotting import style
from torchgeom_probe.plotting.style import BLUE, NORMAL, SMALL, Figure, Scans
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
    fields = [(f"{style.titled(layer)}\n{drawn.label(layer)}", drawn.values(layer)) for layer in drawn.shown]
    fields.append(("entropy [nat]", [scan.entropy.numpy() for scan in scans]))
    heights = [1.55] * len(fields) + [0.3] * len(scans) + [1.1] * bool(pictures)
    figure = style.new_figure(style.PAGE, sum(heights) + 0.05 * len(scans) + 0.9)
    panels = figure.subplots(len(heights), height_ratios=heights, sharex=True)
    curves = [line | {"label": name} for line, name in zip(_styles(len(scans)), names, strict=True)]
    *_, entropy = upper = panels[: len(fields)]
    for axes, (label, values) in zip(upper, fields, strict=True):
        _draw_curves(axes, scans[-1], values, curves)
        axes.set_ylabel(label.replace(" − ", "\n− "), fontsize=NORMAL)
    # Above all of it: an undecided network's entropy is the same everywhere, and would lie on the frame.
    entropy.set_ylim(min(0.0, entropy.get_ylim()[0]), 1.08 * max(entropy.dataLim.y1, 1e-9))
    figure.align_ylabels(upper)
    if drawn.names is not None:
        columns = min(len(scans), 5)
        panels[0].legend(fontsize=SMALL, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False)
    for strip, scan, name in zip(panels[len(fields) :], scans, names, strict=False):
        _draw_classes(strip, scan, drawn.class_names)
        strip.set_ylabel(f"class\n{name}".strip(), fontsize=SMALL, rotation=0, ha="right", va="center")
    strip.tick_params(labelsize=SMALL, labelbottom=True)
    strip.set_xlabel("t, from sample a (0) to sample b (1)", fontsize=NORMAL)
    if pictures:
        panels[-1].set_axis_off()
        for left, anchor, name, picture in zip((0.0, 0.8), "WE", "ab", pictures, strict=True):
            inset = panels[-1].inset_axes((left, 0.0, 0.2, 0.86), anchor=anchor)
            style.show_picture(inset, picture, name, size=NORMAL)
    style.finish(figure, drawn.title, style.note(scans[-1].report, drawn.shown))
    return figure


def _draw_curves(axes: Any, last: SliceScan, fields: Sequence[np.ndarray], curves: Sequence[dict[str, Any]]) -> None:
    """Draw the first fields, one a curve, on an axis that spans all, and mark where the last scan's class changes."""
    t, unseen = last.slice.grid()[:, 0].numpy(), repeat({"linestyle": "none"}, len(fields) - len(curves))
    for field, curve in zip(fields, [*curves, *unseen], strict=True):
        axes.plot(t, np.where(np.isfinite(field), field, np.nan), **curve)
    for change in np.flatnonzero(np.diff(last.predictions.numpy())):
        axes.axvline(t[change : change + 2].mean(), color="black", linewidth=0.9, linestyle=":")
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.25, linewidth=0.6)


def _draw_classes(strip: Any, scan: SliceScan, names: Sequence[str] | None) -> None:
    t, labels, half_step = scan.slice.grid()[:, 0].numpy(), scan.predictions.numpy(), 0.5 / (scan.slice.steps - 1)
    colours = style.class_colours(scan.predictions.unique().tolist())
    frame = (-half_step, 1 + half_step, 0, 1)
    strip.imshow(labels[None], aspect="auto", extent=frame, interpolation="nearest", **colours)
    for start, end in pairwise([0, *(np.flatnonzero(np.diff(labels)) + 1), len(labels)]):
        name = style.class_name(int(labels[start]), names)
        if end - start >= _LETTER * (len(name) + 1) * len(t):  # else it would run over its neighbours
            middle = (t[start] + t[end - 1]) / 2
            strip.text(middle, 0.5, name, ha="center", va="center", fontsize=SMALL, clip_on=True)
    strip.set_yticks([])


def _styles(count: int) -> list[dict[str, Any]]:
    viridis = style.mpl("matplotlib").colormaps["viridis"]
    colours = ["#7f7f7f", BLUE][-count:] if count <= 2 else viridis(np.linspace(0.92, 0, count))
    styles: list[dict[str, Any]] = [{"linewidth": 1.4, "linestyle": "-", "color": colour} for colour in colours]
    styles[0]["linestyle"] = "--"
    styles[-1] |= {"linewidth": 1.8, "linestyle": "-"}
    return styles
