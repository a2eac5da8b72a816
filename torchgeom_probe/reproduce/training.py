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
from typing import Any

import numpy as np
import torch
from torch import nn

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.files import digest, finite_or_null, write_atomically, write_json
from torchgeom_probe.monitor.monitor import Monitor
from torchgeom_probe.monitor.writers import writers_of
from torchgeom_probe.progress import tqdm
from torchgeom_probe.reproduce.settings import Say, Settings
from torchgeom_probe.shapes import Float, Int, Tensor
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.scan import scan
from torchgeom_probe.slices.slice import Line, Plane

# A kill costs what was trained in about so many seconds, or one epoch where that takes longer.
_CHECKPOINT_SECONDS = 20.0

# All that a training, and the study of its network, write into its folder.
_FILES = (
    *("settings.json", "history.json", "study.json*", "checkpoint.pt", "geometry.csv", "epoch_*.pt"),
    *("events/*.geometry", "*/epoch_*.safetensors*"),
)


@dataclass(frozen=True, eq=False)
class Training:
    """What is trained, and how: enough to do it again, bit for bit.

    Args:
        name: of its folder; trainings of one name have one meaning.
        model: makes the network; called with the global generator seeded, on the CPU; moved to the device after.
        loss: (model, batch) → scalar; ``batch`` are indices [b] on the device.  Noise (augmentations, dropout) may be
            drawn from torch's global generator, which is seeded anew before every step.
        optimizer: parameters → optimizer, with one learning rate for all.
        num_samples: in the training set; each epoch has its own order of them.
        epochs: passes over it.
        batch_size: samples a step.
        snapshots: epochs at which the network is kept; 0 (before training) and the last one always are.
        schedule: factor of the learning rate as a function of progress in [0, 1).
        evaluate: numbers of a network, at every snapshot.
        readout: makes the readout (the model's output → logits) of a snapshot; None: the output is the logits.
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
    readout: Callable[[nn.Module], nn.Module] | None = None
    describe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> tuple[int, ...]:
        """The epochs whose network is kept, first and last included, ascending."""
        return (0, *sorted({epoch for epoch in self.snapshots if 0 < epoch < self.epochs}), self.epochs)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return math.ceil(self.num_samples / self.batch_size)

    @property
    def described(self) -> dict[str, Any]:
        """What results and settings say of it."""
        return {name: getattr(self, name) for name in ("epochs", "batch_size", "num_samples")} | dict(self.describe)


@torch.no_grad()
def accuracy(model: nn.Module, x: Float[Tensor, "samples ..."], labels: Int[Tensor, " samples"]) -> float:
    """Share of the samples that the model, whose output is logits, gets right.

    >>> accuracy(nn.Identity(), torch.eye(4), torch.tensor([0, 1, 2, 0]))
    0.75
    """
    parts = zip(x.split(250), labels.split(250), strict=True)
    return sum((model(part).argmax(1) == y).sum().item() for part, y in parts) / len(labels)


def supervised(
    name: str,
    settings: Settings,
    data: tuple[Tensor, Tensor],
    *,
    measured: Mapping[str, tuple[Tensor, Tensor]],
    augment: Callable[[Tensor], Tensor] = lambda x: x,
    **options: Any,
) -> Training:
    """Train a classifier by cross-entropy on samples [N, ...] and labels [N]; ``options`` are the rest of Training.

    ``measured``: name → samples and labels on which the accuracy is taken.  ``augment`` changes a batch.
    """
    x, labels = (part.to(settings.device) for part in data)
    sets = {name: [part.to(settings.device) for part in parts] for name, parts in measured.items()}
    return Training(
        name,
        loss=lambda model, batch: nn.functional.cross_entropy(model(augment(x[batch])), labels[batch]),
        num_samples=len(labels),
        evaluate=lambda model: {name: accuracy(model, *parts) for name, parts in sets.items()},
        **options,
    )


@dataclass(frozen=True, eq=False)
class View:
    """A slice, the name of its files, the options of its scan, and the names of the classes."""

    name: str
    slice: Line | Plane
    options: Mapping[str, Any]
    class_names: Sequence[str] | None = None


class Trained:
    """A training, its snapshots, their numbers and their scans; made by :func:`train`.

    Attributes:
        name, epochs: the training's, and the epochs of the snapshots, 0 first.
        folder: where everything is.
        history: per snapshot ``{"epoch": ..., "loss": ..., **evaluate(model)}``.
    """

    def __init__(self, training: Training, settings: Settings, folder: Path, watch: Mapping[str, Any] | None) -> None:
        self.training, self.settings, self.folder = training, settings, folder
        self.name, self.epochs = training.name, training.kept
        self.history: list[dict[str, Any]] = []
        self._readouts: dict[int, nn.Module] = {}
        self._done, self._network, self._monitor = 0, self._untrained(), None
        self._optimizer = training.optimizer(self._network.parameters())
        (self._board,) = writers_of(folder / "events")
        self._parts: dict[str, Any] = {"model": self._network, "optimizer": self._optimizer}
        if watch is not None:
            writers = [self._board, folder / "geometry.csv"]
            self._monitor = Monitor(self._network, **watch, writer=writers, on_error="raise")
            self._parts["monitor"] = self._monitor

    @property
    def three(self) -> list[int]:
        """The epochs of the first, the middle and the last snapshot."""
        return [self.epochs[0], self.epochs[len(self.epochs) // 2], self.epochs[-1]]

    def model(self, epoch: int) -> nn.Module:
        """The network after ``epoch`` epochs, on the settings' device."""
        if epoch not in self.epochs:
            raise ProbeError(f"{self.name} has no snapshot of epoch {epoch}.\nIt has those of {list(self.epochs)}.")
        model = self._untrained()
        model.load_state_dict(self._loaded(self._snapshot(epoch)))
        return model.eval()

    def scan(self, view: View, epoch: int) -> SliceScan:
        """Scan the network of ``epoch`` along ``view``, or load what was scanned before."""
        options = {"batch_size": 64, **view.options, "readout": self.readout(epoch)}
        return scan(self.model(epoch), view.slice, path=self._scanned(view, epoch), **options)

    def readout(self, epoch: int) -> nn.Module | None:
        """What makes logits of the output of the network of ``epoch``, or None."""
        if self.training.readout is not None and epoch not in self._readouts:
            with _seeded(self.settings):
                self._readouts[epoch] = self.training.readout(self.model(epoch))
        return self._readouts.get(epoch)

    def scans(self, view: View, epochs: Sequence[int] | None = None) -> dict[str, SliceScan]:
        """Scan some epochs, None: all snapshots, along ``view``: "epoch 0" → scan, in their order."""
        return {f"epoch {epoch}": self.scan(view, epoch) for epoch in epochs or self.epochs}

    def _untrained(self) -> nn.Module:
        with _seeded(self.settings):
            return self.training.model().to(self.settings.device)

    def _loaded(self, path: Path) -> Any:
        return torch.load(path, map_location=self.settings.device, weights_only=True)

    def _snapshot(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch:05d}.pt"

    def _scanned(self, view: View, epoch: int) -> Path:
        return self.folder / view.name / f"epoch_{epoch:05d}.safetensors"

    # --- training, from the checkpoint on ---------------------------------------------------------------------------

    def _run(self, views: Sequence[View], *, replace: bool, say: Say) -> None:
        self._claim(replace=replace)
        of, checkpoint = self.training, self.folder / "checkpoint.pt"
        if checkpoint.exists():
            state = self._loaded(checkpoint)
            self._done, self.history = state["epoch"], state["history"]
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            if self._done < of.epochs:
                say(f"{of.name}: goes on after epoch {self._done} of {of.epochs}, from {self.folder}")
        else:
            words = ", ".join(f"{key}: {value}" for key, value in of.describe.items())
            say(f"{of.name}: {of.epochs} epochs, {of.num_samples} samples, {words}")
        with _seeded(self.settings), contextlib.closing(self._board), self._monitor or contextlib.nullcontext():
            if self._monitor is not None and self._done < of.epochs:
                self._monitor.follow(self._optimizer)
            for epoch in of.kept:
                self._until(epoch)
                for view in views:
                    new = not self._scanned(view, epoch).exists()
                    found = self.scan(view, epoch)
                    if new:
                        self._board.write_map(f"{self.name}/{view.name}", found, epoch * of.steps_per_epoch)

    def _claim(self, *, replace: bool) -> None:
        """Write into the folder whose it is; refuse one of another training, or with ``replace`` empty a quick one."""
        wanted = {name: getattr(self.settings, name) for name in ("preset", "quick", "seed", "device")}
        wanted |= {"name": self.name, "untrained": digest(self._network.state_dict()), "snapshots": self.epochs}
        wanted = finite_or_null(wanted | self.training.described)
        file = self.folder / "settings.json"
        stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else wanted
        different = [key for key in wanted | stored if stored.get(key) != wanted.get(key)]
        if different and not (replace and stored["quick"]):
            key = different[0]
            raise ProbeError(
                f"{self.folder} holds another training: its {', '.join(different)} differ ({key}={stored.get(key)!r}, "
                f"now {wanted.get(key)!r}).\nGive another directory with --out, or delete that one."
            )
        if different:
            for path in [path for pattern in _FILES for path in self.folder.glob(pattern)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(file, wanted)

    def _save(self) -> None:
        """Write the checkpoint."""
        state = {name: part.state_dict() for name, part in self._parts.items()}
        _write(self.folder / "checkpoint.pt", {"epoch": self._done, "history": self.history, **state})

    def _until(self, epoch: int) -> None:
        """Train to the end of ``epoch``; keep the network there and its numbers."""
        if not self.history:
            self._seed(0)
            untrained = copy.deepcopy(self._network)  # a loss may move running statistics
            self._keep(self.training.loss(untrained, self._batches()[0]).item())
        saved = time.monotonic()
        left = range(self._done, epoch)
        for _ in tqdm(left, f"{self.name} to epoch {epoch}", unit="epoch", leave=False, disable=None if left else True):
            loss = self._one_epoch()
            self._log(loss)
            if self._done == epoch:
                self._keep(loss)
            elif time.monotonic() - saved > _CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()

    def _log(self, loss: float) -> None:
        """Write the loss of every epoch to TensorBoard, and beside a Monitor's curves some 40 times the accuracies."""
        numbers = {"loss": loss}
        if self._monitor is not None and self._done % max(1, self.training.epochs // 40) == 0:
            numbers |= self.training.evaluate(self._network.eval())
            self._network.train()
        for name, value in numbers.items():
            self._board.write_scalar(f"training/{name}", value, self._done * self.training.steps_per_epoch)

    def _one_epoch(self) -> float:
        """Train on every sample once; returns the mean loss of the steps."""
        total = torch.zeros((), dtype=torch.float64, device=self.settings.device)
        batches = self._batches()
        for step, batch in enumerate(batches, self._done * len(batches)):
            self._seed(step)
            factor = self.training.schedule(step / (self.training.epochs * len(batches)))
            for group in self._optimizer.param_groups:
                group["lr"] = self._optimizer.defaults["lr"] * factor
            self._optimizer.zero_grad()
            loss = self.training.loss(self._network, batch)
            loss.backward()
            self._optimizer.step()
            total += loss.detach()
        self._done += 1
        if not total.isfinite():
            raise ProbeError(
                f"{self.name}: the loss is {float(total)} in epoch {self._done}.\n"
                "Likely the learning rate is too large for this data; nothing of this epoch was kept."
            )
        return float(total) / len(batches)

    @torch.no_grad()
    def _keep(self, loss: float) -> None:
        """Keep the network as it is now, and its numbers."""
        self.history.append({"epoch": self._done, "loss": loss, **self.training.evaluate(self._network.eval())})
        self._network.train()
        # The snapshot first: from the checkpoint on, it is never trained again, so scans of it stay true.
        _write(self._snapshot(self._done), self._network.state_dict())
        write_json(self.folder / "history.json", self.history)
        self._save()

    def _batches(self) -> tuple[Int[Tensor, " batch"], ...]:
        """The batches of this epoch, in its own order."""
        generator = torch.Generator().manual_seed(_step_seed(self.settings.seed, -1 - self._done))
        order = torch.randperm(self.training.num_samples, generator=generator).to(self.settings.device)
        return order.split(self.training.batch_size)

    def _seed(self, step: int) -> None:
        # Without a GPU, torch.manual_seed would write down a stack trace at every step, for the GPU that may come.
        generators = torch.default_generator if self.settings.device == "cpu" else torch
        generators.manual_seed(_step_seed(self.settings.seed, step))


def train(
    training: Training,
    settings: Settings,
    *,
    views: Sequence[View] = (),
    watch: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    say: Say = print,
) -> Trained:
    """Train, or go on where an earlier run was killed, or find it done; scan the views of every snapshot on the way.

    The maps go to TensorBoard (``events/`` in the training's folder) as soon as they are scanned.  ``watch``: options
    of a Monitor beside it: curves there and rows in ``geometry.csv``.  ``folder``: of a quick training of other
    settings in it all is deleted, any other refused; None: ``<out>/trainings/<name>``, where both are refused.

    Raises:
        ProbeError: a training of other settings is there; the loss is not finite; tensorboard or matplotlib is missing.

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
    optional("matplotlib", extra="figures")
    trained = Trained(training, settings, folder or settings.out / "trainings" / training.name, watch)
    trained._run(views, replace=folder is not None, say=say)
    return trained


def _write(path: Path, state: Any) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


@contextlib.contextmanager
def _seeded(settings: Settings) -> Iterator[None]:
    """Seed torch's generators; give them back, and that of numpy, as they were."""
    device, state_of_numpy = torch.device(settings.device), np.random.get_state()
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        torch.manual_seed(settings.seed)
        try:
            yield
        finally:
            np.random.set_state(state_of_numpy)


def _step_seed(seed: int, step: int) -> int:
    # Neighbouring seeds of torch's generator are independent streams; one number a (seed, step).
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:7], "little")
