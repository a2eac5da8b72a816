"""Barlow Twins that resumes, its views, and its linear readout."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from torchgeom_probe.reproduce import barlow_twins
from torchgeom_probe.reproduce.settings import Settings
from torchgeom_probe.reproduce.training import train

pytest.importorskip("timm")
pytest.importorskip("lightly")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")


class Pooled(nn.Module):
    """Twelve features: the means over the quarters of an image, mixed by fixed weights."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(12, 12)

    def forward(self, x):
        return self.mix(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def test_the_readout_is_where_its_objective_has_no_slope(images):
    torch.manual_seed(0)
    model, penalty = Pooled(), 1e-2
    readout = barlow_twins.linear_readout(model, images, penalty=penalty)
    assert model.training
    features = model(images.train_images).detach().double()
    mean, deviation = features.mean(0), features.std(0)
    # The readout of the features, as one of standardised features.
    weight = (readout.weight.double() * deviation).requires_grad_()
    bias = (readout.bias.double() + readout.weight.double() @ mean).requires_grad_()
    logits = (features - mean) / deviation @ weight.T + bias
    objective = nn.functional.cross_entropy(logits, images.train_labels) + penalty / 2 * weight.square().sum()
    for slope in torch.autograd.grad(objective, [weight, bias]):
        assert slope.abs().max() < 1e-6
    assert torch.allclose(logits.float(), readout(features.float()), atol=1e-4)
    assert weight.abs().max() > 0.1


def test_views_depend_on_torchs_seed_alone(images):
    pictures = (images.train_images[:4] * 255).round().to(torch.uint8)
    torch.manual_seed(3)
    first = barlow_twins.two_views(pictures)
    np.random.rand(5)
    torch.manual_seed(3)
    again = barlow_twins.two_views(pictures)
    assert [view.shape for view in first] == [(4, 3, 32, 32)] * 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], barlow_twins.two_views(pictures)[0])
    assert 0 <= first[0].min() < first[0].max() <= 1


def test_barlow_twins_stopped_in_the_middle_ends_with_the_same_bytes(images, tmp_path):
    training = dataclasses.replace(
        barlow_twins.without_labels(images, Settings(quick=True)),
        model=lambda: barlow_twins.BarlowTwins(Pooled(), nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))),
        num_samples=32,
        batch_size=16,
        epochs=2,
        evaluate=lambda model: {},
    )
    quiet = {"say": lambda line: None}
    state = np.random.get_state()[1].copy()
    straight = train(training, Settings(out=tmp_path / "straight"), **quiet)
    assert (np.random.get_state()[1] == state).all()  # a training leaves the caller's generators alone
    steps = [0]

    def interrupted(model, batch):
        steps[0] += 1
        if steps[0] == 4:
            raise KeyboardInterrupt
        return training.loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(training, loss=interrupted), Settings(out=tmp_path / "stopped"), **quiet)
    stopped = train(training, Settings(out=tmp_path / "stopped"), **quiet)
    files = sorted(p.name for p in straight.folder.glob("epoch_*.pt"))
    assert len(files) == 3
    for name in files:
        assert (straight.folder / name).read_bytes() == (stopped.folder / name).read_bytes()
