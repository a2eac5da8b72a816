"""``reproduce regimes``: lazy and rich training told apart by how far each layer's metric moves.

A tanh network in NTK parametrisation learns digits as F = α (f - f₀), loss |F - y|²/α² (Chizat, Oyallon and Bach,
arXiv:1812.07956).  A large α is lazy: the weights hardly move, and the metric's distance falls as 1/α.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev, vmap

from torchgeom_probe.monitor.drift import Drift
from torchgeom_probe.plotting.style import BLUE, Figure, finish, new_figure
from torchgeom_probe.reproduce.data import load_digits
from torchgeom_probe.reproduce.results import Results
from torchgeom_probe.shapes import Tensor

ALPHAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
LAYER = "hidden2"


class Scaled(nn.Module):
    """A linear layer of N(0, 1) weights, divided by √inputs in the forward pass: the NTK parametrisation."""

    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.scale = gain / math.sqrt(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, outputs]."""
        return F.linear(x, self.weight * self.scale)


class Network(nn.Module):
    """Two hidden layers of tanh units."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden1 = nn.Sequential(Scaled(64, width, 2.0), nn.Tanh())
        self.hidden2 = nn.Sequential(Scaled(width, width, 1.5), nn.Tanh())
        self.readout = Scaled(width, 10, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 10]."""
        return self.readout(self.hidden2(self.hidden1(x)))


def tangent_kernel(model: nn.Module, x: Tensor) -> Tensor:
    """The empirical NTK of the summed outputs, [B, B]."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    rows = vmap(jacrev(lambda p, sample: functional_call(model, p, (sample[None],)).sum()), (None, 0))(parameters, x)
    flat = torch.cat([part.flatten(1) for part in rows.values()], 1)
    return flat @ flat.T


def learn(model: nn.Module, x: Tensor, y: Tensor, alpha: float, steps: int) -> None:
    """Full-batch descent with momentum to a loss of 0.02; a step that diverges is taken back, and the rate halved."""
    start, rate, best, kept = model(x).detach(), 1.0, math.inf, copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(steps):
        loss = (alpha * (model(x) - start) - y).square().sum(1).mean() / 2
        value = loss.item()
        if not value <= 1.3 * best:
            rate, best = rate / 2, math.inf
            model.load_state_dict(kept)
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
            continue
        if value < best:
            best, kept = value, copy.deepcopy(model.state_dict())
        if value < 0.02:
            return
        optimizer.zero_grad()
        (loss / alpha**2).backward()
        optimizer.step()


def regimes(results: Results) -> None:
    """Train over α, and compare the distance of the metric with the change of the tangent kernel."""
    settings = results.settings
    width, steps = settings.choose(embedded=(256, 1500), paper=(256, 1500), quick=(64, 60))
    data, device = load_digits(settings.seed), settings.device
    x, labels = data.train_images[:500].flatten(1).to(device) / 16, data.train_labels[:500].to(device)
    y, probe = F.one_hot(labels, 10).float() - 0.1, data.test_images[:48].flatten(1).to(device) / 16
    moved: list[dict[str, float]] = []
    for alpha in ALPHAS:
        model = _network(width, settings.seed).to(device)
        drift, kernel = Drift(model, probe, layers=["hidden1", LAYER], k=8), tangent_kernel(model, probe)
        learn(model, x, y, alpha, steps)
        found = drift.measure()
        change = float((tangent_kernel(model, probe) - kernel).norm() / kernel.norm())
        row = {"alpha": alpha, "kernel": change, "volume": float(found[LAYER].volume.median().abs())}
        row |= {layer: float(layer_drift.distance.median()) for layer, layer_drift in found.items()}
        moved.append(row)
        results.say(f"α = {alpha:g}: distance of {LAYER} {row[LAYER]:.4f} nats, of the tangent kernel {change:.4f}")
    # From the last run's g₀.
    ruler = float(drift.measure(_network(width, settings.seed + 1).to(device))[LAYER].distance.median())
    results.say(f"two independent initialisations: {ruler:.3f} nats")
    lazy = [row for row in moved if row["alpha"] >= 3]
    alphas, distances = (np.log([row[name] for row in lazy]) for name in ("alpha", LAYER))
    slope = float(np.polyfit(alphas, distances, 1)[0])
    columns = {name: [row[name] for row in moved] for name in (LAYER, "volume", "kernel")}
    rank = {name: float(scipy.stats.spearmanr(columns[name], columns["kernel"])[0]) for name in (LAYER, "volume")}
    results.say(
        f"slope in the lazy end {slope:.2f}; Spearman's ρ with the change of the kernel {rank[LAYER]:.2f}, "
        f"of the volume's drift {rank['volume']:.2f}"
    )
    results.numbers["regimes"] = {"moved": moved, "ruler": ruler, "slope": slope, "spearman": rank}
    if not settings.quick:
        results.check("slope", value=abs(slope + 1), bound=0.2, what="distance ∝ 1/α in the lazy end, slope + 1")
        results.check("spearman", value=1 - rank[LAYER], bound=0.1, what="1 - Spearman's ρ with the tangent kernel")
    results.picture("distance", drawn(moved, ruler))


def _network(width: int, seed: int) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network(width)


def drawn(moved: list[dict[str, float]], ruler: float) -> Figure:
    """Distance over α, with the distance of two independent initialisations as a ruler."""
    figure = new_figure(5.2, 3.6)
    axes = figure.subplots()
    alphas = [row["alpha"] for row in moved]
    for layer, colour in (("hidden1", "#7fb2d6"), (LAYER, BLUE)):
        axes.loglog(alphas, [row[layer] for row in moved], marker="o", label=layer, color=colour)
    axes.axhline(ruler, color="0.4", linestyle="--", label="two independent initialisations")
    axes.set_xlabel("α, the scale of the output: rich on the left, lazy on the right")
    axes.set_ylabel("distance of the metric, nats")
    axes.legend(frameon=False)
    finish(
        figure, "How far training moves the metric", "rms log-eigenvalue of g₀⁻¹g on 8 directions, median of 48 digits"
    )
    return figure
