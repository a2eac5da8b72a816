"""``torchgeom-probe demo``: the paper's shallow-network experiment on real handwritten digits, from data to figures.

One hidden layer of sigmoid units learns to tell digits apart while a Monitor follows its optimizer; then √det g is drawn along the line
from a 7 to a 6 and over the plane of a 7, a 6 and a 1, before and after training.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.estimators import Exact
from torchgeom_probe.monitor import Monitor
from torchgeom_probe.probe import measure
from torchgeom_probe.report import CSVWriter
from torchgeom_probe.shapes import Float, Int, Tensor
from torchgeom_probe.slices import Line, Plane, SliceScan, scan

#: The layer that is measured: the feature map of the paper, Φ(x) = φ(Wx + b).
LAYER = "sigmoid"


@dataclass(frozen=True, eq=False)
class Digits:
    """Images [N, pixels] with their labels, split into a training and a test part.

    Pixels are not rescaled (0 to 16; MNIST 0 to 255), as in the paper: a volume element is per unit of ITS input space.
    """

    train_images: Float[Tensor, "train pixels"]
    train_labels: Int[Tensor, " train"]
    test_images: Float[Tensor, "test pixels"]
    test_labels: Int[Tensor, " test"]

    @property
    def side(self) -> int:
        """Pixels along one side of an image."""
        return round(self.train_images.shape[1] ** 0.5)


def load_digits(seed: int) -> Digits:
    """Read scikit-learn's 1797 handwritten digits, 8x8 pixels, carried in its wheel: no download."""
    bunch = optional("sklearn.datasets", extra="figures").load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float32)
    labels = torch.tensor(bunch.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1437], order[1437:]
    return Digits(images[train], labels[train], images[test], labels[test])


def load_mnist(root: Path) -> Digits:
    """Read MNIST through torchvision, from ``root`` or fetched there.

    Raises:
        ProbeError: it is neither there nor to be had, with what to do.
    """
    datasets = optional("torchvision.datasets", extra="figures")
    try:
        train, test = (datasets.MNIST(str(root), train=part, download=True) for part in (True, False))
    except (
        Exception
    ) as error:  # torchvision raises what its mirrors raise: URLError, RuntimeError, OSError, …
        raise ProbeError(
            f"MNIST is not under {root} and could not be fetched ({type(error).__name__}: {error}).\n"
            f"Copy its four files into {root / 'MNIST' / 'raw'} (train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
            "t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz) and run this again, or use the digits that scikit-learn carries: "
            " torchgeom-probe demo --data digits"
        ) from error
    images = [part.data.flatten(1).float() for part in (train, test)]
    return Digits(images[0], train.targets.long(), images[1], test.targets.long())


