"""Figure 2: its slices, the paper's training."""

import pytest
import torch

import torchgeom_probe as tgp
from torchgeom_probe.reproduce import data, digits, points
from torchgeom_probe.reproduce.settings import Settings


def test_the_slices_of_fig2_reach_all_their_samples():
    images = data.load_digits(0)
    line, plane = digits.views(images, grid=5)
    assert torch.equal(line.slice.points()[0], images.shown(7))
    assert torch.allclose(line.slice.points()[-1], images.shown(6))
    right, up = plane.slice.tangents()
    centre = (images.shown(7) + images.shown(6) + images.shown(1)) / 3
    for (u, v), sample in zip(plane.slice.corners.tolist(), plane.slice.samples, strict=True):
        assert torch.allclose(centre + u * right + v * up, sample, atol=1e-5)  # the origin is not left out
    assert images.train_images.max() == 16  # not rescaled


def test_the_papers_training_of_fig2():
    mnist = data.load_digits(0).to("cpu", torch.float64)
    of = digits.training(mnist, width=70, epochs=200, snapshots=(), settings=Settings(preset="paper"))
    model = of.model()
    assert isinstance(of.optimizer(model.parameters()), torch.optim.Adam)
    assert next(model.parameters()).dtype == torch.float64
    assert isinstance(model, points.PaperNetwork)
    assert of.batch_size == 1000


def test_digits_that_nobody_knows_are_refused():
    with pytest.raises(tgp.ProbeError, match=r"no digits 'letters'. Write --data digits, mnist5k or mnist"):
        digits.load(Settings(), "letters")
    assert digits.load(Settings()).name == "digits"
