"""Results say what studies found; checks that fail; small pictures for the gallery."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from annotations import shapes_unchecked

import torchgeom_probe as tgp
from torchgeom_probe.reproduce import results as results_module
from torchgeom_probe.reproduce.results import Results, table
from torchgeom_probe.reproduce.settings import Settings
from torchgeom_probe.reproduce.training import Training, View

pytest.importorskip("matplotlib")


def settings(tmp_path, **options):
    return Settings(out=tmp_path, **options)


def line_task(seed):
    """Points of a plane, a network that tells its sides, and the network before training."""
    torch.manual_seed(seed)
    x = torch.randn(300, 2)
    labels = (x[:, 0] > 0.2).long() + (x[:, 0] > 1.0).long()
    model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    initial, optimizer = copy.deepcopy(model), torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return x, model, initial


def studied(seed):
    x, model, initial = line_task(seed)
    options = {"layers": ["1"], "pairs": 20, "offsets": (-0.2, 0.2), "progress": False}
    return tgp.boundary_study(model, x, initial=initial, seed=seed, **options)


@pytest.mark.parametrize("count", [1, 3])
def test_results_say_what_the_studies_found_and_the_table_has_a_row_a_layer(count, tmp_path):
    said = []
    results = Results("fig9", "a test", settings(tmp_path), say=said.append)
    studies = [studied(seed) for seed in range(count)]
    results.found("net", studies)
    results.finish()
    stored = json.loads((tmp_path / "fig9" / "results.json").read_text())
    (study,) = stored["studies"]
    effect = tgp.compare_networks(studies)["1"] if count == 3 else studies[0]["1"]
    assert study["sentence"] == str(effect)
    assert study["supported"] == effect.supported
    assert study["estimate"][0] == pytest.approx(float(effect.estimate))
    assert f"net: {effect}." in said
    assert (tmp_path / "fig9" / "net_profile.png").exists()
    head, line, row = table(tmp_path).splitlines()
    assert head.count("|") == line.count("|") == row.count("|")
    assert row.startswith(f"| net, 1 | {effect.estimate} |")
    assert f"| {count} ({effect.num_pairs} pairs) | {effect.verdict} |" in row


def test_a_network_of_one_class_is_said_to_have_no_study(tmp_path):
    x, model, initial = line_task(0)
    with torch.no_grad():
        model[2].bias[1] += 1e4
    networks = {0: initial, 9: model}
    of = SimpleNamespace(
        name="net", epochs=(0, 9), folder=tmp_path, model=networks.__getitem__, readout=lambda epoch: None
    )
    said = []
    results = Results("figure", "a test", settings(tmp_path), say=said.append)
    with shapes_unchecked():
        results.study([of], x, layers=["1"])
    assert "net: no study of its boundaries: all 300 samples are predicted as one class" in said[0]
    assert results.numbers["refused"][0]["network"] == "net"
    assert not results.numbers["studies"]


def test_a_slice_is_described_beside_the_untrained_network(tmp_path):
    x, model, initial = line_task(0)
    line = tgp.Line(x[0], x[1], steps=20)
    view = View("line", line, {"layers": ["1"]})
    scans = {epoch: tgp.scan(net, line, layers=["1"], progress=False) for epoch, net in ((0, initial), (9, model))}
    of = SimpleNamespace(name="net", epochs=(0, 9), scan=lambda view, epoch: scans[epoch])
    said = []
    results = Results("figure", "a test", settings(tmp_path), say=said.append)
    with shapes_unchecked():
        results.describe(of, view)
    (found,) = results.numbers["slices"]
    assert found["name"] == "1"
    assert found["initial"]["rho"] == scans[9].magnification("1", initial=scans[0]).initial.rho
    assert "an illustration, of about" in said[0]


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
    assert {p.name for p in (tmp_path / "figure").iterdir()} == {"map.png", "map.pdf"}
    (small,) = (tmp_path / "gallery").iterdir()
    assert small.name == "figure_map.png"
    assert 5_000 < small.stat().st_size <= 150_000


def test_seeds_are_for_studies_alone_and_without_studies_there_is_no_table(tmp_path, monkeypatch):
    trained = []

    def train(training, own, **options):
        trained.append(training.name)
        return SimpleNamespace(name=training.name, history=[{"epoch": 0}, {"epoch": 1}])

    monkeypatch.setattr(results_module, "train", train)
    results = Results("figure", "a test", settings(tmp_path, seeds=3), say=lambda line: None)
    with shapes_unchecked():
        of = Training("net", model=None, loss=None, optimizer=None, num_samples=1, epochs=1)
    with shapes_unchecked():
        results.train(of, [])
        results.train(of, [], seeds=8)
    assert trained == ["net", "net", "net_seed1", "net_seed2"]
    assert table(tmp_path) == ""
