"""``torchgeom-probe demo``: the paper's shallow-network experiment on real handwritten digits, from data to figures.

One hidden layer of sigmoid units learns to tell digits apart while a Monitor follows its optimizer.  Then √det g is
drawn on the line from a 7 to a 6 and on the plane of a 7, a 6 and a 1, before and after training.  Network, training
and slices are those of ``reproduce fig2``; here the width, the grid and the data are the caller's.
"""

from __future__ import annotations

import json
import time
from typing import Literal

from torchgeom_probe.boundary.magnification import Magnification
from torchgeom_probe.estimators import Exact
from torchgeom_probe.plotting.files import save
from torchgeom_probe.probe import measure
from torchgeom_probe.reproduce import fig2
from torchgeom_probe.reproduce.data.digits import load_digits, load_mnist
from torchgeom_probe.reproduce.results import drawn
from torchgeom_probe.reproduce.settings import Say, Settings
from torchgeom_probe.reproduce.training import Trained, View, train
from torchgeom_probe.shapes import Tensor


def run(
    settings: Settings,
    *,
    data: Literal["digits", "mnist"] = "digits",
    width: int | None = None,
    grid: int = 40,
    say: Say = print,
) -> None:
    """Train, watch, scan and draw; everything goes under the settings' ``out``.

    ``events/`` (TensorBoard), ``geometry.csv``, ``report.csv``, ``report.json``, ``line.png``, ``plane.png``, scans,
    and networks (``epoch_*.pt``).  A demo that was stopped goes on; a quick one of other settings is replaced.

    Args:
        settings: the command line's; 200 epochs where they give none.
        data: scikit-learn's digits (8x8, offline), or MNIST through torchvision.
        width: sigmoid units; at least as many as pixels, or g is singular.  None: 512 for digits, 2000 for MNIST.
        grid: points along each side of the plane.
        say: prints a line.

    Raises:
        ProbeError: a full demo of other settings in the folder, a width below the number of pixels, data that cannot
            be had, a missing optional package.
    """
    began, out, epochs = time.perf_counter(), settings.out, settings.epochs or 200
    if width is None:
        width = {"digits": 512, "mnist": 2000}[data]
    if settings.quick:
        width, epochs, grid = min(width, 128), min(epochs, 10), min(grid, 12)
    if data == "digits":
        digits = load_digits(settings.seed)
    else:
        digits = load_mnist(settings.data_root, instead="torchgeom-probe demo --data digits")
    of = fig2.training(digits, width=width, epochs=epochs, snapshots=(1, epochs // 2), settings=settings, name=data)
    views, watch = fig2.views(digits, grid=grid, epochs=(0, epochs)), fig2.watch(digits, of)
    num_inputs = digits.train_images.shape[1]
    say(
        f"{len(digits.train_labels)} training and {len(digits.test_labels)} test images of {num_inputs} pixels; "
        f"one hidden layer of {width} sigmoid units; √det g of it at {len(watch['x_probe'])} test images, "
        f"all {num_inputs} directions."
    )
    made = out / "settings.json"
    replace = made.exists() and json.loads(made.read_text())["quick"]
    trained = train(of, settings, views=views, watch=watch, folder=out, replace=replace, say=say)
    for row in trained.history[1:]:
        say(f"epoch {row['epoch']}: test accuracy {row['test_accuracy']:.3f}")

    _report(trained, watch["x_probe"].to(settings.device), say)
    titles = (f"log {fig2.LINE}", fig2.PLANE)
    found = [_slice(trained, view, title) for view, title in zip(views, titles, strict=True)]
    say("")
    for view, statistic in zip(views, found, strict=True):
        say(f"On the {view.name}: {statistic}.")
    written = ", ".join(str(out / name) for name in ("line.png", "plane.png", "geometry.csv", "report.json"))
    say(f"\nWrote {written} in {time.perf_counter() - began:.0f} s.")
    say(f"Watch the training:  tensorboard --logdir {out / 'events'}")


def _report(trained: Trained, x: Tensor, say: Say) -> None:
    """Measure before and after training, say both and write the second."""
    before, after = (
        measure(trained.model(epoch), x, layers=[fig2.LAYER], estimator=Exact()) for epoch in trained.three[::2]
    )
    say("\nAt the probed test images, before training:\n" + before.summary())
    say("\nAfter training:\n" + after.summary())
    after.to_csv(trained.folder / "report.csv")
    after.to_json(trained.folder / "report.json")


def _slice(trained: Trained, view: View, title: str) -> Magnification:
    """Save and draw the scans before and after training, and test the second."""
    before, after = trained.scans(view, trained.three[::2]).values()
    before.save(trained.folder / f"{view.name}_before.safetensors")
    after.save(trained.folder / f"{view.name}_after.safetensors")
    figure = drawn(view, {"before training": before, "after training": after}, unit="nat", title=title)
    save(figure, trained.folder / f"{view.name}.png")
    return after.magnification(fig2.LAYER, initial=before, seed=trained.settings.seed)
