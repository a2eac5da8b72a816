"""Every fused rule against torch.func.jvp of the same op, one direction at a time, in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchgeom_probe.dual import RULES, DualTensor, recording
from torchgeom_probe.dual.rules.elementwise import BY_ONE_JVP, SLOPES
from torchgeom_probe.dual.ops import mutates

SPACES = {
    "torch": torch,
    "Tensor": torch.Tensor,
    "F": F,
    "nn": torch._C._nn,
    "special": torch.special,
    "linalg": torch.linalg,
    "fft": torch.fft,
}


@dataclass(frozen=True)
class Operand:
    shape: tuple[int, ...]
    low: float = -2.0
    high: float = 2.0
    dtype: torch.dtype = torch.float64
    dual: bool = True

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        real = self.dtype if self.dtype.is_floating_point else torch.float64
        u = torch.rand(self.shape, generator=generator, dtype=real)
        value = self.low + (self.high - self.low) * u
        if self.dtype.is_complex:
            value = torch.complex(value, torch.rand(self.shape, generator=generator, dtype=real))
        return value


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def D(*shape: int, low: float = -2.0, high: float = 2.0, dtype: torch.dtype = torch.float64) -> Operand:
    return Operand(shape, low, high, dtype)


def P(*shape: int, low: float = -2.0, high: float = 2.0, dtype: torch.dtype = torch.float64) -> Operand:
    return Operand(shape, low, high, dtype, dual=False)


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs)


def mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4


def index(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(5))


def places(count: int, *shape: int) -> torch.Tensor:
    """Places in a plane of so many, none of them twice in one plane."""
    generator = torch.Generator().manual_seed(7)
    chosen = [torch.randperm(count, generator=generator) for _ in range(shape[0] * shape[1])]
    size = torch.Size(shape[2:]).numel()
    return torch.stack([each[:size] for each in chosen]).reshape(shape)


# ------------------------------------------------------------------------------------------------------- the table

#: Elementwise functions: where they are defined, and their further arguments.
DOMAINS = {
    **dict.fromkeys(
        "log log2 log10 sqrt rsqrt lgamma digamma gammaln psi entr reciprocal float_power log1p".split(),
        (0.3, 3.0),
    ),
    **dict.fromkeys("asin acos atanh arcsin arccos arctanh erfinv".split(), (-0.9, 0.9)),
    **dict.fromkeys("logit ndtri".split(), (0.1, 0.9)),
    **dict.fromkeys("acosh arccosh".split(), (1.3, 3.0)),
    **dict.fromkeys("relu6 hardtanh".split(), (-3.0, 9.0)),
    **dict.fromkeys("hardswish hardsigmoid".split(), (-5.0, 5.0)),
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
}
for _gelu in ("gelu",):
    ARGUMENTS[_gelu] = [call(), call(approximate="tanh")]

CASES: dict[str, list[Call]] = {}
for _name in [*SLOPES, *BY_ONE_JVP]:
    _low, _high = DOMAINS.get(_name, (-2.0, 2.0))
    _calls = [
        Call((D(5, 7, low=_low, high=_high), *c.args), c.kwargs) for c in ARGUMENTS.get(_name, [call()])
    ]
    CASES[_name] = [*_calls, Call((D(low=_low, high=_high), *ARGUMENTS.get(_name, [call()])[0].args))]
    CASES[_name + "_"] = _calls

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
_alpha = [
    call(D(5, 7), D(7), alpha=1.5),
    call(D(5, 7), P(3, 5, 7), alpha=1.5),
    call(P(3, 5, 7), D(7), alpha=1.5),
]
_below = [
    call(D(5, 7), D(5, 7, low=0.5)),
    call(D(7), D(3, 5, 7, low=0.5)),
    call(D(5, 7), P(3, 5, 7, low=0.5)),
    call(P(3, 5, 7), D(7, low=0.5)),
    call(P(7), D(3, 5, 7, low=0.5)),
    call(P(), D(3, low=0.5)),
]
_image, _volume, _signal = D(2, 3, 7, 11), D(2, 3, 5, 7, 3), D(2, 3, 11)
_matrices = [
    call(D(5, 7), D(7, 3)),
    call(D(5, 7), P(7, 3)),
    call(P(5, 7), D(7, 3)),
]
_heads = {"q": (2, 3, 5, 7), "k": (2, 3, 11, 7), "v": (2, 3, 11, 13)}

CASES |= {
    "relu": [call(D(5, 7)), call(D())],
    "relu_": [call(D(5, 7))],
    "prelu": [call(D(5, 7), P(1)), call(D(2, 3, 7), P(3)), call(D(5), P(1))],
    "glu": [call(D(5, 6)), call(D(6, 5), 0)],
    **dict.fromkeys(
        "dropout dropout_ dropout1d feature_dropout feature_dropout_ alpha_dropout alpha_dropout_"
        " feature_alpha_dropout feature_alpha_dropout_".split(),
        [call(D(2, 3, 5), 0.5, False)],
    ),
    "dropout2d": [call(D(2, 3, 5, 7), 0.5, False)],
    "dropout3d": [call(D(2, 3, 5, 7, 2), 0.5, False)],
    # arithmetic
    "add": [*_binary, *_scalars, *_alpha],
    "sub": [*_binary, *_scalars, *_alpha],
    "subtract": [*_binary[:3], *_alpha],
    "rsub": [*_scalars[:2], call(D(5, 7), D(7), alpha=1.5), call(D(5, 7), P(7))],
    "__add__": [*_binary[:6], *_scalars],
    "__radd__": _scalars,
    "__sub__": [*_binary[:6], *_scalars],
    "__rsub__": [*_scalars, call(D(5, 7), P(7))],
    "mul": [*_binary, *_scalars],
    "multiply": _binary[:3],
    "__mul__": [*_binary[:6], *_scalars],
    "__rmul__": _scalars,
    "div": [*_below, *_scalars],
    "divide": _below,
    "true_divide": _below,
    "__truediv__": [*_below, *_scalars],
    "__div__": _below,
    "__rtruediv__": [call(D(5, 7, low=0.5), 2.5), call(D(5, low=0.5), P(3, 5))],
    "__rdiv__": [call(D(5, 7, low=0.5), 2.5)],
    **dict.fromkeys(
        "add_ sub_ subtract_ mul_ multiply_ __iadd__ __isub__ __imul__".split(),
        _in_place,
    ),
    **dict.fromkeys(
        "div_ divide_ true_divide_ __itruediv__ __idiv__".split(),
        [call(D(5, 7), D(7, low=0.5)), call(D(5, 7), P(5, 1, low=0.5)), call(D(5, 7), 1.5)],
    ),
    "neg": [call(D(5, 7))],
    "negative": [call(D(5, 7))],
    "neg_": [call(D(5, 7))],
    "negative_": [call(D(5, 7))],
    "__neg__": [call(D(5, 7))],
    "__pos__": [call(D(5, 7))],
    "positive": [call(D(5, 7))],
    "pow": [call(D(5, 7), 3), call(D(5, 7, low=0.3), 1.7), call(D(5, 7, low=0.3), -0.5), call(1.7, D(5, 7))],
    "Tensor.pow": [call(D(5, 7), 3), call(D(5, 7, low=0.3), 1.7)],
    "__pow__": [call(D(5, 7), 3), call(D(5, 7, low=0.3), 1.7)],
    "__rpow__": [call(D(5, 7), 1.7)],
    "pow_": [call(D(5, 7), 3)],
    "__ipow__": [call(D(5, 7), 3)],
    **dict.fromkeys(
        ("maximum", "minimum"),
        [call(D(5, 7), D(5, 7)), call(D(5, 7), P(3, 5, 7)), call(P(5, 7), D(7)), call(D(7), D(3, 5, 7))],
    ),
    **dict.fromkeys(
        ("addcmul", "addcdiv"),
        [
            call(D(5, 7), D(7, low=0.5), D(5, 7, low=0.5), value=1.5),
            call(D(5, 7), P(5, 7, low=0.5), D(7, low=0.5)),
        ],
    ),
    **dict.fromkeys(("addcmul_", "addcdiv_"), [call(D(5, 7), D(7, low=0.5), D(5, 7, low=0.5), value=1.5)]),
    "lerp": [call(D(5, 7), D(7), 0.3), call(D(5, 7), P(5, 7), D(7)), call(P(5, 7), D(5, 7), 0.3)],
    "lerp_": [call(D(5, 7), D(7), 0.3)],
    "where": [
        call(mask(5, 7), D(5, 7), D(7)),
        call(mask(5, 7), D(5, 7), 2.5),
        call(mask(3, 5, 7), P(7), D(5, 7)),
        call(mask(5, 7), D(5, 7), P(3, 5, 7)),
    ],
    "Tensor.where": [
        call(D(5, 7), mask(5, 7), D(7)),
        call(P(5, 7), mask(5, 7), D(7)),
        call(D(7), mask(5, 7), 2.5),
    ],
    "masked_fill": [
        call(D(5, 7), mask(5, 7), 2.5),
        call(D(3, 5, 7), mask(7), P()),
        call(D(1, 7), mask(5, 7), 0.5),
    ],
    "masked_fill_": [call(D(5, 7), mask(5, 6), 2.5), call(D(3, 5, 7), mask(6), 0.5)],
    **dict.fromkeys(
        "atan2 arctan2 hypot logaddexp logaddexp2".split(),
        [
            call(D(5, 7), D(5, 7, low=0.5)),
            call(D(5, 7), P(3, 5, 1, low=0.5)),
            call(P(3, 5, 7), D(7, low=0.5)),
            call(D(7), D(3, 5, 1, low=0.5)),
            call(P(), D(3, 5, low=0.5)),
        ],
    ),
    **dict.fromkeys(
        ("remainder", "fmod", "__mod__"),
        [
            call(D(5, 7, low=-5), 1.3),
            call(D(5, 7, low=-5), D(7, low=0.5)),
            call(D(7, low=-5), P(3, 5, 7, low=0.5)),
            call(P(3, 5, 7, low=-5), D(7, low=0.5)),
        ],
    ),
    **dict.fromkeys(
        "atan2_ arctan2_ hypot_ remainder_ fmod_".split(),
        [call(D(5, 7), D(7, low=0.5)), call(D(5, 7), P(5, 1, low=0.5))],
    ),
    "bilinear": [
        call(D(5, 3), D(5, 2), P(7, 3, 2), P(7)),
        call(D(2, 5, 3), P(2, 5, 2), P(7, 3, 2)),
        call(P(5, 3), D(5, 2), P(7, 3, 2), P(7)),
    ],
    # products
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
    "baddbmm": [
        call(D(2, 5, 3), D(2, 5, 7), D(2, 7, 3), beta=0.5),
        call(P(2, 5, 3), D(2, 5, 7), P(2, 7, 3), beta=0),
    ],
    "baddbmm_": [call(D(2, 5, 3), D(2, 5, 7), P(2, 7, 3))],
    "addbmm": [call(D(5, 3), D(2, 5, 7), P(2, 7, 3))],
    # softmax and attention
    **dict.fromkeys(
        ("softmax", "log_softmax"),
        [call(D(3, 5, 7), -1), call(D(3, 5, 7), 1), call(D(7), 0), call(D(7), dim=0), call(D(101, 103), -1)],
    ),
    "softmin": [call(D(3, 5, 7), -1), call(D(3, 5, 7), dim=1)],
    "logsumexp": [call(D(3, 5, 7), -1), call(D(3, 5, 7), (0, 2)), call(D(3, 5, 7), 1, True)],
    "scaled_dot_product_attention": [
        call(D(*_heads["q"]), D(*_heads["k"]), D(*_heads["v"])),
        call(D(3, 5, 7), D(3, 11, 7), D(3, 11, 13)),
        call(D(*_heads["q"]), P(*_heads["k"]), P(*_heads["v"])),
        call(P(*_heads["q"]), D(*_heads["k"]), P(*_heads["v"])),
        call(P(*_heads["q"]), P(*_heads["k"]), D(*_heads["v"])),
        call(P(*_heads["q"]), D(*_heads["k"]), D(*_heads["v"]), scale=0.7),
        call(D(*_heads["q"]), D(*_heads["k"]), D(*_heads["v"]), P(5, 11)),
        call(D(*_heads["q"]), D(*_heads["k"]), D(*_heads["v"]), P(2, 1, 5, 11)),
        call(D(*_heads["q"]), D(*_heads["k"]), D(*_heads["v"]), P(1, 3, 5, 11)),
        call(D(*_heads["q"]), D(*_heads["k"]), D(*_heads["v"]), D(3, 5, 11)),
        call(D(*_heads["q"]), D(*_heads["k"]), D(*_heads["v"]), mask(5, 11)),
        call(D(*_heads["q"]), D(*_heads["k"]), D(*_heads["v"]), mask(2, 3, 5, 11)),
        call(D(*_heads["q"]), D(*_heads["k"]), D(*_heads["v"]), is_causal=True),
        call(D(2, 6, 5, 7), D(2, 3, 11, 7), D(2, 3, 11, 13), enable_gqa=True),
        call(D(2, 6, 5, 7), D(2, 3, 11, 7), P(2, 3, 11, 13), is_causal=True, enable_gqa=True),
        call(D(1, 2, 257, 3), D(1, 2, 263, 3), D(1, 2, 263, 5)),
    ],
    # convolution, pooling, padding
    "conv1d": [call(_signal, P(5, 3, 3), P(5), padding=1), call(D(3, 11), P(5, 3, 3))],
    "conv2d": [
        call(_image, P(5, 3, 3, 3), P(5), 2, 1),
        call(_image, P(6, 1, 3, 3), None, groups=3),
        call(D(3, 7, 11), P(5, 3, 3, 3), P(5)),
        call(_image, P(5, 3, 3, 3), padding="same"),
    ],
    "conv3d": [call(_volume, P(5, 3, 2, 3, 1), P(5))],
    "conv_transpose1d": [call(_signal, P(3, 5, 3), P(5), 2)],
    "conv_transpose2d": [call(_image, P(3, 5, 3, 2), P(5), 2, 1)],
    "conv_transpose3d": [call(_volume, P(3, 5, 2, 3, 1))],
    "avg_pool1d": [call(_signal, 3, 2), call(D(3, 11), 3)],
    "avg_pool2d": [
        call(_image, 3, 2, 1),
        call(_image, 2, ceil_mode=True, count_include_pad=False),
        call(D(3, 7, 11), 3),
    ],
    "avg_pool3d": [call(_volume, 2)],
    "adaptive_avg_pool1d": [call(_signal, 3)],
    "adaptive_avg_pool2d": [call(_image, (3, 2)), call(_image, 1)],
    "F.adaptive_avg_pool2d": [call(_image, (3, None))],
    "adaptive_avg_pool3d": [call(_volume, (2, 3, 1))],
    "max_pool1d": [call(_signal, 3, 2)],
    "max_pool2d": [call(_image, 3, 2, 1), call(_image, 2, ceil_mode=True)],
    "max_pool3d": [call(_volume, 2)],
    "adaptive_max_pool1d": [call(_signal, 3)],
    "adaptive_max_pool2d": [call(_image, (3, 2))],
    "adaptive_max_pool3d": [call(_volume, (2, 3, 1))],
    "max_pool1d_with_indices": [call(_signal, 3, 2)],
    "max_pool2d_with_indices": [call(_image, 3, 2, 1)],
    "max_pool3d_with_indices": [call(_volume, 2)],
    "adaptive_max_pool1d_with_indices": [call(_signal, 3)],
    "adaptive_max_pool2d_with_indices": [call(_image, (3, 2))],
    "adaptive_max_pool3d_with_indices": [call(_volume, (2, 3, 1))],
    "fractional_max_pool2d": [call(_image, 2, (3, 5), _random_samples=P(2, 3, 2, low=0, high=1))],
    "fractional_max_pool3d": [call(_volume, 2, (3, 5, 1), _random_samples=P(2, 3, 3, low=0, high=1))],
    "fractional_max_pool2d_with_indices": [
        call(_image, 2, (3, 5), _random_samples=P(2, 3, 2, low=0, high=1))
    ],
    "fractional_max_pool3d_with_indices": [
        call(_volume, 2, (3, 5, 1), _random_samples=P(2, 3, 3, low=0, high=1))
    ],
    "max_unpool1d": [call(D(2, 3, 4), places(8, 2, 3, 4), 2)],
    "max_unpool2d": [
        call(D(2, 3, 2, 3), places(24, 2, 3, 2, 3), 2),
        call(D(2, 3, 2, 3), places(24, 2, 3, 2, 3), 2, output_size=(5, 7)),
    ],
    "max_unpool3d": [call(D(2, 3, 2, 2, 1), places(32, 2, 3, 2, 2, 1), 2)],
    "F.unfold": [call(_image, 3, padding=1), call(D(3, 7, 11), (2, 3))],
    "im2col": [call(_image, (3, 3), (1, 1), (1, 1), (2, 2))],
    "F.fold": [call(D(2, 12, 60), (7, 11), 2), call(D(12, 60), (7, 11), 2)],
    "col2im": [call(D(2, 12, 60), (7, 11), (2, 2), (1, 1), (0, 0), (1, 1))],
    "pixel_shuffle": [call(D(2, 12, 3, 5), 2), call(D(12, 3, 5), 2)],
    "pixel_unshuffle": [call(D(2, 3, 4, 6), 2)],
    "channel_shuffle": [call(D(2, 6, 3, 5), 3)],
    "interpolate": [
        call(_image, scale_factor=2),
        call(_image, (5, 13), mode="bilinear", align_corners=True),
        call(_image, (5, 13), mode="bicubic", antialias=True),
        call(_signal, 7, mode="linear"),
    ],
    "pad": [
        call(_image, (1, 2)),
        call(_image, (1, 2, 0, 3), "constant", 1.5),
        call(_image, (1, 2, 0, 3), mode="reflect"),
        call(_signal, (1, 2), "replicate"),
        call(D(7), (1, 2)),
    ],
    # normalisation
    "F.batch_norm": [
        call(_image, P(3), P(3, low=0.5), P(3), P(3)),
        call(D(5, 7), P(7), P(7, low=0.5), eps=0.1),
        call(_signal, P(3), P(3, low=0.5), P(3)),
        call(_signal, P(3), P(3, low=0.5), None, P(3)),
    ],
    "torch.batch_norm": [call(_image, P(3), P(3), P(3), P(3, low=0.5), False, 0.1, 1e-5, False)],
    "F.layer_norm": [
        call(D(3, 5, 7), (7,), P(7), P(7)),
        call(D(3, 5, 7), (5, 7)),
        call(D(3, 5, 7), (5, 7), P(5, 7), None, 0.1),
        call(D(2, 97, 101), (101,), P(101), P(101)),
        call(D(2, 97, 101), (97, 101)),
    ],
    "torch.layer_norm": [call(D(3, 5, 7), (7,), P(7), P(7), 1e-5, False)],
    "group_norm": [
        call(D(2, 6, 5, 7), 3, P(6), P(6)),
        call(D(2, 6, 5), 2),
        call(D(5, 6), 2),
        call(D(2, 6, 61, 67), 3, P(6)),
    ],
    "F.instance_norm": [
        call(_image, weight=P(3), bias=P(3)),
        call(_signal),
        call(_image, P(3), P(3, low=0.5), P(3), None, False),
    ],
    "torch.instance_norm": [call(_image, P(3), P(3), None, None, True, 0.1, 1e-5, False)],
    "rms_norm": [
        call(D(3, 5, 7), (7,), P(7), 0.1),
        call(D(3, 5, 7), (5, 7)),
        call(D(3, 5, 7), (7,), eps=0.1),
    ],
    "F.normalize": [call(D(3, 5, 7)), call(D(3, 5, 7), dim=-1), call(D(3, 5, 7), 2.0, 1, 100.0)],
    # reductions and selections
    **dict.fromkeys(
        ("sum", "mean"),
        [
            call(D(3, 5, 7)),
            call(D(3, 5, 7), 1),
            call(D(3, 5, 7), (0, -1), True),
            call(D(3, 5, 7), dim=-1, keepdim=True),
        ],
    ),
    "cumsum": [call(D(3, 5, 7), 1), call(D(3, 5, 7), -1)],
    "diff": [call(D(5, 7)), call(D(5, 7), 2, 0)],
    "trace": [call(D(5, 5))],
    "trapezoid": [call(D(5, 7)), call(D(5, 7), dim=0)],
    "trapz": [call(D(5, 7))],
    **dict.fromkeys(
        ("var", "std", "var_mean", "std_mean"),
        [
            call(D(3, 5, 7)),
            call(D(3, 5, 7), False),
            call(D(3, 5, 7), 1),
            call(D(3, 5, 7), (0, -1), False, True),
            call(D(3, 5, 7), dim=(1, 2), correction=0, keepdim=True),
            call(D(3, 5, 7), dim=1, correction=2),
        ],
    ),
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
    "pairwise_distance": [
        call(D(5, 7), D(5, 7)),
        call(D(5, 7), P(7), 3.0),
        call(P(5, 7), D(5, 7), 1.0, 1e-3, True),
    ],
    "torch.norm": [call(D(3, 5, 7)), call(D(3, 5, 7), 2, -1, True), call(D(3, 5, 7), "fro", (0, 2))],
    "Tensor.norm": [call(D(3, 5, 7)), call(D(3, 5, 7), p=2, dim=1)],
    "linalg.norm": [call(D(3, 5, 7)), call(D(3, 5, 7), dim=-1), call(D(3, 5, 7), 2, 1, True)],
    **dict.fromkeys(
        ("amax", "amin"), [call(D(3, 5, 7), 1), call(D(3, 5, 7), (0, -1), True), call(D(3, 5, 7))]
    ),
    **dict.fromkeys(
        ("max", "min"),
        [
            call(D(3, 5, 7)),
            call(D(3, 5, 7), 1),
            call(D(3, 5, 7), dim=-1, keepdim=True),
            call(D(5, 7), D(7)),
            call(D(7), P(5, 7)),
        ],
    ),
    **dict.fromkeys(("median", "nanmedian"), [call(D(3, 5, 7), 1), call(D(3, 5, 7), dim=-1, keepdim=True)]),
    "mode": [call(D(3, 5, 7), 1)],
    "sort": [call(D(3, 5, 7)), call(D(3, 5, 7), 1, True), call(D(3, 5, 7), dim=0, descending=True)],
    "topk": [call(D(3, 5, 7), 2), call(D(3, 5, 7), 3, 1, False), call(D(3, 5, 7), k=2, dim=0)],
    "kthvalue": [call(D(3, 5, 7), 2), call(D(3, 5, 7), 3, 1, True)],
    **dict.fromkeys(("cummax", "cummin"), [call(D(3, 5, 7), 1)]),
    # views
    "view": [call(D(2, 3, 5), 6, 5), call(D(2, 3, 5), (2, 15)), call(D(2, 3, 5), -1), call(D(), 1)],
    "reshape": [call(D(2, 3, 5), (6, 5)), call(D(2, 3, 5), shape=(5, -1))],
    "view_as": [call(D(2, 3, 5), P(6, 5))],
    "reshape_as": [call(D(2, 3, 5), P(6, 5)), call(P(6, 5), D(2, 3, 5))],
    "flatten": [call(D(2, 3, 5, 7), 1), call(D(2, 3, 5, 7), -2, -1), call(D(2, 3, 5, 7)), call(D())],
    "ravel": [call(D(2, 3))],
    "unflatten": [call(D(2, 15, 7), 1, (3, 5)), call(D(2, 15), -1, (3, -1))],
    "permute": [call(D(2, 3, 5), (2, 0, 1)), call(D(2, 3, 5), dims=(-1, 0, 1))],
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), [call(D(2, 3, 5), 0, 2), call(D(2, 3, 5), -1, 1)]),
    **dict.fromkeys(("movedim", "moveaxis"), [call(D(2, 3, 5), 0, -1), call(D(2, 3, 5), (0, 1), (-1, 0))]),
    "t": [call(D(3, 5)), call(D(3))],
    **dict.fromkeys(("mT", "mH", "adjoint"), [call(D(2, 3, 5))]),
    "T": [call(D(3, 5))],
    "H": [call(D(3, 5))],
    "unsqueeze": [call(D(3, 5), 1), call(D(3, 5), -1), call(D(), 0)],
    "squeeze": [
        call(D(1, 3, 1, 5)),
        call(D(1, 3, 1, 5), 2),
        call(D(1, 3, 1, 5), (0, -2)),
        call(D(3, 5), 1),
        call(D()),
    ],
    "expand": [call(D(3, 1), 3, 5), call(D(5), (2, 3, 5)), call(D(3, 1), -1, 5)],
    "broadcast_to": [call(D(3, 1), (2, 3, 5))],
    "expand_as": [call(D(3, 1), P(2, 3, 5)), call(P(3, 1), D(2, 3, 5))],
    "repeat": [call(D(3, 5), 2, 1, 3), call(D(3, 5), (2, 2))],
    "tile": [call(D(3, 5), (2,)), call(D(3, 5), (2, 1, 3))],
    "repeat_interleave": [
        call(D(3, 5), 2, 1),
        call(D(3, 5), torch.tensor([1, 0, 2]), dim=0),
        call(D(3, 5), 2),
    ],
    "roll": [call(D(3, 5, 7), 2, 1), call(D(3, 5, 7), (1, -2), (-1, 0))],
    "flip": [call(D(3, 5, 7), (0, -1)), call(D(3, 5, 7), dims=[1])],
    "Tensor.flip": [call(D(3, 5, 7), 0, 2)],
    **dict.fromkeys(("tril", "triu"), [call(D(2, 5, 7)), call(D(5, 7), -1), call(D(5, 7), diagonal=2)]),
    "Tensor.unfold": [call(D(3, 11), 1, 3, 2), call(D(3, 11), -1, 2, 2)],
    "diagonal": [call(D(2, 5, 7)), call(D(2, 5, 5), 1, -2, -1)],
    "linalg.diagonal": [call(D(2, 5, 7))],
    "diag": [call(D(5)), call(D(5, 7), 1)],
    "diag_embed": [call(D(3, 5)), call(D(3, 5), 1, 0, 2)],
    "rot90": [call(D(3, 5)), call(D(3, 5, 7), 1, (1, 2))],
    "flipud": [call(D(3, 5))],
    "fliplr": [call(D(3, 5))],
    "hsplit": [call(D(3, 6), 2)],
    "vsplit": [call(D(6, 5), 2)],
    "dsplit": [call(D(3, 5, 6), 2)],
    **dict.fromkeys(
        "conj conj_physical resolve_conj resolve_neg".split(), [call(D(3, 5, dtype=torch.complex128))]
    ),
    **dict.fromkeys("real imag".split(), [call(D(3, 5, dtype=torch.complex128))]),
    "torch.real": [call(D(3, 5, dtype=torch.complex128)), call(D(3, 5))],
    "view_as_real": [call(D(3, 5, dtype=torch.complex128))],
    "view_as_complex": [call(D(3, 5, 2))],
    "take": [call(D(3, 5), index(15, 7))],
    "take_along_dim": [call(D(3, 5), index(5, 3, 2), 1)],
    **dict.fromkeys(("atleast_1d", "atleast_2d", "atleast_3d"), [call(D(5)), call(D(2, 3))]),
    **dict.fromkeys("fft ifft rfft fftshift ifftshift fftn ifftn rfftn ihfft".split(), [call(D(3, 5, 7))]),
    **dict.fromkeys("fft2 ifft2 rfft2".split(), [call(D(3, 5, 7))]),
    **dict.fromkeys("irfft irfftn irfft2 hfft".split(), [call(D(3, 5, 7, dtype=torch.complex128))]),
    "sum_to_size": [call(D(3, 5, 7), 5, 1)],
    "narrow": [call(D(3, 7), 1, 2, 3), call(D(3, 7), -1, 0, 2)],
    "select": [call(D(3, 7), 1, 2), call(D(3, 7), -2, -1)],
    "index_select": [call(D(3, 7), 1, index(7, 5)), call(D(3, 7), -1, index(7, 2))],
    "gather": [call(D(3, 7), 1, index(7, 3, 2)), call(D(3, 7), 0, index(3, 2, 5))],
    **dict.fromkeys(
        ("chunk", "unsafe_chunk"), [call(D(3, 7), 2, 1), call(D(7, 3), 3), call(D(3, 7), chunks=2, dim=-1)]
    ),
    **dict.fromkeys(
        ("split", "unsafe_split"), [call(D(3, 7), 3, 1), call(D(7, 3), 2), call(D(3, 7), 3, dim=-1)]
    ),
    "split_with_sizes": [call(D(3, 7), (2, 5), 1)],
    "tensor_split": [call(D(3, 7), 3, 1), call(D(3, 7), (2, 5), dim=-1)],
    "unbind": [call(D(3, 5)), call(D(3, 5), -1)],
    "__iter__": [call(D(3, 5))],
    **dict.fromkeys(
        ("cat", "concat", "concatenate"),
        [call([D(3, 5), D(2, 5)]), call([D(3, 5), P(3, 2), D(3, 7)], 1), call((P(3, 5), D(3, 5)), dim=-1)],
    ),
    "stack": [call([D(3, 5), P(3, 5)]), call([D(3, 5), D(3, 5)], 1), call([D(3, 5), D(3, 5)], dim=-1)],
    **dict.fromkeys(
        "hstack vstack dstack column_stack row_stack".split(), [call([D(3, 5), P(3, 5)]), call([D(5), D(5)])]
    ),
    "__getitem__": [
        call(D(5, 7, 3), 2),
        call(D(5, 7, 3), (slice(None), 1)),
        call(D(5, 7, 3), (..., slice(1, None, 2))),
        call(D(5, 7, 3), (None, slice(1, 3), None, -1)),
        call(D(5, 7, 3), mask(5, 7)),
        call(D(5, 7, 3), index(5, 2, 3)),
        call(D(5, 7, 3), [0, 2]),
        call(D(5, 7, 3), (slice(None), index(7, 4), 1)),
        call(D(5, 7, 3), (index(5, 4), index(7, 4))),
        call(D(5, 7, 3), (slice(None), index(7, 4), index(3, 4))),
        call(D(5, 7, 3), (index(5, 4), slice(None), index(3, 4))),
        call(D(5, 7, 3, 2), (slice(None), index(7, 2, 4), slice(1, None), [1, 0, 1, 1])),
    ],
    "__setitem__": [
        call(D(5, 7, 3), 2, D(7, 3)),
        call(D(5, 7, 3), (slice(None), 1), D(3)),
        call(D(5, 7, 3), (..., slice(1, None, 2)), 0.5),
        call(D(5, 7, 3), 0, D(1, 7, 3)),
        call(D(5, 7, 3), mask(5, 7), P()),
        call(D(5, 7, 3), index(5, 2), D(7, 3)),
        call(D(5, 7, 3), ..., D()),
        call(D(5, 3, 7, 4), (torch.tensor([0, 2]), slice(None), torch.tensor([3, 1])), D(2, 3, 4)),
        call(D(5, 3, 7, 4), (torch.tensor([0, 2]), slice(None), torch.tensor([3, 1])), D(3, 1)),
        call(D(5, 3, 7, 4), (torch.tensor([0, 2]), slice(None), torch.tensor([3, 1])), P(3, 4)),
    ],
    "scatter": [call(D(5, 7), 1, index(7, 5, 1), D(5, 1)), call(D(5, 7), 0, index(5, 1, 7), P(1, 7))],
    "scatter_add": [call(D(5, 7), 1, index(7, 5, 3), D(5, 3)), call(P(5, 7), -1, index(7, 5, 3), D(5, 3))],
    "index_add": [call(D(5, 7), 1, index(7, 3), D(5, 3)), call(P(5, 7), 0, index(5, 3), D(3, 7), alpha=2.0)],
    "index_copy": [
        call(D(5, 7), 1, torch.tensor([3, 1]), D(5, 2)),
        call(D(5, 7), 0, torch.tensor([3, 1]), P(2, 7)),
    ],
    "scatter_": [call(D(5, 7), 1, index(6, 5, 1), D(5, 1))],
    "scatter_add_": [call(D(5, 7), 1, index(6, 5, 3), D(5, 3))],
    "index_add_": [call(D(5, 7), 1, index(6, 3), D(5, 3))],
    "index_copy_": [call(D(5, 7), 1, torch.tensor([3, 1]), D(5, 2))],
    "masked_select": [call(D(5, 7), mask(5, 7))],
    "broadcast_tensors": [call(D(3, 1), P(5), D(2, 1, 1))],
    "meshgrid": [call(D(3), P(5), indexing="ij"), call(D(3), D(5), indexing="ij")],
    # copies and new tensors
    "copy_": [call(D(5, 7), D(5, 7)), call(D(5, 7), P(7)), call(D(5, 7), D(7))],
    "zero_": [call(D(5, 7))],
    "fill_": [call(D(5, 7), 2.5), call(D(5, 7), D()), call(D(5, 7), P())],
    "clone": [call(D(5, 7)), call(D(2, 3, 5, 7), memory_format=torch.channels_last)],
    "contiguous": [call(D(5, 7)), call(D(2, 3, 5, 7), memory_format=torch.channels_last)],
    "to": [
        call(D(5, 7), torch.float64),
        call(D(5, 7), P(3)),
        call(D(5, 7), "cpu"),
        call(D(2, 3, 5, 7), memory_format=torch.channels_last),
        call(P(5, 7), D(3)),
        call(D(5, 7), torch.complex128),
    ],
    **dict.fromkeys(("double", "cpu", "cdouble"), [call(D(5, 7))]),
    "type_as": [call(D(5, 7), P(3)), call(P(5, 7), D(3))],
    "type": [call(D(5, 7)), call(D(5, 7), torch.float64)],
    **dict.fromkeys("zeros_like ones_like".split(), [call(D(5, 7))]),
    "full_like": [call(D(5, 7), 2.5)],
    **dict.fromkeys("new_zeros new_ones".split(), [call(D(5, 7), 3, 5), call(D(5, 7), (3, 5))]),
    "new_full": [call(D(5, 7), (3, 5), 2.5)],
}
#: Rules without an exact twin in float64 on the CPU: a test of their own, below.
ELSEWHERE = {
    "cdist",
    "grid_sample",
    "grid_sampler",
    "float",
    "half",
    "bfloat16",
    "cfloat",
    "cuda",
    "empty_like",
    "new_empty",
} | {f"{kind}_" for kind in "normal uniform bernoulli random exponential cauchy log_normal geometric".split()}


def labels() -> dict[Any, list[str]]:
    """Op → the names that it goes by, with and without its namespace."""
    found: dict[Any, list[str]] = {}
    for space, holder in SPACES.items():
        for name in dir(holder):
            value = getattr(holder, name)
            for op in (value, getattr(value, "__get__", None)):
                try:
                    known = op in RULES
                except TypeError:
                    continue
                if known:
                    found.setdefault(op, []).extend([f"{space}.{name}", name])
    return found


LABELS = labels()

#: In-place forms without a forward derivative in torch, or (celu_) with one in single precision: the twin's is what they should have.
TWINS = set("acosh_ asinh_ atanh_ arccosh_ arcsinh_ arctanh_ rrelu_ celu_".split())
#: Ops that torch itself refuses on the numbers in memory the other way round.
CONTIGUOUS_ONLY = {"view", "view_as", "view_as_complex"}


def cases_of(op: Any) -> list[Call]:
    names = sorted(LABELS[op], key=lambda n: "." not in n)  # the namespaced names first
    return next((CASES[n] for n in names if n in CASES), [])


TABLE = [
    pytest.param(op, case, id=f"{LABELS[op][0]}-{i}") for op in LABELS for i, case in enumerate(cases_of(op))
]


def test_every_rule_has_a_case() -> None:
    assert set(LABELS) == set(RULES), "an op in the table that goes by no name"
    bare = {LABELS[op][0] for op in RULES if not cases_of(op) and LABELS[op][1] not in ELSEWHERE}
    assert not bare, f"write a case for {sorted(bare)}"


# ----------------------------------------------------------------------------------------------------- the comparison


def drawn(
    call: Call, seed: int, k: int, *, strided: bool
) -> tuple[list[Any], Any, list[int], list[torch.Tensor], list[Any]]:
    """The call's arguments as leaves, their tree, where the duals are, those primals, and their tangents [k, *shape]."""
    generator = torch.Generator().manual_seed(seed)
    leaves, spec = tree_flatten((list(call.args), call.kwargs))
    where, primals, tangents = [], [], []
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Operand):
            continue
        value = leaf.draw(generator)
        if strided and value.ndim >= 2:  # the same numbers, in memory the other way round
            value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
        leaves[i] = value
        if leaf.dual:
            where.append(i)
            primals.append(value)
            tangents.append(torch.randn(k, *leaf.shape, generator=generator, dtype=leaf.dtype))
    return leaves, spec, where, primals, tangents


