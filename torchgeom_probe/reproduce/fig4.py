"""Figure 4: √det g of all four blocks of the trained ResNet-34 on the plane of three images, from one scan."""

from __future__ import annotations

from torchgeom_probe.reproduce import resnet
from torchgeom_probe.reproduce.results import Results, drawn

TITLE = "a trained ResNet-34: all four blocks on the plane of three images"
QUIRKS = resnet.QUIRKS


def run(results: Results) -> None:
    """Test and draw every block of both networks, on the slice's tangents, and of one by the paper's TopK(10)."""
    images = resnet.load_images(results.settings)
    plane, top = resnet.plane_view(images, results.settings), resnet.papers_view(images, results.settings)
    networks = resnet.train_by_labels(images, plane, results)
    for trained in networks.values():
        results.test(trained, plane)
    last = {resnet.ACTIVATIONS[act]: of.scan(plane, of.epochs[-1]) for act, of in networks.items()}
    figure = drawn(plane, last, title=f"Four blocks after training: {images.title}")
    results.picture("blocks", figure, gallery=True)

    trained = networks["gelu"]
    results.test(trained, top)
    title = f"The paper's volume, {top.options['estimator'].k} largest σ of 512 pooled features: {images.title}"
    results.picture("blocks_top", drawn(top, trained.scans(top, trained.three[::2]), title=title))
