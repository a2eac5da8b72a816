"""compile=True: the same numbers, one compilation a shape, weights that it follows, and a plain word where it cannot."""

import math
import types
import warnings

import models
import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import torchgeom_probe as tgp
from torchgeom_probe import ProbeError
from torchgeom_probe.dual import DualTensor


def _small():
    """A convolution, its norm, a branch and a head: what the fused rules do, in a graph that compiles in seconds."""
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.GELU(), nn.Flatten(), nn.Linear(5 * 4 * 5, 7)
    )
    model[1].running_mean.normal_()
    return model


def _compiled(probe):
    return probe._compiled._passes


def _assert_same(found, expected, tolerance):
    for layer in expected:
        assert found[layer].engine == "compiled"
        assert torch.allclose(found[layer].log_volume, expected[layer].log_volume, atol=tolerance)


def test_compiled_equals_eager_and_follows_the_optimizer():
    model, x = _small(), torch.randn(2, 3, 6, 7)
    layers, estimator = ["1", "4"], tgp.Subspace(k=3)
    probe = tgp.GeometryProbe(model, layers=layers, estimator=estimator, compile=True)
    first = probe.measure(x)
    assert {g.engine for g in first.values()} == {"fused"}  # the pass that checks the model
    second = probe.measure(x)
    _assert_same(second, first, 1e-4)
    assert len(_compiled(probe)) == 1

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    model(x).square().sum().backward()
    optimizer.step()
    moved = probe.measure(x)
    _assert_same(moved, tgp.measure(model, x, layers=layers, estimator=estimator), 1e-4)
    assert (moved["4"].log_volume - second["4"].log_volume).abs().min() > 1e-2
    assert len(_compiled(probe)) == 1  # the weights and the running statistics are inputs of the graph
    assert model.training
    assert not model._forward_hooks
    assert not model[1]._forward_hooks

    # What a trace takes as constant is part of the key.
    model[1].eps = 3.0
    _assert_same(probe.measure(x), tgp.measure(model, x, layers=layers, estimator=estimator), 1e-4)
    assert len(_compiled(probe)) == 2


