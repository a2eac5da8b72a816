"""Figures: what is drawn, where, in which colours and units; read back from the artists and from the "
"files."""

import importlib.util
import itertools
import sys

import numpy as np
import pytest
import torch
from torch import nn

from torchgeom_probe import ProbeError, slices
from torchgeom_probe.slices.scan import Line, Plane, SliceScan, scan

figures = pytest.importorskip("torchgeom_probe.plotting.figures")
pytest.importorskip("matplotlib")


def net():
    return nn.Sequential(nn.Linear(25, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


@pytest.fixture
def planes():
    plane = Plane(*torch.randn(3, 25), steps=11)
    return [scan(net(), plane, layers=["1", "3"], progress=False) for _ in range(2)]


@pytest.fixture
def lines():
    a = 3 * torch.randn(25)
    line = Line(a, -a, steps=31)  # two classes at least: the network is all but odd
    return [scan(net(), line, layers=["1", "3"], progress=False) for _ in range(2)]


def images(count):
    return [torch.rand(5, 5) for _ in range(count)]


def maps(figure):
    """Title → the images of its column, top row first."""
    found = {}
    columns = {}
    for axes in figure.axes:
        if (
            axes.images
            and axes.get_subplotspec() is not None
            and axes.get_subplotspec().get_gridspec().ncols > 1
        ):
            column = axes.get_subplotspec().colspan.start
            columns.setdefault(column, axes.get_title())
            found.setdefault(columns[column], []).append(axes.images[0])
    return found


def test_a_plane_before_and_after_shares_one_colour_scale_a_column(planes):
    before, after = planes
    figure = figures.plot_plane(before, after, title="two rows")
    found = maps(figure)
    assert list(found) == ["prediction", "entropy", "1", "3"]
    for title, (upper, lower) in found.items():
        assert upper.get_clim() == lower.get_clim() or title == "prediction"
    assert torch.equal(torch.tensor(np.array(found["3"][1].get_array())), after.log_volume["3"].double())
    assert torch.equal(torch.tensor(np.array(found["1"][0].get_array())), before.log_volume["1"].double())
    assert {axes.get_xlabel() for axes in figure.axes} >= {"class", "entropy [nat]", "log √det g [nat]"}
    assert "J divided by √n" in figure.get_supxlabel()
    assert [found["1"][0].origin, tuple(found["1"][0].get_extent())] == ["lower", (-1.1, 1.1, -1.1, 1.1)]
    assert found["1"][0].get_clim() != found["3"][0].get_clim()
    shared = maps(figures.plot_plane(before, after, share_layers=True))
    assert shared["1"][0].get_clim() == shared["3"][0].get_clim()


def test_the_boundary_is_drawn_where_the_class_changes():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 0.4], [-1.0, -0.4]])  # class 0 where x > -0.4 y
    head = nn.Sequential(nn.Tanh(), model)
    plane = Plane(
        torch.tensor([0.0, 0.0]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([0.0, 1.0]),
        coordinates="barycentric",
    )
    figure = figures.plot_plane(scan(head, plane, layers=["0"], progress=False), images=None)
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert len(panels) == 3
    for axes in panels:
        (contour,) = (c for c in axes.collections if hasattr(c, "levels"))
        vertices = np.concatenate([path.vertices for path in contour.get_paths() if len(path.vertices)])
        assert len(vertices) > 20
        # tanh(x) = -0.4 tanh(y): off the grid points, and hit to a small part of a grid step (0.05)
        assert np.abs(np.tanh(vertices[:, 0]) + 0.4 * np.tanh(vertices[:, 1])).max() < 1e-3


def test_units_and_the_relative_scale(planes, lines):
    for draw, scans in ((figures.plot_plane, planes), (figures.plot_line, lines)):
        labels = [a.get_xlabel() + a.get_ylabel() for a in draw(scans[0], unit="log10").axes]
        assert any("log₁₀ √det g" in label for label in labels)
        assert not any("det g [nat]" in label for label in labels)
    tenth = maps(figures.plot_plane(planes[0], unit="log10"))["1"][0].get_array()
    assert np.allclose(tenth, planes[0].report["1"].log10_volume.reshape(11, 11))
    relative = maps(figures.plot_plane(planes[0], relative=True))["1"][0].get_array()
    assert np.ma.median(relative) == pytest.approx(0, abs=1e-12)
    logged = maps(figures.plot_plane(planes[0], log_entropy=True))["entropy"][0].get_array()
    assert np.allclose(logged, planes[0].entropy.log10())


def test_a_line_before_and_after(lines):
    before, after = lines
    animals = ["cat", "dog", "frog", "ship"]
    figure = figures.plot_line(before, after, images=images(2), class_names=animals, names=("old", "new"))
    first, second, entropy = figure.axes[:3]
    assert [a.get_ylabel().split("\n")[0] for a in (first, second, entropy)] == ["1", "3", "entropy [nat]"]
    curves = [curve for curve in first.lines if len(curve.get_xdata()) == 31]
    assert np.allclose(curves[0].get_ydata(), before.log_volume["1"])
    assert np.allclose(curves[1].get_ydata(), after.log_volume["1"])
    assert [curve.get_label() for curve in curves] == ["old", "new"]
    assert np.allclose(entropy.lines[1].get_ydata(), after.entropy)
    # one dotted line a change of class, half-way between the two points
    labels = after.predictions.numpy()
    expected = [(i + 0.5) / 30 for i in range(30) if labels[i] != labels[i + 1]]
    assert len(expected) >= 1
    assert [curve.get_xdata()[0] for curve in first.lines[2:]] == pytest.approx(expected)
    strips = [a for a in figure.axes if a.get_ylabel() in ("class\nold", "class\nnew")]
    assert len(strips) == 2
    written = {text.get_text() for text in strips[1].texts}
    assert written <= set(animals)
    assert written
    assert sum(len(a.images) for a in figure.axes[-1].child_axes) == 2


@pytest.mark.parametrize("name", ["cat", "motorcycle", "a name of some twenty-eight letters"])
def test_a_class_name_keeps_to_its_band(lines, name):
    before, after = lines
    figure = figures.plot_line(before, after, class_names=[f"{name} {c}" for c in range(4)])
    figure.canvas.draw()
    for drawn, strip in zip(lines, [a for a in figure.axes if a.images and a.get_ylabel()][-2:], strict=True):
        labels, inverse = drawn.predictions.numpy(), strip.transData.inverted()
        bands = np.flatnonzero(np.diff(labels)) + 0.5
        edges = np.concatenate([[-0.5], bands, [len(labels) - 0.5]]) / (len(labels) - 1)
        for text in strip.texts:
            extent = text.get_window_extent().transformed(inverse)
            band = np.searchsorted(edges, text.get_position()[0])
            assert edges[band - 1] <= extent.x0
            assert extent.x1 <= edges[band]


def test_the_ticks_of_a_colour_bar_stand_apart(planes):
    figure = figures.plot_maps(planes, layers=["1"], unit="log10", relative=True)
    figure.canvas.draw()
    bars = [a for a in figure.axes if a.get_xlabel() and "log" in a.get_xlabel()]
    assert bars
    for bar in bars:
        extents = sorted(
            (t.get_window_extent() for t in bar.get_xticklabels() if t.get_text()), key=lambda e: e.x0
        )
        assert len(extents) >= 2
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(extents))


