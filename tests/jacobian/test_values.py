"""Values: every engine, estimator and chunking against a float64 Jacobian by reverse mode and its SVD."""

import json
import math
from pathlib import Path

import models
import oracle
import pytest
import torch
from torch import nn
from unseen import Notes

import torchgeom_probe as tgp

ENGINES = ("fused", "functorch", "vjp")
# float64: relative to each σ; float32: relative to σ_max.  Measured: 3e-14 and 2e-6.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def _close(sigma, expected, dtype):
    scale = expected if dtype == torch.float64 else expected[:, :1]
    error = ((sigma - expected).abs() / scale).max().item()
    assert error <= TOLERANCE[dtype], f"error {error:.1e}"


_oracles = {}


def _expected(case, model, layers, x, v):
    """The oracle once per model: every test draws the same weights and inputs from the same seed."""
    weights = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    if case not in _oracles:
        _oracles[case] = weights, x, oracle.singular_values(model, layers, x, directions=v)
    known, at, sigma = _oracles[case]
    assert torch.equal(known, weights)
    assert torch.equal(at, x)
    return sigma


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ["mlp", "cifar_resnet", "vit", pytest.param("timm_resnet18", marks=pytest.mark.slow)])
def test_every_layer_at_once_on_given_directions(case, engine, dtype):
    factory, shape, layers = models.CASES[case]
    model, x, v = factory(), torch.randn(2, *shape), torch.randn(4, 2, *shape)
    report = tgp.measure(model.to(dtype), x.to(dtype), layers=layers, directions=v, engine=engine, normalize=False)
    expected = _expected(case, model, layers, x, v)
    assert list(report) == layers
    for layer in layers:
        assert report[layer].engine == engine
        _close(report[layer].singular_values[:, : expected[layer].shape[1]], expected[layer], dtype)


# The slow engine, which holds all d tangents of all layers, on the small model alone.
EXACT_CASES = [("mlp", e) for e in (*ENGINES, "auto")] + [
    (c, e) for c in ("cifar_resnet", "vit") for e in ("fused", "vjp", "auto")
]


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("case", "engine"), EXACT_CASES)
def test_exact(case, engine, dtype):
    factory, shape, layers = models.CASES[case]
    model, x = factory().to(dtype), torch.randn(2, *shape, dtype=dtype)
    report = tgp.measure(model, x, layers=layers, estimator=tgp.Exact(), engine=engine, normalize=False)
    for layer, expected in oracle.singular_values(model, layers, x).items():
        g = report[layer]
        n, d = g.num_features, math.prod(shape)
        assert (g.num_inputs, g.singular_values.shape[1]) == (d, min(n, d))
        assert ("JJᵀ" in g.estimand) == (n < d)
        keep = expected > 1e-6 * expected[:, :1]  # a pooled stage has directions that reach it only through rounding
        error = ((g.singular_values - expected).abs() / expected[:, :1] * keep).max()
        assert error <= (1e-10 if dtype == torch.float64 else 1e-4)
        if dtype == torch.float64:
            full = keep.all(1)
            assert torch.allclose(g.value[full], expected.log().sum(1)[full], rtol=0, atol=1e-8)


def test_normalised_is_divided_by_root_n():
    model, x = models.mlp().double(), torch.randn(3, 5, dtype=torch.float64)
    plain = tgp.measure(model, x, layers=["1"], estimator=tgp.Exact(), normalize=False)["1"]
    scaled = tgp.measure(model, x, layers=["1"], estimator=tgp.Exact())["1"]
    assert torch.allclose(
        plain.value - scaled.value, torch.tensor(5 * 0.5 * math.log(13), dtype=torch.float64), atol=1e-12
    )
    assert torch.allclose(scaled.log10_volume, scaled.value / math.log(10))


