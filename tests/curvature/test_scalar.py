"""The Gauss equation against Christoffel symbols, known surfaces, 50-digit values and the closed forms."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from annotations import shapes_unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import jacfwd
from torch.nn import functional as F

from torchgeom_probe.analytic import infinite, shallow
from torchgeom_probe.curvature.scalar import scalar_curvature
from torchgeom_probe.curvature.twice import TwiceDifferentiable
from torchgeom_probe.errors import ProbeError

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text(encoding="utf-8"))


def christoffel_curvature(metric, x, *, flipped=False):
    """R of one point by nested jacfwd of the metric; ``flipped``: ΓΓ signed as in the published form."""

    def gamma(x):
        dg = jacfwd(metric)(x)  # [a, b, c] = ∂_c g_ab
        lowered = (dg.permute(0, 2, 1) + dg - dg.permute(2, 0, 1)) / 2
        return torch.linalg.inv(metric(x)) @ lowered.flatten(1), lowered.shape

    def symbols(x):
        value, shape = gamma(x)
        return value.reshape(shape)

    G, dG = symbols(x), jacfwd(symbols)(x)  # G[m, a, b] = Γ^m_ab, dG[m, a, b, c] = ∂_c Γ^m_ab
    linear = torch.einsum("mnbm->nb", dG) - torch.einsum("mnmb->nb", dG)
    products = torch.einsum("mmr,rnb->nb", G, G) - torch.einsum("mbr,rnm->nb", G, G)
    ricci = linear + (-products if flipped else products)
    return (torch.linalg.inv(metric(x)) * ricci).sum().item()


def induced(features):
    """The metric of a batched map, at one point."""

    def metric(x):
        J = jacfwd(lambda p: features(p[None]).flatten())(x)
        return J.T @ J

    return metric


def surface(*components):
    return lambda x: torch.stack([c(*x.unbind(1)) for c in components], 1)


sin, cos = torch.sin, torch.cos
GRAPH_OF_THE_SPHERE = surface(lambda x, y: x, lambda x, y: y, lambda x, y: (1 - x * x - y * y).sqrt())
SPHERE_IN_ANGLES = surface(lambda t, p: sin(t) * cos(p), lambda t, p: sin(t) * sin(p), lambda t, p: cos(t))
THREE_SPHERE = surface(
    lambda a, b, c: cos(a),
    lambda a, b, c: sin(a) * cos(b),
    lambda a, b, c: sin(a) * sin(b) * cos(c),
    lambda a, b, c: sin(a) * sin(b) * sin(c),
)
CURVED_PLANE = surface(lambda x, y: x + 0.3 * y * y, lambda x, y: y - 0.2 * x**3)
TORUS = surface(lambda a, b: (2 + cos(a)) * cos(b), lambda a, b: (2 + cos(a)) * sin(b), lambda a, b: sin(a))

# name → (map, number of inputs, R as a function of them).  Inputs are drawn from (0.2, 0.9).
SURFACES = {
    "sphere as a graph": (lambda x: GRAPH_OF_THE_SPHERE(0.7 * x), 2, lambda x: 2.0),
    "sphere in angles, radius 3": (lambda x: 3 * SPHERE_IN_ANGLES(x), 2, lambda x: 2 / 9),
    "sphere, stereographic": (
        lambda x: torch.cat([2 * x, 1 - x.square().sum(1, True)], 1) / (1 + x.square().sum(1, True)),
        2,
        lambda x: 2.0,
    ),
    "three-sphere of radius 1/2": (lambda x: THREE_SPHERE(x) / 2, 3, lambda x: 24.0),
    "five-sphere, stereographic": (
        lambda x: torch.cat([2 * x, 1 - x.square().sum(1, True)], 1) / (1 + x.square().sum(1, True)),
        5,
        lambda x: 20.0,
    ),
    "torus": (TORUS, 2, lambda x: 2 * cos(x[0]) / (2 + cos(x[0]))),
    "flat torus": (surface(*(lambda a, b, f=f, i=i: f((a, b)[i]) for f in (sin, cos) for i in (0, 1))), 2, lambda x: 0),
    "pseudosphere": (
        surface(
            lambda u, v: cos(v) / torch.cosh(u), lambda u, v: sin(v) / torch.cosh(u), lambda u, v: u - torch.tanh(u)
        ),
        2,
        lambda x: -2.0,
    ),
    "catenoid": (
        surface(lambda u, v: torch.cosh(u) * cos(v), lambda u, v: torch.cosh(u) * sin(v), lambda u, v: u),
        2,
        lambda x: -2 / torch.cosh(x[0]) ** 4,
    ),
    "hyperbolic paraboloid": (
        surface(lambda x, y: x, lambda x, y: y, lambda x, y: x * y),
        2,
        lambda x: -2 / (1 + x.square().sum()) ** 2,
    ),
    "plane in curved coordinates": (CURVED_PLANE, 2, lambda x: 0.0),
    "cylinder": (surface(lambda u, v: cos(u), lambda u, v: sin(u), lambda u, v: v), 2, lambda x: 0.0),
    "sphere times line": (lambda x: torch.cat([SPHERE_IN_ANGLES(x[:, :2]), x[:, 2:].exp()], 1), 3, lambda x: 2.0),
    "sphere times pseudosphere": (
        lambda x: torch.cat([2 * SPHERE_IN_ANGLES(x[:, :2]), SURFACES["pseudosphere"][0](x[:, 2:])], 1),
        4,
        lambda x: 2 / 4 - 2.0,
    ),
}


def inputs(samples, *shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, *shape, generator=generator, dtype=torch.float64).to(dtype)


def network(d=3, n=11, activation=nn.Tanh, seed=0, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Linear(d, 7), activation(**kwargs), nn.Linear(7, n), activation(**kwargs), nn.Linear(n, 13))
        return nn.Sequential(*layers).double()


# -------------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", SURFACES)
def test_surfaces_of_known_curvature(name):
    features, d, curvature = SURFACES[name]
    x = 0.2 + 0.7 * torch.rand(17, d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.tensor([float(curvature(point)) for point in x], dtype=torch.float64)
    torch.testing.assert_close(scalar_curvature(features, x), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("features", "entry"),
    list(zip((GRAPH_OF_THE_SPHERE, THREE_SPHERE, CURVED_PLANE, TORUS), GOLDEN["surfaces"], strict=True)),
    ids=["sphere graph", "three-sphere", "curved plane", "torus"],
)
def test_surfaces_that_tell_the_sign_and_one_that_does_not(features, entry):
    x = torch.tensor(entry["x"], dtype=torch.float64)
    assert scalar_curvature(features, x[None]).item() == pytest.approx(entry["ricci"], abs=1e-12)
    assert christoffel_curvature(induced(features), x) == pytest.approx(entry["ricci"], abs=1e-11)
    flipped = christoffel_curvature(induced(features), x, flipped=True)
    assert flipped == pytest.approx(entry["sign_flipped"], abs=1e-11)
    assert (abs(flipped - entry["ricci"]) > 0.05) == (features is not TORUS)


def test_the_sphere_in_angles_does_not_tell_the_sign():
    x = torch.tensor([0.9, 0.4], dtype=torch.float64)
    assert christoffel_curvature(induced(SPHERE_IN_ANGLES), x, flipped=True) == pytest.approx(2, abs=1e-12)


def golden_network(entry):
    j, mu = (torch.arange(7.0, dtype=torch.float64)[:, None], torch.arange(entry["d"], dtype=torch.float64)[None])
    W = torch.sin(1 + 3 * j + 7 * mu + (2 * j * mu if entry["weights"] == "B" else 0))
    k, i = torch.arange(9.0, dtype=torch.float64)[:, None], torch.arange(7.0, dtype=torch.float64)[None]
    V, c = torch.sin(2 + k + 3 * i + 2 * k * i) / math.sqrt(7), torch.cos(1 + 2 * k[:, 0])
    phi = torch.sigmoid if entry["phi"] == "sigmoid" else lambda z: torch.erf(z / math.sqrt(2))
    return lambda x: phi(phi(x @ W.T + torch.cos(2 + 5 * j[:, 0])) @ V.T + c) / 3


@pytest.mark.parametrize("entry", GOLDEN["deep"], ids=lambda e: f"{e['weights']}{e['d']}-{e['phi']}-{e['x'][0]}")
def test_golden_deep_networks(entry):
    features, x = golden_network(entry), torch.tensor([entry["x"]], dtype=torch.float64)
    assert scalar_curvature(features, x).item() == pytest.approx(entry["ricci"], rel=1e-10)
    flipped = christoffel_curvature(induced(features), x[0], flipped=True)
    assert flipped == pytest.approx(entry["ricci_sign_flipped_christoffel"], rel=1e-8)
    # For deep networks the flipped formula is no multiple of R.
    assert abs(flipped / entry["ricci"] - 3) > 0.5


@pytest.mark.parametrize("d", [2, 3, 5])
@pytest.mark.parametrize("phi", ["tanh", "gelu", "sin"])
def test_one_hidden_layer_is_the_closed_form(phi, d):
    x, W, b = inputs(5, d), inputs(11, d, seed=1), inputs(11, seed=2)
    function = {"tanh": torch.tanh, "gelu": F.gelu, "sin": torch.sin}[phi]
    value = scalar_curvature(lambda x: function(x @ W.T + b) / math.sqrt(11), x)
    torch.testing.assert_close(shallow.scalar_curvature(x, W, b, phi), value, rtol=1e-9, atol=1e-9)
    flipped = christoffel_curvature(lambda p: shallow.metric(p[None], W, b, phi)[0], x[0], flipped=True)
    assert flipped == pytest.approx(3 * value[0].item(), rel=1e-7)


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize(
    ("phi", "sigma", "zeta"), [("erf", 1.0, 0.0), ("gelu", 0.7, 0.3), ("z^3", 1.0, 0.2), ("sin", 0.9, 0.0)]
)
def test_infinite_width_against_christoffel_symbols(phi, sigma, zeta, d):
    x = 0.6 * inputs(1, d, seed=4)
    R = infinite.scalar_curvature(x, phi, sigma, zeta).item()
    metric = lambda p: infinite.metric(p[None], phi, sigma, zeta)[0]  # noqa: E731
    assert christoffel_curvature(metric, x[0]) == pytest.approx(R, rel=1e-9, abs=1e-11)
    assert christoffel_curvature(metric, x[0], flipped=True) == pytest.approx(3 * R, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize(("d", "activation"), [(2, nn.Tanh), (3, nn.GELU), (4, nn.SiLU), (2, nn.Softplus)])
def test_deep_modules_against_christoffel_symbols(d, activation):
    model, x = network(d, activation=activation), inputs(3, d)
    expected = [christoffel_curvature(induced(model), point) for point in x]
    torch.testing.assert_close(
        scalar_curvature(model, x), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8
    )


class Elementary(nn.Module):
    """What the network below computes, in operations whose derivatives of every order torch has right."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    @staticmethod
    def silu(z):
        return z / (1 + torch.exp(-z))

    @staticmethod
    def standardised(x, axes):
        centred = x - x.mean(axes, keepdim=True)
        return centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()

    def forward(self, x):
        model = self.model
        z = model.stem(x)
        shift, scale, weight, bias, instance_weight, instance_bias = (
            t.reshape(1, -1, 1, 1)
            for t in (
                model.norm.running_mean,
                (model.norm.running_var + 1e-5).sqrt(),
                *(model.norm.weight, model.norm.bias, model.instance.weight, model.instance.bias),
            )
        )
        z = self.silu((z - shift) / scale * weight + bias)
        z = self.standardised(z, (2, 3)) * instance_weight + instance_bias
        tokens = z.flatten(2).transpose(1, 2)
        q, k, v = (tokens @ model.attention.in_proj_weight.T + model.attention.in_proj_bias).chunk(3, 2)
        scores = torch.exp(q @ k.transpose(1, 2) / math.sqrt(5))
        tokens = tokens + model.attention.out_proj(scores @ v / scores.sum(2, keepdim=True))
        tokens = self.standardised(tokens, (2,)) * model.head[0].weight + model.head[0].bias
        value, gate = model.head[2](tokens).chunk(2, 2)
        value = value / (1 + torch.exp(-gate))
        return value * torch.tanh(torch.log1p(torch.exp(value)))


