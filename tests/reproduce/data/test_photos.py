"""The data set ``photos``: crops of installed photographs; training and test share no pixel; nothing is fetched."""

import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import torchgeom_probe as tgp
from torchgeom_probe.reproduce.data import photos
from torchgeom_probe.reproduce.data.photos import CLASS_NAMES, SIZE, load_photos

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")


def photograph(name):
    """The file itself, read beside the code under test."""
    package, inside = photos._FILES[name]
    return np.asarray(PIL.open(Path(sys.modules[package].__file__).parent / inside).convert("RGB"))


def reduction(name):
    """How many pixels of the photograph, along each axis, one pixel of a crop is the mean of."""
    return max(1, min(photograph(name).shape[:2]) // 150)


@pytest.fixture(scope="module")
def crops():
    return load_photos(train_per_class=60, test_per_class=30)


def covered(crops, label, part):
    """Which pixels of the photograph itself the crops of a class cover."""
    name = CLASS_NAMES[label]
    pixels = np.zeros(photograph(name).shape[:2], bool)
    block = reduction(name)
    chosen = getattr(crops, f"{part}_labels") == label
    for row, column in (getattr(crops, f"{part}_places")[chosen] * block).tolist():
        window = pixels[row : row + SIZE * block, column : column + SIZE * block]
        assert window.shape == (SIZE * block, SIZE * block)
        window[:] = True
    return pixels


@pytest.mark.parametrize("label", range(10))
def test_training_and_test_share_no_pixel(crops, label):
    train, test = covered(crops, label, "train"), covered(crops, label, "test")
    assert train.any()
    assert test.any()
    assert not (train & test).any()


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_crop_is_the_photograph_reduced_by_means_of_blocks(crops, part):
    images, labels, places = (getattr(crops, f"{part}_{what}") for what in ("images", "labels", "places"))
    for label in range(10):
        i = int((labels == label).nonzero()[7])
        block = reduction(CLASS_NAMES[label])
        row, column = (places[i] * block).tolist()
        window = photograph(CLASS_NAMES[label])[row : row + SIZE * block, column : column + SIZE * block]
        expected = torch.from_numpy(window.copy()).double().permute(2, 0, 1)
        expected = torch.nn.functional.avg_pool2d(expected, block) / 255
        assert (images[i].double() - expected).abs().max() < 1e-7


def test_sizes_labels_and_names(crops):
    assert (reduction("cat"), reduction("retina")) == (2, 9)
    assert crops.train_images.shape == (600, 3, SIZE, SIZE)
    assert crops.test_images.shape == (300, 3, SIZE, SIZE)
    assert crops.train_labels.bincount().tolist() == [60] * 10
    assert crops.test_labels.bincount().tolist() == [30] * 10
    assert 0 <= crops.train_images.min() < crops.train_images.max() <= 1
    assert len(set(crops.class_names)) == 10


def test_the_same_crops_every_time_and_cached(crops):
    assert load_photos(train_per_class=60, test_per_class=30) is crops
    again = load_photos.__wrapped__(train_per_class=60, test_per_class=30)
    assert torch.equal(again.train_images, crops.train_images)
    assert torch.equal(again.test_places, crops.test_places)
    other = load_photos.__wrapped__(train_per_class=60, test_per_class=30, seed=1)
    assert not torch.equal(other.test_places, crops.test_places)


def test_no_network_and_no_pooch(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setitem(sys.modules, "pooch", None)
    photos.reduced.cache_clear()
    assert len(load_photos.__wrapped__(train_per_class=1, test_per_class=1).train_labels) == 10


def test_refusals(monkeypatch):
    with pytest.raises(tgp.ProbeError, match="each set needs a crop a class"):
        load_photos(train_per_class=0)
    monkeypatch.setitem(photos._FILES, "cat", ("skimage", "data/no_such_cat.png"))
    photos.reduced.cache_clear()
    with pytest.raises(tgp.ProbeError, match=r"carries no data/no_such_cat\.png"):
        load_photos.__wrapped__(train_per_class=1, test_per_class=1)