def test_points_that_are_not_finite_stay_grey(planes):
    found = planes[0]
    found.report["1"].log_volume[:7] = -torch.inf
    figure = figures.plot_plane(found)
    shown = maps(figure)["1"][0]
    assert shown.get_array().mask.sum() == 7
    assert np.isfinite(shown.get_clim()).all()
    assert tuple(shown.get_cmap().get_bad()[:3]) == pytest.approx((189 / 255,) * 3)
    found.report["1"].log_volume[:] = -torch.inf
    figures.plot_plane(found)
    figures.plot_plane(found, relative=True)


def test_a_flat_volume_is_one_colour_not_amplified_rounding(planes):
    volume = planes[0].report["1"].log_volume
    volume[:] = 3 + 1e-9 * torch.randn(volume.shape, dtype=volume.dtype)
    low, high = maps(figures.plot_plane(planes[0]))["1"][0].get_clim()
    assert low < 3 < high
    assert high - low > 1e-5


def test_samples_are_drawn_where_they_lie(planes):
    figure = figures.plot_plane(planes[0], images=images(3))
    insets = figure.axes[0].child_axes
    assert [inset.get_title() for inset in insets] == ["a", "b", "c"]
    figure.draw_without_rendering()
    for inset, corner in zip(insets, planes[0].slice.corners.tolist(), strict=True):
        box = inset.get_position()
        centre = figure.transFigure.transform(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
        assert np.abs(figure.axes[0].transData.inverted().transform(centre) - corner).max() < 0.02


def test_pictures_are_taken_from_a_slice_of_pictures():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(4 * 36, 3))
    found = scan(model, Plane(*torch.rand(3, 3, 8, 8), steps=5), layers=["0"], progress=False)
    assert len(figures.plot_plane(found).axes[0].child_axes) == 3
    assert len(figures.plot_plane(found, images=None).axes[0].child_axes) == 0
    assert figures._picture(found.slice.a).shape == (8, 8, 3)


