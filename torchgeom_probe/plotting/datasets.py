"""A data set as one figure: per layer the distribution by class and the volume against the margin; pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy.stats import spearmanr

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
    names = style.chosen_layers(layers, list(table.layers))
    known = table.schema().names
    if by is not None and by not in known:
        raise ProbeError(f"by={by!r} is no column.\nThere are {', '.join(known)}.")
    columns = 2 if "margin" in known else 1
    values = {name: _values(table, name, unit) for name in names}
    last = values[names[-1]]
    finite = np.flatnonzero(np.isfinite(last))
    order = finite[np.argsort(last[finite], kind="stable")].tolist()
    frame = table.to_pandas([c for c in (by, "margin", "file") if c is not None and c in known])
    found = {place: _picture(frame, place, pictures) for place in {*order[:count], *order[-count:]}}
    shown = [[p for p in places if found[p] is not None] for places in (order[:count], order[::-1][:count])]
    figure = style.new_figure(3.7 * columns, 1.9 * len(names) + (2.6 if any(shown) else 0.6))
    heights = [1.9 * len(names), 2.4] if any(shown) else [1]
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = parts[0].subplots(len(names), columns, squeeze=False)
    for row, name in zip(panels, names, strict=True):
        _draw_distribution(row[0], values[name], None if by is None else frame[by])
        row[0].set_title(name or "model", fontsize=NORMAL, parse_math=False)
        row[0].set_xlabel(_label(table, name, unit), fontsize=SMALL)
        if columns == 2:
            _draw_against_margin(row[1], frame["margin"].to_numpy(float), values[name], _label(table, name, unit))
    if any(shown):
        _draw_pictures(parts[1], shown, found, frame, names[-1])
    bad = len(last) - len(finite)
    estimand = " | ".join(dict.fromkeys(table.layers[name]["estimand"] for name in names))
    style.finish(figure, title, f"{len(last)} samples, {bad} of them without a finite value; {estimand}")
    return figure


def _label(table: DatasetTable, name: str, unit: str) -> str:
    measured = table.layers[name]
    return f"{measured['quantity'].replace('_', ' ')} [{unit if measured['unit'] == 'nat' else measured['unit']}]"


def _values(table: DatasetTable, name: str, unit: str) -> np.ndarray:
    style.refuse_unit(unit)
    column = table.value(name)
    found = table.to_pandas([column])[column].to_numpy(float)
    return found / math.log(10) if unit == "log10" and table.layers[name]["unit"] == "nat" else found


def _draw_distribution(axes: Any, values: np.ndarray, groups: Any) -> None:
    """A histogram; of several groups one line each, the largest ones first."""
    finite = np.isfinite(values)
    edges = (
        np.histogram_bin_edges(values[finite], bins=min(60, max(8, int(finite.sum() ** 0.5)))) if finite.any() else 2
    )
    if groups is None:
        axes.hist(values[finite], edges, color=BLUE, alpha=0.6)
    else:
        largest = groups.value_counts().index[:_GROUPS]
        for place, group in enumerate(largest):
            own, colour = (
                values[finite & (groups == group).to_numpy()],
                style.mpl("matplotlib").colormaps["tab10"](place),
            )
            share = np.full(len(own), 1 / max(1, len(own)))
            axes.hist(own, edges, weights=share, histtype="step", color=colour, label=_plain(group))
        for text in axes.legend(fontsize=SMALL - 2, frameon=False).get_texts():
            text.set_parse_math(False)
    axes.set_yticks([])
    axes.tick_params(labelsize=SMALL)


def _draw_against_margin(axes: Any, margin: np.ndarray, values: np.ndarray, label: str) -> None:
    both = np.flatnonzero(np.isfinite(margin) & np.isfinite(values))
    drawn = both if len(both) <= _POINTS else np.random.default_rng(0).choice(both, _POINTS, replace=False)
    axes.plot(
        margin[drawn],
        values[drawn],
        ".",
        color=BLUE,
        markersize=6 if len(drawn) < 500 else 3,
        alpha=0.5,
        markeredgewidth=0,
    )
    varied = len(both) > 2 and np.ptp(margin[both]) > 0 < np.ptp(values[both])
    rho = f"Spearman ρ = {spearmanr(margin[both], values[both]).statistic:.2f}" if varied else "nothing varies"
    axes.set_title(f"against the margin: {rho}", fontsize=NORMAL)
    axes.set_xlabel("margin of the logits", fontsize=SMALL)
    axes.set_ylabel(label, fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)


def _draw_pictures(part: Any, shown: list[list[int]], found: Any, frame: Any, layer: str) -> None:
    panels = part.subplots(2, max(map(len, shown)), squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for row, places, word in zip(panels, shown, ("least", "most"), strict=True):
        for axes, place in zip(row, places, strict=False):
            axes.imshow(found[place], cmap="gray" if found[place].ndim == 2 else None, vmin=0, vmax=1)
            file = frame["file"][place] if "file" in frame else None
            name = f"{frame['index'][place]}" if file is None else _plain(file.rpartition("/")[2])
            axes.set_title(name, fontsize=SMALL - 2, parse_math=False, pad=2)
        row[0].annotate(
            word, (-0.1, 0.5), xycoords="axes fraction", rotation=90, ha="right", va="center", fontsize=SMALL
        )
    part.suptitle(f"least and most magnified by {layer or 'the model'}", fontsize=NORMAL, parse_math=False)


def _plain(text: Any, length: int = 14) -> str:
    """A label of any origin as short printable text."""
    known = "".join(letter if letter.isprintable() else "·" for letter in str(text))
    return known if len(known) <= length else f"{known[: length - 1]}…"


def _picture(frame: Any, place: int, pictures: Any) -> np.ndarray | None:
    """A sample as a picture in [0, 1]; None where there is none to show."""
    if pictures is not None:
        found = pictures[int(frame["index"][place])]
        found = found[0] if isinstance(found, (tuple, list)) else found
        return style.picture(found) if style.is_picture(np.shape(found)) else None
    file = frame["file"][place] if "file" in frame else None
    if file is None:
        return None
    try:
        with optional("PIL.Image", extra="figures").open(file) as image:
            turned = optional("PIL.ImageOps", extra="figures").exif_transpose(image).convert("RGB")
            turned.thumbnail((160, 160))
            return np.asarray(turned) / 255
    except OSError:
        return None
