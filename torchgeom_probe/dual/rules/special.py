"""Special functions that torch has no derivative of: Bessel functions and the orthogonal polynomials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchgeom_probe.dual.ops import ops_named
from torchgeom_probe.dual.rules.arithmetic import smooth_binary
from torchgeom_probe.dual.rules.elementwise import register_slope
from torchgeom_probe.dual.tensor import RULES, DualTensor, Rule
from torchgeom_probe.shapes import Tensor

_s = torch.special


def _over(y: Tensor, p: Tensor) -> Tensor:
    return torch.where(p == 0, 0.5, y / p)  # J₁(p)/p and I₁(p)/p have the limit ½


def _spherical_slope(p: Tensor, y: Tensor) -> Tensor:
    near = -p / 3 + p**3 / 30 - p**5 / 840 + p**7 / 45360  # where the difference would cancel
    return torch.where(p.abs() < 0.1, near, (p.cos() - y) / p)


#: name → f'(p, y) with y = f(p).  Abramowitz & Stegun 9.1.27, 9.6.26, 10.1.
SLOPES: dict[str, Callable[..., Tensor]] = {
    "bessel_j0": lambda p, y: -_s.bessel_j1(p),
    "bessel_j1": lambda p, y: _s.bessel_j0(p) - _over(y, p),
    "bessel_y0": lambda p, y: -_s.bessel_y1(p),
    "bessel_y1": lambda p, y: _s.bessel_y0(p) - y / p,
    "modified_bessel_i0": lambda p, y: _s.modified_bessel_i1(p),
    "modified_bessel_i1": lambda p, y: _s.modified_bessel_i0(p) - _over(y, p),
    "modified_bessel_k0": lambda p, y: -_s.modified_bessel_k1(p),
    "modified_bessel_k1": lambda p, y: -_s.modified_bessel_k0(p) - y / p,
    "scaled_modified_bessel_k0": lambda p, y: y - _s.scaled_modified_bessel_k1(p),
    "scaled_modified_bessel_k1": lambda p, y: y - _s.scaled_modified_bessel_k0(p) - y / p,
    "spherical_bessel_j0": _spherical_slope,
}
for _name, _slope in SLOPES.items():
    register_slope(f"special.{_name}", _slope)


#: name → (p₁ at x, (a, b, c) of k), for p₀ = 1 and p_{k+1} = (a x + b) p_k - c p_{k-1}.  A. & S. 22.7.
POLYNOMIALS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int], tuple[float, float, float]]]] = {
    "chebyshev_polynomial_t": (lambda x: x, lambda k: (2, 0, 1)),
    "chebyshev_polynomial_u": (lambda x: 2 * x, lambda k: (2, 0, 1)),
    "chebyshev_polynomial_v": (lambda x: 2 * x - 1, lambda k: (2, 0, 1)),
    "chebyshev_polynomial_w": (lambda x: 2 * x + 1, lambda k: (2, 0, 1)),
    "hermite_polynomial_h": (lambda x: 2 * x, lambda k: (2, 0, 2 * k)),
    "hermite_polynomial_he": (lambda x: x, lambda k: (1, 0, k)),
    "laguerre_polynomial_l": (lambda x: 1 - x, lambda k: (-1 / (k + 1), (2 * k + 1) / (k + 1), k / (k + 1))),
    "legendre_polynomial_p": (lambda x: x, lambda k: ((2 * k + 1) / (k + 1), 0, k / (k + 1))),
}


def _polynomial(op: Any, name: str, shifted: bool) -> Rule:
    first, coefficients = POLYNOMIALS[name]

    def slope(x: Tensor, n: Any, y: Tensor) -> tuple[Tensor, float]:
        # p'_{k+1} = a p_k + (a x + b) p'_k - c p'_{k-1}: no division, so that no x is an exception
        x = (2 * x - 1 if shifted else x).expand(y.shape).to(y.dtype)
        degrees = torch.as_tensor(n, device=x.device).trunc().expand(y.shape)
        before, here = torch.ones_like(x), first(x)
        d_before, d_here = torch.zeros_like(x), first(torch.ones_like(x)) - first(torch.zeros_like(x))
        out = torch.where(degrees == 1, d_here, 0.0)
        for k in range(1, int(degrees.max()) if degrees.numel() else 0):
            a, b, c = coefficients(k)
            d_before, d_here = d_here, a * here + (a * x + b) * d_here - c * d_before
            before, here = here, (a * x + b) * here - c * before
            out = torch.where(degrees == k + 1, d_here, out)
        return out * (2 if shifted else 1), 0.0  # of a degree torch takes the whole part

    push = smooth_binary(op, slope)
    return lambda input, n: push(input, n)


for _name in POLYNOMIALS:
    for _shift in ("", "shifted_") if _name.startswith("chebyshev") else ("",):
        for _op in ops_named(f"special.{_shift}{_name}"):
            RULES[_op] = _polynomial(_op, _name, bool(_shift))


#: names → ∂f/∂b at a, b with y = f(a, b), where no ∂f/∂a is known
BY_SECOND: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "igamma special.gammainc": lambda a, b, y: ((a - 1) * b.log() - b - torch.lgamma(a)).exp(),
    "igammac special.gammaincc": lambda a, b, y: -((a - 1) * b.log() - b - torch.lgamma(a)).exp(),
    "special.zeta": lambda a, b, y: -a * _s.zeta(a + 1, b),
}


def _by_second(op: Any, slope: Callable[..., Tensor]) -> Rule:
    push = smooth_binary(op, lambda a, b, y: (0.0, slope(a, b, y)))
    return lambda input, other: NotImplemented if isinstance(input, DualTensor) else push(input, other)


for _names, _slope in BY_SECOND.items():
    for _op in ops_named(_names):
        RULES[_op] = _by_second(_op, _slope)
