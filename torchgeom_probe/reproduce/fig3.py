"""Figure 3: a ResNet-34 learns images; predictions, entropy and √det g of its last block on a plane, over epochs."""

from __future__ import annotations

from torchgeom_probe.reproduce import resnet
from torchgeom_probe.reproduce.results import Results, drawn, frames

TITLE = "a ResNet-34 learns images: the plane of three of them, over epochs"
QUIRKS = resnet.QUIRKS


def run(results: Results) -> None:
    """Train with GELU and ReLU, scan the plane at every snapshot, test the last one and draw."""
    images = resnet.load_images(results.settings)
    plane = resnet.plane_view(images, results.settings)
    for act, trained in resnet.train_by_labels(images, plane, results).items():
        results.test(trained, plane, layers=["layer4"])
        scans = trained.scans(plane)
        layers, title = ["layer4"], f"{resnet.ACTIVATIONS[act]}: {images.title}"
        figure = drawn(plane, scans, layers=layers, title=title)
        results.picture(f"plane_{act}", figure, gallery=act == "gelu")
        results.animation(f"plane_{act}", frames(plane, scans, layers=layers, title=title))
