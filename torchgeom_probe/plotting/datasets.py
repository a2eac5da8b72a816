"""A data set as one figure: per layer the distribution by class and the volume against the margin; pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import scipy

from torchgeom_probe.dataset.table import DatasetTable
from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.plotting import style
from torchgeom_probe.plotting.style import BLUE, NORMAL, SMALL, Figure

#: More colours are not told apart, more points hide each other.
_GROUPS, _POINTS = 10, 4000


def plot_table(
    table: DatasetTable,
    *,
    layers: Sequence[str] | str | None = None,
    by: str | None = None,
    pictures: Any = None,
    count: int = 8,
    unit: Literal["nat", "log10"] = "nat",
    title: str | None = None,
) -> Figure:
    """Draw a row of panels a layer, and of the last one the samples that are least and most magnified.

    ``by``: the column whose values are drawn apart, ``"label"`` or ``"prediction"``.  ``pictures``: index → picture, a
    data set's samples say; None: the files that the table names, where they are there.  ``count``: pictures a row.
    """
    names, known = style.chosen_layers(layers, list(table.layers)), table.schema().names
    if by is not None and by not in known:
        raise ProbeError(f"by={by!r} is no column.\nThere are {', '.join(known)}.")
    wanted = [*map(table.value, names), *(c for c in (by, "margin", "file") if c is not None and c in known)]
    samples: dict[str, list[Any]] = table.to_arrow(wanted).to_pydict()
    kinds = {name: table.layers[name] for name in names}
    values = {
        name: style.factor(unit, kind["unit"]) * np.array(samples[table.value(name)], float)
        for name, kind in kinds.items()
    }
    last = values[names[-1]]
    finite = np.flatnonzero(np.isfinite(last))
    order = finite[np.argsort(last[finite], kind="stable")].tolist()
    extremes = (order[:count], order[::-1][:count])
    found = {place: _picture(samples, place, pictures) for places in extremes for place in places}
    shown = [[p for p in places if found[p] is not None] for places in extremes]
    columns = 2 if "margin" in known else 1
    heights = [1.9 * len(names), 2.4] if any(shown) else [1.9 * len(names)]
    figure = style.new_figure(3.7 * columns, heights[0] + (2.6 if any(shown) else 0.6))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = parts[0].subplots(len(names), columns, squeeze=False)
    for row, (name, kind) in zip(panels, kinds.items(), strict=True):
        label = f"{kind['quantity'].replace('_', ' ')} [{unit if kind['unit'] == 'nat' else kind['unit']}]"
        _draw_distribution(row[0], values[name], None if by is None else samples[by])
        row[0].set_title(name or "model", fontsize=NORMAL, parse_math=False)
        row[0].set_xlabel(label, fontsize=SMALL)
        if columns == 2:
            _draw_against_margin(row[1], np.array(samples["margin"], float), values[name], label)
        for axes in row:
            axes.tick_params(labelsize=SMALL)
    if any(shown):
        _draw_pictures(parts[1], shown, found, samples, names[-1])
    estimand = " | ".join(dict.fromkeys(kind["estimand"] for kind in kinds.values()))
    bad = len(last) - len(finite)
    style.finish(figure, title, f"{len(last)} samples, {bad} of them without a finite value; {estimand}")
    return figure


def _draw_distribution(axes: Any, values: np.ndarray, groups: Sequence[Any] | None) -> None:
    """A histogram; of several groups one line each, the largest ones first."""
    axes.set_yticks([])
    finite = np.isfinite(values)
    if not finite.any():
        return
    edges = np.histogram_bin_edges(values[finite], bins=min(60, max(8, int(finite.sum() ** 0.5))))
    if groups is None:
        axes.hist(values[finite], edges, color=BLUE, alpha=0.6)
        return
    colours, largest = style.mpl("matplotlib").colormaps["tab10"], Counter(g for g in groups if g is not None)
    for place, (group, _) in enumerate(largest.most_common(_GROUPS)):
        own = values[finite & np.array([g == group for g in groups])]
        share = np.full(len(own), 1 / max(1, len(own)))
        axes.hist(own, edges, weights=share, histtype="step", color=colours(place), label=_plain(group))
    for text in axes.legend(fontsize=SMALL - 2, frameon=False).get_texts():
        text.set_parse_math(False)


def _draw_against_margin(axes: Any, margin: np.ndarray, values: np.ndarray, label: str) -> None:
    both = np.flatnonzero(np.isfinite(margin) & np.isfinite(values))
    drawn = both if len(both) <= _POINTS else np.random.default_rng(0).choice(both, _POINTS, replace=False)
    size = 6 if len(drawn) < 500 else 3
    axes.plot(margin[drawn], values[drawn], ".", color=BLUE, markersize=size, alpha=0.5, markeredgewidth=0)
    varied = len(both) > 2 and np.ptp(margin[both]) > 0 < np.ptp(values[both])
    rho = (
        f"Spearman ρ = {scipy.stats.spearmanr(margin[both], values[both]).statistic:.2f}"
        if varied
        else "nothing varies"
    )
    axes.set_title(f"against the margin: {rho}", fontsize=NORMAL)
    axes.set_xlabel("margin of the logits", fontsize=SMALL)
    axes.set_ylabel(label, fontsize=SMALL)


def _draw_pictures(
    part: Any, shown: list[list[int]], found: Mapping[int, Any], samples: Mapping[str, list[Any]], layer: str
) -> None:
    panels = part.subplots(2, max(map(len, shown)), squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for row, places, word in zip(panels, shown, ("least", "most"), strict=True):
        for axes, place in zip(row, places, strict=False):
            file = samples["file"][place] if "file" in samples else None
            name = str(samples["index"][place]) if file is None else _plain(file.rpartition("/")[2])
            style.show_picture(axes, found[place], name, size=SMALL - 2)
        where = {"xycoords": "axes fraction", "rotation": 90, "ha": "right", "va": "center"}
        row[0].annotate(word, (-0.1, 0.5), fontsize=SMALL, **where)
    part.suptitle(f"least and most magnified by {layer or 'the model'}", fontsize=NORMAL, parse_math=False)


def _plain(text: Any, length: int = 14) -> str:
    """A label of any origin as short printable text."""
    known = "".join(letter if letter.isprintable() else "·" for letter in str(text))
    return known if len(known) <= length else f"{known[: length - 1]}…"


def _picture(samples: Mapping[str, list[Any]], place: int, pictures: Any) -> np.ndarray | None:
    """A sample as a picture in [0, 1]; None where there is none to show."""
    if pictures is not None:
        found = pictures[samples["index"][place]]
        found = found[0] if isinstance(found, (tuple, list)) else found
        return style.picture(found) if style.is_picture(np.shape(found)) else None
    file = samples["file"][place] if "file" in samples else None
    if file is None:
        return None
    try:
        with optional("PIL.Image", extra="figures").open(file) as image:
            turned = optional("PIL.ImageOps", extra="figures").exif_transpose(image).convert("RGB")
            turned.thumbnail((160, 160))
            return np.asarray(turned) / 255
    except OSError:
        return None
