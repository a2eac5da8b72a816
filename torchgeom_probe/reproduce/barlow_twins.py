"""Figures 5 and 6: Barlow Twins on the network of figure 3, and a linear readout for the predictions."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn

from torchgeom_probe.errors import optional
from torchgeom_probe.reproduce import resnet
from torchgeom_probe.reproduce.data import Images
from torchgeom_probe.reproduce.results import Results, drawn
from torchgeom_probe.reproduce.settings import Settings
from torchgeom_probe.reproduce.training import Trained, Training, View, accuracy
from torchgeom_probe.shapes import Float, Tensor

#: The four blocks, as parts of the network that is trained.
LAYERS = tuple(f"backbone.{stage}" for stage in resnet.STAGES)


class BarlowTwins(nn.Module):
    """Backbone and projector of Barlow Twins; the output is the backbone's features, the projector is for the loss."""

    def __init__(self, backbone: nn.Module, projection_head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projection_head = backbone, projection_head

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return the features."""
        return self.backbone(x)


def without_labels(images: Images, settings: Settings) -> Training:
    """The training of figures 5 and 6, as quirks.md says."""
    loss_of = optional("lightly.loss", extra="lightly").BarlowTwinsLoss(lambda_param=5e-3)
    head = optional("lightly.models.modules", extra="lightly").BarlowTwinsProjectionHead
    pictures = (images.train_images * 255).round().to(torch.uint8)
    size = settings.choose(embedded=64, paper=256, quick=16)
    here = images.to(settings.device)

    def make() -> nn.Module:
        backbone = resnet.network(settings, images, "gelu", num_classes=0)
        return BarlowTwins(backbone, head(resnet.channels(settings)[-1], size, size))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        projector = model.get_submodule("projection_head")
        return loss_of(*(projector(model(view.to(settings.device))) for view in two_views(pictures[batch.cpu()])))

    def evaluate(model: nn.Module) -> dict[str, float]:
        classifier = nn.Sequential(model, linear_readout(model, here))
        return {"linear_readout_test_accuracy": accuracy(classifier, here.test_images, here.test_labels)}

    epochs = settings.choose(embedded=24, paper=1000, quick=1)
    words = {"projector": size, "activation": "gelu"}
    return Training(
        f"{images.name}_barlow",
        model=make,
        loss=loss,
        num_samples=len(images.train_labels),
        evaluate=evaluate,
        readout=functools.partial(linear_readout, images=here),
        **resnet.options(images, settings, epochs=epochs, batch_size=64, rate=0.05, **words),
    )


def two_views(pictures: Tensor) -> list[Float[Tensor, "batch 3 32 32"]]:
    """Augment pictures [B, 3, H, W] in 8 bits by lightly's two transforms, which draw from torch and from numpy.

    So that torch's seed is enough, numpy is seeded from torch.
    """
    transforms = optional("lightly.transforms.byol_transform", extra="lightly")
    to_image = optional("torchvision.transforms.functional", extra="figures").to_pil_image
    options = dict(input_size=32, gaussian_blur=0.0, cj_strength=0.5, min_scale=0.2, normalize=None)
    augment = [transforms.BYOLView1Transform(**options), transforms.BYOLView2Transform(**options)]
    np.random.seed(int(torch.randint(2**31, ())))
    pairs = [[view(photograph) for view in augment] for photograph in map(to_image, pictures)]
    return [torch.stack(views) for views in zip(*pairs, strict=True)]


@torch.no_grad()
def linear_readout(model: nn.Module, images: Images, *, penalty: float = 1e-3) -> nn.Linear:
    """Fit a logistic regression on the model's frozen features of the training images: features → logits.

    It minimises the mean cross-entropy plus ``penalty``/2·‖W‖² over standardised features, in float64, by
    scikit-learn; the standardisation is folded into the layer that is returned.
    """
    was_training = model.training
    features = torch.cat([model.eval()(part).double() for part in images.train_images.split(250)])
    model.train(was_training)
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-8)
    standardised, labels = ((features - mean) / deviation).cpu().numpy(), images.train_labels.cpu().numpy()
    regression = optional("sklearn.linear_model", extra="figures").LogisticRegression
    fitted = regression(C=1 / (penalty * len(features)), tol=1e-8, max_iter=5000).fit(standardised, labels)
    weight = torch.from_numpy(fitted.coef_).to(deviation) / deviation
    bias = torch.from_numpy(fitted.intercept_).to(deviation) - weight @ mean
    readout = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device).requires_grad_(False)
    readout.load_state_dict({"weight": weight, "bias": bias})
    return readout


def train_without_labels(images: Images, results: Results) -> tuple[Trained, list[View]]:
    """Train by Barlow Twins, or find it trained, and study its boundaries; its views are the lines, then the plane."""
    options, plane = {"layers": list(LAYERS)}, resnet.plane_view(images, results.settings).slice
    lines = images.lines(results.settings.choose(embedded=128, paper=160, quick=24))
    slices = {f"line_{start}_{end}": line for (start, end), line in lines.items()} | {"plane": plane}
    views = [View(name, of, options, images.class_names) for name, of in slices.items()]
    networks = results.train(without_labels(images, results.settings), views, seeds=1)
    resnet.study(results, networks, images, LAYERS)
    return networks[0], views


def fig5(results: Results) -> None:
    """Train without labels, scan both lines at every snapshot, study every block and draw."""
    images = resnet.load_images(results.settings)
    trained, (*lines, _) = train_without_labels(images, results)
    for line in lines:
        results.describe(trained, line)
        start, end = line.name.split("_")[1:]
        figure = drawn(line, trained.scans(line), title=f"Barlow Twins: from a {start} to a {end}")
        results.picture(line.name, figure, gallery=line is lines[0])


def fig6(results: Results) -> None:
    """Train without labels, scan the plane at every snapshot, study every block and draw."""
    images = resnet.load_images(results.settings)
    trained, (*_, plane) = train_without_labels(images, results)
    results.describe(trained, plane)
    title = f"Barlow Twins: {images.title}"
    results.picture(
        "plane", drawn(plane, trained.scans(plane, trained.three[::2]), decided=False, title=title), gallery=True
    )
