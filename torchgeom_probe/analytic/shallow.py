"""One hidden layer of given weights, Φ_j(x) = φ(w_j·x + b_j)/√n: metric, volume element and scalar curvature.

With z_j = w_j·x + b_j, everything is a moment of the weights:
    g_ab  = (1/n) Σ_j φ'(z_j)² w_ja w_jb
    T_abc = (1/n) Σ_j φ'(z_j) φ''(z_j) w_ja w_jb w_jc,      ∂_c g_ab = 2 T_abc,      Γ_{m,ab} = T_mab
    R     = |T|² − |τ|²,   τ_c = g^{ab} T_abc,              norms and traces with g⁻¹.

Axes: B samples, n hidden units, d inputs; a, b, c run over inputs, i, j, k over a g-orthonormal frame.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.linalg.volume import regular
from torchgeom_probe.shapes import Float, Tensor

Elementwise: TypeAlias = Callable[[Tensor], Tensor]

# Numbers held at once by the two curvature sums: 2^23 float64 are 64 MiB.
_BLOCK = 2**23


def metric(
    x: Float[Tensor, "batch d"],
    W: Float[Tensor, "n d"],
    b: Float[Tensor, " n"],
    activation: str | Elementwise = "sigmoid",
) -> Float[Tensor, "batch d d"]:
    """Return the metric that one hidden layer induces on its input space.

    g_ab = (1/n) Σ_j φ'(w_j·x + b_j)² w_ja w_jb, the pullback of the flat metric by Φ_j = φ(w_j·x + b_j)/√n.

    Args:
        x: [B, d] points.
        W: [n, d] weights, as in ``torch.nn.Linear(d, n).weight``.
        b: [n] biases.
        activation: a name (see :func:`activation_names`; ``"erf"`` is erf(z/√2), ``"gelu"`` the exact one,
            ``"z^3"`` a monomial) or an elementwise callable, which is differentiated by ``torch.func``.

    Returns:
        [B, d, d], differentiable in x, W and b.

    Raises:
        ProbeError: unknown activation; shapes, dtypes or devices that do not fit together.

    Source: Zavatone-Veth et al., arXiv:2301.11375.  Cost: O(B n d²), no automatic differentiation for named
    activations.

    >>> x, W, b = torch.zeros(5, 2), torch.eye(2), torch.zeros(2)
    >>> assert torch.allclose(metric(x, W, b, "sin"), torch.eye(2) / 2)
    """
    J = _jacobian(named(activation), _preactivations(x, W, b), W)
    return J.mT @ J


def log_volume(
    x: Float[Tensor, "batch d"],
    W: Float[Tensor, "n d"],
    b: Float[Tensor, " n"],
    activation: str | Elementwise = "sigmoid",
) -> Float[Tensor, " batch"]:
    """Return the natural logarithm of the volume element √det g of one hidden layer.

    It is Σ log |r_ii| over the triangular factor of J = QR, J_ja = φ'(z_j) w_ja/√n.  The Gram matrix JᵀJ is never
    formed: that would square the condition number, and in float32 leave no digit at cond J ~ 1e4.  Arguments and errors
    are those of :func:`metric`.

    Returns:
        [B], nats.  ``-inf`` where g is singular: n < d, or σ_min(J) ≤ 4 d ε σ_max(J) with ε of the dtype; the
        gradient is zero there.  ``nan`` only where J is not finite.

    Source: arXiv:2301.11375.  Cost: O(B n d²).

    >>> x, W, b = torch.zeros(5, 2), torch.eye(2), torch.zeros(2)
    >>> assert torch.allclose(log_volume(x, W, b, "sin"), torch.tensor(0.5).log())
    """
    J = _jacobian(named(activation), _preactivations(x, W, b), W)
    if J.shape[1] < J.shape[2]:
        return J.new_full(J.shape[:1], -torch.inf)
    J, scale, defect = regular(J)
    logs = torch.linalg.qr(J).R.diagonal(dim1=1, dim2=2).abs().log().sum(1)
    return logs + J.shape[2] * scale.log() + defect


def scalar_curvature(
    x: Float[Tensor, "batch d"],
    W: Float[Tensor, "n d"],
    b: Float[Tensor, " n"],
    activation: str | Elementwise = "sigmoid",
) -> Float[Tensor, " batch"]:
    """Return the Ricci scalar R of the metric of one hidden layer (the unit sphere S² has R = +2).

    R = |T|² − |τ|² = −¼ g^{ma} g^{nb} g^{rl} (∂_a g_mr ∂_b g_nl − ∂_b g_mr ∂_a g_nl), evaluated in the
    orthonormal frame of the QR factorisation of J.  For d = 2, R is twice the Gaussian curvature; for d = 1
    and for n = d it is zero.

    The published form has −¾ in place of −¼ (and −3 in place of −1 in the sum over triples for d = 2): in it the two ΓΓ
    terms of the Riemann tensor carry the wrong sign.  For a single hidden layer it is exactly 3R, for deep maps no
    multiple of R at all; :func:`torchgeom_probe.scalar_curvature` documents what was checked and how.  Arguments are
    those of :func:`metric`.

    Returns:
        [B], in units of 1/|Φ|²; differentiable.  ``nan`` where g is singular (as in :func:`log_volume`): no
        curvature is defined there.  Zero almost everywhere for ReLU and leaky ReLU.

    Raises:
        ProbeError: n < d (g is singular everywhere); else as :func:`metric`.

    Source: the Gauss equation for arXiv:2301.11375's model.  Cost: O(B n d · min(n, d²)) in blocks of bounded memory.

    >>> x = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    >>> R = scalar_curvature(x, W, torch.zeros(3, dtype=torch.float64), "tanh")
    >>> assert abs(R.item() - (-0.1947018936)) < 1e-9
    """
    phi = named(activation)
    z = _preactivations(x, W, b)
    (samples, n), d = z.shape, W.shape[1]
    if n < d:
        raise ProbeError(
            f"{n} hidden units cannot carry a curved {d}-dimensional space: with n < d the metric is singular "
            "everywhere and its curvature undefined.\n"
            f"Restrict the map to a slice x = x0 + A u of at most {n} dimensions:  "
            "scalar_curvature(u, W @ A, b + W @ x0)"
        )
    per_sample = max(n * d, min(n * n, d**3))
    step = max(1, _BLOCK // per_sample)
    parts = [_curvature(phi, part, W) for part in z.split(step)] if samples else [z.sum(1)]
    return torch.cat(parts)


def _curvature(phi: Activation, z: Tensor, W: Tensor) -> Tensor:
    n, d = W.shape
    J, scale, defect = regular(_jacobian(phi, z, W))
    # Where g is singular the frame is a stand-in, marked by `defect`; so other samples keep their gradients.
    identity = torch.eye(d, dtype=W.dtype, device=W.device)
    frame = torch.linalg.solve_triangular(torch.linalg.qr(J).R, identity, upper=True) / scale[:, None, None]
    c = phi.first(z) * phi.second(z) / n
    whitened = W @ frame
    # Whichever is less: the sum over pairs of units costs n² d, the tensor T n d³.
    curvature = _by_pairs(c, whitened) if n < d * d else _by_third_moment(c, whitened)
    return curvature + torch.where(defect == 0, 0.0, torch.nan)


def _by_third_moment(c: Tensor, y: Tensor) -> Tensor:
    samples, _, d = y.shape
    T = y.new_zeros(samples, d, d * d)
    for units in _blocks(y.shape[1], samples * d * d):
        part = y[:, units]
        squares = (part[..., :, None] * part[..., None, :]).flatten(2)
        T = T + (c[:, units, None] * part).transpose(1, 2) @ squares
    T = T.unflatten(2, (d, d))
    tau = T.diagonal(dim1=1, dim2=2).sum(-1)
    return T.square().sum((1, 2, 3)) - tau.square().sum(1)


def _by_pairs(c: Tensor, y: Tensor) -> Tensor:
    # |T|² − |τ|² = Σ_jk c_j c_k K_jk (K_jk² − K_jj K_kk), K = W g⁻¹ Wᵀ, summed over units instead of axes.
    lengths = y.square().sum(2)
    total = y.new_zeros(y.shape[0])
    for units in _blocks(y.shape[1], y.shape[0] * y.shape[1]):
        K = y[:, units] @ y.transpose(1, 2)
        area = K.square() - lengths[:, units, None] * lengths[:, None, :]
        total = total + torch.einsum("bj,bjk,bk->b", c[:, units], K * area, c)
    return total


def _blocks(units: int, numbers_per_unit: int) -> Iterator[slice]:
    step = max(1, _BLOCK // numbers_per_unit)
    return (slice(i, i + step) for i in range(0, units, step))


def _preactivations(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    fits = x.ndim == W.ndim == 2 and b.ndim == 1 and x.shape[1:] == W.shape[1:] and b.shape == W.shape[:1]
    if not fits or not W.numel():
        raise ProbeError(
            f"one hidden layer takes x [B, d], W [n, d] and b [n]; got x {list(x.shape)}, W {list(W.shape)}, b "
            f"{list(b.shape)}.\n"
            "From a layer `linear = torch.nn.Linear(d, n)`, write W=linear.weight, b=linear.bias."
        )
    if len({x.dtype, W.dtype, b.dtype}) != 1 or x.dtype not in (torch.float32, torch.float64):
        raise ProbeError(
            f"x, W and b must share one dtype, float32 or float64; got {x.dtype}, {W.dtype}, {b.dtype}.\n"
            "Write x.double(), W.double(), b.double()."
        )
    if len({x.device, W.device, b.device}) != 1:
        raise ProbeError(
            f"x, W and b must be on one device; got {x.device}, {W.device}, {b.device}.\nWrite x.to(W.device)."
        )
    return x @ W.T + b


def _jacobian(phi: Activation, z: Tensor, W: Tensor) -> Tensor:
    return phi.first(z)[..., None] * W / math.sqrt(W.shape[0])


@dataclass(frozen=True)
class Activation:
    """An elementwise φ by its derivatives: ``first`` is φ', ``second`` is φ''.

    ``name`` is the name of the closed form, or None for a callable that is known by its values alone;
    ``parameter`` is the slope of a leaky ReLU or the exponent of a monomial.
    """

    name: str | None
    first: Elementwise
    second: Elementwise
    parameter: float = 0.0


def _sigmoid_slope(z: Tensor) -> Tensor:
    # σ(z) σ(−z): 1 − σ(z) would cancel where the unit saturates.
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _tanh_slope(z: Tensor) -> Tensor:
    return 4 * _sigmoid_slope(2 * z)


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2))


# name → (φ', φ'').  σ'' = −σ' tanh(z/2); Φ and p are the normal distribution and density, p' = −z p.
_DERIVATIVES: dict[str, tuple[Elementwise, Elementwise]] = {
    "sigmoid": (_sigmoid_slope, lambda z: -_sigmoid_slope(z) * torch.tanh(z / 2)),
    "tanh": (_tanh_slope, lambda z: -2 * _tanh_slope(z) * torch.tanh(z)),
    "erf": (lambda z: 2 * _normal_density(z), lambda z: -2 * z * _normal_density(z)),
    "gelu": (lambda z: _normal_cdf(z) + z * _normal_density(z), lambda z: (2 - z * z) * _normal_density(z)),
    "silu": (
        lambda z: torch.sigmoid(z) + z * _sigmoid_slope(z),
        lambda z: _sigmoid_slope(z) * (2 - z * torch.tanh(z / 2)),
    ),
    "softplus": (torch.sigmoid, _sigmoid_slope),
    "sin": (torch.cos, lambda z: -torch.sin(z)),
}
_ALIASES = {"identity": "z^1"}
# Modules that are known by their class, where nothing in them can be set; functions of torch by their own names below.
# torch.erf is erf(z), not erf(z/√2), so it is not in here.
_MODULES: dict[type, str] = {
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.Identity: "z^1",
}
_FUNCTIONS = ("sigmoid", "tanh", "gelu", "silu", "softplus", "relu", "leaky_relu", "sin")


def activation_names() -> list[str]:
    """Return the names that the closed forms know; ``z^q`` stands for any whole exponent q ≥ 1.

    >>> assert {"erf", "relu", "z^q"} <= set(activation_names())
    """
    return sorted([*_DERIVATIVES, *_ALIASES, "relu", "leaky_relu", "z^q"])


def named(activation: str | Elementwise) -> Activation:
    """Return the derivatives of an activation, by name or as a callable; torch's own functions are known.

    Raises:
        ProbeError: an unknown name (the close ones are listed), or something that is neither a name nor callable.

    >>> named("sin").first(torch.tensor(0.0)).item()
    1.0
    >>> named(torch.nn.Tanh()).name
    'tanh'
    """
    if isinstance(activation, str):
        return _by_name(activation)
    if not callable(activation):
        raise ProbeError(
            f"an activation is a name or an elementwise callable, not {type(activation).__name__}.\n"
            "Write activation='erf' or activation=torch.nn.GELU()."
        )
    if type(activation) is nn.LeakyReLU:
        return _leaky_relu(float(activation.negative_slope))
    known = _MODULES.get(type(activation))
    if type(activation) is nn.GELU and activation.approximate == "none":
        known = "gelu"
    if type(activation) is nn.Softplus and activation.beta == 1:
        known = "softplus"
    for name in _FUNCTIONS:
        if activation in (getattr(torch, name, None), getattr(nn.functional, name, None)):
            known = name
    if known is not None:
        return _by_name(known)
    first = derivative(activation)
    return Activation(None, first, derivative(first))


def _by_name(name: str) -> Activation:
    known = _ALIASES.get(name, name)
    if known in _DERIVATIVES:
        first, second = _DERIVATIVES[known]
        return Activation(known, first, second)
    if known == "relu":
        return _leaky_relu(0.0)
    if known == "leaky_relu":
        return _leaky_relu(0.01)
    if monomial := re.fullmatch(r"z(?:\^|\*\*)([1-9]\d*)", known):
        return _monomial(int(monomial[1]))
    close = difflib.get_close_matches(name, activation_names(), n=3, cutoff=0.4) or activation_names()
    raise ProbeError(
        f"no activation is called {name!r}; close names: {', '.join(close)}.\n"
        "Write one of them, or pass the function itself:  activation=torch.nn.functional.mish"
    )


def _leaky_relu(slope: float) -> Activation:
    def first(z: Tensor) -> Tensor:
        return torch.where(z > 0, 1.0, slope).to(z.dtype)

    return Activation("leaky_relu", first, torch.zeros_like, slope)


def _monomial(q: int) -> Activation:
    def second(z: Tensor) -> Tensor:
        return q * (q - 1) * z ** (q - 2) if q > 1 else torch.zeros_like(z)

    return Activation(f"z^{q}", lambda z: q * z ** (q - 1), second, float(q))


def derivative(f: Elementwise) -> Elementwise:
    """Return the derivative of an elementwise function, itself differentiable any number of times.

    >>> derivative(derivative(torch.sin))(torch.tensor(0.5)).item() == -torch.tensor(0.5).sin().item()
    True
    """

    def slope(z: Tensor) -> Tensor:
        with warnings.catch_warnings():
            # torch warns of its own decompositions at the first forward derivative in a process.
            warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
            value, tangent = torch.func.jvp(f, (z,), (torch.ones_like(z),))[:2]
        if value.shape != z.shape:
            raise ProbeError(
                f"the activation maps a tensor of shape {list(z.shape)} to {list(value.shape)}: it is not "
                "elementwise.\n"
                "Pass a function of one tensor that keeps its shape, such as torch.nn.functional.mish."
            )
        return tangent

    return slope
