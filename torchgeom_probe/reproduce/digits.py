"""Figure 2 and ``torchgeom-probe demo``: one hidden layer of sigmoid units learns handwritten digits.

√det g is scanned on the line from a 7 to a 6, and on the plane of a 7, a 6 and a 1.  ``embedded``: scikit-learn's
digits (8x8); ``paper``: MNIST, 2000 units, float64.  The metric is that of all pixels, so the width is at least their
number.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators import Exact
from torchgeom_probe.plotting.files import save
from torchgeom_probe.probe import measure
from torchgeom_probe.reproduce.data import Images, load_digits, load_mnist
from torchgeom_probe.reproduce.points import PaperNetwork
from torchgeom_probe.reproduce.results import Results, drawn, frames
from torchgeom_probe.reproduce.settings import Say, Settings
from torchgeom_probe.reproduce.training import Training, View, accuracy, train
from torchgeom_probe.shapes import Tensor

#: The layer that is measured: the feature map of the paper, Φ(x) = φ(Wx + b).
LAYER = "sigmoid"

LINE, PLANE = "√det g on the line from a 7 to a 6", "The plane of a 7, a 6 and a 1"


def training(data: Images, *, width: int, epochs: int, snapshots: Sequence[int], settings: Settings) -> Training:
    """Digits learnt as quirks.md says: for the preset ``paper`` by Adam, else by SGD with momentum.

    Raises:
        ProbeError: fewer units than pixels: g is singular.
    """
    num_inputs, dtype = data.train_images[0].numel(), data.train_images.dtype
    if width < num_inputs:
        raise ProbeError(
            f"--width {width} is below the {num_inputs} pixels of an image, and of fewer features √det g is 0.\n"
            f"Write --width {num_inputs} or more."
        )
    here = data.to(settings.device)

    def model() -> nn.Module:
        if settings.papers:
            return PaperNetwork(num_inputs, width, 10).to(dtype)
        parts = {"flatten": nn.Flatten(), "hidden": nn.Linear(num_inputs, width), "sigmoid": nn.Sigmoid()}
        return nn.Sequential(OrderedDict(parts, readout=nn.Linear(width, 10))).to(dtype)

    def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return Adam(parameters, lr=0.001) if settings.papers else SGD(parameters, lr=0.001, momentum=0.9)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(here.train_images[batch]), here.train_labels[batch])

    return Training(
        data.name,
        model=model,
        loss=loss,
        optimizer=optimizer,
        num_samples=len(here.train_labels),
        batch_size=1000 if settings.papers else 64,
        epochs=epochs,
        snapshots=snapshots,
        evaluate=lambda model: {
            "train_accuracy": accuracy(model, here.train_images, here.train_labels),
            "test_accuracy": accuracy(model, here.test_images, here.test_labels),
        },
        describe={
            "data": data.name,
            "width": width,
            "activation": "sigmoid",
            "learning_rate": 0.001,
            "optimizer": "Adam" if settings.papers else "SGD, momentum 0.9",
            "dtype": str(dtype).removeprefix("torch."),
        },
    )


def views(data: Images, *, grid: int) -> tuple[View, View]:
    """The line from a 7 to a 6 (4 points for one of the plane's side) and the plane of a 7, a 6 and a 1."""
    exact = {"layers": [LAYER], "estimator": Exact()}
    (line,) = data.lines(4 * grid).values()
    return View("line", line, exact, data.class_names), View("plane", data.plane(grid), exact, data.class_names)


def watch(data: Images, of: Training) -> dict[str, Any]:
    """√det g at 32 test images, some 40 times in the training."""
    every = max(1, of.epochs * of.steps_per_epoch // 40)
    samples = {"x_probe": data.test_images[:32], "labels": data.test_labels[:32]}
    return {**samples, "layers": [LAYER], "estimator": Exact(), "every": every}


def fig2(results: Results) -> None:
    """Train, scan the line and the plane at epochs 0 … 200, test and draw.

    Raises:
        ProbeError: MNIST cannot be had; whatever ``train`` refuses.
    """
    settings = results.settings
    if settings.papers:
        instead = "torchgeom-probe reproduce fig2 --preset embedded"
        data = load_mnist(settings.data_root, instead=instead).to("cpu", torch.float64)
    else:
        data = load_digits(settings.seed)
    epochs = settings.epochs or (10 if settings.quick else 200)
    width = settings.choose(embedded=512, paper=2000, quick=max(128, data.train_images[0].numel()))
    of = training(data, width=width, epochs=epochs, snapshots=(1, 10, 50), settings=settings)
    line, plane = views(data, grid=12 if settings.quick else 40)
    trained = results.train(of, [line, plane], watch=watch(data, of))
    results.test(trained, line)
    results.test(trained, plane)
    results.picture("line", drawn(line, trained.scans(line), title=LINE), gallery=True)
    results.picture("plane", drawn(plane, trained.scans(plane, trained.three), title=PLANE), gallery=True)
    results.animation("plane", frames(plane, trained.scans(plane), title=PLANE))


def demo(
    settings: Settings,
    *,
    data: Literal["digits", "mnist"] = "digits",
    width: int | None = None,
    grid: int = 40,
    say: Say = print,
) -> None:
    """Learn digits while a Monitor follows the optimizer; draw the scans before and after.

    Under the settings' ``out`` go ``events/`` (TensorBoard), ``geometry.csv``, ``report.csv``, ``report.json``,
    ``line.png``, ``plane.png``, scans, and networks (``epoch_*.pt``).  A demo that was stopped goes on; a
    quick one of other settings is replaced.

    Args:
        settings: the command line's; 200 epochs where they give none.
        data: scikit-learn's digits (8x8, offline), or MNIST through torchvision.
        width: sigmoid units; at least as many as pixels, or g is singular.  None: 512 for digits, 2000 for MNIST.
        grid: points along each side of the plane.
        say: prints a line.

    Raises:
        ProbeError: a full demo of other settings in the folder, a width below the number of pixels, data that cannot be
            had, a missing optional package.
    """
    began, out, epochs = time.perf_counter(), settings.out, settings.epochs or 200
    if width is None:
        width = {"digits": 512, "mnist": 2000}[data]
    if settings.quick:
        width, epochs, grid = min(width, 128), min(epochs, 10), min(grid, 12)
    if data == "digits":
        images = load_digits(settings.seed)
    else:
        images = load_mnist(settings.data_root, instead="torchgeom-probe demo --data digits")
    of = training(images, width=width, epochs=epochs, snapshots=(1, epochs // 2), settings=settings)
    watched, num_inputs = watch(images, of), images.train_images[0].numel()
    say(
        f"{len(images.train_labels)} training and {len(images.test_labels)} test images of {num_inputs} pixels; "
        f"one hidden layer of {width} sigmoid units; √det g of it at {len(watched['x_probe'])} test images, "
        f"all {num_inputs} directions."
    )
    line, plane = views(images, grid=grid)
    trained = train(of, settings, views=[line, plane], watch=watched, folder=out, say=say)
    for row in trained.history[1:]:
        say(f"epoch {row['epoch']}: test accuracy {row['test_accuracy']:.3f}")

    x, exact = watched["x_probe"].to(settings.device), Exact()
    first, last = (measure(trained.model(epoch), x, layers=[LAYER], estimator=exact) for epoch in (0, epochs))
    say(f"\nAt the probed test images, before training:\n{first.summary()}")
    say(f"\nAfter training:\n{last.summary()}\n")
    last.to_csv(out / "report.csv")
    last.to_json(out / "report.json")

    for view, title in ((line, f"log {LINE}"), (plane, PLANE)):
        before, after = (trained.scan(view, epoch) for epoch in (0, epochs))
        before.save(out / f"{view.name}_before.safetensors")
        after.save(out / f"{view.name}_after.safetensors")
        scans = {"before training": before, "after training": after}
        save(drawn(view, scans, unit="nat", title=title), out / f"{view.name}.png")
        say(f"On the {view.name}: {after.magnification(LAYER, initial=before, seed=settings.seed)}.")
    written = ", ".join(str(out / name) for name in ("line.png", "plane.png", "geometry.csv", "report.json"))
    say(f"\nWrote {written} in {time.perf_counter() - began:.0f} s.")
    say(f"Watch the training:  tensorboard --logdir {out / 'events'}")
