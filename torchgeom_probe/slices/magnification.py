"""One slice as an illustration: how a layer's log-volume goes with the predictive entropy over it.

A line or plane holds a handful of independent points, however fine its grid: it shows, and tests nothing.  Whether a
layer magnifies near decision boundaries is asked over many pairs of samples (:func:`torchgeom_probe.boundary_study`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy  # its submodules are loaded when they are first used: importing this costs little

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Float, Int, Tensor

_LEAST_POINTS = 16
# Nats.  A volume that varies by less is that of an affine map in float32: its pattern is rounding.
_CONSTANT = 1e-5


@dataclass(frozen=True)
class Magnification:
    """How a layer's log-volume goes with the entropy over ONE slice; ``str()`` says it, and how many points that is.

    Attributes:
        name: what the sentence calls the layer.
        rho: Spearman's rank correlation of log-volume and entropy; ``nan`` where the log-volume is constant.
        decile_gap: mean log-volume where the entropy is in its top decile minus the mean elsewhere, NATURAL log.
        effective_points: how many independent points the slice amounts to, for ``rho``.
        num_points: points with a finite log-volume and entropy; only they count.
        num_dropped: the other points.
        num_classes: classes predicted on the slice.
        initial: the same of the untrained network's log-volume against the SAME entropy, or None.
    """

    name: str
    rho: float
    decile_gap: float
    effective_points: float
    num_points: int
    num_dropped: int
    num_classes: int
    initial: Magnification | None = None

    def __str__(self) -> str:
        remarks = [f"{self.name}, on this one slice, {self._numbers()}"]
        if self.initial is not None:
            remarks.append(f"the untrained network: {self.initial._numbers()}")
        if self.num_classes == 1:
            remarks.append("one class is predicted, so no boundary crosses it")
        if self.num_dropped:
            remarks.append(f"{self.num_dropped} of {self.num_points + self.num_dropped} points dropped as not finite")
        count = f"about {self.effective_points:.0f} independent points" if not math.isnan(self.rho) else "no test"
        return "; ".join([*remarks, f"an illustration, of {count}"])

    def _numbers(self) -> str:
        if math.isnan(self.rho):
            return "log-volume the same everywhere"
        return f"ρ = {self.rho:.2f} with the entropy, {self.decile_gap:+.2g} nats in its top decile"


def magnification(
    log_volume: Float[Tensor, " *slice"],
    entropy: Float[Tensor, " *slice"],
    predictions: Int[Tensor, " *slice"],
    *,
    initial: Float[Tensor, " *slice"] | None = None,
    name: str = "this layer",
) -> Magnification:
    """Describe how the log-volume goes with the entropy over a slice [T] or [H, W], beside the untrained network's.

    Points where one of the two is not finite are dropped and counted.

    Raises:
        ProbeError: fewer than 16 finite points, or a constant entropy.

    >>> import torch
    >>> x, y = torch.meshgrid(torch.linspace(-1, 1, 30), torch.linspace(-1, 1, 30), indexing="xy")
    >>> entropy = torch.exp(-(((x - 0.6 * torch.sin(4 * y)) / 0.3) ** 2))
    >>> found = magnification(2 * entropy + 0.1 * torch.cos(9 * y), entropy, (x > 0).long())
    >>> assert found.rho > 0.9 and found.decile_gap > 1 and "an illustration, of about" in str(found)
    """
    before = None
    if initial is not None:
        before = magnification(initial, entropy, predictions, name="the untrained network")
    volume, undecided = (field.detach().cpu().double().numpy() for field in (log_volume, entropy))
    kept = np.isfinite(volume) & np.isfinite(undecided)
    count = int(kept.sum())
    if count < _LEAST_POINTS:
        raise ProbeError(
            f"{name}: only {count} of {kept.size} points have a finite log-volume and entropy; at least "
            f"{_LEAST_POINTS} are needed.\n"
            "A log-volume of -inf everywhere is a singular metric.  Scan it with fewer directions, or write:  "
            "scan(model, plane, estimator=TopK(k=2))"
        )
    v, h = volume[kept], undecided[kept]
    if np.ptp(h) == 0:
        raise ProbeError(
            f"{name}: the entropy is {h[0]:.3g} at every point, so there is no more and less decided to compare.\n"
            "Take a slice through samples of different classes:  Plane(x[0], x[1], x[2])"
        )
    rho, gap, points = math.nan, 0.0, float(count)
    if np.ptp(v) >= _CONSTANT:
        rho = float(scipy.stats.spearmanr(v, h).statistic)
        points = _independent_points(volume, undecided, kept)
        top = h >= np.quantile(h, 0.9)
        if top.all():  # nine tenths of the points tie at the least entropy, as when a softmax saturates
            top = h > h.min()
        gap = float(v[top].mean() - v[~top].mean())
    classes = predictions[predictions >= 0].unique()
    return Magnification(name, rho, gap, points, count, kept.size - count, len(classes), before)


def _independent_points(a: np.ndarray, b: np.ndarray, kept: np.ndarray) -> float:
    """How many independent points two fields amount to, for the correlation r of their ranks.

    1 + 1 / Var r, with Var r ≈ Σ_lag C_a(lag) C_b(lag) / N(lag) / (C_a(0) C_b(0)), C(lag) the sum of a field's products
    over the N(lag) pairs of kept points at a lag.

    Source: Clifford, Richardson and Hémon, Biometrics 45 (1989).
    """

    def products(field: np.ndarray) -> np.ndarray:
        shape = [2 * size for size in field.shape]  # zeros behind it: no lag wraps it onto itself
        axes = range(field.ndim)
        return np.fft.irfftn(np.abs(np.fft.rfftn(field, shape, axes)) ** 2, shape, axes)

    ranks = np.zeros((2, *a.shape))
    for field, values in zip(ranks, (a, b), strict=True):
        field[kept] = scipy.stats.rankdata(values[kept]) - (kept.sum() + 1) / 2
    pairs = products(kept.astype(float)).round()
    seen = pairs > 0
    variance = (products(ranks[0])[seen] * products(ranks[1])[seen] / pairs[seen]).sum()
    variance /= np.square(ranks[0]).sum() * np.square(ranks[1]).sum()
    return min(float(kept.sum()), float(1 + 1 / max(variance, 1e-300)))
