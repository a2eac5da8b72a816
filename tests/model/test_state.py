"""What hooks and forward passes write to is put back: the user's training is bit for bit the one without a probe."""

import argparse
import collections
import contextvars
import functools
import itertools
import queue
import random
import sys
import threading
import types
import weakref

import beartype
import jaxtyping
import numpy as np
import pytest
import torch
from annotations import shapes_unchecked
from jaxtyping._storage import _shape_storage
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import torchgeom_probe as tgp
from torchgeom_probe.model.leftovers import FOUND
from torchgeom_probe.model.state import State

FEATURES, LATEST, COUNT = [], {}, 0
OUT_OF_REACH, OUT_OF_REACH_BY_NAME, PAIRS = collections.deque(), {}, []
CONFIG = types.ModuleType("somebodys_config")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2))


class Extractor:
    """Takes a hook's output into slots, a list of its own, one of its class, and a dict in a dict."""

    __slots__ = ("deep", "last", "seen")
    everybodys: list = []  # noqa: RUF012

    def __init__(self):
        self.seen, self.deep = [], {"a": {}}

    def hook(self, module, args, out):
        self.seen.append(out)
        self.last = out
        self.everybodys.append(out)
        Extractor.newest = out
        self.deep["a"].setdefault(module, collections.deque(maxlen=3)).append(out)

    def features(self):
        return [*self.seen, self.last]


def to_global(module, args, out):
    global COUNT
    COUNT += 1
    LATEST["out"] = out
    _to_list(out)


def _to_list(out):
    FEATURES.append(out)


def to_default(module, args, out, kept=[]):  # noqa: B006  (the point)
    kept.append(out)
    to_default.last = out


def to_module_named(module, args, out):
    CONFIG.features.append(out)


def hooks():
    """Name → (hook, a function that takes what it kept since the last call)."""

    def drained(container, values=lambda container: list(container)):
        def take():
            found = values(container)
            container.clear()
            return found

        return take

    kept, extractor, space, weak = [], Extractor(), argparse.Namespace(out=set()), weakref.WeakKeyDictionary()
    attribute = types.SimpleNamespace()
    CONFIG.features = []
    last = None

    def rebinding(module, args, out):
        nonlocal last
        last = out

    def to_namespace(module, args, out):
        space.out.add(out)

    return {
        "closure list": (lambda module, args, out: kept.append(out), drained(kept)),
        "closure name": (rebinding, lambda: [last]),
        "global dict, list and number": (to_global, drained(FEATURES)),
        "bound method": (extractor.hook, lambda: [extractor.last]),
        "partial": (functools.partial(lambda store, module, args, out: store.append(out), kept), drained(kept)),
        "default argument": (to_default, drained(to_default.__defaults__[0])),
        "module of settings": (to_module_named, drained(CONFIG.features)),
        "namespace": (to_namespace, drained(space.out)),
        "weak dictionary": (
            lambda module, args, out: weak.update({module: out}),
            drained(weak, lambda w: list(w.values())),
        ),
        "attribute": (lambda module, args, out: setattr(attribute, "out", out), lambda: [attribute.out]),
        "module's attribute": (lambda module, args, out: setattr(module, "kept", out), None),
    }


