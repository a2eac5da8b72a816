"""Replay: the same bits as an eager pass, and never a recording of what the model no longer is.

The traps change, between two measurements, something that a pass depends on.  The measurement after the change is one
that no audit looks at: the seal alone stands between the change and a stale report.
"""

import dataclasses
import functools
import types
import warnings

import models
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

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


class Config:
    scale = 1.0


def _activation(x):
    return torch.tanh(x)


def _scaled(x, by=NUMBERS):
    return x * by[0]


@functools.lru_cache
def _remembered():
    return NUMBERS[0]


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
        lambda m: setattr(Block, "act", lambda self, h: h.sigmoid()), None, undo=lambda act=Block.act: setattr(Block, "act", act)
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
    "another module's global": Trap(lambda m: setattr(OUTSIDE, "scale", 3.0), lambda self, h: h * OUTSIDE.scale),
    "a global array": Trap(lambda m: ARRAY.fill(3.0), lambda self, h: h * float(ARRAY[0]), never=True),
    "a global tensor in place": Trap(
        lambda m: TENSOR.fill_(3.0), lambda self, h: h * TENSOR, stays=True, undo=lambda: TENSOR.fill_(1.0)
    ),
    "a global tensor replaced": Trap(
        _global("TENSOR", torch.tensor(5.0)), lambda self, h: h * TENSOR, undo=lambda: _global("TENSOR", torch.ones(()))(0)
    ),
    "a closure's cell": Trap(lambda m: m(torch.randn(3, 4)), _counter()),
    "a closure's dict": Trap(lambda m: BOX.update(scale=3.0), _closure(BOX)),
    "a remembered answer": Trap(
        lambda m: (NUMBERS.__setitem__(0, 4.0), _remembered.cache_clear()), lambda self, h: h * _remembered(), never=True
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
        lambda m: setattr(m, "handle", nn.modules.module.register_module_forward_hook(lambda mod, a, o: o * 2 if mod is m.second else None)),
        undo=lambda: nn.modules.module._global_forward_hooks.clear(),
    ),
    "a hook from the start": Trap(
        lambda m: setattr(m, "alpha", 3.0), never=True, prepare=lambda m: m.second.register_forward_hook(lambda mod, a, o: o * m.alpha)
    ),
    # the process
    "the default dtype": Trap(
        lambda m: torch.set_default_dtype(torch.float64),
        lambda self, h: h * 2 if torch.ones(()).dtype == torch.float64 else h.tanh(),
        undo=lambda: torch.set_default_dtype(torch.float32),
    ),
    "threads": Trap(lambda m: torch.set_num_threads(1), undo=lambda n=torch.get_num_threads(): torch.set_num_threads(n), stays=torch.get_num_threads() == 1),
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
    return tgp.GeometryProbe(model, layers=["blocks.0", "second"], estimator=tgp.Subspace(k=3), normalize=False, **options)


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
        expected = tgp.measure(
            model, x, layers=["blocks.0", "second"], estimator=tgp.Subspace(k=3), normalize=False
        )
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