def reference(
    function: Any, primals: list[torch.Tensor], tangents: list[torch.Tensor]
) -> tuple[list[Any], list[list[Any]]]:
    """Values, and per direction the tangents, of every tensor that the function returns, by jvp."""
    values: list[Any] = []
    pushes = []
    for direction in range(len(tangents[0])):
        values, push = torch.func.jvp(function, tuple(primals), tuple(t[direction] for t in tangents))
        pushes.append(push)
    return values, pushes


def compare(out: Any, values: list[Any], pushes: list[list[Any]], tolerance: float = 1e-11) -> None:
    flat = tree_flatten(out)[0]
    assert len(flat) == len(values)
    for i, (got, want) in enumerate(zip(flat, values, strict=True)):
        if isinstance(got, DualTensor):
            assert got.shape == want.shape
            assert got.dtype == want.dtype
            torch.testing.assert_close(got.primal, want, rtol=tolerance, atol=tolerance, equal_nan=True)
            for row, push in zip(got.tangents, pushes, strict=True):
                torch.testing.assert_close(row, push[i], rtol=tolerance, atol=tolerance, equal_nan=True)
        elif isinstance(got, torch.Tensor):
            torch.testing.assert_close(got, want)
            assert all(not push[i].any() for push in pushes), "a plain result for an output that has tangents"
        else:
            assert got == want


