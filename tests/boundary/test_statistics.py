"""Nulls and intervals: against brute force, closed forms to 30 digits, and tables."""

import copy
import math
import pickle

import mpmath
import numpy as np
import pytest
from fields import smooth_field

from torchgeom_probe.boundary import statistics
from torchgeom_probe.boundary.spatial import rank_field
from torchgeom_probe.boundary.statistics import Estimate, correlation_p_value, shift_p_value


@pytest.mark.parametrize("freedom", [0.3, 1.0, 1.7, 2.0, 5.0, 38.0, 1598.0])
@pytest.mark.parametrize("r", [0.0, 0.03, 0.4, 0.9, 0.9999])
def test_the_p_value_of_a_correlation_is_the_tail_of_its_null_density(r, freedom):
    """Of uncorrelated normal samples r has the density (1 - r²)^(freedom / 2 - 1), up to a constant."""
    with mpmath.workdps(30):
        tail = mpmath.betainc(freedom / 2, 0.5, 0, 1 - mpmath.mpf(r) ** 2, regularized=True)
    assert correlation_p_value(-r, freedom + 2) == pytest.approx(float(tail), rel=1e-9, abs=1e-300)


def test_two_points_or_fewer_prove_nothing_and_a_perfect_correlation_everything():
    assert correlation_p_value(0.99, 2.0) == 1
    assert correlation_p_value(1.0, 3.0) == 0


# Student's t at 97.5 %, as printed in any table.
TABLE = {1: 12.7062, 2: 4.30265, 4: 2.77645, 9: 2.26216, 30: 2.04227, 120: 1.97993}


@pytest.mark.parametrize("freedom", TABLE)
def test_an_interval_is_widened_by_students_t(freedom):
    resampled = np.concatenate([np.full(300, -1.0), np.zeros(400), np.full(300, 2.0)])
    low, high = statistics._widened_interval(0.5, resampled, freedom + 1.0)
    widening = TABLE[freedom] / 1.959964 * math.sqrt((freedom + 1) / freedom)
    assert (low, high) == (pytest.approx(0.5 - 1.5 * widening, rel=1e-5), pytest.approx(0.5 + 1.5 * widening, rel=1e-5))


def test_the_weighted_median_is_the_median_of_the_repeated_values():
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal(7), rng.integers(0, 4, (30, 7))
    weights[:, 0] += 1
    naive = [np.median(np.repeat(values, w)) for w in weights]
    assert statistics._weighted_median(values, weights) == pytest.approx(naive)


def test_shift_p_value_equals_the_naive_loop_over_every_shift():
    rng = np.random.default_rng(1)
    a, b = smooth_field(rng, (7, 11), 2), smooth_field(rng, (7, 11), 2)
    kept = rng.random((7, 11)) > 0.1
    ranks_a, ranks_b = rank_field(a, kept), rank_field(b, kept)
    tile = lambda x: np.block([[x, x[:, ::-1]], [x[::-1], x[::-1, ::-1]]])  # noqa: E731
    mirrored, mask = tile(ranks_a), tile(kept)
    observed, above, total = 0.2, 0, 0
    for i in range(14):
        for j in range(22):
            window = np.roll(mirrored, (-i, -j), (0, 1))[:7, :11]
            both = np.roll(mask, (-i, -j), (0, 1))[:7, :11] & kept
            if both.sum() >= kept.sum() / 2:
                total += 1
                above += abs(np.corrcoef(window[both], ranks_b[both])[0, 1]) >= observed
    assert shift_p_value(ranks_a, ranks_b, kept, observed) == pytest.approx(above / total)


def test_an_estimate_survives_copies():
    estimate = Estimate(3.1, (2.2, 4.0))
    for twin in (copy.deepcopy(estimate), pickle.loads(pickle.dumps(estimate))):
        assert (float(twin), twin.interval, repr(twin)) == (3.1, (2.2, 4.0), "Estimate(3.1, (2.2, 4.0))")


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (0.0891, (0.0489, 0.1293), "+0.089 [0.049, 0.129]"),
        (2.861, (1.95, 3.77), "+2.86 [1.95, 3.77]"),
        (-123.4, (-160.0, -87.0), "-123 [-160, -87]"),
        (0.1, None, "+0.1"),
        (0.0, (0.0, 0.0), "+0"),
    ],
)
def test_an_estimate_has_the_digits_that_its_interval_allows(value, interval, text):
    assert str(Estimate(value, interval)) == f"{Estimate(value, interval)!s}" == text
