"""The algebra that every estimator owes its estimand, over random shapes and spectra."""

import math

import problems
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import torchgeom_probe as tgp

FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 10_000)
sizes = st.integers(9, 40)
#: What each estimator needs so that it is exact to its tolerance, or its own noise cancels.
ESTIMATORS = {
    "exact": lambda k: tgp.Exact(),
    "topk": lambda k: tgp.TopK(k=k, method="krylov", tol=1e-7),
    "topk dense": lambda k: tgp.TopK(k=k, method="dense"),
    "logdet": lambda k: tgp.LogDet(eps=1e-3, method="exact"),
    "trace": lambda k: tgp.Trace(probes=1000),
    "subspace": lambda k: tgp.Subspace(k=k),
}
names = st.sampled_from(sorted(ESTIMATORS))


def _volume(matrix, estimator, x=None):
    n, d = matrix.shape
    model = nn.Linear(d, n, bias=False, dtype=torch.float64)
    model.weight.data.copy_(matrix)
    x = torch.zeros(1, d, dtype=torch.float64) if x is None else x
    return tgp.measure(model, x, layers="", estimator=estimator, normalize=False)[""]


def _matrix(seed, n, d):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64), generator


def _close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.value, b.value, rtol=0, atol=tolerance)


@FEW
@given(seed=seeds, n=sizes, d=sizes, name=names, k=st.integers(1, 8))
def test_rotations_of_inputs_and_of_features_change_nothing(seed, n, d, name, k):
    matrix, generator = _matrix(seed, n, d)
    turned = problems.orthonormal(n, n, generator) @ matrix
    if name != "subspace":  # whose frame is where it is
        turned = turned @ problems.orthonormal(d, d, generator)
    _close(_volume(matrix, ESTIMATORS[name](k)), _volume(turned, ESTIMATORS[name](k)))


@FEW
@given(seed=seeds, n=sizes, d=sizes, k=st.integers(1, 8), scale=st.floats(1e-3, 1e3))
def test_scaling_adds_its_logarithm_for_every_value(seed, n, d, k, scale):
    matrix, _ = _matrix(seed, n, d)
    for name, power in (("exact", min(n, d)), ("topk", k), ("topk dense", k), ("trace", 1), ("subspace", k)):
        one, scaled = (_volume(m, ESTIMATORS[name](k)) for m in (matrix, scale * matrix))
        difference = (scaled.value - one.value).item()
        assert abs(difference - power * math.log(scale)) < 1e-5
    floor = tgp.LogDet(eps=1e-3, method="exact"), tgp.LogDet(eps=1e-3 * scale**2, method="exact")
    one, scaled = _volume(matrix, floor[0]), _volume(scale * matrix, floor[1])
    assert abs((scaled.log_det - one.log_det).item() - 2 * d * math.log(scale)) < 1e-5


@FEW
@given(seed=seeds, d=sizes)
def test_square_layers_add_under_composition(seed, d):
    first, generator = _matrix(seed, d, d)
    second = torch.randn(d, d, generator=generator, dtype=torch.float64)
    for estimator in (tgp.Exact(), tgp.TopK(k=d, method="krylov"), tgp.TopK(k=d)):
        parts = [_volume(m, estimator).value for m in (first, second)]
        together = _volume(second @ first, estimator).value
        torch.testing.assert_close(together, parts[0] + parts[1], rtol=0, atol=1e-5)


@FEW
@given(seed=seeds, n=sizes, d=sizes, name=names)
def test_permuting_hidden_units_changes_nothing(seed, n, d, name):
    first, generator = _matrix(seed, 20, d)
    second = torch.randn(n, 20, generator=generator, dtype=torch.float64) / 5
    order = torch.randperm(20, generator=generator)
    x = torch.randn(2, d, generator=generator, dtype=torch.float64)

    def model(a, b):
        net = nn.Sequential(nn.Linear(d, 20, bias=False), nn.Tanh(), nn.Linear(20, n, bias=False)).double()
        net[0].weight.data.copy_(a)
        net[2].weight.data.copy_(b)
        return tgp.measure(net, x, layers=["2"], estimator=ESTIMATORS[name](2))["2"]

    _close(model(first, second), model(first[order], second[:, order]))


@FEW
@given(seed=seeds, n=sizes, d=sizes, name=names)
def test_duplicated_samples_get_the_same(seed, n, d, name):
    generator = torch.Generator().manual_seed(seed)
    model = problems.mlp((d, n, n)).double()
    x = torch.randn(2, d, generator=generator, dtype=torch.float64)
    g = tgp.measure(model, x[[0, 1, 0, 0]], layers=["3"], estimator=ESTIMATORS[name](2))["3"]
    torch.testing.assert_close(g.value[[2, 3]], g.value[[0, 0]], rtol=1e-9, atol=1e-9, equal_nan=True)
    if "num_products" in g.extras:
        assert len(set(g.num_products[[0, 2, 3]].tolist())) == 1


