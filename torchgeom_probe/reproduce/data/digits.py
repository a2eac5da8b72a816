"""Handwritten digits: scikit-learn's, carried in its wheel, and MNIST through torchvision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from torchgeom_probe.errors import optional
from torchgeom_probe.reproduce.data.images import Split, fetched
from torchgeom_probe.shapes import Float, Tensor


@dataclass(frozen=True, eq=False)
class Digits(Split):
    """Images [N, pixels] with their labels.

    Pixels are not rescaled (0 to 16; MNIST 0 to 255), as in the paper: a volume element is per unit of ITS input space.
    """

    @property
    def side(self) -> int:
        """Pixels along one side of an image."""
        return round(self.train_images.shape[1] ** 0.5)

    def typical(self, label: int) -> Float[Tensor, " pixels"]:
        """The test image nearest to its class's mean: a clear one, chosen without looking at any network."""
        images = self.test_images[self.test_labels == label]
        return images[(images - images.mean(0)).norm(dim=1).argmin()]


def load_digits(seed: int) -> Digits:
    """Read scikit-learn's 1797 handwritten digits, 8x8 pixels, carried in its wheel: no download."""
    bunch = optional("sklearn.datasets", extra="figures").load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float32)
    labels = torch.tensor(bunch.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1437], order[1437:]
    return Digits(images[train], labels[train], images[test], labels[test])


def load_mnist(root: Path, *, instead: str) -> Digits:
    """Read MNIST through torchvision, from ``root`` or fetched there.

    Args:
        root: the directory that holds, or gets, ``MNIST/raw``.
        instead: the command for who cannot have it.

    Raises:
        ProbeError: it is neither there nor to be had, with what to do.
    """
    advice = (
        f"Copy its four files into {root / 'MNIST' / 'raw'} (train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
        "t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz) and run this again, or use the digits that "
        f"scikit-learn carries:  {instead}"
    )
    train, test = fetched("MNIST", "MNIST", root, advice=advice)
    images = [part.data.flatten(1).float() for part in (train, test)]
    return Digits(images[0], train.targets.long(), images[1], test.targets.long())
