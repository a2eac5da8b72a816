"""Whether a layer magnifies near the decision boundary: the test on one slice, a line or a plane.

The hypothesis is that training makes the log-volume l(x) of a feature map large where the prediction is undecided.
Its label-free measure of "undecided" is the predictive entropy H(x).  Three statistics of the two fields, each beside
the same statistic of the UNTRAINED network's l against the trained H, because an untrained map may correlate by its
shape:

- ρ, Spearman's rank correlation of l and H over the slice;
- the decile gap, mean l where H is in its top decile minus mean l elsewhere, in nats;
- peak-to-boundary, how much nearer to the class change l peaks than a peak placed at random.

What none of them may be tested against: the first-order distance to the boundary r₁ = m / |∇m| has the Jacobian in its
denominator, so l correlates with -r₁ by construction.  Test against the entropy, the margin, or a distance that was
bisected (:func:`~torchgeom_probe.boundary_points`).  And shuffled labels are no null for peak-to-boundary: a network
that memorised them has boundaries too, and magnifies them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # its submodules are loaded when they are first used: importing this costs little

from torchgeom_probe.boundary.spatial import correlation_lengths, effective_points, rank_field
from torchgeom_probe.boundary.statistics import (
    Estimate,
    correlation_p_value,
    decile_gap,
    peak_to_boundary,
    shift_p_value,
)
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Float, Int, Tensor

_LEAST_POINTS = 16
# Nats.  A volume that varies by less is that of an affine map in float32: its pattern is rounding.
_CONSTANT = 1e-5


@dataclass(frozen=True)
class Magnification:
    """Whether a layer magnifies near the decision boundary, in numbers; ``str()`` says it in one sentence.

    Attributes:
        name: what the sentence calls the layer.
        rho: Spearman's rank correlation of log-volume and entropy; ``nan`` where the log-volume is constant.
        p_value: two-sided, of ``rho`` against independent fields that are as smooth as these two.
        decile_gap: mean log-volume where the entropy is in its top decile minus the mean elsewhere, NATURAL
            log (exp of it is a ratio of volumes), with a 95 % block-bootstrap interval.
        peak_to_boundary: 0 where log-volume peaks lie at random, 1 where they lie on the boundary, below 0
            where they avoid it; None without predictions or where no row or column changes class exactly
            once.
        num_points: points with a finite log-volume and entropy; only they count.
        num_dropped: the other points.
        num_segments: rows and columns (or the one line) that changed class exactly once.
        num_classes: classes predicted on the slice, or None without predictions.
        effective_points: how many independent points the two fields amount to for ``rho``.
        initial: the same statistics of the initial network's log-volume against the SAME entropy, or None.
    """

    name: str
    rho: float
    p_value: float
    decile_gap: Estimate
    peak_to_boundary: Estimate | None
    num_points: int
    num_dropped: int
    num_segments: int
    num_classes: int | None
    effective_points: float
    initial: Magnification | None = None

    @property
    def supported(self) -> bool:
        """Whether the slice supports the hypothesis for this layer; the sentence says why where it does not.

        True where the log-volume is in step with the entropy (p < 0.05, ρ > 0) and larger in its top decile, a
        boundary crosses the slice, and, where the untrained network is given, more so than before training.
        """
        more = self.initial is None or math.isnan(self.initial.rho) or self.initial.rho < self.rho
        in_step = self.p_value < 0.05 and self.rho > 0 and self.decile_gap >= 0
        return in_step and more and self.num_classes != 1

    def __str__(self) -> str:
        if math.isnan(self.rho):
            return (
                f"{self.name} has the same log-volume everywhere on the slice, so it magnifies no place more than "
                f"another{self._remarks()}"
            )
        probability = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.2g}"
        gap = f"{float(self.decile_gap):+.1f} nats"
        if self.decile_gap.interval is not None:
            gap += " [{:.1f}, {:.1f}]".format(*self.decile_gap.interval)
        return f"{self.name} {self._verdict()}: ρ = {self.rho:.2f} ({probability}), {gap}{self._remarks()}"

    def _verdict(self) -> str:
        place = "near the boundary" if self.num_classes != 1 else "where the entropy is high"
        if self.p_value >= 0.05:
            low, high = self.decile_gap.interval or (-math.inf, math.inf)
            if low > 0 or high < 0:
                side = "larger" if low > 0 else "smaller"
                return f"is mixed, {side} where the entropy is in its top decile but not in step with it"
            return f"does not measurably magnify {place}"
        if self.rho < 0:
            return f"shows the opposite, it magnifies less {place}"
        if self.decile_gap < 0:
            return "is mixed, in step with the entropy but smaller where it is in its top decile"
        if self.initial is not None and self.initial.rho >= self.rho:
            return f"magnifies {place}, but no more than before training"
        return f"magnifies {place}"

    def _remarks(self) -> str:
        remarks = []
        if self.initial is not None:
            constant = math.isnan(self.initial.rho)
            before = "constant log-volume" if constant else f"ρ = {self.initial.rho:.2f}"
            remarks.append(f"the untrained network: {before}")
        if self.num_classes == 1:
            remarks.append("the slice is of one predicted class, no boundary crosses it")
        if self.p_value >= 0.05 and self.effective_points < 10:
            remarks.append(f"the slice amounts to {self.effective_points:.0f} independent points, too few to tell")
        if self.num_dropped:
            remarks.append(f"{self.num_dropped} of {self.num_points + self.num_dropped} points dropped as not finite")
        return "".join(f"; {remark}" for remark in remarks)


def magnification(
    log_volume: Float[Tensor, " *slice"] | np.ndarray,
    entropy: Float[Tensor, " *slice"] | np.ndarray,
    *,
    initial: Float[Tensor, " *slice"] | np.ndarray | None = None,
    predictions: Int[Tensor, " *slice"] | np.ndarray | None = None,
    name: str = "this layer",
    seed: int = 0,
) -> Magnification:
    """Test whether the log-volume is large where the prediction is undecided, beside the untrained network.

    ``rho`` is Spearman's, with average ranks for ties.  Its p-value must not treat neighbouring points as
    independent. Two nulls that keep the fields' smoothness are computed, and the LARGER p-value is reported:
    (a) shifts of one field against the other over the torus of its mirror images (a plain toroidal shift
    tears a field that is not periodic at the seam, and rejects too often); (b) the t-test with the effective
    sample size of Clifford, Richardson and Hémon (1989), which stays honest where a field is so smooth that
    the shifts are few.  The tests hold it to at most 7 % of 200 draws of independent, spatially correlated
    fields rejected at the 5 % level.

    ``decile_gap`` has its interval from a bootstrap of whole tiles, of two correlation lengths or more,
    widened by Student's t for the few tiles that hold the top decile (the plain percentile interval is too
    narrow for them).

    ``peak_to_boundary`` = 1 - median|t_p - t*| / median E|t - t*| over the rows and columns that change class
    exactly once, at t*, with t_p where the log-volume peaks and t uniform.  Half a grid step is its
    resolution.  Shuffled labels are NO null for it: a network that memorised them has boundaries too.

    Args:
        log_volume: [H, W] or [T], in nats; ``-inf`` and ``nan`` are dropped and counted.
        entropy: of the same shape, of the trained network's prediction, in any unit (its ranks alone count).
        initial: of the same shape, the log-volume of the untrained network; reported beside, as ``.initial``.
        predictions: of the same shape, class indices of the trained network, for ``peak_to_boundary``.
        name: what the sentence calls the layer.
        seed: of the bootstrap; the global random state is neither read nor moved.

    Raises:
        ProbeError: fields that are not [H, W] or [T] of one shape, fewer than 16 finite points, or a constant
            entropy. A log-volume that varies by less than 1e-5 nats is a result (ρ = nan, p = 1, gap 0).

    Source: Zavatone-Veth et al., arXiv:2301.11375, for the hypothesis; the statistics are this package's own.

    Cost: a few FFTs of the doubled grid; no pass through a model.

    >>> import torch
    >>> x, y = torch.meshgrid(torch.linspace(-1, 1, 30), torch.linspace(-1, 1, 30), indexing="xy")
    >>> boundary = x - 0.6 * torch.sin(4 * y)
    >>> entropy = torch.exp(-((boundary / 0.3) ** 2))
    >>> volume = 2 * entropy + 0.1 * torch.cos(9 * y)
    >>> found = magnification(volume, entropy, predictions=(boundary > 0).long())
    >>> assert found.rho > 0.9 and found.p_value < 0.05 and found.decile_gap > 1
    >>> assert found.peak_to_boundary > 0.8 and "magnifies near the boundary" in str(found)
    """
    fields = {"log_volume": log_volume, "entropy": entropy, "initial": initial, "predictions": predictions}
    arrays = {key: _array(value) for key, value in fields.items() if value is not None}
    shape = arrays["log_volume"].shape
    if len(shape) not in (1, 2):
        raise ProbeError(
            f"log_volume has shape {shape}; a slice is a line [T] or a plane [H, W].\n"
            "Give the fields of one scan:  magnification(scan.log_volume['layer4'], scan.entropy)"
        )
    for key, array in arrays.items():
        if array.shape != shape:
            raise ProbeError(
                f"{key} has shape {array.shape} and log_volume {shape}: they must be fields over one and the same "
                "slice.\n"
                "Scan both networks over one slice:  before = scan(net0, plane, ...); after = scan(net, plane, ...)"
            )
    before = None
    if initial is not None:
        before = _statistics("the untrained network", arrays["initial"], arrays, seed=seed, initial=None)
    return _statistics(name, arrays["log_volume"], arrays, seed=seed, initial=before)


def _array(field: Any) -> np.ndarray:
    if not isinstance(field, Tensor):
        return np.asarray(field)
    field = field.detach().cpu()
    return (field.double() if field.is_floating_point() else field).numpy()  # numpy has no bfloat16


def _statistics(
    name: str, raw_volume: np.ndarray, arrays: dict[str, np.ndarray], *, seed: int, initial: Magnification | None
) -> Magnification:
    volume, entropy = raw_volume.astype(np.float64), arrays["entropy"].astype(np.float64)
    classes = arrays.get("predictions")
    kept = np.isfinite(volume) & np.isfinite(entropy)
    _refuse_untestable(name, entropy, kept)
    count = int(kept.sum())
    rho, p_value, effective = math.nan, 1.0, float(count)
    gap, peak, segments = Estimate(0.0, (0.0, 0.0)), None, 0
    if np.ptp(volume[kept]) >= _CONSTANT:
        ranks = rank_field(volume, kept), rank_field(entropy, kept)
        rho = float(scipy.stats.spearmanr(volume[kept], entropy[kept]).statistic)
        effective = effective_points(*ranks, kept)
        p_value = max(shift_p_value(*ranks, kept, abs(rho)), correlation_p_value(rho, effective))
        lengths = np.maximum(*(correlation_lengths(field, kept) for field in ranks))
        rng = np.random.default_rng(seed)
        gap = decile_gap(volume, entropy, kept, lengths, rng)
        if classes is not None:
            peak, segments = peak_to_boundary(volume, kept, classes, lengths, rng)
    return Magnification(
        name=name,
        rho=rho,
        p_value=p_value,
        decile_gap=gap,
        peak_to_boundary=peak,
        num_points=count,
        num_dropped=kept.size - count,
        num_segments=segments,
        num_classes=None if classes is None else len(np.unique(classes[classes >= 0])),
        effective_points=effective,
        initial=initial,
    )


def _refuse_untestable(name: str, entropy: np.ndarray, kept: np.ndarray) -> None:
    if kept.sum() < _LEAST_POINTS:
        raise ProbeError(
            f"{name}: only {kept.sum()} of {kept.size} points have a finite log-volume and entropy; the statistics "
            f"need {_LEAST_POINTS}.\n"
            "A log-volume of -inf everywhere is a singular metric.  Scan it with fewer directions, or write:  "
            "scan(model, plane, estimator=TopK(k=2))"
        )
    if np.ptp(entropy[kept]) == 0:
        raise ProbeError(
            f"{name}: the entropy is {entropy[kept][0]:.3g} at every point, so there is no more and less decided to "
            "compare.\n"
            "Take a slice through samples of different classes, or use minus the margin in its place:  "
            "magnification(log_volume, -scan.margin)"
        )
