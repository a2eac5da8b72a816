"""Figure 2: its slices, the paper's training."""

import torch

from torchgeom_probe.reproduce import fig1, fig2
from torchgeom_probe.reproduce.settings import Settings


def test_the_slices_of_fig2_reach_all_their_samples():
    data = fig2.load_digits(0)
    line, plane = fig2.views(data, grid=5)
    assert torch.equal(line.slice.points()[0], data.typical(7))
    assert torch.allclose(line.slice.points()[-1], data.typical(6))
    right, up = plane.slice.tangents()
    centre = (data.typical(7) + data.typical(6) + data.typical(1)) / 3
    for (u, v), sample in zip(plane.slice.corners.tolist(), plane.slice.samples, strict=True):
        assert torch.allclose(centre + u * right + v * up, sample, atol=1e-5)  # the origin is not left out
    assert data.train_images.max() == 16  # not rescaled


def test_the_papers_training_of_fig2():
    data = fig2.Digits(
        torch.zeros(30, 9).double(), torch.arange(30) % 10, torch.zeros(10, 9).double(), torch.arange(10)
    )
    of = fig2.training(data, width=12, epochs=200, snapshots=(), settings=Settings(preset="paper"), name="mnist")
    model = of.model()
    assert isinstance(of.optimizer(model.parameters()), torch.optim.Adam)
    assert next(model.parameters()).dtype == torch.float64
    assert isinstance(model, fig1.PaperNetwork)
    assert of.batch_size == 1000