@FEW
@given(seed=seeds, n=sizes, d=sizes)
def test_k_of_one_and_k_of_all(seed, n, d):
    matrix, _ = _matrix(seed, n, d)
    sigma = torch.linalg.svdvals(matrix)
    for method in ("krylov", "dense"):
        one = _volume(matrix, tgp.TopK(k=1, method=method, tol=1e-7))
        assert abs(one.value.item() - sigma[0].log().item()) < 1e-5
        everything = _volume(matrix, tgp.TopK(k=min(n, d), method=method))
        assert abs(everything.value.item() - sigma.log().sum().item()) < 1e-5
        _close(everything, _volume(matrix, tgp.Exact()))


@FEW
@given(seed=seeds, n=sizes, d=sizes, rank=st.integers(0, 8))
def test_dead_channels_and_lost_rank(seed, n, d, rank):
    """Rows and columns of zeros: the rank is what is left, the pseudo-volume that of the rest."""
    matrix, _ = _matrix(seed, n, d)
    matrix[rank:] = 0
    sigma = torch.linalg.svdvals(matrix[:rank]) if rank else torch.zeros(0, dtype=torch.float64)
    for estimator in (tgp.Exact(), tgp.TopK(k=9, method="krylov"), tgp.TopK(k=9)):
        g = _volume(matrix, estimator)
        assert g.rank.item() == rank
        assert g.value.isneginf().all()
        assert abs(g.log_pseudo_volume.item() - sigma.log().sum().item()) < 1e-5
    log_det = _volume(matrix, tgp.LogDet(eps=0.5, method="lanczos", steps=40, probes=4, tol=None))
    true = (sigma.square() + 0.5).log().sum().item() + (d - rank) * math.log(0.5)
    assert abs(log_det.log_det.item() - true) <= 6 * 2 * log_det.std_error.item() + 1e-6


@FEW
@given(seed=seeds, n=sizes, d=sizes)
def test_a_constant_layer_has_rank_zero(seed, n, d):
    class Constant(nn.Module):
        def forward(self, x):
            return 0 * x[:, :1].expand(-1, n) + 1

    model = nn.Sequential(Constant())
    x = torch.randn(2, d, generator=torch.Generator().manual_seed(seed))
    for estimator in (
        tgp.Exact(),
        tgp.TopK(k=2, method="krylov"),
        tgp.TopK(k=2),
        tgp.Trace(),
        tgp.Trace(method="hutchinson"),
    ):
        g = tgp.measure(model, x, layers=["0"], estimator=estimator)["0"]
        assert g.value.isneginf().all()
        assert g.rank is None if isinstance(estimator, tgp.Trace) else g.rank.tolist() == [0, 0]
    log_det = tgp.measure(model, x, layers=["0"], estimator=tgp.LogDet(eps=0.1, method="lanczos"))["0"].log_det
    torch.testing.assert_close(log_det, torch.full((2,), d * math.log(0.1), dtype=torch.float64))


@FEW
@given(seed=seeds, n=sizes, d=sizes)
def test_the_estimands_agree_where_they_should(seed, n, d):
    """½ log det(g + εI) → Σ log σ for small ε at full rank; tr g = Σ σ²; the spectrum's moments are the same
    numbers."""
    matrix, _ = _matrix(seed, max(n, d), d)
    exact = _volume(matrix, tgp.Exact())
    floor = _volume(matrix, tgp.LogDet(eps=1e-13, method="exact"))
    _close(floor, exact, 1e-4)
    trace = _volume(matrix, tgp.Trace(probes=1000))
    torch.testing.assert_close(trace.trace, exact.spectrum.trace()[0])
    ratio, rank = exact.spectrum.participation_ratio()[0].item(), exact.spectrum.effective_rank()[0].item()
    assert 1 <= ratio <= rank + 1e-9 <= d + 1e-6


def test_all_directions_that_are_not_orthonormal_say_nothing_of_the_spectrum_of_g():
    model, x = nn.Linear(3, 7), torch.randn(2, 3)
    axes = torch.eye(3)[:, None].expand(3, 2, 3)
    g = tgp.measure(model, x, layers="", estimator=tgp.Along(2 * axes), normalize=False)
    with pytest.raises(tgp.ProbeError, match="says nothing of the whole spectrum"):
        g.density("")
    with pytest.raises(tgp.ProbeError, match="does not bound σ_1"):
        _ = g[""].lipschitz_bounds
    whole = tgp.measure(model, x, layers="", estimator=tgp.Subspace(3), normalize=False)
    exact = tgp.measure(model, x, layers="", estimator=tgp.Exact(), normalize=False)
    torch.testing.assert_close(whole[""].lipschitz_bounds[1], exact[""].lipschitz_bounds[1])
    torch.testing.assert_close(whole.density("").trace()[0], exact.density("").trace()[0])
