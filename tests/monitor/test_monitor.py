"""A monitor in real training loops: it probes when it is due, leaves no trace, and never ends a run."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from annotations import shapes_unchecked
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators import Exact, Subspace, TopK
from torchgeom_probe.monitor import failures
from torchgeom_probe.monitor.monitor import Monitor
from torchgeom_probe.monitor.schedules import Budget, Every, LogSpaced
from torchgeom_probe.monitor.writers import CSVWriter, Writer
from torchgeom_probe.probe import GeometryProbe, measure
from torchgeom_probe.slices.scan import scan
from torchgeom_probe.slices.slice import Line


class Recorder(Writer):
    """A writer that keeps what it is given; fails at chosen steps."""

    def __init__(self, fails_at=()):
        self.written, self.closed, self.fails_at = [], 0, fails_at

    def write(self, step, report):
        if step in self.fails_at:
            raise OSError(28, "No space left on device")
        self.written.append((step, report))

    def close(self):
        self.closed += 1


class Raising(nn.Module):
    """Raises half-way through the forward pass, but only in eval mode: in a probe, and not in training."""

    broken = True

    def forward(self, x):
        if not self.training and self.broken:
            raise ValueError("a probe came by")
        return x


def network(*, raising=False, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        spectral_norm(nn.Conv2d(5, 7, 3)),
        nn.Dropout(0.3),
        Raising() if raising else nn.Identity(),
        nn.Flatten(),
        nn.Linear(7 * 3 * 3, 3),
    )


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 11), nn.Tanh(), nn.Linear(11, 3))


def train(model, optimizer, steps, after=None, size=(13, 4), seed=1):
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        x = torch.randn(*size, generator=generator)
        optimizer.zero_grad()
        (model(x + 0.01 * torch.randn_like(x)) ** 2).mean().backward()  # the noise draws on the global generator
        optimizer.step()
        if after is not None:
            after()


def everything(model, optimizer):
    """All that training leaves: weights, buffers, gradients, optimizer state, generators, modes, hooks."""
    state = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
    state |= {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for index, slots in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{k}": torch.as_tensor(v).clone() for k, v in slots.items()}
    state["rng.torch"] = torch.get_rng_state()
    state["rng.numpy"] = torch.as_tensor(np.random.get_state()[1].astype(np.int64))
    state["rng.python"] = torch.as_tensor(random.getstate()[1])
    modules = list(model.modules())
    state["modes"] = torch.tensor([m.training for m in modules])
    state["hooks"] = torch.tensor([[len(m._forward_hooks), len(m._forward_pre_hooks)] for m in modules])
    state["requires_grad"] = torch.tensor([p.requires_grad for p in model.parameters()])
    return state


@shapes_unchecked()  # what checks annotations draws from Python's generator
def run(how, *, raising=False):
    """Train twenty steps, probed as ``how`` says, from the same start."""
    model = network(raising=raising)
    random.seed(2)
    np.random.seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x_probe = torch.randn(5, 1, 5, 5, generator=torch.Generator().manual_seed(3))
    size = (6, 1, 5, 5)
    if how == "without":
        train(model, optimizer, 20, size=size)
        return everything(model, optimizer), None
    monitor = Monitor(model, x_probe, layers=["1", "3", "7"], every=4)
    if how == "follow":
        model[5].broken = False  # until training begins: what fails at once is the set-up
        monitor.follow(optimizer)
        model[5].broken = True
        train(model, optimizer, 20, size=size)
    else:
        monitor.probe_now()
        train(model, optimizer, 20, size=size, after=monitor.step)
    monitor.close()
    return everything(model, optimizer), monitor


@pytest.mark.parametrize("how", ["follow", "step"])
def test_twenty_training_steps_are_bit_identical_with_a_monitor(how):
    without, _ = run("without")
    probed, monitor = run(how)
    assert [step for step, _ in monitor.history] == [0, 4, 8, 12, 16, 20]
    assert monitor.failures == 0
    assert without.keys() == probed.keys()
    for key, value in without.items():
        assert torch.equal(value, probed[key]), key


def test_twenty_training_steps_are_bit_identical_when_every_probe_raises_half_way():
    without, _ = run("without", raising=True)
    with pytest.warns(RuntimeWarning, match="a probe came by"):
        probed, monitor = run("follow", raising=True)
    assert (monitor.probes, monitor.failures, len(monitor.history)) == (6, 5, 1)
    for key, value in without.items():
        assert torch.equal(value, probed[key]), key


def test_the_bit_comparison_can_fail():
    without, _ = run("without")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, optimizer, 20, size=(6, 1, 5, 5), after=lambda: torch.rand(1))
    assert not torch.equal(without["rng.torch"], everything(model, optimizer)["rng.torch"])


def test_every_report_is_what_measure_gives_at_that_step():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    x_probe = torch.randn(5, 4)
    expected = []
    with Monitor(model, x_probe, layers=["1", "2"], every=2, estimator=Subspace(k=3, seed=7)) as monitor:
        monitor.follow(optimizer)
        for _ in range(3):
            expected.append(measure(model, x_probe, layers=["1", "2"], estimator=Subspace(k=3, seed=7)))
            train(model, optimizer, 2)
    assert [step for step, _ in monitor.history] == [0, 2, 4, 6]
    for (_, found), wanted in zip(monitor.history, expected, strict=False):
        assert list(found) == ["1", "2"]
        for name in found:
            assert torch.equal(found[name].frame_volume, wanted[name].frame_volume)
    volumes = torch.stack([report["1"].frame_volume for _, report in monitor.history])
    assert (volumes.diff(dim=0).abs() > 0).all(), "training moved no weight"


def test_the_probe_batch_is_a_copy():
    model, x_probe = mlp(), torch.randn(5, 4)
    monitor = Monitor(model, x_probe, layers=["1"])
    before = monitor.probe_now()["1"].log_volume
    x_probe.zero_()
    assert torch.equal(monitor.probe_now()["1"].log_volume, before)


def test_the_directions_are_the_same_at_every_step_and_at_most_as_many_as_inputs():
    monitor = Monitor(mlp(), torch.randn(5, 4), layers=["1"])
    first, second = monitor.probe_now()["1"], monitor.probe_now()["1"]
    assert torch.equal(first.singular_values, second.singular_values)
    assert first.num_directions == 4
    wide = Monitor(nn.Sequential(nn.Linear(19, 11), nn.Tanh()), torch.randn(5, 19), layers=["1"])
    assert wide.probe_now()["1"].num_directions == 8


def test_a_model_of_several_inputs_and_options_pass_through():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 6)

        def forward(self, x, scale):
            return self.body(x) * scale

    torch.manual_seed(0)
    model, x, scale = Two(), torch.randn(5, 4), torch.tensor([3] * 5).view(5, 1)
    options = dict(layers=[""], estimator=Exact(), normalize=False, transform=lambda y: y[:, :5])
    report = Monitor(model, {"x": x, "scale": scale}, **options).probe_now()
    wanted = measure(model, {"x": x, "scale": scale}, **options)
    assert torch.equal(report[""].log_volume, wanted[""].log_volume)
    assert (report[""].num_features, report[""].normalized) == (5, False)


def test_a_probe_already_made_is_used_and_left_open():
    model, x = mlp(), torch.randn(5, 4)
    with GeometryProbe(model, layers=["1"], estimator=Exact()) as probe:
        with Monitor(probe, x, every=2) as monitor:
            assert monitor.model is model
            report = monitor.probe_now()
        assert torch.equal(report["1"].log_volume, probe.measure(x)["1"].log_volume)
        with pytest.raises(ProbeError, match="options"):
            Monitor(probe, x, layers=["2"])


def test_step_returns_the_report_when_it_probes():
    monitor = Monitor(mlp(), torch.randn(5, 4), layers=["1"], every=3)
    assert [monitor.step() is not None for _ in range(7)] == [False, False, True, False, False, True, False]
    assert monitor.steps == 7
    assert [step for step, _ in monitor.history] == [3, 6]


def test_gradient_accumulation_counts_updates():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, torch.randn(5, 4), layers=["1"], every=2).follow(optimizer) as monitor:
        for batch in range(8):
            model(torch.randn(3, 4)).sum().backward()
            if batch % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert monitor.steps == 4
    assert [step for step, _ in monitor.history] == [0, 2, 4]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_the_reports_are_of_real_updates_whoever_skips_them(every, fused):
    overflows = [False, True, False, False, True, True, False, True, False, False]
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    updates = 0
    volumes = {0: measure(model, torch.ones(2, 4), layers=["1"])["1"].log_volume}
    with Monitor(model, torch.ones(2, 4), layers=["1"], every=every).follow(optimizer) as monitor:
        for overflow in overflows:
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(3, 4)).sum() * (math.inf if overflow else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            if not overflow:
                updates += 1
                volumes[updates] = measure(model, torch.ones(2, 4), layers=["1"])["1"].log_volume
        assert monitor.steps == updates == 6
        assert monitor.state_dict()["step"] == 6
    assert [step for step, _ in monitor.history] == [*range(0, 7, every)]
    for step, report in monitor.history:
        assert torch.equal(report["1"].log_volume, volumes[step])


class Wrapped(torch.optim.Optimizer):
    """An optimizer as accelerate wraps it: it is one, and never initialised as one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class Handle:
    """A wrapper that is no optimizer at all, as those for several processes are."""

    def __init__(self, optimizer):
        self.inner, self.clip = optimizer, 1.0
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step


