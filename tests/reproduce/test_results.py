"""Results say where the hypothesis fails; checks that fail; small pictures for the gallery."""

import json

import pytest
import torch
from torchgeom_probe.boundary.magnification import magnification

import torchgeom_probe as tgp
from torchgeom_probe.reproduce.results import Results
from torchgeom_probe.reproduce.settings import Settings

pytest.importorskip("matplotlib")


def settings(tmp_path, **options):
    return Settings(out=tmp_path, **options)


def field(sign):
    x, y = torch.meshgrid(torch.linspace(-1, 1, 30), torch.linspace(-1, 1, 30), indexing="xy")
    boundary = x - 0.6 * torch.sin(4 * y)
    entropy = torch.exp(-((boundary / 0.3) ** 2))
    return sign * 2 * entropy + 0.1 * torch.cos(9 * y), entropy, (boundary > 0).long()


@pytest.mark.parametrize(("sign", "supported"), [(1, True), (-1, False)])
def test_results_say_where_the_hypothesis_fails(sign, supported, tmp_path):
    volume, entropy, classes = field(sign)
    said = []
    results = Results("figure", "a test", settings(tmp_path), say=said.append)
    found = magnification(volume, entropy, predictions=classes, name="layer3", initial=0 * volume)
    results.record(found, network="net", view="plane", epoch=7)
    results.finish()
    stored = json.loads((tmp_path / "figure" / "results.json").read_text())
    (test,) = stored["magnification"]
    assert test["supported"] is supported
    assert test["rho"] == pytest.approx(found.rho)
    assert test["initial"]["rho"] is None  # constant before training: null, which any JSON reader takes
    if supported:
        assert stored["hypothesis"] == {"tests": 1, "supported": 1, "not_supported": []}
    else:
        (failing,) = stored["hypothesis"]["not_supported"]
        assert failing["where"] == "net, plane, layer3"
        assert "shows the opposite" in failing["because"]
        assert any("supported in 0 of 1 tests; not in: net, plane, layer3" in line for line in said)


def test_no_more_than_before_training_is_no_support():
    volume, entropy, classes = field(1)
    assert magnification(volume, entropy, predictions=classes).supported
    same = magnification(volume, entropy, predictions=classes, initial=volume)
    assert not same.supported
    assert "no more than before training" in str(same)
    assert not magnification(volume, entropy, predictions=0 * classes).supported  # no boundary crosses it


def test_a_failing_check_is_stored_and_raised(tmp_path):
    results = Results("figure", "a test", settings(tmp_path), say=lambda line: None)
    assert results.check("fine", value=1e-6, bound=1e-5, what="small")
    assert not results.check("large", value=2e-5, bound=1e-5, what="too large")
    with pytest.raises(tgp.ProbeError, match="the check of large failed"):
        results.finish()
    assert json.loads((tmp_path / "figure" / "results.json").read_text())["checks"]["large"]["ok"] is False


def test_the_gallery_gets_small_pictures(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="compressed")
    figure.add_subplot().imshow(torch.rand(300, 300).numpy())
    results = Results("figure", "a test", settings(tmp_path, gallery=tmp_path / "gallery"), say=lambda line: None)
    results.picture("map", figure, gallery=True)
    results.animation("map", [figure, figure])
    assert {p.name for p in (tmp_path / "figure").iterdir()} == {"map.png", "map.pdf", "map.gif"}
    (small,) = (tmp_path / "gallery").iterdir()
    assert small.name == "figure_map.png"
    assert 10_000 < small.stat().st_size <= 150_000
