"""MNIST: read where it is, and what is said where it is not."""

import pytest

import torchgeom_probe as tgp
from torchgeom_probe.reproduce.data.digits import load_mnist


def test_mnist_that_cannot_be_had_says_what_to_do(monkeypatch, tmp_path):
    import torchvision

    def refused(*args, **kwargs):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets, "MNIST", refused)
    with pytest.raises(tgp.ProbeError, match=r"MNIST is not under .*\n.*train-images-idx3-ubyte.gz.*--data digits"):
        load_mnist(tmp_path, instead="torchgeom-probe demo --data digits")


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
    digits = load_mnist(tmp_path, instead="")
    assert digits.train_images.shape == (3, 784)
    assert digits.side == 28
    assert digits.test_labels.tolist() == [0, 1]
    assert digits.train_images.max() == 255
