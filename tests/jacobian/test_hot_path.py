"""The hot path: nothing on it waits for the device, mixes devices, or depends on data; so it can be traced."""

import models
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchgeom_probe as tgp
from torchgeom_probe.jacobian import fused
from torchgeom_probe.linalg.gram import Factor
from torchgeom_probe.model.hooked import HookedModel
from torchgeom_probe.model.isolation import measuring

DTYPES = [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)]
SYNCHRONISING = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "unique2",
    "_unique2",
    "is_pinned",
}


class NoHostSynchronisation(TorchDispatchMode):
    """Fails on what makes the host wait: numbers and shapes read from data, copies between devices, checked
    factorisations."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        before = {a.device.type for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)}
        after = {o.device.type for o in tree_leaves(out) if isinstance(o, torch.Tensor)}
        assert name not in SYNCHRONISING, f"{name} waits for the device"
        assert not name.startswith(("linalg_svd", "_linalg_svd", "linalg_eig", "_linalg_eigh", "linalg_cholesky")), (
            f"{name} waits"
        )
        assert not ("cuda" in before and "cpu" in after), f"{name} copies to the host"
        return out


def _task(case):
    factory, shape, layers = models.CASES[case]
    model = factory()
    return (
        HookedModel(model, {name: model.get_submodule(name) for name in layers}),
        torch.randn(2, *shape),
        torch.randn(3, 2, *shape),
    )


def _pass(hooked, x, v):
    """The pass and its reductions, as one function of tensors."""
    grams = {}

    def reduce(entry, blocks):
        factor = Factor.of(blocks)
        grams[entry] = factor.gram if factor.gram is not None else factor.triangle

    fused.push(hooked, hooked.inputs(x), v, reduce)
    return grams


@pytest.mark.parametrize("case", models.CASES)
def test_no_host_synchronisation(case):
    hooked, x, v = _task(case)
    for dtype in (torch.float32, torch.float64):
        hooked.model.to(dtype)
        with measuring(hooked.model), NoHostSynchronisation():
            assert len(_pass(hooked, x.to(dtype), v.to(dtype))) == len(hooked.layers)


def test_the_check_for_synchronisation_can_fail():
    class Peeks(torch.nn.Module):
        def forward(self, x):
            return x if (x > 0).any() else -x

    model = Peeks()
    hooked = HookedModel(model, {"": model})
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSynchronisation():
        _pass(hooked, torch.randn(2, 3), torch.randn(1, 2, 3))
    with pytest.raises(AssertionError, match="copies to the host"), FakeTensorMode(), NoHostSynchronisation():
        torch.ones(2, device="cuda").cpu()


@pytest.mark.parametrize("case", models.CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_mixed_devices_on_cuda(case, dtype):
    """FakeTensorMode runs no kernel, but it does check that every op has its tensors on one device."""
    factory, shape, layers = models.CASES[case]
    real = factory().to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        model = real
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty_like(mode.from_tensor(p), device="cuda"))
            for name, b in list(module._buffers.items()):
                if b is not None:
                    module._buffers[name] = torch.empty_like(mode.from_tensor(b), device="cuda")
        x = torch.empty(2, *shape, device="cuda", dtype=dtype)
        hooked = HookedModel(model, {name: model.get_submodule(name) for name in layers})
        with measuring(model), NoHostSynchronisation():
            grams = _pass(hooked, x, torch.empty(3, *x.shape, device="cuda", dtype=dtype))
        assert {g.device.type for g in grams.values()} == {"cuda"}
        for estimator in (tgp.Subspace(k=3), tgp.Exact()) if case == "mlp" else (tgp.Subspace(k=3),):
            report = tgp.measure(model, x, layers=layers, estimator=estimator, memory_budget=2**30)
            for layer in layers:
                assert report[layer].log_volume.device.type == report[layer].rank.device.type == "cuda"


def test_fake_tensors_do_find_a_mixed_device():
    class Mixed(torch.nn.Module):
        def forward(self, x):
            return x + torch.ones(5, 3)[0]

    model = Mixed()
    with FakeTensorMode(), pytest.raises(Exception, match=r"device"):
        _pass(HookedModel(model, {"": model}), torch.empty(2, 3, device="cuda"), torch.empty(1, 2, 3, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", models.CASES)
def test_traced_by_make_fx_equals_eager(case, dtype):
    hooked, x, v = _task(case)
    hooked.model.to(dtype)
    x, v = x.to(dtype), v.to(dtype)
    with measuring(hooked.model):
        graph = make_fx(lambda x, v: _pass(hooked, x, v))(x, v)
        ops = {n.target for n in graph.graph.nodes if n.op == "call_function"}
        assert all(isinstance(op, torch._ops.OpOverload) or op.__name__ == "getitem" for op in ops), ops
        for _ in range(2):  # the second time on inputs that the trace has not seen
            eager, traced = _pass(hooked, x, v), graph(x, v)
            for layer in eager:
                scale = eager[layer].abs().max()
                assert (eager[layer] - traced[layer]).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5) * scale
            x, v = torch.randn_like(x), torch.randn_like(v)
