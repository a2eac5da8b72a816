"""LogDet against the dense eigenvalues, against a naive quadrature, and its own standard error against the truth."""

import math

import oracle
import problems
import pytest
import torch
from annotations import shapes_unchecked
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.linalg.lanczos import rademacher


def _measured(model, x, layer="", **options):
    normalize = options.pop("normalize", False)
    return tgp.measure(model, x, layers=[layer], estimator=tgp.LogDet(**options), normalize=normalize)[layer]


def _true(sigma, eps, d):
    return (sigma.square() + eps).log().sum(-1) + (d - sigma.shape[-1]) * math.log(eps)


@pytest.mark.parametrize("kind", problems.FAST)
def test_within_three_standard_errors(kind):
    """20 seeded problems of each of the five kinds: 100 in all, of which `test_ninety_five_of_a_hundred` counts."""
    hits = _hits(kind, range(20))
    assert hits >= 18, hits


def _hits(kind, seeds):
    hits = 0
    for seed in seeds:
        model, layer, x = problems.problem(kind, seed=seed, n=48, d=64)
        sigma = oracle.singular_values(model, [layer], x)[layer][0]
        eps = 1e-2 * sigma[0].item() ** 2
        g = _measured(model, x, layer, eps=eps, method="lanczos", seed=seed)
        hits += abs(g.log_det.item() - _true(sigma, eps, g.num_inputs).item()) <= 3 * 2 * g.std_error.item()
    return hits


@pytest.mark.slow
def test_ninety_five_of_a_hundred():
    hits = {kind: _hits(kind, range(100, 120)) for kind in problems.KINDS}
    print(hits)
    assert sum(hits.values()) >= 95


@pytest.mark.parametrize(("n", "d"), [(40, 70), (70, 40), (40, 40)])
@pytest.mark.parametrize("normalize", [True, False])
def test_naive_twin_every_probe_is_the_dense_quadratic_form(n, d, normalize):
    """With all its steps the quadrature is zᵀ log(K + ε) z exactly, K the smaller of JJᵀ and JᵀJ."""
    model, _, x = problems.problem("gaussian", n=n, d=d, dtype=torch.float64)
    g = _measured(model, x, eps=0.3, probes=6, seed=5, method="lanczos", steps=40, normalize=normalize)
    jacobian = model.weight.detach() / (math.sqrt(n) if normalize else 1)
    gram = jacobian @ jacobian.T if n < d else jacobian.T @ jacobian
    values, vectors = torch.linalg.eigh(gram)
    probes = rademacher(6, min(n, d), seed=5)
    forms = ((probes @ vectors).square() * (values + 0.3).log()).sum(1)
    expected = forms.mean() + (d - min(n, d)) * math.log(0.3)
    assert abs(g.log_det.item() - expected.item()) < 0.11 * 2 * g.std_error.item()
    assert abs(2 * g.std_error.item() / (forms.std() / math.sqrt(6)).item() - 1) < 0.02
    torch.testing.assert_close(g.half_log_det, g.log_det / 2)


def test_error_falls_as_the_root_of_the_probes():
    model, _, x = problems.problem("gaussian", n=60, d=90)
    few, many = (_measured(model, x, eps=0.1, probes=p, method="lanczos").std_error.item() for p in (16, 256))
    assert 2.5 < few / many < 6.4  # 4 in expectation


def test_differences_are_sharper_than_values():
    model, layer, x = problems.problem("mlp", n=64, d=80)
    # Two points, close by: the same probes see nearly the same matrix.
    pair = torch.cat([x, x + 0.01 * torch.randn_like(x)])
    sigma = oracle.singular_values(model, [layer], pair)[layer]
    eps = 0.01 * sigma[0, 0].item() ** 2
    true = _true(sigma, eps, 80)
    values, differences = [], []
    for seed in range(8):
        g = _measured(model, pair, layer, eps=eps, method="lanczos", seed=seed)
        values.append((g.log_det[0] - true[0]).item())
        differences.append((g.log_det[1] - g.log_det[0] - true[1] + true[0]).item())
    spread = [torch.tensor(v).square().mean().sqrt().item() for v in (values, differences)]
    assert spread[1] < 0.25 * spread[0]


