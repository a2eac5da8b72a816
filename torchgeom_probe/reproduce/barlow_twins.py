"""What figures 5 and 6 share: Barlow Twins on the network of figure 3, and a linear readout for the predictions."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from torchgeom_probe.errors import optional
from torchgeom_probe.reproduce import resnet
from torchgeom_probe.reproduce.data.images import Images
from torchgeom_probe.reproduce.results import Results, quirks
from torchgeom_probe.reproduce.settings import Settings
from torchgeom_probe.reproduce.training import Trained, Training, View, accuracy, train
from torchgeom_probe.shapes import Float, Int, Tensor
from torchgeom_probe.slices.slice import Line

#: The four blocks, as parts of the network that is trained.
LAYERS = tuple(f"backbone.{stage}" for stage in resnet.STAGES)

QUIRKS = (
    *(quirk for quirk in resnet.QUIRKS if not quirk["quirk"].startswith(("SGD", "the augmentation"))),
    *quirks("""
1000 epochs; projector of width 256, λ = 0.005; the optimizer of the supervised network
-> kept for --preset paper; the embedded run is short: a projector of 64, batches of 64, learning rate 0.05 falling to
0

the augmentations are not in what we have
-> lightly's BYOLTransform, as its own Barlow Twins has them, for 32 pixels: no blur, colour jitter of strength 0.5,
crops of at least 20 % of the image; not normalised, so that the input space is that of figure 3

the labels of the maps are a logistic regression on the features
-> kept, on standardised features with an L2 penalty, fitted to convergence in float64 for every snapshot

the line takes t = i / steps and never reaches its far end
-> mended: both ends are points of the line
"""),
)


class BarlowTwins(nn.Module):
    """Backbone and projector of Barlow Twins; the output is the backbone's features, ``project`` is for the loss."""

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
    size = settings.choose(embedded=64, paper=256, quick=16)
    here = images.to(settings.device)

    def make() -> nn.Module:
        backbone = resnet.network(settings, images, "gelu", num_classes=0)
        return BarlowTwins(backbone, head(resnet.channels(settings)[-1], size, size))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        first, second = (view.to(settings.device) for view in two_views(pictures[batch.cpu()]))
        return loss_of(model.project(first), model.project(second))  # type: ignore[operator]

    def evaluate(model: nn.Module) -> dict[str, float]:
        classifier = nn.Sequential(model, linear_readout(model, images))
        return {"readout_test_accuracy": accuracy(classifier, here.test_images, here.test_labels)}

    return resnet.training(
        "barlow",
        images,
        settings,
        epochs=settings.choose(embedded=24, paper=1000, quick=1),
        batch_size=64,
        rate=0.05,
        words={"projector": size, "activation": "gelu"},
        model=make,
        loss=loss,
        evaluate=evaluate,
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
    readout = nn.Linear(features.shape[1], len(images.class_names), device=device, dtype=torch.float64)
    for parameter in readout.parameters():
        nn.init.zeros_(parameter)
    solver = torch.optim.LBFGS(readout.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        with torch.enable_grad():
            solver.zero_grad()
            cross_entropy = nn.functional.cross_entropy(readout(standardised), y)
            value = cross_entropy + penalty / 2 * readout.weight.square().sum()
            value.backward()
        return value

    solver.step(objective)
    with torch.no_grad():
        readout.weight.div_(deviation)
        readout.bias.sub_(readout.weight @ mean)
    return readout.float().requires_grad_(False)


def views(images: Images, settings: Settings) -> list[View]:
    """Lines between clear test images, from class c to two others (CIFAR-10: car → dog and frog); figure 3's plane."""
    plane = resnet.plane_view(images, settings)
    # One readout for all views: each snapshot is then fitted once, not once a view.
    readout = functools.partial(linear_readout, images=images)
    plane = replace(plane, options={"layers": list(LAYERS)}, readout=readout)
    names, start = images.class_names, images.corners[2]
    steps = settings.choose(embedded=128, paper=160, quick=24)
    lines = {end: Line(images.clearest(start), images.clearest(end), steps=steps) for end in images.line_ends}
    found = [replace(plane, name=f"line_{names[start]}_{names[end]}", slice=line) for end, line in lines.items()]
    return [*found, plane]


def train_without_labels(images: Images, results: Results) -> tuple[Trained, list[View], View]:
    """Train by Barlow Twins, or find it trained; with the views, the lines and the plane."""
    *lines, plane = views(images, results.settings)
    of = without_labels(images, results.settings)
    trained = train(of, results.settings, views=[*lines, plane], say=results.say)
    results.training(trained)
    before, *_, after = (row["readout_test_accuracy"] for row in trained.history)
    untrained = f"(of the untrained network's features {before:.3f})"
    results.say(f"{trained.name}: test accuracy of the linear readout {after:.3f} {untrained}")
    return trained, lines, plane


def _two_views() -> Callable[[Int[Tensor, "batch 3 height width"]], tuple[Tensor, Tensor]]:
    module = optional("lightly.transforms.byol_transform", extra="lightly")
    pillow = optional("PIL.Image", extra="figures")
    options = dict(input_size=32, gaussian_blur=0.0, cj_strength=0.5, min_scale=0.2, normalize=None)
    augment = [module.BYOLView1Transform(**options), module.BYOLView2Transform(**options)]

    def two_views(pictures: Tensor) -> tuple[Tensor, Tensor]:
        photographs = [pillow.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
        with _all_seeded(int(torch.randint(2**31, ()))):
            pairs = [[view(photograph) for view in augment] for photograph in photographs]
        first, second = (torch.stack(views) for views in zip(*pairs, strict=True))
        return first, second

    return two_views


@contextlib.contextmanager
def _all_seeded(seed: int) -> Iterator[None]:
    """Seed the generators of numpy and Python, from which lightly draws beside torch's, and give them back."""
    states: tuple[Any, Any] = np.random.get_state(), random.getstate()
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
