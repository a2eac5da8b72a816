"""How often the procedure that ships rejects a true null, and finds a planted effect; benchmarks/README.md has more."""

import math

import pytest

pytest.importorskip("sklearn")
from benchmarks.boundary import Draws, odd_or_even

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def draws():
    return Draws(networks=8, epochs=120)


def rejected(p_values):
    return sum(p < 0.05 for p in p_values) / len(p_values)


@pytest.mark.parametrize("contrast", ["mirror", "peak"])  # same_class is not calibrated, and claims nothing
@pytest.mark.parametrize("null", ["field 0.35", "field 0.5", "field 2", "two 1", "two 4", "untrained", "foreign"])
def test_true_nulls_are_rejected_in_no_more_than_5_percent(draws, null, contrast):
    kind, _, length = null.partition(" ")
    draw = {
        "field": lambda i: draws.fields(i, contrast, float(length)),
        "two": lambda i: draws.fields(i, contrast, float(length), odd_or_even),
        "untrained": lambda i: draws.untrained(i, contrast),
        "foreign": lambda i: draws.foreign(i, contrast),
    }[kind]
    count = 400
    assert rejected([draw(i) for i in range(count)]) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / count)


@pytest.mark.parametrize("contrast", ["mirror", "peak"])
def test_a_tenth_of_a_nat_is_found_among_50_pairs(draws, contrast):
    assert rejected([draws.planted(i, contrast, 0.1) for i in range(100)]) >= 0.8
