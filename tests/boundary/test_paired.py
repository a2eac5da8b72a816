"""The mean over pairs that share units: against the double sum written out, the t-test, and how often it rejects."""

import numpy as np
import pytest
import scipy
import torch
from annotations import shapes_unchecked

from torchgeom_probe import ProbeError, paired_effect


def standard_error(found, freedom):
    low, high = found.estimate.interval
    return (high - low) / 2 / scipy.stats.t.ppf(0.975, freedom)


def by_double_sum(d, units):
    """Var = 1/N² Σ_pq e_p e_q over pairs of pairs with a unit in common, written as it is defined."""
    e = d - d.mean()
    total = sum(e[p] * e[q] for p in range(len(d)) for q in range(len(d)) if set(units[p]) & set(units[q]))
    return max(total, (e**2).sum()) / len(d) ** 2


@pytest.mark.parametrize(("count", "samples"), [(41, 17), (23, 7), (12, 30)])
def test_the_variance_is_the_double_sum(count, samples):
    rng = np.random.default_rng(count)
    units = rng.integers(samples, size=(count, 2))  # some pairs twice, some turned, some of one unit alone
    units[:2], units[2] = [[0, 1], [1, 0]], [3, 3]
    of_unit = rng.standard_normal(samples)
    d = 0.3 + of_unit[units].sum(1) + 0.2 * rng.standard_normal(count)
    independent = min(count, len(np.unique(units)))
    found = paired_effect(d, units)
    expected = by_double_sum(d, units) * independent / (independent - 1)
    assert expected > 1.05 * (d - d.mean()) @ (d - d.mean()) / count**2  # the sharing counts
    assert standard_error(found, independent - 1) ** 2 == pytest.approx(expected, rel=1e-12)
    assert float(found.estimate) == pytest.approx(d.mean())
    t = abs(d.mean()) / expected**0.5
    assert found.p_value == pytest.approx(2 * scipy.stats.t.sf(t, independent - 1))


def test_pairs_that_share_nothing_are_a_t_test():
    d = torch.randn(19, dtype=torch.float64) + 0.4
    found, expected = paired_effect(d, torch.arange(38).reshape(19, 2)), scipy.stats.ttest_1samp(d.numpy(), 0)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.estimate.interval == pytest.approx(tuple(expected.confidence_interval()))


def test_units_may_have_names_and_turning_pairs_changes_nothing():
    rng = np.random.default_rng(0)
    units, d = rng.integers(9, size=(31, 2)), rng.standard_normal(31)
    turned = np.where(rng.random(31)[:, None] < 0.5, units[:, ::-1], units)
    names = np.array([f"photo {i}" for i in range(9)])
    assert paired_effect(d, units) == paired_effect(d, turned) == paired_effect(d, names[units])


def test_it_holds_its_level_where_a_t_test_does_not():
    rejected = np.zeros(2)
    for draw in range(200):
        rng = np.random.default_rng(draw)
        units = rng.integers(50, size=(200, 2))
        d = rng.standard_normal(50)[units].sum(1) + rng.standard_normal(200)
        rejected += paired_effect(d, units).p_value < 0.05, scipy.stats.ttest_1samp(d, 0).pvalue < 0.05
    assert rejected[0] / 200 < 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5
    assert rejected[1] / 200 > 0.3


@pytest.mark.parametrize(
    ("d", "units", "message"),
    [
        ([1.0, 2.0], [[0, 1]], r"shape \(2,\) and units \(1, 2\).*\n.*torch.stack\(\[i, j\], 1\)"),
        ([1.0, float("nan")], [[0, 1], [2, 3]], r"1 of 2 differences are not finite.*\n.*d\[keep\]"),
        ([1.0], [[0, 1]], "no spread to speak of"),
    ],
)
def test_refusals(d, units, message):
    with shapes_unchecked(), pytest.raises(ProbeError, match=message):
        paired_effect(d, units)
