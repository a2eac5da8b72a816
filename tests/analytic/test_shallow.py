"""One hidden layer against 50-digit values, derivatives by torch.func, and sums over tuples of units."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from annotations import shapes_unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from torchgeom_probe.analytic import shallow
from torchgeom_probe.errors import ProbeError

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text(encoding="utf-8"))["shallow"]
GOLDEN_IDS = [f"{e['weights']}{e['d']}-{e['phi']}-{e['x'][0]}" for e in GOLDEN]

# The function that each name stands for, written with other operations than the table under test.
SMOOTH = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": lambda z: torch.erf(z / math.sqrt(2)),
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "sin": torch.sin,
    "z^1": lambda z: z,
    "z^2": lambda z: z * z,
    "z^5": lambda z: z * z * z * z * z,
    "identity": lambda z: z,
}


def golden_layer(entry):
    j, mu = (torch.arange(7.0, dtype=torch.float64)[:, None], torch.arange(entry["d"], dtype=torch.float64)[None])
    W = torch.sin(1 + 3 * j + 7 * mu + (2 * j * mu if entry["weights"] == "B" else 0))
    return torch.tensor([entry["x"]], dtype=torch.float64), W, torch.cos(2 + 5 * j[:, 0])


def random_layer(samples=3, n=11, d=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((samples, d), (n, d), (n,))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("entry", GOLDEN, ids=GOLDEN_IDS)
def test_golden_values(entry):
    x, W, b = golden_layer(entry)
    g = torch.tensor([entry["g"]], dtype=torch.float64)
    torch.testing.assert_close(shallow.metric(x, W, b, entry["phi"]), g, rtol=1e-12, atol=0)
    assert shallow.log_volume(x, W, b, entry["phi"]).exp().item() == pytest.approx(entry["sqrt_det_g"], rel=1e-12)
    R = shallow.scalar_curvature(x, W, b, entry["phi"]).item()
    assert pytest.approx(entry["ricci"], rel=1e-10) == R
    assert 3 * R == pytest.approx(entry["ricci_upstream_formula"], rel=1e-10)


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_of_named_activations(name):
    phi = shallow.named(name)
    z = torch.linspace(-7, 7, 101, dtype=torch.float64)
    first = torch.func.vmap(torch.func.grad(SMOOTH[name]))
    second = torch.func.vmap(torch.func.grad(torch.func.grad(SMOOTH[name])))
    torch.testing.assert_close(phi.first(z), first(z), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(phi.second(z), second(z), rtol=1e-12, atol=1e-13)


def test_saturated_slopes_keep_their_digits():
    z = torch.tensor([40.0, -40.0], dtype=torch.float64)
    for name, rate in (("sigmoid", 1), ("tanh", 2)):
        slope, bend = shallow.named(name).first(z), shallow.named(name).second(z)
        torch.testing.assert_close(slope, rate**2 * torch.exp(-rate * z.abs()), rtol=1e-12, atol=0)
        torch.testing.assert_close(bend, -rate * z.sign() * slope, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.tanh, "tanh"),
        (nn.Tanh(), "tanh"),
        (nn.GELU(), "gelu"),
        (F.gelu, "gelu"),
        (nn.ReLU(inplace=True), "leaky_relu"),
        (nn.LeakyReLU(0.3), "leaky_relu"),
        (nn.Softplus(), "softplus"),
        (nn.Identity(), "z^1"),
        (nn.Softplus(beta=2.0), None),
        (nn.GELU(approximate="tanh"), None),
        (torch.erf, None),
        (lambda z: torch.tanh(z), None),
    ],
)
def test_torch_functions_are_recognised(function, name):
    assert shallow.named(function).name == name


@pytest.mark.parametrize("d", [2, 3])
def test_a_callable_is_differentiated(d):
    x, W, b = random_layer(d=d, n=7)
    for compute in (shallow.metric, shallow.log_volume, shallow.scalar_curvature):
        torch.testing.assert_close(compute(x, W, b, lambda z: torch.tanh(z)), compute(x, W, b, "tanh"))
    slope = nn.LeakyReLU(0.3)
    hand = torch.func.vmap(torch.func.jacrev(lambda p: slope(W @ p + b) / math.sqrt(7)))(x)
    torch.testing.assert_close(shallow.metric(x, W, b, slope), hand.mT @ hand)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_determinant_is_the_sum_over_tuples_of_units(d):
    x, W, b = random_layer(samples=1, n=5, d=d)
    slopes = shallow.named("tanh").first(x @ W.T + b)[0]
    total = 0.0
    for units in itertools.product(range(5), repeat=d):
        minor = torch.linalg.det(W[list(units)]) if d > 1 else W[units[0], 0]
        total += (minor.square() * slopes[list(units)].square().prod()).item()
    expected = 0.5 * math.log(total / (5**d * math.factorial(d)))
    assert shallow.log_volume(x, W, b, "tanh").item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(11, 2), (11, 3), (13, 5), (53, 5)])
def test_both_sums_give_one_curvature(n, d):
    _, y, c = random_layer(samples=1, n=n, d=d)
    y, c = torch.stack([y, y.flip(0) + 0.1]), torch.stack([c, c + 1])
    torch.testing.assert_close(shallow._by_pairs(c, y), shallow._by_third_moment(c, y), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("n", "d"), [(7, 3), (17, 3)])
def test_blocks_do_not_change_the_curvature(n, d, monkeypatch):
    layer = random_layer(samples=5, n=n, d=d)
    whole = shallow.scalar_curvature(*layer, "tanh")
    monkeypatch.setattr(shallow, "_BLOCK", 50)
    torch.testing.assert_close(shallow.scalar_curvature(*layer, "tanh"), whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("compute", [shallow.metric, shallow.log_volume, shallow.scalar_curvature])
@pytest.mark.parametrize("n", [7, 11])
def test_differentiable_in_points_and_weights(compute, n):
    x, W, b = random_layer(samples=2, n=n, d=3, seed=1)
    layer = [t.requires_grad_() for t in (0.3 * x, W, 0.3 * b)]
    assert torch.autograd.gradcheck(lambda *a: compute(*a, "tanh"), layer, rtol=1e-4, atol=1e-5)


def test_a_line_a_square_layer_and_piecewise_linear_units_are_flat():
    assert shallow.scalar_curvature(*random_layer(d=1), "tanh").abs().max() == 0
    assert shallow.scalar_curvature(*random_layer(n=3, d=3), "sin").abs().max() < 1e-9
    for name in ("relu", "leaky_relu", "identity"):
        assert shallow.scalar_curvature(*random_layer(d=2), name).tolist() == [0, 0, 0]


@pytest.mark.parametrize("n", [7, 100_003])
def test_duplicated_columns_are_singular_and_no_nan(n):
    x, W, b = random_layer(n=n)
    W = W[:, :1].repeat(1, 2) * torch.tensor([1.0, 1 / 3], dtype=torch.float64)
    assert shallow.log_volume(x, W, b, "tanh").tolist() == [-math.inf] * 3
    assert shallow.scalar_curvature(x, W, b, "tanh").isnan().all()


def test_dead_and_diverged_samples_leave_the_others_alone():
    x, W, b = random_layer(samples=5, d=2)
    x[0], x[4] = 1e5, math.nan
    W.requires_grad_()
    assert shallow.log_volume(x, W, b, "tanh")[0] == -math.inf
    for compute in (shallow.log_volume, shallow.scalar_curvature):
        alone = compute(x[1:4], W, b, "tanh")
        assert alone.isfinite().all()
        torch.testing.assert_close(compute(x, W, b, "tanh")[1:4], alone)
        assert compute(x, W, b, "tanh")[4].isnan()
        # The dead sample is part of the graph here, and gives no gradient, least of all nan.
        with_dead = compute(x[:4], W, b, "tanh")[1:].sum() + compute(x[:4], W, b, "tanh")[0].nan_to_num(neginf=0)
        gradients = [torch.autograd.grad(value, W)[0] for value in (with_dead, alone.sum())]
        torch.testing.assert_close(*gradients)


def test_tiny_slopes_do_not_underflow():
    x, W, b = random_layer()
    expected = shallow.log_volume(x, W, torch.zeros_like(b), torch.exp) - 2 * 600
    b = torch.full_like(b, -600.0)
    torch.testing.assert_close(shallow.log_volume(x, W, b, torch.exp), expected, rtol=1e-12, atol=0)


def test_volume_in_float32_survives_an_ill_conditioned_layer():
    x, W, b = random_layer(n=31)
    W[:, 1] = W[:, 0] + 1e-4 * W[:, 1]
    W = W.float().double()  # the same matrix in both precisions
    x, b = x.float().double(), b.float().double()
    single = shallow.log_volume(x.float(), W.float(), b.float(), "tanh").double()
    torch.testing.assert_close(single, shallow.log_volume(x, W, b, "tanh"), rtol=0, atol=2e-2)


def test_fewer_units_than_inputs():
    x, W, b = random_layer(n=2, d=3)
    assert shallow.log_volume(x, W, b, "tanh").tolist() == [-math.inf] * 3
    assert torch.linalg.matrix_rank(shallow.metric(x, W, b, "tanh")).tolist() == [2, 2, 2]
    with pytest.raises(ProbeError, match="slice x = x0"):
        shallow.scalar_curvature(x, W, b, "tanh")


def test_an_empty_batch_is_an_empty_result():
    x, W, b = random_layer(samples=0)
    for compute in (shallow.log_volume, shallow.scalar_curvature):
        assert compute(x, W, b).shape == (0,)


layers = st.builds(
    random_layer,
    samples=st.just(3),
    n=st.sampled_from([5, 13, 29]),
    d=st.sampled_from([2, 3]),
    seed=st.integers(0, 10_000),
)
property_test = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def close(a, b, scale):
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * (1 + scale.abs().max().item()))


@property_test
@given(layers, st.sampled_from(["sigmoid", "gelu", "sin"]))
def test_invariances(layer, phi):
    x, W, b = layer
    d = x.shape[1]
    volume, R = shallow.log_volume(x, W, b, phi), shallow.scalar_curvature(x, W, b, phi)
    rotation = torch.linalg.qr(W[: d + 1].T @ W[: d + 1] + torch.eye(d)).Q
    close(shallow.log_volume(x @ rotation.T, W @ rotation.T, b, phi), volume, volume)
    close(shallow.scalar_curvature(x @ rotation.T, W @ rotation.T, b, phi), R, R)
    order = torch.arange(len(b) - 1, -1, -1)
    close(shallow.log_volume(x, W[order], b[order], phi), volume, volume)
    close(shallow.scalar_curvature(x, W[order], b[order], phi), R, R)
    # A linear change of the inputs multiplies the volume by its determinant, and leaves the curvature alone.
    stretched = W * 3.0
    close(shallow.log_volume(x / 3.0, stretched, b, phi), volume + d * math.log(3.0), volume)
    close(shallow.scalar_curvature(x / 3.0, stretched, b, phi), R, R)
    # Every unit twice is the same map up to an isometry: (φ, φ)/√(2n).
    twice = (x, torch.cat([W, W]), torch.cat([b, b]))
    close(shallow.log_volume(*twice, phi), volume, volume)
    close(shallow.scalar_curvature(*twice, phi), R, R)
    # A shift of the inputs that the biases take back.
    close(shallow.scalar_curvature(x + 1, W, b - W.sum(1), phi), R, R)


@property_test
@given(layers)
def test_features_scaled_by_c_scale_the_curvature_by_the_inverse_square(layer):
    R = shallow.scalar_curvature(*layer, lambda z: torch.sin(z))
    close(shallow.scalar_curvature(*layer, lambda z: 5 * torch.sin(z)), R / 25, R)


@pytest.mark.parametrize("compute", [shallow.metric, shallow.log_volume, shallow.scalar_curvature])
def test_refusals(compute):
    x, W, b = random_layer()
    with shapes_unchecked():
        for wrong in ((x[0], W, b), (x, W.T, b), (x, W, b[1:]), (x[:, :1], W, b), (x[:, :0], W[:, :0], b)):
            with pytest.raises(ProbeError, match=r"x \[B, d\], W \[n, d\] and b \[n\]"):
                compute(*wrong)
        with pytest.raises(ProbeError, match="share one dtype"):
            compute(x.float(), W, b)
        with pytest.raises(ProbeError, match="share one dtype"):
            compute(x.long(), W.long(), b.long())
        with pytest.raises(ProbeError, match="on one device"):
            compute(x, W.to("meta"), b)
        with pytest.raises(ProbeError, match="name or an elementwise callable, not int"):
            compute(x, W, b, 3)
    with pytest.raises(ProbeError, match="'tahn'; close names: tanh"):
        compute(x, W, b, "tahn")
    with pytest.raises(ProbeError, match="z\\^q"):
        compute(x, W, b, "z^0")
    with pytest.raises(ProbeError, match="not elementwise"):
        compute(x, W, b, lambda z: z.sum())
