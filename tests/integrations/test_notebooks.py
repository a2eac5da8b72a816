"""The notebooks among the recipes run from top to bottom, and are small."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbmake")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
RECIPES = Path(__file__).parents[2] / "integrations" / "recipes"


@pytest.mark.parametrize("name", ["map_and_study", pytest.param("watch_finetuning", marks=pytest.mark.slow)])
def test_a_notebook_runs(name, tmp_path):
    shutil.copy(RECIPES / f"{name}.ipynb", tmp_path)  # where it writes its pictures
    options = ["-q", "--nbmake", "--nbmake-timeout=500", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "1 passed" in run.stdout


def test_notebooks_are_kept_small():
    found = list(RECIPES.glob("*.ipynb"))
    assert len(found) == 2
    assert all(file.stat().st_size < 150_000 for file in found)
