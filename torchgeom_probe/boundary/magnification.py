"""Decision boundaries: where they lie, and the statistics that test whether a layer magnifies near them.

The hypothesis is that training makes the log-volume l(x) of a feature map large where the prediction is
undecided.  Its label-free measure of "undecided" is the predictive entropy H(x).  Three statistics of the two
fields, each beside the same statistic of the UNTRAINED network's l against the trained H, because an
untrained map may correlate by its shape:

- ρ, Spearman's rank correlation of l and H over the slice;
- the decile gap, mean l where H is in its top decile minus mean l elsewhere, in nats;
- peak-to-boundary, how much nearer to the class change l peaks than a peak placed at random.

What none of them may be tested against: the first-order distance to the boundary r₁ = m / |∇m| has the
Jacobian in its denominator, so l correlates with -r₁ by construction.  Test against the entropy, the margin,
or a distance that was bisected (:func:`boundary_points`).  And shuffled labels are no null for
peak-to-boundary: a network that memorised them has boundaries too, and magnifies them.

Legend of axes: B segments, P points, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.isolation import measuring, unwrapped
from torchgeom_probe.shapes import Float, Int, Tensor

_LEAST_POINTS = 16
_RESAMPLES = 999
# Nats.  A volume that varies by less is that of an affine map in float32: its pattern is rounding.
_CONSTANT = 1e-5


class Estimate(float):
    """A number with its 95 % interval: a float with ``.interval``, (low, high) or None where none can be had.

    >>> gap = Estimate(3.1, (2.2, 4.0))
    >>> gap > 3, gap.interval, str(gap)
    (True, (2.2, 4.0), '+3.1 [2.2, 4.0]')
    """

    interval: tuple[float, float] | None

    def __new__(cls, value: float, interval: tuple[float, float] | None = None) -> Estimate:
        """Join the number with its interval."""
        estimate = super().__new__(cls, value)
        estimate.interval = interval
        return estimate

    def __getnewargs__(self) -> tuple[float, tuple[float, float] | None]:  # type: ignore[override]
        return float(self), self.interval

    def __repr__(self) -> str:
        return f"Estimate({float(self)!r}, {self.interval!r})"

    def __str__(self) -> str:
        if self.interval is None:
            return f"{float(self):+.1f}"
        return f"{float(self):+.1f} [{self.interval[0]:.1f}, {self.interval[1]:.1f}]"


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
                f"{self.name} has the same log-volume everywhere on the slice, so it magnifies no place "
                "more than another"
                f"{self._remarks()}"
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
            remarks.append(
                f"the slice amounts to {self.effective_points:.0f} independent points, too few to tell"
            )
        if self.num_dropped:
            remarks.append(
                f"{self.num_dropped} of {self.num_points + self.num_dropped} points dropped as not finite"
            )
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
                f"{key} has shape {array.shape} and log_volume {shape}: they must be fields over one and "
                "the same slice.\n"
                "Scan both networks over one slice:  before = scan(net0, plane, ...); after = scan(net, "
                "plane, ...)"
            )
    before = None
    if initial is not None:
        before = _statistics("the untrained network", arrays["initial"], arrays, seed=seed, initial=None)
    return _statistics(name, arrays["log_volume"], arrays, seed=seed, initial=before)


def spearman(x: Float[Tensor, " points"] | np.ndarray, y: Float[Tensor, " points"] | np.ndarray) -> float:
    """Spearman's rank correlation, with average ranks for ties; ``nan`` where either is constant.

    Shapes: both [P], finite.  No p-value here: over a slice, neighbouring points are not independent
    (:func:`magnification`).

    >>> spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 8.0, 27.0, 64.0]))
    1.0
    """
    a, b = _centred_ranks(_array(x)), _centred_ranks(_array(y))
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / scale if scale else math.nan


@dataclass(frozen=True, eq=False)
class BoundaryPoints:
    """Where B segments cross a decision boundary.

    Attributes:
        points: [B, *input], the middles of the last brackets.
        t: [B], where on the segment: 0 at a, 1 at b.
        class_before: [B], predicted just before the crossing, on a's side; the class at ``a``.
        class_after: [B], predicted just after it; the class at ``b`` unless a third class lies between.
        tolerance: half of the last bracket, in units of t.

    """

    points: Float[Tensor, " batch *input"]
    t: Float[Tensor, " batch"]
    class_before: Int[Tensor, " batch"]
    class_after: Int[Tensor, " batch"]
    tolerance: float


def boundary_points(
    model: nn.Module,
    a: Float[Tensor, " batch *input"],
    b: Float[Tensor, " batch *input"],
    *,
    tol: float = 1e-3,
    readout: Callable[[Any], Tensor] | None = None,
) -> BoundaryPoints:
    """Bisect the segments from a to b for a point where the predicted class stops being that of a.

    Per segment one crossing is found, a true one to ± ``tol`` in units of the segment; where the class
    changes more than once, bisection picks one of the crossings.

    Shapes: a and b [B, *input], each pair predicted as two different classes.  ``readout`` maps the model's
    output to logits [B, C]; None: the output is the logits.  The model is run in eval mode and left as it
    was.

    Raises:
        ProbeError: shapes that differ, a pair of one class, or an output that is no [B, C] logits.

    Cost: ⌈log₂(1 / tol)⌉ + 1 forward passes over B rows, none with tangents.

    >>> import torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> model.weight.data = torch.tensor([[1.0], [-1.0]])   # class 0 where x > 0
    >>> found = boundary_points(model, torch.tensor([[-1.0]]), torch.tensor([[3.0]]), tol=1e-4)
    >>> assert abs(found.t.item() - 0.25) < 1e-4 and found.class_before.item() == 1

    """
    if a.shape != b.shape or a.dim() < 2 or len(a) == 0:
        raise ProbeError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; both must be [B, *input], one segment a "
            "row.\n"
            "For single inputs:  boundary_points(model, a[None], b[None])"
        )
    if not 0 < tol < 1:
        raise ProbeError(
            f"tol={tol} must lie between 0 and 1: it is in units of the segment. Write tol=1e-3."
        )
    model = unwrapped(model)
    with measuring(model):

        def classes(x: Tensor) -> Tensor:
            return logits_of(model(x), readout=readout, batch=len(x)).argmax(-1)

        first, last = classes(a), classes(b)
        if bool((first == last).any()):
            same = (first == last).nonzero().flatten().tolist()
            raise ProbeError(
                f"the ends of segment {same[0]} are both predicted as class {int(first[same[0]])} "
                f"({len(same)} of {len(a)} "
                "segments), so bisection has no sign to follow.\n"
                "Keep the pairs that differ:  keep = model(a).argmax(-1) != model(b).argmax(-1); "
                "boundary_points(model, a[keep], b[keep])"
            )
        low, high, after = torch.zeros_like(first, dtype=a.dtype), torch.ones_like(first, dtype=a.dtype), last
        for _ in range(max(0, math.ceil(math.log2(1 / tol)) - 1)):
            middle = (low + high) / 2
            found = classes(_between(a, b, middle))
            crossed = found != first
            low, high = torch.where(crossed, low, middle), torch.where(crossed, middle, high)
            after = torch.where(crossed, found, after)
        t = (low + high) / 2
        return BoundaryPoints(
            points=_between(a, b, t),
            t=t,
            class_before=first,
            class_after=after,
            tolerance=float((high - low).max()) / 2,
        )


def logits_of(
    output: Any, *, readout: Callable[[Any], Tensor] | None, batch: int
) -> Float[Tensor, " batch classes"]:
    """Read the logits [B, C] out of a model's output, or say what to write where it has none.

    >>> logits_of(torch.zeros(2, 3), readout=None, batch=2).shape
    torch.Size([2, 3])
    """
    logits = output if readout is None else readout(output)
    if isinstance(logits, Tensor) and logits.shape == (batch, 1):
        raise ProbeError(
            f"the model gives one number a sample, shape {tuple(logits.shape)}, where predictions need "
            "logits [B, C] of C ≥ 2 classes.\n"
            "For a binary logit write:  readout=lambda z: torch.cat([torch.zeros_like(z), z], -1)"
        )
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != batch:
        seen = (
            f"a tensor of shape {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else f"a {type(logits).__name__}"
        )
        origin = "the model" if readout is None else "readout"
        raise ProbeError(
            f"{origin} gives {seen} for {batch} samples, where predictions need logits [B, C].\n"
            "Say how to get them from the model's output:  readout=lambda output: "
            "classifier(output.flatten(1))"
        )
    return logits


def _between(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    t = t.reshape(-1, *[1] * (a.dim() - 1))
    return a * (1 - t) + b * t


def _array(field: Any) -> np.ndarray:
    if not isinstance(field, Tensor):
        return np.asarray(field)
    field = field.detach().cpu()
    return (field.double() if field.is_floating_point() else field).numpy()  # numpy has no bfloat16


# --- the three statistics -----------------------------------------------------------------------------------


def _statistics(
    name: str,
    raw_volume: np.ndarray,
    arrays: dict[str, np.ndarray],
    *,
    seed: int,
    initial: Magnification | None,
) -> Magnification:
    volume, entropy = raw_volume.astype(np.float64), arrays["entropy"].astype(np.float64)
    classes = arrays.get("predictions")
    kept = np.isfinite(volume) & np.isfinite(entropy)
    count = int(kept.sum())
    if count < _LEAST_POINTS:
        raise ProbeError(
            f"{name}: only {count} of {kept.size} points have a finite log-volume and entropy; the "
            "statistics need "
            f"{_LEAST_POINTS}.\nA log-volume of -inf everywhere is a singular metric: scan it with fewer "
            "directions, or "
            "use  estimator=TopK(k=...)"
        )
    if np.ptp(entropy[kept]) == 0:
        raise ProbeError(
            f"{name}: the entropy is {entropy[kept][0]:.3g} at every point, so there is no more and less "
            "decided to compare.\n"
            "Take a slice through samples of different classes, or use minus the margin in its place:  "
            "magnification(log_volume, -scan.margin)"
        )
    constant = np.ptp(volume[kept]) < _CONSTANT
    volume_ranks, entropy_ranks = _rank_field(volume, kept), _rank_field(entropy, kept)
    rng = np.random.default_rng(seed)
    correlation, p_value, effective = math.nan, 1.0, float(count)
    gap, peak, segments = Estimate(0.0, (0.0, 0.0)), None, 0
    if not constant:
        correlation = spearman(volume[kept], entropy[kept])
        effective = _effective_points(volume_ranks, entropy_ranks, kept)
        p_value = max(
            _shift_p_value(volume_ranks, entropy_ranks, kept, abs(correlation)),
            _correlation_p_value(correlation, effective),
        )
        lengths = np.maximum(
            _correlation_lengths(volume_ranks, kept), _correlation_lengths(entropy_ranks, kept)
        )
        gap = _decile_gap(volume, entropy, kept, lengths, rng)
        if classes is not None:
            peak, segments = _peak_to_boundary(volume, kept, classes, lengths, rng)
    return Magnification(
        name=name,
        rho=correlation,
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


def _decile_gap(
    volume: np.ndarray, entropy: np.ndarray, kept: np.ndarray, lengths: np.ndarray, rng: np.random.Generator
) -> Estimate:
    top = kept & (entropy >= np.quantile(entropy[kept], 0.9))
    if (
        top.sum() == kept.sum()
    ):  # nine tenths of the points tie at the least entropy, as when a softmax saturates
        top = kept & (entropy > entropy[kept].min())
    rest = kept & ~top
    gap = float(volume[top].mean() - volume[rest].mean())

    # Tiles of at least two correlation lengths, and at least 4 a side (8 on a line) to resample from.
    least = 4 if volume.ndim == 2 else 8
    tile = np.zeros(volume.shape, dtype=np.int64)
    tiles = 1
    for axis, size in enumerate(volume.shape):
        pieces = min(size, max(least, size // max(1, math.ceil(2 * lengths[axis]))))
        index = np.arange(size) * pieces // size
        tile = tile * pieces + np.expand_dims(index, tuple(i for i in range(volume.ndim) if i != axis))
        tiles *= pieces
    filled = np.where(kept, volume, 0.0)
    sums = np.stack(
        [
            np.bincount(tile.ravel(), w.ravel().astype(float), tiles)
            for w in (filled * top, top, filled * rest, rest)
        ],
        1,
    )
    holding = sums[:, 1].sum() ** 2 / (sums[:, 1] ** 2).sum()
    if holding < 1.5:  # the top decile is one place: resampling places says nothing about it
        return Estimate(gap)
    resampled = rng.multinomial(tiles, np.full(tiles, 1 / tiles), size=_RESAMPLES) @ sums
    resampled = resampled[(resampled[:, 1] > 0) & (resampled[:, 3] > 0)]
    gaps = resampled[:, 0] / resampled[:, 1] - resampled[:, 2] / resampled[:, 3]
    return Estimate(gap, _widened_interval(gap, gaps, holding))


def _peak_to_boundary(
    volume: np.ndarray, kept: np.ndarray, classes: np.ndarray, lengths: np.ndarray, rng: np.random.Generator
) -> tuple[Estimate | None, int]:
    distances: list[float] = []
    at_random: list[float] = []
    blocks: list[int] = []  # neighbouring rows are no independent segments: they are resampled together
    first_block = 0
    for axis in range(volume.ndim):
        rows = [np.moveaxis(x, axis, -1).reshape(-1, volume.shape[axis]) for x in (volume, kept, classes)]
        count = len(rows[0])
        width = 1 if volume.ndim == 1 else max(1, min(math.ceil(2 * lengths[1 - axis]), math.ceil(count / 4)))
        for i, (row, finite, labels) in enumerate(zip(*rows, strict=True)):
            changes = np.flatnonzero(labels[1:] != labels[:-1])
            if len(changes) != 1 or labels.min() < 0 or 2 * finite.sum() < len(row):
                continue
            away = np.abs(np.flatnonzero(finite) - (changes[0] + 0.5))
            distances.append(float(away[row[finite] == row[finite].max()].mean()))
            at_random.append(float(away.mean()))
            blocks.append(first_block + i // width)
        first_block += count
    if not distances:
        return None, 0
    near, null = np.array(distances), np.array(at_random)
    score = 1 - float(np.median(near) / np.median(null))
    _, block = np.unique(blocks, return_inverse=True)
    sizes = np.bincount(block)
    effective = sizes.sum() ** 2 / (sizes**2).sum()
    if effective < 3:
        return Estimate(score), len(near)
    chosen_RP = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=_RESAMPLES)[:, block]
    scores = 1 - _weighted_median(near, chosen_RP) / _weighted_median(null, chosen_RP)
    low, high = _widened_interval(score, scores, effective)
    return Estimate(score, (low, min(high, 1.0))), len(near)


def _weighted_median(values: np.ndarray, weights_RP: np.ndarray) -> np.ndarray:
    order = np.argsort(values)
    cumulative = np.cumsum(weights_RP[:, order], axis=1)
    half = cumulative[:, -1:] / 2
    lower = values[order][np.argmax(cumulative >= half, axis=1)]
    upper = values[order][np.argmax(cumulative > half, axis=1)]
    return (lower + upper) / 2


def _widened_interval(estimate: float, resampled: np.ndarray, pieces: float) -> tuple[float, float]:
    low, high = np.quantile(resampled, [0.025, 0.975])
    freedom = max(pieces - 1, 1.0)
    widening = _student_quantile(freedom) / 1.959964 * math.sqrt(pieces / max(pieces - 1, 0.5))
    return float(estimate - (estimate - low) * widening), float(estimate + (high - estimate) * widening)


# --- the nulls ----------------------------------------------------------------------------------------------


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    average = np.cumsum(counts) - (counts + 1) / 2
    return average[inverse.ravel()] - (len(values) - 1) / 2


def _rank_field(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the centred ranks of the kept points, in place; 0, the mean rank, elsewhere."""
    field = np.zeros(values.shape)
    field[kept] = _centred_ranks(values[kept])
    return field


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Σ_p x(p + s) y(p) for every shift s of the torus."""
    return np.fft.irfftn(np.fft.rfftn(x) * np.conj(np.fft.rfftn(y)), s=x.shape, axes=range(x.ndim))


def _padded(x: np.ndarray) -> np.ndarray:
    return np.pad(x.astype(np.float64), [(0, size) for size in x.shape])


def _mirrored(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    for axis in range(x.ndim):
        x = np.concatenate([x, np.flip(x, axis)], axis)
    return x


def _shift_p_value(a: np.ndarray, b: np.ndarray, kept: np.ndarray, observed: float) -> float:
    """Return the share of shifts, over a's mirrored torus, at which the fields correlate as strongly."""
    moving, moving_mask, still, still_mask = _mirrored(a), _mirrored(kept), _padded(b), _padded(kept)
    n = _cross(moving_mask, still_mask).round()
    enough = n >= kept.sum() / 2
    n = np.maximum(n, 1)
    mean_a, mean_b = _cross(moving, still_mask) / n, _cross(moving_mask, still) / n
    variance_a = _cross(moving**2, still_mask) / n - mean_a**2
    variance_b = _cross(moving_mask, still**2) / n - mean_b**2
    scale = np.sqrt(np.maximum(variance_a, 0) * np.maximum(variance_b, 0))
    # A window in which a field is constant correlates with nothing.
    sound = enough & (scale > 1e-9 * scale.max())
    shifted = np.abs((_cross(moving, still) / n - mean_a * mean_b)[sound] / scale[sound])
    return float((shifted >= observed - 1e-9).mean())