@pytest.mark.parametrize("wrap", [Wrapped, Handle, lambda o: Wrapped(Wrapped(o)), lambda o: Handle(Wrapped(o))])
@shapes_unchecked()
def test_of_a_wrapper_the_optimizer_inside_is_followed(wrap):
    weights, x_probe = [], torch.randn(5, 4)
    for probed in (False, True):
        model = mlp()
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
        if probed:
            monitor = Monitor(model, x_probe, layers=["1"], every=1).follow(optimizer)
        train(model, optimizer, 3)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (monitor.steps, monitor.failures, len(monitor.history)) == (3, 0, 4)
    assert torch.equal(*weights)


class SharpnessAware(torch.optim.Optimizer):
    """Steps twice by methods of its own; what updates the weights is its base optimizer."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)

    def step(self, closure=None):
        raise NotImplementedError

    def second_step(self):
        self.base_optimizer.step()


class Hand(torch.optim.SGD):
    """Updates the weights in a method of its own name."""

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= 0.1 * p.grad


@pytest.mark.parametrize("kind", [SharpnessAware, Hand])
def test_an_optimizer_whose_step_never_runs_is_named_when_the_monitor_closes(kind):
    model = mlp()
    optimizer = kind(model.parameters())
    monitor = Monitor(model, torch.randn(5, 4), layers=["1"], every=1).follow(optimizer)
    for _ in range(2):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.second_step()
    with pytest.warns(RuntimeWarning, match=rf"followed {kind.__name__}, whose step\(\) never ran"):
        monitor.close()
    assert monitor.steps == 0


def test_the_advice_for_it_works_and_an_untrained_model_is_no_reason_to_speak():
    model = mlp()
    optimizer = SharpnessAware(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Monitor(model, torch.randn(5, 4), layers=["1"]).follow(optimizer).close()
        with Monitor(model, torch.randn(5, 4), layers=["1"], every=1).follow(optimizer.base_optimizer) as monitor:
            model(torch.randn(3, 4)).sum().backward()
            optimizer.second_step()
    assert [step for step, _ in monitor.history] == [0, 1]


class Offloaded(nn.Module):
    """Its weights are on meta but while it runs, and are other parameters each time, as accelerate offloads them."""

    def __init__(self):
        super().__init__()
        self.inner, self._hf_hook = nn.Linear(4, 6), object()
        self.stored = {name: p.detach().clone() for name, p in self.inner.named_parameters()}
        self._place("meta")

    def _place(self, device):
        for name, value in self.stored.items():
            setattr(self.inner, name, nn.Parameter(value.to(device), requires_grad=False))

    def forward(self, x):
        self._place("cpu")
        out = self.inner(x)
        self._place("meta")
        return out


class Spare(nn.Module):
    """Has a module on meta that is not used."""

    def __init__(self):
        super().__init__()
        self.spare, self.inner = nn.Linear(2, 2, device="meta"), nn.Linear(4, 6)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("kind", [Offloaded, Spare])
def test_parameters_on_meta_are_no_failure(kind):
    torch.manual_seed(0)
    model = kind()
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with Monitor(model, torch.randn(5, 4), layers=["inner"], every=1, on_error="raise").follow(optimizer) as monitor:
        optimizer.step()
    assert len(monitor.history) == 2
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_closures_count_a_step_each_and_the_weights_are_the_same():
    def fit(monitored):
        model = mlp()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
        x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
        monitor = Monitor(model, x, layers=["1"], every=2)

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        if monitored:
            monitor.follow(optimizer)
        for _ in range(5):
            optimizer.step(closure)
        return model, monitor

    (bare, _), (followed, monitor) = fit(False), fit(True)
    assert monitor.steps == 5
    assert [step for step, _ in monitor.history] == [0, 2, 4]
    for one, other in zip(bare.parameters(), followed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_two_optimizers_have_a_monitor_each_or_one_of_them_is_followed():
    generator, critic = mlp(), mlp(1)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (generator, critic)]
    x = torch.randn(5, 4)
    monitors = [
        Monitor(model, x, layers=["1"], every=every).follow(optimizer)
        for model, optimizer, every in zip((generator, critic), optimizers, (1, 3), strict=True)
    ]
    for step in range(6):
        for model, optimizer in list(zip((generator, critic), optimizers, strict=True))[step % 2 :]:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert [[step for step, _ in monitor.history] for monitor in monitors] == [[0, 1, 2, 3], [0, 3, 6]]


def test_closing_detaches_from_the_optimizer_and_closes_the_writers():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    writers = [Recorder(), Recorder()]
    with Monitor(model, torch.randn(5, 4), layers=["1"], every=1, writer=writers) as monitor:
        monitor.follow(optimizer)
        train(model, optimizer, 2)
    train(model, optimizer, 3)
    monitor.close()
    assert not optimizer._optimizer_step_post_hooks
    assert monitor.steps == 2
    for writer in writers:
        assert [step for step, _ in writer.written] == [0, 1, 2]
        assert writer.closed == 1
    for act in (monitor.step, monitor.probe_now, lambda: monitor.follow(optimizer)):
        with pytest.raises(ProbeError, match="this monitor is closed"):
            act()


def test_writers_get_the_reports_of_the_history(tmp_path):
    monitor = Monitor(mlp(), torch.randn(5, 4), layers=["1"], every=2, writer=CSVWriter(tmp_path / "log.csv"))
    for _ in range(4):
        monitor.step()
    monitor.close()
    rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().split()[1:]]
    assert [(int(row[0]), row[1]) for row in rows] == [(2, "1"), (4, "1")]
    assert [float(row[5]) for row in rows] == [report["1"].statistics()["median"] for _, report in monitor.history]


def test_the_history_is_bounded():
    monitor = Monitor(mlp(), torch.randn(5, 4), layers=["1"], every=1, keep=3)
    for _ in range(5):
        monitor.step()
    assert [step for step, _ in monitor.history] == [3, 4, 5]


def test_of_the_history_only_the_last_report_can_start_another_warm():
    estimator = TopK(k=2, method="krylov")
    monitor = Monitor(mlp(), torch.randn(5, 4), layers=["1"], every=1, estimator=estimator)
    for _ in range(3):
        monitor.step()
    reports = [report["1"] for _, report in monitor.history]
    assert [report.right_singular_vectors is None for report in reports] == [True, True, False]
    assert torch.equal(reports[0].log_volume, reports[2].log_volume)


def test_an_unknown_option_is_refused_with_the_closest_of_all_that_there_are():
    with pytest.raises(ProbeError, match=r"'evry' is no option of Monitor; they are every, .*layers.*\n.* every="):
        Monitor(mlp(), torch.randn(5, 4), evry=3)
    with pytest.raises(ProbeError, match=r"Did you mean layers="):
        Monitor(mlp(), torch.randn(5, 4), layer=["1"])


@shapes_unchecked()
def test_a_failing_writer_is_shown_once_and_starves_no_other(monkeypatch):
    monkeypatch.setattr(
        failures, "_BETWEEN", [*failures._BETWEEN, "jaxtyping", "annotations"]
    )  # which checks annotations in tests
    full, healthy = Recorder(fails_at=(2, 3)), Recorder()
    monitor = Monitor(mlp(), torch.randn(5, 4), layers=["1"], every=1, writer=[full, healthy])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            monitor.step()
    (shown,) = [w for w in caught if issubclass(w.category, RuntimeWarning)]
    assert shown.filename == __file__, "the warning points into the training loop"
    assert "step 2: Recorder.write failed" in str(shown.message)
    assert "No space left on device" in str(shown.message)
    assert [step for step, _ in healthy.written] == [1, 2, 3, 4]
    assert [step for step, _ in full.written] == [1, 4]
    assert len(monitor.history) == 4
    assert monitor.failures == 2
    assert isinstance(monitor.last_error, OSError)


def test_on_error_raise_raises_and_still_accounts_for_the_time():
    monitor = Monitor(network(raising=True), torch.randn(5, 1, 5, 5), layers=["7"], every=1, on_error="raise")
    with pytest.raises(ProbeError, match="a probe came by"):
        monitor.step()
    assert monitor.failures == 1
    assert monitor.overhead > 0
    optimizer = torch.optim.SGD(monitor.model.parameters(), lr=0.1)
    fresh = Monitor(monitor.model, torch.randn(5, 1, 5, 5), layers=["7"], on_error="raise")
    with pytest.raises(ProbeError, match="a probe came by"):
        fresh.follow(optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_an_interrupt_is_not_swallowed(monkeypatch):
    monitor = Monitor(mlp(), torch.randn(5, 4), layers=["1"], every=1)

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(monitor._probe, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        monitor.step()


def test_maps_are_drawn_at_each_mth_probe_for_the_writers_that_take_them():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")

    class Album(Recorder):
        def write_map(self, tag, result, step):
            assert pyplot.fignum_exists(result.number)
            self.written.append((tag, step))

    album, plain = Album(), Recorder()
    monitor = Monitor(
        mlp(),
        torch.randn(5, 4),
        layers=["1"],
        every=1,
        writer=[plain, album],
        maps={"slice/plane": lambda model: pyplot.figure()},
        maps_every=2,
    )
    for _ in range(5):
        monitor.step()
    assert [entry for entry in album.written if entry[0] == "slice/plane"] == [("slice/plane", s) for s in (1, 3, 5)]
    assert len(plain.written) == 5
    assert not pyplot.get_fignums()
    with pytest.raises(ProbeError, match=r"no writer here draws.\nWrite:  writer='runs/experiment_1'"):
        Monitor(mlp(), torch.randn(5, 4), writer=plain, maps={"slice": lambda model: None})
    refused = pytest.raises(ProbeError, match=r"maps=\{'slice': ...\} takes a slice, or a function(.|\n)*got a Tensor")
    with shapes_unchecked(), refused:
        Monitor(mlp(), torch.randn(5, 4), writer=album, maps={"slice": torch.zeros(3)})


def test_a_slice_is_scanned_at_the_probes_layers_and_handed_to_the_writers_as_a_result():
    found = []

    class Album(Writer):
        def write_map(self, tag, result, step):
            found.append((tag, step, result))

    model, x = mlp(), torch.randn(5, 4)
    line, options = Line(x[0], x[1], steps=7), {"layers": ["1"], "normalize": False}
    Monitor(model, x, writer=Album(), maps={"line": line}, estimator=Exact(), on_error="raise", **options).probe_now()
    with GeometryProbe(model, **options) as probe:
        Monitor(probe, x, writer=[Album(), Album()], maps={"line": line}, on_error="raise").probe_now()
    wanted = scan(model, line, **options)
    assert [(tag, step) for tag, step, _ in found] == [("line", 0)] * 3
    for _, _, result in found:
        assert result.slice is line
        assert torch.equal(result.log_volume["1"], wanted.log_volume["1"])


class Accounts(Recorder):
    """A writer that takes single numbers too."""

    def __init__(self, fails_at=()):
        super().__init__(fails_at)
        self.numbers = []

    def write_scalar(self, tag, value, step):
        self.numbers.append((tag, step, value))


def test_a_writer_is_told_of_the_failures_and_of_the_share():
    writer = Accounts(fails_at=(2,))
    monitor = Monitor(mlp(), torch.randn(5, 4), layers=["1"], every=1, writer=[writer, Recorder()])
    monitor.probe_now()
    monitor.step()
    with pytest.warns(RuntimeWarning, match="No space left"):
        monitor.step()
    monitor.step()
    told = [(step, value) for tag, step, value in writer.numbers if tag == "geometry/failures"]
    assert told == [(0, 0.0), (1, 0.0), (3, 1.0)]  # at 2 it was the writer itself that failed
    shares = [(step, value) for tag, step, value in writer.numbers if tag == "geometry/overhead"]
    assert [step for step, _ in shares] == [1, 3]


def test_the_share_that_a_writer_is_told_counts_the_probe_that_it_is_told_in():
    class Slow(Accounts):
        def write(self, step, report):
            time.sleep(0.3)

    writer = Slow()
    monitor = Monitor(mlp(), torch.randn(5, 4), layers=["1"], every=1, writer=writer)
    monitor.writers = ()
    monitor.probe_now()
    monitor.writers = (writer,)
    time.sleep(0.3)
    monitor.step()
    (told,) = [value for tag, _, value in writer.numbers if tag == "geometry/overhead"]
    assert told == pytest.approx(monitor.overhead, abs=0.1)


def test_a_budget_is_not_asked_before_its_pause_is_over(monkeypatch):
    asked, due = [], Budget.due

    def noted(self, step, clock):
        asked.append(step)
        return due(self, step, clock)

    monkeypatch.setattr(Budget, "due", noted)
    model, x = nn.Linear(3, 4), torch.randn(2, 3)
    monitor = Monitor(model, x, max_overhead=1e-6)
    for _ in range(200):
        monitor.step()
    assert monitor.probes == 1
    assert asked == [1, 2]  # the first probe, and how long it has to be paid for
    assert monitor.steps == 200


@shapes_unchecked()  # numpy's integers, too
def test_short_forms_of_the_schedules():
    model, x = mlp(), torch.randn(5, 4)
    assert Monitor(model, x).schedule == Every(100)
    assert Monitor(model, x, every=np.int64(7)).schedule == Every(7)
    assert Monitor(model, x, max_overhead=0.02).schedule == Budget(0.02, every=1)
    assert Monitor(model, x, every=5, max_overhead=0.02).schedule == Budget(0.02, every=5)
    assert Monitor(model, x, schedule=LogSpaced(4)).schedule == LogSpaced(4)


@shapes_unchecked()  # which take their time
def test_a_real_loop_keeps_to_its_budget_and_reports_its_share():
    # A recording costs many probes, and is paid for longer than this loop takes.
    monitor = Monitor(mlp(), torch.randn(5, 4), layers=["1"], max_overhead=0.2)
    monitor.probe_now()
    begin = time.perf_counter()
    inside = longest = 0.0
    while time.perf_counter() - begin < 2.0:
        time.sleep(0.002)
        entered = time.perf_counter()
        if monitor.step() is not None:
            # However long a probe may take on a busy machine: it begins when the ones before are paid for.
            assert inside <= 0.2 * (entered - begin) + 0.01
            longest = max(longest, time.perf_counter() - entered)
            inside += time.perf_counter() - entered
    whole = time.perf_counter() - begin
    share = inside / whole
    assert monitor.probes >= 2
    assert share > 0.02
    assert (inside - longest) / whole < 0.3
    assert monitor.overhead == pytest.approx(share, abs=0.1)
    assert monitor.overhead > 0.9 * share - 0.01  # the first probe counts, too
    monitor.close()
    assert f"overhead={monitor.overhead:.2%}" in repr(monitor)
    stopped = monitor.overhead
    time.sleep(0.01)
    assert monitor.overhead == stopped


def test_what_torch_imports_at_its_first_use_is_no_cost_of_the_probes():
    code = (
        "import time, torch, torchgeom_probe.monitor.monitor as m\n"
        "monitor = m.Monitor(torch.nn.Linear(4, 5), torch.randn(3, 4), layers=[''], max_overhead=0.02)\n"
        "begin = time.perf_counter(); monitor.probe_now(); first = time.perf_counter() - begin\n"
        "assert monitor.state_dict()['clock']['last_probe_seconds'] < 0.5 * first, first"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Resuming


def test_a_resumed_run_goes_on_at_its_step():
    model, x_probe = mlp(), torch.randn(5, 4)
    first = Monitor(model, x_probe, layers=["1"], every=3, indices=[4, 8, 15, 16, 23])
    first.probe_now()
    for _ in range(4):
        first.step()
    time.sleep(0.01)
    state = first.state_dict()
    assert (state["step"], state["probes"], state["indices"]) == (4, 2, [4, 8, 15, 16, 23])
    second = Monitor(model, x_probe, layers=["1"], every=3)
    second.load_state_dict(state)
    assert second.overhead == pytest.approx(state["clock"]["probe_seconds"] / sum(
        state["clock"][k] for k in ("probe_seconds", "training_seconds")))  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    second.follow(optimizer)
    assert second.history == [], "a resumed run has its step-0 probe already"
    train(model, optimizer, 3)
    assert [step for step, _ in second.history] == [6]
    assert second.indices == [4, 8, 15, 16, 23]
    assert second.probes == 3


def test_the_state_survives_torch_save(tmp_path):
    monitor = Monitor(mlp(), torch.randn(5, 4), layers=["1"], max_overhead=0.5)
    monitor.step()
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    loaded, state = torch.load(tmp_path / "state.pt", weights_only=True), monitor.state_dict()
    assert loaded.pop("clock").keys() == state.pop("clock").keys()
    assert loaded == state


def test_other_probe_samples_are_refused_on_resuming():
    model, x_probe = mlp(), torch.randn(5, 4)
    state = Monitor(model, x_probe, layers=["1"], indices=[3, 1, 4, 1, 5]).state_dict()
    other = Monitor(model, x_probe + 1e-6, layers=["1"])
    with pytest.raises(ProbeError, match=r"saved with other probe samples(.|\n)*indices=\[3, 1, 4, 1, 5\]"):
        other.load_state_dict(state)
    other.load_state_dict(state, strict=False)
    Monitor(model, x_probe.clone(), layers=["1"]).load_state_dict(state)


def test_a_state_is_loaded_before_the_monitor_begins():
    model, x_probe = mlp(), torch.randn(5, 4)
    monitor = Monitor(model, x_probe, layers=["1"])
    state = monitor.state_dict()
    monitor.step()
    with pytest.raises(ProbeError, match=r"has begun: 1 steps(.|\n)*load_state_dict\(state\); monitor.follow"):
        monitor.load_state_dict(state)
    with pytest.raises(ProbeError, match=r"no state of a Monitor: it lacks \['step'"):
        Monitor(model, x_probe, layers=["1"]).load_state_dict({"probes": 3})


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is a whole number of 1 or more; got 0"),
        ({"every": 2.5}, "every is a whole number of 1 or more; got 2.5"),
        ({"every": True}, "every is a whole number of 1 or more; got True"),
        ({"max_overhead": 0.0}, "between 0 and 1; got 0.0"),
        ({"max_overhead": 2}, "between 0 and 1; got 2"),
        ({"max_overhead": 0.1, "every": -1}, "every is a whole number of 1 or more; got -1"),
        ({"schedule": Every(3), "every": 3}, "schedule= stands in place of every= and max_overhead="),
        ({"schedule": 5}, "a schedule has a method due"),
        ({"writer": 5}, "writer= takes a path, a SummaryWriter, a tgp.Writer, or a list of such; got 5"),
        (
            {"writer": [Recorder(), Recorder]},
            "writer= takes a path, a SummaryWriter, a tgp.Writer, or a list of such; got <cl",
        ),
        ({"on_error": "ignore"}, "on_error is 'warn' or 'raise'; got 'ignore'"),
        ({"keep": 0}, "keep is a whole number of 1 or more; got 0"),
        ({"maps_every": 0}, "maps_every is a whole number of 1 or more; got 0"),
        ({"layers": ["layer9"]}, "no layer 'layer9'"),
    ],
)
@shapes_unchecked()
def test_arguments_that_make_no_sense_are_refused_at_once(options, message):
    with pytest.raises(ProbeError, match=re.escape(message)):
        Monitor(mlp(), torch.randn(5, 4), **options)


def _unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file" / "log.csv")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, y, _: ((x, y), {}), r"x stands for 2 positional arguments of Sequential(.|\n)*x\[0\]"),
        (lambda x, y, _: ([x, x], {}), r"x stands for 2 positional arguments of Sequential"),
        (lambda x, y, _: ({"image": x, "label": y}, {}), r"the keyword arguments image, label(.|\n)*x\['image'\]"),
        (lambda x, y, _: (x[:, :3], {}), "the model's own forward pass fails on x of shape"),
        (lambda x, y, _: (y, {}), "x is of integer type"),
        (lambda x, y, _: (x, {"estimator": TopK(k=5)}), r"TopK\(k=5\): the Jacobian"),
        (lambda x, y, path: (x, {"writer": path}), "(?i)not a directory|file exists"),
    ],
)
@pytest.mark.parametrize("begun", [False, True], ids=["follow", "step"])
def test_a_mistake_of_the_set_up_is_raised_by_the_first_probe(make, message, begun, tmp_path):
    x_probe, options = make(torch.randn(5, 4), torch.zeros(5, dtype=torch.long), _unwritable(tmp_path))
    model = mlp()
    monitor = Monitor(model, x_probe, every=1, **{"layers": ["1"], **options})
    with pytest.raises((ProbeError, OSError), match=message):
        monitor.step() if begun else monitor.follow(torch.optim.SGD(model.parameters(), lr=0.1))
    assert monitor.failures == 1
    with pytest.warns(RuntimeWarning, match="training goes on"):
        monitor.step()


def test_a_model_that_cannot_be_measured_ends_no_training_not_even_at_the_first_probe():
    class Cut(nn.Module):
        def forward(self, x):
            return x * x.max().item()

    model = mlp().append(Cut())
    optimizer = torch.optim.SGD(model[:3].parameters(), lr=0.1)
    with pytest.warns(RuntimeWarning, match="takes numbers that depend on the input out of torch"):
        monitor = Monitor(model, torch.randn(5, 4), layers=["3"], every=1).follow(optimizer)
    monitor.close()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn])
def test_a_batch_that_is_not_dense_is_refused_with_advice_that_works(make):
    x = torch.randn(5, 4)
    with pytest.raises(ProbeError, match=r"a tensor of layout(.|\n)*x.to_dense\(\)"):
        Monitor(mlp(), make(x))
    with pytest.raises(ProbeError, match=r"a tensor of layout(.|\n)*x.to_dense\(\)"):
        measure(mlp(), make(x))
    measure(mlp(), make(x).to_dense(), layers=["1"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_batch_is_refused_with_advice_that_works(layout):
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=layout)
    for act in (Monitor, measure):
        with pytest.raises(ProbeError, match=r"a nested tensor(.|\n)*x.unbind\(\)"):
            act(mlp(), x)
    for sample in x.unbind():
        measure(mlp(), sample[None], layers=["1"])
    measure(mlp(), torch.nested.to_padded_tensor(x, 0.0), layers=["1"])


@pytest.mark.parametrize(
    ("x_probe", "message"),
    [
        (None, "got a NoneType"),
        (torch.zeros(0, 4), "a tensor of shape [0, 4]"),
        (torch.tensor(1.0), "a tensor of shape []"),
        ([], "got a list"),
        (torch.zeros(3, 4, device="meta"), "and no numbers"),
    ],
)
def test_a_probe_batch_of_nothing_is_refused(x_probe, message):
    with pytest.raises(
        ProbeError, match=r"x_probe is (the batch of samples|on the device)(.|\n)*" + re.escape(message)
    ):
        Monitor(mlp(), x_probe)


def test_counting_twice_is_refused():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, torch.randn(5, 4), layers=["1"]).follow(optimizer)
    with pytest.raises(ProbeError, match=r"step\(\) would count them twice"):
        monitor.step()
    with pytest.raises(ProbeError, match="follows an optimizer already"):
        monitor.follow(optimizer)
    monitor.close()


@shapes_unchecked()
def test_following_what_is_no_optimizer_is_refused():
    monitor = Monitor(mlp(), torch.randn(5, 4), layers=["1"])
    several = Handle(torch.optim.SGD(monitor.model.parameters(), lr=0.1))
    several.other = torch.optim.SGD(monitor.model.parameters(), lr=0.1)
    for odd in (nn.Linear(1, 1), several, None):
        with pytest.raises(
            ProbeError, match=rf"takes a torch.optim.Optimizer, not a {type(odd).__name__}.\nCall  monitor.s"
        ):
            monitor.follow(odd)
    assert monitor.history == []
