"""The data and networks of figures 3 to 6, in both presets."""

import dataclasses
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.reproduce import resnet
from torchgeom_probe.reproduce.settings import Settings

pytest.importorskip("timm")


def test_the_networks_of_both_presets(images):
    few = dataclasses.replace(images, train_images=images.train_images[:8], train_labels=images.train_labels[:8])
    paper = resnet.network(Settings(preset="paper"), few, "gelu")
    assert sum(p.numel() for p in paper.parameters()) == 21_282_122
    assert not any(isinstance(m, nn.ReLU) for m in paper.modules())
    narrow = resnet.network(Settings(), images, "relu").eval()
    assert any(isinstance(m, nn.ReLU) for m in narrow.modules())
    with tgp.GeometryProbe(narrow, layers=resnet.STAGES, estimator=tgp.Subspace(k=1)) as probe:
        report = probe.measure(torch.rand(1, 3, 32, 32))
    assert [g.num_features for g in report.values()] == [8 * 1024, 16 * 256, 32 * 64, 64 * 16]


def test_before_training_batch_norm_has_the_statistics_of_the_data(images):
    model = resnet.network(Settings(quick=True), images, "gelu").eval()
    seen = {}
    for name in ("bn1", "layer4.1.bn2"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.clone()}))
    with torch.no_grad():
        model(images.train_images)
    assert len(images.train_images) <= 256
    for out in seen.values():  # normalised by its own statistics, before a weight and a bias that are still 1 and 0
        assert (
            out.mean((0, 2, 3)).abs().max() < 5e-3
        )  # the variances in eval mode are n / (n - 1) of those in train mode
        assert (out.std((0, 2, 3)) - 1).abs().max() < 2e-2
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.momentum == 0.1 and norm.num_batches_tracked == 0 for norm in norms)


def test_the_three_images_are_of_three_classes_and_have_the_largest_contrast(images):
    view = resnet.plane_view(images, Settings(quick=True))
    for sample, label in zip(view.slice.samples, images.corners, strict=True):
        of_class = images.test_images[images.test_labels == label]
        assert sample.std() >= of_class.flatten(1).std(1).max() - 1e-7
        assert (of_class == sample).flatten(1).all(1).any()
    assert [images.class_names[i] for i in images.corners] == ["cat", "flower", "motorcycle"]


def test_cifar10_where_it_is_there_and_where_it_is_not(monkeypatch, tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")

    class Fake:
        classes = tuple("abcdefghij")

        def __init__(self, root, train, download):
            self.data = np.full((20, 32, 32, 3), 255 if train else 0, np.uint8)
            self.data[:, :, :, 2] = 51
            self.targets = [i % 10 for i in range(20)]

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    found = resnet.load_images(Settings(preset="paper", data_root=tmp_path))
    assert found.train_images.shape == (20, 3, 32, 32)
    assert found.train_images[3, :, 5, 5].tolist() == pytest.approx([1.0, 1.0, 0.2])
    assert (found.corners, found.ends) == ((7, 6, 1), [(1, 5), (1, 6)])  # horse, frog, car; car to dog, to frog

    def absent(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr(datasets, "CIFAR10", absent)
    with pytest.raises(tgp.ProbeError, match=r"CIFAR-10 is not under .* could not be fetched"):
        resnet.load_images(Settings(preset="paper", data_root=tmp_path))