def _autocovariance(field: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sums over pairs at each lag (wrapped negative lags included), and the number of pairs."""
    padded, mask = _padded(field), _padded(kept)
    return _cross(padded, padded), _cross(mask, mask).round()


def _effective_points(a: np.ndarray, b: np.ndarray, kept: np.ndarray) -> float:
    # Clifford, Richardson, Hémon (Biometrics 45, 1989): Var r ≈ Σ_lag N(lag) Ĉ_a(lag) Ĉ_b(lag) / (N² s_a²
    # s_b²).
    covariance_a, pairs = _autocovariance(a, kept)
    covariance_b, _ = _autocovariance(b, kept)
    seen = pairs > 0
    total = (covariance_a[seen] * covariance_b[seen] / pairs[seen]).sum()
    variance = total / ((a**2).sum() * (b**2).sum())
    points = float(kept.sum())
    return points if variance <= 1 / points else min(points, float(1 + 1 / variance))


def _correlation_lengths(field: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return per axis the first lag, in grid steps, at which the autocorrelation is below 1/e."""
    covariance, pairs = _autocovariance(field, kept)
    lengths = []
    for axis, size in enumerate(field.shape):
        along = tuple(slice(0, size) if i == axis else 0 for i in range(field.ndim))
        profile = covariance[along] / np.maximum(pairs[along], 1)
        below = np.flatnonzero(profile < profile[0] / math.e)
        lengths.append(below[0] if len(below) else size)
    return np.array(lengths, dtype=float)


def _correlation_p_value(correlation: float, points: float) -> float:
    """Return the two-sided p-value of a correlation of so many independent points, by Student's t."""
    freedom = points - 2
    if freedom <= 0:
        return 1.0
    if abs(correlation) >= 1:
        return 0.0
    # With r = tanh v the null density of r, (1 - r²)^(freedom / 2 - 1), becomes sech(v)^freedom: smooth for
    # every freedom.
    start = math.atanh(abs(correlation))
    decay = freedom * max(math.tanh(start), min(1.0, freedom**-0.5))
    v, step = np.linspace(start, start + 40 / decay, 2001, retstep=True)
    density = np.exp(freedom * (math.log(2) - v - np.log1p(np.exp(-2 * v))))
    simpson = np.ones(len(v))
    simpson[1:-1:2], simpson[2:-1:2] = 4, 2
    tail = float(simpson @ density) * float(step) / 3
    whole = math.exp(0.5 * math.log(math.pi) + math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)) / 2
    return min(1.0, tail / whole)


def _student_quantile(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t, by bisection on the correlation that it corresponds to."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _correlation_p_value(middle, freedom + 2) > 0.05 else (low, middle)
    return low * math.sqrt(freedom / max(1 - low * low, 1e-300))
