"""A report as one panel: every layer's samples, median and 10 to 90 % at their places; what is not finite counted."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from annotations import shapes_unchecked
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe import ProbeError, plot


@pytest.fixture
def report():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 11), nn.GELU())
    return tgp.measure(model, torch.randn(37, 5), layers=["1", "3"], estimator=tgp.Exact())


def rows(figure):
    """Row → its points, its bar (low, high) and its median."""
    (axes,) = figure.axes
    medians = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "-"]
    points = [line.get_xdata() for line in axes.lines if line.get_marker() == "."]
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    return list(zip(points, bars, medians, strict=True))


@pytest.mark.parametrize("unit", ["nat", "log10"])
def test_points_bar_and_median_of_every_layer(report, unit):
    figure = plot(report, unit=unit)
    for layer, (points, bar, median) in zip(report.values(), rows(figure), strict=True):
        values = (layer.log_volume if unit == "nat" else layer.log10_volume).double().numpy()
        assert np.allclose(points, values)
        assert bar == pytest.approx(tuple(np.quantile(values, [0.1, 0.9])))
        assert median == pytest.approx(np.median(values))
    (axes,) = figure.axes
    assert axes.get_xlabel() == f"log-volume [{unit}]"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1", "3"]
    assert axes.yaxis_inverted()  # the first layer at the top
    assert "√det g" in figure.get_supxlabel()
    assert "features divided by" in figure.get_supxlabel()


def test_a_value_that_is_no_log_volume_keeps_its_own_unit(report):
    other = tgp.GeometryReport(
        {"1": report["1"], "3": dataclasses.replace(report["3"], quantity="value", unit="1/pixel")}
    )
    figure = plot(other, unit="log10")
    assert figure.axes[0].get_xlabel() == "log-volume [log10] or value [1/pixel]"
    (first, _, _), (second, _, _) = rows(figure)
    assert np.allclose(first, report["1"].log10_volume)
    assert np.allclose(second, report["3"].value)


def test_layers_are_chosen_and_drawn_in_their_order(report):
    (axes,) = plot(report, layers=["3", "1"], title="two").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["3", "1"]
    with pytest.raises(ProbeError, match=r"'2' to draw.*\n.*\['1', '3'\]"):
        plot(report, layers=["2"])
    with shapes_unchecked(), pytest.raises(ProbeError, match="unit='bit' is unknown"):
        plot(report, unit="bit")


def test_what_is_not_finite_is_counted_and_left_out(report):
    report["3"].log_volume[:5] = -torch.inf
    figure = plot(report)
    assert [len(points) for points, _, _ in rows(figure)] == [37, 32]
    lowest = report["3"].rank[:5].min()
    assert [text.get_text().strip() for text in figure.axes[0].texts] == [f"5 of 37 are −inf, rank {lowest}"]
    report["3"].log_volume[:2] = torch.nan
    assert plot(report).axes[0].texts[0].get_text().endswith("; 2 of 37 not finite")
    report["3"].log_volume[:] = -torch.inf
    assert len(rows(plot(report))) == 1
    (axes,) = plot(report, layers=["3"]).axes
    assert "no sample has a finite value" in [text.get_text() for text in axes.texts]
    assert not len(axes.get_xticks())


def test_values_that_are_all_equal_lie_inside_of_the_axis(report):
    report["3"].log_volume[:] = report["1"].log_volume.max() + 1
    (axes,) = plot(report).axes
    assert axes.get_xlim()[1] > report["3"].log_volume[0]


def test_nothing_reaches_beyond_the_figure_and_row_names_do_not_overlap():
    names = [f"encoder.layers.{i}.feed_forward.activation" for i in range(9)]
    model = nn.Sequential()
    for name in names:
        model.add_module(name.replace(".", "_"), nn.Linear(5, 5))
    report = tgp.measure(model, torch.randn(11, 5), layers="*", estimator=tgp.Exact())
    report["encoder_layers_8_feed_forward_activation"].log_volume[:5] = -torch.inf
    figure = plot(report, title="nine layers")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.get_yticklabels()]
    assert all(one.y0 > other.y1 for one, other in itertools.pairwise(boxes))
    for text in [*axes.get_yticklabels(), *axes.texts]:
        extent = text.get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= figure.bbox.width


def test_many_samples_are_thinned_to_what_can_be_seen(report):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    found = tgp.measure(model, torch.randn(2000, 3), layers=["1"], estimator=tgp.Exact())
    ((points, bar, median),) = rows(plot(found))
    assert len(points) == 500
    values = found["1"].log_volume.double().numpy()
    assert median == pytest.approx(np.median(values))
    assert bar == pytest.approx(tuple(np.quantile(values, [0.1, 0.9])))
