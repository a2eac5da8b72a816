"""Figure 5: Barlow Twins; √det g along the lines from one image to two of other classes, before, during and after training."""

from __future__ import annotations

from torchgeom_probe.errors import optional
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.reproduce.barlow_twins import QUIRKS, line_views, train_without_labels
from torchgeom_probe.reproduce.resnet import load_images
from torchgeom_probe.reproduce.run import Results, Say, Settings

TITLE = "Barlow Twins, no labels: the lines between images of different classes"


def run(settings: Settings, say: Say = print) -> Results:
    """Train without labels, scan both lines at every snapshot, test every block and draw.

    Raises:
        ProbeError: the data cannot be had; lightly is not installed; whatever ``train`` refuses.
    """
    optional("matplotlib", extra="figures")
    results = Results("fig5", TITLE, settings, quirks=QUIRKS, say=say)
    images = load_images(settings)
    trained = train_without_labels(images, settings, say, results)
    names = [f"epoch {epoch}" for epoch in trained.epochs]
    for line in line_views(images, settings):
        results.test(trained, line)
        start, end = line.name.split("_")[1:]
        drawn = plot(
            [trained.scan(line, epoch) for epoch in trained.epochs],
            names=names,
            class_names=images.class_names,
            unit="log10",
            relative=True,
            title=f"Barlow Twins: from a {start} to a {end}",
        )
        results.picture(line.name, drawn, gallery=line.name == line_views(images, settings)[0].name)
    return results.finish()
