"""The benchmark command runs from the repository, checks what it times, and fills in its page."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_quick_run_prints_a_table() -> None:
    pytest.importorskip("timm")
    page = ROOT / "benchmarks" / "README.md"
    before = page.read_text(encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| test_")]
    assert len(rows) == 2
    assert all(float(cell) > 0 for row in rows for cell in row.split("|")[4:8])
    assert page.read_text(encoding="utf-8") == before


def test_a_section_goes_between_its_markers(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("benchmarks_main", ROOT / "benchmarks" / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    page = tmp_path / "README.md"
    page.write_text("above\n", encoding="utf-8")
    command.written(page, "limit", "old")
    command.written(page, "memory", "other")
    command.written(page, "limit", "new")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert "old" not in text
    assert text.index("new") < text.index("<!-- end of limit -->") < text.index("other")
