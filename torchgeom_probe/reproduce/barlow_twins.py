"""What figures 5 and 6 share: Barlow Twins without labels on the network of figure 3, and a linear readout for the predictions."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from torchgeom_probe.errors import optional
from torchgeom_probe.reproduce import resnet
from torchgeom_probe.reproduce.resnet import STAGES, Images, accuracy, cosine, network, snapshots
from torchgeom_probe.reproduce.run import Results, Say, Settings, Trained, Training, View, train
from torchgeom_probe.shapes import Float, Int, Tensor
from torchgeom_probe.slices.slice import Line

#: The four blocks, as parts of the network that is trained.
LAYERS = tuple(f"backbone.{stage}" for stage in STAGES)

QUIRKS = (
    *(quirk for quirk in resnet.QUIRKS if not quirk["quirk"].startswith(("SGD", "the augmentation"))),
    {
        "quirk": "1000 epochs; projector of width 256, λ = 0.005; the optimizer of the supervised network",
        "decision": "kept for --preset paper; the embedded run is short: a projector of 64, batches of 64, learning rate 0.05 falling to 0",
    },
    {
        "quirk": "the augmentations are not in what we have",
        "decision": "lightly's BYOLTransform, as its own Barlow Twins has them, for 32 pixels: no blur, colour jitter of strength 0.5, "
        "crops of at least 20 % of the image; not normalised, so that the input space is that of figure 3",
    },
    {
        "quirk": "the labels of the maps are a logistic regression on the features",
        "decision": "kept, on standardised features with an L2 penalty, fitted to convergence in float64 for every snapshot",
    },
    {
        "quirk": "the line takes t = i / steps and never reaches its far end",
        "decision": "mended: both ends are points of the line",
    },
)


class BarlowTwins(nn.Module):
    """The backbone and the projector of Barlow Twins; its output is the backbone's features, ``project`` is for the loss."""

    def __init__(self, backbone: nn.Module, projection_head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projection_head = backbone, projection_head

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return the features."""
        return self.backbone(x)

    def project(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embedding"]:
        """Return the embedding that the loss compares."""
        return self.projection_head(self.backbone(x))


def without_labels(images: Images, settings: Settings) -> Training:
    """The training of figures 5 and 6, as QUIRKS says."""
    loss_of = optional("lightly.loss", extra="lightly").BarlowTwinsLoss(lambda_param=5e-3)
    head = optional("lightly.models.modules", extra="lightly").BarlowTwinsProjectionHead
    two_views = _two_views()
    pictures = (images.train_images * 255).round().to(torch.uint8)
    papers = settings.preset == "paper"
    epochs = settings.epochs or settings.choose(embedded=24, paper=1000, quick=1)
    embedding = settings.choose(embedded=64, paper=256, quick=16)
    rate = 0.01 if papers else 0.05

    def make() -> nn.Module:
        backbone = network(settings, images, "gelu", num_classes=0)
        return BarlowTwins(backbone, head(resnet.channels(settings)[-1], embedding, embedding))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        first, second = (view.to(settings.device) for view in two_views(pictures[batch.cpu()]))
        return loss_of(model.project(first), model.project(second))  # type: ignore[operator]

    def evaluate(model: nn.Module) -> dict[str, float]:
        readout = linear_readout(model, images)
        x, y = images.test_images.to(settings.device), images.test_labels.to(settings.device)
        return {"readout_test_accuracy": accuracy(nn.Sequential(model, readout), x, y)}

    return Training(
        f"{images.name}_barlow",
        model=make,
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=1e-4),
        num_samples=len(pictures),
        batch_size=1024 if papers else 64,
        epochs=epochs,
        snapshots=snapshots(epochs),
        schedule=None if papers else cosine,
        evaluate=evaluate,
        describe={
            "data": images.name,
            "network": settings.choose(embedded="ResNet-34", paper="ResNet-34", quick="ResNet-18"),
            "channels": list(resnet.channels(settings)),
            "projector": embedding,
            "activation": "gelu",
            "learning_rate": rate,
            "optimizer": "SGD, momentum 0.9, weight decay 1e-4",
        },
    )


def linear_readout(model: nn.Module, images: Images, *, penalty: float = 1e-3) -> nn.Linear:
    """Fit a logistic regression on the model's frozen features of the training images: features → logits.

    Minimises the mean cross-entropy plus ``penalty``/2·‖W‖² over standardised features, a convex problem, by L-BFGS in
    float64; the standardisation is folded into the layer that is returned.
    """
    device = next(model.parameters()).device
    x, y = images.train_images.to(device), images.train_labels.to(device)
    was_training = model.training
    with torch.no_grad():
        features = torch.cat([model.eval()(part).double() for part in x.split(250)])
    model.train(was_training)
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-8)
    standardised = (features - mean) / deviation
    classes = len(images.class_names)
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        with torch.enable_grad():
            solver.zero_grad()
            logits = nn.functional.linear(standardised, weight, bias)
            value = nn.functional.cross_entropy(logits, y) + penalty / 2 * weight.square().sum()
            value.backward()
        return value

    solver.step(objective)
    readout = nn.Linear(features.shape[1], classes, device=device)
    with torch.no_grad():
        scaled = weight / deviation
        readout.weight.copy_(scaled)
        readout.bias.copy_(bias - scaled @ mean)
    return readout.requires_grad_(False)


@functools.cache
def _readout_of(images: Images) -> Callable[[nn.Module], nn.Module]:
    # One function for all views: each snapshot is then fitted once, not once a view.
    return lambda model: linear_readout(model, images)


def line_views(images: Images, settings: Settings) -> list[View]:
    """The lines from the clearest test image of class c to those of two others (for CIFAR-10 car → dog, car → frog)."""
    steps = settings.choose(embedded=128, paper=160, quick=24)
    start = images.corners[2]
    return [
        View(
            f"line_{images.class_names[start]}_{images.class_names[end]}",
            Line(images.clearest(start), images.clearest(end), steps=steps),
            layers=list(LAYERS),
            readout=_readout_of(images),
            class_names=images.class_names,
        )
        for end in images.line_ends
    ]


def plane_view(images: Images, settings: Settings) -> View:
    """The plane of figure 3, read out linearly."""
    plane = resnet.plane_view(images, settings)
    return View(
        "plane",
        plane.slice,
        layers=list(LAYERS),
        readout=_readout_of(images),
        class_names=images.class_names,
        batch_size=plane.batch_size,
    )


def train_without_labels(images: Images, settings: Settings, say: Say, results: Results) -> Trained:
    """Train by Barlow Twins, or find it trained."""
    views = [*line_views(images, settings), plane_view(images, settings)]
    trained = train(without_labels(images, settings), settings, views=views, say=say)
    results.training(trained)
    accuracies = [row["readout_test_accuracy"] for row in trained.history]
    say(
        f"{trained.name}: test accuracy of the linear readout {accuracies[-1]:.3f} (of the untrained network's features "
        f"{accuracies[0]:.3f})"
    )
    return trained


def _two_views() -> Callable[[Int[Tensor, "batch 3 height width"]], list[Tensor]]:
    module = optional("lightly.transforms.byol_transform", extra="lightly")
    pillow = optional("PIL.Image", extra="figures")
    options = {
        "input_size": 32,
        "gaussian_blur": 0.0,
        "cj_strength": 0.5,
        "min_scale": 0.2,
        "normalize": None,
    }
    augment = module.BYOLTransform(
        view_1_transform=module.BYOLView1Transform(**options),
        view_2_transform=module.BYOLView2Transform(**options),
    )

    def two_views(pictures: Tensor) -> list[Tensor]:
        with _all_seeded(int(torch.randint(2**31, ()))):
            pairs = [augment(pillow.fromarray(p.permute(1, 2, 0).numpy())) for p in pictures]
        return [torch.stack(views) for views in zip(*pairs, strict=True)]

    return two_views


@contextlib.contextmanager
def _all_seeded(seed: int) -> Iterator[None]:
    """Seed numpy's and Python's global generators, which lightly's transforms draw from beside torch's, and give them back."""
    states: tuple[Any, Any] = np.random.get_state(), random.getstate()
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
