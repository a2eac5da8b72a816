"""tgp.plot: the drawing of every result by its type, what is refused, and no trace in matplotlib's settings."""

import dataclasses
import importlib.util
import sys

import pytest
import torch
from annotations import shapes_unchecked
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe import Plane, ProbeError, plot, scan
from torchgeom_probe.plotting import style


def test_a_result_is_drawn_by_its_type(planes, lines):
    report = tgp.measure(nn.Linear(3, 5), torch.randn(11, 3), layers=[""], estimator=tgp.Exact())
    assert plot(lines[0]).axes[0].get_ylabel() == "layer 1\nlog √det g [nat]"
    assert plot(lines[0], unit="log10").axes[0].get_ylabel() == "layer 1\nlog₁₀ √det g"
    assert [axes.get_title() for axes in plot(planes[1]).axes[:4]] == ["prediction", "entropy", "layer 1", "layer 3"]
    assert [axes.get_title() for axes in plot(planes[1], layers=["3"]).axes[:3]] == ["prediction", "entropy", "layer 3"]
    columns = [axes.get_title() for axes in plot(planes[1], before=planes[0]).axes if axes.get_title()]
    assert columns == ["before training", "after training"]
    assert len(plot(tuple(planes), names=["one", "other"]).axes) == len(plot(planes).axes)
    assert [text.get_text() for text in plot(report).axes[0].get_yticklabels()] == ["model"]


def test_a_scan_of_what_is_no_log_volume_says_what_it_is(planes, lines):
    for scans in (planes, lines):
        found = scans[0]
        layer = dataclasses.replace(found.report["1"], quantity="nuclear_norm", unit="1/pixel", estimand="Σ σ")
        found = dataclasses.replace(found, report=tgp.GeometryReport({"1": layer}))
        labels = [axes.get_xlabel() + axes.get_ylabel() for axes in plot(found, unit="log10").axes]
        assert sum("Σ σ [1/pixel]" in label for label in labels) == 1
        with pytest.raises(ProbeError, match="no log-volume"):
            found.log_volume  # noqa: B018
        assert torch.equal(found.value["1"].flatten(), layer.value)


def test_what_has_no_drawing_is_refused(planes):
    found = planes[0].magnification("1")
    with pytest.raises(
        ProbeError, match=r"a Magnification has no drawing; plot\(\) draws: SliceScan, .*GeometryReport.*\n.*tgp.plot"
    ):
        plot(found)


def test_what_is_refused(planes, lines, monkeypatch):
    other = scan(nn.Linear(25, 4), Plane(*torch.randn(3, 25), steps=11), layers=[""], progress=False)
    for different in (other, lines[0]):
        with shapes_unchecked(), pytest.raises(ProbeError, match="of different slices"):
            plot([planes[0], different])
    for nothing, held in (([], "nothing"), ([None], "NoneType"), ([*planes, 3], "SliceScan, int")):
        with (
            shapes_unchecked(),
            pytest.raises(ProbeError, match=rf"no list of scans: it holds {held}.*\n.*tgp.plot\(\[tgp.scan"),
        ):
            plot(nothing)
    with shapes_unchecked(), pytest.raises(ProbeError, match=r"'conv9' to draw.*\n.*\['1', '3'\]"):
        plot(planes, layers=["1", "conv9"])
    with shapes_unchecked(), pytest.raises(ProbeError, match="none to draw"):
        plot(lines, layers=[])
    with shapes_unchecked(), pytest.raises(ProbeError, match="unit='bit' is unknown"):
        plot(lines, unit="bit")
    with shapes_unchecked(), pytest.raises(ProbeError, match="1 names for 2 scans"):
        plot(lines, names=["one"])
    with shapes_unchecked(), pytest.raises(ProbeError, match=r"a Plane has 3 samples.*\n.*reshape\(8, 8\)"):
        plot(planes, images=[torch.rand(5, 5)] * 2)
    with shapes_unchecked(), pytest.raises(ProbeError, match="images='yes'"):
        plot(planes, images="yes")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with (
        shapes_unchecked(),
        pytest.raises(ProbeError, match=r"'matplotlib', which is not installed.*\n.*torchgeom_probe\[figures\]"),
    ):
        plot(planes)


def test_the_module_loads_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spec = importlib.util.spec_from_file_location("a_second_copy_of_style", style.__file__)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copy)  # dataclasses look their module up
    spec.loader.exec_module(copy)
    assert copy.Scans is not style.Scans


def test_pyplot_is_never_imported_and_no_setting_changed(lines, planes, monkeypatch):
    import matplotlib

    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    settings = list(dict.items(matplotlib.rcParams))  # .items() of its own would import pyplot
    plot(lines).draw_without_rendering()
    plot(planes, images=[torch.rand(5, 5)] * 3).draw_without_rendering()
    assert "matplotlib.pyplot" not in sys.modules
    assert list(dict.items(matplotlib.rcParams)) == settings
