"""What a user passes as x: which tensors the metric lives on, and which are cut with the samples."""

import math

import pytest
import torch
from torch import nn

import torchgeom_probe as tgp

F64 = torch.float64


def sigma_of(function, *points):
    """Singular values of the Jacobian of a function of one sample's tensors, side by side."""
    jacobians = torch.func.jacrev(function, argnums=tuple(range(len(points))))(*points)
    whole = torch.cat([j.reshape(-1, p.numel()) for j, p in zip(jacobians, points, strict=True)], dim=1)
    return torch.linalg.svdvals(whole)


class Denoiser(nn.Module):
    """Two floating inputs, as a diffusion network has them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5).double()

    def forward(self, x, t, scale=1.0):
        return (self.linear(x.flatten(1)) * (t[:, None] + 2)).tanh() * scale


X, T = torch.randn(7, 2, 3, dtype=F64), torch.rand(7, dtype=F64)


@pytest.mark.parametrize("wrt", ["x", 0, ["x"]])
@pytest.mark.parametrize("engine", ["fused", "functorch", "vjp"])
def test_one_of_several_inputs(wrt, engine):
    model = Denoiser()
    g = tgp.measure(model, (X, T), layers="", wrt=wrt, estimator="exact", normalize=False, engine=engine)[""]
    assert g.num_inputs == 6
    for i in range(7):
        expected = sigma_of(lambda x, i=i: model(x[None], T[i : i + 1])[0], X[i])
        assert torch.allclose(g.singular_values[i], expected, atol=1e-12)


@pytest.mark.parametrize("x", [(X, T), {"x": X, "t": T, "scale": 1.0}], ids=["tuple", "dict"])
@pytest.mark.parametrize("engine", ["fused", "functorch", "vjp"])
def test_several_inputs_are_one_space(x, engine):
    model = Denoiser()
    options = {"layers": "", "wrt": ("x", "t"), "estimator": "exact", "normalize": False}
    g = tgp.measure(model, x, **options, engine=engine)[""]
    assert g.num_inputs == 7
    for i in range(7):
        expected = sigma_of(lambda x, t: model(x[None], t[None])[0], X[i], T[i])
        assert torch.allclose(g.singular_values[i], expected, atol=1e-12)


def test_wrt_takes_part_in_chunks_copies_and_krylov_spaces():
    model = nn.ModuleDict({"d": Denoiser()})["d"]
    options = {"layers": "", "wrt": ("t", "x"), "normalize": False}
    whole = tgp.measure(model, (X, T), **options, estimator=tgp.TopK(k=2, method="krylov"))[""]
    chunked = tgp.measure(model, (X, T), **options, estimator="exact", memory_budget=4000)[""]
    assert torch.allclose(whole.singular_values, chunked.singular_values[:, :2], rtol=1e-3)


def test_it_asks_which_and_names_them():
    with pytest.raises(tgp.ProbeError, match=r"2 floating tensors.*: x \[7, 2, 3\], t \[7\].\n.*wrt='x'"):
        tgp.measure(Denoiser(), (X, T), layers="")
    with pytest.raises(tgp.ProbeError, match=r"wrt='y' names no floating tensor of x; the floating ones are 'x', 't'"):
        tgp.measure(Denoiser(), (X, T), layers="", wrt="y")


class Dictionary(nn.Module):
    def forward(self, batch, *more):
        return batch["pixels"].sin() * batch["mask"]


def test_a_dict_as_one_argument_is_looked_into():
    x = torch.randn(5, 3, dtype=F64)
    mask = torch.ones(5, 3, dtype=torch.long)
    g = tgp.measure(Dictionary(), ({"pixels": x, "mask": mask},), layers="", estimator="exact", normalize=False)[""]
    assert torch.allclose(g.value, x.cos().abs().log().sum(1), atol=1e-12)
    both = ({"pixels": x, "mask": mask.double()},)
    with pytest.raises(tgp.ProbeError, match=r"batch.pixels \[5, 3\], batch.mask \[5, 3\].\n.*wrt='batch.pixels'"):
        tgp.measure(Dictionary(), both, layers="")
    again = tgp.measure(Dictionary(), both, layers="", wrt="pixels", estimator="exact", normalize=False)[""]
    assert torch.equal(again.value, g.value)


class Positions(nn.Module):
    """A table of positions that is no part of the batch, whatever its length."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4).double()

    def forward(self, x, positions):
        return (x + self.table(positions)).sin()


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 6])
def test_an_argument_that_happens_to_be_as_long_as_the_batch_is_not_cut(batch):
    model, x, positions = Positions(), torch.randn(batch, 5, 4, dtype=F64), torch.arange(5)
    options = {"layers": "", "estimator": "exact", "normalize": False, "memory_budget": 60_000}
    g = tgp.measure(model, (x, positions), **options)[""]
    expected = (x + model.table(positions)).cos().abs().log().flatten(1).sum(1)
    assert torch.allclose(g.value, expected, atol=1e-10)


