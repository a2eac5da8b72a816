"""Softmax and attention, against torch.func.jvp."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dual.rules.comparison import D, P, agreement, call, dual, mask

from torchgeom_probe.dual.rules import attention

Q, K, V = D(2, 3, 5, 7), D(2, 3, 11, 7), D(2, 3, 11, 13)
q, k, v = P(2, 3, 5, 7), P(2, 3, 11, 7), P(2, 3, 11, 13)

CASES = {
    "softmax log_softmax": [
        call(D(3, 5, 7), -1),
        call(D(3, 5, 7), 1),
        call(D(7), 0),
        call(D(7), dim=0),
        call(D(101, 103), -1),
    ],
    "_safe_softmax": [call(D(3, 5, 7), -1), call(D(101, 103), 0)],
    "softmin": [call(D(3, 5, 7), -1), call(D(3, 5, 7), dim=1)],
    "logsumexp": [call(D(3, 5, 7), -1), call(D(3, 5, 7), (0, 2)), call(D(3, 5, 7), 1, True)],
    "scaled_dot_product_attention": [
        call(Q, K, V),
        call(D(3, 5, 7), D(3, 11, 7), D(3, 11, 13)),
        call(Q, k, v),
        call(q, K, v),
        call(q, k, V),
        call(q, K, V, scale=0.7),
        call(Q, K, V, P(5, 11)),
        call(Q, K, V, P(2, 1, 5, 11)),
        call(Q, K, V, P(1, 3, 5, 11)),
        call(Q, K, V, D(3, 5, 11)),
        call(Q, K, V, mask(5, 11)),
        call(Q, K, V, mask(2, 3, 5, 11)),
        call(Q, K, V, is_causal=True),
        call(D(2, 6, 5, 7), D(2, 3, 11, 7), D(2, 3, 11, 13), enable_gqa=True),
        call(D(2, 6, 5, 7), D(2, 3, 11, 7), P(2, 3, 11, 13), is_causal=True, enable_gqa=True),
        call(D(1, 2, 257, 3), D(1, 2, 263, 3), D(1, 2, 263, 5)),
        call(D(5, 7), D(11, 7), D(11, 13), mask(5, 11)),
        call(q, k, v, D(5, 11)),
    ],
}

test_rule_agrees_with_jvp = agreement(CASES)


def test_attention_in_pieces_equals_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (dual(torch.randn(2, 3, 11, 5), torch.randn(7, 2, 3, 11, 5)) for _ in range(3))
    bias = torch.randn(2, 1, 11, 11)
    at_once = F.scaled_dot_product_attention(q, k, v, bias)
    for budget in (1, 3 * 11 * 11 * 4, 15 * 11 * 11 * 4):
        monkeypatch.setattr(attention, "_SCORE_BYTES", {"cpu": budget})
        in_pieces = F.scaled_dot_product_attention(q, k, v, bias)
        torch.testing.assert_close(in_pieces.buffer, at_once.buffer)


def test_a_row_masked_out_entirely_is_zero() -> None:
    q, k, v = (dual(torch.randn(1, 1, 3, 5), torch.randn(2, 1, 1, 3, 5)) for _ in range(3))
    seen = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    for out in (F.scaled_dot_product_attention(q, k, v, seen), F.scaled_dot_product_attention(q[0], k, v, seen)):
        assert not out.buffer[..., 1, :].any()
        assert out.buffer.isfinite().all()


def test_under_autocast_attention_runs_in_the_narrow_type() -> None:
    q, k, v = (dual(torch.randn(2, 3, 5, 7), torch.randn(2, 2, 3, 5, 7)) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = F.scaled_dot_product_attention(q, k, v, torch.zeros(5, 5))
    assert out.dtype == out.buffer.dtype == torch.bfloat16
    torch.testing.assert_close(out.buffer.float(), exact.buffer, rtol=0.1, atol=0.1)
