"""Figure 2: one hidden layer of sigmoid units learns digits; √det g from a 7 to a 6, and around a 7, a 6 and a 1.

``embedded``: scikit-learn's digits (8x8); ``paper``: MNIST, 2000 units, float64.  The metric is that of all pixels, so
the width is at least their number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators import Exact
from torchgeom_probe.reproduce.data.digits import Digits, load_digits, load_mnist
from torchgeom_probe.reproduce.fig1 import PaperNetwork
from torchgeom_probe.reproduce.results import Results, drawn, frames, quirks
from torchgeom_probe.reproduce.settings import Settings
from torchgeom_probe.reproduce.training import Training, View, accuracy, train
from torchgeom_probe.slices.slice import Line, Plane

TITLE = "handwritten digits learnt by one hidden layer of sigmoid units"

#: The layer that is measured: the feature map of the paper, Φ(x) = φ(Wx + b).
LAYER = "sigmoid"

CLASS_NAMES = tuple("0123456789")

LINE, PLANE = "√det g on the line from a 7 to a 6", "The plane of a 7, a 6 and a 1"

QUIRKS = quirks("""
pixels are not rescaled: 0 to 255 for MNIST
-> kept (0 to 16 for scikit-learn's digits): a volume element is per unit of its input space

the network is trained and measured in float64
-> kept for --preset paper; float32 for the embedded digits, whose log-volumes float32 holds to 1e-5 (fig1's check)

the plane of the MNIST figure leaves its origin out, so it does not pass through the three images
-> mended: x = mean + u (b - a) + v 2√3 ((a + b)/2 - mean), which holds a, b and c

the line takes t = i / steps and never reaches its far end
-> mended: both ends are points of the line

entropies are in base 10, volumes in log10
-> entropies in nats (a factor 2.303 that no rank or contour sees); pictures of volumes in log10, statistics in nats

a singular value below a threshold counts as 1 (its log10 as 0), and -inf times 0 gives NaN
-> mended: a singular metric has log-volume -inf, is dropped from the statistics, and counted there

the three images are drawn at random from training and test set together
-> the test image nearest to its class's mean is taken: no draw, no look at any network, nothing that was trained on

all weights and biases start as N(0, 1) numbers, and the readout is divided by √width; with pixels up to 255 most
units are saturated, so √det g underflows in places
-> kept for --preset paper; the embedded digits start with torch's own initialisation, under which no unit saturates

the text has lr 0.001 for 200 epochs; the scripts at hand Adam, lr 0.001 or 0.01, batches of 12, 200 or 1000
-> --preset paper: Adam, lr 0.001, batches of 1000, 200 epochs; the embedded digits: SGD, lr 0.001, momentum 0.9,
batches of 64, 200 epochs

the volume on images is the sum over the top k singular values, k = 784, 10 or 6 from one script to another
-> all of them, √det g itself (estimator Exact)
""")


def network(num_inputs: int, width: int) -> nn.Sequential:
    """Make the paper's network: one hidden layer of sigmoid units and a linear readout."""
    return nn.Sequential(
        OrderedDict(hidden=nn.Linear(num_inputs, width), sigmoid=nn.Sigmoid(), readout=nn.Linear(width, 10))
    )


def training(
    data: Digits, *, width: int, epochs: int, snapshots: Sequence[int], settings: Settings, name: str
) -> Training:
    """Digits learnt as QUIRKS says: for the preset ``paper`` by Adam, else by SGD with momentum; learning rate 0.001.

    Raises:
        ProbeError: fewer units than pixels: g is singular.
    """
    num_inputs, dtype = data.train_images.shape[1], data.train_images.dtype
    if width < num_inputs:
        raise ProbeError(
            f"--width {width} is below the {num_inputs} pixels of an image: with fewer features than inputs √det g is "
            f"zero.\n"
            f"Write --width {num_inputs} or more."
        )
    here = data.to(settings.device)

    def model() -> nn.Module:
        made = PaperNetwork(num_inputs, width, 10) if settings.papers else network(num_inputs, width)
        return made.to(dtype)

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        if settings.papers:
            return torch.optim.Adam(parameters, lr=0.001)
        return torch.optim.SGD(parameters, lr=0.001, momentum=0.9)

    return Training(
        name,
        model=model,
        loss=lambda model, batch: nn.functional.cross_entropy(
            model(here.train_images[batch]), here.train_labels[batch]
        ),
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
            "data": name,
            "width": width,
            "activation": "sigmoid",
            "learning_rate": 0.001,
            "optimizer": "Adam" if settings.papers else "SGD, momentum 0.9",
            "dtype": str(dtype).removeprefix("torch."),
        },
    )


def views(data: Digits, *, grid: int, epochs: Sequence[int] | None = None) -> tuple[View, View]:
    """The line from a 7 to a 6 (4 points for one of the plane's side) and the plane of a 7, a 6 and a 1."""
    seven, six, one = (data.typical(label) for label in (7, 6, 1))
    pictures = [sample.reshape(data.side, data.side) for sample in (seven, six, one)]
    exact = {"layers": [LAYER], "estimator": Exact()}
    plane = View("plane", Plane(seven, six, one, steps=grid), exact, None, epochs, CLASS_NAMES, pictures)
    line = Line(seven, six, steps=4 * grid)
    return replace(plane, name="line", slice=line, images=pictures[:2]), plane


def watch(data: Digits, of: Training) -> dict[str, Any]:
    """√det g at 32 test images, some 40 times in the training."""
    every = max(1, of.epochs * of.steps_per_epoch // 40)
    return {"x_probe": data.test_images[:32], "layers": [LAYER], "estimator": Exact(), "every": every}


def run(results: Results) -> None:
    """Train, scan the line and the plane at epochs 0 … 200, test and draw.

    Raises:
        ProbeError: MNIST cannot be had; whatever ``train`` refuses.
    """
    settings, name = results.settings, "mnist" if results.settings.papers else "digits"
    if settings.papers:
        instead = "torchgeom-probe reproduce fig2 --preset embedded"
        data = load_mnist(settings.data_root, instead=instead).to("cpu", torch.float64)
    else:
        data = load_digits(settings.seed)
    epochs = settings.epochs or (10 if settings.quick else 200)
    width = settings.choose(embedded=512, paper=2000, quick=max(128, data.train_images.shape[1]))
    of = training(data, width=width, epochs=epochs, snapshots=(1, 10, 50), settings=settings, name=name)
    line, plane = views(data, grid=12 if settings.quick else 40)
    trained = train(of, settings, views=[line, plane], watch=watch(data, of), say=results.say)
    results.training(trained)
    results.say(f"{name}: test accuracy {trained.history[-1]['test_accuracy']:.3f} after {epochs} epochs")
    results.test(trained, line)
    results.test(trained, plane)
    results.picture("line", drawn(line, trained.scans(line), title=LINE), gallery=True)
    three = trained.scans(plane, trained.three)
    results.picture("plane", drawn(plane, three, title=PLANE), gallery=True)
    results.animation("plane", frames(plane, trained.scans(plane), title=f"{PLANE}, {{}}"))