class OwnTable(nn.Module):
    """Takes its own number of samples alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.rand(6, 3, dtype=F64) + 1)

    def forward(self, x):
        if len(x) != 6:
            raise RuntimeError("six samples, please")
        return self.table * x


def test_a_model_of_one_batch_size_is_measured_whole():
    model, x = OwnTable(), torch.randn(6, 3, dtype=F64)
    g = tgp.measure(model, x, layers="", estimator="exact", normalize=False, memory_budget=300)[""]
    assert torch.allclose(g.value, model.table.log().sum(1), atol=1e-12)


class Graph(nn.Module):
    """Nodes in the first axis, edges beside them: the nodes see each other, and no part of them can be run."""

    def forward(self, x, edges):
        return torch.zeros_like(x).index_add(0, edges[1], x[edges[0]].sin())


class MeanFree(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def test_samples_that_see_each_other_have_no_metric_of_their_own():
    edges = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])
    cases = [(MeanFree(), torch.randn(5, 4)), (Graph(), (torch.randn(5, 4), edges))]
    cases.append((nn.LSTM(4, 3), torch.randn(5, 6, 4)))  # batch_first=False: the samples are taken for time
    for model, x in cases:
        for engine in ("auto", "functorch", "vjp"):
            with pytest.raises(tgp.ProbeError, match=r"couples the samples|first axis is not the batch"):
                tgp.measure(model, x, layers="", engine=engine)
    probe = tgp.GeometryProbe(nn.Sequential(MeanFree(), nn.Linear(4, 2)), layers="*")
    assert probe.check(torch.randn(5, 4)).coupled_layers == ["0", "1"]


def test_what_x_cannot_be():
    model = nn.Linear(3, 2)
    for x, message in (
        ((), "x holds no tensor"),
        (torch.zeros(2, 3, dtype=torch.complex64), r"x is complex.*\n.*view_as_real"),
        (torch.zeros(2, 3, dtype=torch.long), "x is of integer type"),
        (torch.zeros(0, 3), "no sample to measure at"),
        (torch.tensor(1.0), "no sample to measure at"),
    ):
        with pytest.raises(tgp.ProbeError, match=message) as error:
            tgp.measure(model, x, layers="")
        assert "source=" not in str(error.value), "the model has no embedding"
    tokens = nn.Sequential(nn.Embedding(5, 3), nn.Flatten())
    with pytest.raises(tgp.ProbeError, match=r"pull back to the embeddings:  .*source='0'"):
        tgp.measure(tokens, torch.zeros(2, 3, dtype=torch.long), layers="")


def test_types_and_devices_of_all_parameters_count():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Linear(3, 3), nn.Linear(3, 3).double()

        def forward(self, x):
            return self.wide(x) + self.narrow(x.float())

    g = tgp.measure(Mixed(), torch.randn(2, 3, dtype=F64), layers="")[""]
    assert g.value.isfinite().all()
    with pytest.raises(tgp.ProbeError, match=r"x is torch.float64, the model's parameters are torch.float32.\nConvert"):
        tgp.measure(nn.Linear(3, 2), torch.randn(2, 3, dtype=F64), layers="")
    with pytest.raises(tgp.ProbeError, match=r"the model's parameters are on 'meta'.*\n.*to_empty"):
        tgp.measure(nn.Linear(3, 2, device="meta"), torch.randn(2, 3), layers="")


def test_the_advice_of_a_complex_input_works():
    class Real(nn.Module):
        def forward(self, x):
            z = torch.view_as_complex(x)
            return torch.view_as_real(z * z)

    z = torch.randn(3, 2, dtype=torch.complex128)
    g = tgp.measure(Real(), torch.view_as_real(z), layers="", estimator="exact", normalize=False)[""]
    assert torch.allclose(g.value, (2 * z).abs().log().sum(1) * 2, atol=1e-12)
    assert math.isfinite(g.value.sum())


class Sum(nn.Module):
    def forward(self, x, y):
        return torch.cat([x * 2, y.sum(0).expand(len(x), -1) if len(y) != len(x) else y * 3], dim=1)


def test_arguments_named_twice_in_vain_or_of_other_sizes():
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    twice, once = (tgp.measure(Sum(), (x, y), layers="", wrt=wrt, estimator=tgp.Exact())[""] for wrt in (["x", 0], "x"))
    assert torch.equal(twice.log_volume, once.log_volume)
    assert len(twice.singular_values[0]) == 2
    with pytest.raises(tgp.ProbeError, match=r"names no argument(.|\n)*wrt='x'"):
        tgp.measure(Sum(), (x, y), layers="", wrt=[])
    for rows in (6, 7):
        with pytest.raises(tgp.ProbeError, match=rf"x \[3, 2\], y \[{rows}, 2\](.|\n)*wrt='x'"):
            tgp.measure(Sum(), (x, torch.randn(rows, 2)), layers="", wrt=["x", "y"])


def test_arguments_of_different_types_keep_theirs():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Linear(2, 2), nn.Linear(2, 2).double()

        def forward(self, x, y):
            return torch.cat([self.narrow(x).double(), self.wide(y)], dim=1)

    model = Mixed()
    given = (torch.randn(3, 2), torch.randn(3, 2).double())
    found = tgp.measure(model, given, layers="", wrt=["x", "y"], estimator=tgp.Exact(), normalize=False)[""]
    dets = [layer.weight.double().det().abs().log() for layer in (model.narrow, model.wide)]
    assert torch.allclose(found.log_volume, sum(dets).expand(3), atol=1e-5)
