"""What only a GPU can check: values, streams, graphs, memory and the footprint there."""

import copy

import models
import pytest
import torch
from torch import nn
from torch.nn import functional

import torchgeom_probe as tgp
from torchgeom_probe.jacobian import fused
from torchgeom_probe.linalg.gram import Factor
from torchgeom_probe.model.hooked import HookedModel
from torchgeom_probe.model.isolation import measuring

pytestmark = pytest.mark.cuda

ESTIMATORS = {
    "subspace": tgp.Subspace(k=3),
    "frames": tgp.Subspace(k=2, frames=5),
    "exact": tgp.Exact(),
    "topk": tgp.TopK(k=3, block=4),
    "krylov": tgp.TopK(k=2, block=4, method="krylov"),
    "logdet": tgp.LogDet(eps=1e-2),
    "trace": tgp.Trace(probes=8),
}


def _case(name, dtype=torch.float32):
    factory, shape, layers = models.CASES[name]
    return factory().to(dtype), torch.randn(2, *shape, dtype=dtype), layers


def _task(case):
    model, x, layers = _case(case)
    model.cuda()
    hooked = HookedModel(model, {name: model.get_submodule(name) for name in layers})
    return hooked, x.cuda(), torch.randn(3, *x.shape, device="cuda")


def _pass(hooked, x, v):
    grams = {}

    def reduce(entry, blocks):
        grams[entry] = Factor.of(blocks).gram

    fused.push(hooked, hooked.inputs(x), v, reduce)
    return grams


@pytest.mark.parametrize("engine", ["fused", "functorch", "vjp"])
@pytest.mark.parametrize("case", models.CASES)
def test_values_are_those_of_the_cpu(case, engine):
    model, x, layers = _case(case, torch.float64)
    on_cpu = tgp.measure(model, x, layers=layers, estimator=tgp.Subspace(k=3))
    on_gpu = tgp.measure(model.cuda(), x.cuda(), layers=layers, estimator=tgp.Subspace(k=3), engine=engine)
    for layer in layers:
        assert on_gpu[layer].value.is_cuda
        assert torch.allclose(on_cpu[layer].value, on_gpu[layer].value.cpu(), atol=1e-9)


@pytest.mark.parametrize("case", models.CASES)
def test_float32_is_as_good_as_on_the_cpu(case):
    model, x, layers = _case(case)
    exact = tgp.measure(copy.deepcopy(model).double(), x.double(), layers=layers, estimator=tgp.Subspace(k=3))
    on_gpu = tgp.measure(model.cuda(), x.cuda(), layers=layers, estimator=tgp.Subspace(k=3))
    for layer in layers:
        assert torch.allclose(exact[layer].value, on_gpu[layer].value.cpu(), atol=1e-3)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator(name):
    model, x, _ = _case("cifar_resnet", torch.float64)
    options = {"layers": ["layer2.0.bn1", "layer4.1", "fc"], "estimator": ESTIMATORS[name]}
    on_cpu = tgp.measure(model, x, **options)
    on_gpu = tgp.measure(model.cuda(), x.cuda(), **options)
    for layer, expected in on_cpu.items():
        found = on_gpu[layer]
        assert found.value.is_cuda
        assert torch.allclose(expected.value, found.value.cpu(), atol=1e-6), layer


@pytest.mark.parametrize("case", models.CASES)
def test_the_pass_does_not_wait_for_the_device(case):
    hooked, x, v = _task(case)
    before = torch.cuda.get_sync_debug_mode()
    with measuring(hooked.model):
        _pass(hooked, x, v)  # libraries start up at their first call
        torch.cuda.set_sync_debug_mode("error")
        try:
            _pass(hooked, x, v)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("case", models.CASES)
