"""Special functions that torch has no derivative of, against central differences."""

from __future__ import annotations

import torch
from dual.rules.comparison import D, P, agreement_with_differences, call

from torchgeom_probe.dual import DualTensor

CASES: dict[str, list] = {}
DEGREES = torch.tensor([0.0, 1.0, 2.0, 5.7, 9.0, -1.0], dtype=torch.float64)
DIFFERENCES = {
    "bessel_j0 bessel_j1 modified_bessel_i0 modified_bessel_i1": [call(D(5, 7, low=-6, high=6))],
    "spherical_bessel_j0": [call(D(5, 7, low=-6, high=6)), call(D(5, 7, low=-0.2, high=0.2))],
    "bessel_y0 bessel_y1 modified_bessel_k0 modified_bessel_k1": [call(D(5, 7, low=0.3, high=6))],
    "scaled_modified_bessel_k0 scaled_modified_bessel_k1": [call(D(5, 7, low=0.3, high=6))],
    "igamma igammac gammainc gammaincc": [call(P(5, 1, low=0.3), D(7, low=0.3))],
    "zeta": [call(P(5, 7, low=1.2), D(7, low=0.3))],
}
for _kind in "t u v w".split():
    for _name in (f"chebyshev_polynomial_{_kind}", f"shifted_chebyshev_polynomial_{_kind}"):
        DIFFERENCES[_name] = [call(D(5, 1), DEGREES), call(D(), 3)]
for _name in "hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l legendre_polynomial_p".split():
    DIFFERENCES[_name] = [call(D(5, 1), DEGREES), call(D(), 3)]

test_rule_agrees_with_differences = agreement_with_differences(DIFFERENCES)


def test_the_ends_of_the_interval_and_zero_are_no_exceptions() -> None:
    def slope(name: str, x: float, *degree: int) -> float:
        point = torch.tensor([x, 1.0], dtype=torch.float64)
        return getattr(torch.special, name)(DualTensor(point), *degree).tangents.item()

    n = 5
    assert slope("chebyshev_polynomial_t", 1.0, n) == n**2
    assert slope("chebyshev_polynomial_t", -1.0, n) == n**2
    assert slope("legendre_polynomial_p", 1.0, n) == n * (n + 1) / 2
    assert slope("bessel_j1", 0.0) == slope("modified_bessel_i1", 0.0) == 0.5
    assert slope("spherical_bessel_j0", 0.0) == 0.0
