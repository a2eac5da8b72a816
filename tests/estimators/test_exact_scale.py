"""Exact inside a memory budget: streamed rows give what whole rows give."""

import math

import oracle
import problems
import pytest
import torch
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.linalg.gram import inner_products


@pytest.mark.parametrize("engine", ["fused", "vjp"])
@pytest.mark.parametrize(("n", "d"), [(24, 300), (300, 24)])
def test_a_budget_smaller_than_the_jacobian(n, d, engine):
    model, x = nn.Sequential(nn.Linear(d, n), nn.Tanh()), torch.randn(3, d)
    true = oracle.singular_values(model, ["1"], x)["1"]
    options = {"layers": ["1"], "estimator": tgp.Exact(), "normalize": False, "engine": engine}
    tight = tgp.measure(model, x, memory_budget=n * d * 4 // 3, **options)["1"]
    torch.testing.assert_close(tight.singular_values, true, rtol=1e-5, atol=1e-6)
    assert (tight.rank == min(n, d)).all()


def test_float64_in_a_small_budget_says_what_it_resolves():
    model = problems.linear([1.0, 1e-3, 1e-9], 3, 90, dtype=torch.float64)
    options = {"layers": "", "estimator": tgp.Exact(), "normalize": False, "engine": "vjp"}
    x = torch.zeros(1, 90, dtype=torch.float64)
    roomy, tight = (tgp.measure(model, x, **options)[""], tgp.measure(model, x, memory_budget=1500, **options)[""])
    assert roomy.rank.item() == 3
    assert tight.rank.item() == 2
    assert tight.rank_tolerance > roomy.rank_tolerance
    torch.testing.assert_close(tight.log_pseudo_volume.item(), math.log(1e-3), rtol=0, atol=1e-6)


def test_a_budget_without_room_for_two_rows_is_refused():
    with pytest.raises(ProbeError, match="too little for two of its rows"):
        tgp.measure(nn.Linear(1000, 1000), torch.zeros(1, 1000), layers="", estimator=tgp.Exact(), memory_budget=4000)
    with pytest.raises(ProbeError, match="too little for two of its rows"):
        tgp.measure(nn.Linear(1000, 3), torch.zeros(1, 1000), layers="", estimator=tgp.TopK(k=2), memory_budget=4000)


def _pooled_features(stride):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 7, stride, 3), nn.GELU(), nn.Conv2d(16, 32, 3, stride, 1), nn.GELU()),
        *(nn.Conv2d(32, 512, 3, stride, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("side", [32, 224])
def test_512_features_of_images(side):
    """√det JJᵀ for n = 512 at d = 3072 and at d = 150528, with room for the Jacobian and for a fifth of it."""
    model, x = _pooled_features(2 if side == 32 else 4), torch.randn(1, 3, side, side)
    whole = 512 * 3 * side * side * 4
    reports = {
        share: tgp.measure(
            model, x, layers=["7"], estimator=tgp.Exact(), memory_budget=int(share * whole) + (32 << 20)
        )["7"]
        for share in (2.0, 0.2)
    }
    jacobian = torch.func.jacrev(lambda z: model(z[None])[0], chunk_size=64)(x[0]).flatten(1)
    gram = inner_products(jacobian[:, None], jacobian[:, None])[0]
    true = torch.linalg.eigvalsh(gram.detach()).clamp_min(0).sqrt().flip(0) / math.sqrt(512)
    for g in reports.values():
        assert (g.num_features, g.num_inputs) == (512, 3 * side * side)
        assert "JJᵀ" in g.estimand
        assert (g.log_volume - true.log().sum()).abs().item() < 1e-2
        torch.testing.assert_close(g.singular_values[0], true, rtol=1e-4, atol=0)
