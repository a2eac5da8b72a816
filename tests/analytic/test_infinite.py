"""Infinite width against 50-digit values, mpmath quadrature, and networks of growing width."""

import json
import math
from pathlib import Path

import mpmath
import pytest
import torch
from annotations import shapes_unchecked
from torch import nn
from torch.nn import functional as F

from torchgeom_probe.analytic import infinite, shallow
from torchgeom_probe.errors import ProbeError

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text(encoding="utf-8"))
GOLDEN = GOLDEN["infinite_width"]

# φ' of every activation as mpmath has it, for the quadrature that knows nothing of the code under test.
SLOPES = {
    "erf": lambda z: mpmath.sqrt(2 / mpmath.pi) * mpmath.exp(-z * z / 2),
    "gelu": lambda z: mpmath.ncdf(z) + z * mpmath.npdf(z),
    "z^1": lambda z: mpmath.mpf(1),
    "z^2": lambda z: 2 * z,
    "z^4": lambda z: 4 * z**3,
    "relu": lambda z: mpmath.mpf(z > 0),
    "leaky_relu": lambda z: mpmath.mpf(1) if z > 0 else mpmath.mpf("0.01"),
    "sin": mpmath.cos,
    "sigmoid": lambda z: mpmath.sech(z / 2) ** 2 / 4,
    "tanh": lambda z: mpmath.sech(z) ** 2,
    "silu": lambda z: 1 / (1 + mpmath.exp(-z)) + z * mpmath.sech(z / 2) ** 2 / 4,
    "softplus": lambda z: 1 / (1 + mpmath.exp(-z)),
}