def test_probes_are_shared_by_layers_of_one_size_and_by_epochs():
    model = nn.Sequential(nn.Linear(90, 60), nn.Identity())
    probe = tgp.GeometryProbe(model, layers=["0", "1"], estimator=tgp.LogDet(eps=0.1, method="lanczos"))
    first, second = probe.measure(torch.zeros(1, 90)), probe.measure(torch.zeros(1, 90))
    assert torch.equal(first["0"].log_det, second["0"].log_det)
    torch.testing.assert_close(first["0"].log_det, first["1"].log_det, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("n", "d"), [(5, 7), (7, 5), (120, 200)])
def test_exact_where_it_is_cheaper(n, d):
    model, _, x = problems.problem("gaussian", n=n, d=d)
    g = _measured(model, x, eps=1e-4)
    sigma = torch.linalg.svdvals(model.weight.detach().double())
    assert "exact" in g.estimand
    assert g.std_error.tolist() == [0]
    torch.testing.assert_close(g.log_det[0], _true(sigma, 1e-4, d), rtol=0, atol=1e-3)
    assert g.num_products.item() == min(n, d)


def test_no_end_in_sight_goes_over_to_the_exact_value():
    model, _, x = problems.problem("harmonic", n=300, d=320)
    g = _measured(model, x, eps=1e-8)
    sigma = torch.linalg.svdvals(model.weight.detach().double())
    assert "exact" in g.estimand
    assert g.num_products.item() <= 600
    torch.testing.assert_close(g.log_det[0], _true(sigma, 1e-8, 320), rtol=1e-3, atol=0)


def test_the_first_term_is_exact():
    """(d − n) log ε: an input that nothing depends on adds log ε each."""
    model = problems.linear(torch.linspace(1, 2, 30), 30, 40)
    wide = nn.Linear(60, 30, bias=False)
    wide.weight.data.zero_()
    wide.weight.data[:, :40] = model.weight.data
    small, large = (_measured(m, torch.zeros(1, d), eps=0.01, method="lanczos") for m, d in ((model, 40), (wide, 60)))
    assert abs((large.log_det - small.log_det).item() - 20 * math.log(0.01)) < 1e-3


def test_deflation_helps_a_steep_spectrum_and_does_not_hurt_a_flat_one():
    errors = {}
    for kind in ("geometric", "gaussian"):
        model, _, x = problems.problem(kind, n=128, d=192)
        sigma = torch.linalg.svdvals(model.weight.detach().double())
        eps = 1e-3 * sigma[0].item() ** 2
        for deflate in (0, 12):
            g = _measured(model, x, eps=eps, deflate=deflate, method="lanczos")
            errors[kind, deflate] = g.std_error.item()
            assert abs(g.log_det.item() - _true(sigma, eps, 192).item()) <= 4 * 2 * g.std_error.item()
            assert ("deflated" in g.estimand) == (deflate > 0)
    assert errors["geometric", 12] < 0.2 * errors["geometric", 0]
    assert errors["gaussian", 12] < 1.5 * errors["gaussian", 0]


def test_tol_is_reached_by_more_probes_by_deflation_or_exactly():
    model, _, x = problems.problem("geometric", n=400, d=500)
    sigma = torch.linalg.svdvals(model.weight.detach().double())
    eps = 1e-2 * sigma[0].item() ** 2
    true = _true(sigma, eps, 500)
    hows = set()
    for tol in (20.0, 1.0, 1e-6):
        g = _measured(model, x, eps=eps, tol=tol)
        assert 2 * g.std_error.item() <= tol
        assert abs(g.log_det.item() - true.item()) <= 4 * tol + 1e-3
        hows.add(g.estimand)
    assert any("deflated" in how for how in hows)
    assert any("exact" in how for how in hows)
    flat, _, x = problems.problem("gaussian", n=600, d=700)
    one, several, gone = (_measured(flat, x, eps=0.5, tol=tol) for tol in (20.0, 3.0, 0.5))
    assert "10 probes" in one.estimand
    assert 10 < int(several.estimand.split(", ")[-1].split(" probes")[0]) <= 60
    assert 2 * several.std_error.item() <= 3.0
    assert "exact" in gone.estimand
    assert gone.num_products.item() < 800  # it was seen at once that the probes would cost more


