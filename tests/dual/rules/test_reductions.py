"""Sums, moments, norms and selections along axes, against torch.func.jvp."""

from __future__ import annotations

import pytest
import torch
from dual.rules.comparison import D, P, agreement, agreement_with_differences, call, compare, dual, reference

CASES = {
    "sum mean": [
        call(D(3, 5, 7)),
        call(D(3, 5, 7), dim=[]),
        call(D(3, 5, 7), 1),
        call(D(3, 5, 7), (0, -1), True),
        call(D(3, 5, 7), dim=-1, keepdim=True),
    ],
    "cumsum": [call(D(3, 5, 7), 1), call(D(3, 5, 7), -1)],
    "diff": [
        call(D(5, 7)),
        call(D(5, 7), 2, 0),
        call(D(5, 7), prepend=P(5, 1)),
        call(P(5, 7), dim=0, prepend=D(2, 7), append=P(1, 7)),
    ],
    "F.binary_cross_entropy": [
        call(P(5, 7, low=0.1, high=0.9), D(5, 7, low=0, high=1)),
        call(P(5, 7, low=0.1, high=0.9), D(5, 7, low=0, high=1), reduction="sum"),
        call(P(5, 7, low=0.1, high=0.9), D(5, 7, low=0, high=1), P(7, low=0), reduction="none"),
    ],
    "trace": [call(D(5, 5))],
    "trapezoid": [call(D(5, 7)), call(D(5, 7), dim=0)],
    "trapz": [call(D(5, 7))],
    "var std var_mean std_mean": [
        call(D(3, 5, 7)),
        call(D(3, 5, 7), False),
        call(D(3, 5, 7), 1),
        call(D(3, 5, 7), (0, -1), False, True),
        call(D(3, 5, 7), dim=(1, 2), correction=0, keepdim=True),
        call(D(3, 5, 7), dim=1, correction=2),
        call(D(3, 5, 7), correction=0, keepdim=True),
    ],
    "linalg.vector_norm": [
        call(D(3, 5, 7)),
        call(D(3, 5, 7), 2, 1),
        call(D(3, 5, 7), dim=(0, 2), keepdim=True),
        call(D(3, 5, 7), 1, -1),
        call(D(3, 5, 7), 3, (0, 2)),
        call(D(3, 5, 7), 1.5),
        call(D(3, 5, 7), dim=()),
    ],
    "cosine_similarity": [
        call(D(3, 5, 7), D(3, 5, 7)),
        call(D(3, 5, 7), P(1, 5, 7), dim=-1),
        call(P(5, 7), D(5, 7), 0, 1.0),
    ],
    "pairwise_distance": [call(D(5, 7), D(5, 7)), call(D(5, 7), P(7), 3.0), call(P(5, 7), D(5, 7), 1.0, 1e-3, True)],
    "torch.norm": [call(D(3, 5, 7)), call(D(3, 5, 7), 2, -1, True), call(D(3, 5, 7), "fro", (0, 2))],
    "Tensor.norm": [call(D(3, 5, 7)), call(D(3, 5, 7), p=2, dim=1)],
    "linalg.norm": [call(D(3, 5, 7)), call(D(3, 5, 7), dim=-1), call(D(3, 5, 7), 2, 1, True)],
    "amax amin": [call(D(3, 5, 7), 1), call(D(3, 5, 7), (0, -1), True), call(D(3, 5, 7))],
    "max min": [
        call(D(3, 5, 7)),
        call(D(3, 5, 7), 1),
        call(D(3, 5, 7), dim=-1, keepdim=True),
        call(D(5, 7), D(7)),
        call(D(7), P(5, 7)),
    ],
    "median nanmedian": [call(D(3, 5, 7), 1), call(D(3, 5, 7), dim=-1, keepdim=True)],
    "mode cummax cummin": [call(D(3, 5, 7), 1)],
    "sort": [call(D(3, 5, 7)), call(D(3, 5, 7), 1, True), call(D(3, 5, 7), dim=0, descending=True)],
    "topk": [call(D(3, 5, 7), 2), call(D(3, 5, 7), 3, 1, False), call(D(3, 5, 7), k=2, dim=0)],
    "kthvalue": [call(D(3, 5, 7), 2), call(D(3, 5, 7), 3, 1, True)],
}

#: torch has no forward derivative of these, or a wrong one (of no axes)
DIFFERENCES = {
    "var std": [call(D(3, 5, 7), [], True, True)],
    "cdist": [call(D(2, 5, 7), D(2, 3, 7), p) for p in (1.0, 2.0, 3.0)],
    "pdist": [call(D(5, 7), p) for p in (1.0, 2.0, 3.0)],
}

test_rule_agrees_with_jvp = agreement(CASES)
test_rule_agrees_with_differences = agreement_with_differences(DIFFERENCES)


def test_the_deviation_of_what_does_not_vary_has_derivative_zero() -> None:
    x, t = torch.ones(5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
    values, pushes = reference(lambda z: [z.std(1), torch.std_mean(z)[0]], [x], [t])
    z = dual(x, t)
    compare([z.std(1), torch.std_mean(z)[0]], values, pushes)
    assert not z.std(1).tangents.any()


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_the_deviation_of_one_number_is_not_one() -> None:
    x = dual(torch.randn(5, 1), torch.randn(3, 5, 1))
    assert x.std(1).buffer.isnan().all()
    assert x.var(1).buffer.isnan().all()


SPELLINGS = {
    "max": lambda z: z.max(axis=1).values,
    "topk": lambda z: torch.topk(z, 2, axis=0).values,
    "sort": lambda z: z.sort(axis=0).values,
    "std": lambda z: z.std(axis=1),
    "var_mean": lambda z: torch.var_mean(z, 1, keepdims=True)[0],
    "sum": lambda z: z.sum(axis=0, keepdims=True),
    "chunk": lambda z: torch.chunk(z, 2, axis=1)[1],
    "tensor_split": lambda z: torch.tensor_split(z, 2, axis=1)[0],
    "cat": lambda z: torch.cat([z, z], axis=1),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_an_axis_by_the_name_that_numpy_gives_it(name: str) -> None:
    x, t = torch.randn(5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
    values, pushes = reference(lambda z: [SPELLINGS[name](z)], [x], [t])
    compare([SPELLINGS[name](dual(x, t))], values, pushes)


def test_extremes_share_a_tie() -> None:
    x, t = torch.tensor([2.0, 1.0, 2.0], dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    for function in (lambda z: z.amax(0), lambda z: z.max(), lambda z: torch.maximum(z, z.flip(0)), lambda z: z.min()):
        values, pushes = reference(lambda z, f=function: [f(z)], [x], [t])
        compare([function(dual(x, t))], values, pushes)