class Attentive(nn.Module):
    """Convolution, attention, three normalisations, and activations that torch cannot differentiate twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 2)
        self.norm = nn.BatchNorm2d(5)
        self.instance = nn.InstanceNorm2d(5, affine=True)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(5), nn.Dropout(0.5), nn.Linear(5, 14), nn.GLU(), nn.Mish())

    def forward(self, x):
        z = self.instance(F.silu(self.norm(self.stem(x)), inplace=True))
        tokens = z.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens)


class OnSlice(nn.Module):
    """A model on the plane base + u·directions."""

    def __init__(self, model):
        super().__init__()
        self.model, self.base, self.directions = model, inputs(2, 3, 3), inputs(2, 2, 3, 3, seed=7)

    def forward(self, u):
        return self.model(self.base + torch.einsum("bk,kchw->bchw", u, self.directions))


@pytest.fixture
def attentive():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Attentive().double()
        for p in [*model.parameters(), model.norm.running_mean]:
            nn.init.normal_(p, std=0.7)
        return OnSlice(model)


def test_normalisations_and_attention_against_christoffel_symbols(attentive):
    u = 0.3 * inputs(3, 2, seed=6)
    elementary = OnSlice(Elementary(attentive.model))
    torch.testing.assert_close(elementary(u), attentive.eval()(u))  # one function, or the comparison means nothing
    expected = [christoffel_curvature(induced(elementary), point) for point in u]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(scalar_curvature(attentive.train(), u), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["layer_norm", "instance_norm"])
def test_what_torch_gets_wrong_and_nobody_rewrote_is_found_out(attentive, name, monkeypatch):
    rewritten = {k: v for k, v in TwiceDifferentiable._REWRITTEN.items() if k != name}
    monkeypatch.setattr(TwiceDifferentiable, "_REWRITTEN", rewritten)
    with pytest.raises(ProbeError, match=r"a second derivative of the model's output is wrong(.|\n)*layer by layer"):
        scalar_curvature(attentive, 0.3 * inputs(3, 2, seed=6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_guard_lets_sound_networks_pass(scale, dtype):
    for seed in range(5):
        model = network(3, activation=nn.GELU, seed=seed).to(dtype)
        x = scale * inputs(5, 3, seed=seed, dtype=dtype)
        assert scalar_curvature(lambda x, model=model: model(x / scale), x).isfinite().all()


def test_keywords_and_in_place_forms_of_the_rewritten_functions():
    weight, bias, x = inputs(1, 7)[0], inputs(1, 7, seed=1)[0], inputs(5, 7)
    with TwiceDifferentiable():
        rewritten = [
            F.layer_norm(x, (7,), weight=weight, bias=bias, eps=1e-3),
            F.layer_norm(input=x.reshape(5, 7, 1), normalized_shape=(7, 1)),
            torch.layer_norm(x, (7,), weight, bias, 1e-3, False),
            F.instance_norm(x[:, :, None].repeat(1, 1, 3) * inputs(1, 1, 3), weight=weight, bias=bias),
            F.instance_norm(x[:, :, None], weight, bias.abs(), use_input_stats=False),
            F.silu(x),
            F.mish(x, inplace=False),
            F.hardsigmoid(x),
            F.glu(x[:, :6], dim=1),
        ]
        for f in (F.silu, F.mish, F.hardsigmoid):
            z = x.clone()
            rewritten.append(f(z, inplace=True))
            assert rewritten[-1] is z
    plain = [
        F.layer_norm(x, (7,), weight=weight, bias=bias, eps=1e-3),
        F.layer_norm(x.reshape(5, 7, 1), (7, 1)),
        torch.layer_norm(x, (7,), weight, bias, 1e-3, False),
        F.instance_norm(x[:, :, None].repeat(1, 1, 3) * inputs(1, 1, 3), weight=weight, bias=bias),
        F.instance_norm(x[:, :, None], weight, bias.abs(), use_input_stats=False),
        *(F.silu(x), F.mish(x), F.hardsigmoid(x), F.glu(x[:, :6], dim=1)),
        *(F.silu(x), F.mish(x), F.hardsigmoid(x)),
    ]
    torch.testing.assert_close(rewritten, plain)


def test_float32_follows_float64():
    model, x = network(3), inputs(7, 3)
    double = scalar_curvature(model, x)
    single = scalar_curvature(copy.deepcopy(model).float(), x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------- layers and modules


def test_a_layer_is_the_truncated_model():
    model, x = network(3), inputs(5, 3)
    expected = scalar_curvature(model[:2], x)
    assert not torch.allclose(expected, scalar_curvature(model, x))
    for layer in ("1", model[1]):
        torch.testing.assert_close(scalar_curvature(model, x, layer=layer), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(scalar_curvature(model, x, layer=""), scalar_curvature(model, x), rtol=1e-12, atol=0)


class Twice(nn.Module):
    def __init__(self, d=3):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(d, d), nn.SiLU()).double()
        self.lift = nn.Linear(d, 7).double()

    def forward(self, x):
        return {"features": torch.tanh(self.lift(self.block(self.block(x)))), "classes": x.argmax(1)}

    def features(self, x):
        return self(x)["features"]


def test_the_second_call_and_a_dict_and_a_bound_method():
    model, x = Twice(), inputs(5, 3)
    output = scalar_curvature(lambda x: model(x)["features"], x)
    torch.testing.assert_close(scalar_curvature(model, x), output)  # the one floating-point entry of its dict
    torch.testing.assert_close(scalar_curvature(model.features, x), output)
    # A square layer is a change of coordinates: flat, but not affine, and each call is another one.
    for layer in ("block", "block#1"):
        assert scalar_curvature(model, x, layer=layer).abs().max() < 1e-7
    lifted = scalar_curvature(lambda x: torch.tanh(model.lift(x)), model.block(x).detach())
    assert lifted.isfinite().all()
    torch.testing.assert_close(scalar_curvature(model.features, x, layer="lift").abs().max() < 1e-6, torch.tensor(True))
    with pytest.raises(ProbeError, match=r"called 2 time\(s\)"):
        scalar_curvature(model, x, layer="block#2")


def test_an_in_place_activation_after_the_layer_does_not_reach_it():
    model = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.SiLU(inplace=True), nn.Linear(7, 5)).double()
    x = inputs(5, 3)
    torch.testing.assert_close(scalar_curvature(model, x, layer="1"), scalar_curvature(model[:2], x))


class WritesABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(5, dtype=torch.float64))
        self.linear = nn.Linear(3, 5).double()

    def forward(self, x):
        z = torch.tanh(self.linear(x))
        self.last.copy_(z.mean(0))
        return z


def test_the_model_is_left_as_it_was(attentive):
    model = attentive.train()
    model.model.head[0].eval()
    modes = [m.training for m in model.modules()]
    u = 0.3 * inputs(3, 2)
    u_before, state = u.clone(), copy.deepcopy(model.state_dict())
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    random_state = torch.get_rng_state()

    assert scalar_curvature(model, u, layer="model.attention").isfinite().all()
    with pytest.raises(ProbeError, match="vanish identically"):
        scalar_curvature(model, u, layer="model.stem")
    model.model.head[4].forward = lambda x: x.argmin(1)[0, 0].item()
    with pytest.raises(ProbeError, match="0 floating-point tensors"):
        scalar_curvature(model, u, layer="model.head")

    assert [m.training for m in model.modules()] == modes
    assert all(not m._forward_hooks for m in model.modules())
    assert torch.equal(u, u_before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert model.model.norm.weight.grad.tolist() == [1] * 5
    with pytest.raises(ProbeError, match="chunk_size=0"):
        scalar_curvature(model, u, chunk_size=0)


def test_a_buffer_written_in_eval_mode_stays():
    model = WritesABuffer()
    R = scalar_curvature(model, inputs(3, 3))
    torch.testing.assert_close(R, scalar_curvature(lambda x: torch.tanh(model.linear(x)), inputs(3, 3)))
    assert model.last.tolist() == [0] * 5


def test_measured_in_eval_mode_and_inside_inference_mode():
    model = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.9), nn.Linear(7, 5)).double()
    model(inputs(13, 3))
    evaluated = copy.deepcopy(model).eval()
    R = scalar_curvature(model, inputs(5, 3))
    torch.testing.assert_close(R, scalar_curvature(lambda x: evaluated(x), inputs(5, 3)))
    assert R.abs().min() > 1e-6
    with torch.inference_mode():
        torch.testing.assert_close(scalar_curvature(model, inputs(5, 3)), R)
    x = inputs(5, 3).requires_grad_()
    assert not scalar_curvature(model, x).requires_grad


def test_chunks_and_batches_do_not_change_the_result():
    model, x = network(5), inputs(7, 5)
    whole = scalar_curvature(model, x)
    for chunk_size in (1, 4, 11, 36):
        torch.testing.assert_close(scalar_curvature(model, x, chunk_size=chunk_size), whole, rtol=1e-9, atol=1e-9)
    one_by_one = torch.cat([scalar_curvature(model, point[None]) for point in x])
    torch.testing.assert_close(one_by_one, whole, rtol=1e-9, atol=1e-9)
    assert scalar_curvature(model, x[:0]).shape == (0,)


def test_singular_and_diverged_samples_are_nan_alone():
    # Polar coordinates of the sphere are singular at the pole.
    x = torch.tensor([[0.9, 0.4], [0.0, 0.4], [math.nan, 0.1], [0.5, 2.0]], dtype=torch.float64)
    R = scalar_curvature(SPHERE_IN_ANGLES, x)
    assert R.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(R[[0, 3]], torch.full((2,), 2.0, dtype=torch.float64))


# -------------------------------------------------------------------------------- invariances

property_test = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@property_test
@given(st.integers(0, 10_000), st.sampled_from([2, 3]), st.sampled_from([nn.Tanh, nn.SiLU]))
def test_the_curvature_is_a_scalar(seed, d, activation):
    model, x = network(d, activation=activation, seed=seed), inputs(3, d, seed=seed)
    R = scalar_curvature(model, x)
    tolerance = {"rtol": 1e-6, "atol": 1e-7 * (1 + R.abs().max().item())}

    def agrees(features, points, expected):
        torch.testing.assert_close(scalar_curvature(features, points), expected, **tolerance)

    rotation = torch.linalg.qr(inputs(13, 13, seed=seed + 1)).Q
    agrees(lambda x: model(x) @ rotation.T + 1, x, R)  # a motion of the features
    agrees(lambda x: model(x)[:, torch.arange(12, -1, -1)], x, R)
    agrees(lambda x: 3 * model(x), x, R / 9)
    shear = torch.eye(d, dtype=torch.float64) + 0.4 * inputs(d, d, seed=seed + 2).clamp(-1, 1).triu(1)
    agrees(lambda u: model(u @ shear.T), x @ torch.linalg.inv(shear).T, R)
    agrees(lambda u: model(torch.sinh(u)), torch.asinh(x), R)  # curved coordinates
    agrees(lambda x: torch.cat([model(x), model(x)], 1), x, R / 2)
    agrees(lambda x: torch.cat([model(x), torch.zeros_like(x)], 1), x, R)  # dead channels


# -------------------------------------------------------------------------------- refusals

PIECEWISE_LINEAR = {
    "relu": lambda: network(3, activation=nn.ReLU),
    "leaky": lambda: network(3, activation=nn.LeakyReLU),
    "hardtanh": lambda: network(3, activation=nn.Hardtanh, min_val=-9.0, max_val=9.0),
    "prelu": lambda: network(3, activation=nn.PReLU),
    "affine": lambda: nn.Linear(3, 7).double(),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5)).double(),
    "abs": lambda: lambda x: torch.cat([x, x.abs(), x.amax(1, keepdim=True)], 1),
    "pool": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 11, 2), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten()
    ).double(),
}


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_piecewise_linear_maps_are_refused(name):
    with pytest.raises(ProbeError, match=r"zero almost everywhere(.|\n)*volume element instead"):
        scalar_curvature(PIECEWISE_LINEAR[name](), inputs(5, 3))


def test_the_refusal_names_the_kinked_modules_and_is_of_the_layer_alone():
    model, x = network(3, activation=nn.ReLU), inputs(5, 3)
    with pytest.raises(ProbeError, match=r"layer '1' vanish identically.*it contains ReLU"):
        scalar_curvature(model, x, layer="1")
    smooth_after = nn.Sequential(model, nn.Tanh())
    with pytest.raises(ProbeError, match="vanish identically"):
        scalar_curvature(smooth_after, x, layer="0.4")
    assert scalar_curvature(nn.Sequential(nn.Linear(3, 7), nn.Tanh()).double(), x).abs().min() > 0


def test_where_curvature_has_no_meaning():
    with pytest.raises(ProbeError, match=r"a curve has no intrinsic curvature, R = 0"):
        scalar_curvature(lambda x: torch.cat([x.sin(), x.cos()], 1), inputs(5, 1))
    with pytest.raises(ProbeError, match=r"2 features for 3 inputs(.|\n)*slice of at most 2"):
        scalar_curvature(nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double(), inputs(5, 3))
    bottleneck = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 7), nn.Tanh()).double()
    with pytest.raises(ProbeError, match=r"rank < 3 at every one of the 5 samples(.|\n)*layer='name'"):
        scalar_curvature(bottleneck, inputs(5, 3))


def test_inputs_that_do_not_fit():
    model = network(3)
    with shapes_unchecked():
        for x in (inputs(3)[:3], inputs(5, 3).long(), inputs(5, 3).half()):
            with pytest.raises(ProbeError, match=r"batch of inputs \[B, ...\]"):
                scalar_curvature(model, x)


def test_layers_that_do_not_fit():
    model, x = network(3), inputs(5, 3)
    with pytest.raises(ProbeError, match="no layer 'tanh'"):
        scalar_curvature(model, x, layer="tanh")
    with pytest.raises(ProbeError, match="names 5 layers, not one"):
        scalar_curvature(model, x, layer="*")
    with pytest.raises(ProbeError, match="has no number"):
        scalar_curvature(model, x, layer="1#b")
    with pytest.raises(ProbeError, match="plain callable"):
        scalar_curvature(lambda x: model(x), x, layer="1")
    unused = nn.ModuleDict({"used": model, "unused": nn.Linear(3, 3)})
    unused.forward = lambda x: unused["used"](x)
    with pytest.raises(ProbeError, match=r"'unused' was called 0 time\(s\)"):
        scalar_curvature(unused, x, layer="unused")
    assert not any(m._forward_hooks for m in unused.modules())


def test_outputs_that_are_no_feature_map():
    x = inputs(5, 3)
    with pytest.raises(ProbeError, match="a tuple with 2 floating-point tensors"):
        scalar_curvature(lambda x: (x.sin(), x.cos()), x)
    with pytest.raises(ProbeError, match="first axis is not the batch"):
        scalar_curvature(lambda x: x.sin().T.expand(7, 3, x.shape[0]), x)
    with pytest.raises(ProbeError, match="0 floating-point tensors"):
        scalar_curvature(lambda x: x.argmax(1), x)


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_operations_without_sound_second_derivatives():
    x = inputs(5, 4)
    with pytest.raises(ProbeError, match=r"second directional derivatives of the model's output(.|\n)*layer='name'"):
        scalar_curvature(lambda x: Opaque.apply(x).repeat(1, 2), x)
    for operation in (
        torch.det,
        torch.logdet,
        lambda A: torch.linalg.slogdet(A)[1],
        lambda A: torch.linalg.solve(A, A),
    ):

        def features(x, operation=operation):
            A = x.reshape(-1, 2, 2)
            return torch.cat([x.tanh(), operation(A @ A.mT + torch.eye(2).to(x)).reshape(len(x), -1)], 1)

        with pytest.raises(ProbeError, match=r"wrongly, without an error(.|\n)*cholesky"):
            scalar_curvature(features, x)


def test_the_sound_way_to_a_log_determinant():
    def features(x):
        A = x.reshape(-1, 2, 2)
        A = A @ A.mT + torch.eye(2).to(x)
        return torch.cat([x.tanh(), torch.linalg.qr(A).R.diagonal(dim1=1, dim2=2).abs().log().sum(1, True)], 1)

    x = 0.5 * inputs(3, 4)
    expected = [christoffel_curvature(induced(features), point) for point in x]
    torch.testing.assert_close(
        scalar_curvature(features, x), torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-8
    )


def test_null_vectors_are_refused_and_singular_values_are_not():
    def wide(x):
        one = torch.ones_like(x[:, 0])
        return torch.stack(
            [torch.stack([x[:, 0], x[:, 1], one], 1), torch.stack([x[:, 1] ** 2, x[:, 0], 2 * one], 1)], 1
        )

    x = inputs(5, 2)
    for null in (
        lambda A: torch.linalg.svd(A).Vh[:, -1],
        lambda A: torch.linalg.svd(A, full_matrices=True).Vh[:, -1],
        lambda A: torch.svd(A, False).V[..., -1],
        lambda A: torch.svd(A, some=False).V[..., -1],
    ):
        with pytest.raises(ProbeError, match=r"svd of a matrix that is not square(.|\n)*full_matrices=False"):
            scalar_curvature(lambda x, null=null: torch.cat([x, null(wide(x))], 1), x)
    values = [
        scalar_curvature(lambda x, S=S: torch.cat([x, S(wide(x))], 1), x)
        for S in (torch.linalg.svdvals, lambda A: torch.linalg.svd(A, False).S, lambda A: torch.svd(A).S)
    ]
    assert values[0].abs().max() > 1e-3
    for other in values[1:]:
        torch.testing.assert_close(other, values[0])
