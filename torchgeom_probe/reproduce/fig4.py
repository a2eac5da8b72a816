"""Figure 4: √det g of all four blocks of the trained ResNet-34 on the plane of three images, from one scan."""

from __future__ import annotations

from torchgeom_probe.errors import optional
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.reproduce.resnet import (
    ACTIVATIONS,
    QUIRKS,
    load_images,
    papers_view,
    plane_view,
    title_of,
    train_by_labels,
)
from torchgeom_probe.reproduce.run import Results, Say, Settings

TITLE = "a trained ResNet-34: all four blocks on the plane of three images"


def run(settings: Settings, say: Say = print) -> Results:
    """Test and draw every block of the GELU and the ReLU network, on the slice's tangents and by the paper's TopK(10).

    Raises:
        ProbeError: the data cannot be had; whatever ``train`` refuses.
    """
    optional("matplotlib", extra="figures")
    results = Results("fig4", TITLE, settings, quirks=QUIRKS, say=say)
    images = load_images(settings)
    plane = plane_view(images, settings)
    networks = train_by_labels(images, settings, say, results)
    for trained in networks.values():
        results.test(trained, plane)
    # The blocks' and networks' levels differ by more than a pattern's range: each map is shown about its median.
    options = {
        "class_names": images.class_names,
        "unit": "log10",
        "log_entropy": True,
        "relative": True,
    }
    drawn = plot(
        [trained.scan(plane, trained.epochs[-1]) for trained in networks.values()],
        names=[ACTIVATIONS[act] for act in networks],
        title=f"Four blocks after training: {title_of(images)}",
        **options,
    )
    results.picture("blocks", drawn, gallery=True)
    trained = networks["gelu"]
    last = trained.epochs[-1]
    top = papers_view(images, settings, epochs=(0, last))
    results.test(trained, top)
    drawn = plot(
        [trained.scan(top, epoch) for epoch in (0, last)],
        names=["epoch 0", f"epoch {last}"],
        title=f"The paper's volume, {3 if settings.quick else 10} largest σ of 512 pooled features: {title_of(images)}",
        **options,
    )
    results.picture("blocks_top", drawn)
    return results.finish()
