"""What a plan finds out about samples, and what it must not be misled by."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.jacobian.layout import Layout


class Centred(nn.Module):
    def forward(self, x):
        h = torch.tanh(x)
        return h - 0.5 * h.mean(0)


@pytest.mark.parametrize("engine", ["fused", "functorch", "vjp"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_samples_that_are_all_alike_do_not_hide_that_they_are_coupled(engine, value):
    x = torch.full((4, 3), value)
    with pytest.raises(tgp.ProbeError, match="couples the samples"):
        tgp.measure(Centred(), x, layers="", engine=engine)
    volume = tgp.measure(nn.Tanh(), x, layers="", engine=engine, normalize=False)[""].log_volume
    assert torch.allclose(volume, 3 * (1 - x[:, 0].double().tanh().square()).log(), atol=1e-6)


def test_a_plan_holds_for_the_arguments_that_are_cut_with_the_samples():
    class Table(nn.Module):
        def forward(self, x, table):
            return x * (table[:, None] if len(table) == len(x) else table.sum())

    probe = tgp.GeometryProbe(Table(), layers="", wrt="x", normalize=False, memory_budget=300)
    x = torch.randn(6, 4)
    for rows, expected in ((5, [15.0] * 6), (6, [1.0, 2, 3, 4, 5, 6])):
        found = probe.measure((x, torch.arange(1.0, rows + 1)))[""]
        assert torch.allclose(found.log_volume, 4 * torch.tensor(expected).double().log(), atol=1e-5)


@pytest.mark.parametrize("engine", ["fused", "functorch", "vjp"])
def test_a_source_that_puts_out_no_number_has_no_derivative_there(engine):
    class Log(nn.Module):
        def forward(self, x):
            return x.log()

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.log, self.last = Log(), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(torch.nan_to_num(self.log(x)))

    x = torch.rand(3, 4) + 0.1
    x[0, 0] = -1
    found = tgp.measure(Masked(), x, layers="", source="log", engine=engine)[""]
    assert found.log_volume.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_what_a_list_says_of_each_sample_is_not_cut_off_from_it(kind):
    class Scaled(nn.Module):
        def forward(self, x, by):
            return torch.stack([row * float(factor) for row, factor in zip(x, by, strict=False)])

    by = [1, 1, 2, 3, 4, 5]
    expected = 2 * torch.tensor(by).double().log()
    for budget in (None, 300):
        given = (torch.randn(6, 2), kind(by))
        found = tgp.measure(Scaled(), given, layers="", normalize=False, memory_budget=budget)[""]
        assert torch.allclose(found.log_volume, expected, atol=1e-6)


def test_a_sample_that_is_no_number_leaves_the_engine_to_the_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 8, 8)
    x[0, 0, 0, 0] = torch.nan
    found = tgp.measure(model, x, layers=["3"], estimator=tgp.Subspace(k=2), engine="fused")["3"]
    assert found.log_volume.isfinite().tolist() == [False, True, True, True]


def test_convolutions_that_share_a_weight(monkeypatch):
    monkeypatch.setattr(Layout, "suits", lambda self, images: images.ndim == 4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1))
    model[2].weight = model[0].weight
    x = torch.randn(2, 3, 6, 6)
    top, exact = (tgp.measure(model, x, layers=["2"], estimator=e)["2"] for e in (tgp.TopK(k=3), tgp.Exact()))
    assert torch.allclose(top.singular_values, exact.singular_values[:, :3], rtol=1e-4)


def test_bfloat16_tangents_have_their_rank_in_chunks_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh())
    model[0].weight.data = torch.randn(64, 4) @ torch.randn(4, 64) / 8
    x = torch.randn(2, 64)
    for budget in (None, 8000, 1500):
        options = {"precision": "bf16", "memory_budget": budget, "engine": "fused"}
        found = tgp.measure(model, x, layers=["0"], estimator=tgp.Subspace(k=8), **options)["0"]
        assert found.log_volume.tolist() == [-torch.inf] * 2


class _Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.centred = self.wide = False

    def forward(self, x):
        h = torch.tanh(x)
        h = torch.cat([h, h.sin()], 1) if self.wide else h
        return h - 0.5 * h.mean(0) if self.centred else h


@pytest.mark.parametrize("buffer", [1, 2**19], ids=["small", "too large to keep a copy of"])
def test_a_model_that_becomes_another_one_between_two_measurements(buffer):
    model, x = _Switched(), torch.randn(4, 3)
    model.register_buffer("table", torch.zeros(buffer))
    with tgp.GeometryProbe(model, layers="") as probe:
        assert [probe.measure(x)[""].num_features for _ in range(3)] == [3] * 3
        model.wide = True
        assert probe.measure(x)[""].num_features == 6
        model.centred = True
        with pytest.raises(tgp.ProbeError, match="couples the samples"):
            probe.measure(x)


@pytest.mark.parametrize(
    ("megabytes", "on_cpu", "expected"), [(8, True, 2), (8, False, 64), (100, True, 1), (1, True, 16), (6, True, 2)]
)
def test_a_chunk_on_a_cpu_is_of_a_size_that_memory_is_at_ease_with(megabytes, on_cpu, expected):
    """Of 8 rows a sample, each of twice its bytes: 256 MiB in all, and never less than a sample."""
    with tgp.GeometryProbe(nn.Tanh(), layers="") as probe:
        probe.measure(torch.randn(2, 3))
        (plan,) = probe._kept.found.values()
    assert plan.on_cpu
    plan = replace(plan, row_bytes=megabytes << 20, budget=1 << 40, on_cpu=on_cpu)
    assert plan.samples_at_once(7, 64) == expected
    assert replace(plan, whole=True).samples_at_once(7, 64) == 64
