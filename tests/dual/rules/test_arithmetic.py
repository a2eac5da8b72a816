"""Arithmetic: the rules of sums, products, quotients, powers and choices against torch.func.jvp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dual.rules.comparison import D, P, agreement, call, dual, mask

from torchgeom_probe.dual import DualTensor

_binary = [
    call(D(5, 7), D(5, 7)),
    call(D(5, 7), D(7)),
    call(D(7), D(3, 5, 7)),
    call(D(5, 1), D(1, 7)),
    call(D(5, 7), P(5, 7)),
    call(D(5, 7), P(3, 5, 1)),
    call(P(3, 5, 7), D(7)),
    call(P(7), D(3, 5, 7)),
    call(P(), D(3, 5)),
    call(D(), P(3, 5)),
    call(D(), D(3, 5)),
]

_in_place = [
    call(D(5, 7), D(5, 7)),
    call(D(5, 7), D(7)),
    call(D(5, 7), P(5, 1)),
    call(D(5, 7), D()),
    call(D(5, 7), 1.5),
]

_scalars = [call(D(5, 7), 2.5), call(D(5, 7), 3), call(D(), 2.5)]

_alpha = [call(D(5, 7), D(7), alpha=1.5), call(D(5, 7), P(3, 5, 7), alpha=1.5), call(P(3, 5, 7), D(7), alpha=1.5)]

_below = [
    call(D(5, 7), D(5, 7, low=0.5)),
    call(D(7), D(3, 5, 7, low=0.5)),
    call(D(5, 7), P(3, 5, 7, low=0.5)),
    call(P(3, 5, 7), D(7, low=0.5)),
    call(P(7), D(3, 5, 7, low=0.5)),
    call(P(), D(3, low=0.5)),
]

CASES = {
    "add sub": [*_binary, *_scalars, *_alpha],
    "subtract": [*_binary[:3], *_alpha],
    "rsub": [*_scalars[:2], call(D(5, 7), D(7), alpha=1.5), call(D(5, 7), P(7))],
    "__add__ __sub__ __mul__": [*_binary[:6], *_scalars],
    "__radd__ __rmul__": _scalars,
    "__rsub__": [*_scalars, call(D(5, 7), P(7))],
    "mul": [*_binary, *_scalars],
    "multiply": _binary[:3],
    "div __truediv__": [*_below, *_scalars],
    "divide true_divide __div__": _below,
    "__rtruediv__": [call(D(5, 7, low=0.5), 2.5), call(D(5, low=0.5), P(3, 5))],
    "__rdiv__": [call(D(5, 7, low=0.5), 2.5)],
    "add_ sub_ subtract_ mul_ multiply_ __iadd__ __isub__ __imul__": _in_place,
    "div_ divide_ true_divide_ __itruediv__ __idiv__": [
        call(D(5, 7), D(7, low=0.5)),
        call(D(5, 7), P(5, 1, low=0.5)),
        call(D(5, 7), 1.5),
    ],
    "neg negative neg_ negative_ __neg__ __pos__ positive": [call(D(5, 7))],
    "pow": [call(D(5, 7), 3), call(D(5, 7, low=0.3), 1.7), call(D(5, 7, low=0.3), -0.5), call(1.7, D(5, 7))],
    "Tensor.pow __pow__": [call(D(5, 7), 3), call(D(5, 7, low=0.3), 1.7)],
    "__rpow__": [call(D(5, 7), 1.7)],
    "pow_ __ipow__": [call(D(5, 7), 3)],
    "maximum minimum": [call(D(5, 7), D(5, 7)), call(D(5, 7), P(3, 5, 7)), call(P(5, 7), D(7)), call(D(7), D(3, 5, 7))],
    "addcmul addcdiv": [
        call(D(5, 7), D(7, low=0.5), D(5, 7, low=0.5), value=1.5),
        call(D(5, 7), P(5, 7, low=0.5), D(7, low=0.5)),
    ],
    "addcmul_ addcdiv_": [call(D(5, 7), D(7, low=0.5), D(5, 7, low=0.5), value=1.5)],
    "lerp": [call(D(5, 7), D(7), 0.3), call(D(5, 7), P(5, 7), D(7)), call(P(5, 7), D(5, 7), 0.3)],
    "lerp_": [call(D(5, 7), D(7), 0.3)],
    "where": [
        call(mask(5, 7), D(5, 7), D(7)),
        call(mask(5, 7), D(5, 7), 2.5),
        call(mask(3, 5, 7), P(7), D(5, 7)),
        call(mask(5, 7), D(5, 7), P(3, 5, 7)),
    ],
    "Tensor.where": [call(D(5, 7), mask(5, 7), D(7)), call(P(5, 7), mask(5, 7), D(7)), call(D(7), mask(5, 7), 2.5)],
    "masked_fill": [call(D(5, 7), mask(5, 7), 2.5), call(D(3, 5, 7), mask(7), P()), call(D(1, 7), mask(5, 7), 0.5)],
    "masked_fill_": [call(D(5, 7), mask(5, 6), 2.5), call(D(3, 5, 7), mask(6), 0.5)],
    "atan2 arctan2 hypot logaddexp logaddexp2": [
        call(D(5, 7), D(5, 7, low=0.5)),
        call(D(5, 7), P(3, 5, 1, low=0.5)),
        call(P(3, 5, 7), D(7, low=0.5)),
        call(D(7), D(3, 5, 1, low=0.5)),
        call(P(), D(3, 5, low=0.5)),
    ],
    "remainder fmod __mod__": [
        call(D(5, 7, low=-5), 1.3),
        call(D(5, 7, low=-5), D(7, low=0.5)),
        call(D(7, low=-5), P(3, 5, 7, low=0.5)),
        call(P(3, 5, 7, low=-5), D(7, low=0.5)),
    ],
    "copysign nextafter": [call(D(5, 7), D(7)), call(D(5, 7), P(3, 5, 7)), call(P(5, 7), D(7))],
    "copysign_ nextafter_": [call(D(5, 7), D(7))],
    "atan2_ arctan2_ hypot_ remainder_ fmod_": [call(D(5, 7), D(7, low=0.5)), call(D(5, 7), P(5, 1, low=0.5))],
}

test_rule_agrees_with_jvp = agreement(CASES)


PROMOTIONS = [
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.complex64),
    (torch.float32, torch.int64),
    (torch.float32, torch.bool),
]


@pytest.mark.parametrize("op", [torch.add, torch.mul, torch.div, torch.sub], ids=lambda op: op.__name__)
@pytest.mark.parametrize(("own", "other"), PROMOTIONS, ids=str)
@pytest.mark.parametrize("shapes", [((5, 7), (7,)), ((), (3,)), ((3,), ()), ((), ())], ids=str)
def test_types_promote_as_the_primals_do(op: Any, own: torch.dtype, other: torch.dtype, shapes: Any) -> None:
    if op is torch.sub and other is torch.bool:
        pytest.skip("torch refuses to subtract a bool")
    x, t = torch.randn(shapes[0]).to(own), torch.randn(3, *shapes[0]).to(own)
    y = torch.full(shapes[1], 2.0).to(other)
    for left, right, flip in ((x, y, False), (y, x, True)):
        if flip and op is torch.div and other in (torch.int64, torch.bool):
            continue
        out = op(y, dual(x, t)) if flip else op(dual(x, t), y)
        assert out.dtype == op(left, right).dtype
        torch.testing.assert_close(out.primal, op(left, right))
        push = torch.func.jvp((lambda z: op(y, z)) if flip else (lambda z: op(z, y)), (x,), (t[0],))[1]
        torch.testing.assert_close(out.tangents[0].to(push.dtype), push, rtol=2e-2, atol=1e-2)
    if other.is_floating_point:
        both = op(dual(x, t), dual(y, torch.randn(3, *shapes[1]).to(other)))
        assert both.dtype == op(x, y).dtype


def test_slopes_do_not_overflow_where_their_squares_do() -> None:
    def slope(function: Any, a: float, b: float) -> float:
        return function(*(DualTensor(torch.tensor([p, t])) for p, t in ((a, 1.0), (b, 0.0)))).tangents.item()

    assert slope(torch.atan2, 1e-25, 1e-25) == pytest.approx(0.5e25)
    assert slope(torch.atan2, 1e25, 1e25) == pytest.approx(0.5e-25)
    assert slope(torch.hypot, 1e20, 1e20) == pytest.approx(0.5**0.5)
    one = DualTensor(torch.tensor([1e-40, 1.0]))
    assert (one / one).tangents.item() == 0  # a'/b and its counterpart are infinite
