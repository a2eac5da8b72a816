"""Copies, fills, changes of type and new tensors, against torch.func.jvp."""

from __future__ import annotations

import pytest
import torch
from dual.rules.comparison import D, P, agreement, agreement_with_differences, call, dual

CASES = {
    "copy_": [call(D(5, 7), D(5, 7)), call(D(5, 7), P(7)), call(D(5, 7), D(7))],
    "zero_ double cpu cdouble": [call(D(5, 7))],
    "zeros_like ones_like": [call(D(5, 7)), call(D(5, 7, dtype=torch.complex128))],
    "fill_": [call(D(5, 7), 2.5), call(D(5, 7), D()), call(D(5, 7), P())],
    "clone contiguous": [call(D(5, 7)), call(D(2, 3, 5, 7), memory_format=torch.channels_last)],
    "to": [
        call(D(5, 7), torch.float64),
        call(D(5, 7), P(3)),
        call(D(5, 7), "cpu"),
        call(D(2, 3, 5, 7), memory_format=torch.channels_last),
        call(P(5, 7), D(3)),
        call(D(5, 7), torch.complex128),
        call(D(2, 3, 5, 7), torch.float64, memory_format=torch.channels_last),
    ],
    "sign_ floor_ ceil_ round_ trunc_ fix_": [call(D(5, 7))],
    "eq_ ne_ not_equal_ lt_ less_ le_ less_equal_ gt_ greater_ ge_ greater_equal_": [call(D(5, 7), D(7))],
    "type_as": [call(D(5, 7), P(3)), call(P(5, 7), D(3))],
    "type": [call(D(5, 7)), call(D(5, 7), torch.float64)],
    "full_like": [call(D(5, 7), 2.5)],
    "new_zeros new_ones": [call(D(5, 7), 3, 5), call(D(5, 7), (3, 5))],
    "new_full": [call(D(5, 7), (3, 5), 2.5)],
}

DIFFERENCES = {
    "logical_not_": [call(D(5, 7))],
    "logical_and_ logical_or_ logical_xor_": [call(D(5, 7), D(7))],
    "heaviside_": [call(D(5, 7), P(7))],
    "floor_divide_ __ifloordiv__": [call(D(5, 7), 0.7)],
    "torch.normal": [call(D(5, 7), D(7, low=0.5)), call(D(5, 7), 0.3), call(P(5, 7), D(5, 7, low=0.5)), call(D(5, 7))],
}

test_rule_agrees_with_jvp = agreement(CASES)
test_rule_agrees_with_differences = agreement_with_differences(DIFFERENCES)


def test_written_like_the_input_a_complex_tensor_keeps_its_tangents() -> None:
    spectrum = dual(torch.randn(5, dtype=torch.complex128), torch.randn(3, 5, dtype=torch.complex128))
    out = torch.zeros_like(spectrum)
    out[1:3] = spectrum[1:3] * 2j
    assert torch.equal(out.buffer[:, 1:3], spectrum.buffer[:, 1:3] * 2j)
    assert not out.buffer[:, 3:].any()


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


def test_a_normal_draw_of_no_deviation_is_its_mean() -> None:
    std = dual(torch.tensor([0.0, 2.0]), torch.tensor([[3.0, 5.0]]))
    torch.manual_seed(1)
    drawn = torch.normal(torch.tensor([1.0, 1.0]), std)
    torch.manual_seed(1)
    noise = torch.normal(torch.zeros(2), torch.ones(2))
    assert torch.equal(drawn.primal, 1 + std.primal * noise)
    assert torch.equal(drawn.tangents, std.tangents * noise)
