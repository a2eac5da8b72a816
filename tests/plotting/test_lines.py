"""Lines: what is drawn, where, in which colours; read back from the artists."""

import numpy as np
import pytest
import torch

from torchgeom_probe import SliceScan, plot


def test_a_line_before_and_after(lines):
    before, after = lines
    animals = ["cat", "dog", "frog", "ship"]
    figure = plot(
        after, before=before, images=[torch.rand(5, 5) for _ in range(2)], class_names=animals, names=("old", "new")
    )
    first, second, entropy = figure.axes[:3]
    assert [a.get_ylabel().split("\n")[0] for a in (first, second, entropy)] == ["layer 1", "layer 3", "entropy [nat]"]
    curves = [curve for curve in first.lines if len(curve.get_xdata()) == 31]
    assert np.allclose(curves[0].get_ydata(), before.log_volume["1"])
    assert np.allclose(curves[1].get_ydata(), after.log_volume["1"])
    assert [curve.get_label() for curve in curves] == ["old", "new"]
    assert np.allclose(entropy.lines[1].get_ydata(), after.entropy)
    highest = max(before.entropy.max(), after.entropy.max())
    assert entropy.get_ylim()[1] > 1.02 * highest  # no curve lies on the frame
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
    figure = plot(after, before=before, class_names=[f"{name} {c}" for c in range(4)])
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


def test_class_minus_one_has_a_name_and_no_colour(lines):
    labels = lines[0].predictions.clone()
    labels[:15] = -1
    found = SliceScan(**{**vars(lines[0]), "predictions": labels})
    strip = next(a for a in plot(found).axes if a.get_ylabel() == "class")
    assert "not finite" in {text.get_text() for text in strip.texts}


def test_epochs_run_from_bright_to_dark_and_the_axes_span_all_of_them(lines):
    epochs = [*lines, lines[0]]
    figure = plot(epochs, names=["epoch 0", "epoch 1", "epoch 2"])
    curves = [curve for curve in figure.axes[0].lines if len(curve.get_xdata()) == 31]
    assert [curve.get_label() for curve in curves] == ["epoch 0", "epoch 1", "epoch 2"]
    brightness = [sum(curve.get_color()[:3]) for curve in curves]
    assert brightness[0] > brightness[1] > brightness[2]
    low, high = figure.axes[0].get_ylim()
    volumes = torch.stack([scan.log_volume["1"] for scan in epochs])
    assert low < volumes.min()
    assert volumes.max() < high
