"""``torchgeom-probe demo``: the paper's shallow-network experiment on real handwritten digits, from data to figures.

One hidden layer of sigmoid units learns to tell digits apart while a Monitor follows its optimizer; then √det g is drawn along the line
from a 7 to a 6 and over the plane of a 7, a 6 and a 1, before and after training.  Network, training and slices are those of
``reproduce fig2``; here the width, the grid and the data are the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torchgeom_probe.errors import optional
from torchgeom_probe.estimators import Exact
from torchgeom_probe.plotting.files import save
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.probe import measure
from torchgeom_probe.reproduce import fig2
from torchgeom_probe.reproduce.data.digits import load_digits, load_mnist
from torchgeom_probe.reproduce.run import Settings, train


def run(
    *,
    out: Path,
    data: Literal["digits", "mnist"] = "digits",
    data_root: Path = Path("data"),
    width: int | None = None,
    epochs: int = 200,
    grid: int = 40,
    seed: int = 0,
    quick: bool = False,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train, watch, scan and draw; everything goes under ``out``.

    Args:
        out: the directory: ``events/`` (TensorBoard), ``geometry.csv``, ``report.csv``, ``report.json``, ``line.png``, ``plane.png``,
            the scans, and the networks before and after (``epoch_*.pt``).  A demo that was stopped goes on; one of other settings
            is replaced.
        data: scikit-learn's digits (8x8, offline), or MNIST through torchvision.
        data_root: where MNIST is, or goes.
        width: sigmoid units; at least as many as pixels, or g is singular.  Default: 512 for digits, the paper's 2000 for MNIST.
        epochs: of training.
        grid: points along each side of the plane.
        seed: of the weights, the split and the batches.
        quick: a small version, for a test of the installation.
        device: where to train.
        say: prints a line.

    Returns:
        The numbers of the end: accuracies, log-volumes, the statistic of magnification, seconds.

    Raises:
        ProbeError: a width below the number of pixels, data that cannot be had, a missing optional package.
    """
    began = time.perf_counter()
    # What is missing is said before the training, not after it.
    optional("matplotlib", extra="figures")
    if width is None:
        width = {"digits": 512, "mnist": 2000}[data]
    if quick:
        width, epochs, grid = min(width, 128), min(epochs, 10), min(grid, 12)
    if data == "digits":
        digits = load_digits(seed)
    else:
        digits = load_mnist(data_root, instead="torchgeom-probe demo --data digits")
    settings = Settings(quick=quick, seed=seed, device=device, data_root=data_root, out=out)
    of = fig2.training(
        digits, width=width, epochs=epochs, snapshots=(1, epochs // 2), settings=settings, name=data
    )
    views = fig2.views(digits, grid=grid, epochs=(0, epochs))
    watch = fig2.watch(digits, of)
    num_inputs = digits.train_images.shape[1]
    say(
        f"{len(digits.train_labels)} training and {len(digits.test_labels)} test images of {num_inputs} pixels; "
        f"one hidden layer of {width} sigmoid units; √det g of it at {len(watch.x)} test images, all {num_inputs} directions."
    )
    trained = train(of, settings, views=views, watch=watch, folder=out, replace=True, say=say)
    for row in trained.history[1:]:
        say(f"epoch {row['epoch']}: test accuracy {row['test_accuracy']:.3f}")

    probed = watch.x.to(device)
    start, report = (
        measure(trained.model(epoch), probed, layers=[fig2.LAYER], estimator=Exact()) for epoch in (0, epochs)
    )
    say("\nAt the probed test images, before training:\n" + start.summary())
    say("\nAfter training:\n" + report.summary())
    report.to_csv(out / "report.csv")
    report.to_json(out / "report.json")

    options: dict[str, Any] = {"class_names": fig2.CLASS_NAMES, "relative": True}
    found = {}
    for view in views:
        before, after = (trained.scan(view, epoch) for epoch in (0, epochs))
        before.save(out / f"{view.name}_before.safetensors")
        after.save(out / f"{view.name}_after.safetensors")
        if view.name == "line":
            title = "log √det g on the line from a 7 to a 6"
            drawn = plot(after, before=before, images=view.images, title=title, **options)
        else:
            title = "The plane of a 7, a 6 and a 1"
            drawn = plot(
                after, before=before, images=view.images, title=title, log_entropy=True, **options
            )
        save(drawn, out / f"{view.name}.png")
        found[view.name] = after.magnification(fig2.LAYER, initial=before, seed=seed)
    say("")
    for name, statistic in found.items():
        say(f"On the {name}: {statistic}.")
    seconds = time.perf_counter() - began
    say(
        f"\nWrote {out / 'line.png'}, {out / 'plane.png'}, {out / 'geometry.csv'}, {out / 'report.json'} in {seconds:.0f} s."
    )
    say(f"Watch the training:  tensorboard --logdir {out / 'events'}")
    statistics = report[fig2.LAYER].statistics()
    return {
        "train_accuracy": trained.history[-1]["train_accuracy"],
        "test_accuracy": trained.history[-1]["test_accuracy"],
        "log_volume": statistics["median"],
        "log_volume_before": start[fig2.LAYER].statistics()["median"],
        "rho": float(found["plane"].rho),
        "p_value": float(found["plane"].p_value),
        "seconds": seconds,
    }
