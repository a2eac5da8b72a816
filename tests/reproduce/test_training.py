"""Killed and started again, a training ends with the same bytes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.reproduce import training
from torchgeom_probe.reproduce.results import Results
from torchgeom_probe.reproduce.settings import Settings
from torchgeom_probe.reproduce.training import Training, View, train

pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")


STEPS_PER_EPOCH, EPOCHS = 5, 4


def noisy_net():
    return nn.Sequential(nn.Linear(2, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 3))


def task(calls=None, fail_at=None, kill_at=None):
    """Batches, dropout, noise, running statistics, momentum and a schedule: all that a checkpoint must carry."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(53, 2, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    steps = [0] if calls is None else calls

    def loss(model, batch):
        steps[0] += 1
        if steps[0] == fail_at:
            raise KeyboardInterrupt
        if steps[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(model(x[batch] + 0.1 * torch.randn(len(batch), 2)), y[batch])

    return Training(
        "noisy",
        model=noisy_net,
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        num_samples=53,
        batch_size=11,
        epochs=EPOCHS,
        snapshots=(1, 3),
        schedule=lambda progress: 1 - progress,
        evaluate=lambda model: {"accuracy": (model(x).argmax(1) == y).double().mean().item()},
        describe={"data": "noise"},
    )


def plane_view():
    plane = tgp.Plane(*torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), steps=6, coordinates="barycentric")
    return View("plane", plane, {"layers": ["2"], "batch_size": 16})


def settings(tmp_path, **options):
    return Settings(out=tmp_path, **options)


def go(tmp_path, **options):
    x = torch.zeros(3, 2) + torch.arange(3)[:, None]
    watch = {"x_probe": x, "layers": ["2"], "estimator": tgp.Exact(), "every": 3}
    results = Results("figure", "a test", settings(tmp_path), say=lambda line: None)
    (trained,) = results.train(task(**options), [plane_view()], watch=watch)
    results.describe(trained, plane_view())
    results.finish()
    return trained


def files(folder):
    """All but the event files (they carry wall-clock times) and the checkpoint (it carries the monitor's watch)."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "events" not in path.parts and path.name != "checkpoint.pt"
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    go(folder)
    return files(folder)


@pytest.mark.parametrize(
    ("fail_at", "every_epoch"), [(1, False), (7, True), (13, True), (14, False), (20, True)], ids=str
)
def test_stopped_anywhere_and_started_again_ends_with_the_same_bytes(
    fail_at, every_epoch, straight, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", -1.0 if every_epoch else 1e9)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, fail_at=fail_at)
    assert not (tmp_path / "figure").exists()
    calls = [0]
    torch.randn(3)  # another random state than the first time
    go(tmp_path, calls=calls)
    if every_epoch:  # the epoch in which it was stopped is made again: 20 steps in all, after that of the initial loss
        assert calls[0] == 20 - (fail_at - 2) // STEPS_PER_EPOCH * STEPS_PER_EPOCH
    assert files(tmp_path) == straight


def test_stopped_inside_a_scan_goes_on_with_it(straight, tmp_path, monkeypatch):
    real, measured = tgp.GeometryProbe.measure, []

    def failing(self, x, **options):
        measured.append(len(x))
        if len(measured) == 8:
            raise KeyboardInterrupt
        return real(self, x, **options)

    monkeypatch.setattr(tgp.GeometryProbe, "measure", failing)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    assert list(tmp_path.rglob("*.parts")) or list(tmp_path.rglob("plane/epoch_00000.safetensors"))
    go(tmp_path)
    assert files(tmp_path) == straight


SCRIPT = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[1])
    from reproduce import test_training as t
    t.training._CHECKPOINT_SECONDS = -1.0
    t.go(Path(sys.argv[2]), kill_at=int(sys.argv[3]))
    """
)


