"""Subspace: what a frame's products say of g, frames that mean something, names that hold; and the default."""

import math

import pytest
import torch
from annotations import shapes_unchecked
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.estimators import Auto
from torchgeom_probe.linalg.directions import orthonormal_frame, principal_frame, smooth_frame


def _network():
    torch.manual_seed(0)
    stages = [nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.Conv2d(8, 12, 3, stride=2), nn.GELU(), nn.Flatten()]
    return nn.Sequential(*stages, nn.Linear(12 * 2 * 2, 30)).double(), torch.randn(6, 3, 11, 11).double()


LAYERS = ["1", "3", "5"]


def _dense(model, x, layer):
    """g [B, d, d] of J/√n, by torch's own reverse mode."""
    features = nn.Sequential(*list(model)[: int(layer) + 1])
    J = torch.func.vmap(torch.func.jacrev(lambda s: features(s[None]).flatten()))(x).flatten(2)
    return J.mT @ J / J.shape[1]


def test_scale_and_effective_dimension_hold_within_their_errors_over_seeds():
    model, x = _network()
    true = {}
    for layer in LAYERS:
        g = _dense(model, x, layer)
        trace, square = g.diagonal(dim1=1, dim2=2).sum(1), g.square().sum((1, 2))
        true[layer] = {"scale": (trace / g.shape[1]).log() / 2, "effective_dimension": trace.square() / square}
    hits, tried = 0, 0
    for seed in range(120):
        report = tgp.measure(model, x, layers=LAYERS, estimator=tgp.Subspace(8, seed=seed), progress=False)
        for layer in LAYERS:
            for name, value in true[layer].items():
                found, error = report[layer].extras[name], report[layer].extras[f"{name}_error"]
                hits += int(((found - value).abs() <= 3.5 * error).sum())
                tried += len(value)
    assert hits >= 0.99 * tried


def test_exact_gives_both_without_an_error():
    model, x = _network()
    g = _dense(model, x, "5")
    found = tgp.measure(model, x, layers="5", estimator="exact")["5"]
    assert torch.allclose(found.scale, (g.diagonal(dim1=1, dim2=2).sum(1) / g.shape[1]).log() / 2)
    dimension = g.diagonal(dim1=1, dim2=2).sum(1).square() / g.square().sum((1, 2))
    assert torch.allclose(found.effective_dimension, dimension)
    assert list(found.extras) == ["scale", "effective_dimension"]


@pytest.mark.parametrize("frame", ["random", "smooth", "data"])
def test_a_frame_is_what_its_name_says(frame):
    model, x = _network()
    rows = {
        "random": lambda: orthonormal_frame(3, 363, seed=5),
        "smooth": lambda: smooth_frame(3, (3, 11, 11), seed=5),
        "data": lambda: principal_frame(3, x),
    }[frame]()
    found = tgp.measure(model, x, layers=LAYERS, estimator=tgp.Subspace(3, seed=5, frame=frame))
    for layer in LAYERS:
        gram = rows @ _dense(model, x, layer) @ rows.T
        assert torch.allclose(found[layer].frame_volume, torch.logdet(gram) / 2)
        assert ("scale" in found[layer].extras) == (frame == "random")  # the others say nothing of tr g


def test_the_data_frame_is_that_of_the_first_batch_all_of_it_and_stays():
    model, x = _network()
    probe = tgp.GeometryProbe(model, layers="5", estimator=tgp.Subspace(3, frame="data"), memory_budget=40_000)
    assert probe.cost(x).samples_at_once < len(x)  # several chunks, one frame
    first = probe.measure(x)["5"]
    given = tgp.Subspace(3, frame="data", frame_data=x)
    assert torch.allclose(first.value, tgp.measure(model, x, layers="5", estimator=given)["5"].value)
    later = probe.measure(x[:2] + 0.01)["5"]
    assert torch.allclose(later.value, tgp.measure(model, x[:2] + 0.01, layers="5", estimator=given)["5"].value)
    assert repr(given) != repr(tgp.Subspace(3, frame="data", frame_data=x + 1))  # a scan that goes on compares it


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"frame": "smoth"}, "frame='smoth'.*unknown"),
        ({"frame": "smooth", "frames": 16}, "mean over frames"),
        ({"frame_data": torch.zeros(3, 2)}, "frame_data"),
    ],
)
def test_frames_that_make_no_sense_are_refused(options, match):
    with shapes_unchecked(), pytest.raises(tgp.ProbeError, match=match):
        tgp.Subspace(**options)


