"""Magnification near a boundary: naive twins, honest nulls, planted effects, and what the sentence says."""

import math

import numpy as np
import pytest
import torch
from fields import ridge, smooth_field, wavy_boundary

from torchgeom_probe import ProbeError
from torchgeom_probe.boundary import statistics
from torchgeom_probe.boundary.magnification import Magnification, magnification
from torchgeom_probe.boundary.spatial import effective_points, rank_field
from torchgeom_probe.boundary.statistics import Estimate, correlation_p_value, shift_p_value

LEVEL = 0.05


def naive_spearman(x, y):
    """Pearson's correlation of the ranks; tied values share the mean of their places."""
    ranks = [[(v < value).sum() + ((v == value).sum() + 1) / 2 for value in v] for v in (x, y)]
    a, b = (np.array(r) - np.mean(r) for r in ranks)
    return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())


def test_rho_is_spearmans_with_average_ranks_for_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 53).astype(float), rng.integers(0, 7, 53) + rng.integers(0, 2, 53) * 0.5
    assert magnification(x, y).rho == pytest.approx(naive_spearman(x, y), abs=1e-14)
    assert magnification(torch.tensor(x), torch.tensor(x).exp()).rho == pytest.approx(1, abs=1e-14)
    assert magnification(torch.tensor(x, dtype=torch.bfloat16), -x).rho == pytest.approx(-1, abs=1e-14)


# --- the null -----------------------------------------------------------------------------------------------

CASES = [
    ("rough plane", (40, 40), 1, smooth_field),
    ("plane", (40, 40), 4, smooth_field),
    ("very smooth plane", (40, 40), 8, smooth_field),
    ("oblong plane, ridges", (24, 36), 3, ridge),
    ("line", (64,), 3, smooth_field),
    ("very smooth line", (64,), 12, smooth_field),
]