def dual(primal: torch.Tensor, tangents: torch.Tensor, *, strided: bool = False) -> DualTensor:
    buffer = torch.cat([primal[None], tangents])
    if strided and primal.ndim >= 2:
        buffer = buffer.transpose(-1, -2).contiguous().transpose(-1, -2)
    return DualTensor(buffer)


def agrees(op: Any, case: Call, *, k: int, strided: bool, seed: int = 0) -> None:
    leaves, spec, where, primals, tangents = drawn(case, seed, k, strided=strided)
    writes = mutates(op) and op is not torch.Tensor.requires_grad_

    def run(*operands: torch.Tensor) -> Any:
        filled = list(leaves)
        for i, operand in zip(where, operands, strict=True):
            filled[i] = operand
        if writes:  # into a view of a larger tensor, which must change with it
            base = filled[0].clone()
            filled[0] = base[..., 1:] if base.ndim else base
            args, kwargs = tree_unflatten(filled, spec)
            if LABELS[op][1] in TWINS and not isinstance(base, DualTensor):
                args[0].copy_(getattr(torch, LABELS[op][1][:-1])(*args, **kwargs))
            else:
                op(*args, **kwargs)
            return [base]
        args, kwargs = tree_unflatten(filled, spec)
        out = op(*args, **kwargs)
        return list(out) if op is torch.Tensor.__iter__ else out

    if writes and case.args[0].shape:  # the view has one column less: so have the operands of the same size
        size = case.args[0].shape[-1]
        for i in range(1, len(leaves)):
            value = leaves[i]
            if (
                isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and value.ndim
                and value.shape[-1] == size
            ):
                leaves[i] = value[..., 1:]
        for n, i in enumerate(where[1:], start=1):
            if leaves[i].shape != primals[n].shape:
                primals[n], tangents[n] = primals[n][..., 1:], tangents[n][..., 1:]

    plain_kinds: list[Any] = []

    def flat(*operands: torch.Tensor) -> list[torch.Tensor]:
        found = tree_flatten(run(*operands))[0]
        plain_kinds[:] = [f if not isinstance(f, torch.Tensor) else None for f in found]
        return [f if isinstance(f, torch.Tensor) else torch.zeros(()) for f in found]

    with torch.no_grad():
        values, pushes = reference(flat, primals, tangents)
        values = [v if p is None else p for v, p in zip(values, plain_kinds, strict=True)]
        with recording() as used:
            out = run(*(dual(p, t, strided=strided) for p, t in zip(primals, tangents, strict=True)))
    assert not used["fallback"], used
    compare(out, values, pushes)