def points(samples, d, s, dtype=torch.float64):
    x = torch.randn(samples, d, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return (x * math.sqrt(s) / x.norm(dim=1, keepdim=True)).to(dtype)


def moment(name, v, polynomial):
    """E φ'(√v u)² p(u) for u ~ N(0, 1), to some 20 digits."""
    with mpmath.workdps(20):
        root = mpmath.sqrt(v)
        ends = [-14, -5, -1.5, 0, 1.5, 5, 14]
        return mpmath.quad(lambda u: SLOPES[name](root * u) ** 2 * polynomial(u) * mpmath.npdf(u), ends)


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("entry", GOLDEN, ids=[f"{e['phi']}-{e['x2']}" for e in GOLDEN])
def test_golden_values(entry, d):
    x = points(5, d, entry["x2"])
    arguments = (x, entry["phi"], entry["sigma"], entry["zeta"])

    def expect(value, key, rel=1e-12):
        expected = torch.full_like(value, entry[key])
        torch.testing.assert_close(value, expected, rtol=rel, atol=1e-14)

    omega = infinite.omega(*arguments)
    expect(omega.value.exp(), "e_Omega")
    expect(omega.first, "dOmega")
    expect(omega.second, "d2Omega")
    eigenvalues = torch.linalg.eigvalsh(infinite.metric(*arguments))
    expect((infinite.metric(*arguments) @ x[..., None] * x[..., None]).sum((1, 2)) / entry["x2"], "g_radial")
    outer = max if entry["g_tangential"] > entry["g_radial"] else min
    expect(torch.stack([outer(row) for row in eigenvalues]), "g_tangential")
    expect(infinite.log_volume(*arguments).exp(), f"sqrt_det_g_d{d}")
    expect(infinite.scalar_curvature(*arguments), f"ricci_d{d}", 1e-10)


@pytest.mark.parametrize(("s", "sigma", "zeta"), [(0.04, 0.7, 0.3), (9.0, 1.1, 0.5)])
@pytest.mark.parametrize("name", SLOPES)
def test_against_quadrature_in_high_precision(name, s, sigma, zeta):
    v = sigma**2 * s + zeta**2
    h = moment(name, v, lambda u: 1)
    h1 = moment(name, v, lambda u: u**2 - 1) / (2 * v)
    h2 = moment(name, v, lambda u: u**4 - 6 * u**2 + 3) / (4 * v**2)
    expected = (mpmath.log(sigma**2 * h), sigma**2 * h1 / h, sigma**4 * (h2 / h - (h1 / h) ** 2))
    for value, exact in zip(infinite.omega(points(1, 3, s), name, sigma, zeta), expected, strict=True):
        assert value.item() == pytest.approx(float(exact), rel=1e-10, abs=1e-10)
    volume = 1.5 * mpmath.log(sigma**2 * h) + 0.5 * mpmath.log(1 + 2 * s * expected[1])
    assert infinite.log_volume(points(1, 3, s), name, sigma, zeta).item() == pytest.approx(float(volume), abs=1e-11)


def test_erf_in_closed_form_in_any_dimension():
    sigma, zeta, s = 0.7, 0.3, 2.5
    u = 1 + 2 * (sigma**2 * s + zeta**2)
    for d in (1, 2, 3, 7):
        R = -math.pi / 2 * (d - 1) * (d + 2) * sigma**2 * s / ((1 + 2 * zeta**2) * math.sqrt(u))
        volume = 0.5 * (d * math.log(2 * sigma**2 / math.pi) + math.log(1 + 2 * zeta**2) - (d / 2 + 1) * math.log(u))
        assert infinite.scalar_curvature(points(1, d, s), "erf", sigma, zeta).item() == pytest.approx(R, rel=1e-12)
        assert infinite.log_volume(points(1, d, s), "erf", sigma, zeta).item() == pytest.approx(volume, abs=1e-13)


def test_monomials_are_cones():
    for q in (2, 3, 5):
        x = points(3, 2, 1.7)
        assert infinite.scalar_curvature(x, f"z^{q}").abs().max() < 1e-12
        scale = infinite.omega(x, f"z^{q}").value.exp()[0].item()
        R = -(4 - 1) * (4 - 2) * (q - 1) ** 2 / ((2 * q - 1) * 1.7 * scale)
        value = infinite.scalar_curvature(points(1, 4, 1.7), f"z^{q}").item()
        assert value == pytest.approx(R, rel=1e-12)


def test_relu_is_flat_and_the_line_has_no_curvature():
    x = points(3, 5, 2.0)
    for phi, h in (("relu", 0.5), (nn.LeakyReLU(0.2), 0.52), ("identity", 1.0)):
        torch.testing.assert_close(infinite.metric(x, phi, 2.0), 4 * h * torch.eye(5, dtype=x.dtype).expand(3, 5, 5))
        assert infinite.scalar_curvature(x, phi).abs().max() == 0
    assert infinite.scalar_curvature(points(3, 1, 2.0), "erf").abs().max() == 0


@pytest.mark.parametrize("s", [1e-6, 0.3, 1.0, 30.0, 400.0])
@pytest.mark.parametrize("name", ["erf", "sin", "gelu", "z^3"])
def test_quadrature_reproduces_the_closed_forms(name, s):
    _, v, exact = infinite._moments(points(3, 2, s), name, 1.0, 0.0)
    for value, closed in zip(infinite._quadrature(shallow.named(name), v), exact, strict=True):
        torch.testing.assert_close(value, closed, rtol=1e-9, atol=1e-11)


def test_quadrature_holds_at_large_variance():
    x = points(2, 2, 400.0)
    h, m = moment_wide(lambda z: mpmath.sech(z) ** 2, 400)
    omega = infinite.omega(x, "tanh").value
    assert omega[0].item() == pytest.approx(float(mpmath.log(h)), abs=1e-12)
    assert infinite.log_volume(x, "tanh")[0].item() == pytest.approx(float(mpmath.log(h * m)) / 2, abs=1e-12)


def moment_wide(slope, v):
    with mpmath.workdps(25):
        root = mpmath.sqrt(v)
        ends = [-40, -20, -10, -5, -2, 0, 2, 5, 10, 20, 40]  # in z: φ'² is narrow where the Gaussian is wide
        density = lambda z: slope(z) ** 2 * mpmath.npdf(z / root) / root  # noqa: E731
        return mpmath.quad(density, ends), mpmath.quad(lambda z: density(z) * z * z / v, ends)


def test_the_radial_eigenvalue_does_not_cancel():
    # At s = 1e8 and ζ = 0, 1 + 2sΩ' = 1/(1+2s) is 5e-9: by subtraction it would have half of its digits.
    x = points(1, 2, 1e8)
    exact = 0.5 * (2 * math.log(2 / math.pi) - 2 * math.log1p(2e8))
    assert infinite.log_volume(x, "erf").item() == pytest.approx(exact, abs=1e-13)


@pytest.mark.parametrize("phi", ["erf", "tanh", "gelu", "softplus"])
@pytest.mark.parametrize("compute", [infinite.metric, infinite.log_volume, infinite.scalar_curvature])
def test_differentiable_in_points_and_scales(compute, phi):
    x = torch.cat([points(1, 3, 0.5), points(1, 3, 2.0)]).requires_grad_()
    sigma, zeta = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.9, 0.4))
    scaled = (lambda x, s, z: compute(x, phi, s, z), (x, sigma, zeta))
    assert torch.autograd.gradcheck(*scaled, rtol=1e-4, atol=1e-7, fast_mode=True)


