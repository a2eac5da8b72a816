"""The callback in real Trainers: when it probes, where the reports go, what a resumed run continues."""

from __future__ import annotations

import csv
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pl = pytest.importorskip("pytorch_lightning")
from pytorch_lightning.callbacks import ModelCheckpoint  # noqa: E402
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from torchgeom_probe.integrations.lightning import GeometryCallback, _callback_bases  # noqa: E402

import torchgeom_probe as tgp  # noqa: E402

pytestmark = [
    # Lightning's own remarks on small loaders, missing pieces and its use of torch's internals.
    pytest.mark.filterwarnings(r"ignore:.*does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings(r"ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings(r"ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings(r"ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings(r"ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]


class Classifier(pl.LightningModule):
    """Batch norm, dropout and a validation loop: a footprint would show."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(5, 13), nn.BatchNorm1d(13), nn.Tanh(), nn.Dropout(0.2), nn.Linear(13, 3))
        self.probed_in = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self(batch[0]).float(), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data(seed=7, size=66):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def loader(**options):
    return DataLoader(data(**options), batch_size=11)


X = data().tensors[0][:7]


def fit(callback, tmp_path, *, module=None, validate=False, ckpt_path=None, **options):
    module = Classifier() if module is None else module
    settings = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
        "callbacks": [] if callback is None else [callback],
    }
    trainer = pl.Trainer(**settings | options)
    torch.manual_seed(1)
    trainer.fit(module, loader(), loader(seed=8) if validate else None, ckpt_path=ckpt_path)
    return trainer, module


def steps(callback):
    return [step for step, _ in callback.history]


def probe(**options):
    return GeometryCallback(**{"layers": ["net.0", "net.2"], "every": 4, "on_error": "raise"} | options)


def scalars(log_dir, tag):
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_it_probes_at_the_start_every_n_steps_and_at_the_end(tmp_path):
    callback = probe(x_probe=X)
    _, module = fit(callback, tmp_path)
    assert steps(callback) == [0, 4, 6]
    last = callback.history[-1][1]
    now = tgp.measure(module, X, layers=["net.0", "net.2"])
    for layer in now:
        assert torch.equal(now[layer].log_volume, last[layer].log_volume)
    assert callback.monitor.failures == 0


@pytest.mark.parametrize("validate", [False, True])
def test_the_trained_weights_are_bit_identical_to_a_run_without_it(tmp_path, validate):
    options = {"validate": validate, "max_epochs": 2, "num_sanity_val_steps": 2 if validate else 0}
    _, without = fit(None, tmp_path, **options)
    _, probed = fit(probe(every=1), tmp_path, **options)
    for key, value in without.state_dict().items():
        assert torch.equal(value, probed.state_dict()[key]), key


def test_gradient_accumulation_probes_once_an_update(tmp_path):
    callback = probe(x_probe=X, every=1)
    trainer, _ = fit(callback, tmp_path, accumulate_grad_batches=2)
    assert trainer.global_step == 3
    assert steps(callback) == [0, 1, 2, 3]


def test_epoch_ends(tmp_path):
    callback = probe(x_probe=X, every=4, epoch_ends=True)
    fit(callback, tmp_path, max_epochs=2)
    assert steps(callback) == [0, 4, 6, 8, 12]


def test_two_optimizers_in_a_step_do_not_jump_over_a_probe(tmp_path):
    class Two(Classifier):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 4)]

        def training_step(self, batch, index):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

    callback = probe(x_probe=X, every=5)
    trainer, _ = fit(callback, tmp_path, module=Two())
    assert trainer.global_step == 12
    assert steps(callback) == [0, 6, 10, 12]


def test_by_default_it_takes_the_first_training_batch(tmp_path):
    callback = probe(samples=7)
    fit(callback, tmp_path)
    assert torch.equal(callback.monitor.x_probe, X)
    assert steps(callback) == [0, 4, 6]


def test_the_sanity_check_gives_the_validation_batch_and_is_not_probed(tmp_path):
    callback = probe(samples=3)
    trainer, _ = fit(callback, tmp_path, validate=True, num_sanity_val_steps=2)
    assert torch.equal(callback.monitor.x_probe, data(seed=8).tensors[0][:3])
    assert steps(callback) == [0, 4, 6]
    trainer.validate(trainer.model, loader(), verbose=False)
    assert steps(callback) == [0, 4, 6]
    fresh = probe()
    trainer.callbacks.append(fresh)
    trainer.validate(trainer.model, loader(), verbose=False)
    assert fresh.state_dict() == {}
    assert fresh._chosen is None


@pytest.mark.parametrize(
    "batch",
    [X, (X, 1), [[X, X + 1], 1, ("a", "b")], {"image": X, "label": 1}, [{"pixel_values": X}], {"x": X, "image": 2}],
)
def test_the_input_of_a_batch(batch):
    assert torch.equal(GeometryCallback(samples=2)._first_samples(batch), X[:2])


@pytest.mark.parametrize("batch", [{"tokens": X}, [], "text", 3])
def test_a_batch_without_a_clear_input_is_refused(batch):
    with pytest.raises(tgp.ProbeError, match=r"not clear where in a \w+.*(\n.*)GeometryCallback\(inputs="):
        GeometryCallback()._first_samples(batch)


def test_inputs_and_a_submodule_by_name_or_by_function(tmp_path):
    for model in ("net", lambda module: module.net):
        callback = probe(model=model, layers=["2"], inputs=lambda batch: 2 * batch[0], samples=7)
        fit(callback, tmp_path)
        assert torch.equal(callback.monitor.x_probe, 2 * X)
        assert list(callback.history[0][1]) == ["2"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
@pytest.mark.filterwarnings(r"ignore:.*is supported for historical reasons")
def test_precision_plugins(tmp_path, precision):
    callback = probe(x_probe=X)
    _, module = fit(callback, tmp_path, precision=precision)
    assert steps(callback) == [0, 4, 6]
    assert callback.monitor.x_probe.dtype == module.net[0].weight.dtype
    volume = callback.history[-1][1]["net.2"].log_volume
    exact = tgp.measure(module.double(), X.double(), layers=["net.2"])
    difference = (volume - exact["net.2"].log_volume).abs().max()
    assert difference < (0.2 if precision == "bf16-true" else 1e-5)


def test_a_compiled_module(tmp_path):
    module = Classifier()
    module.compile(backend="eager")
    callback = probe(x_probe=X)
    fit(callback, tmp_path, module=module)
    assert steps(callback) == [0, 4, 6]


def test_events_in_several_loggers(tmp_path):
    tensorboard = TensorBoardLogger(tmp_path / "tb", version=0)
    table = CSVLogger(tmp_path / "csv", version=0)
    callback = probe(x_probe=X)
    fit(callback, tmp_path, logger=[tensorboard, table], log_every_n_steps=2)
    medians = [(step, pytest.approx(report["net.2"].statistics()["median"])) for step, report in callback.history]
    assert scalars(tensorboard.log_dir, "logvol/01_net.2") == medians
    assert [step for step, _ in scalars(tensorboard.log_dir, "loss")] == [1, 3, 5]
    with (Path(table.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["logvol/01_net.2"]]
    assert [(int(row["step"]), float(row["logvol/01_net.2"])) for row in rows] == medians
    assert {"sigma_max/00_net.0", "sigma_max/01_net.2"} <= set(rows[0])


def test_a_writer_of_ones_own_takes_the_place_of_the_loggers(tmp_path):
    logger = TensorBoardLogger(tmp_path, version=0)
    callback = probe(x_probe=X, writer=tgp.CSVWriter(tmp_path / "geometry.csv"))
    fit(callback, tmp_path, logger=logger)
    lines = (tmp_path / "geometry.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [
        [str(step), layer] for step in (0, 4, 6) for layer in ("net.0", "net.2")
    ]
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["scalars"]
    assert not [tag for tag in tags if tag.startswith("logvol")]


def test_fast_dev_run_and_no_logger(tmp_path):
    for options in ({"fast_dev_run": True, "logger": True}, {"logger": False, "max_steps": 1}):
        callback = probe(x_probe=X)
        fit(callback, tmp_path, **options)
        assert steps(callback) == [0, 1]
    assert not list(tmp_path.rglob("events*"))


@pytest.mark.parametrize("chosen", [False, True])
def test_a_resumed_run_continues_the_events_without_doubles(tmp_path, chosen):
    """Six steps with a checkpoint at step 4, killed; then resumed from there up to step 12."""

    def run(max_epochs, ckpt_path=None):
        callback = probe(x_probe=None if chosen else X, every=2, samples=7)
        saving = ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=4, save_top_k=-1)
        logger = TensorBoardLogger(tmp_path / "tb", version=0)
        fit(
            callback,
            tmp_path,
            logger=logger,
            callbacks=[callback, saving],
            enable_checkpointing=True,
            max_epochs=max_epochs,
            ckpt_path=ckpt_path,
            log_every_n_steps=1,
        )
        return callback, logger.log_dir

    first, _ = run(1)
    assert steps(first) == [0, 2, 4, 6]
    saved = tmp_path / "saved" / "epoch=0-step=4.ckpt"
    state = torch.load(saved, weights_only=True)["callbacks"][first.state_key]
    assert state["monitor"]["step"] == state["monitor"]["last_probed"] == 4
    assert state["monitor"]["x_probe"].startswith("float32[7, 5]:")
    assert (state["x_probe"] is not None) == chosen

    second, log_dir = run(2, saved)
    assert steps(second) == [4, 6, 8, 10, 12]
    assert torch.equal(second.monitor.x_probe, first.monitor.x_probe)
    # Two event files of one second have no order.
    assert sorted(step for step, _ in scalars(log_dir, "logvol/01_net.2")) == [0, 2, 4, 6, 8, 10, 12]
    assert [step for step, _ in scalars(log_dir, "loss")] == list(range(12))


def test_a_checkpoint_with_other_samples_is_refused(tmp_path):
    first = probe(x_probe=X)
    trainer, _ = fit(first, tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(tgp.ProbeError, match="saved with other probe samples"):
        fit(probe(x_probe=X + 1), tmp_path, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")


def test_a_checkpoint_of_a_run_without_the_callback(tmp_path):
    trainer, _ = fit(None, tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback = probe(x_probe=X)
    fit(callback, tmp_path, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert steps(callback) == [6, 8, 12]


def test_a_second_fit_goes_on_and_a_new_trainer_starts_anew(tmp_path):
    callback = probe(x_probe=X)
    trainer, module = fit(callback, tmp_path)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert steps(callback) == [0, 4, 6, 8, 12]
    fit(callback, tmp_path)
    assert steps(callback) == [0, 4, 6]


def test_maps_are_images_and_a_trial_run_draws_none(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []

    def draw(model):
        drawn.append(model)
        return figure()

    logger = TensorBoardLogger(tmp_path, version=0)
    callback = probe(x_probe=X, maps={"map": draw}, maps_every=2)
    _, module = fit(callback, tmp_path, logger=logger)
    assert drawn == [module, module]
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("map")] == [0, 6]
    fit(probe(x_probe=X, maps={"map": draw}), tmp_path, fast_dev_run=True)
    assert len(drawn) == 2


def test_it_travels_to_spawned_processes():
    callback = pickle.loads(pickle.dumps(probe(x_probe=X, epoch_ends=True)))
    assert isinstance(callback, pl.Callback)
    assert torch.equal(callback.x_probe, X)
    assert not hasattr(callback, "log"), "Lightning overwrites that name on every callback"


def test_two_callbacks_have_states_of_their_own(tmp_path):
    first, second = probe(x_probe=X), probe(x_probe=X, layers=["net.4"])
    assert first.state_key != second.state_key
    assert probe(layers=nn.Linear).state_key == "GeometryCallback{'model': '', 'layers': Linear}"
    fit(None, tmp_path, callbacks=[first, second])
    assert steps(first) == steps(second) == [0, 4, 6]


def test_an_exception_in_training_closes_the_writers(tmp_path):
    class Fails(Classifier):
        def on_train_batch_end(self, outputs, batch, index):
            if index == 2:
                raise RuntimeError("training broke")

    class Recorder(tgp.Writer):
        closed = 0

        def close(self):
            self.closed += 1

    recorder = Recorder()
    with pytest.raises(RuntimeError, match="training broke"):
        fit(probe(x_probe=X, writer=recorder), tmp_path, module=Fails())
    assert recorder.closed == 1


def test_a_probe_that_fails_does_not_end_the_training(tmp_path):
    class Fussy(Classifier):
        def forward(self, x):
            if not self.training and self.global_step:  # what fails at once is the set-up, and is raised
                raise ValueError("a probe came by")
            return super().forward(x)

    callback = probe(x_probe=X, on_error="warn")
    with pytest.warns(RuntimeWarning, match="a probe came by"):
        trainer, _ = fit(callback, tmp_path, module=Fussy())
    assert trainer.global_step == 6
    assert (callback.monitor.failures, len(callback.history)) == (2, 1)


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(
        tgp.ProbeError, match=r"of GeometryCallback; they are every, .*estimator.*\nDid you mean every="
    ):
        GeometryCallback(evry=3)
    with pytest.raises(tgp.ProbeError, match="samples is a whole number of 1 or more; got 0"):
        GeometryCallback(samples=0)
    with pytest.raises(tgp.ProbeError, match=r"no layer 'net\.9'"):
        fit(probe(x_probe=X, layers=["net.9"]), tmp_path)
    with pytest.raises(tgp.ProbeError, match=r"model='backbone' is no submodule of this Classifier; it has 'net'"):
        fit(probe(x_probe=X, model="backbone"), tmp_path)


def test_sharded_strategies_are_refused_by_name():
    class FSDPStrategy:
        pass

    class Trainer:
        strategy = FSDPStrategy()

    with pytest.raises(tgp.ProbeError, match=r"strategy FSDPStrategy no rank has the whole model"):
        GeometryCallback(x_probe=X).on_train_start(Trainer(), Classifier())


def test_without_lightning_the_error_has_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, "lightning.pytorch", raising=False)
    with pytest.raises(tgp.ProbeError, match=re.escape("pip install 'torchgeom_probe[lightning]'")):
        _callback_bases()


MIXED = """
import sys, torch
import {first}
{then}
from torchgeom_probe.integrations.lightning import GeometryCallback
import {trainer} as pl

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh())
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, index):
        return self(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

callback = GeometryCallback(layers=["net.1"], every=2, on_error="raise")
trainer = pl.Trainer(max_steps=5, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, accelerator="cpu", callbacks={given})
trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(40, 5), batch_size=4))
print([step for step, _ in callback.history], callback.__class__.__mro__)
"""


@pytest.fixture(scope="session")
def other_package(tmp_path_factory):
    """``lightning.pytorch``, made as its authors make it: the same sources, under the other name."""
    root = tmp_path_factory.mktemp("packages")
    source = Path(pl.__file__).parent
    target = root / "lightning" / "pytorch"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "lightning" / "__init__.py").write_text("")
    for file in target.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub(r"\bpytorch_lightning\b", "lightning.pytorch", text), encoding="utf-8")
    return root


PACKAGES = ("pytorch_lightning", "lightning.pytorch")
# Outside of a list a Trainer takes callbacks of its own package only: then that one has to be imported first.
MIXES = [
    *((trainer, first, "", "[callback]") for trainer in PACKAGES for first in (*PACKAGES, "torch")),
    *((package, package, "", "callback") for package in PACKAGES),
    ("lightning.pytorch", "torch", "import lightly.loss", "[callback]"),
    ("lightning.pytorch", "lightning.pytorch", "import lightly.loss", "callback"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "first", "then", "given"), MIXES)
def test_a_trainer_of_either_package(other_package, tmp_path, trainer, first, then, given):
    code = textwrap.dedent(MIXED).format(first=first, then=then, trainer=trainer, given=given)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(other_package), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("[0, 2, 4, 5]")
