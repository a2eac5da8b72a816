"""``photos``: a 10-class set of 32×32 colour crops of ten photographs that come inside installed packages.

The photographs are the ten in colour that scikit-image (eight) and scikit-learn (two) carry in their wheels.  Their
files are read where they lie, so nothing is ever fetched, and neither pooch nor a network is asked.  A photograph is a
class: the task is to tell from which one a crop is.

Each photograph is first reduced by a whole number of pixels to a short side of 150 to 213, each pixel of the result the
mean of a block that no other shares; a crop is 32×32 of those.  The test crops lie in the columns from 50 % to 75 % of
the width, the training crops left and right of them, so that the two sets have no pixel of a photograph in common.
Within one set crops overlap.  Pixels are in [0, 1].
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.reproduce.data.images import Images
from torchgeom_probe.shapes import Int, Tensor

SIZE = 32
#: The test region, in shares of the width; the training region is the rest.
TEST_COLUMNS = (0.5, 0.75)

# Class → package and file of the photograph that its crops are of.
_FILES = {
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
#: Class index → class.
CLASS_NAMES = tuple(_FILES)
_SHORT_SIDE = 150


@dataclass(frozen=True, eq=False)
class Photos(Images):
    """Crops [N, 3, 32, 32] in [0, 1] with their labels, and where each lies.

    ``train_places`` and ``test_places`` [N, 2] are the (row, column) of a crop's upper left pixel in the reduced
    photograph of its class.
    """

    train_places: Int[Tensor, "train 2"]
    test_places: Int[Tensor, "test 2"]


@functools.cache
def load_photos(train_per_class: int = 160, test_per_class: int = 50, seed: int = 0) -> Photos:
    """Cut the crops, at places drawn by ``seed``; the same arguments give the same object.

    The tensors are shared by all callers: do not write into them.

    Raises:
        ProbeError: scikit-image, scikit-learn or Pillow is not installed, or a release without one of the
            photographs; fewer than one crop a class.

    >>> photos = load_photos(train_per_class=3, test_per_class=2)
    >>> photos.train_images.shape, photos.test_labels.tolist()[:4], photos.class_names[1]
    (torch.Size([30, 3, 32, 32]), [0, 0, 1, 1], 'cat')
    """
    if train_per_class < 1 or test_per_class < 1:
        raise ProbeError(
            f"load_photos({train_per_class}, {test_per_class}): each set needs a crop a class.\n"
            "Write load_photos(train_per_class=160, test_per_class=50)"
        )
    generator = torch.Generator().manual_seed(seed)
    x, y, places = _crops(train_per_class, generator, test=False)
    test_x, test_y, test_places = _crops(test_per_class, generator, test=True)
    cat, flower, motorcycle = (CLASS_NAMES.index(name) for name in ("cat", "flower", "motorcycle"))
    corners, line_ends = (cat, flower, motorcycle), (cat, flower)
    return Photos(x, y, test_x, test_y, "photos", CLASS_NAMES, corners, line_ends, places, test_places)


def _crops(count: int, generator: torch.Generator, *, test: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and places of ``count`` crops a class."""
    images, places = [], []
    for name in CLASS_NAMES:
        photograph = torch.from_numpy(reduced(name))
        columns = _columns(photograph.shape[2], test=test)
        rows = photograph.shape[1] - SIZE + 1
        drawn = torch.randint(rows * len(columns), (count,), generator=generator)
        corner = torch.stack([drawn // len(columns), columns[drawn % len(columns)]], dim=1)
        images += [photograph[:, r : r + SIZE, c : c + SIZE] for r, c in corner.tolist()]
        places.append(corner)
    labels = torch.arange(len(CLASS_NAMES)).repeat_interleave(count)
    return torch.stack(images), labels, torch.cat(places)


@functools.cache
def reduced(name: str) -> np.ndarray:
    """One photograph [3, H, W], float32 in [0, 1], reduced by whole blocks to a short side of 150 to 213.

    >>> reduced("cat").shape
    (3, 150, 225)
    """
    pixels = _read(name)
    block = max(1, min(pixels.shape[:2]) // _SHORT_SIDE)
    height, width = pixels.shape[0] // block, pixels.shape[1] // block
    blocks = pixels[: height * block, : width * block].reshape(height, block, width, block, 3)
    # Sums of whole numbers are exact, so the result is the same on every machine.
    means = blocks.sum(axis=(1, 3), dtype=np.int64) / (block * block * 255)
    return np.ascontiguousarray(means.transpose(2, 0, 1).astype(np.float32))


def _columns(width: int, *, test: bool) -> Tensor:
    """The columns at which a crop may begin and lie whole in its region."""
    low, high = (round(share * width) for share in TEST_COLUMNS)
    regions = [(low, high)] if test else [(0, low), (high, width)]
    return torch.cat([torch.arange(begin, max(begin, end - SIZE + 1)) for begin, end in regions])


def _read(name: str) -> np.ndarray:
    pillow = optional("PIL.Image", extra="figures")
    package, inside = _FILES[name]
    path = Path(str(optional(package, extra="figures").__file__)).parent / inside
    if not path.is_file():
        raise ProbeError(
            f"this release of {package} carries no {inside}, which the data set 'photos' is cut from.\n"
            "Install one that does:  python -m pip install 'scikit-image>=0.22' 'scikit-learn>=1.3'"
        )
    with pillow.open(path) as image:
        return np.asarray(image.convert("RGB"))
