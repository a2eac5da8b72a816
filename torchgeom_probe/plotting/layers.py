"""A measurement as one panel: per layer the values of all samples, their median and the range of 10 to 90 %."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from torchgeom_probe.plotting import style
from torchgeom_probe.plotting.style import BLUE, NORMAL, SMALL, Figure
from torchgeom_probe.report import GeometryReport, LayerGeometry

#: More points a layer hide each other.
_POINTS = 500


def _left_out(layer: LayerGeometry, values: np.ndarray) -> str:
    """How many samples have no dot, and why: singular, with the smallest rank, or not finite at all."""
    singular, other = int(np.isneginf(values).sum()), int((np.isnan(values) | np.isposinf(values)).sum())
    rank = "" if layer.rank is None else f", rank {int(layer.rank[layer.value.isneginf()].min())}" if singular else ""
    said = [f"{singular} of {len(values)} are −inf{rank}"] if singular else []
    return "; ".join([*said, f"{other} of {len(values)} not finite"] if other else said)


def plot_report(
    report: GeometryReport,
    *,
    layers: Sequence[str] | None = None,
    unit: Literal["nat", "log10"] = "nat",
    title: str | None = None,
) -> Figure:
    """Draw the distribution over samples of each layer's value, a row a layer, the first one at the top.

    A point is a sample, the bar spans 10 to 90 % of them, the dark line is the median.  Samples without a finite value
    are counted at the right.
    """
    names = style.chosen_layers(layers, list(report))
    chosen = [report[name] for name in names]
    figure = style.new_figure(style.PAGE, 0.34 * len(chosen) + 1.6)
    axes = figure.add_subplot()
    axes.use_sticky_edges = False  # of a bar without width, which would end the axis at its dots
    random = np.random.default_rng(0)
    for row, layer in enumerate(chosen):
        values = style.in_unit(layer, unit)
        finite = values[np.isfinite(values)]
        if len(finite):
            low, middle, high = np.quantile(finite, [0.1, 0.5, 0.9])
            drawn = finite if len(finite) <= _POINTS else random.choice(finite, _POINTS, replace=False)
            heights = row + random.uniform(-0.22, 0.22, len(drawn))
            axes.plot(drawn, heights, ".", color=BLUE, markersize=4, alpha=0.5, markeredgewidth=0, zorder=2)
            axes.barh(row, high - low, 0.56, left=low, color=BLUE, alpha=0.25, linewidth=0, zorder=1)
            axes.plot([middle] * 2, [row - 0.34, row + 0.34], color="black", linewidth=1.8, zorder=3)
        if len(finite) < len(values):
            text = f" {_left_out(layer, values)}"
            axes.annotate(text, (1, row), xycoords=("axes fraction", "data"), va="center", fontsize=SMALL, color="#a33")
    if not axes.lines:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no sample has a finite value", transform=axes.transAxes, ha="center", fontsize=SMALL)
    axes.set_yticks(range(len(chosen)), [layer.name or "model" for layer in chosen], fontsize=NORMAL)
    axes.set_ylim(len(chosen) - 0.5, -0.5)
    units = dict.fromkeys(f"{la.heading} [{unit if la.unit == 'nat' else la.unit}]" for la in chosen)
    axes.set_xlabel(" or ".join(units), fontsize=NORMAL)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    legend = "dot: a sample; bar: 10 to 90 % of them; line: their median"
    style.finish(figure, title, f"{legend}\n{style.note(report, names)}")
    return figure