def test_relative_floor_is_free_of_scale():
    model, layer, x = problems.problem("mlp", n=40, d=60)
    scaled = nn.Sequential(*model, problems.linear([10.0] * 40, 40, 40))
    one = _measured(model, x, layer, eps=1e-3, relative=True, method="exact")
    ten = _measured(scaled, x, "6", eps=1e-3, relative=True, method="exact")
    torch.testing.assert_close(ten.log_det - one.log_det, torch.full_like(one.log_det, 60 * 2 * math.log(10)))
    assert "1e-3 λ_1" in one.estimand or "0.001 λ_1" in one.estimand
    lanczos = _measured(model, x, layer, eps=1e-3, relative=True, method="lanczos", probes=64)
    assert (lanczos.log_det - one.log_det).abs().item() <= 4 * 2 * lanczos.std_error.item()


@pytest.mark.parametrize("kind", ["geometric", "harmonic"])
def test_a_floor_relative_to_the_largest_value_waits_for_that_value(kind):
    """(d − n) log ε is most of the value, so an ε from a Ritz value that is still rising would be nats off."""
    n, d = 200, 2000
    model = problems.linear(problems.spectrum(kind, n), n, d)
    sigma = torch.linalg.svdvals(model.weight.detach().double())
    true = _true(sigma, 0.1 * sigma[0].square(), d)
    hits = 0
    for seed in range(8):
        for options in ({"probes": 10}, {"probes": 4, "tol": 8.0}):
            x = torch.zeros(1, d)
            g = _measured(model, x, eps=0.1, relative=True, method="lanczos", seed=seed, **options)
            hits += abs(g.log_det.item() - true.item()) <= 3 * 2 * g.std_error.item()
    assert hits >= 15, hits


@pytest.mark.parametrize(
    ("kind", "eps", "hindsight"),
    [("geometric", 1e-4, 24), ("geometric", 1e-6, 40), ("harmonic", 1e-2, 12), ("harmonic", 1e-4, 104)],
)
def test_one_per_cent_at_about_the_products_of_a_search_with_hindsight(kind, eps, hindsight):
    """n = 512, d = 3072; at least four probes are drawn where the search knew that one or two are enough, hence the
    added ones."""
    model = problems.linear(problems.spectrum(kind, 512), 512, 3072)
    sigma = torch.linalg.svdvals(model.weight.detach().double())
    floor = eps * sigma[0].square()
    one_per_cent = 0.01 * (sigma.square() + floor).log().sum().abs().item()
    g = _measured(model, torch.zeros(1, 3072), eps=floor.item(), probes=4, tol=one_per_cent / 2)
    assert "exact" not in g.estimand
    assert abs(g.log_det.item() - _true(sigma, floor, 3072).item()) <= 1.5 * one_per_cent
    assert g.num_products.item() <= 2 * hindsight + 4 * 2 * 6, g.num_products


def test_few_probes_that_agree_do_not_end_the_search():
    """Under tol the spread that the spectrum predicts counts, not that of four probes alone."""
    model, _, x = problems.problem("gaussian", n=300, d=400)
    sigma = torch.linalg.svdvals(model.weight.detach().double())
    true = _true(sigma, 0.5, 400)
    for seed in range(12):
        g = _measured(model, x, eps=0.5, probes=4, tol=4.0, seed=seed, method="lanczos")
        assert abs(g.log_det.item() - true.item()) <= 4 * 4.0
        assert g.num_products.item() >= 2 * 4 * 2


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_zero_jacobian_and_diverged_sample(method):
    model = nn.Linear(60, 40)
    model.weight.data.zero_()
    g = _measured(model, torch.randn(2, 60), eps=0.1, method=method)
    torch.testing.assert_close(g.log_det, torch.full((2,), 60 * math.log(0.1), dtype=torch.float64))
    relative = _measured(model, torch.randn(2, 60), eps=0.1, relative=True, method=method)
    assert relative.value.eq(-torch.inf).all()  # ε, a share of λ_1, is 0 too
    model, layer, x = problems.problem("mlp", n=40, d=60, batch=2)
    x[0] = torch.nan
    g = _measured(model, x, layer, eps=0.1, method=method)
    assert g.value.isnan().tolist() == [True, False]
    assert g.rank is None, "it sees no rank"