def shallow_network(num_inputs: int, width: int) -> nn.Sequential:
    """Make the paper's network: one hidden layer of sigmoid units and a linear readout."""
    return nn.Sequential(
        OrderedDict(hidden=nn.Linear(num_inputs, width), sigmoid=nn.Sigmoid(), readout=nn.Linear(width, 10))
    )


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
            the scans, and the network's ``checkpoint.pt``.
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
    tensorboard = optional("torchgeom_probe.integrations.tensorboard", extra="tensorboard")
    figures = optional("torchgeom_probe.figures", extra="figures")
    optional("matplotlib", extra="figures")
    if width is None:
        width = {"digits": 512, "mnist": 2000}[data]
    if quick:
        width, epochs, grid = min(width, 128), min(epochs, 10), min(grid, 12)
    digits = load_digits(seed) if data == "digits" else load_mnist(data_root)
    num_inputs = digits.train_images.shape[1]
    if width < num_inputs:
        raise ProbeError(
            f"--width {width} is below the {num_inputs} pixels of an image: with fewer features than inputs √det g is zero.\n"
            f"Write --width {num_inputs} or more."
        )
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = shallow_network(num_inputs, width).to(device)
    untrained = copy.deepcopy(model)
    probed = digits.test_images[:32].to(device)
    say(
        f"{len(digits.train_labels)} training and {len(digits.test_labels)} test images of {num_inputs} pixels; "
        f"one hidden layer of {width} sigmoid units; √det g of it at {len(probed)} test images, all {num_inputs} directions."
    )
    writers = [tensorboard.TensorBoardWriter(out / "events"), CSVWriter(out / "geometry.csv")]
    accuracy = _train(model, digits, probed=probed, writers=writers, epochs=epochs, seed=seed)
    torch.save(model.state_dict(), out / "checkpoint.pt")
    for epoch in accuracy:
        say(epoch)

    report = measure(model, probed, layers=[LAYER], estimator=Exact())
    start = measure(untrained, probed, layers=[LAYER], estimator=Exact())
    say("\nAt the probed test images, before training:\n" + start.summary())
    say("\nAfter training:\n" + report.summary())
    report.to_csv(out / "report.csv")
    report.to_json(out / "report.json")

    seven, six, one = (_typical(digits, label) for label in (7, 6, 1))
    line, plane = Line(seven, six, steps=4 * grid), Plane(seven, six, one, steps=grid)
    options: dict[str, Any] = {"class_names": [str(i) for i in range(10)], "relative": True}
    pictures = [image.reshape(digits.side, digits.side) for image in (seven, six, one)]
    scans: dict[str, tuple[SliceScan, SliceScan]] = {}
    slices: dict[str, Line | Plane] = {"line": line, "plane": plane}
    for name, slice in slices.items():
        before, after = (
            scan(network, slice, layers=[LAYER], estimator=Exact()) for network in (untrained, model)
        )
        before.save(out / f"{name}_before.safetensors")
        after.save(out / f"{name}_after.safetensors")
        scans[name] = before, after
    drawn = figures.plot_line(
        *scans["line"], images=pictures[:2], title="log √det g on the line from a 7 to a 6", **options
    )
    figures.save(drawn, out / "line.png")
    drawn = figures.plot_plane(
        *scans["plane"], images=pictures, log_entropy=True, title="The plane of a 7, a 6 and a 1", **options
    )
    figures.save(drawn, out / "plane.png")

    found = {
        name: after.magnification(LAYER, initial=before, seed=seed) for name, (before, after) in scans.items()
    }
    say("")
    for name, statistic in found.items():
        say(f"On the {name}: {statistic}.")
    seconds = time.perf_counter() - began
    say(
        f"\nWrote {out / 'line.png'}, {out / 'plane.png'}, {out / 'geometry.csv'}, {out / 'report.json'} in {seconds:.0f} s."
    )
    say(f"Watch the training:  tensorboard --logdir {out / 'events'}")
    statistics = report[LAYER].statistics()
    return {
        "train_accuracy": _accuracy(model, digits.train_images, digits.train_labels),
        "test_accuracy": _accuracy(model, digits.test_images, digits.test_labels),
        "log_volume": statistics["median"],
        "log_volume_before": start[LAYER].statistics()["median"],
        "rho": float(found["plane"].rho),
        "p_value": float(found["plane"].p_value),
        "seconds": seconds,
    }


def _train(
    model: nn.Module,
    digits: Digits,
    *,
    probed: Tensor,
    writers: list,
    epochs: int,
    seed: int,
    batch_size: int = 64,
) -> list[str]:
    """Train as the paper does (SGD, learning rate 0.001); the monitor follows the optimizer, so this loop knows nothing of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    count = len(digits.train_labels)
    steps = epochs * -(-count // batch_size)
    lines = []
    with (
        Monitor(
            model, probed, layers=[LAYER], estimator=Exact(), every=max(1, steps // 40), writer=writers
        ).follow(optimizer),
        tqdm(total=epochs, desc="train", unit="epoch", disable=None) as bar,
    ):
        for epoch in range(epochs):
            for batch in torch.randperm(count, generator=generator).split(batch_size):
                images, labels = (
                    t[batch].to(probed.device) for t in (digits.train_images, digits.train_labels)
                )
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
            bar.update()
            if epoch + 1 in {1, epochs // 2, epochs}:
                on_test = _accuracy(model, digits.test_images, digits.test_labels)
                lines.append(f"epoch {epoch + 1}: test accuracy {on_test:.3f}")
    return lines


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    device = next(model.parameters()).device
    return (model(images.to(device)).argmax(1).cpu() == labels).double().mean().item()


def _typical(digits: Digits, label: int) -> Tensor:
    """The test image nearest to its class's mean: a clear one, chosen without looking at any network."""
    images = digits.test_images[digits.test_labels == label]
    return images[(images - images.mean(0)).norm(dim=1).argmin()]
