"""One hidden layer of infinitely many Gaussian units, w ~ N(0, σ² I), b ~ N(0, ζ²): metric, volume, Ricci.

With s = |x|², v = σ² s + ζ² and h(v) = E_{z ~ N(0, v)} φ'(z)²:
    e^Ω = σ² h(v),   Ω' = σ² h'/h,   Ω'' = σ⁴ (h''/h − (h'/h)²)      (primes of Ω: d/ds; of h: d/dv)
    g = e^Ω (I + 2 Ω' x xᵀ),   √det g = e^{dΩ/2} √(1 + 2 s Ω')
    R = −(d−1) s Ω' e^{−Ω} [(d−2) Ω'/D + 2 D'/D²],   D = 1 + 2 s Ω' = g_radial/g_tangential.

The activation enters by h, h', h'' and the radial moment m = E[φ'(√v u)² u²] = h + 2 v h', u ~ N(0, 1), alone.  The
last is kept apart since h + 2 v h' cancels for large v, and g_radial = σ² ((1−ρ) h + ρ m), ρ = σ² s/v, does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from torchgeom_probe.analytic.shallow import Activation, Elementwise, activation_names, derivative, named
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Float, Tensor


class _Omega(NamedTuple):
    """The conformal factor Ω and its first two derivatives by s = |x|², each [B]."""

    value: Float[Tensor, " batch"]
    first: Float[Tensor, " batch"]
    second: Float[Tensor, " batch"]


def metric(
    x: Float[Tensor, "batch d"],
    activation: str | Elementwise = "erf",
    sigma: float | Tensor = 1.0,
    zeta: float | Tensor = 0.0,
) -> Float[Tensor, "batch d d"]:
    """Return the metric of one hidden layer of infinite width.

    g = e^Ω (I + 2 Ω' x xᵀ), the limit of :func:`torchgeom_probe.analytic.shallow.metric` for n → ∞ with
    w_j ~ N(0, σ² I), b_j ~ N(0, ζ²); the finite g deviates from it by O(1/√n).

    Args:
        x: [B, d] points.
        activation: a name (:func:`torchgeom_probe.analytic.shallow.activation_names`), or torch's own function or
            module of that name.  Closed forms for erf, GELU, monomials, ReLU, leaky ReLU and sin; quadrature for
            sigmoid, tanh, SiLU and softplus.
        sigma: standard deviation of the weights, > 0.
        zeta: standard deviation of the biases, ≥ 0.

    Returns:
        [B, d, d], differentiable in x, and in σ and ζ where these are tensors.

    Raises:
        ProbeError: an activation without a name, σ ≤ 0 or ζ < 0, a bad shape or dtype, an x that is not finite.

    Source: Zavatone-Veth et al., arXiv:2301.11375, infinite-width section.  Cost: O(B d²), quadrature O(B √v) more.

    >>> g = metric(torch.tensor([[0.0, 1.0]]), "erf")
    >>> assert torch.allclose(g[0].diagonal() * torch.pi / 2, torch.tensor([3**-0.5, 3**-1.5]))
    """
    _, _, h = _moments(x, activation, sigma, zeta)
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    outer = x[:, :, None] * x[:, None, :]
    return sigma**2 * h.value[:, None, None] * identity + 2 * sigma**4 * h.first[:, None, None] * outer


def log_volume(
    x: Float[Tensor, "batch d"],
    activation: str | Elementwise = "erf",
    sigma: float | Tensor = 1.0,
    zeta: float | Tensor = 0.0,
) -> Float[Tensor, " batch"]:
    """Return the natural logarithm of the volume element √det g of one hidden layer of infinite width.

    √det g = e^{dΩ/2} √(1 + 2 s Ω'), from the d−1 tangential eigenvalues and the radial one.  Arguments and errors are
    those of :func:`metric`.

    Returns:
        [B], nats; ``-inf`` where g is singular (a monomial of degree ≥ 2 at x = 0 without biases).

    Source: arXiv:2301.11375.  Cost: O(B d), quadrature O(B √v) more.

    >>> flat = log_volume(torch.randn(7, 3), "relu")
    >>> assert torch.allclose(flat, torch.tensor(1.5 * math.log(0.5)))
    """
    s, v, h = _moments(x, activation, sigma, zeta)
    tangential, radial = _eigenvalues(s, v, h, sigma)
    if x.shape[1] == 1:
        return 0.5 * radial.log()
    return 0.5 * ((x.shape[1] - 1) * tangential.log() + radial.log())


def scalar_curvature(
    x: Float[Tensor, "batch d"],
    activation: str | Elementwise = "erf",
    sigma: float | Tensor = 1.0,
    zeta: float | Tensor = 0.0,
) -> Float[Tensor, " batch"]:
    """Return the Ricci scalar of one hidden layer of infinite width (the unit sphere S² has R = +2).

    R = −(d−1) s Ω' e^{−Ω} [(d+2) Ω' + 2(d−2) s Ω'² + 4 s Ω''] / (1 + 2 s Ω')².  It is the limit, for n → ∞,
    of :func:`torchgeom_probe.analytic.shallow.scalar_curvature`, from which it deviates by O(1/√n).

    The published formula gives exactly 3R for every such metric; see :func:`torchgeom_probe.scalar_curvature`.
    Arguments and errors are those of :func:`metric`.

    Returns:
        [B], in units of 1/|Φ|²: 0 for ReLU, leaky ReLU and d = 1; ``nan`` where g is singular.  About log10(1 + 2v)
        digits cancel at large v: use float64 there.

    Source: arXiv:2301.11375, with the corrected prefactor.  Cost: O(B d), quadrature O(B √v) more.

    >>> x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)      # erf: R = −(π/2) (d−1)(d+2) s / √(1+2s)
    >>> assert abs(scalar_curvature(x, "erf").item() + 2 * torch.pi / 3**0.5) < 1e-12
    """
    s, v, h = _moments(x, activation, sigma, zeta)
    _, first, second = _omega(h, sigma)
    tangential, radial = _eigenvalues(s, v, h, sigma)
    d = x.shape[1]
    D = radial / tangential
    D_slope = 2 * first + 2 * s * second
    return (1 - d) * s * first / tangential * ((d - 2) * first / D + 2 * D_slope / D**2)


def omega(
    x: Float[Tensor, "batch d"],
    activation: str | Elementwise = "erf",
    sigma: float | Tensor = 1.0,
    zeta: float | Tensor = 0.0,
) -> _Omega:
    """Return the conformal factor Ω(s) of the metric e^Ω (I + 2 Ω' x xᵀ), with Ω' and Ω'' by s = |x|².

    Arguments and errors are those of :func:`metric`.

    Returns:
        ``(value, first, second)``, a named tuple, each [B]; value in nats.

    Source: arXiv:2301.11375.  Cost: O(B d), quadrature O(B √v) more.

    >>> value, first, second = omega(torch.tensor([[1.0, 0.0]]), "erf")      # Ω' = −σ²/(1+2v)
    >>> assert torch.allclose(first, torch.tensor(-1 / 3)) and torch.allclose(second, torch.tensor(2 / 9))
    """
    _, _, h = _moments(x, activation, sigma, zeta)
    return _omega(h, sigma)


class _Moments(NamedTuple):
    value: Tensor  # h = E φ'²
    first: Tensor  # dh/dv
    second: Tensor  # d²h/dv²
    radial: Tensor  # E φ'² u² = h + 2 v h'


def _omega(h: _Moments, sigma: float | Tensor) -> _Omega:
    slope = h.first / h.value
    return _Omega((sigma**2 * h.value).log(), sigma**2 * slope, sigma**4 * (h.second / h.value - slope**2))


def _eigenvalues(s: Tensor, v: Tensor, h: _Moments, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
    # At v = 0 (the origin, no biases) every direction is radial, and m = h.
    radial_share = sigma**2 * s / torch.where(v > 0, v, 1.0)
    return sigma**2 * h.value, sigma**2 * ((1 - radial_share) * h.value + radial_share * h.radial)


def _moments(
    x: Tensor, activation: str | Elementwise, sigma: float | Tensor, zeta: float | int | Tensor
) -> tuple[Tensor, Tensor, _Moments]:
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.float64) or not x.shape[1]:
        raise ProbeError(
            f"the closed forms take points x [B, d] of float32 or float64; got {list(x.shape)} of {x.dtype}.\n"
            "Write x.flatten(1).double(), and x[None] for a single point."
        )
    weight_scale, bias_scale = (float(torch.as_tensor(scale).detach()) for scale in (sigma, zeta))
    if not 0 < weight_scale < math.inf or not 0 <= bias_scale < math.inf:
        raise ProbeError(
            f"weights need a finite standard deviation sigma > 0, and biases zeta >= 0; got sigma={weight_scale:g}, "
            f"zeta={bias_scale:g}.\n"
            "Write sigma=1.0, zeta=0.0."
        )
    s = x.square().sum(1)
    v = sigma**2 * s + zeta**2
    if not v.isfinite().all():
        raise ProbeError(
            "some |x|² is not finite, and there is no metric there.\nKeep the others:  x[x.isfinite().all(1)]"
        )
    phi = named(activation)
    if phi.name == "leaky_relu":
        return s, v, _flat(v, 0.5 * (1 + phi.parameter**2))
    if phi.name is not None and phi.name.startswith("z^"):
        return s, v, _monomial(v, int(phi.parameter))
    if phi.name is None:
        raise ProbeError(
            "of a function that is known by its values alone no average over Gaussian units is taken.\n"
            f"Name the activation, one of {', '.join(activation_names())}; or take many units:  "
            "analytic.shallow.metric(x, W, b, activation)"
        )
    if phi.name in _CLOSED_FORMS:
        return s, v, _CLOSED_FORMS[phi.name](v)
    return s, v, _quadrature(phi, v)


def _flat(v: Tensor, h: float) -> _Moments:
    constant, zero = torch.full_like(v, h), torch.zeros_like(v)
    return _Moments(constant, zero, zero, constant)


def _monomial(v: Tensor, q: int) -> _Moments:
    # φ' = q z^{q−1}:  h = q² (2q−3)!! v^{q−1}.  Powers are written out, because h/v is 0/0 at the origin.
    scale = float(q * q * math.prod(range(2 * q - 3, 1, -2)))
    zero = torch.zeros_like(v)
    return _Moments(
        scale * v ** (q - 1),
        scale * (q - 1) * v ** (q - 2) if q > 1 else zero,
        scale * (q - 1) * (q - 2) * v ** (q - 3) if q > 2 else zero,
        scale * (2 * q - 1) * v ** (q - 1),
    )


def _erf(v: Tensor) -> _Moments:
    u, c = 1 + 2 * v, 2 / math.pi
    return _Moments(c * u**-0.5, -c * u**-1.5, 3 * c * u**-2.5, c * u**-1.5)


def _gelu(v: Tensor) -> _Moments:
    u, w, c = 1 + 2 * v, 1 + v, 1 / (2 * math.pi)
    # atan(v/√u) is the asin(v/(1+v)) of the arc-cosine kernel, and keeps its derivative at large v.
    h = 0.25 + c * (torch.atan(v / u.sqrt()) + 2 * v / (w * u.sqrt()) + v / u**1.5)
    first = c * (4 + 12 * v + 9 * v**2 - v**3) / (w**2 * u**2.5)
    second = c * (3 * v**4 - 47 * v**3 - 96 * v**2 - 66 * v - 16) / (w**3 * u**3.5)
    return _Moments(h, first, second, h + 2 * v * first)


def _sin(v: Tensor) -> _Moments:
    e = torch.exp(-2 * v)
    return _Moments(0.5 + 0.5 * e, -e, 2 * e, 0.5 + e * (0.5 - 2 * v))


_CLOSED_FORMS: dict[str, Callable[[Tensor], _Moments]] = {"erf": _erf, "gelu": _gelu, "sin": _sin}

# The trapezoid rule on |u| ≤ 12, whose error falls exponentially in 1/step where φ' is analytic (Gauss-Hermite's does
# not at large v: 5e-2 for tanh at v = 25 with 200 nodes).  No named φ' has a pole nearer than π/2 to the real z axis:
# with steps of 1/5 in z it is e^{−2π·(π/2)·5}, 4e-22.
_HALF_WIDTH = 12.0
_STEP_U, _STEP_Z = 1 / 8, 1 / 5
# Below this v, h' and h'' come by derivatives of φ'², which cost 32 evaluations of φ, for want of digits: the moments
# lose a factor 3/v² in h''.
_NARROW = {torch.float64: 0.05, torch.float32: 0.5}
_BLOCK = 2**22


def _quadrature(phi: Activation, v: Tensor) -> _Moments:
    largest = max([1.0, *v.tolist()])
    nodes = 1 + math.ceil(2 * _HALF_WIDTH / min(_STEP_U, _STEP_Z / math.sqrt(largest)))
    u = torch.linspace(-_HALF_WIDTH, _HALF_WIDTH, nodes, dtype=v.dtype, device=v.device)
    weight = torch.exp(-0.5 * u * u) * (2 * _HALF_WIDTH / (nodes - 1) / math.sqrt(2 * math.pi))
    parts = [(weight * _integrands(phi, part, u)).sum(2) for part in v.split(max(1, _BLOCK // nodes))]
    return _Moments(*torch.cat(parts, 1).unbind())


def _integrands(phi: Activation, v: Tensor, u: Tensor) -> Tensor:
    def squared_slope(z: Tensor) -> Tensor:
        return phi.first(z).square()

    def curvature_of(f: Elementwise) -> Elementwise:
        return derivative(derivative(f))

    # √v has no derivative at the origin; h is even in √v, so nothing is lost by starting just beside it.
    z = torch.where(v > 0, v, torch.finfo(v.dtype).tiny).sqrt()[:, None] * u
    F = squared_slope(z)
    # h' = E[F''(z)]/2 = E[F (u²−1)]/(2v), and h'' = E[F''''(z)]/4 = E[F (u⁴−6u²+3)]/(4v²): the first forms
    # cancel at large v, the second at small v.
    wide = v.clamp(min=_NARROW[v.dtype])[:, None]
    first, second = F * (u**2 - 1) / (2 * wide), F * (u**4 - 6 * u**2 + 3) / (4 * wide**2)
    if bool((v < _NARROW[v.dtype]).any()):
        small = (v < _NARROW[v.dtype])[:, None]
        near = torch.where(small, z, 0.0)
        F2 = curvature_of(squared_slope)
        first = torch.where(small, F2(near) / 2, first)
        second = torch.where(small, curvature_of(F2)(near) / 4, second)
    return torch.stack([F, first, second, F * u**2])
