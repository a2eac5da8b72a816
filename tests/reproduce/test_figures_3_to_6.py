"""Figures 3 to 6: the data and networks of both presets, Barlow Twins that resumes, the linear readout against scikit-learn's."""

import dataclasses
import json
import random
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.reproduce import barlow_twins, resnet
from torchgeom_probe.reproduce.run import Settings, reproduce, train

pytest.importorskip("timm")
pytest.importorskip("lightly")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")


@pytest.fixture(scope="module")
def images():
    return resnet.load_images(Settings(quick=True))


class Pooled(nn.Module):
    """Twelve features: the means over the quarters of an image, mixed by fixed weights."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(12, 12)

    def forward(self, x):
        return self.mix(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def test_the_networks_of_both_presets(images):
    few = dataclasses.replace(images, train_images=images.train_images[:8])
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
    for (
        out
    ) in seen.values():  # normalised by its own statistics, before a weight and a bias that are still 1 and 0
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
    assert (found.corners, found.line_ends) == ((7, 6, 1), (5, 6))

    def absent(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr(datasets, "CIFAR10", absent)
    with pytest.raises(tgp.ProbeError, match=r"CIFAR-10 is not under .* could not be fetched"):
        resnet.load_images(Settings(preset="paper", data_root=tmp_path))


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
        evaluate=None,
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


@pytest.mark.slow
def test_the_four_figures_in_quick_form(tmp_path):
    said = []
    settings = Settings(quick=True, out=tmp_path, gallery=tmp_path / "gallery")
    reproduce(["fig3", "fig4", "fig5", "fig6"], settings, say=said.append)
    for figure, tests in (("fig3", 2), ("fig4", 9), ("fig5", 8), ("fig6", 4)):
        results = json.loads((tmp_path / figure / "results.json").read_text())
        assert len(results["magnification"]) == tests
        assert all("initial" in test for test in results["magnification"])
        assert len(results["quirks"]) >= 8
    # fig3 and fig4 are of the same trainings, and so are fig5 and fig6.
    assert sum(line.startswith("photos_gelu: 1 epochs") for line in said) == 1
    assert sum(line.startswith("photos_barlow: 1 epochs") for line in said) == 1
    pictures = {p.name for p in tmp_path.glob("fig*/*.p*")}
    assert {"plane_gelu.png", "blocks.pdf", "line_motorcycle_cat.png", "plane.png"} <= pictures
    sizes = [p.stat().st_size for p in (tmp_path / "gallery").glob("*.png")]
    assert len(sizes) == 4
    assert max(sizes) < 150_000
