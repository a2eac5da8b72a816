"""probe.cost(x): what it promises is what a measurement does."""

import models
import problems
import pytest
import torch
from torch import nn
from unseen import Notes

import torchgeom_probe as tgp
from torchgeom_probe.dual import DualTensor

ESTIMATORS = [
    tgp.Subspace(k=3),
    tgp.Subspace(k=2, frames=4),
    tgp.Exact(),
    tgp.TopK(k=2),
    tgp.TopK(k=2, method="dense"),
    tgp.LogDet(eps=1e-2),
    tgp.LogDet(eps=1e-2, method="exact"),
    tgp.Trace(probes=4, method="hutchinson"),
    tgp.Trace(probes=4),
]


def _mlp():
    return nn.Sequential(nn.Linear(41, 53), nn.Tanh(), nn.Linear(53, 47), nn.Tanh())


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("layers", [["1", "3"], ["3"]], ids=str)
def test_the_products_are_those_of_the_measurement(estimator, layers):
    probe = tgp.GeometryProbe(_mlp(), layers=layers, estimator=estimator)
    x = torch.randn(3, 41)
    forecast, report = probe.cost(x), probe.measure(x)
    for entry, work in forecast.products.items():
        assert work.pushes + work.pulls <= work.most
        products = report[entry].extras.get("num_products")
        if products is not None:
            assert products.max() <= work.most + 16  # a round in hand is still finished
            if work.most == work.pushes + work.pulls:
                assert products.max() == work.most
        elif not work.shared:
            assert report[entry].engine == "vjp"
            assert work.pulls == report[entry].num_features


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_the_rows_are_those_that_pass_through_the_model(k, chunks):
    model, x = _mlp(), torch.randn(10, 41)
    rows = Notes()

    def counted(module, args, output):
        if isinstance(output, DualTensor):
            rows.append(output.buffer.shape[:2].numel())

    model[0].register_forward_hook(counted)
    options = {"layers": ["3"], "estimator": tgp.Subspace(k=k)}
    _, plan = tgp.GeometryProbe(model, **options)._planned(x)
    budget = -(-10 // chunks) * (1 + k) * 2 * plan.row_bytes
    probe = tgp.GeometryProbe(model, **options, memory_budget=budget)
    forecast = probe.cost(x)
    assert not rows.read()  # nothing is measured
    probe.measure(x)
    assert sum(rows.read()) == forecast.rows == 10 * (1 + k)
    assert len(rows.read()) == -(-forecast.samples // forecast.samples_at_once) == chunks
    assert forecast.bytes <= forecast.budget


def test_forward_or_reverse_mode_is_said_and_done():
    narrow = nn.Sequential(nn.Linear(41, 53), nn.Tanh(), nn.Linear(53, 5))
    x = torch.randn(3, 41)
    probe = tgp.GeometryProbe(narrow, layers=["2"], estimator=tgp.Exact())
    assert "5 features in all, fewer than d = 41 directions: a pullback a feature" in str(probe.cost(x))
    assert probe.measure(x)["2"].engine == "vjp"
    probe = tgp.GeometryProbe(narrow, layers=["1", "2"], estimator=tgp.Exact())
    assert "all d = 41 directions, one dual pass for all layers" in str(probe.cost(x))
    assert {g.engine for g in probe.measure(x).values()} == {"fused"}


def test_in_words():
    factory, shape, layers = models.CASES["cifar_resnet"]
    model, x = factory(), torch.randn(6, *shape)
    text = str(tgp.GeometryProbe(model, layers=layers, estimator=tgp.TopK(k=2)).cost(x))
    assert "6 samples of d = 192" in text
    assert "block Krylov" in text
    assert "the whole J is about as cheap" in text
    assert "fc (n = 7)" in text
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("kind", problems.FAST)
def test_an_iteration_stays_within_its_bound_and_near_what_is_expected(kind, k):
    model, layer, x = problems.problem(kind, n=300, d=320)
    least = 4 if k == 1 else 4 * (2 * -(-k // 4) - 1)
    for options in ({"tol": 0.1}, {"tol": 1e-9}, {"max_products": 1}, {"max_products": 60}, {"tol": 1e-9, "block": 9}):
        estimator = tgp.TopK(k, **{"method": "krylov" if "max_products" not in options else "auto", **options})
        probe = tgp.GeometryProbe(model, layers=[layer], estimator=estimator)
        work, products = probe.cost(x).products[layer], probe.measure(x)[layer].num_products.max().item()
        assert least <= products <= work.most, options
        if options == {"tol": 0.1}:
            assert (work.pushes + work.pulls) / 3 <= products <= 3 * (work.pushes + work.pulls)


def test_directions_keep_to_their_bound():
    model, x = problems.linear(torch.linspace(1, 0.999, 270), 270, 290, dtype=torch.float64), torch.zeros(1, 290)
    probe = tgp.GeometryProbe(model, layers="", estimator=tgp.Directions(k=4, tol=1e-12))
    assert 270 < probe.measure(x.double())[""].num_products.max() <= probe.cost(x.double()).products[""].most
    for limit in (1, 60):  # values that lie so close together that it takes all of J
        probe = tgp.GeometryProbe(model, layers="", estimator=tgp.Directions(k=4, max_products=limit))
        found = probe.measure(x.double())[""]
        assert found.num_products.max() <= probe.cost(x.double()).products[""].most <= max(limit, 16) + 14
        assert bool((found.direction_error == 1).all())