def trained(model, taken, probed, **options):
    """Three steps on a loss that reads what the hook kept; the weights, and what is kept at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    monitor = tgp.Monitor(model, x[:4], layers=["1"], every=1, **options).follow(optimizer) if probed else None
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        features = taken()
        assert all(type(f) is torch.Tensor and f.requires_grad for f in features)
        (loss + sum(f.abs().mean() for f in features)).backward()
        optimizer.step()
    if probed:
        assert (monitor.failures, len(monitor.history)) == (0, 4), monitor.last_error
    return [p.detach().clone() for p in model.parameters()], len(features)


@pytest.mark.parametrize("name", hooks())
@shapes_unchecked()
def test_what_a_hook_fills_is_as_it_was(name):
    found = []
    for probed in (False, True):
        hook, taken = hooks()[name]
        model = network()
        model[1].register_forward_hook(hook)
        found.append(trained(model, taken or (lambda model=model: [model[1].kept]), probed))
    (plain, count), (watched, probed_count) = found
    assert count == probed_count
    assert all(map(torch.equal, plain, watched))
    assert COUNT == 0 or name != "global dict, list and number" or COUNT == 6  # three forward passes of each training


@pytest.mark.parametrize("kind", ["pre", "with kwargs", "of all modules"])
def test_other_kinds_of_hook(kind):
    kept, model = [], network()
    handle = {
        "pre": lambda: model[2].register_forward_pre_hook(lambda module, args: kept.extend(args)),
        "with kwargs": lambda: model[1].register_forward_hook(
            lambda module, args, kwargs, out: kept.append(out), with_kwargs=True
        ),
        "of all modules": lambda: nn.modules.module.register_module_forward_hook(
            lambda module, args, out: kept.append(out)
        ),
    }[kind]()
    kept.append("the user's")
    for engine in ("fused", "functorch", "vjp"):
        tgp.measure(model, torch.randn(4, 3), layers=["1"], engine=engine)
    handle.remove()
    assert kept == ["the user's"]


def test_a_forward_that_fills_lists_of_its_own_class_and_module():
    class Keeps(nn.Module):
        everybodys: dict = {}  # noqa: RUF012  (the point)
        count = 0

        def __init__(self):
            super().__init__()
            self.inner, self.nested = nn.Linear(3, 7), {"a": [(0, [])]}

        @torch.no_grad()
        def note(self, h):
            self.nested["a"][0][1].append(h)
            Keeps.count += 1
            Keeps.everybodys[Keeps.count] = h
            FEATURES.append(h)

        def forward(self, x):
            h = self.inner(x)
            self.note(h)
            return h

    model = Keeps()
    tgp.measure(model, torch.randn(4, 3), layers=["inner"])
    assert (Keeps.everybodys, Keeps.count, model.nested, FEATURES) == ({}, 0, {"a": [(0, [])]}, [])


def out_of_reach(module, args, out):
    globals()["OUT_OF_REACH"].append(out)


def out_of_reach_by_name(module, args, out):
    vars(sys.modules[__name__])["OUT_OF_REACH_BY_NAME"]["out"] = out


def out_of_reach_in_pairs(module, args, out):
    globals()["PAIRS"].append(("tanh", out.mean()))


@pytest.mark.parametrize(
    ("hook", "container"),
    [(out_of_reach, "OUT_OF_REACH"), (out_of_reach_by_name, "OUT_OF_REACH_BY_NAME"), (out_of_reach_in_pairs, "PAIRS")],
)
@shapes_unchecked()
def test_what_cannot_be_reached_is_taken_out_and_named_with_its_hook(hook, container):
    def taken():
        held = globals()[container]
        found = list(held.values()) if isinstance(held, dict) else list(held)
        held.clear()
        return [value[1] if isinstance(value, tuple) else value for value in found]

    models = [network(), network()]
    for model in models:
        model[1].register_forward_hook(hook)
    plain = trained(models[0], taken, probed=False)
    with pytest.warns(UserWarning, match=rf"the forward hook '{hook.__name__}' of '1' leaves(.|\n)*{container}, which"):
        watched = trained(models[1], taken, probed=True)
    assert plain[1] == watched[1] == 1
    assert all(map(torch.equal, plain[0], watched[0]))
    assert FOUND[models[1]] == [globals()[container]]


class Unseen:
    __slots__ = ("out",)


UNSEEN = Unseen()


def test_what_is_left_behind_where_only_a_part_can_be_taken_out_is_refused():
    def hook(module, args, out):
        globals()["OUT_OF_REACH"].append(out)
        globals()["UNSEEN"].out = out * 2

    model = network()
    model[1].register_forward_hook(hook)
    with (
        pytest.warns(UserWarning, match="OUT_OF_REACH, which"),
        pytest.raises(tgp.ProbeError, match="from where they cannot be taken back"),
    ):
        tgp.measure(model, torch.randn(4, 3), layers=["1"])


def test_what_a_function_remembers_is_its_own():
    @functools.lru_cache
    def mask(size):
        return torch.ones(size)

    model = network()
    model[1].register_forward_hook(lambda module, args, out: out * mask(7))
    tgp.measure(model, torch.randn(4, 3), layers=["1"])
    assert mask.cache_info().currsize == 1


def test_models_without_code_of_the_users_are_not_searched_for_leftovers():
    torchs, users = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Tanh()), network()
    users[0].register_forward_hook(to_default)
    assert not State(torchs).functions
    assert to_default in State(users).functions


# Generators, tensors and arrays


class Noise(nn.Module):
    """Adds what a generator of its own draws, a tensor and an array that it writes to in place, and global numbers."""

    def __init__(self):
        super().__init__()
        self.torchs = torch.Generator().manual_seed(1)
        self.others = {"new": [np.random.default_rng(2)], "old": np.random.RandomState(3), "python": random.Random(4)}
        self.mean, self.slow = torch.zeros(3), {"a": [np.zeros(3)]}

    def forward(self, x):
        drawn = torch.randn(3, generator=self.torchs)
        drawn = drawn + self.others["python"].random() + self.others["new"][0].random() + self.others["old"].rand()
        drawn = drawn + random.random() + np.random.rand() + torch.rand(3)
        self.mean.lerp_(drawn, 0.1)
        self.slow["a"][0] += self.mean.numpy()
        return x + 0.1 * drawn + self.mean + torch.from_numpy(self.slow["a"][0]).float()


@shapes_unchecked()
def test_generators_tensors_and_arrays_of_a_module_are_put_back_bit_for_bit():
    found = []
    for probed in (False, True):
        random.seed(5)
        np.random.seed(6)
        model = network().insert(0, Noise())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(7)
        x = torch.randn(5, 3)
        monitor = tgp.Monitor(model, x, layers=["2"], every=1)
        if probed:
            monitor.follow(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert (monitor.failures, len(monitor.history)) == (0, 4 * probed), monitor.last_error
        noise = model[0]
        found.append([*model.parameters(), noise.mean, torch.from_numpy(noise.slow["a"][0]), noise.torchs.get_state()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("engine", ["fused", "vjp"])
def test_every_pass_of_a_measurement_starts_from_the_same_state(engine):
    x = torch.randn(4, 3)
    options = {"layers": ["2"], "engine": engine, "estimator": tgp.Exact()}
    whole = tgp.measure(network().insert(0, Noise()), x, **options)["2"]
    chunked = tgp.measure(network().insert(0, Noise()), x, memory_budget=2000, **options)["2"]
    assert torch.allclose(whole.log_volume, chunked.log_volume, atol=1e-5)


def test_a_backward_pass_that_has_saved_a_tensor_written_in_place_is_left_alone():
    model = network().insert(0, Noise())
    model.append(nn.Linear(2, 2))
    mean = model[0].mean
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * mean).sum()  # saves the mean
    expected = mean.clone()
    tgp.measure(model, torch.randn(4, 3), layers=["2"])
    loss.backward()
    assert torch.equal(weight.grad, expected)


def test_a_large_tensor_written_in_place_is_refused_as_a_parameter_is(monkeypatch):
    monkeypatch.setattr("torchgeom_probe.model.state._LARGE_BYTES", 8)
    with pytest.raises(tgp.ProbeError, match=r"writes in place to a tensor of \[3\](.|\n)*register_buffer"):
        tgp.measure(network().insert(0, Noise()), torch.randn(4, 3), layers=["2"])


# The process


@pytest.mark.parametrize("parametrized", ["weight_norm", "orthogonal"])
@pytest.mark.parametrize("filled", [False, True])
def test_inside_of_cached_parametrizations_every_parameter_still_gets_its_gradient(parametrized, filled):
    gradients = []
    for probed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(getattr(parametrizations, parametrized)(nn.Linear(3, 3)), nn.Tanh())
        x = torch.randn(4, 3)
        with parametrize.cached():
            loss = model(x).sum() if filled else 0.0
            for engine in ("fused", "functorch", "vjp") if probed else ():
                tgp.measure(model, x, layers=["1"], engine=engine)
            (loss + model(x).sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


PRECISIONS = [(backend, op) for backend in ("generic", "cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")]
SETTINGS = {
    "new": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "new, for all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "old": lambda: torch.set_float32_matmul_precision("medium"),
    "both": lambda: (SETTINGS["old"](), setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")),
    "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


@pytest.mark.skipif(not hasattr(torch._C, "_get_fp32_precision_getter"), reason="torch >= 2.9 has it")
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_precision_of_float32_is_full_inside_and_as_it_was_outside(setting, monkeypatch):
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    keys = [key for key in PRECISIONS if key[0] != "generic" or key[1] == "all"]
    start = {key: read(*key) for key in keys}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", ())
    try:
        SETTINGS[setting]()
        before = {key: read(*key) for key in keys}
        assert before != start
        inside = []
        with tgp.model.isolation.measuring(nn.Linear(2, 3)):
            inside += [read(*key) for key in keys if key[1] in ("matmul", "conv", "rnn")]
        assert set(inside) <= {"none", "ieee"}
        assert {key: read(*key) for key in keys} == before
    finally:
        torch.set_float32_matmul_precision("highest")
        for key, value in start.items():
            write(*key, "none")
            if read(*key) != value:
                write(*key, value)


class Talkative(nn.Conv1d):
    """Writes to what only methods lead to that are called by name, by a computed one, or by torch alone."""

    by_name, by_attribute, by_string, by_beginning, by_torch = [], [], [], [], []

    def __init__(self):
        super().__init__(2, 3, 1)
        self.mode = "spoken_of_nowhere_else"

    def forward(self, x):
        self.said(len(x))
        getattr(self, "in_a_string")(len(x))  # noqa: B009
        getattr(self, self.mode)(len(x))
        getattr(self, f"of_{len(x)}")()
        return super().forward(x)

    def said(self, n):
        Talkative.by_name.append(n)

    def in_a_string(self, n):
        Talkative.by_string.append(n)

    def spoken_of_nowhere_else(self, n):
        Talkative.by_attribute.append(n)

    def of_2(self):
        Talkative.by_beginning.append(2)

    def _conv_forward(self, x, weight, bias):
        Talkative.by_torch.append(1)
        return super()._conv_forward(x, weight, bias)

    def saved(self):
        return _save_somewhere()


def _save_somewhere():
    return network


def test_a_method_is_followed_once_its_name_is_said():
    model = Talkative()
    tgp.measure(model, torch.randn(2, 2, 4), layers="", estimator=tgp.Subspace(2))
    assert not any(getattr(Talkative, name) for name in vars(Talkative) if name.startswith("by_"))
    followed = {function.__name__ for function in State(model).functions}
    assert {"forward", "said", "in_a_string", "spoken_of_nowhere_else", "of_2", "_conv_forward"} <= followed
    assert not followed & {"saved", "_save_somewhere", "network"}


def test_a_long_chain_of_methods_is_followed_to_its_end():
    space = {"__module__": "somebodys", "__name__": "somebodys"}
    lines = [f"def step_of_{i}(self, x): return self.step_of_{i + 1}(x)" for i in range(600)]
    exec("seen = []\n" + "\n".join(lines) + "\ndef step_of_600(self, x): self.seen.append(1); return x.sin()", space)
    space["forward"] = lambda self, x: self.step_of_600(x) if len(x) < 99 else self.step_of_0(x)
    model = type("Chain", (nn.Module,), space)()
    tgp.measure(model, torch.randn(2, 3), layers="", estimator=tgp.Exact())
    assert model.seen == []
    assert sum(function.__name__.startswith("step_of_") for function in State(model).functions) == 601


def test_modules_that_name_each_other_are_looked_at_once():
    names = [f"part_{i}" for i in range(8)]  # by every way from one to another it would take 8 ** 32 looks
    parts = [types.ModuleType(name) for name in names]
    for part in parts:
        vars(part).update(zip(names, parts, strict=True))
    vars(parts[7])["seen"] = []
    code = "def forward(x):\n    " + ".".join(names) + ".seen.append(1)\n    return x.sin()"
    exec(code, vars(parts[0]))
    model = nn.Identity()
    model.forward = parts[0].forward
    tgp.measure(model, torch.randn(2, 3), layers="", estimator=tgp.Exact())
    assert parts[7].seen == []


def test_counts_context_variables_and_what_learns_are_as_they_were():
    counted, at = itertools.count(), contextvars.ContextVar("at", default=0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    model[1].counter = itertools.count(7)

    def hook(module, args, out):
        next(counted)
        next(module.counter)
        at.set(at.get() + 1)
        model[0].bias.requires_grad_(not model[0].bias.requires_grad)

    model[1].register_forward_hook(hook)
    model(torch.zeros(1, 3))
    tgp.measure(model, torch.randn(4, 3), layers="", estimator=tgp.Exact())
    assert (next(counted), next(model[1].counter), at.get()) == (1, 8, 1)
    assert not model[0].bias.requires_grad


def test_queues_and_context_variables_that_nobody_set():
    waiting, unset = queue.Queue(), contextvars.ContextVar("unset")
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh())

    def hook(module, args, out):
        waiting.put(1)
        unset.set(1)

    model[1].register_forward_hook(hook)
    probe = tgp.GeometryProbe(model, layers="", estimator=tgp.Exact())
    for look in (probe.measure, probe.check, probe.cost):
        look(torch.randn(4, 3))
        assert (waiting.qsize(), waiting.unfinished_tasks) == (0, 0)
        assert unset.get(None) is None


def test_of_what_jaxtyping_decorates_the_function_inside_is_followed_and_not_its_own_stack():
    noted = [1]

    @jaxtyping.jaxtyped(typechecker=beartype.beartype)
    def note(h: jaxtyping.Float[torch.Tensor, "batch n"]) -> None:
        noted.append(h)

    model = network()
    model.note = note
    note(torch.zeros(1, 2))  # from now on the stack is there
    state = State(model)
    note(torch.zeros(1, 2))
    state.put_back()
    assert len(noted) == 2
    assert [function.__name__ for function in state.functions] == ["note"]
    assert all(found is not _shape_storage.memo_stack for found in state.identities.empty)


def test_a_slot_that_a_subclass_hides_behind_a_property_is_left_alone():
    class Number:
        __slots__ = ("digits",)

    class Constant(Number):
        digits = property(lambda self: [3, 1, 4])  # another list whenever it is asked

    model = network()
    model.pi = Constant()
    report = tgp.measure(model, torch.randn(4, 3), layers=["1"])
    assert report["1"].log_volume.isfinite().all()


def test_an_assert_that_pytest_rewrote_leads_to_no_state_of_pytest():
    class Asserts(nn.Module):
        def forward(self, x):
            assert x.ndim == 2
            return x.tanh()

    assert any(name.startswith("@pytest") for name in Asserts.forward.__code__.co_names)  # it is rewritten
    assert [function.__name__ for function in State(Asserts()).functions] == ["forward"]


OTHER_KINDS = {
    "sparse": (lambda: torch.eye(2).to_sparse(), lambda t: t._values().add_(1), torch.Tensor.to_dense),
    "sparse, other parts": (
        lambda: torch.eye(2).to_sparse(),
        lambda t: t.add_(torch.ones(2, 2).to_sparse()),
        torch.Tensor.to_dense,
    ),
    "compressed": (lambda: torch.eye(2).to_sparse_csr(), lambda t: t.values().add_(1), torch.Tensor.to_dense),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda t: t.add_(1),
        lambda t: torch.cat(t.unbind()),
    ),
    "subclass": (
        lambda: torch.zeros(2).as_subclass(type("Own", (torch.Tensor,), {})),
        lambda t: t.add_(1),
        lambda t: torch.Tensor(t.tolist()),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_tensors_of_other_kinds_are_put_back(kind, buffer):
    make, write, numbers = OTHER_KINDS[kind]

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("held", make()) if buffer else setattr(self, "held", make())

        def forward(self, x):
            write(self.held)
            return x.sin()

    model = Writes()
    before = numbers(model.held).clone()
    report = tgp.measure(model, torch.randn(3, 4), layers="", estimator="subspace:2")
    assert report[""].value.isfinite().all()
    assert torch.equal(numbers(model.held), before)


@pytest.mark.parametrize("buffer", [False, True])
def test_what_depends_on_x_written_into_a_tensor_of_the_model_is_put_back_and_stays_a_leaf(buffer):
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(64, 4)) if buffer else setattr(self, "seen", torch.zeros(64, 4))

        def forward(self, x):
            self.seen[: len(x)].copy_(x)
            return x.sin()

    model = Remembers()
    with tgp.GeometryProbe(model, layers="") as probe:
        x = torch.randn(3, 4)
        assert probe.measure(x)[""].value.isfinite().all()
        assert probe.check(x).ok
        assert tgp.measure(model, x, layers="", estimator="topk:2")[""].value.isfinite().all()
    assert not model.seen.any()
    assert model.seen.is_leaf


def test_a_view_into_which_x_is_written_is_as_it_was():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = torch.zeros(128, 4)[:64]

        def forward(self, x):
            self.seen[: len(x)].copy_(x)
            return x.sin()

    model = Remembers()
    assert tgp.measure(model, torch.randn(3, 4), layers="")[""].value.isfinite().all()
    assert tgp.measure(model, torch.randn(3, 4), layers="", estimator="topk:2")[""].value.isfinite().all()
    assert not model.seen.any()
    assert not model.seen.requires_grad


def test_an_object_of_torch_that_counts_is_as_it_was_and_whole():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.engine = torch.quasirandom.SobolEngine(4, scramble=True, seed=1)

        def forward(self, x):
            return x.sin() + self.engine.draw(1).to(x)

    model, other = Draws(), Draws()
    assert tgp.measure(model, torch.randn(3, 4), layers="")[""].value.isfinite().all()
    assert torch.equal(model(torch.zeros(1, 4)), other(torch.zeros(1, 4)))


def test_rows_that_an_embedding_shortens_are_as_long_as_before():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.readout = nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 3)

        def forward(self, index, x):
            return self.readout(self.embedding(index) + x)

    model = Embedded()
    before = model.embedding.weight.detach().clone()
    x = (torch.tensor([0, 1, 2]), torch.randn(3, 4))
    report = tgp.measure(model, x, layers="", estimator="exact", normalize=False)
    expected = torch.linalg.svdvals(model.readout.weight.detach().double()).log().sum().expand(3)
    torch.testing.assert_close(report[""].log_volume, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.embedding.weight, before)


def test_no_thread_of_the_progress_bars_stays_behind():
    before = set(threading.enumerate())
    tgp.measure(network(), torch.randn(3, 3), layers=["2"], progress=True)
    assert set(threading.enumerate()) == before


def test_tensors_beside_what_is_left_out_of_reach_are_kept_from_then_on():
    """The container is found after the first pass, with a tensor of the user's in it that a later pass writes to."""
    own = torch.zeros(7)
    holder = collections.deque([own])
    OUT_OF_REACH_BY_NAME["holder"] = holder

    def hook(module, args, out):
        found = globals()["OUT_OF_" + "REACH_BY_NAME"]["holder"]
        found.append(out)
        found[0].add_(1)

    model = network()
    model[0].register_forward_hook(hook)
    with tgp.GeometryProbe(model, layers=["2"]) as probe:
        with pytest.warns(UserWarning, match="taken out again"):
            probe.measure(torch.randn(3, 3))
        before = own.clone()
        probe.measure(torch.randn(3, 3))
    assert list(holder) == [own]
    assert torch.equal(own, before)
    del OUT_OF_REACH_BY_NAME["holder"]
