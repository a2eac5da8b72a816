"""Lazy and rich, in miniature: a larger output scale moves the metric less."""

import json

import pytest

from torchgeom_probe.reproduce.run import reproduce
from torchgeom_probe.reproduce.settings import Settings


@pytest.mark.slow
def test_a_lazier_network_moves_its_metric_less(tmp_path):
    said = []
    reproduce(["regimes"], Settings(quick=True, out=tmp_path), say=said.append)
    found = json.loads((tmp_path / "regimes" / "results.json").read_text())["regimes"]
    distances = [row["hidden2"] for row in found["moved"] if row["alpha"] >= 3]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.1 * found["ruler"]
    assert found["slope"] < -0.8
    assert (tmp_path / "regimes" / "distance.png").stat().st_size > 5000