@pytest.mark.parametrize(("shape", "length", "entropy"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_at_most_7_percent_of_200_independent_smooth_fields_are_called_significant(shape, length, entropy, monkeypatch):
    monkeypatch.setattr(statistics, "_RESAMPLES", 20)  # the intervals are not what is tested here
    found = []
    naive = 0
    for draw in range(200):
        rng = np.random.default_rng([draw, length])
        result = magnification(smooth_field(rng, shape, length), entropy(rng, shape, length))
        found.append(result.p_value <= LEVEL)
        naive += correlation_p_value(result.rho, float(result.num_points)) <= LEVEL
    assert np.mean(found) <= 0.07
    # The draws are ones that fool whoever counts the points as independent: else this test could not fail.
    assert naive / 200 > (0.3 if length > 1 else 0.1)


def test_dropped_points_keep_the_null_honest(monkeypatch):
    monkeypatch.setattr(statistics, "_RESAMPLES", 20)
    found = []
    for draw in range(200):
        rng = np.random.default_rng([draw, 99])
        volume = np.where(rng.random((32, 32)) < 0.15, -np.inf, smooth_field(rng, (32, 32), 3))
        found.append(magnification(volume, smooth_field(rng, (32, 32), 3)).p_value <= LEVEL)
    assert np.mean(found) <= 0.07


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_effect_is_found_with_its_sign(sign):
    found = 0
    for draw in range(20):
        rng = np.random.default_rng(draw)
        entropy = ridge(rng, (40, 40), 3)
        result = magnification(sign * 2 * entropy + 0.5 * smooth_field(rng, (40, 40), 3), entropy)
        found += result.p_value <= LEVEL and result.rho * sign > 0 and result.decile_gap * sign > 0
    assert found >= 18


def test_the_larger_of_the_two_p_values_is_reported():
    larger = set()
    for draw in range(20):
        rng = np.random.default_rng(draw)
        a, b = smooth_field(rng, (24, 24), 2), smooth_field(rng, (24, 24), 2)
        result, every = magnification(a, b), np.ones((24, 24), bool)
        ranks = rank_field(a, every), rank_field(b, every)
        by_shifts = shift_p_value(*ranks, every, abs(result.rho))
        by_size = correlation_p_value(result.rho, effective_points(*ranks, every))
        assert result.p_value == max(by_shifts, by_size)
        larger.add(by_shifts > by_size)
    assert larger == {True, False}


# --- the decile gap -----------------------------------------------------------------------------------------


def test_decile_gap_is_the_difference_of_means_and_its_interval_covers_the_truth():
    covered = 0
    for draw in range(100):
        rng = np.random.default_rng([draw, 5])
        entropy = ridge(rng, (30, 30), 2)
        top = entropy >= np.quantile(entropy, 0.9)
        volume = 3.0 * top + smooth_field(rng, (30, 30), 2)
        result = magnification(volume, entropy)
        assert float(result.decile_gap) == pytest.approx(volume[top].mean() - volume[~top].mean())
        low, high = result.decile_gap.interval
        assert low <= result.decile_gap <= high
        covered += low <= 3.0 <= high
    assert covered >= 88  # 95 less three standard errors


def test_a_top_decile_in_one_place_has_no_interval():
    entropy = np.zeros((40, 40))
    entropy[2:8, 2:8] = 1 + np.arange(36).reshape(6, 6)
    volume = smooth_field(np.random.default_rng(0), (40, 40), 4)
    assert magnification(volume, entropy).decile_gap.interval is None


def test_entropy_that_ties_at_its_least_value_compares_those_above_it():
    entropy = np.zeros((20, 20))
    entropy[:, 9] = 0.3  # a twentieth of the points; the rest underflowed
    volume = smooth_field(np.random.default_rng(0), (20, 20), 1)
    top = entropy > 0
    assert float(magnification(volume, entropy).decile_gap) == pytest.approx(volume[top].mean() - volume[~top].mean())


def test_scaling_the_metric_changes_nothing_and_the_seed_is_the_callers():
    rng = np.random.default_rng(0)
    volume, entropy = smooth_field(rng, (30, 30), 3), ridge(rng, (30, 30), 3)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, other = magnification(volume, entropy), magnification(volume + 40.0, np.log(entropy))
    assert one.rho == pytest.approx(other.rho)
    assert one.p_value == pytest.approx(other.p_value)
    assert one.decile_gap.interval == pytest.approx(other.decile_gap.interval)
    assert magnification(volume, entropy) == one
    assert magnification(volume, entropy, seed=1).decile_gap.interval != one.decile_gap.interval
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()


# --- peak-to-boundary ---------------------------------------------------------------------------------------


def _naive_peak_to_boundary(volume, labels):
    near, null = [], []
    for v, c in [(volume, labels), (volume.T, labels.T)]:
        for row, classes in zip(v, c, strict=True):
            change = [i for i in range(len(row) - 1) if classes[i] != classes[i + 1]]
            if len(change) == 1:
                at = change[0] + 0.5
                near.append(abs(row.argmax() - at))
                null.append(np.mean([abs(i - at) for i in range(len(row))]))
    return 1 - np.median(near) / np.median(null), len(near)


def test_peak_to_boundary_equals_its_naive_twin():
    labels = (wavy_boundary(31) > 0).astype(int)
    volume = np.random.default_rng(4).standard_normal((31, 31))
    result = magnification(volume, wavy_boundary(31) ** 2, predictions=labels)
    expected, segments = _naive_peak_to_boundary(volume, labels)
    assert (float(result.peak_to_boundary), result.num_segments) == (pytest.approx(expected), segments)
    assert segments >= 31


@pytest.mark.parametrize(("sign", "low", "high"), [(-1, 0.85, 1.0), (1, -3.0, -0.3)], ids=["on it", "away from it"])
def test_peaks_on_the_boundary_score_1_and_peaks_that_avoid_it_below_0(sign, low, high):
    d = wavy_boundary()
    result = magnification(sign * np.abs(d), np.exp(-(d**2)), predictions=torch.tensor(d > 0).long())
    assert low <= result.peak_to_boundary <= high
    assert result.peak_to_boundary.interval[0] <= result.peak_to_boundary <= result.peak_to_boundary.interval[1] <= 1


def test_peaks_at_random_score_0():
    scores = []
    for draw in range(40):
        rng = np.random.default_rng(draw)
        d = wavy_boundary(24)
        result = magnification(rng.standard_normal((24, 24)), d**2, predictions=d > 0)
        scores.append(float(result.peak_to_boundary))
    assert abs(np.mean(scores)) < 4 * np.std(scores) / math.sqrt(40)


def test_one_line_is_one_segment_without_an_interval():
    t = np.linspace(-1, 1, 41)
    result = magnification(-(t**2), np.exp(-(t**2) - 0.01 * t), predictions=t > 0.01)
    assert result.num_segments == 1
    assert result.peak_to_boundary > 0.9
    assert result.peak_to_boundary.interval is None


@pytest.mark.parametrize("labels", [None, "one class", "stripes", "not finite"])
def test_without_a_single_change_there_is_no_peak_to_boundary(labels):
    x = np.broadcast_to(np.arange(20), (20, 20))
    predictions = {
        None: None,
        "one class": np.zeros((20, 20), int),
        "stripes": (x + x.T) // 3 % 2,
        "not finite": np.where(x > 9, -1, 0),
    }[labels]
    result = magnification(wavy_boundary(20), wavy_boundary(20) ** 2, predictions=predictions)
    assert (result.peak_to_boundary, result.num_segments) == (None, 0)
    assert result.num_classes == {None: None, "one class": 1, "stripes": 2, "not finite": 1}[labels]


# --- what is said -------------------------------------------------------------------------------------------


def _result(**changes):
    fields = {
        "name": "layer4",
        "rho": 0.81,
        "p_value": 0.005,
        "decile_gap": Estimate(3.1, (2.2, 4.0)),
        "peak_to_boundary": None,
        "num_points": 1600,
        "num_dropped": 0,
        "num_segments": 0,
        "num_classes": 3,
        "effective_points": 40.0,
    }
    return Magnification(**(fields | changes))


SENTENCES = {
    "magnifies": (
        {"initial": _result(rho=0.19)},
        "layer4 magnifies near the boundary: ρ = 0.81 (p = 0.005), +3.1 nats [2.2, 4.0]; the untrained "
        "network: ρ = 0.19",
    ),
    "no better than untrained": (
        {"initial": _result(rho=0.9)},
        "layer4 magnifies near the boundary, but no more than before training: ρ = 0.81 (p = 0.005), +3.1 "
        "nats [2.2, 4.0]; "
        "the untrained network: ρ = 0.90",
    ),
    "only the top": (
        {"p_value": 0.3},
        "layer4 is mixed, larger where the entropy is in its top decile but not in step with it: "
        "ρ = 0.81 (p = 0.3), +3.1 nats [2.2, 4.0]",
    ),
    "all but the top": (
        {"p_value": 0.3, "decile_gap": Estimate(-1.0, (-2.0, -0.1))},
        "layer4 is mixed, smaller where the entropy is in its top decile but not in step with it: "
        "ρ = 0.81 (p = 0.3), -1.0 nats [-2.0, -0.1]",
    ),
    "nothing": (
        {"p_value": 0.3, "decile_gap": Estimate(3.1, (-2.2, 4.0))},
        "layer4 does not measurably magnify near the boundary: ρ = 0.81 (p = 0.3), +3.1 nats [-2.2, 4.0]",
    ),
    "cannot tell": (
        {"p_value": 0.3, "effective_points": 3.2, "decile_gap": Estimate(3.1)},
        "layer4 does not measurably magnify near the boundary: ρ = 0.81 (p = 0.3), +3.1 nats; "
        "the slice amounts to 3 independent points, too few to tell",
    ),
    "opposite": (
        {"rho": -0.5, "p_value": 0.0001, "decile_gap": Estimate(-1.0)},
        "layer4 shows the opposite, it magnifies less near the boundary: ρ = -0.50 (p < 0.001), -1.0 nats",
    ),
    "mixed": (
        {"decile_gap": Estimate(-1.0)},
        "layer4 is mixed, in step with the entropy but smaller where it is in its top decile: ρ = 0.81 (p = "
        "0.005), -1.0 nats",
    ),
    "one class": (
        {"num_classes": 1, "num_dropped": 7},
        "layer4 magnifies where the entropy is high: ρ = 0.81 (p = 0.005), +3.1 nats [2.2, 4.0]; the slice "
        "is of one predicted "
        "class, no boundary crosses it; 7 of 1607 points dropped as not finite",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_the_sentence(case):
    changes, sentence = SENTENCES[case]
    assert str(_result(**changes)) == sentence


def test_the_untrained_network_is_measured_against_the_trained_entropy():
    rng = np.random.default_rng(0)
    entropy, before = ridge(rng, (30, 30), 2), smooth_field(rng, (30, 30), 2)
    result = magnification(before + 4 * entropy, entropy, initial=before, name="stage 2")
    alone = magnification(before, entropy)
    assert result.initial.rho == alone.rho == pytest.approx(naive_spearman(before.ravel(), entropy.ravel()))
    assert result.initial.decile_gap.interval == alone.decile_gap.interval
    assert str(result).startswith("stage 2 magnifies near the boundary: ")
    assert str(result).endswith(f"the untrained network: ρ = {alone.rho:.2f}")


def test_a_constant_volume_is_a_result():
    entropy = wavy_boundary(20) ** 2
    flat = torch.full((20, 20), 3.0) + 1e-7 * torch.randn(20, 20)  # an affine layer in float32
    result = magnification(flat, entropy)
    assert math.isnan(result.rho)
    assert (result.p_value, float(result.decile_gap)) == (1.0, 0.0)
    assert "has the same log-volume everywhere" in str(result)
    trained = magnification(entropy, entropy, initial=flat)
    assert str(trained).endswith("the untrained network: constant log-volume")


def test_points_that_are_not_finite_are_dropped_and_counted():
    rng = np.random.default_rng(0)
    volume, entropy = smooth_field(rng, (20, 20), 1), smooth_field(rng, (20, 20), 1)
    volume[:3, 2], volume[5, 5], entropy[7, 7] = -np.inf, np.nan, np.nan
    kept = np.isfinite(volume) & np.isfinite(entropy)
    result = magnification(volume, entropy)
    assert (result.num_points, result.num_dropped) == (395, 5)
    assert result.rho == pytest.approx(naive_spearman(volume[kept], entropy[kept]))
    assert "5 of 400 points dropped as not finite" in str(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 3, 4)), np.zeros((2, 3, 4))), r"shape \(2, 3, 4\); a slice is a line \[T\] or a plane"),
        ((np.zeros((5, 7)), np.zeros((7, 5))), r"entropy has shape \(7, 5\) and log_volume \(5, 7\)"),
        ((np.full(40, -np.inf), np.arange(40.0)), r"only 0 of 40 points .*\n.* singular metric"),
        ((np.arange(15.0), np.arange(15.0)), "only 15 of 15 points"),
        ((np.arange(40.0), np.full(40, 0.5)), r"entropy is 0.5 at every point.*\n.*-scan.margin"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ProbeError, match=message):
        magnification(*arguments)


def test_fields_of_the_untrained_network_and_predictions_need_the_same_shape():
    field = wavy_boundary(20)
    with pytest.raises(ProbeError, match="initial has shape"):
        magnification(field, field**2, initial=field[1:])
    with pytest.raises(ProbeError, match="predictions has shape"):
        magnification(field, field**2, predictions=field[1:] > 0)
