"""Trace against ‖J‖²_F; σ_1, its bound, and what Subspace's frames estimate."""

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


def _measured(model, x, layer="", *, normalize=False, **options):
    return tgp.measure(model, x, layers=[layer], estimator=tgp.Trace(**options), normalize=normalize)[layer]


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
@pytest.mark.parametrize("kind", problems.KINDS)
def test_within_four_standard_errors(kind, method):
    model, layer, x = problems.problem(kind, n=64, d=96, batch=2)
    true = oracle.singular_values(model, [layer], x)[layer].square().sum(1)
    hits = 0
    for seed in range(5):
        g = _measured(model, x, layer, method=method, probes=12, seed=seed)
        hits += ((g.trace - true).abs() <= 4 * g.trace_std_error).sum().item()
        assert torch.equal(g.value, (g.trace / g.num_inputs).log() / 2)
        torch.testing.assert_close(g.std_error, g.trace_std_error / (2 * g.trace))
    assert hits >= 9


def test_naive_twin_hutchinson():
    model, layer, x = problems.problem("mlp", n=30, d=50, dtype=torch.float64, batch=2)
    jacobian = oracle.jacobians(model, [layer], x)[layer]
    forms = torch.stack([(jacobian @ z).square().sum(1) for z in rademacher(7, 50, seed=2)])
    g = _measured(model, x, layer, method="hutchinson", probes=7, seed=2)
    torch.testing.assert_close(g.trace, forms.mean(0))
    torch.testing.assert_close(g.trace_std_error, forms.std(0) / math.sqrt(7))
    normalized = _measured(model, x, layer, method="hutchinson", probes=7, seed=2, normalize=True)
    torch.testing.assert_close(normalized.trace, g.trace / 30)


def test_naive_twin_hutch_plus_plus():
    model, _, x = problems.problem("harmonic", n=40, d=60, dtype=torch.float64)
    metric = model.weight.detach().T @ model.weight.detach()
    signs = rademacher(12, 60, seed=3).T
    span = torch.linalg.qr(metric @ signs[:, :6]).Q
    rest = signs[:, 6:] - span @ (span.T @ signs[:, 6:])
    expected = torch.trace(span.T @ metric @ span) + (rest * (metric @ rest)).sum(0).mean()
    g = _measured(model, x, method="hutch++", probes=6, seed=3)
    torch.testing.assert_close(g.trace[0], expected)
    assert g.num_products.tolist() == [24]


def test_hutch_plus_plus_is_sharper_on_a_steep_spectrum():
    model, _, x = problems.problem("geometric", n=128, d=192)
    plain, better = (_measured(model, x, method=m, probes=p) for m, p in (("hutchinson", 48), ("hutch++", 12)))
    assert plain.num_products.item() == better.num_products.item() == 48
    assert better.trace_std_error.item() < 1e-2 * plain.trace_std_error.item()


def test_error_falls_as_the_root_of_the_probes():
    model, _, x = problems.problem("gaussian", n=128, d=600)
    few, many = (_measured(model, x, method="hutchinson", probes=p).trace_std_error.item() for p in (32, 512))
    assert 2.8 < few / many < 5.7


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_all_directions_where_they_are_fewer_than_the_probes(method):
    model, x = nn.Linear(5, 9), torch.zeros(3, 5)
    g = _measured(model, x, method=method, probes=8)
    torch.testing.assert_close(g.trace, model.weight.detach().double().square().sum().expand(3))
    assert g.trace_std_error.tolist() == [0, 0, 0]
    assert "all d directions" in g.estimand


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_zero_jacobian(method):
    model = nn.Linear(60, 40)
    model.weight.data.zero_()
    g = _measured(model, torch.randn(2, 60), method=method)
    assert g.trace.tolist() == [0, 0]
    assert g.value.isneginf().all()
    assert g.rank is None, "it sees no rank"
    assert g.std_error.tolist() == [0, 0]


def test_several_layers_in_one_pass_and_a_report_on_paper(tmp_path):
    model, _, x = problems.problem("resnet", batch=2)
    report = tgp.measure(model, x, layers=["1", "4"], estimator=tgp.Trace(method="hutchinson", probes=4))
    assert "root mean square" in report.summary()
    assert "trace_std_error" in report.to_csv(tmp_path / "t.csv").read_text()
    assert report["4"].engine == "fused"


