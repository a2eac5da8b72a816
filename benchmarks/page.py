"""The page that the tables stand on: a section for each, a table of contents, and one figure of the first table."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from torchgeom_probe.errors import optional

PAGE = Path(__file__).parent / "README.md"
#: Bars of the figure: column of the table → colour.
_BARS = {"eager": "#9fb8cc", "replay": "#31688e", "bf16": "#d98a2b"}


def written(page: Path, name: str, section: str) -> None:
    """Put a section between its markers on the page, at the end if the page has none yet; and the contents anew."""
    begin, end = _markers(name)
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    gap = "" if found else "\n"
    page.write_text(_with_contents(f"{before}{gap}{begin}\n\n{section}\n\n{end}{after}"), encoding="utf-8")


def finished(page: Path, name: str, under: str) -> tuple[str, ...]:
    """Return the lines of the table that stands on the page, if it was measured under these circumstances."""
    begin, end = _markers(name)
    section = page.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    return tuple(line for line in section.splitlines() if line.startswith("|")) if under in section else ()


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by python -m benchmarks -->", f"<!-- end of {name} -->"


def _with_contents(text: str) -> str:
    """Link every section between the markers of the contents, where the page has them."""
    before, begin, rest = text.partition("<!-- contents -->")
    _, end, after = rest.partition("<!-- end of contents -->")
    if not end:
        return text
    titles = re.findall(r"^## (.*)$", after, flags=re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    links = [f"- [{title}](#{anchor})" for title, anchor in zip(titles, anchors, strict=True)]
    return "\n".join([f"{before}{begin}\n", *links, f"\n{end}{after}"])


def figure(lines: list[str]) -> Any:
    """Draw the table ``replay``: of each model the geometric mean over its rows, in units of the plain pass.

    A way that was refused for one of a model's rows has no bar there: it would be the mean of other rows.
    """
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "geometric" not in line]
    models = list(dict.fromkeys(row[0] for row in rows))[::-1]
    drawn = optional("matplotlib.figure", extra="figures").Figure((7.2, 0.42 * len(models) + 1.1), layout="constrained")
    axes, height = drawn.subplots(), 0.8 / len(_BARS)
    for place, (name, colour) in enumerate(_BARS.items()):
        own = [[float(row[head.index(name)].replace("–", "nan")) for row in rows if row[0] == m] for m in models]
        means = [math.exp(sum(map(math.log, each)) / len(each)) if each else math.nan for each in own]
        at = [k + (1 - place) * height for k in range(len(models))]
        axes.barh(at, means, height, color=colour, label=name)
        for y, mean in zip(at, means, strict=True):
            axes.annotate(
                f"{mean:.2f}" if mean == mean else "",
                (mean, y),
                (2, 0),
                textcoords="offset points",
                va="center",
                size=7,
            )
    axes.axvline(1, color="#444444", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(models)), models)
    drawn.supxlabel("time of a whole report ÷ a plain forward pass over as many rows", fontsize=9)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.0 + 0.55 / len(models)), ncols=3, frameon=False, borderaxespad=0)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn
