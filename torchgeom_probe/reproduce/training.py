"""A training that resumes, and the slices along which its snapshots are scanned.

Killed at any moment and started again, everything but the event files ends with the same bytes: order and noise of a
training step are functions of (seed, step) alone, so a checkpoint needs no random state; every file is moved into place
whole; no time of day and no seconds are stored.  (On a GPU as far as its kernels repeat themselves.)
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.files import digest, finite_or_null, write_atomically, write_json
from torchgeom_probe.monitor.monitor import Monitor
from torchgeom_probe.monitor.writers import CSVWriter, Writer
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.reproduce.settings import Say, Settings
from torchgeom_probe.shapes import Float, Int, Tensor
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.scan import scan
from torchgeom_probe.slices.slice import Line, Plane

# Between two checkpoints: what a kill can cost, in seconds.
_CHECKPOINT_SECONDS = 20.0

# All that a training writes into its folder.
_FILES = (
    "settings.json", "checkpoint.pt", "history.json", "geometry.csv", "epoch_*.pt", "events/*.geometry",
    "*/epoch_*.safetensors", "*/epoch_*.safetensors.parts",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Training:
    """What is trained, and how: enough to do it again, bit for bit.

    Args:
        name: of its folder; trainings of one name have one meaning.
        model: makes the network; called with the global generator seeded, on the CPU; moved to the device after.
        loss: (model, batch) → scalar; ``batch`` are indices [b] on the device.  Noise (augmentations, dropout) may be
            drawn from torch's global generator, which is seeded anew before every step.
        optimizer: parameters → optimizer.
        num_samples: in the training set; each epoch has its own order of them.
        epochs: passes over it.
        batch_size: samples a step.
        snapshots: epochs at which the network is kept; 0 (before training) and the last one always are.
        schedule: factor of the learning rate as a function of progress in [0, 1).
        evaluate: numbers of a network, at every snapshot.
        describe: what is said of it in the results: data, width, learning rate, ….  JSON values.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Int[Tensor, " batch"]], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    num_samples: int
    epochs: int
    batch_size: int = 64
    snapshots: Sequence[int] = ()
    schedule: Callable[[float], float] = lambda progress: 1.0
    evaluate: Callable[[nn.Module], Mapping[str, float]] = lambda model: {}
    describe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> tuple[int, ...]:
        """The epochs whose network is kept, first and last included, ascending."""
        return (0, *sorted({epoch for epoch in self.snapshots if 0 < epoch < self.epochs}), self.epochs)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return -(-self.num_samples // self.batch_size)

    @property
    def described(self) -> dict[str, Any]:
        """What results and settings say of it."""
        sizes = {name: getattr(self, name) for name in ("epochs", "batch_size", "num_samples")}
        return {**sizes, **self.describe}


@torch.no_grad()
def accuracy(model: nn.Module, x: Float[Tensor, "samples ..."], labels: Int[Tensor, " samples"]) -> float:
    """Share of the samples that the model, whose output is logits, gets right.

    >>> accuracy(nn.Identity(), torch.eye(4), torch.tensor([0, 1, 2, 0]))
    0.75
    """
    parts = zip(x.split(250), labels.split(250), strict=True)
    return sum((model(part).argmax(1) == y).sum().item() for part, y in parts) / len(labels)


@dataclass(frozen=True, eq=False)
class View:
    """A slice, how it is scanned, and how it is drawn.

    Args:
        name: of its files.
        slice: a :class:`~torchgeom_probe.Line` or :class:`~torchgeom_probe.Plane`.
        options: those of :func:`~torchgeom_probe.scan`.  Points go in chunks of 64 where they give no ``batch_size``: a
            number, not the memory of the moment, so that two runs round alike.
        readout: makes the readout (the model's output → logits) of one snapshot; None: the output is the logits.
        epochs: which of the training's snapshots are scanned; None: all.
        class_names: the name of each class index.
        images: the samples as pictures, as for the drawings of scans.
    """

    name: str
    slice: Line | Plane
    options: Mapping[str, Any]
    readout: Callable[[nn.Module], nn.Module] | None = None
    epochs: Sequence[int] | None = None
    class_names: Sequence[str] | None = None
    images: Sequence[Tensor] | Literal["auto"] | None = "auto"


class Trained:
    """A training that is done: its snapshots, their numbers and their scans.

    Attributes:
        name, epochs: the training's, and the epochs of the snapshots, 0 first.
        folder: where everything is.
        history: per snapshot ``{"epoch": ..., "loss": ..., **evaluate(model)}``.
    """

    def __init__(self, training: Training, settings: Settings, folder: Path) -> None:
        self.training, self.settings, self.folder = training, settings, folder
        self.name, self.epochs = training.name, training.kept
        self.history: list[dict[str, Any]] = []
        self._readouts: dict[tuple[int, Any], nn.Module] = {}

    @property
    def three(self) -> list[int]:
        """The epochs of the first, the middle and the last snapshot."""
        return [self.epochs[0], self.epochs[len(self.epochs) // 2], self.epochs[-1]]

    def model(self, epoch: int) -> nn.Module:
        """The network after ``epoch`` epochs, on the settings' device."""
        if epoch not in self.epochs:
            raise ProbeError(f"{self.name} has no snapshot of epoch {epoch}.\nIt has those of {list(self.epochs)}.")
        model = self._untrained()
        model.load_state_dict(_loaded(self._snapshot(epoch), self.settings))
        return model.eval()

    def scan(self, view: View, epoch: int) -> SliceScan:
        """Scan the network of ``epoch`` along ``view``, or load what was scanned before."""
        model, key = self.model(epoch), (epoch, view.readout)
        if view.readout is not None and key not in self._readouts:
            with _seeded(self.settings):
                self._readouts[key] = view.readout(model)
        options = {"batch_size": 64, **view.options, "readout": self._readouts.get(key)}
        return scan(model, view.slice, path=self._scanned(view, epoch), **options)

    def scans(self, view: View, epochs: Iterable[int] | None = None) -> dict[str, SliceScan]:
        """Scan some epochs, None: all snapshots, along ``view``: "epoch 0" → scan, in their order."""
        chosen = self.epochs if epochs is None else epochs
        return {f"epoch {epoch}": self.scan(view, epoch) for epoch in chosen}

    def _untrained(self) -> nn.Module:
        with _seeded(self.settings):
            return self.training.model().to(self.settings.device)

    def _snapshot(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch:05d}.pt"

    def _scanned(self, view: View, epoch: int) -> Path:
        return self.folder / view.name / f"epoch_{epoch:05d}.safetensors"


def train(
    training: Training,
    settings: Settings,
    *,
    views: Sequence[View] = (),
    watch: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    replace: bool = False,
    say: Say = print,
) -> Trained:
    """Train, or go on where an earlier run was killed, or find it done; scan the views of every snapshot on the way.

    The maps go to TensorBoard (``events/`` in the training's folder) as soon as they are scanned.

    Args:
        training: what, and how.
        settings: seed, device and ``out``.
        views: slices that are scanned at every snapshot.
        watch: options of a Monitor beside it: curves in TensorBoard and rows in ``geometry.csv``; None: no Monitor.
        folder: None: ``<out>/trainings/<name>``.
        replace: a training of other settings in the folder is deleted, not refused.
        say: prints a line.

    Raises:
        ProbeError: the folder holds another training; the loss is not finite; tensorboard or matplotlib is missing.

    >>> import tempfile
    >>> x = torch.randn(32, 2)
    >>> training = Training(
    ...     "doc", model=lambda: nn.Linear(2, 2), num_samples=32, epochs=3,
    ...     loss=lambda model, batch: model(x[batch]).square().mean(),
    ...     optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    ... )
    >>> trained = train(training, Settings(out=Path(tempfile.mkdtemp())), say=lambda line: None)
    >>> trained.epochs, trained.history[-1]["loss"] < trained.history[0]["loss"]
    ((0, 3), True)
    """
    tensorboard = optional("torchgeom_probe.integrations.tensorboard", extra="tensorboard")
    optional("matplotlib", extra="figures")
    loop = _Loop(training, settings, folder or settings.out / "trainings" / training.name)
    loop.claim(replace=replace)
    found = loop.load()
    if not found:
        words = ", ".join(f"{key}: {value}" for key, value in training.describe.items())
        say(f"{training.name}: {training.epochs} epochs, {training.num_samples} samples, {words}")
    elif loop.epoch < training.epochs:
        say(f"{training.name}: goes on after epoch {loop.epoch} of {training.epochs}, from {loop.folder}")
    with contextlib.ExitStack() as stack:
        board = tensorboard.TensorBoardWriter(loop.folder / "events")
        stack.callback(board.close)
        if loop.epoch < training.epochs or not found:
            stack.enter_context(_seeded(settings))
            if watch is not None:
                stack.enter_context(loop.watched(watch, board))
        for epoch in training.kept:
            loop.until(epoch)
            for view in views:
                if view.epochs is None or epoch in view.epochs:
                    loop.show(view, epoch, board)
    return loop


class _Loop(Trained):
    """A training on its way, with the state between two steps that a checkpoint holds."""

    def __init__(self, training: Training, settings: Settings, folder: Path) -> None:
        super().__init__(training, settings, folder)
        self.network = self._untrained()
        self.optimizer = training.optimizer(self.network.parameters())
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step, self.loss_sum = 0, torch.zeros((), dtype=torch.float64, device=settings.device)
        self.monitor: Monitor | None = None
        self.monitor_state: dict[str, Any] | None = None

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.training.steps_per_epoch

    def claim(self, *, replace: bool) -> None:
        """Write into the folder whose it is; refuse, or with ``replace`` empty, one of another training."""
        wanted = {
            "name": self.name,
            **{name: getattr(self.settings, name) for name in ("preset", "quick", "seed", "device")},
            "snapshots": self.epochs,
            "untrained": digest(self.network.state_dict()),
            **self.training.described,
        }
        file, wanted = self.folder / "settings.json", finite_or_null(wanted)
        stored = json.loads(file.read_text()) if file.exists() else wanted
        different = [key for key in wanted | stored if stored.get(key) != wanted.get(key)]
        if different and not replace:
            key = different[0]
            raise ProbeError(
                f"{self.folder} holds another training: its {', '.join(different)} differ ({key}={stored.get(key)!r}, "
                f"now {wanted.get(key)!r}).\nGive another directory with --out, or delete that one."
            )
        for path in (path for pattern in _FILES if different for path in self.folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not file.exists():
            write_json(file, wanted)

    def load(self) -> bool:
        file = self.folder / "checkpoint.pt"
        if file.exists():
            state = _loaded(file, self.settings)
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.loss_sum, self.history = state["step"], state["loss_sum"], state["history"]
            self.monitor_state = state["monitor"]
        return file.exists()

    def save(self) -> None:
        state = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "loss_sum": self.loss_sum,
            "history": self.history,
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
        }
        _save(self.folder / "checkpoint.pt", state)

    def watched(self, watch: Mapping[str, Any], board: Writer) -> contextlib.AbstractContextManager[Any]:
        """Let a Monitor follow the optimizer, from where an earlier run left it."""
        writers = [board, CSVWriter(self.folder / "geometry.csv")]
        self.monitor = Monitor(self.network, **watch, writer=writers, on_error="raise")
        if self.monitor_state is not None:
            self.monitor.load_state_dict(self.monitor_state)
        return self.monitor.follow(self.optimizer)

    def show(self, view: View, epoch: int, board: Writer) -> None:
        """Scan, and draw into TensorBoard what had not been scanned before."""
        new = not self._scanned(view, epoch).exists()
        found = self.scan(view, epoch)
        if new:
            figure = plot(found, class_names=view.class_names, images=view.images, title=f"epoch {epoch}")
            board.write_map(f"{self.name}/{view.name}", figure, epoch * self.training.steps_per_epoch)

    def until(self, epoch: int) -> None:
        """Train to the end of ``epoch``, keep the network there and its numbers."""
        if epoch in (row["epoch"] for row in self.history):
            return
        saved, last, name = (time.monotonic(), epoch * self.training.steps_per_epoch, f"{self.name} to epoch {epoch}")
        bar = tqdm(None, name, last, initial=self.step, unit="step", disable=None if epoch else True, leave=False)
        with bar:
            while self.step < last:
                for batch in self._batches()[self.step % self.training.steps_per_epoch :]:
                    self._one_step(batch)
                    bar.update()
                    if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                        self.save()
                        saved = time.monotonic()
                if not math.isfinite(float(self.loss_sum)):
                    raise ProbeError(
                        f"{self.name}: the loss is {float(self.loss_sum)} in epoch {self.epoch}.\n"
                        "Likely the learning rate is too large for this data; nothing after the last snapshot was kept."
                    )
        self._keep(epoch)

    @torch.no_grad()
    def _keep(self, epoch: int) -> None:
        numbers = self.training.evaluate(self.network.eval())
        self.network.train()
        if epoch:
            loss = self.loss_sum / self.training.steps_per_epoch
        else:  # Of the first batch, on a copy: a loss may move running statistics.
            self._seed(0)
            loss = self.training.loss(copy.deepcopy(self.network), self._batches()[0])
        self.history.append({"epoch": epoch, "loss": float(loss), **numbers})
        # The snapshot first: from the checkpoint on, it is never trained again, so scans of it stay true.
        _save(self._snapshot(epoch), self.network.state_dict())
        write_json(self.folder / "history.json", self.history)
        self.save()

    def _batches(self) -> tuple[Int[Tensor, " batch"], ...]:
        """The batches of this epoch, in its own order."""
        generator = torch.Generator().manual_seed(_step_seed(self.settings.seed, -1 - self.epoch))
        order = torch.randperm(self.training.num_samples, generator=generator).to(self.settings.device)
        return order.split(self.training.batch_size)

    def _one_step(self, batch: Int[Tensor, " batch"]) -> None:
        if self.step % self.training.steps_per_epoch == 0:
            self.loss_sum.zero_()
        self._seed(self.step)
        progress = self.step / (self.training.epochs * self.training.steps_per_epoch)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.training.schedule(progress)
        self.optimizer.zero_grad()
        loss = self.training.loss(self.network, batch)
        loss.backward()
        self.step += 1
        self.loss_sum += loss.detach()
        self.optimizer.step()

    def _seed(self, step: int) -> None:
        # torch.manual_seed would, without a GPU, queue a call with its stack trace at every step.
        seed, device = _step_seed(self.settings.seed, step), torch.device(self.settings.device)
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)


def _loaded(path: Path, settings: Settings) -> Any:
    return torch.load(path, map_location=settings.device, weights_only=True)


def _save(path: Path, state: Any) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


@contextlib.contextmanager
def _seeded(settings: Settings) -> Iterator[None]:
    """Seed the global generators, and give them back as they were."""
    where = torch.device(settings.device)
    kind = "cuda" if where.type == "cpu" else where.type
    with (
        torch.random.fork_rng([where] if kind == where.type == "cuda" else [], device_type=kind),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        torch.manual_seed(settings.seed)
        yield


def _step_seed(seed: int, step: int) -> int:
    # Neighbouring seeds of torch's generator are independent streams; one number a (seed, step).
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:7], "little")
