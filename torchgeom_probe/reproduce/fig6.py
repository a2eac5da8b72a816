"""Figure 6: Barlow Twins; predictions of a linear readout, entropy and √det g of every block on the plane of three images."""

from __future__ import annotations

from torchgeom_probe.errors import optional
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.reproduce.barlow_twins import LAYERS, QUIRKS, plane_view, train_without_labels
from torchgeom_probe.reproduce.resnet import load_images, title_of
from torchgeom_probe.reproduce.run import Results, Say, Settings

TITLE = "Barlow Twins, no labels: the plane of three images"


def run(settings: Settings, say: Say = print) -> Results:
    """Train without labels, scan the plane at every snapshot, test every block and draw.

    Raises:
        ProbeError: the data cannot be had; lightly is not installed; whatever ``train`` refuses.
    """
    optional("matplotlib", extra="figures")
    results = Results("fig6", TITLE, settings, quirks=QUIRKS, say=say)
    images = load_images(settings)
    trained = train_without_labels(images, settings, say, results)
    plane = plane_view(images, settings)
    results.test(trained, plane)
    scans = [trained.scan(plane, epoch) for epoch in trained.epochs]
    names = [f"epoch {epoch}" for epoch in trained.epochs]
    # Training moves the level of log √det g by more than its pattern's range: each map is shown about its median.
    options = {
        "relative": True,
        "class_names": images.class_names,
        "unit": "log10",
        "log_entropy": True,
        "title": f"Barlow Twins: {title_of(images)}",
    }
    ends = [0, len(scans) - 1]
    drawn = plot([scans[i] for i in ends], names=[names[i] for i in ends], **options)
    results.picture("plane", drawn, gallery=True)
    frames = (
        plot([scan], names=[name], like=scans, layers=[LAYERS[-1]], **options)
        for scan, name in zip(scans, names, strict=True)
    )
    results.animation("plane", frames)
    return results.finish()