def test_a_trace_holds_attention_once_however_many_heads():
    """In eager mode scores are made a piece at a time, so that they stay in cache; unrolled, those loops take minutes to compile."""
    q = torch.randn(5, 4, 6, 130, 8)  # [1 + k, B, heads, length, width]

    def attended(buffer):
        dual = DualTensor(buffer)
        return torch.nn.functional.scaled_dot_product_attention(dual, dual.sin(), dual.cos()).buffer

    graph = make_fx(attended)(q)
    products = [n for n in graph.graph.nodes if "bmm" in str(n.target)]
    assert len(products) == 6  # scores, outputs, and four of their derivatives
    assert torch.allclose(graph(q), attended(q), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", models.CASES)
def test_compiled_models_equal_eager_ones(case, dtype):
    factory, shape, layers = models.CASES[case]
    model, x = factory().to(dtype), torch.randn(2, *shape, dtype=dtype)
    estimator = tgp.Exact() if case == "mlp" else tgp.Subspace(k=3)
    engine = "fused" if case == "mlp" else "auto"
    probe = tgp.GeometryProbe(model, layers=layers, estimator=estimator, engine=engine, compile=True)
    eager = probe.measure(x)
    _assert_same(probe.measure(x), eager, 1e-3 if dtype == torch.float32 else 1e-9)


def test_a_last_smaller_chunk_is_no_reason_to_compile():
    model, x = nn.Sequential(nn.Linear(4, 9), nn.Tanh()), torch.randn(7, 4)
    plain = tgp.measure(model, x, layers="1", estimator=tgp.Subspace(k=2))
    probe = tgp.GeometryProbe(model, layers="1", estimator=tgp.Subspace(k=2), compile=True)
    probe.measure(x)
    plan = next(iter(probe._plans.values()))
    object.__setattr__(plan, "budget", int(2.0 * plan.row_bytes * 3 * 3))  # three samples at once
    assert plan.samples_at_once(2, 7) == 3
    report = probe.measure(x)
    assert len(_compiled(probe)) == 1
    assert torch.allclose(report["1"].log_volume, plain["1"].log_volume, atol=1e-4)


def test_a_monitor_compiles_once_for_a_training(monkeypatch):
    import torch._inductor

    calls = []
    monkeypatch.setattr(
        torch._inductor, "compile", lambda graph, inputs, options=None: calls.append(1) or graph
    )
    model, x = nn.Sequential(nn.Linear(4, 9), nn.Tanh()), torch.randn(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = tgp.GeometryProbe(model, layers=["1"], estimator=tgp.Subspace(k=2))
    with tgp.Monitor(
        model, x, layers=["1"], every=1, estimator=tgp.Subspace(k=2), compile=True, on_error="raise"
    ).follow(optimizer) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            report, expected = monitor.history[-1][1]["1"], reference.measure(x)["1"]
            assert torch.allclose(report.log_volume, expected.log_volume.cpu(), atol=1e-4)
    assert report.engine == "compiled"
    assert len(calls) == 1


class Counts(nn.Module):
    """An attribute that is another at every measurement."""

    def __init__(self):
        super().__init__()
        self.inner, self.steps = nn.Linear(4, 5), 0

    def forward(self, x):
        return self.inner(x)


def test_an_attribute_that_always_changes_does_not_compile_for_ever(monkeypatch):
    import torch._inductor

    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options=None: graph)
    model, x = Counts(), torch.randn(2, 4)
    probe = tgp.GeometryProbe(model, layers="", estimator=tgp.Subspace(k=2), compile=True)
    first = probe.measure(x)

    def measured():
        model.steps += 1
        return probe.measure(x)[""].log_volume

    for _ in range(4):
        assert torch.allclose(measured(), first[""].log_volume)
    with pytest.warns(UserWarning, match="attributes of the model's modules change"):
        fifth = measured()
    assert torch.allclose(fifth, first[""].log_volume)
    assert torch.allclose(measured(), first[""].log_volume)  # without a second warning
    assert len(_compiled(probe)) == 4


class Noisy(nn.Module):
    def forward(self, x):
        return x * (1 + torch.rand_like(x))


class Branches(nn.Module):
    def forward(self, x):
        return x.sin() if (x.sum() > 0).item() else x.cos()


@pytest.mark.parametrize(("model", "why"), [(Noisy(), "random numbers"), (Branches(), "eagerly: .*")])
def test_what_cannot_be_compiled_runs_eagerly_and_says_so_once(model, why):
    probe = tgp.GeometryProbe(model, layers="", estimator=tgp.Subspace(k=2), compile=True)
    x = torch.randn(3, 4)
    first = probe.measure(x)
    with pytest.warns(UserWarning, match=f"compile=True has no effect here.*{why}"):
        second = probe.measure(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third = probe.measure(x)
    assert first[""].engine == second[""].engine == third[""].engine == "fused"
    assert torch.equal(second[""].log_volume, third[""].log_volume)


def test_a_wrong_result_of_the_compiler_is_not_used(monkeypatch):
    import torch._inductor

    monkeypatch.setattr(
        torch._inductor, "compile", lambda graph, inputs, options=None: lambda *a: [2 * m for m in graph(*a)]
    )
    probe = tgp.GeometryProbe(nn.Linear(3, 5), layers="", estimator=tgp.Subspace(k=2), compile=True)
    x = torch.randn(2, 3)
    first = probe.measure(x)
    with pytest.warns(UserWarning, match="another result than the eager one"):
        second = probe.measure(x)
    assert torch.equal(first[""].log_volume, second[""].log_volume)


@pytest.mark.parametrize("arguments", [{"estimator": tgp.TopK(2)}, {"engine": "vjp"}])
def test_compile_is_refused_where_there_is_no_dual_pass_to_compile(arguments):
    with pytest.raises(ProbeError, match="compile=True compiles the dual pass"):
        tgp.GeometryProbe(nn.Linear(3, 5), layers="", compile=True, **arguments)


@pytest.mark.cuda
def test_under_cuda_graphs_the_next_call_leaves_earlier_results_alone():
    model, x = _small().cuda(), torch.randn(2, 3, 6, 7).cuda()
    probe = tgp.GeometryProbe(model, layers=["1", "4"], estimator=tgp.Subspace(k=3), compile=True)
    eager = probe.measure(x)
    reports = [probe.measure(x) for _ in range(4)]
    probe.measure(2 * x)
    for report in reports:
        _assert_same(report, eager, 1e-3)


class Scales(nn.Module):
    """Numbers in every place where a trace would take them for constant."""

    kind = 1.0

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.array, self.nested = np.ones(1), {"a": [{"b": 1.0}]}
        self.other = types.SimpleNamespace(value=1.0)
        self.call = _Times()

    def forward(self, x, mask=None, bias=None):
        h = self.inner(x) * self.kind * float(self.array[0]) * self.nested["a"][0]["b"] * self.other.value
        h = self.call(h)
        h = h if mask is None else h * mask
        return h if bias is None else h.sin() + bias


class _Times:
    __slots__ = ("by",)

    def __init__(self):
        self.by = 1.0

    def __call__(self, h):
        return h * self.by


CHANGES = {
    "class attribute": lambda m: setattr(Scales, "kind", 3.0),
    "array in place": lambda m: m.array.fill(3.0),
    "nested": lambda m: m.nested["a"][0].update(b=3.0),
    "object": lambda m: setattr(m.other, "value", 3.0),
    "slots of a callable": lambda m: setattr(m.call, "by", 3.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_what_a_trace_takes_as_constant_is_seen(change, monkeypatch):
    import torch._inductor

    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options=None: graph)
    monkeypatch.setattr(Scales, "kind", 1.0)
    model, x = Scales(), torch.randn(2, 4)
    probe = tgp.GeometryProbe(model, layers="", estimator=tgp.Subspace(k=2), compile=True)
    probe.measure(x)
    before = probe.measure(x)[""]
    assert probe.measure(x)[""].engine == "compiled"
    assert len(_compiled(probe)) == 1
    change(model)
    after = probe.measure(x)[""]
    assert torch.allclose(after.log_volume, before.log_volume + 2 * math.log(3.0), atol=1e-4)


def test_arguments_of_the_same_shape_under_another_name(monkeypatch):
    import torch._inductor

    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options=None: graph)
    model, x, third = Scales(), torch.randn(2, 4), torch.arange(10).reshape(2, 5)
    probe = tgp.GeometryProbe(model, layers="", estimator=tgp.Subspace(k=2), compile=True)
    for arguments in ({"x": x, "mask": third}, {"x": x, "bias": third}, {"bias": third, "x": x}):
        probe.measure(arguments)
        found = probe.measure(arguments)[""]
        expected = tgp.measure(model, arguments, layers="", estimator=tgp.Subspace(k=2))[""]
        assert torch.allclose(found.log_volume, expected.log_volume, atol=1e-4)


def test_weights_tied_otherwise(monkeypatch):
    import torch._inductor

    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options=None: graph)
    model, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), torch.randn(2, 4)
    first = [layer.weight for layer in model]
    probe = tgp.GeometryProbe(model, layers="", estimator=tgp.Subspace(k=2), compile=True)
    for tied, loose in ((1, 2), (2, 1)):
        model[tied].weight, model[loose].weight = first[0], first[1]
        probe.measure(x)
        found = probe.measure(x)[""]
        expected = tgp.measure(model, x, layers="", estimator=tgp.Subspace(k=2))[""]
        assert torch.allclose(found.log_volume, expected.log_volume, atol=1e-4)
