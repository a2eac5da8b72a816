"""Figure 6: Barlow Twins; predictions of a linear readout, entropy and √det g of every block on a plane."""

from __future__ import annotations

from torchgeom_probe.reproduce import barlow_twins, resnet
from torchgeom_probe.reproduce.results import Results, drawn, frames

TITLE = "Barlow Twins, no labels: the plane of three images"
QUIRKS = barlow_twins.QUIRKS


def run(results: Results) -> None:
    """Train without labels, scan the plane at every snapshot, test every block and draw."""
    images = resnet.load_images(results.settings)
    trained, _, plane = barlow_twins.train_without_labels(images, results)
    results.test(trained, plane)
    title = f"Barlow Twins: {images.title}"
    figure = drawn(plane, trained.scans(plane, trained.three[::2]), title=title)
    results.picture("plane", figure, gallery=True)
    last_block = frames(plane, trained.scans(plane), layers=[barlow_twins.LAYERS[-1]], title=title)
    results.animation("plane", last_block)