def test_golden_shallow_networks():
    golden = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text())
    acts = {"sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(), "gelu": nn.GELU()}
    seen = 0
    for entry in golden["shallow"]:
        if entry["phi"] not in acts:
            continue
        d = entry["d"]
        j, mu = torch.arange(7.0, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)[None]
        w = torch.sin(1 + 3 * j + 7 * mu + (2 * j * mu if entry["weights"] == "B" else 0))
        layer = nn.Linear(d, 7).double()
        layer.weight.data.copy_(w)
        layer.bias.data.copy_(torch.cos(2 + 5 * j[:, 0]))
        model = nn.Sequential(layer, acts[entry["phi"]])
        x = torch.tensor([entry["x"]], dtype=torch.float64)
        g = tgp.measure(model, x, layers="1", estimator=tgp.Exact())["1"]
        assert math.isclose(g.value.exp().item(), entry["sqrt_det_g"], rel_tol=1e-12)
        seen += 1
    assert seen >= 12


@pytest.mark.parametrize(
    ("estimator", "case"),
    [
        (tgp.Exact(), "mlp"),
        (tgp.Subspace(k=5, seed=3), "mlp"),
        (tgp.Subspace(k=5, seed=3), "vit"),
        pytest.param(tgp.Subspace(k=5, seed=3), "cifar_resnet", marks=pytest.mark.slow),
        pytest.param(tgp.Exact(), "cifar_resnet", marks=pytest.mark.slow),
        pytest.param(tgp.Exact(), "vit", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_results_do_not_depend_on_the_chunking(case, estimator):
    factory, shape, layers = models.CASES[case]
    if case == "vit" and isinstance(estimator, tgp.Exact):
        layers = layers[:1]
    model, x = factory().double(), torch.randn(3, *shape, dtype=torch.float64)
    probe = tgp.GeometryProbe(model, layers=layers, estimator=estimator)
    whole = probe.measure(x)
    (plan,) = probe._kept.found.values()
    largest_jacobian = 8 * (5 if isinstance(estimator, tgp.Subspace) else plan.num_inputs) * max(plan.features.values())
    # From one sample at a time down to two or three rows at a time, where the directions are split as well.
    for rows in (60, 12, 6, 2):
        budget = max(int(2 * plan.row_bytes * rows), largest_jacobian)
        chunked = tgp.GeometryProbe(model, layers=layers, estimator=estimator, memory_budget=budget).measure(x)
        for layer in layers:
            a, b = whole[layer], chunked[layer]
            assert torch.allclose(
                a.singular_values, b.singular_values, rtol=1e-12, atol=1e-12 * a.singular_values.max().item()
            )
            assert torch.equal(a.rank, b.rank)


def test_directions_are_really_split():
    """The smallest budget of the chunking test takes several passes per sample, or that test would prove nothing."""
    model, x = models.cifar_resnet(), torch.randn(1, 3, 8, 8)
    passes = Notes()
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    probe = tgp.GeometryProbe(model, layers=["layer4.1"], estimator=tgp.Subspace(k=6))
    probe.measure(x)
    once = len(passes.read())
    (plan,) = probe._kept.found.values()
    tgp.measure(model, x, layers=["layer4.1"], estimator=tgp.Subspace(k=6), memory_budget=2 * plan.row_bytes * 3)
    assert once == 4 + 1  # the plan's four and the dual pass
    assert len(passes.read()) - once == 4 + 3  # 6 directions, two at a time beside the primal


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize(("n", "d"), [(11, 5), (211, 64)])
def test_condition_number_1e5(n, d, dtype, tolerance, engine):
    u = torch.linalg.qr(torch.randn(n, d, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    sigma = torch.logspace(0, -5, d, dtype=torch.float64)
    layer = nn.Linear(d, n, bias=False).to(dtype)
    layer.weight.data.copy_((u * sigma) @ v.T)
    x = torch.randn(2, d, dtype=dtype)
    for estimator in (tgp.Exact(), tgp.Subspace(k=d)):
        g = tgp.measure(layer, x, layers="", estimator=estimator, normalize=False, engine=engine)[""]
        assert (g.value - sigma.log().sum()).abs().max() <= tolerance
        assert g.rank.tolist() == [d, d]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_singular_metric_is_minus_infinity_with_its_rank(dtype):
    bottleneck = nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 17), nn.Tanh(), nn.Linear(17, 23)).to(dtype)
    x = torch.randn(5, 7, dtype=dtype)
    report = tgp.measure(bottleneck, x, layers=["1", "2", "3"], estimator=tgp.Exact(), normalize=False)
    sigma = oracle.singular_values(bottleneck, ["3"], x)["3"]
    for g in report.values():
        assert g.value.eq(-torch.inf).all()
        assert g.rank.tolist() == [3] * 5
    expected = sigma[:, :3].log().sum(1)
    assert torch.allclose(report["3"].log_pseudo_volume, expected, atol=1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("case", ["cifar_resnet", "timm_resnet18", "vit"])
def test_the_rank_behind_a_bottleneck_is_that_of_the_bottleneck_in_float32(case):
    """The threshold, 16 eps, stands clear of the rounding that a deep network leaves in the directions that do not
    reach it."""
    factory, shape, layers = models.CASES[case]
    model = nn.Sequential(
        nn.Linear(20, 3), nn.Linear(3, math.prod(shape)), nn.Tanh(), nn.Unflatten(1, shape), factory()
    )
    report = tgp.measure(
        model, torch.randn(4, 20), layers=[f"4.{layer}" for layer in layers[1:]], estimator=tgp.Subspace(k=7)
    )
    for g in report.values():
        if g.num_features >= 7:
            assert g.rank.tolist() == [3] * 4
            assert (g.singular_values[:, 3] <= 8 * torch.finfo(torch.float32).eps * g.singular_values[:, 0]).all()


def test_zero_dead_and_constant_layers():
    class Dead(nn.Module):
        def forward(self, x):
            return torch.relu(x - 100)

    g = tgp.measure(Dead(), torch.randn(3, 5), layers="", estimator=tgp.Exact())[""]
    assert g.value.eq(-torch.inf).all()
    assert g.rank.eq(0).all()
    assert g.log_pseudo_volume.eq(0).all()
    assert not g.singular_values.isnan().any()


def test_a_diverged_model_is_nan_with_rank_minus_one_and_leaves_the_other_samples_alone():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    x = torch.randn(4, 3)
    x[2] = torch.nan
    for dtype in (torch.float32, torch.float64):
        g = tgp.measure(model.to(dtype), x.to(dtype), layers="1", estimator=tgp.Exact())["1"]
        assert g.value.isnan().tolist() == [False, False, True, False]
        assert g.rank.tolist() == [3, 3, -1, 3]
        assert g.statistics()["nonfinite"] == 1


def test_random_frames_are_shared_by_batches_layers_and_calls():
    model, x = models.mlp().double(), torch.randn(6, 5, dtype=torch.float64)
    probe = tgp.GeometryProbe(model, layers="*", estimator=tgp.Subspace(k=2, seed=7))
    whole, again, part = probe.measure(x), probe.measure(x), probe.measure(x[4:])
    assert torch.equal(whole["3"].value, again["3"].value)
    assert torch.allclose(whole["3"].value[4:], part["3"].value, atol=1e-13)
    other = tgp.measure(model, x, layers="*", estimator=tgp.Subspace(k=2, seed=8))
    assert not torch.allclose(whole["3"].value, other["3"].value)


@pytest.mark.slow
def test_random_frame_is_haar_in_its_moments():
    """E det VᵀgV = e_k(λ)/C(d, k) for λ = 1..5 (golden: 3.0, 8.5, 22.5, 54.8, 120): 4 standard errors of 100 frames."""
    golden = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text())["random_subspace"]
    layer = nn.Linear(5, 5, bias=False).double()
    layer.weight.data.copy_(torch.diag(torch.tensor(golden["lambda"], dtype=torch.float64).sqrt()))
    x, options = torch.zeros(1, 5).double(), {"layers": "", "normalize": False}
    for k in (1, 2, 3, 5):
        frames = [tgp.measure(layer, x, estimator=tgp.Subspace(k, seed), **options)[""] for seed in range(100)]
        dets = torch.cat([g.value for g in frames]).mul(2).exp()
        error = max(4 * dets.std().item() / 10, 1e-9)
        assert abs(dets.mean().item() - golden["E_det_k1..5"][k - 1]) <= error


def test_module_called_twice_and_shared_modules():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.Tanh()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 7)

        def forward(self, x):
            return self.act(self.b(self.act(self.a(x))))

    model, x = Twice().double(), torch.randn(4, 3, dtype=torch.float64)
    for engine in ENGINES:
        report = tgp.measure(model, x, layers=["act"], estimator=tgp.Exact(), engine=engine)
        assert list(report) == ["act", "act#1"]
        assert [g.num_features for g in report.values()] == [5, 7]
        whole = tgp.measure(model, x, layers="", estimator=tgp.Exact(), engine=engine)[""]
        assert torch.allclose(whole.value, report["act#1"].value, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_in_place_relu_after_a_hooked_layer(engine):
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(inplace=True), nn.Linear(7, 5)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    report = tgp.measure(model, x, layers=["0", "1"], estimator=tgp.Exact(), engine=engine, normalize=False)
    expected = torch.linalg.svdvals(model[0].weight.detach()).log().sum()
    assert torch.allclose(report["0"].value, expected.expand(4), atol=1e-12)
    assert torch.equal(report["1"].rank, (model[0](x) > 0).sum(1).clamp_max(3))


@pytest.mark.parametrize("engine", ENGINES)
def test_tuple_and_dict_outputs_are_joined(engine):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 5)

        def forward(self, x):
            return {"first": self.a(x), "rest": (self.b(x).view(-1, 5, 1), x.argmax(1))}

    model, x = Two().double(), torch.randn(4, 3, dtype=torch.float64)
    g = tgp.measure(model, x, layers="", estimator=tgp.Exact(), normalize=False, engine=engine)[""]
    both = torch.cat([model.a.weight, model.b.weight]).detach()
    assert g.num_features == 7
    assert torch.allclose(g.singular_values, torch.linalg.svdvals(both).expand(4, 3), atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_transform_per_layer_and_for_all(engine):
    model, x = models.cifar_resnet().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    v = torch.randn(3, 2, 3, 8, 8, dtype=torch.float64)

    def pool(out):
        return out.mean((-2, -1))

    by_layer = tgp.measure(
        model, x, layers=["layer1", "layer2"], transform={"layer1": pool}, directions=v, engine=engine, normalize=False
    )
    assert [g.num_features for g in by_layer.values()] == [8, 12 * 4 * 4]
    for_all = tgp.measure(
        model, x, layers=["layer1", "layer2"], transform=pool, directions=v, engine=engine, normalize=False
    )
    expected = oracle.singular_values(model, ["layer1", "layer2"], x, directions=v, transform=pool)
    assert torch.allclose(by_layer["layer1"].singular_values, expected["layer1"], rtol=1e-10)
    assert torch.allclose(for_all["layer2"].singular_values, expected["layer2"], rtol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_source_pulls_back_to_embeddings(engine):
    model = models.Tokens().double().eval()
    ids = torch.randint(0, 19, (3, 5))
    report = tgp.measure(
        model, ids, layers=["block", "head"], source="embed", estimator=tgp.Exact(), engine=engine, normalize=False
    )
    embedded = model.embed(ids).detach()

    def rest(h):
        out = model.block(h.unsqueeze(0))
        return out.flatten(), model.head(out.mean(1)).flatten()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for b in range(3):
            block, head = torch.func.jacrev(rest)(embedded[b])
            for layer, jacobian in (("block", block), ("head", head)):
                expected = torch.linalg.svdvals(jacobian.flatten(1))
                assert torch.allclose(report[layer].singular_values[b], expected, rtol=1e-8, atol=1e-12)
    assert report["block"].num_inputs == 5 * 8


def test_source_as_a_module_with_keyword_arguments_and_one_block_to_the_next():
    model = models.Tokens().double()
    ids, mask = torch.randint(0, 19, (3, 5)), torch.zeros(3, 5, dtype=torch.bool)
    a = tgp.measure(model, {"ids": ids, "mask": mask}, layers="head", source=model.embed, estimator=tgp.Exact())
    b = tgp.measure(model, (ids, mask), layers="head", source="embed", estimator=tgp.Exact())
    assert torch.equal(a["head"].value, b["head"].value)
    chain = models.mlp().double()
    x = torch.randn(4, 5, dtype=torch.float64)
    step = tgp.measure(chain, x, layers="4", source="3", estimator=tgp.Exact(), normalize=False)["4"]
    assert torch.allclose(step.singular_values, torch.linalg.svdvals(chain[4].weight.detach()).expand(4, 3), atol=1e-12)


def test_channels_last_bf16_and_parametrisations():
    model, x = models.cifar_resnet(), torch.randn(2, 3, 8, 8)
    v = torch.randn(3, 2, 3, 8, 8)
    plain = tgp.measure(model, x, layers=["layer3"], directions=v)["layer3"]
    last = tgp.measure(
        model.to(memory_format=torch.channels_last),
        x.to(memory_format=torch.channels_last),
        layers=["layer3"],
        directions=v,
    )["layer3"]
    assert torch.allclose(plain.value, last.value, atol=1e-4)
    half = tgp.measure(model.bfloat16(), x.bfloat16(), layers=["layer3"], directions=v)["layer3"]
    assert half.singular_values.dtype == torch.float64
    assert (half.value - plain.value).abs().max() < 0.2

    wrapped = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 7)),
        nn.Tanh(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(7, 5)),
    ).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    sigma = tgp.measure(wrapped, x, layers="", estimator=tgp.Exact(), normalize=False)[""].singular_values
    wrapped.eval()
    jacobian = torch.stack([torch.func.jacrev(wrapped)(s) for s in x])
    assert torch.allclose(sigma, torch.linalg.svdvals(jacobian), rtol=1e-10)


def test_one_sample_one_feature_and_one_direction():
    model = nn.Sequential(nn.Linear(3, 1), nn.Tanh()).double()
    x = torch.randn(1, 3, dtype=torch.float64)
    g = tgp.measure(model, x, layers="1", estimator=tgp.Subspace(k=1))["1"]
    assert g.singular_values.shape == (1, 1)
    exact = tgp.measure(model, x, layers="1", estimator=tgp.Exact(), normalize=False)["1"]
    slope = 1 - model(x).item() ** 2
    assert math.isclose(exact.value.item(), math.log(slope * model[0].weight.norm().item()), rel_tol=1e-12)


def test_algebra_of_the_volume():
    """Rotating input or features changes nothing; scaling the input by c adds d·log c; square layers add."""
    d = 5
    first, second = nn.Linear(d, d).double(), nn.Linear(d, d).double()
    x = torch.randn(3, d, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q

    def log_volume(*modules, at=x):
        return tgp.measure(nn.Sequential(*modules), at, layers="", estimator=tgp.Exact(), normalize=False)[""].value

    def linear(matrix):
        layer = nn.Linear(d, d, bias=False).double()
        layer.weight.data.copy_(matrix)
        return layer

    base = log_volume(first, nn.Tanh(), second)
    assert torch.allclose(log_volume(linear(q), first, nn.Tanh(), second, at=x @ q), base, atol=1e-11)
    assert torch.allclose(log_volume(first, nn.Tanh(), second, linear(q)), base, atol=1e-11)
    assert torch.allclose(
        log_volume(linear(3 * torch.eye(d)), first, nn.Tanh(), second, at=x / 3), base + d * math.log(3), atol=1e-11
    )
    inner = nn.Sequential(first, nn.Tanh())
    assert torch.allclose(log_volume(*inner) + log_volume(second, at=inner(x).detach()), base, atol=1e-11)


def test_an_initialisation_by_the_first_batch_is_refused_and_undone():
    class ActNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.register_buffer("done", torch.tensor(False))

        def forward(self, x):
            if not self.done:
                self.scale.data = 1 / x.std(0)
                self.done = torch.tensor(True)
            return x * self.scale

    model, x = ActNorm(), torch.randn(5, 3)
    probe = tgp.GeometryProbe(model, layers="", estimator=tgp.Subspace(k=3), normalize=False)
    for _ in range(2):  # a plan that was kept would let the dual pass assign
        with pytest.raises(tgp.ProbeError, match=r"assigns to \.data .*scale.*\n.*model\(x\)"):
            probe.measure(x)
        assert torch.equal(model.scale, torch.ones(3))
    model(x)
    expected = model.scale.detach().abs().log().sum().double()
    assert torch.allclose(probe.measure(x)[""].log_volume, expected.expand(5), atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_of_one_number_a_sample(engine):
    """[B] and not [B, 1], as a critic's score or a flow's log-determinant: log|Jv| of its gradient."""

    class Score(nn.Module):
        def forward(self, x):
            return x.square().sum(1)

    x = torch.randn(5, 3, dtype=torch.float64)
    g = tgp.measure(Score(), x, layers="", estimator=tgp.Exact(), normalize=False, engine=engine)[""]
    assert torch.allclose(g.singular_values[:, 0], 2 * x.norm(dim=1))


def test_numbers_drawn_in_the_order_of_memory_are_the_plain_models():
    """Behind attention images lie with their channels last, which randn_like then fills first."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(3, 8), nn.GroupNorm(2, 8)

        def mean(self, x):
            tokens = torch.tanh(self.a(x.flatten(2).transpose(1, 2)))
            return self.norm(tokens.transpose(1, 2).reshape(-1, 8, 5, 5))

        def forward(self, x):
            h = self.mean(x)
            return h * torch.randn_like(h)

    model, x = Noisy().double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    probe = tgp.GeometryProbe(model, layers="", estimator=tgp.Exact(), normalize=False)
    torch.manual_seed(1)
    h = model.mean(x)
    assert not h.is_contiguous()
    torch.manual_seed(1)
    noise = torch.randn_like(h)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda s: model.mean(s[None])[0]))(x) * noise[..., None, None, None]
    torch.manual_seed(1)
    g = probe.measure(x)[""]
    expected = torch.linalg.svdvals(jacobian.flatten(1, 3).flatten(2))
    assert torch.allclose(g.singular_values[:, :50], expected[:, :50], rtol=1e-8)
    checked = probe.check(x)
    assert checked.ok, str(checked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_a_check_trusts_what_no_direction_moves(dtype, seed):
    """x itself changes nothing that is normalised: as a direction, drawn from the seed that x was drawn from; and all
    directions but one change nothing where what is normalised is the sum."""
    x = torch.randn(3, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))

    class Normalised(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    for function in (
        lambda x: nn.functional.rms_norm(x, (4,)),
        lambda x: nn.functional.normalize(x, dim=1),
        lambda x: x.softmax(1).sum(1, keepdim=True).expand(3, 2),
    ):
        probe = tgp.GeometryProbe(Normalised(function), layers="", estimator=tgp.Exact())
        checked = probe.check(x)
        assert checked.ok, str(checked)


@pytest.mark.parametrize(
    "estimator", ["exact", "subspace:1", "topk:1", "logdet:1e-9", "trace", tgp.Directions(1)], ids=str
)
@pytest.mark.parametrize("engine", ["auto", "functorch", "vjp"])
def test_a_sample_that_is_one_number(estimator, engine):
    class Curve(nn.Module):
        def forward(self, x):
            return torch.stack([x.sin(), 2 * x.cos(), x**2], 1)

    x = torch.randn(3, dtype=torch.float64)
    expected = (x.cos() ** 2 + 4 * x.sin() ** 2 + 4 * x**2).log() / 2
    probe = tgp.GeometryProbe(Curve(), layers="", estimator=estimator, engine=engine, normalize=False)
    torch.testing.assert_close(probe.measure(x)[""].value, expected, rtol=1e-6, atol=1e-6)
    assert probe.check(x).ok


@pytest.mark.parametrize("engine", ["auto", "functorch", "vjp"])
@pytest.mark.parametrize("op", ["nll_loss", "cov"])
def test_a_weight_that_depends_on_x_is_refused_in_every_engine(engine, op):
    class Weighted(nn.Module):
        def forward(self, x):
            if op == "cov":
                return torch.stack([torch.cov(torch.outer(r, r.sin()), aweights=r.exp()) for r in x])
            classes = torch.arange(4)
            losses = [nn.functional.nll_loss(torch.outer(r, r), classes, weight=r.exp(), reduction="none") for r in x]
            return torch.stack(losses) + x

    with pytest.raises(tgp.ProbeError, match=f"drops the derivative of '{op}'"):
        tgp.measure(Weighted(), torch.randn(3, 4), layers="", estimator="exact", engine=engine)


class _OfItsInput(torch.autograd.Function):
    """Its derivatives are made of what it takes."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)
        ctx.save_for_backward(*inputs)


class _WrongAside(_OfItsInput):
    """x/|x| whose derivative is right along x, where it is 0, and nowhere else."""

    @staticmethod
    def forward(x):
        return x / x.norm(dim=1, keepdim=True)

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return tangent - x * (x * tangent).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient - x * (x * gradient).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)


@pytest.mark.parametrize("seed", range(3))
def test_a_check_does_not_look_along_x_alone(seed):
    class Aside(nn.Module):
        def forward(self, x):
            return _WrongAside.apply(x)

    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert not tgp.GeometryProbe(Aside(), layers="").check(x, seed=seed).ok


class _HalfMore(_OfItsInput):
    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def jvp(ctx, tangent):
        return ctx.saved_tensors[0].cos() * tangent

    @staticmethod
    def backward(ctx, gradient):
        return 1.5 * ctx.saved_tensors[0].cos() * gradient


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_check_sees_a_wrong_backward_at_small_inputs(size, dtype):
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 5, dtype=dtype)

        def forward(self, x):
            return _HalfMore.apply(self.a(x))

    torch.manual_seed(0)
    assert not tgp.GeometryProbe(Biased(), layers="").check(size * torch.randn(3, 4, dtype=dtype)).ok


class _NoDouble(_HalfMore):
    @staticmethod
    def backward(ctx, gradient):
        if gradient.dtype == torch.float64:
            raise ValueError("no double")
        return 1.5 * ctx.saved_tensors[0].cos() * gradient


def test_a_wrong_backward_is_seen_where_float64_cannot_run_it():
    class Sine(nn.Module):
        def forward(self, x):
            return _NoDouble.apply(x)

    checked = tgp.GeometryProbe(Sine(), layers="").check(torch.randn(3, 4))
    assert not checked.ok
    assert checked.adjoint_errors[""] > checked.tolerance
