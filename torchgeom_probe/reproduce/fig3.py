"""Figure 3: a ResNet-34 learns images; predictions, entropy and √det g of its last block on the plane of three of them, over epochs."""

from __future__ import annotations

from torchgeom_probe.errors import optional
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.reproduce.resnet import (
    ACTIVATIONS,
    QUIRKS,
    load_images,
    plane_view,
    title_of,
    train_by_labels,
)
from torchgeom_probe.reproduce.run import Results, Say, Settings

TITLE = "a ResNet-34 learns images: the plane of three of them, over epochs"


def run(settings: Settings, say: Say = print) -> Results:
    """Train with GELU and ReLU, scan the plane at every snapshot, test the last one and draw.

    Raises:
        ProbeError: the data cannot be had; whatever ``train`` refuses.
    """
    optional("matplotlib", extra="figures")
    results = Results("fig3", TITLE, settings, quirks=QUIRKS, say=say)
    images = load_images(settings)
    plane = plane_view(images, settings)
    for act, trained in train_by_labels(images, settings, say, results).items():
        results.test(trained, plane, layers=["layer4"])
        scans = [trained.scan(plane, epoch) for epoch in trained.epochs]
        names = [f"epoch {epoch}" for epoch in trained.epochs]
        # Training moves the level of log √det g by more than its pattern's range: each map is shown about its median.
        options = {
            "relative": True,
            "layers": ["layer4"],
            "class_names": images.class_names,
            "unit": "log10",
            "log_entropy": True,
            "title": f"{ACTIVATIONS[act]}: {title_of(images)}",
        }
        results.picture(
            f"plane_{act}", plot(scans, names=names, **options), gallery=act == "gelu"
        )
        frames = (
            plot([scan], names=[name], like=scans, **options)
            for scan, name in zip(scans, names, strict=True)
        )
        results.animation(f"plane_{act}", frames)
    return results.finish()
