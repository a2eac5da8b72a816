"""Reports: tables, files, what they say of numbers that are not finite."""

import csv
import json
import math
import sys
from pathlib import Path

import models
import pytest
import torch
from torch import nn

import torchgeom_probe as tgp


@pytest.fixture
def report():
    return tgp.measure(models.mlp(), torch.randn(7, 5), layers=["1", "4"], estimator=tgp.Exact())


def test_summary_says_units_conventions_and_counts(report):
    text = str(report)
    for phrase in (
        "log-volume [nat]",
        "log √det g, all d directions",
        "√det JJᵀ (n < d",
        "J divided by √n",
        "engine fused",
        "0 of 7",
    ):
        assert phrase in text
    assert repr(report) == "GeometryReport(['1', '4'])"
    assert len(report) == 2


def test_statistics_drop_and_count_what_is_not_finite(report):
    g = report["1"]
    volume = g.log_volume.clone()
    volume[2], volume[5] = -torch.inf, torch.nan
    s = tgp.LayerGeometry(**{**vars(g), "value": volume}).statistics()
    finite = volume[volume.isfinite()]
    assert s["nonfinite"] == 2
    assert s["median"] == finite.median().item()  # five values
    assert s["p10"] < s["median"] < s["p90"]
    assert math.isclose(s["mean"], finite.mean().item())
    nothing = tgp.LayerGeometry(**{**vars(g), "value": torch.full_like(volume, -torch.inf)}).statistics()
    assert math.isnan(nothing["median"])
    assert nothing["nonfinite"] == 7


def test_csv_and_json_hold_the_same_numbers(report, tmp_path):
    with report.to_csv(tmp_path / "new" / "report.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    document = json.loads(report.to_json(tmp_path / "report.json").read_text())
    assert len(rows) == 2 * 7
    for layer in document["layers"]:
        mine = [r for r in rows if r["layer"] == layer["name"]]
        assert (
            [float(r["log_volume"]) for r in mine] == layer["log_volume"] == report[layer["name"]].log_volume.tolist()
        )
        assert [float(r["sigma_max"]) for r in mine] == [s[0] for s in layer["singular_values"]]
        assert {r["estimand"] for r in mine} == {layer["estimand"]}
    assert document["units"] == "natural log"


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    singular = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 7))
    path = tgp.measure(singular, torch.randn(3, 5), layers="", estimator=tgp.Exact()).to_json(tmp_path / "r.json")
    (layer,) = json.loads(path.read_text())["layers"]
    assert layer["log_volume"] == [None] * 3
    assert layer["nonfinite"] == 3
    assert layer["rank"] == [2] * 3


def test_a_data_frame_has_the_rows_of_the_csv(report, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert len(frame) == 2 * 7
    again = pandas.read_csv(report.to_csv(tmp_path / "report.csv"))
    assert list(frame.columns) == list(again.columns)
    assert frame["log_volume"].tolist() == again["log_volume"].tolist()


def test_without_pandas_the_pip_line_names_an_extra_that_exists(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(tgp.ProbeError, match=r"pip install 'torchgeom_probe\[pandas\]'"):
        report.to_pandas()
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert "\npandas = [" in pyproject


@pytest.mark.parametrize(
    "estimator", ["exact", "topk:k=2,method=krylov", "logdet:0.1", "trace:3", "subspace:k=2,frames=4"]
)
def test_what_is_saved_is_read_back_whole(estimator, tmp_path):
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh())
    report = tgp.measure(model, torch.randn(3, 40), layers=["0", "1"], estimator=estimator)
    again = tgp.GeometryReport.load(report.save(tmp_path / "report.safetensors"))
    assert str(again) == str(report)
    for name, g in report.items():
        found = again[name]
        assert torch.equal(found.value, g.value)
        assert torch.equal(found.singular_values, g.singular_values)
        assert found.extras.keys() == g.extras.keys()
        assert all(torch.equal(found.extras[key], g.extras[key]) for key in g.extras)
        assert (found.right_singular_vectors is None) == (g.right_singular_vectors is None)
        assert (found.spectrum is None) == (g.spectrum is None)
        if g.spectrum is not None:
            assert torch.equal(again.density(name).trace()[0], report.density(name).trace()[0])


def test_the_table_tells_singular_from_diverged():
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 6)).eval()
    x = torch.randn(3, 5)
    singular = tgp.measure(model, x, layers=["1"], estimator="exact")
    assert "-inf  -inf … -inf" in str(singular)
    assert "median -inf" in repr(singular["1"])
    assert f"{singular['1'].log_pseudo_volume.median():.3g}" in str(singular).split("log_pseudo_volume")[1]
    x[0] = torch.nan
    assert "-inf  -inf … -inf" in str(tgp.measure(model, x, layers=["1"], estimator="exact"))
    x[:] = torch.nan
    diverged = tgp.measure(model, x, layers=["1"], estimator="exact")
    assert "nan  nan … nan" in str(diverged)
    assert "inf" not in str(diverged)


def test_a_notebook_shows_the_table_and_no_markup_of_a_name():
    model = nn.ModuleDict({"a<b": nn.Linear(2, 3)})
    model.forward = lambda x: model["a<b"](x)
    page = tgp.measure(model, torch.randn(4, 2), layers="a<b")._repr_html_()
    assert page.startswith("<table>")
    assert "a&lt;b" in page
    assert "a<b" not in page
