"""What figures 3 to 6 share: images, the paper's ResNet-34 for 32×32 pixels, its training by labels, the plane of three images.

``embedded``: the crops of :mod:`~torchgeom_probe.reproduce.data.photos` and a narrow ResNet-34; ``paper``: CIFAR-10 and the full width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.estimators.topk import TopK, paper_pool
from torchgeom_probe.reproduce.data.photos import load_photos
from torchgeom_probe.reproduce.run import Results, Say, Settings, Trained, Training, View, train
from torchgeom_probe.shapes import Float, Int, Tensor
from torchgeom_probe.slices.scan import Plane

ACTIVATIONS = {"gelu": "GELU", "relu": "ReLU"}
#: The four blocks of the network.
STAGES = ("layer1", "layer2", "layer3", "layer4")

QUIRKS = (
    {
        "quirk": "the volume is the sum of log10 over the top k singular values of J/√512, k = 6, 10 or 512 from one script to another",
        "decision": "maps and tests use the slice's own tangents, √det of the metric ON the plane, exact and for all four blocks in "
        "one pass; TopK(k=10) of the pooled features is tested beside it at the last epoch, on a coarser grid",
    },
    {
        "quirk": "each block's output is average-pooled to 512 features before its Jacobian is taken",
        "decision": "kept for TopK (paper_pool); the slice's tangents are pushed to the whole output, divided by √n",
    },
    {
        "quirk": "a log10 singular value below a threshold counts as 0, and -inf times 0 gives NaN",
        "decision": "mended: nothing is dropped; a singular metric is -inf and counted",
    },
    {
        "quirk": "the residual blocks ignore the chosen nonlinearity and always use GELU",
        "decision": "mended: both networks use their own activation everywhere; GELU and ReLU are trained and told apart",
    },
    {
        "quirk": "up = ((a + b)/2 - mean)·2√3 with the coordinates in [-1, 1], so the triangle is stretched to equilateral",
        "decision": "kept: volumes are per unit of (u, v), which no statistic here depends on",
    },
    {
        "quirk": "entropy in base 10",
        "decision": "nats; the maps show its log10, whose pattern is the same",
    },
    {
        "quirk": "SGD, momentum 0.9, weight decay 1e-4, learning rate 0.01, batches of 1024, 200 epochs",
        "decision": "kept for --preset paper, without a schedule; the embedded set is smaller and noisier: batches of 32, learning "
        "rate 0.02 falling to 0 along a cosine, few epochs",
    },
    {
        "quirk": "the augmentation and normalisation of the training images are not in what we have",
        "decision": "pixels in [0, 1]; mirrored at random in training, nothing else",
    },
    {
        "quirk": "in eval mode an untrained network has BatchNorm statistics, 0 and 1, that belong to no data: its volumes are those of "
        "another network than the one that training starts from",
        "decision": "mended: before training the statistics are set to those of 256 training images, so that epoch 0 is a fair control",
    },
    {
        "quirk": "which horse, frog and car are shown is not in what we have",
        "decision": "of each class the test image with the largest contrast: no look at any network",
    },
)


@dataclass(frozen=True, eq=False)
class Images:
    """32×32 colour images in [0, 1], split, with the three classes that the slices go through.

    Attributes:
        name: of the data set.
        corners: the classes of the plane's a, b and c (for CIFAR-10 horse, frog and car).
        line_ends: the classes that the lines from c go to (for CIFAR-10 dog and frog).

    """

    name: str
    train_images: Float[Tensor, "train 3 32 32"]
    train_labels: Int[Tensor, " train"]
    test_images: Float[Tensor, "test 3 32 32"]
    test_labels: Int[Tensor, " test"]
    class_names: Sequence[str]
    corners: tuple[int, int, int]
    line_ends: tuple[int, int]

    def clearest(self, label: int) -> Float[Tensor, "3 32 32"]:
        """The test image of a class with the largest contrast: chosen without looking at any network."""
        images = self.test_images[self.test_labels == label]
        return images[images.double().flatten(1).std(1).argmax()]


def load_images(settings: Settings) -> Images:
    """Load ``photos``, or CIFAR-10 for the preset ``paper``.

    Raises:
        ProbeError: CIFAR-10 is neither under ``--data-root`` nor to be had.
    """
    if settings.preset == "embedded":
        count = (16, 8) if settings.quick else (160, 50)
        photos = load_photos(*count, seed=settings.seed)
        index = photos.class_names.index
        return Images(
            "photos",
            photos.train_images,
            photos.train_labels,
            photos.test_images,
            photos.test_labels,
            photos.class_names,
            corners=(index("cat"), index("flower"), index("motorcycle")),
            line_ends=(index("cat"), index("flower")),
        )
    train, test = _cifar10(settings.data_root)
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).float() / 255 for part in (train, test)]
    labels = [torch.tensor(part.targets, dtype=torch.long) for part in (train, test)]
    return Images(
        "cifar10",
        train_images=pixels[0],
        train_labels=labels[0],
        test_images=pixels[1],
        test_labels=labels[1],
        class_names=tuple(train.classes),
        corners=(7, 6, 1),
        line_ends=(5, 6),
    )


def _cifar10(root: Path) -> tuple:
    datasets = optional("torchvision.datasets", extra="figures")
    try:
        return tuple(datasets.CIFAR10(str(root), train=part, download=True) for part in (True, False))
    except (
        Exception
    ) as error:  # torchvision raises what its mirrors raise: URLError, RuntimeError, OSError, …
        raise ProbeError(
            f"CIFAR-10 is not under {root} and could not be fetched ({type(error).__name__}: {error}).\n"
            f"Unpack cifar-10-python.tar.gz there (it makes {root / 'cifar-10-batches-py'}), or use the crops of photographs that "
            "come with the installed packages:  --preset embedded"
        ) from error


def network(settings: Settings, images: Images, act: str, *, num_classes: int = 10) -> nn.Module:
    """Make the ResNet-34 of the CIFAR form; narrow but for the preset ``paper`` (and shallower for ``--quick``).

    Its BatchNorm statistics are those of 256 training images.
    """
    cifar_resnet = optional("torchgeom_probe.integrations.timm", extra="timm").cifar_resnet
    model = cifar_resnet(
        settings.choose(embedded="resnet34", paper="resnet34", quick="resnet18"),
        act=act,
        num_classes=num_classes,
        channels=channels(settings),
    )
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of the next batch, whole
    every = max(1, len(images.train_images) // 256)
    with torch.no_grad():
        model.train()(images.train_images[::every][:256])
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
        norm.get_buffer("num_batches_tracked").zero_()
    return model


def channels(settings: Settings) -> tuple[int, int, int, int]:
    """How wide the four blocks are."""
    narrow, full = (8, 16, 32, 64), (64, 128, 256, 512)
    return settings.choose(embedded=narrow, paper=full, quick=(4, 8, 16, 32))


def by_labels(images: Images, settings: Settings, act: str) -> Training:
    """The training of figures 3 and 4: cross-entropy on mirrored images, as QUIRKS says."""
    x, y = images.train_images.to(settings.device), images.train_labels.to(settings.device)
    test = images.test_images.to(settings.device), images.test_labels.to(settings.device)
    epochs = settings.epochs or settings.choose(embedded=8, paper=200, quick=1)
    papers = settings.preset == "paper"
    rate = 0.01 if papers else 0.02

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        mirrored = torch.rand(len(batch), 1, 1, 1, device=x.device) < 0.5
        taken = torch.where(mirrored, x[batch].flip(-1), x[batch])
        return nn.functional.cross_entropy(model(taken), y[batch])

    return Training(
        f"{images.name}_{act}",
        model=lambda: network(settings, images, act),
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=1e-4),
        num_samples=len(y),
        batch_size=1024 if papers else 32,
        epochs=epochs,
        snapshots=snapshots(epochs),
        schedule=None if papers else cosine,
        evaluate=lambda model: {"test_accuracy": accuracy(model, *test)},
        describe={
            "data": images.name,
            "network": settings.choose(embedded="ResNet-34", paper="ResNet-34", quick="ResNet-18"),
            "channels": list(channels(settings)),
            "activation": act,
            "learning_rate": rate,
            "optimizer": "SGD, momentum 0.9, weight decay 1e-4",
        },
    )


def snapshots(epochs: int) -> tuple[int, ...]:
    """The epochs that are kept: the first, and some three tenths of the way."""
    return tuple(sorted({1, max(1, round(0.3 * epochs))}))


def cosine(progress: float) -> float:
    """A factor of the learning rate that falls from 1 to 0.

    >>> cosine(0.0), round(cosine(0.5), 6)
    (1.0, 0.5)
    """
    return 0.5 * (1 + float(torch.tensor(progress * torch.pi, dtype=torch.float64).cos()))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the model, whose output is logits, gets right."""
    right = sum(
        (model(x).argmax(1) == y).sum().item()
        for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    return right / len(labels)


def _plane(images: Images, steps: int) -> Plane:
    a, b, c = (images.clearest(label) for label in images.corners)
    return Plane(a, b, c, steps=steps)


def plane_view(images: Images, settings: Settings, *, layers: Sequence[str] = STAGES) -> View:
    """The plane of the three classes' clearest test images, every block in one scan."""
    grid = settings.choose(embedded=24, paper=40, quick=8)
    return View(
        "plane",
        _plane(images, grid),
        layers=list(layers),
        class_names=images.class_names,
        batch_size=64,
    )


def papers_view(images: Images, settings: Settings, *, epochs: Sequence[int]) -> View:
    """The paper's own volume on the same plane: the 10 largest singular values of each block's output, pooled to 512 features.

    In quick form 3 values of the last block's.
    """
    grid = settings.choose(embedded=6, paper=20, quick=4)
    return View(
        "plane_top",
        _plane(images, grid),
        layers=list(STAGES if not settings.quick else STAGES[-1:]),
        estimator=TopK(k=3 if settings.quick else 10, tol=3e-3),
        transform=paper_pool,
        epochs=epochs,
        class_names=images.class_names,
        batch_size=16,
    )


def train_by_labels(images: Images, settings: Settings, say: Say, results: Results) -> dict[str, Trained]:
    """Train with GELU and with ReLU, or find them trained; activation → network."""
    found = {}
    for act in ACTIVATIONS:
        trained = train(
            by_labels(images, settings, act), settings, views=[plane_view(images, settings)], say=say
        )
        results.training(trained)
        say(f"{trained.name}: test accuracy {trained.history[-1]['test_accuracy']:.3f}")
        found[act] = trained
    return found


def title_of(images: Images) -> str:
    """The plane in words: "the plane of a cat, a flower and a motorcycle"."""
    a, b, c = (images.class_names[label] for label in images.corners)
    return f"the plane of a {a}, a {b} and a {c}"
