"""The benchmark command runs from the repository, checks what it times, and fills in its page."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_main", ROOT / "benchmarks" / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    return command


#: table → (rows that a quick run prints, the columns that hold figures)
FIGURES = {
    "The dual pass against the limit": (2, slice(4, None)),
    "Peak memory": (1, slice(3, None)),
    "Four stages of a ResNet-34: one probe against a Jacobian for each": (5, slice(2, None)),
    "Scaling": (12, slice(3, None)),
    "Against other libraries": (3 if importlib.util.find_spec("curvlinops") else 1, slice(4, None)),
}


TITLED = "limit memory replay stages scaling libraries overhead".split()


@pytest.mark.slow  # CI runs the first by name
@pytest.mark.parametrize("tables", ["limit memory", "replay stages scaling libraries overhead"])
def test_a_quick_run_prints_its_tables(tables: str) -> None:
    pytest.importorskip("timm")
    page = ROOT / "benchmarks" / "README.md"
    before = page.read_text(encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", *tables.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    sections = {s.splitlines()[0]: s.splitlines() for s in done.stdout.split("\n## ")[1:]}
    titles = {name: importlib.import_module(f"benchmarks.{name}").TITLE for name in TITLED}
    assert {titles[name] for name in tables.split()} <= set(sections)
    assert set(FIGURES) <= set(titles.values())
    for title in set(FIGURES) & set(sections):
        count, columns = FIGURES[title]
        rows = [line for line in sections[title] if line.startswith("|")][2:]
        assert len(rows) == count, title
        for row in rows:
            cells = [cell.strip() for cell in row.split("|")[1:-1]]
            figures = re.findall(r"\d+\.\d+", " ".join(cells[columns.start - 1 :]))
            if "not installed" in row:
                continue
            assert figures, row
            assert "nan" not in row, row
            assert all(0 < float(figure) < math.inf for figure in figures), row
    assert page.read_text(encoding="utf-8") == before
    if "overhead" not in tables:
        return
    steps, budget = (
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in sections["What a monitor costs a training"]
        if line.startswith("| MLP")
    )
    assert all(float(cell.rstrip("%")) > 0 for cell in steps)  # without, with, ratio, the monitor alone, its share
    assert int(budget[2]) >= 1  # probes
    assert all(0 < float(share.rstrip("%")) < 100 for share in budget[-2:])


class Interrupted(Exception):
    pass


def test_an_interrupted_table_keeps_its_rows_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = load()
    page = tmp_path / "README.md"
    page.write_text("above\n", encoding="utf-8")
    ran: list[str] = []

    def table(settings: Any) -> Iterator[str]:
        yield "| model | input | B, k | time |"
        yield "|---|---|---|---|"
        for name in settings.families or ("a", "b", "c"):
            row = f"| {name} | 8 | 1, 2 |"
            old = next((line for line in settings.finished if line.startswith(row)), None)
            if old is None:
                if len(ran) == 2 and name == "c":
                    ran.append("stop")
                    raise Interrupted
                ran.append(name)
            yield old or f"{row} {len(ran)}.0 |"

    module = SimpleNamespace(TITLE="T", NOTE="N", RESUMES=True, table=table)
    monkeypatch.setattr(command.importlib, "import_module", lambda _: module)
    settings = command.Settings(turns=3)
    with pytest.raises(Interrupted):
        command.measured("limit", settings, page=page, resume=True)
    assert "| b | 8 | 1, 2 | 2.0 |" in page.read_text(encoding="utf-8")
    command.measured("limit", settings, page=page, resume=True)
    assert ran == ["a", "b", "stop", "c"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert text.count("| 8 | 1, 2 |") == 3
    only = command.Settings(turns=3, families=("d",))
    command.measured("limit", only, page=page, resume=True)  # one family more: the others stay
    assert page.read_text(encoding="utf-8").count("| 8 | 1, 2 |") == 4
    command.measured("limit", command.Settings(turns=4), page=page, resume=True)  # under other circumstances: anew
    assert ran == ["a", "b", "stop", "c", "d", "a", "b", "c"]
    assert page.read_text(encoding="utf-8").count("| 8 | 1, 2 |") == 3


def test_slope_is_the_power() -> None:
    from_file = importlib.import_module("benchmarks.timing")
    assert from_file.slope([1.0, 2.0, 8.0], [5.0, 20.0, 320.0]) == pytest.approx(2.0)
    assert from_file.slope([1.0, 10.0], [3.0, 3.0]) == pytest.approx(0.0)


def test_a_section_goes_between_its_markers(tmp_path: Path) -> None:
    command = load()
    page = tmp_path / "README.md"
    page.write_text("above\n", encoding="utf-8")
    command.written(page, "limit", "old")
    command.written(page, "memory", "other")
    command.written(page, "limit", "new")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert "contents" not in text
    assert "old" not in text
    assert text.index("new") < text.index("<!-- end of limit -->") < text.index("other")


def test_the_contents_link_every_section_below_them(tmp_path: Path) -> None:
    command = load()
    page = tmp_path / "README.md"
    page.write_text("## First\n<!-- contents -->\n<!-- end of contents -->\n", encoding="utf-8")
    for title in ("The paper's network: σ", "Scaling"):
        command.written(page, title[:3].lower(), f"## {title}")
    contents = page.read_text(encoding="utf-8").partition("<!-- end of contents -->")[0]
    assert "- [The paper's network: σ](#the-papers-network-σ)\n- [Scaling](#scaling)\n" in contents
    assert "[First]" not in contents


def test_the_figure_has_a_bar_for_every_model_and_way() -> None:
    page = importlib.import_module("benchmarks.page")
    rows = [
        "| a | 8 | 2, 4 | 0.1 | 2.00 | 1.00 | – |",
        "| a | 8 | 8, 2 | 0.1 | 0.50 | 1.00 | – |",
        "| b | 8 | 2, 4 | 0.1 | 1.5 | 1.2 | 0.7 |",
    ]
    drawn = page.figure(
        ["| model | input | B, k | limit [s] | eager | replay | bf16 |", "|---|", *rows, "| **geometric mean** |"]
    )
    widths = [[bar.get_width() for bar in container] for container in drawn.axes[0].containers]
    assert [tick.get_text() for tick in drawn.axes[0].get_yticklabels()] == ["b", "a"]
    assert widths[:2] == [pytest.approx([1.5, 1.0]), pytest.approx([1.2, 1.0])]
    assert widths[2][0] == pytest.approx(0.7)
