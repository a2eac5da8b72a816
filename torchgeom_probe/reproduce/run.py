"""The frame that every figure fills in: settings, training that resumes, scans of snapshots, results, pictures.

A figure is one file ``figN.py`` with a ``TITLE`` and a function ``run(settings, say) -> Results``::

    def run(settings: Settings, say: Say = print) -> Results:
        data = ...                                             # data
        training = Training(                                   # network and training settings
            "photos_gelu", model=lambda: ..., num_samples=len(data.train_labels), batch_size=128,
            loss=lambda model, batch: cross_entropy(model(images[batch]), labels[batch]),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
            epochs=settings.choose(embedded=40, paper=200, quick=2), snapshots=(0, 1, 5, 40),
            evaluate=lambda model: {"test_accuracy": ...}, describe={"data": "photos", "activation": "gelu"},
        )
        plane = View("plane", Plane(a, b, c), layers=["layer1", "layer4"], class_names=NAMES)   # slices
        results = Results("fig3", TITLE, settings, quirks=QUIRKS, say=say)
        trained = train(training, settings, views=[plane], say=say)        # trains, or goes on, or is done
        scans = [trained.scan(plane, epoch) for epoch in trained.epochs]   # scanned, or loaded
        results.test(trained, plane)                          # the hypothesis, per layer; said and stored
        results.picture("plane", plot(scans, ...), gallery=True)     # plane.png, plane.pdf
        results.animation("plane", (plot([s], like=scans, ...) for s in scans))
        return results.finish()                               # results.json

Trainings live in ``<out>/trainings/<name>`` and are shared by the figures that ask for the same one (fig3 and fig4; fig5 and
fig6); a figure's own files live in ``<out>/<figN>``.

Killed at any moment and started again, everything but the event files ends with the same bytes: order and noise of a training
step are functions of (seed, step) alone, so a checkpoint needs no random state; every file is moved into place whole; no time
of day and no seconds are stored.  (On a GPU as far as its kernels repeat themselves.)
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from torchgeom_probe.boundary.magnification import Magnification
from torchgeom_probe.boundary.statistics import Estimate
from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.estimators import Estimator
from torchgeom_probe.model.hooked import Transform
from torchgeom_probe.model.layers import LayerSpec
from torchgeom_probe.monitor.monitor import Monitor
from torchgeom_probe.plotting.files import animated, rendered, small_png
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.report import CSVWriter, Writer
from torchgeom_probe.shapes import Int, Tensor
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.scan import scan
from torchgeom_probe.slices.slice import Line, Plane

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is optional: its types are for the type checker alone
    Figure = Any

Say = Callable[[str], None]
Choice = TypeVar("Choice")

# Between two checkpoints of a training: what a kill can cost, in seconds.
_CHECKPOINT_SECONDS = 20.0
_GALLERY_BYTES = 150_000


@dataclass(frozen=True)
class Settings:
    """What the command line chooses; everything else is the figure's.

    Args:
        preset: ``"embedded"``: data that comes with the installed packages, in minutes on two cores;
            ``"paper"``: the paper's data and training.
        quick: a small version, for a test of the installation.
        seed: of the weights, the data's order and its noise.
        device: where to train and to scan.
        data_root: where the data of ``paper`` are, or go.
        out: the directory of trainings and figures.
        epochs: in place of the figure's own number.
        gallery: also write a small PNG of the main pictures here.

    Raises:
        ProbeError: an unknown preset; a device that torch does not have here; epochs below 1.

    >>> Settings(quick=True).choose(embedded=200, paper=1000, quick=2)
    2

    """

    preset: Literal["embedded", "paper"] = "embedded"
    quick: bool = False
    seed: int = 0
    device: str = "cpu"
    data_root: Path = Path("data")
    out: Path = Path("torchgeom_runs/reproduce")
    epochs: int | None = None
    gallery: Path | None = None

    def __post_init__(self) -> None:
        if self.preset not in ("embedded", "paper"):
            raise ProbeError(f"preset={self.preset!r} is unknown. Write --preset embedded or --preset paper.")
        if self.epochs is not None and self.epochs < 1:
            raise ProbeError(f"--epochs {self.epochs} trains nothing. Write --epochs 1 or more.")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ProbeError(
                f"--device {self.device} is not to be had here: {str(error).splitlines()[0]}\nWrite --device cpu."
            ) from error

    def choose(self, *, embedded: Choice, paper: Choice, quick: Choice) -> Choice:
        """One of three, by ``quick`` (first) and ``preset``."""
        return quick if self.quick else embedded if self.preset == "embedded" else paper


@dataclass(frozen=True, eq=False)
class Training:
    """What is trained, and how: enough to do it again, bit for bit.

    Args:
        name: of its folder; trainings of one name have one meaning.
        model: makes the network; called with the global generator seeded, on the CPU; moved to the device after.
        loss: (model, batch) → scalar; ``batch`` are indices [b] on the device.  Noise (augmentations, dropout) may be
            drawn from torch's global generator, which is seeded anew before every step.
        optimizer: parameters → optimizer.
        num_samples: in the training set.
        epochs: passes over it.
        batch_size: None: all samples, in their order, at every step.  Else each epoch has its own order.
        snapshots: epochs at which the network is kept; 0 (before training) and the last one always are.
        schedule: factor of the learning rate as a function of progress in [0, 1); None: constant.
        evaluate: numbers of a network, at every snapshot.
        describe: what is said of it in the results: data, width, learning rate, ….  JSON values.

    """

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Int[Tensor, " batch"]], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    num_samples: int
    epochs: int
    batch_size: int | None = None
    snapshots: Sequence[int] = ()
    schedule: Callable[[float], float] | None = None
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    describe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> tuple[int, ...]:
        """The epochs whose network is kept, first and last included, ascending."""
        inner = {epoch for epoch in self.snapshots if 0 < epoch < self.epochs}
        return (0, *sorted(inner), self.epochs)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return 1 if self.batch_size is None else -(-self.num_samples // self.batch_size)


@dataclass(frozen=True, eq=False)
class View:
    """A slice, how it is scanned, and how it is drawn.

    Args:
        name: of its files.
        slice: a :class:`~torchgeom_probe.Line` or :class:`~torchgeom_probe.Plane`.
        layers: as for :func:`~torchgeom_probe.scan`; so are ``estimator``, ``transform`` and ``normalize``.
        readout: makes the readout (module of the model's output → logits) of one snapshot; None: the output is the logits.
        epochs: which of the training's snapshots are scanned; None: all.
        batch_size: points a chunk: a number, not the memory of the moment, so that two runs round alike.
        class_names: the name of each class index.
        images: the samples as pictures, as for :func:`~torchgeom_probe.plot`.

    """

    name: str
    slice: Line | Plane
    layers: LayerSpec
    estimator: Estimator | None = None
    transform: Transform | Mapping[str, Transform] | None = None
    normalize: bool = True
    readout: Callable[[nn.Module], nn.Module] | None = None
    epochs: Sequence[int] | None = None
    batch_size: int = 64
    class_names: Sequence[str] | None = None
    images: Sequence[Tensor] | Literal["auto"] | None = "auto"


@dataclass(frozen=True, eq=False)
class Watch:
    """A Monitor that follows the training: curves in TensorBoard and rows in ``geometry.csv``.

    Args:
        x: [B, ...] the samples to probe at.
        layers: as for the Monitor; so is ``estimator``.
        every: optimizer steps between two probes.

    """

    x: Tensor
    layers: LayerSpec
    estimator: Estimator | None = None
    every: int = 100


class Trained:
    """A finished training: its snapshots, their numbers and their scans.

    Attributes:
        name: the training's.
        folder: where everything is.
        epochs: the epochs of the snapshots, 0 first.
        history: per snapshot ``{"epoch": ..., "loss": ..., **evaluate(model)}``.

    """

    def __init__(self, training: Training, settings: Settings, folder: Path) -> None:
        self.name, self.folder, self.epochs = training.name, folder, training.kept
        self.history: list[dict[str, Any]] = []
        self._training, self._settings = training, settings
        self._readouts: dict[tuple[int, Any], nn.Module] = {}

    def model(self, epoch: int) -> nn.Module:
        """The network after ``epoch`` epochs, on the settings' device."""
        if epoch not in self.epochs:
            raise ProbeError(
                f"{self.name} has no snapshot of epoch {epoch}.\nIt has those of {list(self.epochs)}."
            )
        model = _made(self._training, self._settings)
        model.load_state_dict(
            torch.load(self._snapshot(epoch), map_location=self._settings.device, weights_only=True)
        )
        return model.eval()

    def scan(self, view: View, epoch: int) -> SliceScan:
        """Scan the network of ``epoch`` along ``view``, or load what was scanned before."""
        model = self.model(epoch)
        readout = None
        if view.readout is not None:
            key = (epoch, view.readout)
            if key not in self._readouts:
                with _seeded(self._settings.seed, self._settings.device):
                    self._readouts[key] = view.readout(model)
            readout = self._readouts[key]
        return scan(
            model,
            view.slice,
            layers=view.layers,
            estimator=view.estimator,
            transform=view.transform,
            normalize=view.normalize,
            readout=readout,
            batch_size=view.batch_size,
            path=self.folder / view.name / f"epoch_{epoch:05d}.safetensors",
        )

    def _snapshot(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch:05d}.pt"


def train(
    training: Training,
    settings: Settings,
    *,
    views: Sequence[View] = (),
    watch: Watch | None = None,
    folder: Path | None = None,
    replace: bool = False,
    say: Say = print,
) -> Trained:
    """Train, or go on where an earlier run was killed, or find it done; scan the views of every snapshot on the way.

    The maps of the views go to TensorBoard as soon as they are scanned (``events/`` in the training's folder), so they can be
    watched while the training runs.

    Args:
        training: what, and how.
        settings: seed, device and ``out``.
        views: slices that are scanned at every snapshot.
        watch: a Monitor beside it.
        folder: None: ``<out>/trainings/<name>``.
        replace: a training of other settings in the folder is deleted, not refused.
        say: prints a line.

    Raises:
        ProbeError: the folder holds a training of other settings; a loss that is not finite; tensorboard or matplotlib missing.

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
    folder = settings.out / "trainings" / training.name if folder is None else folder
    board = optional("torchgeom_probe.integrations.tensorboard", extra="tensorboard")
    optional("matplotlib", extra="figures")
    _claim(folder, training, settings, replace=replace)
    trained = Trained(training, settings, folder)
    writer = board.TensorBoardWriter(folder / "events")
    loop = _Loop(training, settings, trained)
    found = loop.load()
    if not found:
        say(
            f"{training.name}: {training.epochs} epochs, {training.num_samples} samples, {_in_short(training)}"
        )
    elif loop.epoch < training.epochs:
        say(f"{training.name}: goes on after epoch {loop.epoch} of {training.epochs}, from {folder}")
    try:
        with contextlib.ExitStack() as stack:
            if loop.epoch < training.epochs or not found:
                stack.enter_context(_seeded(settings.seed, settings.device))
                loop.watch(stack, watch, writer)
            for epoch in training.kept:
                loop.until(epoch)
                for view in views:
                    new = not (folder / view.name / f"epoch_{epoch:05d}.safetensors").exists()
                    if view.epochs is None or epoch in view.epochs:
                        scanned = trained.scan(view, epoch)
                        if new:
                            step = epoch * training.steps_per_epoch
                            options: dict[str, Any] = {"class_names": view.class_names, "images": view.images}
                            figure = plot(scanned, title=f"epoch {epoch}", **options)
                            writer.write_figure(f"{training.name}/{view.name}", figure, step)
    finally:
        writer.close()
    return trained


class _Loop:
    """The state of a training between two steps, which is what a checkpoint holds."""

    def __init__(self, training: Training, settings: Settings, trained: Trained) -> None:
        self.training, self.settings, self.trained = training, settings, trained
        self.model = _made(training, settings)
        self.optimizer = training.optimizer(self.model.parameters())
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=settings.device)
        self.monitor: Monitor | None = None
        self.monitor_state: dict[str, Any] | None = None

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.training.steps_per_epoch

    @property
    def _file(self) -> Path:
        return self.trained.folder / "checkpoint.pt"

    def load(self) -> bool:
        if not self._file.exists():
            return False
        state = torch.load(self._file, map_location=self.settings.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.loss_sum, self.monitor_state = state["step"], state["loss_sum"], state["monitor"]
        self.trained.history[:] = state["history"]
        return True

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "loss_sum": self.loss_sum,
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
            "history": self.trained.history,
        }
        write(self._file, _saved(state))

    def watch(self, stack: contextlib.ExitStack, watch: Watch | None, board: Writer) -> None:
        if watch is None:
            return
        self.monitor = Monitor(
            self.model,
            watch.x,
            layers=watch.layers,
            estimator=watch.estimator,
            every=watch.every,
            writer=[board, CSVWriter(self.trained.folder / "geometry.csv")],
            on_error="raise",
        )
        if self.monitor_state is not None:
            self.monitor.load_state_dict(self.monitor_state)
        stack.enter_context(self.monitor.follow(self.optimizer))

    def until(self, epoch: int) -> None:
        """Train to the end of ``epoch``, keep the network there and its numbers."""
        if self.step > epoch * self.training.steps_per_epoch or any(
            row["epoch"] == epoch for row in self.trained.history
        ):
            return
        last_saved = time.monotonic()
        per_epoch = self.training.steps_per_epoch
        with tqdm(
            total=epoch * per_epoch,
            initial=self.step,
            desc=f"{self.training.name} to epoch {epoch}",
            unit="step",
            disable=None if epoch else True,
            leave=False,
        ) as bar:
            while self.step < epoch * per_epoch:
                for batch in self._rest_of_the_epoch():
                    self._one_step(batch)
                    bar.update()
                    if time.monotonic() - last_saved > _CHECKPOINT_SECONDS:
                        self.save()
                        last_saved = time.monotonic()
                if not math.isfinite(float(self.loss_sum)):
                    raise ProbeError(
                        f"{self.training.name}: the loss is {float(self.loss_sum)} in epoch {self.epoch}.\n"
                        "Likely the learning rate is too large for this data; nothing after the last snapshot was kept."
                    )
        self._keep(epoch)

    def _keep(self, epoch: int) -> None:
        with torch.no_grad():
            self.model.eval()
            numbers = {} if self.training.evaluate is None else dict(self.training.evaluate(self.model))
            self.model.train()
            if epoch == 0:
                loss = self._initial_loss()
            else:
                loss = float(self.loss_sum) / self.training.steps_per_epoch
        self.trained.history.append({"epoch": epoch, "loss": loss, **numbers})
        # The snapshot first: from the checkpoint on, it is never trained again, so scans of it stay true.
        write(self.trained._snapshot(epoch), _saved(self.model.state_dict()))
        write_json(self.trained.folder / "history.json", self.trained.history)
        self.save()

    def _initial_loss(self) -> float:
        # Of the first batch, on a copy: a loss may move running statistics.
        self._seed(0)
        return float(
            self.training.loss(copy.deepcopy(self.model), self._order(0)[: self.training.batch_size])
        )

    def _seed(self, step: int) -> None:
        # torch.manual_seed would, without a GPU, queue a call with its stack trace at every step.
        seed = _step_seed(self.settings.seed, step)
        torch.default_generator.manual_seed(seed)
        device = torch.device(self.settings.device)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)

    def _order(self, epoch: int) -> Tensor:
        count = self.training.num_samples
        if self.training.batch_size is None:
            return torch.arange(count, device=self.settings.device)
        generator = torch.Generator().manual_seed(_step_seed(self.settings.seed, -1 - epoch))
        return torch.randperm(count, generator=generator).to(self.settings.device)

    def _rest_of_the_epoch(self) -> Iterator[Tensor]:
        done = self.step % self.training.steps_per_epoch
        batches = self._order(self.epoch).split(self.training.batch_size or self.training.num_samples)
        yield from batches[done:]

    def _one_step(self, batch: Tensor) -> None:
        training = self.training
        if self.step % training.steps_per_epoch == 0:
            self.loss_sum.zero_()
        self._seed(self.step)
        if training.schedule is not None:
            factor = training.schedule(self.step / (training.epochs * training.steps_per_epoch))
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
        self.optimizer.zero_grad()
        loss = training.loss(self.model, batch)
        loss.backward()
        self.step += 1
        self.loss_sum += loss.detach()
        self.optimizer.step()


class Results:
    """What a figure found: said while it is found, and written to ``results.json`` at the end.

    Args:
        figure: its name, of the folder too.
        title: what it shows, in words.
        settings: the command line's.
        quirks: of the paper's own code, each with what was decided: ``{"quirk": ..., "decision": ...}``.
        say: prints a line.

    """

    def __init__(
        self,
        figure: str,
        title: str,
        settings: Settings,
        *,
        quirks: Sequence[Mapping[str, str]] = (),
        say: Say = print,
    ) -> None:
        self.figure, self.settings, self.say = figure, settings, say
        self.folder = settings.out / figure
        self.numbers: dict[str, Any] = {
            "figure": figure,
            "title": title,
            "settings": {
                "preset": settings.preset,
                "quick": settings.quick,
                "seed": settings.seed,
                "device": settings.device,
                "epochs": settings.epochs,
            },
            "quirks": [dict(quirk) for quirk in quirks],
            "trainings": {},
            "magnification": [],
            "checks": {},
        }

    def training(self, trained: Trained) -> None:
        """Store a training's description and the numbers of its snapshots."""
        training = trained._training
        self.numbers["trainings"][trained.name] = {
            "epochs": training.epochs,
            "batch_size": training.batch_size,
            "num_samples": training.num_samples,
            **training.describe,
            "history": trained.history,
        }

    def check(self, name: str, *, value: float, bound: float, what: str) -> bool:
        """Store and say whether a number is at most its bound; a figure whose check fails ends with a failure."""
        ok = value <= bound
        self.numbers["checks"][name] = {"value": value, "bound": bound, "ok": ok, "what": what}
        self.say(f"{'ok  ' if ok else 'FAIL'}  {what}: {value:.2g} (at most {bound:g})")
        return ok

    def test(
        self,
        trained: Trained,
        view: View,
        *,
        layers: Sequence[str] | None = None,
        epoch: int | None = None,
        label: str = "",
    ) -> list[Magnification]:
        """Test the hypothesis on every layer of a scan, the untrained network's log-volume as the control.

        Args:
            trained: the network.
            view: the slice.
            layers: which of the scan's; None: all.
            epoch: None: the last.
            label: what the sentence calls the network; "": the training's name.

        """
        epoch = trained.epochs[-1] if epoch is None else epoch
        after, before = trained.scan(view, epoch), trained.scan(view, 0)
        found = []
        for layer in list(after.report) if layers is None else layers:
            statistic = after.magnification(layer, initial=before, seed=self.settings.seed)
            self.record(statistic, network=label or trained.name, view=view.name, epoch=epoch)
            found.append(statistic)
        return found

    def record(self, found: Magnification, *, network: str, view: str, epoch: int) -> None:
        """Store one test, and say its sentence."""
        self.say(f"{network}, {view}: {found}")
        self.numbers["magnification"].append(
            {"network": network, "view": view, "epoch": epoch, **_in_numbers(found)}
        )

    def picture(self, name: str, figure: Figure, *, gallery: bool = False, dpi: int = 160) -> Path:
        """Write ``name.png`` and ``name.pdf``; with ``gallery`` also the small PNG, where one was asked for."""
        path = self.folder / f"{name}.png"
        # The layout is found once, not anew for every file.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        write(path, rendered(figure, dpi=dpi))
        write(path.with_suffix(".pdf"), rendered(figure, ending=".pdf"))
        if gallery and self.settings.gallery is not None:
            write(self.settings.gallery / f"{self.figure}_{name}.png", small_png(figure, _GALLERY_BYTES))
        return path

    def animation(self, name: str, frames: Iterable[Figure], *, seconds: float = 0.6) -> Path:
        """Write ``name.gif``, one frame a figure, the last one held."""
        return write(self.folder / f"{name}.gif", animated(frames, seconds=seconds))

    def finish(self) -> Results:
        """Say where the hypothesis holds and where it fails, and write ``results.json``."""
        tests = self.numbers["magnification"]
        failing = [test for test in tests if not test["supported"]]
        places = [f"{t['network']}, {t['view']}, {t['layer']}" for t in failing]
        self.numbers["hypothesis"] = {
            "tests": len(tests),
            "supported": len(tests) - len(failing),
            "not_supported": [
                {"where": place, "because": test["sentence"]}
                for place, test in zip(places, failing, strict=True)
            ],
        }
        if tests:
            self.say(
                f"{self.figure}: the hypothesis is supported in {len(tests) - len(failing)} of {len(tests)} tests"
                + (f"; not in: {'; '.join(places)}." if places else ".")
            )
        path = write_json(self.folder / "results.json", self.numbers)
        self.say(f"Wrote {path} and the pictures beside it.")
        failed = [name for name, check in self.numbers["checks"].items() if not check["ok"]]
        if failed:
            raise ProbeError(
                f"{self.figure}: the check of {', '.join(failed)} failed; the numbers are in {path}.\n"
                "Likely a defect of this package or of this machine's arithmetic: please report it with that file."
            )
        return self


#: What ``all`` is.
FIGURES = ("fig1", "fig2", "fig3", "fig4", "fig5", "fig6")


def reproduce(names: Sequence[str], settings: Settings, *, say: Say = print) -> None:
    """Make figures by their names; ``"all"`` is all of them, in their order.

    Raises:
        ProbeError: an unknown name, before anything is begun; whatever a figure refuses.

    >>> try:
    ...     reproduce(["fig9"], Settings())
    ... except ProbeError as error:
    ...     assert "fig1" in str(error)
    """
    unknown = [name for name in names if name not in (*FIGURES, "all")]
    if unknown or not names:
        raise ProbeError(
            f"there is no figure {', '.join(map(repr, unknown)) or 'named'}.\n"
            f"Write one or more of {' '.join(FIGURES)}, or all:  torchgeom-probe reproduce fig1"
        )
    chosen = list(dict.fromkeys(f for name in names for f in (FIGURES if name == "all" else [name])))
    began = time.perf_counter()
    for name in chosen:
        module = importlib.import_module(f"torchgeom_probe.reproduce.{name}")
        start = time.perf_counter()
        say(f"{'' if name == chosen[0] else chr(10)}{name}: {module.TITLE}")
        module.run(settings, say)
        say(f"{name} took {_duration(time.perf_counter() - start)}.")
    if len(chosen) > 1:
        say(f"\n{len(chosen)} figures in {_duration(time.perf_counter() - began)}, under {settings.out}.")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


# --- files --------------------------------------------------------------------------------------------------


def write(path: Path, data: bytes) -> Path:
    """Write a file at once or not at all.

    >>> import tempfile
    >>> write(Path(tempfile.mkdtemp(), "new", "file"), b"whole").read_bytes()
    b'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write JSON that any reader takes (null where a number is not finite), at once or not at all.

    >>> import tempfile
    >>> print(write_json(Path(tempfile.mkdtemp(), "x.json"), {"a": math.nan}).read_text())
    {
     "a": null
    }
    <BLANKLINE>
    """
    return write(path, (json.dumps(_plain(value), indent=1, ensure_ascii=False) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def _saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _claim(folder: Path, training: Training, settings: Settings, *, replace: bool) -> None:
    """Say whose folder it is, and refuse or empty one of another training."""
    wanted = _plain(
        {
            "name": training.name,
            "preset": settings.preset,
            "quick": settings.quick,
            "seed": settings.seed,
            "device": settings.device,
            "epochs": training.epochs,
            "batch_size": training.batch_size,
            "num_samples": training.num_samples,
            "snapshots": list(training.kept),
            "untrained": _digest(_made(training, settings)),
            **training.describe,
        }
    )
    file = folder / "settings.json"
    if file.exists():
        stored = json.loads(file.read_text())
        different = [key for key in {**wanted, **stored} if stored.get(key) != wanted.get(key)]
        if different and replace:
            _emptied(folder)
        elif different:
            key = different[0]
            raise ProbeError(
                f"{folder} holds another training: its {', '.join(different)} differ ({key}={stored.get(key)!r}, now "
                f"{wanted.get(key)!r}).\nGive another directory with --out, or delete that one."
            )
        else:
            return
    write_json(file, wanted)


def _emptied(folder: Path) -> None:
    """Delete what a training wrote, and nothing else."""
    ours = [
        "settings.json",
        "checkpoint.pt",
        "history.json",
        "geometry.csv",
        "epoch_*.pt",
        "events/*.geometry",
    ]
    for pattern in [*ours, "*/epoch_*.safetensors"]:
        for file in folder.glob(pattern):
            file.unlink()
    for parts in folder.glob("*/epoch_*.safetensors.parts"):
        shutil.rmtree(parts)


# --- randomness ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Seed the global generators, and give them back as they were."""
    where = torch.device(device)
    with (
        torch.random.fork_rng(
            devices=[where] if where.type == "cuda" else [],
            device_type=where.type if where.type != "cpu" else "cuda",
        ),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        torch.manual_seed(seed)
        yield


def _step_seed(seed: int, step: int) -> int:
    # Neighbouring seeds of torch's generator are independent streams; one number a (seed, step).
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:7], "little")


def _made(training: Training, settings: Settings) -> nn.Module:
    with _seeded(settings.seed, settings.device):
        return training.model().to(settings.device)


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# --- words and numbers --------------------------------------------------------------------------------------


def _in_short(training: Training) -> str:
    return ", ".join(f"{key}: {value}" for key, value in training.describe.items())


def _in_numbers(found: Magnification) -> dict[str, Any]:
    def estimate(value: Estimate | None) -> dict[str, Any] | None:
        return None if value is None else {"value": float(value), "interval": value.interval}

    return {
        "layer": found.name,
        "supported": found.supported,
        "sentence": str(found),
        "rho": found.rho,
        "p_value": found.p_value,
        "decile_gap": estimate(found.decile_gap),
        "peak_to_boundary": estimate(found.peak_to_boundary),
        "num_points": found.num_points,
        "num_dropped": found.num_dropped,
        "effective_points": found.effective_points,
        **({} if found.initial is None else {"initial": _in_numbers(found.initial)}),
    }
