"""Labelled images in a training and a test part; CIFAR-10, and how torchvision's data sets are fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.shapes import Float, Int, Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels, split into a training and a test part."""

    train_images: Float[Tensor, "train ..."]
    train_labels: Int[Tensor, " train"]
    test_images: Float[Tensor, "test ..."]
    test_labels: Int[Tensor, " test"]

    def to(self, device: str, dtype: torch.dtype | None = None) -> Self:
        """The same on another device, and in another type of numbers."""
        images = {name: getattr(self, name).to(device, dtype) for name in ("train_images", "test_images")}
        labels = {name: getattr(self, name).to(device) for name in ("train_labels", "test_labels")}
        return replace(self, **images, **labels)


@dataclass(frozen=True, eq=False)
class Images(Split):
    """Images [N, 3, 32, 32] in [0, 1], with the three classes that the slices go through.

    Attributes:
        name: of the data set.
        class_names: class index → name.
        corners: the classes of the plane's a, b and c (for CIFAR-10 horse, frog and car).
        line_ends: the classes that the lines from c go to (for CIFAR-10 dog and frog).
    """

    name: str
    class_names: Sequence[str]
    corners: tuple[int, int, int]
    line_ends: tuple[int, int]

    def clearest(self, label: int) -> Float[Tensor, "3 32 32"]:
        """The test image of a class with the largest contrast: chosen without looking at any network."""
        images = self.test_images[self.test_labels == label]
        return images[images.double().flatten(1).std(1).argmax()]

    @property
    def title(self) -> str:
        """The plane in words: "the plane of a cat, a flower and a motorcycle"."""
        a, b, c = (self.class_names[label] for label in self.corners)
        return f"the plane of a {a}, a {b} and a {c}"


def load_cifar10(root: Path) -> Images:
    """Read CIFAR-10 through torchvision, from ``root`` or fetched there.

    Raises:
        ProbeError: it is neither there nor to be had, with what to do.
    """
    advice = (
        f"Unpack cifar-10-python.tar.gz there (it makes {root / 'cifar-10-batches-py'}), or use the crops of "
        "photographs that come with the installed packages:  --preset embedded"
    )
    parts = fetched("CIFAR10", "CIFAR-10", root, advice=advice)
    (x, y), (test_x, test_y) = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).float() / 255, torch.tensor(part.targets, dtype=torch.long))
        for part in parts
    )
    names = tuple(parts[0].classes)
    return Images(x, y, test_x, test_y, "cifar10", names, corners=(7, 6, 1), line_ends=(5, 6))


def fetched(data_set: str, title: str, root: Path, *, advice: str) -> list[Any]:
    """Read the training and the test part of one of torchvision's data sets, from ``root`` or fetched there.

    Raises:
        ProbeError: it is neither there nor to be had, with ``advice``.
    """
    maker = getattr(optional("torchvision.datasets", extra="figures"), data_set)
    try:
        return [maker(str(root), train=part, download=True) for part in (True, False)]
    # torchvision raises what its mirrors raise: URLError, RuntimeError, OSError, …
    except Exception as error:
        raise ProbeError(
            f"{title} is not under {root} and could not be fetched ({type(error).__name__}: {error}).\n{advice}"
        ) from error