def test_density_of_a_lanczos_run():
    model, layer, x = problems.problem("mlp", n=100, d=140, batch=2)
    report = tgp.measure(
        model, x, layers=[layer], estimator=tgp.LogDet(eps=1e-3, method="lanczos", probes=64), normalize=False
    )
    density = report.density(layer)
    values = oracle.singular_values(model, [layer], x)[layer].square()
    share = values / values.sum(1, keepdim=True)
    expected = {
        "trace": values.sum(1),
        "participation_ratio": values.sum(1).square() / values.square().sum(1),
        "effective_rank": (-(torch.xlogy(share, share)).sum(1)).exp(),
    }
    for name, truth in expected.items():
        estimate, error = getattr(density, name)()
        assert (error > 0).all()
        assert ((estimate - truth).abs() < 4 * error).all(), name
    other, error = density.log_det(0.05)
    truth = (values + 0.05).log().sum(1) + 40 * math.log(0.05)
    assert ((other - truth).abs() < 4 * error + 0.01 * truth.abs()).all()
    torch.testing.assert_close(density.weights.sum(2), torch.full((2, 64), 140.0, dtype=torch.float64))
    counts = density.counts_above(torch.tensor([-1.0, 1e9]))
    torch.testing.assert_close(counts, torch.tensor([[140.0, 0.0]] * 2, dtype=torch.float64))
    points = torch.linspace(-6, 3, 400)
    smooth = density.per_decade(points, width=0.2)
    nonzero = (smooth.sum(1) * (points[1] - points[0])).tolist()
    assert all(abs(count - 100) < 5 for count in nonzero)


def test_density_of_exact_and_of_chunks():
    model, layer, x = problems.problem("mlp", n=9, d=7, batch=5)
    probe = tgp.GeometryProbe(model, layers=[layer], estimator=tgp.Exact(), memory_budget=20_000)
    density = probe.measure(x).density(layer)
    values = (oracle.singular_values(model, [layer], x)[layer] / 3).square()
    trace, error = density.trace()
    assert density.exact
    torch.testing.assert_close(trace, values.sum(1), rtol=1e-5, atol=0)
    assert error.tolist() == [0] * 5
    small = tgp.GeometryProbe(
        model, layers=[layer], estimator=tgp.LogDet(eps=0.1, method="lanczos", probes=4), memory_budget=100_000
    )
    assert small.measure(x).density(layer).nodes.shape[:2] == (5, 4)


def test_density_is_refused_where_nothing_is_known_of_the_spectrum():
    report = tgp.measure(nn.Linear(20, 8), torch.zeros(1, 20), layers="", estimator=tgp.Subspace(k=2))
    with pytest.raises(ProbeError, match="says nothing of the whole spectrum"):
        report.density("")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "ε is a positive number"),
        ({"probes": 3}, "at least 4 probes"),
        ({"steps": 0}, "at least one step"),
        ({"tol": -1.0}, "a positive number of nats"),
        ({"deflate": -1}, "a number of directions"),
        ({"method": "slq"}, "is unknown"),
    ],
)
def test_refused_arguments(options, message):
    with shapes_unchecked(), pytest.raises(ProbeError, match=message):
        tgp.LogDet(**options)


def test_refused_deflation():
    with pytest.raises(ProbeError, match="has 8 singular values in all"):
        _measured(nn.Linear(20, 8), torch.zeros(1, 20), deflate=8)


def test_deflation_keeps_to_the_price_of_the_dense_jacobian():
    model, x = problems.linear(torch.linspace(1, 0.99, 300), 300, 320), torch.zeros(1, 320)
    probe = tgp.GeometryProbe(model, layers="", estimator=tgp.LogDet(eps=1e-3, deflate=40))
    assert probe.measure(x)[""].num_products.item() <= probe.cost(x).products[""].most + 16
