"""Figures 3 and 4: a ResNet-34 learns images; √det g of its four blocks on the plane of three of them.

``embedded``: crops of photographs and a narrow ResNet-34; ``paper``: CIFAR-10 and the full width.  Figures 5 and 6 have
the same data and the same network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torchgeom_probe.errors import optional
from torchgeom_probe.estimators.topk import TopK, paper_pool
from torchgeom_probe.reproduce.data import Images, load_cifar10, load_photos
from torchgeom_probe.reproduce.results import Results, drawn
from torchgeom_probe.reproduce.settings import Settings
from torchgeom_probe.reproduce.training import Trained, Training, View, supervised
from torchgeom_probe.shapes import Tensor

ACTIVATIONS = {"gelu": "GELU", "relu": "ReLU"}
#: The four blocks of the network.
STAGES = ("layer1", "layer2", "layer3", "layer4")


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


def options(images: Images, settings: Settings, *, epochs: int, batch_size: int, rate: float, **words: Any) -> Any:
    """How the networks of figures 3 to 6 are trained: SGD as quirks.md says; ``words`` describe the rest.

    The network is kept after the first epoch and at three tenths, too.
    """
    rate, epochs = 0.01 if settings.papers else rate, settings.epochs or epochs
    described: dict[str, Any] = {"data": images.name, "network": "ResNet-18" if settings.quick else "ResNet-34"}
    described |= {"channels": channels(settings), **words, "learning_rate": rate}
    return dict(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=1e-4),
        batch_size=1024 if settings.papers else batch_size,
        epochs=epochs,
        snapshots=(1, round(0.3 * epochs)),
        schedule=lambda progress: 1.0 if settings.papers else (1 + math.cos(math.pi * progress)) / 2,
        describe=described | {"optimizer": "SGD, momentum 0.9, weight decay 1e-4"},
    )


def by_labels(images: Images, settings: Settings, act: str) -> Training:
    """The training of figures 3 and 4: cross-entropy on mirrored images."""

    def mirrored(x: Tensor) -> Tensor:
        return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)

    epochs = settings.choose(embedded=8, paper=200, quick=1)
    return supervised(
        f"{images.name}_{act}",
        settings,
        (images.train_images, images.train_labels),
        measured={"test_accuracy": (images.test_images, images.test_labels)},
        augment=mirrored,
        model=lambda: network(settings, images, act),
        **options(images, settings, epochs=epochs, batch_size=32, rate=0.02, activation=act),
    )


def plane_view(images: Images, settings: Settings) -> View:
    """The plane of the three classes' clearest test images, every block in one scan."""
    plane = images.plane(settings.choose(embedded=24, paper=40, quick=8))
    return View("plane", plane, {"layers": list(STAGES)}, images.class_names)


def study(results: Results, networks: Sequence[Trained], images: Images, layers: Sequence[str], **drawn: Any) -> None:
    """Study the boundaries between test images; crops of one photograph are not independent."""
    groups = images.test_labels if images.name == "photos" else None
    results.study(networks, images.test_images, layers=list(layers), groups=groups, **drawn)


def of_labels(images: Images, results: Results, *, gallery: bool = False) -> dict[str, Trained]:
    """Train networks of three seeds with each activation, study the boundaries of all blocks; return the first ones."""
    networks, plane = {}, plane_view(images, results.settings)
    for act in ACTIVATIONS:
        of = by_labels(images, results.settings, act)
        several = results.train(of, [plane], seeds=results.settings.choose(embedded=3, paper=1, quick=1))
        study(results, several, images, STAGES, gallery=act == "gelu" and gallery)
        networks[act] = several[0]
    return networks


def fig3(results: Results) -> None:
    """Train with GELU and ReLU, scan the plane at every snapshot and draw; study the boundaries."""
    images = load_images(results.settings)
    plane = plane_view(images, results.settings)
    for act, trained in of_labels(images, results).items():
        results.describe(trained, plane, layers=["layer4"])
        scans, title = trained.scans(plane), f"{ACTIVATIONS[act]}: {images.title}"
        results.picture(f"plane_{act}", drawn(plane, scans, layers=["layer4"], title=title), gallery=act == "gelu")


def fig4(results: Results) -> None:
    """Study and draw every block of both networks, on the slice's tangents, and of one by the paper's own volume.

    That is of the 10 largest σ of a block's output, pooled to 512 features; in quick form of 3, of the last block's.
    """
    settings = results.settings
    images = load_images(settings)
    plane = plane_view(images, settings)
    networks = of_labels(images, results, gallery=True)
    for trained in networks.values():
        results.describe(trained, plane)
    last = {ACTIVATIONS[act]: of.scan(plane, of.epochs[-1]) for act, of in networks.items()}
    results.picture(
        "blocks", drawn(plane, last, decided=False, title=f"Four blocks after training: {images.title}"), gallery=True
    )

    layers, k = (STAGES[-1:], 3) if settings.quick else (STAGES, 10)
    scanned = {"layers": list(layers), "estimator": TopK(k=k), "transform": paper_pool, "batch_size": 16}
    coarser = images.plane(settings.choose(embedded=6, paper=20, quick=4))
    top, trained = View("plane_top", coarser, scanned, images.class_names), networks["gelu"]
    results.describe(trained, top)
    title = f"The paper's volume, {k} largest σ of 512 pooled features: {images.title}"
    results.picture("blocks_top", drawn(top, trained.scans(top, trained.three[::2]), title=title))
