"""Reverse mode over copies of the batch: every copy its own cotangent, whatever the model, the budget and the
layout."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchgeom_probe as tgp
from torchgeom_probe.jacobian.layout import Layout
from torchgeom_probe.jacobian.plan import make_plan
from torchgeom_probe.jacobian.vjp import pullback
from torchgeom_probe.model.hooked import HookedModel


class _CountsOnItsLayout(nn.Module):
    """What a convolution makes is viewed flat: that fails where channels lie last in memory."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 16, 6)
        self.runs = []

    def forward(self, x):
        made = self.conv(x)
        self.runs.append(made.stride()[1] == 1)
        return self.head(made.view(len(x), -1).sin())


def _convolutional():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 16, 6))


def _pulled(model, x, copies, count, *, layout=Layout.of):
    hooked = HookedModel(model, {"": model})
    inputs = hooked.inputs(x)
    u = torch.randn(count, len(x), 6, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    with pullback(hooked, inputs, copies=copies, layout=layout(model)) as back:
        return u, back.pull("", u)


@pytest.mark.parametrize("copies", [1, 2, 3, 7])
@pytest.mark.parametrize("model", [_convolutional, _CountsOnItsLayout], ids=["plain", "view"])
def test_every_cotangent_is_pulled_through_its_own_sample(model, copies):
    model, x = model().eval(), torch.randn(2, 3, 6, 6)
    u, pulled = _pulled(model, x, copies, 5)  # no multiple of 2, 3 or 7
    assert pulled.shape == (5, 2, 3, 6, 6)
    assert not any(p.grad is not None for p in model.parameters())
    for b in range(2):
        jacobian = torch.func.jacrev(lambda z: model(z[None])[0])(x[b])
        expected = torch.einsum("kn,nchw->kchw", u[:, b], jacobian)
        assert torch.allclose(pulled[:, b], expected, atol=1e-5)


@pytest.mark.parametrize("estimator", [tgp.Exact(), tgp.TopK(2), tgp.Subspace(2)], ids=["exact", "topk", "subspace"])
def test_weights_that_accelerate_offloads_are_there_in_their_own_forward_alone(estimator):
    accelerate = pytest.importorskip("accelerate")
    model, x = _convolutional().eval(), torch.randn(2, 3, 6, 6)
    expected = tgp.measure(model, x, layers=["0", ""], estimator=estimator)
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    before = dict(offloaded.named_parameters())
    with tgp.GeometryProbe(offloaded, layers=["0", ""], estimator=estimator) as probe:
        for _ in range(3):
            report = probe.measure(x)
            assert all(torch.equal(report[name].value, expected[name].value) for name in expected)
    assert all(p.is_meta and before[name] is p for name, p in offloaded.named_parameters())


def test_a_model_that_counts_on_its_layout_is_run_in_it():
    model, x = _CountsOnItsLayout().eval(), torch.randn(2, 3, 6, 6)
    _pulled(model, x, 2, 2)
    if torch.backends.mkldnn.is_available():
        assert model.runs == [True, False]  # tried with the channels last, then as the model wants it
    model.runs.clear()
    _pulled(model, x, 2, 2, layout=lambda model: None)
    assert model.runs == [False]


def test_copies_keep_to_the_budget_and_leave_random_models_alone():
    model, x = _convolutional().eval(), torch.randn(3, 3, 6, 6)
    hooked = HookedModel(model, {"": model})
    inputs = hooked.inputs(x)
    plan = make_plan(hooked, inputs, memory_budget=1 << 30)
    # a copy of the input, conv and GELU 4·4·4 floats each, the linear layer 6: all that the pass makes
    assert plan.graph_bytes == 4 * (3 * 36 + 64 + 64 + 6)
    assert plan.copies(8, 3, x.device) == 8
    large = replace(plan, graph_bytes=10 << 20, budget=1 << 40)
    assert large.copies(99, 2, x.device) == 16  # 32 rows
    assert replace(large, graph_bytes=1 << 29).copies(99, 1, x.device) == 2  # a GiB
    tight = make_plan(hooked, inputs, memory_budget=4 * 3 * 2 * plan.graph_bytes)
    assert tight.copies(8, 3, x.device) == 2
    assert make_plan(hooked, inputs, memory_budget=1).copies(8, 3, x.device) == 1
    noisy = nn.Sequential(nn.Dropout(), *_convolutional()).train()
    assert make_plan(HookedModel(noisy, {"": noisy}), inputs, memory_budget=1 << 30).copies(8, 3, x.device) == 1


def test_rows_are_the_same_in_a_budget_for_one_copy():
    model, x = _convolutional().eval(), torch.randn(3, 3, 6, 6)
    wide = tgp.measure(model, x, layers="", estimator=tgp.Exact(), engine="vjp")[""]
    tight = tgp.measure(model, x, layers="", estimator=tgp.Exact(), engine="vjp", memory_budget=40_000)[""]
    assert torch.allclose(wide.log_volume, tight.log_volume, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="channels last are for oneDNN's convolutions")
def test_the_weights_are_laid_once_and_the_model_keeps_its_own():
    model, x = _convolutional().eval(), torch.randn(2, 3, 6, 6)
    own, before, inside = model[0].weight, model[0].weight.clone(), []
    model[0].register_forward_hook(lambda module, args, output: inside.append(module.weight.stride()[1]))
    _pulled(model, x, 2, 2)
    assert inside == [1]
    assert model[0].weight is own
    assert own.requires_grad
    assert own.is_contiguous()
    assert torch.equal(own, before)


def test_repeated_pushes_of_an_estimator_convolve_the_tangents_alone():
    model, x, rows = _convolutional().eval(), torch.randn(2, 3, 6, 6), []
    convolve = torch.ops.aten.convolution.default

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is convolve:
                rows.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    estimator = tgp.TopK(k=3, method="krylov", max_products=32, tol=1e-9)
    with Noted():
        tgp.measure(model, x, layers="", estimator=estimator, engine="fused")
    assert rows.count(2 * (1 + 4)) == 1  # the first push
    assert rows.count(2 * 4) > 1


class _AsksForGradients(nn.Module):
    def __init__(self, asks):
        super().__init__()
        self.asks = asks

    def forward(self, x):
        return x * 2 if self.asks(x) else x.sin()


@pytest.mark.parametrize(
    "asks", [lambda x: x.requires_grad, lambda x: torch.is_grad_enabled()], ids=["requires_grad", "is_grad_enabled"]
)
@pytest.mark.parametrize("estimator", [tgp.Exact(), tgp.TopK(2), tgp.Subspace(2)], ids=["exact", "topk", "subspace"])
def test_a_model_that_is_another_function_under_gradients_is_refused(asks, estimator):
    """Reverse mode would differentiate the branch that only training takes."""
    with pytest.raises(tgp.ProbeError, match="another value than the model's plain forward pass"):
        tgp.measure(_AsksForGradients(asks), torch.rand(3, 4), layers="", estimator=estimator, engine="vjp")
    report = tgp.measure(_AsksForGradients(asks), torch.zeros(3, 4), layers="", estimator=tgp.Exact(), normalize=False)
    assert torch.allclose(report[""].log_volume, torch.zeros(3).double())  # of sin, not of 2 x


class _Force(nn.Module):
    """A force field: the gradient of an energy, by torch's own transforms inside the forward pass."""

    def forward(self, x):
        return torch.func.vmap(torch.func.grad(lambda z: z.pow(4).sum() / 4))(x)


def test_transforms_of_torch_func_inside_the_model():
    x = torch.rand(3, 4, dtype=torch.float64) + 1
    report = tgp.measure(_Force(), x, layers="", estimator=tgp.Exact(), normalize=False)
    assert torch.allclose(report[""].log_volume, (3 * x**2).log().sum(1))


class _RaisesBackward(torch.autograd.Function):
    """What a user's backward raises is of any type."""

    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        raise KeyError("no backward here")


def test_whatever_a_backward_raises_is_a_refusal():
    model = nn.Sequential(nn.Linear(5, 5))
    model.forward = lambda x: _RaisesBackward.apply(nn.Sequential.forward(model, x))
    for options in ({"estimator": "topk:2"}, {"estimator": "exact", "engine": "vjp"}):
        with pytest.raises(tgp.ProbeError, match="KeyError: 'no backward here'"):
            tgp.measure(model, torch.randn(3, 5), layers="", **options)
