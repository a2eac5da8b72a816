"""Sums, moments, norms and selections along axes, against torch.func.jvp."""

from __future__ import annotations

import pytest
import torch
from dual.rules.comparison import D, P, agreement, call, compare, dual, reference

CASES = {
    "sum mean": [
        call(D(3, 5, 7)),
        call(D(3, 5, 7), 1),
        call(D(3, 5, 7), (0, -1), True),
        call(D(3, 5, 7), dim=-1, keepdim=True),
    ],
    "cumsum": [call(D(3, 5, 7), 1), call(D(3, 5, 7), -1)],
    "diff": [call(D(5, 7)), call(D(5, 7), 2, 0)],
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
    ],
    "linalg.vector_norm": [
        call(D(3, 5, 7)),
        call(D(3, 5, 7), 2, 1),
        call(D(3, 5, 7), dim=(0, 2), keepdim=True),
        call(D(3, 5, 7), 1, -1),
        call(D(3, 5, 7), 3, (0, 2)),
        call(D(3, 5, 7), 1.5),
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

test_rule_agrees_with_jvp = agreement(CASES)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_distances_of_all_pairs(p: float) -> None:
    # torch has no forward derivative of cdist: its reverse one is the oracle
    x, y = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    t, s = torch.randn(4, *x.shape, dtype=torch.float64), torch.randn(4, *y.shape, dtype=torch.float64)
    by_x, by_y = torch.autograd.functional.jacobian(lambda a, b: torch.cdist(a, b, p), (x, y))
    out = torch.cdist(dual(x, t), dual(y, s), p)
    torch.testing.assert_close(out.primal, torch.cdist(x, y, p))
    torch.testing.assert_close(
        out.tangents, torch.einsum("bijcnd,kcnd->kbij", by_x, t) + torch.einsum("bijcnd,kcnd->kbij", by_y, s)
    )


def test_extremes_share_a_tie() -> None:
    x, t = torch.tensor([2.0, 1.0, 2.0], dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    for function in (lambda z: z.amax(0), lambda z: z.max(), lambda z: torch.maximum(z, z.flip(0)), lambda z: z.min()):
        values, pushes = reference(lambda z, f=function: [f(z)], [x], [t])
        compare([function(dual(x, t))], values, pushes)
