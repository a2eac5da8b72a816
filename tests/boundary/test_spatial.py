"""Ranks, correlation lengths and effective points: against naive twins and fields whose values are known."""

import numpy as np
import pytest
from fields import smooth_field

from torchgeom_probe.boundary.magnification import magnification
from torchgeom_probe.boundary.spatial import correlation_lengths, effective_points, rank_field


def test_ranks_average_ties_and_are_centred_over_the_points_that_count():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 5, (7, 11)).astype(float)
    kept = rng.random((7, 11)) > 0.2
    found = rank_field(values, kept)
    counted = values[kept]
    naive = [(counted < v).sum() + ((counted == v).sum() + 1) / 2 for v in counted]
    assert found[kept] == pytest.approx(np.array(naive) - np.mean(naive))
    assert (found[~kept] == 0).all()
    assert abs(found.sum()) < 1e-9


def test_correlation_lengths_are_per_axis_and_grow_with_the_smoothing():
    rng = np.random.default_rng(0)
    fields = [smooth_field(rng, (48, 48), length) for length in (1, 4)]
    every = np.ones((48, 48), bool)
    short, long = (correlation_lengths(rank_field(field, every), every) for field in fields)
    assert (short < long).all()
    stripes = np.broadcast_to(np.sin(np.arange(40) / 3), (30, 40))
    rows, columns = correlation_lengths(rank_field(stripes, np.ones((30, 40), bool)), np.ones((30, 40), bool))
    assert rows == 30  # never below 1/e along a stripe
    assert columns == 4  # cos(lag / 3) < 1/e from lag 3.6 on


def test_effective_points_equal_the_naive_sum_over_pairs():
    rng = np.random.default_rng(2)
    kept = rng.random((5, 7)) > 0.1
    a = rank_field(smooth_field(rng, (5, 7), 1), kept)
    b = rank_field(smooth_field(rng, (5, 7), 1), kept)
    points = [tuple(p) for p in np.argwhere(kept)]
    sums = {}
    for p in points:
        for q in points:
            entry = sums.setdefault((q[0] - p[0], q[1] - p[1]), [0.0, 0.0, 0])
            entry[0] += a[p] * a[q]
            entry[1] += b[p] * b[q]
            entry[2] += 1
    variance = sum(x * y / n for x, y, n in sums.values()) / ((a**2).sum() * (b**2).sum())
    assert effective_points(a, b, kept) == pytest.approx(min(len(points), 1 + 1 / variance))


def test_white_noise_counts_every_point():
    rng = np.random.default_rng(3)
    result = magnification(rng.standard_normal((40, 40)), rng.standard_normal((40, 40)))
    assert 0.8 * 1600 < result.effective_points <= 1600
