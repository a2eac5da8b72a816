"""Figure 2: one hidden layer of sigmoid units learns handwritten digits; √det g from a 7 to a 6, and around a 7, a 6 and a 1.

``embedded``: scikit-learn's digits (8x8); ``paper``: MNIST, 2000 units, float64.  The metric is that of all pixels, so the
width is at least their number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.estimators import Exact
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.reproduce.data.digits import Digits, load_digits, load_mnist
from torchgeom_probe.reproduce.fig1 import PaperNetwork
from torchgeom_probe.reproduce.run import Results, Say, Settings, Training, View, Watch, train
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.slice import Line, Plane

TITLE = "handwritten digits learnt by one hidden layer of sigmoid units"

#: The layer that is measured: the feature map of the paper, Φ(x) = φ(Wx + b).
LAYER = "sigmoid"

CLASS_NAMES = tuple(str(i) for i in range(10))

QUIRKS = (
    {
        "quirk": "pixels are not rescaled: 0 to 255 for MNIST",
        "decision": "kept (0 to 16 for scikit-learn's digits): a volume element is per unit of its input space",
    },
    {
        "quirk": "the network is trained and measured in float64",
        "decision": "kept for --preset paper; float32 for the embedded digits, whose log-volumes float32 holds to 1e-5 (fig1's check)",
    },
    {
        "quirk": "the plane of the MNIST figure leaves its origin out, so it does not pass through the three images",
        "decision": "mended: x = mean + u (b - a) + v 2√3 ((a + b)/2 - mean), which holds a, b and c",
    },
    {
        "quirk": "the line takes t = i / steps and never reaches its far end",
        "decision": "mended: both ends are points of the line",
    },
    {
        "quirk": "entropies are in base 10, volumes in log10",
        "decision": "entropies in nats (a factor 2.303 that no rank or contour sees); pictures of volumes in log10, statistics in nats",
    },
    {
        "quirk": "a singular value below a threshold counts as 1 (its log10 as 0), and -inf times 0 gives NaN",
        "decision": "mended: a singular metric has log-volume -inf, is dropped from the statistics, and counted there",
    },
    {
        "quirk": "the three images are drawn at random from training and test set together",
        "decision": "the test image nearest to its class's mean is taken: no draw, no look at any network, nothing that was trained on",
    },
    {
        "quirk": "all weights and biases start as N(0, 1) numbers, and the readout is divided by √width; with pixels up to 255 most "
        "units are saturated, so √det g underflows in places",
        "decision": "kept for --preset paper; the embedded digits start with torch's own initialisation, under which no unit saturates",
    },
    {
        "quirk": "the text has lr 0.001 for 200 epochs; the scripts at hand Adam, lr 0.001 or 0.01, batches of 12, 200 or 1000",
        "decision": "--preset paper: Adam, lr 0.001, batches of 1000, 200 epochs; the embedded digits: SGD, lr 0.001, momentum 0.9, "
        "batches of 64, 200 epochs",
    },
    {
        "quirk": "the volume on images is the sum over the top k singular values, k = 784, 10 or 6 from one script to another",
        "decision": "all of them, √det g itself (estimator Exact)",
    },
)


def network(num_inputs: int, width: int) -> nn.Sequential:
    """Make the paper's network: one hidden layer of sigmoid units and a linear readout."""
    return nn.Sequential(
        OrderedDict(hidden=nn.Linear(num_inputs, width), sigmoid=nn.Sigmoid(), readout=nn.Linear(width, 10))
    )


def training(
    data: Digits,
    *,
    width: int,
    epochs: int,
    snapshots: Sequence[int],
    settings: Settings,
    name: str,
    dtype: torch.dtype = torch.float32,
) -> Training:
    """Digits learnt as QUIRKS says: for the preset ``paper`` by Adam, else by SGD with momentum; learning rate 0.001.

    Raises:
        ProbeError: fewer units than pixels: g is singular.

    """
    num_inputs = data.train_images.shape[1]
    if width < num_inputs:
        raise ProbeError(
            f"--width {width} is below the {num_inputs} pixels of an image: with fewer features than inputs √det g is zero.\n"
            f"Write --width {num_inputs} or more."
        )
    parts = {
        "train": (data.train_images.to(settings.device, dtype), data.train_labels.to(settings.device)),
        "test": (data.test_images.to(settings.device, dtype), data.test_labels.to(settings.device)),
    }
    images, labels = parts["train"]
    papers = settings.preset == "paper"

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        if papers:
            return torch.optim.Adam(parameters, lr=0.001)
        return torch.optim.SGD(parameters, lr=0.001, momentum=0.9)

    def accuracies(model: nn.Module) -> dict[str, float]:
        return {
            f"{part}_accuracy": (model(x).argmax(1) == y).double().mean().item()
            for part, (x, y) in parts.items()
        }

    return Training(
        name,
        model=lambda: (PaperNetwork(num_inputs, width, 10) if papers else network(num_inputs, width)).to(
            dtype
        ),
        loss=lambda model, batch: nn.functional.cross_entropy(model(images[batch]), labels[batch]),
        optimizer=optimizer,
        num_samples=len(labels),
        batch_size=1000 if papers else 64,
        epochs=epochs,
        snapshots=snapshots,
        evaluate=accuracies,
        describe={
            "data": name,
            "width": width,
            "activation": "sigmoid",
            "learning_rate": 0.001,
            "optimizer": "Adam" if papers else "SGD, momentum 0.9",
            "dtype": str(dtype).removeprefix("torch."),
        },
    )