def test_first_two_derivatives_of_omega():
    s = torch.linspace(0.3, 5, 7, dtype=torch.float64, requires_grad=True)
    x = torch.stack([s.sqrt(), torch.zeros_like(s)], 1)
    for phi in ("erf", "gelu", "sin", "sigmoid", "tanh", "silu"):
        omega = infinite.omega(x, phi, 0.8, 0.2)
        (first,) = torch.autograd.grad(omega.value.sum(), s, retain_graph=True)
        (second,) = torch.autograd.grad(omega.first.sum(), s, retain_graph=True)
        torch.testing.assert_close(omega.first, first, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(omega.second, second, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("phi", ["erf", "tanh", "z^2", "relu"])
def test_the_origin_is_finite_where_the_metric_is(phi):
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    for zeta in (0.0, 0.5):
        g = infinite.metric(x, phi, 1.0, zeta)
        assert torch.autograd.grad(g.sum(), x)[0].abs().max() == 0
        slope = {"erf": 2 / math.pi, "tanh": 1.0, "z^2": 0.0, "relu": 0.5}[phi]
        if zeta == 0:
            torch.testing.assert_close(g, slope * torch.eye(3, dtype=x.dtype).expand(2, 3, 3))
        if phi != "z^2":
            assert infinite.scalar_curvature(x, phi, 1.0, zeta).abs().max() == 0
    if phi == "z^2":
        assert infinite.log_volume(x, phi).tolist() == [-math.inf] * 2


@pytest.mark.parametrize("phi", ["erf", "tanh"])
def test_limit_of_finite_width(phi):
    """Curvature and volume of random networks approach the limit, and the error falls like 1/√n."""
    x = points(1, 2, 1.0)
    limit = [infinite.scalar_curvature(x, phi, 1.0, 0.3), infinite.log_volume(x, phi, 1.0, 0.3)]
    spread = {}
    for n, nets in ((100, 200), (1_000, 100), (10_000, 30), (100_000, 12)):
        generator = torch.Generator().manual_seed(n)
        values = []
        for _ in range(nets):
            W = torch.randn(n, 2, generator=generator, dtype=torch.float64)
            b = 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
            values.append([shallow.scalar_curvature(x, W, b, phi), shallow.log_volume(x, W, b, phi)])
        values = torch.tensor(values, dtype=torch.float64)
        error = values - torch.tensor(limit, dtype=torch.float64)
        spread[n] = error.square().mean(0).sqrt()
        if n >= 10_000:  # below, the bias of order 1/n shows beside the standard error
            standard_error = values.std(0) / math.sqrt(nets)
            assert (error.mean(0).abs() < 4 * standard_error).all()
    for n in (100, 1_000, 10_000):
        ratio = spread[n] / spread[10 * n]
        assert ((ratio > 1.8) & (ratio < 5.6)).all(), (n, ratio)  # √10 = 3.16, from 12 to 200 nets


@pytest.mark.parametrize("phi", ["gelu", "sin", "relu", "silu"])
def test_metric_is_the_average_over_random_units(phi):
    x = points(2, 3, 1.5)
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(40):
        W = 0.7 * torch.randn(5_000, 3, generator=generator, dtype=torch.float64)
        b = 0.3 * torch.randn(5_000, generator=generator, dtype=torch.float64)
        batches.append(shallow.metric(x, W, b, phi))
    batches = torch.stack(batches)
    deviation = (batches.mean(0) - infinite.metric(x, phi, 0.7, 0.3)) / (batches.std(0) / math.sqrt(40))
    assert deviation.abs().max() < 4


def test_batched_equals_single_and_float32_follows():
    x = torch.cat([points(3, 5, 0.5), points(2, 5, 40.0)])
    for phi in ("gelu", "tanh"):
        for compute in (infinite.metric, infinite.log_volume, infinite.scalar_curvature):
            together = compute(x, phi, 0.8, 0.1)
            one_by_one = torch.cat([compute(point[None], phi, 0.8, 0.1) for point in x])
            torch.testing.assert_close(together, one_by_one, rtol=1e-9, atol=1e-11)
            single = compute(x.float(), phi, 0.8, 0.1)
            assert single.dtype == torch.float32
            torch.testing.assert_close(single.double(), together, rtol=3e-3, atol=1e-5)


def test_long_batches_are_integrated_in_parts(monkeypatch):
    x = torch.cat([points(7, 2, 0.5), points(7, 2, 3.0)])
    whole = infinite.scalar_curvature(x, "tanh")
    monkeypatch.setattr(infinite, "_BLOCK", 500)
    torch.testing.assert_close(infinite.scalar_curvature(x, "tanh"), whole)
    assert infinite.scalar_curvature(x[:0], "tanh").shape == (0,)


def test_rotations_leave_volume_and_curvature_alone():
    x = points(5, 3, 2.0)
    rotation = torch.linalg.qr(points(3, 3, 1.0)).Q
    for phi in ("erf", "silu"):
        g = infinite.metric(x, phi)
        torch.testing.assert_close(infinite.metric(x @ rotation.T, phi), rotation @ g @ rotation.T)
        torch.testing.assert_close(torch.linalg.eigvalsh(g).log().sum(1) / 2, infinite.log_volume(x, phi))
        torch.testing.assert_close(infinite.scalar_curvature(x @ rotation.T, phi), infinite.scalar_curvature(x, phi))


def test_scaling_weights_is_scaling_inputs():
    x = points(3, 3, 2.0)
    for phi in ("gelu", "tanh"):
        torch.testing.assert_close(infinite.metric(x, phi, 2.0, 0.3), 4 * infinite.metric(2 * x, phi, 1.0, 0.3))
        torch.testing.assert_close(
            infinite.scalar_curvature(x, phi, 2.0, 0.3), infinite.scalar_curvature(2 * x, phi, 1.0, 0.3)
        )


def test_refusals():
    x = points(3, 2, 1.0)
    for function in (torch.cos, F.elu, nn.Hardtanh(), lambda z: z**3):
        with pytest.raises(ProbeError, match=r"known by its values alone(.|\n)*one of erf, gelu"):
            infinite.log_volume(x, function)
    torch.testing.assert_close(infinite.log_volume(x, nn.Tanh()), infinite.log_volume(x, "tanh"))
    for activation in ("tanh", "erf", "relu"):
        with pytest.raises(ProbeError, match=r"not finite, and there is no metric there.\n.*isfinite\(\).all\(1\)"):
            infinite.metric(x * math.inf, activation)
    with pytest.raises(ProbeError, match="close names: softplus"):
        infinite.scalar_curvature(x, "soft_plus")
    for sigma, zeta in ((0.0, 0.0), (-1.0, 0.0), (1.0, -0.1), (math.nan, 0.0), (1.0, math.inf)):
        with pytest.raises(ProbeError, match="standard deviation sigma > 0"):
            infinite.omega(x, "erf", sigma, zeta)
    with shapes_unchecked():
        for wrong in (x[0], x[:, :0], x.long(), x.half()):
            with pytest.raises(ProbeError, match=r"points x \[B, d\]"):
                infinite.metric(wrong, "erf")
