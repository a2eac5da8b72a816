"""Elementwise functions: value and derivative against torch.func.jvp of the same op."""

from __future__ import annotations

import copy

import pytest
import torch
from dual.rules.comparison import Call, D, P, agreement, call, compare, dual, reference
from torch import nn

from torchgeom_probe.dual import recording
from torchgeom_probe.dual.rules.elementwise import BY_ONE_JVP, SLOPES

#: Elementwise functions: where they are defined, and their further arguments.
DOMAINS = {
    "log log2 log10 sqrt rsqrt lgamma digamma gammaln psi entr reciprocal float_power log1p": (0.3, 3.0),
    "asin acos atanh arcsin arccos arctanh erfinv": (-0.9, 0.9),
    "logit ndtri": (0.1, 0.9),
    "acosh arccosh": (1.3, 3.0),
    "relu6 hardtanh": (-3.0, 9.0),
    "hardswish hardsigmoid": (-5.0, 5.0),
    "mvlgamma": (3.0, 5.0),
    "threshold": (-1.0, 1.0),
}
ARGUMENTS = {
    "hardtanh": [call(-1.3, 1.7)],
    "threshold": [call(0.1, 0.4)],
    "clamp": [call(-0.5, 0.7), call(max=0.4), call(P(5, 7, low=-1, high=0), P(7, low=0, high=1))],
    "clip": [call(-0.5, 0.7)],
    "clamp_min": [call(0.3)],
    "clamp_max": [call(0.3)],
    "leaky_relu": [call(), call(0.2)],
    "celu": [call(), call(1.3)],
    "softplus": [call(), call(2.0, 1.0)],
    "rrelu": [call(0.1, 0.3, False)],
    "mvlgamma": [call(2)],
    "float_power": [call(1.7)],
    "logit": [call(), call(0.2)],
    "gelu": [call(), call(approximate="tanh")],
}

CASES: dict[str, list[Call]] = {
    "relu": [call(D(5, 7)), call(D())],
    "relu_": [call(D(5, 7))],
    "prelu": [call(D(5, 7), P(1)), call(D(2, 3, 7), P(3)), call(D(5), P(1))],
    "glu": [call(D(5, 6)), call(D(6, 5), 0)],
    "dropout dropout_ dropout1d feature_dropout feature_dropout_": [call(D(2, 3, 5), 0.5, False)],
    "alpha_dropout alpha_dropout_ feature_alpha_dropout feature_alpha_dropout_": [call(D(2, 3, 5), 0.5, False)],
    "dropout2d": [call(D(2, 3, 5, 7), 0.5, False)],
    "dropout3d": [call(D(2, 3, 5, 7, 2), 0.5, False)],
}
for _name in [*SLOPES, *BY_ONE_JVP]:
    _low, _high = next((domain for names, domain in DOMAINS.items() if _name in names.split()), (-2.0, 2.0))
    _arguments = ARGUMENTS.get(_name, [call()])
    _calls = [Call((D(5, 7, low=_low, high=_high), *c.args), c.kwargs) for c in _arguments]
    CASES[_name] = [*_calls, Call((D(low=_low, high=_high), *_arguments[0].args))]
    CASES[_name + "_"] = _calls

test_rule_agrees_with_jvp = agreement(CASES)


def test_in_place_through_a_view() -> None:
    x = dual(torch.tensor([[-1.0, -2.0, 3.0]]), torch.tensor([[[5.0, 6.0, 7.0]]]))
    y = x[:, 1:]
    assert y.relu_() is y
    assert x.primal.tolist() == [[-1.0, 0.0, 3.0]]
    assert x.tangents.tolist() == [[[5.0, 0.0, 7.0]]]


ACTIVATIONS = [
    nn.ReLU(True),
    nn.ReLU6(True),
    nn.LeakyReLU(0.2, True),
    nn.ELU(1.3, True),
    nn.CELU(0.7, True),
    nn.SELU(True),
    nn.SiLU(True),
    nn.Mish(True),
    nn.Hardswish(True),
    nn.Hardsigmoid(True),
    nn.Hardtanh(-1.0, 0.5, True),
    nn.Threshold(0.1, 0.3, True),
    nn.RReLU(0.1, 0.3, True),
    nn.Dropout(0.5, True),
]


@pytest.mark.parametrize("module", ACTIVATIONS, ids=lambda m: type(m).__name__)
def test_in_place_modules_write_to_their_input(module: nn.Module) -> None:
    module.eval()
    x, t = torch.randn(5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
    plain = copy.deepcopy(module)
    plain.inplace = False
    values, pushes = reference(lambda z: [plain(z)], [x], [t])
    z = dual(x, t)
    base = z[:, :]
    with torch.no_grad(), recording() as used:
        assert module(z) is z
    assert not used["fallback"]
    compare([base], values, pushes)
