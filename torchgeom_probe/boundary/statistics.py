"""The statistics of one slice: estimates with intervals, and p-values whose nulls keep the fields' smoothness.

Legend of axes: P segments, R resamples.  Fields and ``kept`` are as in :mod:`torchgeom_probe.boundary.spatial`.
"""

from __future__ import annotations

import math

import numpy as np
import scipy  # its submodules are loaded when they are first used: importing this costs little

from torchgeom_probe.boundary.spatial import cross, mirrored, padded

_RESAMPLES = 999


class Estimate(float):
    """A number with its 95 % interval: a float with ``.interval``, (low, high) or None where none can be had.

    As text it has the digits that its interval lets it have: two of half the interval's width.

    >>> gap = Estimate(3.1, (2.2, 4.0))
    >>> gap > 3, gap.interval
    (True, (2.2, 4.0))
    >>> print(gap, "and", Estimate(0.0891, (0.0487, 0.1294)))
    +3.10 [2.20, 4.00] and +0.089 [0.049, 0.129]
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
        low, high = self.interval or (math.nan, math.nan)
        if not 0 < high - low < math.inf:
            return f"{float(self):+.2g}"
        digits = max(0, 1 - math.floor(math.log10((high - low) / 2)))
        return f"{float(self):+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def shift_p_value(a: np.ndarray, b: np.ndarray, kept: np.ndarray, observed: float) -> float:
    """Return the share of shifts of a, over the torus of its mirror images, at which |correlation with b| ≥ observed.

    a and b are zero where they are not kept; shifts at which fewer than half of the kept points meet do not count.
    """
    moving, moving_mask, still, still_mask = mirrored(a), mirrored(kept), padded(b), padded(kept)
    n = cross(moving_mask, still_mask).round()
    enough = n >= kept.sum() / 2
    n = np.maximum(n, 1)
    mean_a, mean_b = cross(moving, still_mask) / n, cross(moving_mask, still) / n
    variance_a = cross(moving**2, still_mask) / n - mean_a**2
    variance_b = cross(moving_mask, still**2) / n - mean_b**2
    scale = np.sqrt(np.maximum(variance_a, 0) * np.maximum(variance_b, 0))
    # A window in which a field is constant correlates with nothing.
    sound = enough & (scale > 1e-9 * scale.max())
    shifted = np.abs((cross(moving, still) / n - mean_a * mean_b)[sound] / scale[sound])
    return float((shifted >= observed - 1e-9).mean())


def correlation_p_value(correlation: float, points: float) -> float:
    """Return the two-sided p-value of a correlation of so many independent points (a fraction, too), by Student's t.

    >>> correlation_p_value(0.5, 2.0), correlation_p_value(1.0, 3.0)
    (1.0, 0.0)
    """
    freedom = points - 2
    if freedom <= 0:
        return 1.0
    if abs(correlation) >= 1:
        return 0.0
    t = abs(correlation) * math.sqrt(freedom / (1 - correlation**2))
    return 2 * float(scipy.stats.t.sf(t, freedom))


def decile_gap(
    volume: np.ndarray, entropy: np.ndarray, kept: np.ndarray, lengths: np.ndarray, rng: np.random.Generator
) -> Estimate:
    """Return mean volume where the entropy is in its top decile minus the mean elsewhere, by a bootstrap of tiles.

    The tiles are two correlation ``lengths`` wide or more; the interval is None where one place holds the top decile.
    """
    top = kept & (entropy >= np.quantile(entropy[kept], 0.9))
    if top.sum() == kept.sum():
        # Nine tenths of the points tie at the least entropy, as when a softmax saturates.
        top = kept & (entropy > entropy[kept].min())
    rest = kept & ~top
    gap = float(volume[top].mean() - volume[rest].mean())
    tile, tiles = _tiles(volume.shape, lengths)
    filled = np.where(kept, volume, 0.0)
    weights = (filled * top, top, filled * rest, rest)
    sums = np.stack([np.bincount(tile.ravel(), w.ravel().astype(float), tiles) for w in weights], 1)
    holding = _pieces(sums[:, 1])
    if holding < 1.5:  # resampling places says nothing about the one place that there is
        return Estimate(gap)
    resampled = rng.multinomial(tiles, np.full(tiles, 1 / tiles), size=_RESAMPLES) @ sums
    resampled = resampled[(resampled[:, 1] > 0) & (resampled[:, 3] > 0)]
    gaps = resampled[:, 0] / resampled[:, 1] - resampled[:, 2] / resampled[:, 3]
    return Estimate(gap, _widened_interval(gap, gaps, holding))


def peak_to_boundary(
    volume: np.ndarray, kept: np.ndarray, classes: np.ndarray, lengths: np.ndarray, rng: np.random.Generator
) -> tuple[Estimate | None, int]:
    """Return how much nearer to the class change the volume peaks than at random, and the number of segments.

    Segments are the rows and columns (or the one line) that change class exactly once.  Neighbouring ones, within two
    correlation ``lengths``, are no independent segments: the bootstrap resamples them together.
    """
    distances: list[float] = []
    at_random: list[float] = []
    blocks: list[int] = []
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
    if _pieces(sizes) < 3:
        return Estimate(score), len(near)
    chosen_RP = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=_RESAMPLES)[:, block]
    scores = 1 - _weighted_median(near, chosen_RP) / _weighted_median(null, chosen_RP)
    low, high = _widened_interval(score, scores, _pieces(sizes))
    return Estimate(score, (low, min(high, 1.0))), len(near)


def _tiles(shape: tuple[int, ...], lengths: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the tile of every point and the number of tiles: at least 4 a side (8 on a line) to resample from."""
    least = 4 if len(shape) == 2 else 8
    tile = np.zeros(shape, dtype=np.int64)
    tiles = 1
    for axis, size in enumerate(shape):
        pieces = min(size, max(least, size // max(1, math.ceil(2 * lengths[axis]))))
        index = np.arange(size) * pieces // size
        tile = tile * pieces + np.expand_dims(index, tuple(i for i in range(len(shape)) if i != axis))
        tiles *= pieces
    return tile, tiles


def _pieces(weights: np.ndarray) -> float:
    """Return how many pieces of equal weight these amount to, (Σw)² / Σw²."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def _weighted_median(values: np.ndarray, weights_RP: np.ndarray) -> np.ndarray:
    order = np.argsort(values)
    cumulative = np.cumsum(weights_RP[:, order], axis=1)
    half = cumulative[:, -1:] / 2
    lower = values[order][np.argmax(cumulative >= half, axis=1)]
    upper = values[order][np.argmax(cumulative > half, axis=1)]
    return (lower + upper) / 2


def _widened_interval(estimate: float, resampled: np.ndarray, pieces: float) -> tuple[float, float]:
    """Return the percentile interval, widened by Student's t for the few pieces that were resampled."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    student, normal = scipy.stats.t.ppf(0.975, max(pieces - 1, 1.0)), scipy.stats.norm.ppf(0.975)
    widening = student / normal * math.sqrt(pieces / max(pieces - 1, 0.5))
    return float(estimate - (estimate - low) * widening), float(estimate + (high - estimate) * widening)