def test_a_scan_plots_itself(planes, lines):
    assert len(maps(planes[1].plot(before=planes[0]))["1"]) == 2
    assert len(maps(planes[1].plot(layers=["3"]))) == 3
    assert lines[0].plot().axes[0].get_ylabel().startswith("1\n")


@pytest.mark.parametrize("ending", [".png", ".pdf", ".svg"])
def test_saved_files_are_whole_and_png_and_pdf_the_same_again(ending, lines, tmp_path):
    first, second = (
        figures.save(figures.plot_line(*lines), tmp_path / "new" / f"{i}{ending}", dpi=60) for i in "12"
    )
    data = first.read_bytes()
    assert data.startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[ending])
    assert len(data) > 10_000
    if ending != ".svg":
        assert data == second.read_bytes()
    if ending == ".png":
        from matplotlib import image

        pixels = image.imread(first)
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100


def test_what_is_refused(planes, lines, monkeypatch):
    with pytest.raises(
        ProbeError, match=r"plot_line draws a Line and got a scan of a Plane.*\n.*plot_plane\(scan\)"
    ):
        figures.plot_line(planes[0])
    with pytest.raises(ProbeError, match="plot_plane draws a Plane"):
        figures.plot_plane(lines[0])
    other = scan(net(), Plane(*torch.randn(3, 25), steps=11), layers=["1", "3"], progress=False)
    with pytest.raises(ProbeError, match="of different slices"):
        figures.plot_plane(planes[0], other)
    with pytest.raises(ProbeError, match=r"'conv9' to draw.*\n.*\['1', '3'\]"):
        figures.plot_plane(*planes, layers=["1", "conv9"])
    with pytest.raises(ProbeError, match="none to draw"):
        figures.plot_line(*lines, layers=[])
    with pytest.raises(ProbeError, match="unit='bit' is unknown"):
        figures.plot_line(*lines, unit="bit")
    with pytest.raises(ProbeError, match=r"a Plane has 3 samples.*\n.*reshape\(8, 8\)"):
        figures.plot_plane(*planes, images=images(2))
    with pytest.raises(ProbeError, match="images='yes'"):
        figures.plot_plane(*planes, images="yes")
    with pytest.raises(ProbeError, match=r"no .bmp.*\n.*map.png"):
        figures.save(figures.plot_line(*lines), "map.bmp")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ProbeError, match=r"'matplotlib', which is not installed.*\n.*torchgeom_probe\[figures\]"
    ):
        figures.plot_plane(*planes)


def test_class_minus_one_has_a_name_and_no_colour(lines):
    labels = lines[0].predictions.clone()
    labels[:15] = -1
    found = SliceScan(**{**vars(lines[0]), "predictions": labels})
    strip = next(a for a in figures.plot_line(found).axes if a.get_ylabel() == "class")
    assert "not finite" in {text.get_text() for text in strip.texts}


def test_the_module_loads_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spec = importlib.util.spec_from_file_location("a_second_copy_of_figures", figures.__file__)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copy)  # dataclasses look their module up
    spec.loader.exec_module(copy)
    assert copy.plot_line is not figures.plot_line


def test_pyplot_is_never_imported_and_no_setting_changed(lines, planes, monkeypatch):
    import matplotlib

    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    settings = list(dict.items(matplotlib.rcParams))  # .items() of its own would import pyplot
    figures.plot_line(*lines).draw_without_rendering()
    figures.plot_plane(*planes, images=images(3)).draw_without_rendering()
    assert "matplotlib.pyplot" not in sys.modules
    assert list(dict.items(matplotlib.rcParams)) == settings


def test_the_modules_agree_on_what_a_scan_is():
    assert figures.SliceScan is slices.SliceScan
