"""A study of decision boundaries: log-volume against the signed distance from the boundary, a panel a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from torchgeom_probe.boundary.design import CONTRASTS
from torchgeom_probe.boundary.effect import in_words
from torchgeom_probe.boundary.paired import Estimate
from torchgeom_probe.boundary.study import BoundaryStudy
from torchgeom_probe.plotting import style
from torchgeom_probe.plotting.style import BLUE, NORMAL, SMALL, Figure

_GREY = "#7f7f7f"


def plot_study(
    study: BoundaryStudy,
    *,
    layers: Sequence[str] | str | None = None,
    unit: Literal["nat", "log10"] = "nat",
    title: str | None = None,
) -> Figure:
    """Draw each layer's profile: mean log |Jv| along the lines minus that at their crossings, bands 95 % intervals.

    Blue is the network, grey and dashed the untrained one; the dotted line is the boundary.  Above each panel stands
    the effect that the study tested, which is not read off the curve.
    """
    scale = style.factor(unit)
    names = style.chosen_layers(layers, list(study))
    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure = style.new_figure(style.PAGE if columns > 1 else 5.4, 2.5 * rows + 0.9)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels.flat, names, strict=False):
        effect = study[name]
        trained = effect.initial is not None
        if effect.initial_profile is not None:
            _draw(axes, effect.initial_profile, scale, color=_GREY, linestyle="--", label="untrained")
        _draw(axes, effect.profile, scale, color=BLUE, linestyle="-", label="trained" if trained else "the network")
        axes.axvline(0.0, color="black", linewidth=0.9, linestyle=":")
        interval = effect.estimate.interval
        scaled = Estimate(scale * effect.estimate, interval and (scale * interval[0], scale * interval[1]))
        tested = f"{scaled} {unit}, {in_words(effect.p_value)}"
        axes.set_title(f"{style.titled(name)}\n{tested}", fontsize=SMALL, linespacing=1.3)
        axes.tick_params(labelsize=SMALL)
        axes.grid(alpha=0.25, linewidth=0.6)
    for axes in panels[:, 0]:
        axes.set_ylabel(f"{effect.profiled} − that at\nthe boundary [{unit}]", fontsize=NORMAL)
    for axes in panels.flat[max(0, len(names) - columns) : len(names)]:
        axes.tick_params(labelbottom=True)
    panels.flat[0].legend(fontsize=SMALL, loc="lower center", framealpha=0.9, edgecolor="none")
    note = f"signed distance from the boundary {effect.distance}"
    tested = CONTRASTS[effect.contrast].words if effect.contrast in CONTRASTS else "what was tested, at the crossing"
    style.finish(figure, title, f"{note}\nband: 95 % interval; above each panel: {tested}")
    return figure


def _draw(axes: Any, profile: Mapping[float, Estimate], scale: float, *, color: str, **line: Any) -> None:
    offsets = np.array(list(profile))
    means = scale * np.array([float(estimate) for estimate in profile.values()])
    bands = scale * np.array([estimate.interval or (math.nan, math.nan) for estimate in profile.values()])
    axes.fill_between(offsets, bands[:, 0], bands[:, 1], color=color, alpha=0.2, linewidth=0)
    axes.plot(offsets, means, color=color, linewidth=1.6, marker="o", markersize=2.5, **line)
