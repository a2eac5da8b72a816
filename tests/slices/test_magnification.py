"""One slice described: naive twins, how many independent points it amounts to, and what the sentence says."""

import math

import numpy as np
import pytest
import torch
from fields import ridge, smooth_field, wavy_boundary

from torchgeom_probe import ProbeError
from torchgeom_probe.slices.magnification import Magnification, magnification


def described(volume, entropy, predictions=None, **options):
    volume, entropy = torch.as_tensor(volume), torch.as_tensor(entropy)
    predictions = (torch.arange(volume.numel()) % 3).reshape(volume.shape) if predictions is None else predictions
    initial = options.pop("initial", None)
    return magnification(volume, entropy, predictions, initial=initial, **options)


def naive_spearman(x, y):
    """Pearson's correlation of the ranks; tied values share the mean of their places."""
    ranks = [[(v < value).sum() + ((v == value).sum() + 1) / 2 for value in v] for v in (x, y)]
    a, b = (np.array(r) - np.mean(r) for r in ranks)
    return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())


def test_rho_is_spearmans_with_average_ranks_for_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 53).astype(float), rng.integers(0, 7, 53) + rng.integers(0, 2, 53) * 0.5
    assert described(x, y).rho == pytest.approx(naive_spearman(x, y), abs=1e-14)
    assert described(torch.tensor(x, dtype=torch.bfloat16), -x).rho == pytest.approx(-1, abs=1e-14)


@pytest.mark.parametrize(("shape", "length"), [((40, 40), 3), ((24, 36), 2), ((64,), 3)])
def test_the_correlations_of_independent_fields_spread_as_of_so_many_points(shape, length):
    found = []
    for draw in range(200):
        rng = np.random.default_rng(draw)
        found.append(described(smooth_field(rng, shape, length), smooth_field(rng, shape, length)))
    spread = 1 / np.mean([one.rho**2 for one in found])  # = points - 1 of independent points
    points = np.median([one.effective_points for one in found])
    assert 0.6 < points / (1 + spread) < 1.4
    assert points < np.prod(shape) / 3


def test_independent_points_count_as_they_are():
    rng = np.random.default_rng(0)
    assert described(rng.standard_normal((30, 30)), rng.standard_normal((30, 30))).effective_points > 700


def test_the_gap_is_the_difference_of_means_and_ties_at_the_least_entropy_are_the_rest():
    rng = np.random.default_rng(5)
    volume, entropy = smooth_field(rng, (30, 30), 2), ridge(rng, (30, 30), 2)
    top = entropy >= np.quantile(entropy, 0.9)
    assert described(volume, entropy).decile_gap == pytest.approx(volume[top].mean() - volume[~top].mean())
    few = np.zeros((30, 30))
    few[:, 9] = 0.3  # a thirtieth of the points; the rest underflowed
    assert described(volume, few).decile_gap == pytest.approx(volume[few > 0].mean() - volume[few == 0].mean())


def test_the_sentence():
    found = Magnification("layer4", 0.81, 3.1, 7.2, 1600, 0, 3, Magnification("before", 0.19, -0.2, 9.0, 1600, 0, 3))
    assert str(found) == (
        "layer4, on this one slice, ρ = 0.81 with the entropy, +3.1 nats in its top decile; the untrained network: "
        "ρ = 0.19 with the entropy, -0.2 nats in its top decile; an illustration, of about 7 independent points"
    )
    alone = str(Magnification("layer4", 0.81, 3.1, 7.2, 1600, 7, 1))
    assert "one class is predicted, so no boundary crosses it" in alone
    assert "7 of 1607 points dropped as not finite" in alone


def test_the_untrained_network_is_measured_against_the_trained_entropy():
    rng = np.random.default_rng(0)
    entropy, before = ridge(rng, (30, 30), 2), smooth_field(rng, (30, 30), 2)
    found = described(before + 4 * entropy, entropy, initial=torch.as_tensor(before))
    assert found.initial.rho == pytest.approx(naive_spearman(before.ravel(), entropy.ravel()))


def test_a_constant_volume_is_a_result():
    entropy = wavy_boundary(20) ** 2
    flat = torch.full((20, 20), 3.0) + 1e-7 * torch.randn(20, 20)  # an affine layer in float32
    found = described(flat, entropy)
    assert math.isnan(found.rho)
    assert found.decile_gap == 0
    assert "log-volume the same everywhere" in str(found)


def test_points_that_are_not_finite_are_dropped_and_counted():
    rng = np.random.default_rng(0)
    volume, entropy = smooth_field(rng, (20, 20), 1), smooth_field(rng, (20, 20), 1)
    volume[:3, 2], volume[5, 5], entropy[7, 7] = -np.inf, np.nan, np.nan
    kept = np.isfinite(volume) & np.isfinite(entropy)
    found = described(volume, entropy)
    assert (found.num_points, found.num_dropped) == (395, 5)
    assert found.rho == pytest.approx(naive_spearman(volume[kept], entropy[kept]))


@pytest.mark.parametrize(
    ("volume", "entropy", "message"),
    [
        (np.full(40, -np.inf), np.arange(40.0), r"only 0 of 40 points .*\n.* singular metric"),
        (np.arange(15.0), np.arange(15.0), "only 15 of 15 points"),
        (np.arange(40.0), np.full(40, 0.5), r"entropy is 0.5 at every point.*\n.*Plane\("),
    ],
)
def test_what_is_refused(volume, entropy, message):
    with pytest.raises(ProbeError, match=message):
        described(volume, entropy)
