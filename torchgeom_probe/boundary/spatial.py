"""Fields over a slice: their ranks, their correlation lengths, and how many independent points they amount to.

A field is an array [T] over a line or [H, W] over a plane; ``kept`` [same] says which of its points count.
"""

from __future__ import annotations

import math

import numpy as np
import scipy  # its submodules are loaded when they are first used: importing this costs little


def rank_field(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the ranks of the kept points minus their mean, ties averaged, in place; 0, that mean, elsewhere.

    >>> rank_field(np.array([0.5, 3.0, np.nan, 0.5]), np.array([True, True, False, True])).tolist()
    [-0.5, 1.0, 0.0, -0.5]
    """
    field = np.zeros(values.shape)
    field[kept] = scipy.stats.rankdata(values[kept]) - (kept.sum() + 1) / 2
    return field


def effective_points(a: np.ndarray, b: np.ndarray, kept: np.ndarray) -> float:
    """Return how many independent points two centred fields amount to, for their correlation r.

    1 + 1 / Var r, with Var r ≈ Σ_lag N(lag) C_a(lag) C_b(lag) / (N² s_a² s_b²), where N(lag) is the number of pairs of
    kept points at a lag and C(lag) a field's mean product over them.

    Source: Clifford, Richardson and Hémon, Biometrics 45 (1989).
    """
    covariance_a, pairs = _autocovariance(a, kept)
    covariance_b, _ = _autocovariance(b, kept)
    seen = pairs > 0
    total = (covariance_a[seen] * covariance_b[seen] / pairs[seen]).sum()
    variance = total / ((a**2).sum() * (b**2).sum())
    points = float(kept.sum())
    return points if variance <= 1 / points else min(points, float(1 + 1 / variance))


def correlation_lengths(field: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return per axis the first lag, in grid steps, at which a centred field's autocorrelation is below 1/e."""
    covariance, pairs = _autocovariance(field, kept)
    lengths = []
    for axis, size in enumerate(field.shape):
        along = tuple(slice(0, size) if i == axis else 0 for i in range(field.ndim))
        profile = covariance[along] / np.maximum(pairs[along], 1)
        below = np.flatnonzero(profile < profile[0] / math.e)
        lengths.append(below[0] if len(below) else size)
    return np.array(lengths, dtype=float)


def _autocovariance(field: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sums over pairs at each lag (wrapped negative lags included), and the number of pairs."""
    values, mask = padded(field), padded(kept)
    return cross(values, values), cross(mask, mask).round()


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Σ_p x(p + s) y(p) for every shift s of the torus."""
    return np.fft.irfftn(np.fft.rfftn(x) * np.conj(np.fft.rfftn(y)), s=x.shape, axes=range(x.ndim))


def padded(x: np.ndarray) -> np.ndarray:
    """Return x with zeros behind it along every axis, so that no shift of the torus wraps it onto itself."""
    return np.pad(x.astype(np.float64), [(0, size) for size in x.shape])


def mirrored(x: np.ndarray) -> np.ndarray:
    """Return x with its mirror image behind it along every axis: a torus without a seam."""
    return np.pad(x.astype(np.float64), [(0, size) for size in x.shape], mode="symmetric")
