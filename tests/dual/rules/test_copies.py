"""Copies, fills, changes of type and new tensors, against torch.func.jvp."""

from __future__ import annotations

import pytest
import torch
from dual.rules.comparison import D, P, agreement, call, dual

CASES = {
    "copy_": [call(D(5, 7), D(5, 7)), call(D(5, 7), P(7)), call(D(5, 7), D(7))],
    "zero_ double cpu cdouble zeros_like ones_like": [call(D(5, 7))],
    "fill_": [call(D(5, 7), 2.5), call(D(5, 7), D()), call(D(5, 7), P())],
    "clone contiguous": [call(D(5, 7)), call(D(2, 3, 5, 7), memory_format=torch.channels_last)],
    "to": [
        call(D(5, 7), torch.float64),
        call(D(5, 7), P(3)),
        call(D(5, 7), "cpu"),
        call(D(2, 3, 5, 7), memory_format=torch.channels_last),
        call(P(5, 7), D(3)),
        call(D(5, 7), torch.complex128),
    ],
    "type_as": [call(D(5, 7), P(3)), call(P(5, 7), D(3))],
    "type": [call(D(5, 7)), call(D(5, 7), torch.float64)],
    "full_like": [call(D(5, 7), 2.5)],
    "new_zeros new_ones": [call(D(5, 7), 3, 5), call(D(5, 7), (3, 5))],
    "new_full": [call(D(5, 7), (3, 5), 2.5)],
}

test_rule_agrees_with_jvp = agreement(CASES)


@pytest.mark.parametrize("name", ["float", "half", "bfloat16", "cfloat"])
def test_casts(name: str) -> None:
    x, t = torch.randn(5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    out = getattr(dual(x, t), name)()
    assert out.dtype == getattr(x, name)().dtype
    assert torch.equal(out.tangents, getattr(t, name)())
    assert torch.equal(dual(x, t).long(), x.long())
    assert torch.equal(dual(x, t).to(torch.int32), x.to(torch.int32))


@pytest.mark.parametrize(
    "name", "normal_ uniform_ bernoulli_ random_ exponential_ cauchy_ log_normal_ geometric_".split()
)
def test_random_fills_have_no_tangents(name: str) -> None:
    arguments = (0.5,) if name in ("bernoulli_", "geometric_") else ()
    x = dual(torch.zeros(7), torch.ones(3, 7))
    torch.manual_seed(1)
    assert getattr(x, name)(*arguments) is x
    torch.manual_seed(1)
    assert torch.equal(x.primal, getattr(torch.zeros(7), name)(*arguments))
    assert not x.tangents.any()


def test_empty_tensors_can_be_written_to() -> None:
    x = dual(torch.randn(5, 7), torch.randn(3, 5, 7))
    for made in (torch.empty_like(x), x.new_empty(5, 7)):
        made[:, :3], made[:, 3:] = x[:, :3], 0.0
        assert torch.equal(made.tangents[..., :3], x.tangents[..., :3])
        assert not made.tangents[..., 3:].any()
