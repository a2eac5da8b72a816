"""What figures 3 to 6 share: images, the paper's ResNet-34 for 32×32 pixels, its training, the plane of three images.

``embedded``: the crops of :mod:`~torchgeom_probe.reproduce.data.photos` and a narrow ResNet-34; ``paper``: CIFAR-10 and
the full width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchgeom_probe.errors import optional
from torchgeom_probe.estimators.topk import TopK, paper_pool
from torchgeom_probe.reproduce.data.images import Images, load_cifar10
from torchgeom_probe.reproduce.data.photos import load_photos
from torchgeom_probe.reproduce.results import Results, quirks
from torchgeom_probe.reproduce.settings import Settings
from torchgeom_probe.reproduce.training import Trained, Training, View, accuracy, train
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.slice import Plane

ACTIVATIONS = {"gelu": "GELU", "relu": "ReLU"}
#: The four blocks of the network.
STAGES = ("layer1", "layer2", "layer3", "layer4")


QUIRKS = quirks("""
the volume is the sum of log10 over the top k singular values of J/√512, k = 6, 10 or 512 from one script to another
-> maps and tests use the slice's own tangents, √det of the metric ON the plane, exact and for all four blocks in one
pass; TopK(k=10) of the pooled features is tested beside it at the last epoch, on a coarser grid

each block's output is average-pooled to 512 features before its Jacobian is taken
-> kept for TopK (paper_pool); the slice's tangents are pushed to the whole output, divided by √n

a log10 singular value below a threshold counts as 0, and -inf times 0 gives NaN
-> mended: nothing is dropped; a singular metric is -inf and counted

the residual blocks ignore the chosen nonlinearity and always use GELU
-> mended: both networks use their own activation everywhere; GELU and ReLU are trained and told apart

up = ((a + b)/2 - mean)·2√3 with the coordinates in [-1, 1], so the triangle is stretched to equilateral
-> kept: volumes are per unit of (u, v), which no statistic here depends on

entropy in base 10
-> nats; the maps show its log10, whose pattern is the same

SGD, momentum 0.9, weight decay 1e-4, learning rate 0.01, batches of 1024, 200 epochs
-> kept for --preset paper, without a schedule; the embedded set is smaller and noisier: batches of 32, learning rate
0.02 falling to 0 along a cosine, few epochs

the augmentation and normalisation of the training images are not in what we have
-> pixels in [0, 1]; mirrored at random in training, nothing else

in eval mode an untrained network has BatchNorm statistics, 0 and 1, that belong to no data: its volumes are those of
another network than the one that training starts from
-> mended: before training the statistics are set to those of 256 training images, so that epoch 0 is a fair control

which horse, frog and car are shown is not in what we have
-> of each class the test image with the largest contrast: no look at any network
""")


def load_images(settings: Settings) -> Images:
    """Load ``photos``, or CIFAR-10 for the preset ``paper``.

    Raises:
        ProbeError: CIFAR-10 is neither under ``--data-root`` nor to be had.
    """
    if settings.papers:
        return load_cifar10(settings.data_root)
    return load_photos(*((16, 8) if settings.quick else (160, 50)), seed=settings.seed)


def channels(settings: Settings) -> list[int]:
    """How wide the four blocks are."""
    first = settings.choose(embedded=8, paper=64, quick=4)
    return [first, 2 * first, 4 * first, 8 * first]


def network(settings: Settings, images: Images, act: str, *, num_classes: int = 10) -> nn.Module:
    """Make the ResNet-34 of the CIFAR form; narrow but for the preset ``paper`` (and shallower for ``--quick``).

    Its BatchNorm statistics are those of 256 training images.
    """
    cifar_resnet = optional("torchgeom_probe.integrations.timm", extra="timm").cifar_resnet
    name = "resnet18" if settings.quick else "resnet34"
    model = cifar_resnet(name, act=act, num_classes=num_classes, channels=tuple(channels(settings)))
    every = max(1, len(images.train_images) // 256)
    torch.optim.swa_utils.update_bn([images.train_images[::every][:256]], model.train())
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.get_buffer("num_batches_tracked").zero_()
    return model


def training(
    name: str,
    images: Images,
    settings: Settings,
    *,
    epochs: int,
    batch_size: int,
    rate: float,
    words: Mapping[str, Any],
    **parts: Any,
) -> Training:
    """SGD as QUIRKS says; the network is kept after the first epoch and at three tenths, too."""
    rate, epochs = 0.01 if settings.papers else rate, settings.epochs or epochs
    return Training(
        f"{images.name}_{name}",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=1e-4),
        num_samples=len(images.train_labels),
        batch_size=1024 if settings.papers else batch_size,
        epochs=epochs,
        snapshots=(1, round(0.3 * epochs)),
        schedule=(lambda progress: 1.0) if settings.papers else cosine,
        describe={
            "data": images.name,
            "network": "ResNet-18" if settings.quick else "ResNet-34",
            "channels": channels(settings),
            **words,
            "learning_rate": rate,
            "optimizer": "SGD, momentum 0.9, weight decay 1e-4",
        },
        **parts,
    )


def cosine(progress: float) -> float:
    """A factor of the learning rate that falls from 1 to 0.

    >>> cosine(0.0), round(cosine(0.5), 6)
    (1.0, 0.5)
    """
    return 0.5 * (1 + float(torch.tensor(progress * torch.pi, dtype=torch.float64).cos()))


def by_labels(images: Images, settings: Settings, act: str) -> Training:
    """The training of figures 3 and 4: cross-entropy on mirrored images."""
    here = images.to(settings.device)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        x, y = here.train_images[batch], here.train_labels[batch]
        mirrored = torch.rand(len(batch), 1, 1, 1, device=x.device) < 0.5
        return nn.functional.cross_entropy(model(torch.where(mirrored, x.flip(-1), x)), y)

    return training(
        act,
        images,
        settings,
        epochs=settings.choose(embedded=8, paper=200, quick=1),
        batch_size=32,
        rate=0.02,
        words={"activation": act},
        model=lambda: network(settings, images, act),
        loss=loss,
        evaluate=lambda model: {"test_accuracy": accuracy(model, here.test_images, here.test_labels)},
    )


def plane_view(images: Images, settings: Settings) -> View:
    """The plane of the three classes' clearest test images, every block in one scan."""
    a, b, c = (images.clearest(label) for label in images.corners)
    plane = Plane(a, b, c, steps=settings.choose(embedded=24, paper=40, quick=8))
    return View("plane", plane, {"layers": list(STAGES)}, class_names=images.class_names)


def papers_view(images: Images, settings: Settings) -> View:
    """The paper's own volume on the same plane: the 10 largest σ of each block's output, pooled to 512 features.

    In quick form 3 of the last block's.
    """
    plane = plane_view(images, settings)
    layers, k = (STAGES[-1:], 3) if settings.quick else (STAGES, 10)
    options = {"layers": list(layers), "estimator": TopK(k=k, tol=3e-3), "transform": paper_pool, "batch_size": 16}
    coarser = replace(plane.slice, steps=settings.choose(embedded=6, paper=20, quick=4))
    return replace(plane, name="plane_top", slice=coarser, options=options)


def train_by_labels(images: Images, plane: View, results: Results) -> dict[str, Trained]:
    """Train with GELU and with ReLU, or find them trained; activation → network."""
    found = {}
    for act in ACTIVATIONS:
        of = by_labels(images, results.settings, act)
        found[act] = trained = train(of, results.settings, views=[plane], say=results.say)
        results.training(trained)
        results.say(f"{trained.name}: test accuracy {trained.history[-1]['test_accuracy']:.3f}")
    return found
