"""Products with weights and of two duals, against torch.func.jvp."""

from __future__ import annotations

from dual.rules.comparison import D, P, agreement, call

_matrices = [call(D(5, 7), D(7, 3)), call(D(5, 7), P(7, 3)), call(P(5, 7), D(7, 3))]

CASES = {
    "bilinear": [
        call(D(5, 3), D(5, 2), P(7, 3, 2), P(7)),
        call(D(2, 5, 3), P(2, 5, 2), P(7, 3, 2)),
        call(P(5, 3), D(5, 2), P(7, 3, 2), P(7)),
    ],
    "linear": [call(D(2, 5, 7), P(3, 7), P(3)), call(D(7), P(3, 7)), call(D(5, 7), P(7))],
    "matmul": [
        *_matrices,
        call(D(2, 5, 7), D(2, 7, 3)),
        call(D(2, 3, 5, 7), D(7, 3)),
        call(D(7, 3), D(2, 3, 5)),
        call(P(2, 5, 7), D(7, 3)),
        call(D(5, 7), P(2, 7, 3)),
        call(D(7), D(7, 3)),
        call(D(5, 7), P(7)),
        call(D(7), D(7)),
        call(D(2, 1, 5, 7), D(1, 3, 7, 2)),
        call(D(3, 97, 101), D(3, 101, 89)),
    ],
    "__matmul__": [*_matrices, call(D(2, 5, 7), D(2, 7, 3)), call(P(2, 5, 7), D(7, 3))],
    "__rmatmul__": [call(D(7, 3), P(5, 7)), call(D(3, 5), D(2, 3))],
    "mm": _matrices,
    "bmm": [call(D(2, 5, 7), D(2, 7, 3)), call(D(2, 5, 7), P(2, 7, 3)), call(P(2, 5, 7), D(2, 7, 3))],
    "mv": [call(D(5, 7), D(7)), call(D(5, 7), P(7)), call(P(5, 7), D(7))],
    "dot": [call(D(7), D(7)), call(P(7), D(7))],
    "vdot": [call(D(7), D(7))],
    "inner": [call(D(5, 7), D(3, 7)), call(D(7), P(3, 7))],
    "outer": [call(D(5), D(7)), call(P(5), D(7))],
    "ger": [call(D(5), D(7))],
    "kron": [call(D(2, 3), D(5, 2)), call(D(2, 3), P(2, 2))],
    "tensordot": [call(D(2, 3, 5), D(3, 5, 7)), call(D(2, 3, 5), P(5, 7), dims=1)],
    "cross": [call(D(5, 3), D(5, 3), dim=-1), call(D(5, 3), P(5, 3), dim=1)],
    "vecdot": [call(D(5, 3), D(5, 3)), call(D(5, 3), P(3))],
    "einsum": [
        call("bij,bjk->bik", D(2, 3, 5), D(2, 5, 7)),
        call("...ij,jk->...ik", D(2, 3, 5), P(5, 7)),
        call("ij,bjk->bik", P(3, 5), D(2, 5, 7)),
        call("bij->bji", D(2, 3, 5)),
        call("...i->...", D(2, 3, 5)),
        call("i,ij,j->", D(3), D(3, 5), D(5)),
        call("ij,jk", [D(3, 5), D(5, 7)]),
    ],
    "addmm": [call(D(5, 3), D(5, 7), P(7, 3)), call(P(3), D(5, 7), D(7, 3), beta=0.5, alpha=1.5)],
    "addmm_": [call(D(5, 3), D(5, 7), P(7, 3))],
    "addmv": [call(D(5), D(5, 7), P(7)), call(P(5), D(5, 7), D(7), beta=0.5)],
    "addmv_": [call(D(6), P(5, 7), D(7))],
    "addr": [call(D(5, 7), D(5), D(7), alpha=1.5)],
    "addr_": [call(D(5, 7), P(5), D(7), alpha=1.5)],
    "baddbmm": [call(D(2, 5, 3), D(2, 5, 7), D(2, 7, 3), beta=0.5), call(P(2, 5, 3), D(2, 5, 7), P(2, 7, 3), beta=0)],
    "baddbmm_": [call(D(2, 5, 3), D(2, 5, 7), P(2, 7, 3))],
    "addbmm": [call(D(5, 3), D(2, 5, 7), P(2, 7, 3))],
}

test_rule_agrees_with_jvp = agreement(CASES)