def test_refused_arguments():
    with shapes_unchecked(), pytest.raises(ProbeError, match="is unknown"):
        tgp.Trace(method="xtrace")
    with pytest.raises(ProbeError, match="at least 2 probes"):
        tgp.Trace(probes=1)


def test_local_lipschitz_constant_and_its_bound():
    model, layer, x = problems.problem("mlp", n=100, d=150, batch=3)
    sigma = oracle.singular_values(model, [layer], x)[layer][:, 0]
    report = tgp.measure(model, x, layers=[layer], estimator=tgp.TopK(k=1, tol=5e-3, method="krylov"), normalize=False)
    lower, upper = report[layer].lipschitz_bounds
    assert (lower <= sigma * (1 + 1e-5)).all()
    assert (sigma <= upper).all()
    assert (upper / lower < 1.01).all()
    exact = tgp.measure(model, x, layers=[layer], estimator=tgp.Exact(), normalize=False)[layer]
    torch.testing.assert_close(exact.lipschitz_bounds[0], sigma, rtol=1e-5, atol=0)
    assert torch.equal(*exact.lipschitz_bounds)
    subspace = tgp.measure(model, x, layers=[layer], estimator=tgp.Subspace(k=2))[layer]
    with pytest.raises(ProbeError, match=r"estimator=TopK\(k=1\)"):
        _ = subspace.lipschitz_bounds


def _elementary(values, k):
    """e_k by the recursion over eigenvalues."""
    polynomial = [1.0] + [0.0] * k
    for value in values.tolist():
        for j in range(k, 0, -1):
            polynomial[j] += value * polynomial[j - 1]
    return polynomial[k]


@pytest.mark.parametrize(("n", "d", "k"), [(20, 9, 3), (6, 9, 4), pytest.param(5, 5, 5, marks=pytest.mark.slow)])
def test_frames_estimate_the_mean_of_determinants(n, d, k):
    """½ log(e_k(λ)/C(d, k)), also where n < d; with k = d every frame gives √det g."""
    covered = 0
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Linear(d, n, bias=False)
        values = torch.linalg.svdvals(model.weight.detach().double()).square()
        expected = math.log(_elementary(values, k) / math.comb(d, k)) / 2
        g = tgp.measure(
            model, torch.zeros(1, d), layers="", estimator=tgp.Subspace(k=k, frames=32, seed=seed), normalize=False
        )[""]
        low, high = (g.interval[0] + torch.tensor([-1e-4, 1e-4])).tolist()
        covered += low <= expected <= high
        assert abs(g.value.item() - expected) < 5 * g.std_error.item() + 1e-4
    assert covered >= 16  # 19 in expectation


def test_one_frame_is_what_it_was():
    model, layer, x = problems.problem("mlp", n=20, d=30, batch=2)
    one = tgp.measure(model, x, layers=[layer], estimator=tgp.Subspace(k=3, seed=4))[layer]
    many = tgp.measure(model, x, layers=[layer], estimator=tgp.Subspace(k=3, seed=4, frames=8))[layer]
    assert torch.equal(one.singular_values, many.singular_values)
    assert "interval" not in one.extras
    assert many.interval.shape == (2, 2)
    assert "8 random orthonormal 3-frames" in many.estimand


def test_frames_of_a_rank_below_k_and_of_a_diverged_sample():
    model = problems.linear([1.0, 1.0], 10, 12)
    g = tgp.measure(model, torch.zeros(1, 12), layers="", estimator=tgp.Subspace(k=4, frames=8))[""]
    assert g.value.isneginf().all()
    assert g.std_error.tolist() == [0]
    model, layer, x = problems.problem("mlp", n=20, d=30, batch=2)
    x[0] = torch.nan
    g = tgp.measure(model, x, layers=[layer], estimator=tgp.Subspace(k=3, frames=8))[layer]
    assert g.value.isnan().tolist() == [True, False]


def test_frames_are_refused_where_they_have_no_interval():
    for frames in (0, 2, 3):
        with pytest.raises(ProbeError, match="at least 4"):
            tgp.Subspace(frames=frames)


def test_the_default_is_one_pass_for_all_layers():
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20))
    cost = tgp.GeometryProbe(model, layers=["0", "2"], estimator="trace").cost(torch.randn(3, 40))
    assert all(count.shared and not count.pulls for count in cost.products.values())
    assert cost.rows == 3 * (1 + 16)