def test_data_of_another_space_or_of_none_are_refused():
    model, x = _network()
    with pytest.raises(tgp.ProbeError, match=r"\(9, 5\).*\(3, 11, 11\)"):
        tgp.measure(model, x, layers="5", estimator=tgp.Subspace(3, frame="data", frame_data=torch.randn(9, 5)))
    with pytest.raises(tgp.ProbeError, match="source="):
        tgp.measure(model, x, layers="5", source="1", estimator=tgp.Subspace(3, frame="data"))


def test_a_frame_goes_by_its_own_name_and_a_scale_is_no_log_volume():
    model, x = _network()
    frame = tgp.measure(model, x, layers="5", estimator=tgp.Subspace(4))
    assert frame["5"].quantity == "frame_volume"
    assert "log frame volume" in str(frame)
    assert torch.equal(frame["5"].frame_volume, frame["5"].value)
    assert torch.equal(frame["5"].log_volume, frame["5"].value)
    scale = tgp.measure(model, x, layers="5", estimator="trace")["5"]
    assert torch.equal(scale.scale, scale.value)
    for name in ("log_volume", "log10_volume", "frame_volume"):
        with pytest.raises(tgp.ProbeError, match=r"Read report\['5'\].scale"):
            getattr(scale, name)


def test_a_frame_of_all_directions_is_the_log_volume():
    model, x = nn.Linear(5, 9), torch.randn(3, 5)
    whole = tgp.measure(model, x, layers="", estimator=tgp.Subspace(5))[""]
    exact = tgp.measure(model, x, layers="", estimator=tgp.Exact())[""]
    assert whole.quantity == "log_volume"
    assert torch.allclose(whole.log_volume, exact.log_volume, atol=1e-5)
    assert torch.equal(whole.frame_volume, whole.log_volume)


@pytest.mark.parametrize(("d", "chosen"), [(1, tgp.Exact()), (16, tgp.Exact()), (17, tgp.Subspace())])
def test_the_default_is_exact_where_that_costs_no_more_than_twice_a_frame(d, chosen):
    model, x = nn.Sequential(nn.Linear(d, 20), nn.Tanh()), torch.randn(3, d)
    default = tgp.GeometryProbe(model, layers=["1"])
    named = tgp.GeometryProbe(model, layers=["1"], estimator=chosen)
    found, expected = default.measure(x)["1"], named.measure(x)["1"]
    assert torch.equal(found.value, expected.value)
    assert found.estimand == expected.estimand
    assert default.cost(x).rows == named.cost(x).rows
    assert default.estimator == Auto()


def test_tables_files_and_charts_call_a_frame_what_it_is(tmp_path):
    model, x = _network()
    report = tgp.measure(model, x, layers=LAYERS, estimator=tgp.Subspace(4))
    assert "log frame volume [nat]" in report.summary()
    assert "log-volume" not in report.summary()
    header = report.to_csv(tmp_path / "report.csv").read_text().splitlines()[0].split(",")
    assert {"frame_volume", "scale", "scale_error", "effective_dimension", "effective_dimension_error"} <= set(header)
    assert "log_volume" not in header
    again = tgp.GeometryReport.load(report.save(tmp_path / "report.safetensors"))
    assert again["5"].quantity == "frame_volume"
    assert torch.equal(again["5"].scale, report["5"].scale)
    writer = tgp.CSVWriter(tmp_path / "log.csv")
    writer.write(0, report)
    columns, first = (line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()[:2])
    row = dict(zip(columns, first, strict=True))
    assert row["quantity"] == "frame_volume"
    assert math.isclose(float(row["scale"]), report["1"].scale.quantile(0.5).item(), rel_tol=1e-9)
    assert tgp.plot(report).axes[0].get_xlabel() == "log frame volume [nat]"