def views(
    data: Digits, *, grid: int, dtype: torch.dtype = torch.float32, epochs: Sequence[int] | None = None
) -> tuple[View, View]:
    """The line from a 7 to a 6 (4 points for one of the plane's side) and the plane of a 7, a 6 and a 1."""
    seven, six, one = (data.typical(label).to(dtype) for label in (7, 6, 1))
    pictures: list[Tensor] = [image.reshape(data.side, data.side) for image in (seven, six, one)]
    line, plane = Line(seven, six, steps=4 * grid), Plane(seven, six, one, steps=grid)
    options = {"layers": [LAYER], "estimator": Exact(), "epochs": epochs, "class_names": CLASS_NAMES}
    return (
        View("line", line, images=pictures[:2], **options),  # type: ignore[arg-type]
        View("plane", plane, images=pictures, **options),  # type: ignore[arg-type]
    )


def watch(data: Digits, of: Training, *, dtype: torch.dtype = torch.float32) -> Watch:
    """√det g at 32 test images, some 40 times in the training."""
    steps = of.epochs * of.steps_per_epoch
    return Watch(
        data.test_images[:32].to(dtype), layers=[LAYER], estimator=Exact(), every=max(1, steps // 40)
    )


def run(settings: Settings, say: Say = print) -> Results:
    """Train, scan the line and the plane at epochs 0 … 200, test and draw.

    Raises:
        ProbeError: MNIST cannot be had; whatever ``train`` refuses.
    """
    optional("matplotlib", extra="figures")
    results = Results("fig2", TITLE, settings, quirks=QUIRKS, say=say)
    if settings.preset == "embedded":
        name, data, dtype = "digits", load_digits(settings.seed), torch.float32
    else:
        name, dtype = "mnist", torch.float64
        data = load_mnist(settings.data_root, instead="torchgeom-probe reproduce fig2 --preset embedded")
    epochs = settings.epochs or settings.choose(embedded=200, paper=200, quick=10)
    shown = sorted({0, *(e for e in (1, 10, 50) if e < epochs), epochs})
    of = training(
        data,
        width=settings.choose(embedded=512, paper=2000, quick=max(128, data.train_images.shape[1])),
        epochs=epochs,
        snapshots=shown,
        settings=settings,
        name=name,
        dtype=dtype,
    )
    line, plane = views(data, grid=settings.choose(embedded=40, paper=40, quick=12), dtype=dtype)
    trained = train(of, settings, views=[line, plane], watch=watch(data, of, dtype=dtype), say=say)
    results.training(trained)
    say(f"{name}: test accuracy {trained.history[-1]['test_accuracy']:.3f} after {epochs} epochs")
    for view in (line, plane):
        results.test(trained, view)
    names = [f"epoch {epoch}" for epoch in trained.epochs]
    on_line, on_plane = ([trained.scan(view, epoch) for epoch in trained.epochs] for view in (line, plane))
    # Training moves the level of log √det g by more than its pattern's range: each map is shown about its median.
    options = {"class_names": CLASS_NAMES, "unit": "log10", "relative": True}
    drawn = plot(
        on_line, names=names, images=line.images, title="√det g on the line from a 7 to a 6", **options
    )
    results.picture("line", drawn, gallery=True)
    options["log_entropy"] = True
    chosen = [0, len(names) // 2, len(names) - 1]
    drawn = plot(
        [on_plane[i] for i in chosen],
        names=[names[i] for i in chosen],
        images=plane.images,
        title="The plane of a 7, a 6 and a 1",
        **options,
    )
    results.picture("plane", drawn, gallery=True)
    results.animation(
        "plane",
        (
            plot(
                [scan],
                like=on_plane,
                images=plane.images,
                title=f"The plane of a 7, a 6 and a 1, {name}",
                **options,
            )
            for name, scan in zip(names, on_plane, strict=True)
        ),
    )
    return results.finish()
