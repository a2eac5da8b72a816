"""Replay: the same bits as an eager pass, and never a recording of what the model no longer is.

The traps change, between two measurements, something that a pass depends on.  The measurement after the change is one
that no audit looks at: the seal alone stands between the change and a stale report.
"""

import copy
import dataclasses
import functools
import gc
import importlib
import sys
import types
import warnings

import models
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from unseen import Notes

import torchgeom_probe as tgp
from torchgeom_probe.jacobian.replay import replays

SCALE = 1.0
TABLE = {"scale": 1.0}
SETTINGS = types.SimpleNamespace(inner=types.SimpleNamespace(scale=1.0))
NUMBERS = [1.0]
ARRAY = np.ones(1)
TENSOR = torch.ones(())
OUTSIDE = types.ModuleType("outside_of_the_test")
OUTSIDE.scale = 1.0
sys.modules[OUTSIDE.__name__] = OUTSIDE


class Config:
    scale = 1.0


def _activation(x):
    return torch.tanh(x)


def _scaled(x, by=NUMBERS):
    return x * by[0]


@functools.lru_cache
def _remembered():
    return NUMBERS[0]


class _Negated(nn.Linear):
    def forward(self, x):
        return super().forward(-x).tanh()


class Block(nn.Module):
    """A model with something for every trap; what a trap does not use is harmless."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("gain", torch.ones(6))
        self.alpha, self.is_training, self.steps, self.history = 1.0, False, 0, []
        self.options, self.nested = {"alpha": 1.0}, {"a": [{"b": 1.0}]}
        self.partial = functools.partial(F.leaky_relu, negative_slope=0.1)
        self.plain_tensor = torch.ones(6)
        self.settings, self.fn = types.SimpleNamespace(alpha=1.0), _activation
        self.trace = []

    def forward(self, x):
        h = self.norm(torch.tanh(self.first(x))) * self.gain
        for block in self.blocks:
            h = torch.tanh(block(h))
        return self.second(self.dropout(self.act(h)))

    def act(self, h):
        return F.softplus(h)


def _with(act, **attributes):
    """A Block whose ``act`` is another."""
    kind = type("Trapped", (Block,), {"act": act, "__module__": __name__})
    model = kind()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@dataclasses.dataclass
class Trap:
    """What is changed between two measurements.

    ``stays``: the recording follows, or is not concerned: the report is a replayed one.
    ``never``: the model is not recorded to begin with.
    """

    change: object
    act: object = Block.act
    stays: bool = False
    never: bool = False
    undo: object = None
    prepare: object = None


def _set(path, value):
    def change(model):
        *inner, name = path.split(".")
        setattr(functools.reduce(getattr, inner, model), name, value)

    return change


def _global(name, value):
    return lambda model: globals().__setitem__(name, value)


def _lambda_with(value):
    return lambda h: h * value


def _imported(self, h):
    import outside_of_the_test

    return h * outside_of_the_test.scale


def _imported_from(self, h):
    from outside_of_the_test import scale

    return h * scale


class _Dropped(nn.Module):
    def forward(self, x):
        return x.clamp(-0.3, 0.3)


class _LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class _Symmetric(nn.Module):
    def forward(self, w):
        return w + w.mT


def _stepped(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model.train()
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()


def _tied(model):
    model.blocks[1].weight = model.blocks[0].weight


def _counter():
    count = 0

    def act(self, h):
        nonlocal count
        count += 1
        return h * count

    return act


def _closure(box):
    return lambda self, h: h * box["scale"]


def _generator(model):
    model.noise = torch.Generator().manual_seed(3)


def _say(module, args, output):
    return output * 2


BOX = {"scale": 1.0}

TRAPS = {
    # attributes
    "a schedule": Trap(_set("alpha", 0.5), lambda self, h: h.tanh() * self.alpha),
    "a flag like training": Trap(_set("is_training", True), lambda self, h: h if self.is_training else h.tanh()),
    "a counter": Trap(_set("steps", 7), lambda self, h: h.tanh() * (1 + self.steps)),
    "1 becomes 1.0 becomes True": Trap(_set("steps", True), lambda self, h: h / 2 if self.steps is True else h),
    "a list grows": Trap(lambda m: m.history.append(3.0), lambda self, h: h * (1 + sum(self.history))),
    "a list's element": Trap(
        lambda m: m.history.__setitem__(0, 3.0),
        lambda self, h: h * (1 + sum(self.history)),
        prepare=lambda m: m.history.append(1.0),
    ),
    "a dict's value": Trap(lambda m: m.options.update(alpha=3.0), lambda self, h: h * self.options["alpha"]),
    "deep inside": Trap(
        lambda m: m.nested["a"][0].update(b=3.0), lambda self, h: h * self.nested["a"][0]["b"]
    ),
    "an object's attribute": Trap(_set("settings.alpha", 3.0), lambda self, h: h * self.settings.alpha),
    "a function in an attribute": Trap(_set("fn", torch.sigmoid), lambda self, h: self.fn(h)),
    "a partial's arguments": Trap(
        lambda m: m.partial.keywords.update(negative_slope=0.9), lambda self, h: self.partial(h)
    ),
    "another partial": Trap(
        _set("partial", functools.partial(F.leaky_relu, negative_slope=0.9)), lambda self, h: self.partial(h)
    ),
    "an attribute by a name made up": Trap(_set("alpha", 3.0), lambda self, h: h * getattr(self, "al" + "pha")),
    "forward of one object": Trap(lambda m: setattr(m.second, "forward", lambda x: x * 2)),
    "forward of the model": Trap(lambda m: setattr(m, "act", types.MethodType(lambda self, h: h * 3, m))),
    "a method of the class": Trap(
        lambda m: setattr(Block, "act", lambda self, h: h.sigmoid()),
        None,
        undo=lambda act=Block.act: setattr(Block, "act", act),
    ),
    "a method of torch's class": Trap(
        lambda m: setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight)),
        undo=lambda forward=nn.Linear.forward: setattr(nn.Linear, "forward", forward),
    ),
    "a function of torch": Trap(
        lambda m: setattr(F, "softplus", torch.sigmoid), undo=lambda f=F.softplus: setattr(F, "softplus", f)
    ),
    "defaults that change": Trap(lambda m: NUMBERS.__setitem__(0, 3.0), lambda self, h: _scaled(h)),
    "defaults replaced": Trap(
        lambda m: setattr(_scaled, "__defaults__", ([3.0],)),
        lambda self, h: _scaled(h),
        undo=lambda: setattr(_scaled, "__defaults__", (NUMBERS,)),
    ),
    "code replaced": Trap(
        lambda m: setattr(_activation, "__code__", (lambda x: torch.sigmoid(x)).__code__),
        lambda self, h: _activation(h),
        undo=lambda code=_activation.__code__: setattr(_activation, "__code__", code),
    ),
    # globals and closures
    "a global": Trap(_global("SCALE", 3.0), lambda self, h: h * SCALE, undo=lambda: _global("SCALE", 1.0)(0)),
    "a global dict": Trap(lambda m: TABLE.update(scale=3.0), lambda self, h: h * TABLE["scale"]),
    "a global object": Trap(
        lambda m: setattr(SETTINGS.inner, "scale", 3.0), lambda self, h: h * SETTINGS.inner.scale
    ),
    "a class's attribute": Trap(lambda m: setattr(Config, "scale", 3.0), lambda self, h: h * Config.scale),
    "a module imported on the way": Trap(lambda m: setattr(OUTSIDE, "scale", 3.0), _imported),
    "a name imported on the way": Trap(lambda m: setattr(OUTSIDE, "scale", 3.0), _imported_from),
    "a module of sys": Trap(
        lambda m: setattr(OUTSIDE, "scale", 3.0), lambda self, h: h * sys.modules[OUTSIDE.__name__].scale, never=True
    ),
    "a module by importlib": Trap(
        lambda m: setattr(OUTSIDE, "scale", 3.0),
        lambda self, h: h * importlib.import_module(OUTSIDE.__name__).scale,
        never=True,
    ),
    "an attribute of a parameter": Trap(
        _set("first.weight.alpha", 3.0),
        lambda self, h: h * self.first.weight.alpha,
        prepare=_set("first.weight.alpha", 1.0),
    ),
    "an attribute of a buffer": Trap(
        _set("gain.alpha", 3.0), lambda self, h: h * getattr(self.gain, "alpha", 1.0)
    ),
    "how a weight lies": Trap(
        lambda m: setattr(m.second.weight, "data", m.second.weight.data.t().contiguous().t()),
        lambda self, h: h * self.second.weight.reshape(-1)[:6] * self.second.weight.stride(0),
    ),
    "where a weight lies in its memory": Trap(
        lambda m: setattr(m.second.weight, "data", torch.randn(7, 6)[1:]),
        lambda self, h: h * (1 + self.second.weight.storage_offset()),
    ),
    "another module's global": Trap(lambda m: setattr(OUTSIDE, "scale", 3.0), lambda self, h: h * OUTSIDE.scale),
    "another module's global by a name made up": Trap(
        lambda m: setattr(OUTSIDE, "scale", 3.0), lambda self, h: h * getattr(OUTSIDE, "sc" + "ale"), never=True
    ),
    "a global array": Trap(lambda m: ARRAY.fill(3.0), lambda self, h: h * float(ARRAY[0]), never=True),
    "a global tensor in place": Trap(
        lambda m: TENSOR.fill_(3.0), lambda self, h: h * TENSOR, stays=True, undo=lambda: TENSOR.fill_(1.0)
    ),
    "a global tensor replaced": Trap(
        _global("TENSOR", torch.tensor(5.0)),
        lambda self, h: h * TENSOR,
        undo=lambda: _global("TENSOR", torch.ones(()))(0),
    ),
    "a closure's cell": Trap(lambda m: m(torch.randn(3, 4)), _counter()),
    "a closure's dict": Trap(lambda m: BOX.update(scale=3.0), _closure(BOX)),
    "a remembered answer": Trap(
        lambda m: (NUMBERS.__setitem__(0, 4.0), _remembered.cache_clear()),
        lambda self, h: h * _remembered(),
        never=True,
    ),
    # tensors
    "a parameter replaced": Trap(lambda m: setattr(m.second, "weight", nn.Parameter(torch.randn(6, 6)))),
    "a parameter's data replaced": Trap(lambda m: setattr(m.second.weight, "data", torch.randn(6, 6)), stays=True),
    "weights in place": Trap(_stepped, stays=True),
    "a state dict loaded": Trap(
        lambda m: m.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in m.state_dict().items()}),
        stays=True,
    ),
    "a state dict assigned": Trap(
        lambda m: m.load_state_dict({k: v.clone() * 2 for k, v in m.state_dict().items()}, assign=True)
    ),
    "requires_grad flips": Trap(
        lambda m: m.second.weight.requires_grad_(False), lambda self, h: h * (1 + self.second.weight.requires_grad)
    ),
    "weights tied": Trap(_tied),
    "the dtype": Trap(lambda m: m.double()),
    "the dtype of a tensor's data": Trap(
        lambda m: setattr(m.plain_tensor, "data", m.plain_tensor.double() * 2),
        lambda self, h: h * self.plain_tensor.to(h.dtype),
    ),
    "a buffer replaced": Trap(lambda m: setattr(m, "gain", torch.full((6,), 2.0))),
    "a buffer in place": Trap(lambda m: m.gain.mul_(2), stays=True),
    "a plain tensor replaced": Trap(_set("plain_tensor", torch.full((6,), 3.0)), lambda self, h: h * self.plain_tensor),
    "a plain tensor in place": Trap(
        lambda m: m.plain_tensor.mul_(3), lambda self, h: h * self.plain_tensor, stays=True
    ),
    "an array in place": Trap(
        lambda m: m.array.fill(3.0),
        lambda self, h: h * torch.from_numpy(self.array),
        never=True,
        prepare=lambda m: setattr(m, "array", np.ones(6, dtype=np.float32)),
    ),
    "a tensor's version": Trap(
        lambda m: m.gain.mul_(1), lambda self, h: h * (1 + self.gain._version), never=True
    ),
    "a tensor's gradient": Trap(
        lambda m: None,
        lambda self, h: h if self.gain.grad is None else h * self.gain.grad,
        never=True,
    ),
    "a number out of a tensor": Trap(
        lambda m: m.gain.mul_(3), lambda self, h: h * self.gain[0].item(), never=True
    ),
    "numbers out of a tensor": Trap(
        lambda m: m.gain.mul_(3), lambda self, h: h * self.gain.tolist()[0], never=True
    ),
    "an array out of a tensor": Trap(
        lambda m: m.gain.mul_(3), lambda self, h: h * float(self.gain.numpy()[0]), never=True
    ),
    "a branch on numbers": Trap(
        lambda m: m.gain.mul_(-1), lambda self, h: h if self.gain.sum() > 0 else h.tanh(), never=True
    ),
    "a tensor made of a list": Trap(
        lambda m: NUMBERS.__setitem__(0, 3.0), lambda self, h: h * torch.tensor(NUMBERS)
    ),
    # modules
    "a module replaced": Trap(_set("first", nn.Linear(4, 6))),
    "a module of a list replaced": Trap(lambda m: m.blocks.__setitem__(1, nn.Linear(6, 6))),
    "a module's class": Trap(lambda m: setattr(m.second, "__class__", _Negated)),
    "a module appended": Trap(lambda m: m.blocks.append(nn.Linear(6, 6))),
    "a module of another kind": Trap(lambda m: m.blocks.__setitem__(1, _Dropped())),
    "LoRA put in": Trap(lambda m: m.blocks.__setitem__(1, _LoRA(m.blocks[1]))),
    "a parametrization": Trap(lambda m: parametrize.register_parametrization(m.second, "weight", _Symmetric())),
    "an activation's slope": Trap(
        lambda m: setattr(m.leaky, "negative_slope", 0.9),
        lambda self, h: self.leaky(h),
        prepare=lambda m: setattr(m, "leaky", nn.LeakyReLU(0.1)),
    ),
    "eps": Trap(lambda m: setattr(m.norm, "eps", 0.5)),
    # hooks
    "a hook added": Trap(lambda m: m.second.register_forward_hook(_say)),
    "a pre-hook added": Trap(lambda m: m.second.register_forward_pre_hook(lambda _, args: (args[0] * 2,))),
    "a hook for all": Trap(
        lambda m: nn.modules.module.register_module_forward_hook(
            lambda module, args, out: out * 2 if module is m.second else None
        ),
        undo=lambda: nn.modules.module._global_forward_hooks.clear(),
    ),
    "a hook from the start": Trap(
        lambda m: setattr(m, "alpha", 3.0),
        never=True,
        prepare=lambda m: m.second.register_forward_hook(lambda module, args, out: out * m.alpha),
    ),
    # the process
    "the default dtype": Trap(
        lambda m: torch.set_default_dtype(torch.float64),
        lambda self, h: h * 2 if torch.ones(()).dtype == torch.float64 else h.tanh(),
        undo=lambda: torch.set_default_dtype(torch.float32),
    ),
    "threads": Trap(lambda m: torch.set_num_threads(2), undo=lambda: torch.set_num_threads(1)),
    "the clock": Trap(lambda m: None, lambda self, h: h * __import__("time").time(), never=True),
    "random numbers": Trap(lambda m: None, lambda self, h: h + torch.randn(6), never=True),
    "random numbers of a generator": Trap(
        lambda m: None, lambda self, h: h + torch.randn(6, generator=self.noise), never=True, prepare=_generator
    ),
    "deterministic algorithms": Trap(
        lambda m: torch.use_deterministic_algorithms(True), undo=lambda: torch.use_deterministic_algorithms(False)
    ),
    "a mode of torch's": Trap(
        lambda m: torch.set_default_device("cpu"), undo=lambda: torch.set_default_device(None)
    ),
    "the mode": Trap(lambda m: m.train(), stays=True),
}  # fmt: skip


def _probe(model, **options):
    return tgp.GeometryProbe(
        model, layers=["blocks.0", "second"], estimator=tgp.Subspace(k=3), normalize=False, **options
    )


def _replayed(model, x, **options):
    """A probe whose next replay is one that no audit looks at."""
    probe = _probe(model, **options)
    engines = [probe.measure(x)["second"].engine for _ in range(4)]
    return probe, engines


@pytest.mark.parametrize("name", TRAPS)
def test_a_recording_that_is_stale_is_never_used(name):
    trap = TRAPS[name]
    torch.manual_seed(0)
    act = (lambda self, h: F.softplus(h)) if trap.act is None else trap.act
    model = _with(act) if trap.act is not None and trap.act is not Block.act else Block()
    if trap.prepare is not None:
        trap.prepare(model)
    model.eval()
    x = torch.randn(3, 4)
    try:
        probe, engines = _replayed(model, x)
        assert engines == ["fused", "fused", *(["fused"] if trap.never else ["replay"]) * 2], probe._replays.why_not
        trap.change(model)
        if name == "the dtype":
            x = x.double()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = probe.measure(x)
        expected = tgp.measure(model, x, layers=["blocks.0", "second"], estimator=tgp.Subspace(k=3), normalize=False)
        assert (found["second"].engine == "replay") == trap.stays, probe._replays.why_not
        for layer in found:
            assert torch.equal(found[layer].singular_values, expected[layer].singular_values) or trap.never
    finally:
        if trap.undo is not None:
            trap.undo()
        NUMBERS[0], TABLE["scale"], BOX["scale"] = 1.0, 1.0, 1.0
        SETTINGS.inner.scale = Config.scale = OUTSIDE.scale = 1.0
        ARRAY.fill(1.0)
        _remembered.cache_clear()


@pytest.mark.parametrize("case", models.CASES)
def test_a_replay_gives_the_bits_of_an_eager_pass_and_follows_the_weights(case, monkeypatch):
    monkeypatch.setattr("torchgeom_probe.jacobian.replay.program._by_onednn", lambda node: None)
    factory, shape, layers = models.CASES[case]
    model = factory()
    probe = tgp.GeometryProbe(model, layers=layers, estimator=tgp.Subspace(k=3))
    eager = tgp.GeometryProbe(model, layers=layers, estimator=tgp.Subspace(k=3), replay=False)
    for turn in range(5):
        x = torch.randn(2, *shape)
        found, expected = probe.measure(x), eager.measure(x)
        assert found[layers[0]].engine == ("replay" if turn > 1 else "fused"), probe._replays.why_not
        assert all(torch.equal(found[e].singular_values, expected[e].singular_values) for e in layers)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)


def test_onednn_differs_by_rounding_alone(monkeypatch):
    monkeypatch.setattr("torchgeom_probe.jacobian.replay.program._race", lambda call, other: True)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 7)).eval()
    probe = tgp.GeometryProbe(model, layers=["2", "4"], estimator=tgp.Subspace(k=3))
    for _ in range(5):
        x = torch.randn(2, 3, 8, 8)
        found = probe.measure(x)
        expected = tgp.measure(model, x, layers=["2", "4"], estimator=tgp.Subspace(k=3))
        assert all((found[e].value - expected[e].value).abs().max() < 1e-5 for e in found)
    assert found["4"].engine == "replay"
    (recording,) = probe._replays._recordings.values()
    assert recording.program is not recording.exact


def test_an_audit_that_differs_ends_replay_with_one_warning_that_names_the_reports(monkeypatch):
    model = Block().eval()
    x = torch.randn(3, 4)
    probe, engines = _replayed(model, x)
    assert engines[-1] == "replay"
    monkeypatch.setattr("torchgeom_probe.model.identities.Identities.hold", lambda found: True)  # a hole in the seal
    model.act = lambda h: h.sigmoid()
    stale = probe.measure(x)["second"]  # report 5, the third run
    expected = tgp.measure(model, x, layers=["second"], estimator=tgp.Subspace(k=3), normalize=False)["second"]
    assert not torch.allclose(stale.value, expected.value)
    with pytest.warns(UserWarning, match=r"reports 5 to 5 of this probe.*replays no more"):
        audited = probe.measure(x)["second"]
    assert torch.equal(audited.value, expected.value)
    assert audited.engine == "fused"
    assert probe.measure(x)["second"].engine == "fused"


def test_replay_is_for_live_probes_alone_and_can_be_turned_off():
    model, x = Block().eval(), torch.randn(3, 4)
    assert {tgp.measure(model, x, layers=["second"])["second"].engine for _ in range(4)} == {"fused"}
    _, engines = _replayed(model, x, replay=False)
    assert engines == ["fused"] * 4


def test_what_the_collector_of_garbage_calls_is_no_code_of_the_pass():
    threshold = gc.get_threshold()
    gc.callbacks.append(lambda phase, info: [str(one) for one in info])
    gc.set_threshold(1)
    try:
        assert _replayed(Block().eval(), torch.randn(3, 4))[1][-1] == "replay"
        assert gc.isenabled()
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.pop()


def test_a_pass_that_cannot_be_recorded_is_made_again():
    class Cached(nn.Module):  # into a plain tensor, which becomes another while nothing else holds it
        def forward(self, x):
            cache = torch.zeros(len(x), 5)
            cache.copy_(x.sin())
            return cache * x

    model, x = Cached(), torch.randn(2, 5)
    probe = tgp.GeometryProbe(model, layers="", estimator=tgp.Exact())
    found = [probe.measure(x)[""].singular_values for _ in range(4)]
    exact = (x.cos() * x + x.sin()).abs().sort(1, descending=True).values / 5**0.5
    assert all(torch.allclose(values.float(), exact, atol=1e-6) for values in found)
    assert "cannot be recorded" in probe._replays.why_not


def test_few_recordings_are_kept_and_another_estimator_or_shape_has_its_own():
    probe = _probe(Block().eval())
    for size in range(1, 8):
        engines = [probe.measure(torch.randn(size, 4))["second"].engine for _ in range(3)]
        assert engines[-1] == "replay", probe._replays.why_not
    assert len(probe._replays._recordings) == replays._KEPT
    copied = copy.deepcopy(probe)
    assert copied.measure(torch.randn(1, 4))["second"].engine == "fused"


def test_a_replayed_measurement_runs_no_code_of_the_model_and_leaves_all_as_it_was():
    model = Block().train()
    x = torch.randn(3, 4, requires_grad=True)
    probe, _ = _replayed(model, x)
    ran = Notes()
    forward = Block.forward
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        report = probe.measure(x)
        assert torch.is_autocast_enabled("cpu")
    assert report["second"].engine == "replay"
    assert not report["second"].value.is_inference()
    assert not ran.read()
    assert Block.forward is forward
    assert model.training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    exact = tgp.measure(model, x, layers=["second"], estimator=tgp.Subspace(k=3), normalize=False)["second"]
    assert torch.equal(report["second"].value, exact.value)


@pytest.mark.parametrize("build", ["convolutions", "attention"])
def test_bfloat16_tangents_are_close_and_say_so(build):
    layers = ["3"]
    if build == "convolutions":
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 8, 3)).eval()
        x = torch.randn(2, 3, 8, 8)
    else:
        model = nn.Sequential(
            nn.Linear(12, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.GELU(), nn.Linear(16, 8)
        ).eval()
        x = torch.randn(2, 5, 12)
    exact = tgp.measure(model, x, layers=layers, estimator=tgp.Subspace(k=4))["3"]
    low = tgp.measure(model, x, layers=layers, estimator=tgp.Subspace(k=4), precision="bf16")["3"]
    error = (low.value - exact.value).abs().max()
    assert 0 < error < 0.02
    assert low.engine == "fused, bf16 tangents"
    assert low.rank_tolerance > 1e-2 > exact.rank_tolerance


def test_bfloat16_is_refused_where_it_is_no_help_or_too_far_off(monkeypatch):
    model, x = Block().eval(), torch.randn(3, 4)
    with pytest.raises(tgp.ProbeError, match="needs reverse mode as well"):
        tgp.measure(model, x, layers=["second"], estimator=tgp.TopK(k=2), precision="bf16")
    with pytest.raises(tgp.ProbeError, match="by the fused engine"):
        tgp.measure(model, x, layers=["second"], engine="vjp", precision="bf16")
    monkeypatch.setattr("torchgeom_probe.estimators.options.ROUNDED", 1e-7)
    with pytest.raises(tgp.ProbeError, match=r"'second' is 0\.\d+ nats off"):
        tgp.measure(model, x, layers=["second"], estimator=tgp.Subspace(k=3), precision="bf16")
