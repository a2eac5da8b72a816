"""Barlow Twins that resumes, its views, and its linear readout against scikit-learn's."""

import dataclasses
import random

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


def test_the_readout_is_scikit_learns_logistic_regression(images):
    linear_model = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    model = Pooled()
    penalty = 1e-2
    readout = barlow_twins.linear_readout(model, images, penalty=penalty)
    with torch.no_grad():
        features = model(images.train_images).double()
        ours = readout(model(images.test_images)).softmax(1).numpy()
        tested = model(images.test_images).double()
    mean, deviation = features.mean(0), features.std(0)
    oracle = linear_model.LogisticRegression(C=1 / (penalty * len(features)), tol=1e-10, max_iter=5000)
    oracle.fit(((features - mean) / deviation).numpy(), images.train_labels.numpy())
    theirs = oracle.predict_proba(((tested - mean) / deviation).numpy())
    assert np.abs(ours - theirs).max() < 1e-4
    assert model.training


def test_views_depend_on_torchs_seed_alone_and_leave_other_generators(images):
    two_views = barlow_twins._two_views()
    pictures = (images.train_images[:4] * 255).round().to(torch.uint8)
    python, numpy = random.getstate(), np.random.get_state()[1].copy()
    torch.manual_seed(3)
    first = two_views(pictures)
    assert random.getstate() == python
    assert (np.random.get_state()[1] == numpy).all()
    np.random.rand(5)
    random.random()
    torch.manual_seed(3)
    again = two_views(pictures)
    assert [view.shape for view in first] == [(4, 3, 32, 32)] * 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], two_views(pictures)[0])
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
    straight = train(training, Settings(out=tmp_path / "straight"), **quiet)
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
