"""Figure 5: Barlow Twins; √det g along the lines from one image to two of other classes, over epochs."""

from __future__ import annotations

from torchgeom_probe.reproduce import barlow_twins, resnet
from torchgeom_probe.reproduce.results import Results, drawn

TITLE = "Barlow Twins, no labels: the lines between images of different classes"
QUIRKS = barlow_twins.QUIRKS


def run(results: Results) -> None:
    """Train without labels, scan both lines at every snapshot, test every block and draw."""
    images = resnet.load_images(results.settings)
    trained, lines, _ = barlow_twins.train_without_labels(images, results)
    for line in lines:
        results.test(trained, line)
        start, end = line.name.split("_")[1:]
        figure = drawn(line, trained.scans(line), title=f"Barlow Twins: from a {start} to a {end}")
        results.picture(line.name, figure, gallery=line is lines[0])