@pytest.mark.parametrize(("op", "case"), TABLE)
def test_rule_agrees_with_jvp(op: Any, case: Call) -> None:
    if not LABELS[op][0].startswith("Tensor.") or not hasattr(
        torch, LABELS[op][1]
    ):  # its twin has been there
        agrees(op, case, k=3, strided=False)
    agrees(op, case, k=1, strided=LABELS[op][1] not in CONTIGUOUS_ONLY, seed=1)


# ------------------------------------------------------------------------------------- what one call at a time cannot show

VIEWS = (
    "view reshape flatten ravel unflatten permute transpose movedim t mT T adjoint unsqueeze squeeze narrow select chunk split"
    " tensor_split unbind Tensor.unfold diagonal hsplit view_as reshape_as swapaxes split_with_sizes __getitem__"
).split()


@pytest.mark.parametrize("name", VIEWS)
def test_writing_to_a_view_writes_to_the_whole(name: str) -> None:
    op = next(o for o in LABELS if {name, f"Tensor.{name}"} & set(LABELS[o]))
    case = cases_of(op)[0]
    leaves, spec, _, primals, tangents = drawn(case, 0, 3, strided=False)

    def run(x: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
        base = x.clone()
        args, kwargs = tree_unflatten([base, *leaves[1:]], spec)
        for piece in tree_flatten(op(*args, **kwargs))[0]:
            piece[..., :1].mul_(3).add_(piece[..., :1].sin())
        return [base]

    with torch.no_grad():
        values, pushes = reference(run, primals[:1], tangents[:1])
        compare(run(dual(primals[0], tangents[0])), values, pushes)


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


def test_grid_sampling_is_linear_in_the_image() -> None:
    # torch has no forward derivative of it to compare with
    x, t = torch.randn(2, 3, 5, 7), torch.randn(3, 2, 3, 5, 7)
    grid = torch.rand(2, 3, 2, 2) * 2 - 1
    for op, arguments in ((F.grid_sample, ("bilinear", "zeros", False)), (torch.grid_sampler, (0, 0, False))):
        out = op(dual(x, t), grid, *arguments)
        for row, of in zip(out.buffer, [x, *t], strict=True):
            torch.testing.assert_close(row, op(of, grid, *arguments))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_distances_of_all_pairs(p: float) -> None:
    # torch has no forward derivative of cdist: its reverse one is the oracle
    x, y = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    t, s = torch.randn(4, *x.shape, dtype=torch.float64), torch.randn(4, *y.shape, dtype=torch.float64)
    by_x, by_y = torch.autograd.functional.jacobian(lambda a, b: torch.cdist(a, b, p), (x, y))
    out = torch.cdist(dual(x, t), dual(y, s), p)
    torch.testing.assert_close(out.primal, torch.cdist(x, y, p))
    torch.testing.assert_close(
        out.tangents,
        torch.einsum("bijcnd,kcnd->kbij", by_x, t) + torch.einsum("bijcnd,kcnd->kbij", by_y, s),
    )


def test_extremes_share_a_tie() -> None:
    x, t = torch.tensor([2.0, 1.0, 2.0], dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    for function in (
        lambda z: z.amax(0),
        lambda z: z.max(),
        lambda z: torch.maximum(z, z.flip(0)),
        lambda z: z.min(),
    ):
        values, pushes = reference(lambda z, f=function: [f(z)], [x], [t])
        compare([function(dual(x, t))], values, pushes)


def test_attention_in_pieces_equals_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchgeom_probe.dual.rules import attention

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
    out = F.scaled_dot_product_attention(q, k, v, seen)
    assert not out.buffer[..., 1, :].any()
    assert out.buffer.isfinite().all()


def test_batch_statistics_are_refused() -> None:
    from torchgeom_probe.errors import ProbeError

    x = dual(torch.randn(5, 3), torch.randn(2, 5, 3))
    with pytest.raises(ProbeError, match="couples the samples"):
        F.batch_norm(x, torch.zeros(3), torch.ones(3), training=True)