def test_the_pass_can_be_captured_in_a_cuda_graph(case):
    hooked, x, v = _task(case)
    with measuring(hooked.model):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _pass(hooked, x, v)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _pass(hooked, x, v)
        with torch.no_grad():
            x.add_(0.1)  # a replay reads the inputs and the weights as they are then
            next(hooked.model.parameters()).data.mul_(1.1)
        graph.replay()
        eager = _pass(hooked, x, v)
    for layer in eager:
        assert torch.allclose(eager[layer], captured[layer], rtol=1e-4, atol=1e-6 * eager[layer].abs().max())


def test_chunks_that_the_budget_asks_for_change_nothing():
    model, x, layers = _case("cifar_resnet")
    x = torch.cat([x] * 5).cuda()
    model.cuda()
    whole = tgp.measure(model, x, layers=layers, estimator=tgp.Subspace(k=4))
    chunked = tgp.measure(model, x, layers=layers, estimator=tgp.Subspace(k=4), memory_budget=2**20)
    for layer in layers:
        assert torch.allclose(whole[layer].value, chunked[layer].value, atol=1e-3)


def test_tf32_of_the_user_does_not_reach_the_tangents_and_comes_back():
    model, x, layers = _case("cifar_resnet")
    exact = tgp.measure(copy.deepcopy(model).double(), x.double(), layers=layers, estimator=tgp.Subspace(k=4))
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        found = tgp.measure(model.cuda(), x.cuda(), layers=layers, estimator=tgp.Subspace(k=4))
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    for layer in layers:
        assert torch.allclose(exact[layer].value, found[layer].value.cpu(), atol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "float16 with GradScaler", "bfloat16"])
def test_a_training_with_a_monitor_ends_with_the_same_bits(precision):
    """cuDNN and cuBLAS in their deterministic forms: without them two runs of any training differ."""

    def trained(watched):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Dropout(0.3), nn.Flatten(), nn.LazyLinear(5),
        ).cuda()  # fmt: skip
        x, y = torch.randn(16, 3, 8, 8, device="cuda"), torch.randint(5, (16,), device="cuda")
        model(x)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cuda", enabled="Scaler" in precision)
        dtype = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}[precision.split()[0]]

        def steps():
            for _ in range(20):
                optimizer.zero_grad()
                with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                    loss = functional.cross_entropy(model(x), y)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

        if watched:
            options = {"every": 1, "layers": ["1", "5"], "estimator": tgp.Subspace(k=2)}
            with tgp.Monitor(model, x[:4], **options, on_error="raise").follow(optimizer) as monitor:
                steps()
            assert monitor.probes > 10
        else:
            steps()
        return model.state_dict(), torch.cuda.get_rng_state()

    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        (plain, random_plain), (watched, random_watched) = trained(False), trained(True)
    finally:
        torch.backends.cudnn.deterministic = deterministic
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert torch.equal(random_plain, random_watched)


def test_a_model_on_the_gpu_and_samples_on_the_cpu_are_refused_by_name():
    model = nn.Linear(3, 2).cuda()
    with pytest.raises(tgp.ProbeError, match=r"x is on cpu, the model on cuda:0.\nMove it:  x.to\('cuda:0'\)"):
        tgp.measure(model, torch.randn(2, 3), layers="")


def test_a_replayed_report_is_the_eager_one_and_follows_the_weights():
    model, x, layers = _case("resnet")
    model.cuda()
    options = {"layers": layers, "estimator": tgp.Subspace(k=3)}
    probe = tgp.GeometryProbe(model, **options)
    for turn in range(6):
        x = torch.randn_like(x)
        found, expected = probe.measure(x.cuda()), tgp.measure(model, x.cuda(), **options)
        assert (found[layers[0]].engine == "replay") == (turn > 1), probe._replays.why_not
        for layer in layers:
            assert torch.allclose(found[layer].value, expected[layer].value, atol=1e-4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    model.conv1.weight.data = torch.randn_like(model.conv1.weight)  # elsewhere: a graph must not read the old place
    assert probe.measure(x.cuda())[layers[0]].engine == "fused"
