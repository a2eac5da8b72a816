"""Zero footprint: nothing about the model or the process is different after a measurement, also when it raises."""

import copy
import pickle
import random
import subprocess
import sys
import warnings

import models
import numpy as np
import pytest
import torch
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.model.isolation import measuring

ESTIMATORS = {"subspace": tgp.Subspace(k=2), "exact": tgp.Exact()}
ENGINES = ("fused", "functorch", "vjp")


class Stateful(nn.Module):
    """Everything that a forward pass may leave behind."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(5, 7)),
            nn.BatchNorm1d(7),
            nn.Dropout(0.5),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Linear(7, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(7))
        self.cache, self.last, self.count = [], None, 0
        self.fail = False

    def forward(self, x):
        h = self.net(x)
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1  # rebinds the buffer
        self.count += 1
        self.last = h
        self.cache.append(h)
        self.new_attribute = h
        torch.rand(3), random.random(), np.random.rand()
        if self.fail and self.count > self.fail:
            raise RuntimeError("half-way")
        return self.head(h)


def _state(model):
    flags = {name: module.training for name, module in model.named_modules()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        flags,
        {name: (id(t), t.clone(), t.requires_grad, t.grad) for name, t in tensors.items()},
        {name: sorted(vars(module)) for name, module in model.named_modules()},
        {
            name: (dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks))
            for name, m in model.named_modules()
        },
        (list(model.cache), model.last, model.count),
    )


def _process():
    return {
        "rng": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "sdpa": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "mha": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "dtype": torch.get_default_dtype(),
    }


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or a == b


@pytest.mark.parametrize("fails", [0, 1, 2], ids=["runs", "fails in the plan", "fails in the pass"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_is_different_afterwards(estimator, engine, fails):
    model = Stateful()
    model.net[1].eval()  # a frozen batch norm inside a model in train mode
    model.net[0].parametrizations.weight.original.requires_grad_(False)
    model.head.weight.grad = torch.ones(3, 7)
    model.net.register_forward_hook(lambda *_: None)
    model.fail = fails if fails < 2 else 0
    if fails == 1:
        model.count = 1
    x = torch.randn(4, 5, requires_grad=True)
    model.cache.append("kept")
    probe = tgp.GeometryProbe(model, layers=["net", "head"], estimator=ESTIMATORS[estimator], engine=engine)
    if fails == 2:
        probe.measure(x)  # the plan is made; what fails now is the pass
        model.fail = -1
        model.count = 5
    before_model, before_process = _state(model), _process()
    if fails:
        with pytest.raises(tgp.ProbeError, match="half-way"):
            probe.measure(x)
    else:
        probe.measure(x)
    assert _same(before_process, _process())
    assert _same(before_model, _state(model))
    assert x.grad is None


@pytest.mark.parametrize("engine", ENGINES)
def test_inside_autocast_inference_mode_and_no_grad(engine):
    model, x = models.mlp(), torch.randn(4, 5)
    expected = tgp.measure(model, x, layers="3", estimator=tgp.Subspace(k=2), engine=engine)["3"].value
    for context in (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode(),
        torch.no_grad(),
        torch.enable_grad(),
    ):
        with context:
            before = _process()
            got = tgp.measure(model, x, layers="3", estimator=tgp.Subspace(k=2), engine=engine)["3"].value
            assert _same(before, _process())
        assert torch.equal(got, expected)


def test_measured_in_eval_mode_whatever_mode_the_model_is_in():
    model, x = Stateful(), torch.randn(4, 5)
    train = tgp.measure(model.train(), x, layers="head", estimator=tgp.Subspace(k=2))["head"]
    evaluation = tgp.measure(model.eval(), x, layers="head", estimator=tgp.Subspace(k=2))["head"]
    assert torch.equal(train.value, evaluation.value)
    dropout = nn.Sequential(nn.Linear(5, 29), nn.Dropout(0.5)).train()
    kept = tgp.measure(dropout, x, layers="1", estimator=tgp.Exact(), mode="as_is")["1"]
    whole = tgp.measure(dropout, x, layers="1", estimator=tgp.Exact())["1"]
    assert not torch.allclose(kept.value, whole.value)


def test_a_backward_pass_that_is_still_to_come_is_left_alone():
    model, x = Stateful().train(), torch.randn(4, 5)
    loss = model(x).square().sum()
    expected = torch.autograd.grad(loss, model.head.weight, retain_graph=True)[0]
    for engine in ENGINES:
        tgp.measure(model, x, layers="head", estimator=tgp.Subspace(k=2), engine=engine)
    loss.backward()
    assert torch.equal(model.head.weight.grad, expected)


def test_attached_probe_leaves_no_hook_and_the_model_can_be_copied_pickled_and_saved():
    model = models.mlp()
    plain = pickle.dumps(model)
    probe = tgp.GeometryProbe(model, layers="*", estimator=tgp.Subspace(k=2))
    probe.measure(torch.randn(4, 5))
    assert pickle.dumps(model) == plain
    assert not any(m._forward_hooks for m in copy.deepcopy(model).modules())


def test_a_users_hook_that_edits_the_output_is_measured_as_edited():
    model, x = models.mlp().double(), torch.randn(4, 5, dtype=torch.float64)
    plain = tgp.measure(model, x, layers="1", estimator=tgp.Exact())["1"].value
    model[1].register_forward_hook(lambda module, args, out: 3 * out)
    edited = tgp.measure(model, x, layers="1", estimator=tgp.Exact())["1"].value
    assert torch.allclose(
        edited - plain, torch.tensor(5.0, dtype=torch.float64) * torch.tensor(3.0).double().log(), atol=1e-10
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_activation_checkpointing(engine):
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.a, self.b, self.reentrant = nn.Linear(5, 7), nn.Linear(7, 3), reentrant

        def forward(self, x):
            h = torch.utils.checkpoint.checkpoint(lambda z: torch.tanh(self.a(z)), x, use_reentrant=self.reentrant)
            return self.b(h)

    x = torch.randn(4, 5)
    for reentrant in (False, True):
        model = Checkpointed(reentrant)
        expected = tgp.measure(nn.Sequential(model.a, nn.Tanh(), model.b), x, layers="", estimator=tgp.Subspace(k=2))[
            ""
        ]
        if reentrant and engine != "fused":
            continue  # torch refuses it under its own transforms
        got = tgp.measure(model, x, layers="", estimator=tgp.Subspace(k=2), engine=engine)[""]
        assert torch.allclose(got.value, expected.value, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_models(engine):
    x = torch.randn(4, 5)
    expected = None
    for compiled in (lambda m: m, lambda m: torch.compile(m), lambda m: (m.compile(), m)[1], _inner_compiled):
        torch.manual_seed(3)
        model = compiled(models.mlp())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            model(x)
        got = tgp.measure(model, x, layers=["3", "4"], estimator=tgp.Subspace(k=2), engine=engine)
        expected = expected or got
        assert torch.allclose(got["3"].value, expected["3"].value, atol=1e-6)


def _inner_compiled(model):
    model[3] = torch.compile(model[3])
    return model


def test_data_parallel_wrappers_are_looked_through(tmp_path):
    import torch.distributed as dist

    model, x = models.mlp(), torch.randn(4, 5)
    expected = tgp.measure(model, x, layers="3", estimator=tgp.Subspace(k=2))["3"].value
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for name in ("3", "module.3"):
            assert torch.equal(tgp.measure(wrapped, x, layers=name, estimator=tgp.Subspace(k=2))["3"].value, expected)
        wrapped(x).sum().backward()
    finally:
        dist.destroy_process_group()


def test_a_forward_that_writes_its_parameters_is_refused():
    class Clipped(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.clamp_(-1, 1)
            return super().forward(x)

    with pytest.raises(tgp.ProbeError, match=r"writes to its own parameters in place \(weight\)"):
        tgp.measure(Clipped(5, 3), torch.randn(4, 5), layers="", estimator=tgp.Subspace(k=2))


@pytest.mark.parametrize("engine", ["fused", "vjp"])
def test_what_a_forward_writes_to_a_parameter_through_data_is_put_back(engine):
    # No version counter tells of it: a clamp, a count of the passes.
    class Counting(nn.Linear):
        def forward(self, x):
            self.weight.data.clamp_(-0.2, 0.2)
            self.bias.data += 1
            return super().forward(x) * self.bias

    model, x = Counting(5, 3), torch.randn(4, 5)
    plain = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    probe = tgp.GeometryProbe(model, layers="", estimator=tgp.Exact(), engine=engine)
    first = probe.measure(x)[""]
    for _ in range(2):  # with a plan, and with where all was found
        assert torch.equal(probe.measure(x)[""].value, first.value)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    W, b = plain.weight.detach().clamp(-0.2, 0.2), plain.bias.detach() + 1
    exact = torch.linalg.svdvals(b[:, None] * W).expand(4, 3)  # J is the same at all samples
    assert torch.allclose(first.singular_values.float(), exact / 3**0.5, atol=1e-6)


def test_measuring_restores_flags_set_by_hand():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with measuring(nn.Linear(2, 3)):
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with measuring(nn.Linear(2, 3)), torch.no_grad():
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


FORBIDDEN = (
    "timm",
    "lightly",
    "lightning",
    "pytorch_lightning",
    "tensorboard",
    "matplotlib",
    "sklearn",
    "skimage",
    "torchvision",
    "torch._dynamo",  # the compiler
    "scipy.stats",
    "scipy.cluster",
    "sympy",  # but for the gradients of reverse mode, for which torch itself imports it
)
MEASURE = """
import torch
from torchgeom_probe import GeometryProbe, measure
model, x = torch.nn.Sequential(torch.nn.Linear(5, 20), torch.nn.Tanh()), torch.randn(2, 5)
for estimator in ("exact", "subspace:2"):
    probe = GeometryProbe(model, layers="1", estimator=estimator)
    assert [probe.measure(x)["1"].engine for _ in range(4)][-1] == "replay"
"""
LOADED = "import sys; print([m for m in {names!r} if m in sys.modules])"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import torchgeom_probe", []),
        pytest.param("import torchgeom_probe, matplotlib", ["matplotlib"], marks=pytest.mark.slow),
    ],
)
def test_neither_import_nor_measurement_loads_a_package_that_takes_seconds(line, expected):
    """The second case shows that the check can fail."""
    code = f"{line}\n{MEASURE}\n{LOADED.format(names=FORBIDDEN)}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(expected)
    assert not out.stderr
