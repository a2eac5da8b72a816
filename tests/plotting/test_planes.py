"""Maps over planes: what is drawn, where, in which colours and units; read back from the artists."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from torchgeom_probe import Plane, ProbeError, plot, scan
from torchgeom_probe.plotting.planes import Row, plot_grid
from torchgeom_probe.plotting.style import pictures


def images(count):
    return [torch.rand(5, 5) for _ in range(count)]


def maps(figure):
    """Title of the field (above its panel, or at the left of its row) → its images, in the order of the scans."""
    found, row = {}, None
    for axes in figure.axes:
        if axes.images and axes.get_subplotspec() is not None and axes.get_subplotspec().get_gridspec().ncols > 1:
            beside = axes.get_ylabel() if len(axes.get_ylabel()) > 1 else row
            row = beside or row
            name = row if row is not None else axes.get_title()
            found.setdefault(name.removeprefix("layer "), []).append(axes.images[0])
    return found


def test_a_plane_before_and_after_is_a_column_each_and_shares_one_colour_scale_a_row(planes):
    before, after = planes
    figure = plot(after, before=before, title="two columns")
    found = maps(figure)
    assert list(found) == ["prediction", "entropy", "1", "3"]
    for title, (left, right) in found.items():
        assert left.get_clim() == right.get_clim() or title == "prediction"
    assert torch.equal(torch.tensor(np.array(found["3"][1].get_array())), after.log_volume["3"].double())
    assert torch.equal(torch.tensor(np.array(found["1"][0].get_array())), before.log_volume["1"].double())
    assert {axes.get_ylabel() for axes in figure.axes} >= {"class", "entropy [nat]", "log √det g [nat]"}
    assert [axes.get_title() for axes in figure.axes[:2]] == ["before training", "after training"]
    assert "features divided by √(their number)" in figure.get_supxlabel().replace("\n", " ")
    assert [found["1"][0].origin, tuple(found["1"][0].get_extent())] == ["lower", (-1.1, 1.1, -1.1, 1.1)]
    assert found["1"][0].get_clim() != found["3"][0].get_clim()


def test_one_scan_of_many_layers_is_wrapped_and_predictions_can_be_left_out(planes):
    model = nn.Sequential(*[part for _ in range(5) for part in (nn.Linear(25, 25), nn.Tanh())])
    found = scan(model, planes[0].slice, layers=[str(i) for i in range(1, 10, 2)], progress=False)
    figure = plot(found, images=images(3))
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    names = [axes.get_title() for axes in panels]
    assert names == ["prediction", "entropy", *(f"layer {i}" for i in range(1, 10, 2))]
    assert {axes.get_subplotspec().get_gridspec().ncols for axes in panels} == {4}
    assert figure.get_figwidth() <= 7.3
    assert list(maps(plot(planes, decided=False))) == ["1", "3"]


def test_the_boundary_is_drawn_where_the_class_changes():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 0.4], [-1.0, -0.4]])  # class 0 where x > -0.4 y
    head = nn.Sequential(nn.Tanh(), model)
    plane = Plane(
        torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), coordinates="barycentric"
    )
    figure = plot(scan(head, plane, layers=["0"], progress=False), images=None)
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert len(panels) == 3
    for axes in panels:
        (contour,) = (c for c in axes.collections if hasattr(c, "levels"))
        vertices = np.concatenate([path.vertices for path in contour.get_paths() if len(path.vertices)])
        assert len(vertices) > 20
        assert np.abs(vertices[:, 1]).max() >= axes.get_ylim()[1]  # the line reaches the frame
        # tanh(x) = -0.4 tanh(y): off the grid points, and hit to a small part of a grid step (0.05)
        inner = vertices[np.abs(vertices[:, 1]) <= 1]
        assert np.abs(np.tanh(inner[:, 0]) + 0.4 * np.tanh(inner[:, 1])).max() < 1e-3


def test_the_ticks_of_a_colour_bar_stand_apart(planes):
    figure = plot(planes, layers=["1"], unit="log10", relative=True)
    figure.canvas.draw()
    bars = [a for a in figure.axes if a.get_ylabel() and "log" in a.get_ylabel()]
    assert bars
    for bar in bars:
        extents = sorted((t.get_window_extent() for t in bar.get_yticklabels() if t.get_text()), key=lambda e: e.y0)
        assert len(extents) >= 2
        assert all(a.y1 < b.y0 for a, b in itertools.pairwise(extents))


def test_points_that_are_not_finite_stay_grey(planes):
    found = planes[0]
    found.report["1"].log_volume[:7] = -torch.inf
    figure = plot(found)
    shown = maps(figure)["1"][0]
    assert shown.get_array().mask.sum() == 7
    assert np.isfinite(shown.get_clim()).all()
    assert tuple(shown.get_cmap().get_bad()[:3]) == pytest.approx((189 / 255,) * 3)
    found.report["1"].log_volume[:] = -torch.inf
    plot(found)
    plot(found, relative=True)


def test_a_flat_volume_is_one_colour_not_amplified_rounding(planes):
    volume = planes[0].report["1"].log_volume
    volume[:] = 3 + 1e-9 * torch.randn(volume.shape, dtype=volume.dtype)
    low, high = maps(plot(planes[0]))["1"][0].get_clim()
    assert low < 3 < high
    assert high - low > 1e-5


def test_a_nearly_constant_volume_has_one_tick_and_grey_cells_are_explained(planes):
    volume = planes[0].report["1"].log_volume
    volume[:] = -300 + 1e-3 * torch.randn(volume.shape, dtype=volume.dtype)
    bar = maps(plot(planes[0]))["1"][0].colorbar
    assert [text.get_text() for text in bar.ax.get_xticklabels()] == ["−300"]
    assert "grey" not in plot(planes[0]).get_supxlabel()
    volume[3] = -torch.inf
    assert "grey: not finite" in plot(planes[0]).get_supxlabel()
    planes[0].predictions[:] = 1
    assert "no line: one class is predicted everywhere" in plot(planes[0]).get_supxlabel()


def test_samples_are_marked_where_they_lie_and_shown_below(planes):
    figure = plot(planes[0], images=images(3))
    marks = figure.axes[0].texts
    assert [mark.get_text() for mark in marks] == ["a", "b", "c"]
    assert np.allclose([mark.get_position() for mark in marks], planes[0].slice.corners)
    assert [inset.get_title() for inset in shown_below(figure)] == ["a", "b", "c"]


def shown_below(figure):
    return [inset for axes in figure.axes for inset in axes.child_axes if inset.images]


def test_pictures_are_taken_from_a_slice_of_pictures():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(4 * 36, 3))
    found = scan(model, Plane(*torch.rand(3, 3, 8, 8), steps=5), layers=["0"], progress=False)
    assert len(shown_below(plot(found))) == 3
    assert len(shown_below(plot(found, images=None))) == 0
    assert [p.shape for p in pictures(found, "auto")] == [(8, 8, 3)] * 3


def test_units_and_the_relative_scale(planes):
    labels = [axes.get_xlabel() for axes in plot(planes[0], unit="log10").axes]
    assert labels.count("log₁₀ √det g") == 2
    assert not any("det g [nat]" in label for label in labels)
    tenth = maps(plot(planes[0], unit="log10"))["1"][0].get_array()
    assert np.allclose(tenth, planes[0].report["1"].log10_volume.reshape(11, 11))
    relative = maps(plot(planes[0], relative=True))["1"][0].get_array()
    assert np.ma.median(relative) == pytest.approx(0, abs=1e-12)
    logged = maps(plot(planes[0], log_entropy=True))["entropy"][0].get_array()
    assert np.allclose(logged, planes[0].entropy.log())


def test_the_bar_of_a_row_is_beside_it_and_signed_values_have_white_at_zero(planes):
    figure = plot_grid(
        [
            Row("margin", planes, [scan.margin for scan in planes], "logits"),
            Row("minus one", planes, [scan.margin - 1 for scan in planes], "around 0", "signed"),
        ],
        column_names=["before", "after"],
    )
    assert [axes.get_title() for axes in figure.axes[:2]] == ["before", "after"]
    assert {axes.get_ylabel() for axes in figure.axes} >= {"margin", "minus one", "logits", "around 0"}
    (beside,) = (axes for axes in figure.axes if axes.get_ylabel() == "around 0")
    ticks = [float(text.get_text().replace("−", "-")) for text in beside.get_yticklabels()]
    assert ticks[1] == 0
    assert ticks[0] == -ticks[2]
    signed = [axes.images[0] for axes in figure.axes[2:4]]
    assert signed[0].get_clim() == signed[1].get_clim()
    assert signed[0].get_clim()[0] == -signed[0].get_clim()[1]
    middle = signed[0].cmap(signed[0].norm(0.0))[:3]
    assert max(middle) - min(middle) < 0.01


def test_a_class_has_its_colour_in_every_figure_and_stands_below_it_on_the_bar(planes):
    labels = torch.full((11, 11), 7)
    labels[:, :4] = 2
    labels[0, 0] = -1
    few, many = (dataclasses.replace(planes[0], predictions=found) for found in (labels, labels.clamp(max=6)))
    many.predictions[:, 10] = 7
    shown = [maps(plot(found))["prediction"][0] for found in (few, many)]
    colours = [image.cmap(image.norm(np.array([-1, 2, 7]))) for image in shown]
    assert np.array_equal(*colours)
    assert len(np.unique(colours[0], axis=0)) == 3
    assert (colours[0][0] == 1).all()  # what is not finite is white
    bar = shown[0].colorbar
    ticks = [bar.ax.transAxes.inverted().transform(bar.ax.transData.transform((t, 0)))[0] for t in bar.get_ticks()]
    assert [text.get_text() for text in bar.ax.get_xticklabels()] == ["not finite", "2", "7"]
    assert ticks == pytest.approx([1 / 6, 1 / 2, 5 / 6])


def test_a_bar_has_arrows_where_values_lie_beyond(planes):
    volume = planes[0].report["1"].log_volume
    volume[:] = torch.linspace(0, 1, len(volume), dtype=volume.dtype)
    assert maps(plot(planes[0]))["1"][0].colorbar.extend == "both"
    volume[:60], volume[60:] = 0.0, 1.0
    assert maps(plot(planes[0]))["1"][0].colorbar.extend == "neither"
    volume[60] = 5.0
    assert maps(plot(planes[0]))["1"][0].colorbar.extend == "max"


def test_grids_that_are_refused(planes, lines):
    def row(count):
        return Row("margin", planes[:count], [scan.margin for scan in planes[:count]], "logits")

    with pytest.raises(ProbeError, match=r"rows of \[2, 1\] maps"):
        plot_grid([row(2), row(1)])
    with pytest.raises(ProbeError, match=r"rows of \[\] maps"):
        plot_grid([])
    with pytest.raises(ProbeError, match="1 column names for 2 columns"):
        plot_grid([row(2)], column_names=["one"])
    with pytest.raises(ProbeError, match=r"over a Plane, and this scan is of a Line.*\n.*tgp.plot\(scan\)"):
        plot_grid([Row("margin", lines[:1], [lines[0].margin], "logits")])