def _kill(tests, folder, at):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tests), str(folder), str(at)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_sigkill_and_again_in_other_processes(straight, tmp_path):
    tests = os.path.dirname(os.path.dirname(__file__))
    for at in (9, 4, -1):  # killed at the 9th step, at the 4th of what is left, then run to the end
        run = _kill(tests, tmp_path, at)
        assert run.returncode == (0 if at < 0 else -signal.SIGKILL), run.stderr
    assert files(tmp_path) == straight


def test_every_epoch_takes_every_sample_once_in_an_order_of_its_own(tmp_path):
    seen, of = [], task()

    def loss(model, batch):
        seen.append(batch)
        return of.loss(model, batch)

    train(dataclasses.replace(of, loss=loss), settings(tmp_path), say=lambda line: None)
    epochs = torch.stack([torch.cat(seen[1 + i : 1 + i + STEPS_PER_EPOCH]) for i in range(0, 20, STEPS_PER_EPOCH)])
    assert torch.equal(epochs.sort(1).values, torch.arange(53).expand(EPOCHS, -1))
    assert len(epochs.unique(dim=0)) == EPOCHS


def test_a_finished_training_is_loaded_not_repeated(tmp_path):
    go(tmp_path)
    calls = [0]
    trained = go(tmp_path, calls=calls)
    assert calls[0] == 0
    assert trained.epochs == (0, 1, 3, 4)
    assert [row["epoch"] for row in trained.history] == [0, 1, 3, 4]
    assert not torch.equal(trained.model(0)[0].weight, trained.model(4)[0].weight)
    with pytest.raises(tgp.ProbeError, match=r"no snapshot of epoch 2.\n.*\[0, 1, 3, 4\]"):
        trained.model(2)


def test_the_maps_are_in_tensorboard_and_the_callers_random_state_is_left_alone(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sampled = {"tensors": 0}  # all of them
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    go(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    events = EventAccumulator(str(tmp_path / "trainings" / "noisy" / "events"), size_guidance=sampled).Reload()
    assert [written.step for written in events.Tensors("geometry/map/noisy/plane")] == [0, 5, 15, 20]
    assert [point.step for point in events.Scalars("logvol/00_2")] == [0, 3, 6, 9, 12, 15, 18]


def test_another_training_in_the_folder_is_refused_or_replaced(tmp_path):
    go(tmp_path)
    before = files(tmp_path)
    with pytest.raises(tgp.ProbeError, match=r"holds another training: its seed, untrained differ \(seed=0, now 1\)"):
        train(task(), settings(tmp_path, seed=1), say=lambda line: None)
    assert files(tmp_path) == before
    (tmp_path / "trainings" / "noisy" / "mine.txt").write_text("kept")
    there = tmp_path / "trainings" / "noisy"
    with pytest.raises(tgp.ProbeError, match="holds another training"):  # a full one, also where its folder is named
        train(task(), settings(tmp_path, seed=1), folder=there, say=lambda line: None)
    written = json.loads((there / "settings.json").read_text())
    (there / "settings.json").write_text(json.dumps(written | {"quick": True}))
    train(task(), settings(tmp_path, seed=1), folder=there, say=lambda line: None)
    left = {path.name for path in (tmp_path / "trainings" / "noisy").rglob("*") if path.is_file()}
    assert "mine.txt" in left
    assert "epoch_00004.safetensors" not in left


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    broken = Training(
        "broken",
        model=lambda: nn.Linear(2, 2),
        loss=lambda model, batch: model(torch.full((4, 2), torch.nan)).sum(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        num_samples=4,
        epochs=2,
    )
    with pytest.raises(tgp.ProbeError, match=r"the loss is nan in epoch 1"):
        train(broken, settings(tmp_path), say=lambda line: None)


def test_a_readout_is_made_from_each_snapshot(tmp_path):
    made = []

    def readout(model):
        made.append(model)
        return nn.Linear(3, 4)

    view, of = plane_view(), dataclasses.replace(task(), readout=readout)
    trained = train(of, settings(tmp_path), views=[view], say=lambda line: None)
    first, again = trained.scan(view, 4), trained.scan(view, 4)
    assert len(made) == len(trained.epochs)
    assert torch.equal(first.entropy, again.entropy)
