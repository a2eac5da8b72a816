"""Probing inside a training loop: when (a schedule), at what (a fixed batch), and where the reports go."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from numbers import Integral
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from torchgeom_probe.distributed import Ranks
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators import Estimator, Subspace
from torchgeom_probe.jacobian.jacobians import EngineName
from torchgeom_probe.model.hooked import Transform
from torchgeom_probe.model.isolation import Mode
from torchgeom_probe.model.layers import LayerSpec
from torchgeom_probe.probe import GeometryProbe, measure
from torchgeom_probe.report import GeometryReport, Writer
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.scan import Line, Plane, on_this_rank, scan

# What a map is made from: a slice, or a function that returns a figure.
MapOf = Line | Plane | Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Clock:
    """What a schedule may know beside the step: seconds spent, since the first step that the monitor saw.

    Attributes:
        training_seconds: wall-clock time outside of probes.
        probe_seconds: wall-clock time inside of probes, writers included.
        last_probe_seconds: what the latest probe took; 0 before the first.
        since_last_probe: training seconds since the latest probe; infinite before the first.

    """

    training_seconds: float = 0.0
    probe_seconds: float = 0.0
    last_probe_seconds: float = 0.0
    since_last_probe: float = math.inf


_UNREAD = Clock()


@runtime_checkable
class Schedule(Protocol):
    """When to probe: anything with ``due``; it is asked after every training step, so it has to be quick."""

    def due(self, step: int, clock: Clock) -> bool:
        """Whether to probe now, ``step`` training steps after the start."""


@dataclass(frozen=True)
class Every:
    """Probe every ``steps`` training steps: 0, n, 2n, ….  For once an epoch: ``Every(len(train_loader))``.

    Raises:
        ProbeError: ``steps`` is not an integer of 1 or more.

    >>> [step for step in range(10) if Every(4).due(step, Clock())]
    [0, 4, 8]

    """

    steps: int = 100

    def __post_init__(self) -> None:
        _refuse_unless_count("every", self.steps, example="every=100")

    def due(self, step: int, clock: Clock) -> bool:
        """Whether ``step`` is a multiple of n."""
        return step % self.steps == 0


@dataclass(frozen=True)
class LogSpaced:
    """Probe at 0 and at steps equally spaced on a logarithmic axis, ``per_decade`` for each factor of ten.

    Most of the change in a network's geometry happens early: 10 a decade spends 50 probes on 100 000 steps.

    Raises:
        ProbeError: ``per_decade`` is not an integer of 1 or more.

    >>> [step for step in range(101) if LogSpaced(per_decade=3).due(step, Clock())]
    [0, 1, 2, 5, 10, 22, 46, 100]

    """

    per_decade: int = 10

    def __post_init__(self) -> None:
        _refuse_unless_count("per_decade", self.per_decade, example="LogSpaced(per_decade=10)")

    def due(self, step: int, clock: Clock) -> bool:
        """Whether ``step`` is 0 or the nearest integer to a power of 10^(1/per_decade)."""
        if step < 1:
            return step == 0
        nearest = round(self.per_decade * math.log10(step))
        # Rounding to an integer step can move the exponent by one where the steps are sparse in it.
        return any(
            round(10 ** (i / self.per_decade)) == step for i in (nearest - 1, nearest, nearest + 1) if i >= 0
        )


@dataclass(frozen=True)
class Budget:
    """Probe as often as a share of the run's time allows: ``Budget(0.02)`` for two per cent.

    The first probe is due at once, and its cost is the first estimate.  Each next one is due when (a) the
    time spent on probes, this one included, is at most ``share`` of all the time so far, and (b) the training
    since the latest probe has paid for one probe.  (b) keeps an idle hour (a notebook, an evaluation) from
    being spent on probes in a row. So the share holds from the second probe on; the first alone can exceed
    it, in a run shorter than its cost / share.

    Args:
        share: of the wall-clock time, between 0 and 1.
        every: probe at multiples of this many steps only.

    Raises:
        ProbeError: ``share`` does not lie between 0 and 1; ``every`` is not an integer of 1 or more.

    >>> busy = Clock(training_seconds=90.0, probe_seconds=2.0, last_probe_seconds=1.0, since_last_probe=60.0)
    >>> Budget(0.02).due(700, busy), Budget(0.05).due(700, busy)
    (False, True)

    """

    share: float
    every: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share < 1:
            raise ProbeError(
                f"max_overhead is the share of the run's time that probes may take, between 0 and 1; "
                f"got {self.share!r}.\n"
                "For two per cent write:  max_overhead=0.02"
            )
        _refuse_unless_count("every", self.every, example="every=1")

    def due(self, step: int, clock: Clock) -> bool:
        """Whether one more probe, at the price of the latest, keeps within the share."""
        if step % self.every:
            return False
        return self.pause(clock) <= 0

    def pause(self, clock: Clock) -> float:
        """Seconds of training before which no probe will be due: the monitor does not ask again until then.

        >>> Budget(0.1).pause(Clock(training_seconds=9.0, probe_seconds=1.0, last_probe_seconds=1.0, since_last_probe=9.0))
        9.0

        """
        if math.isinf(clock.since_last_probe):
            return 0.0
        price = clock.last_probe_seconds
        per_second = (1 - self.share) / self.share  # of training, for a second of probing
        all_paid = (clock.probe_seconds + price) * per_second - clock.training_seconds
        this_paid = price * per_second - clock.since_last_probe
        return max(0.0, all_paid, this_paid)


class Monitor:
    """Probe a model while it trains, on a fixed batch and a schedule, and send the reports to a writer.

    The model, its training and the random state are as they would be without it, bit by bit: a probe measures
    in eval mode, draws its directions from its own generator, and puts everything back.

    Two ways to count the training's steps.  ``monitor.follow(optimizer)`` needs no change to the loop: it
    probes at once (step 0: before training), then after every ``optimizer.step()`` that the schedule picks
    (with gradient accumulation that is once per update, and an update that AMP's scaler skips does not
    count).  Or call ``monitor.step()`` in the loop, once per training step; then step 0 is
    ``monitor.probe_now()`` before the loop.

    Args:
        model: any ``nn.Module``.
        x_probe: [B, *shape], the samples to probe at, copied; the same at every step, so that curves compare.
            For a model of several inputs a tuple or a dict of them, as in :meth:`GeometryProbe.measure`.
        layers: names, globs, modules, types, a callable, or ``"auto"``: as in
            :class:`~torchgeom_probe.GeometryProbe`.
        every: probe each N steps (100 where neither ``max_overhead`` nor ``schedule`` is given).
        max_overhead: the share of the run's time that probes may take; with ``every``, at multiples of it
            only.
        schedule: any :class:`Schedule` in place of the two: ``Every``, ``LogSpaced``, ``Budget``, or your
            own.
        writer: a :class:`~torchgeom_probe.Writer`, a sequence of them, or None (then read
            ``monitor.history``).  One that has a ``write_scalar`` (TensorBoard) also gets ``geometry/failures``
            and, from the second probe on, ``geometry/overhead``, the share of the time.
        estimator: ``Subspace(k=8, seed=0)`` by default (k = d where d < 8): the same random directions at
            every step.
        normalize: divide J by √n.
        transform: as in :class:`~torchgeom_probe.GeometryProbe`.
        source: as in :class:`~torchgeom_probe.GeometryProbe`.
        engine: as in :class:`~torchgeom_probe.GeometryProbe`.
        memory_budget: as in :class:`~torchgeom_probe.GeometryProbe`.
        mode: as in :class:`~torchgeom_probe.GeometryProbe`.
        on_error: ``"warn"``: an exception inside a probe or a writer is counted (``failures``), kept
            (``last_error``) and shown once per kind as a ``RuntimeWarning``, and the training goes on;
            ``"raise"``: it is raised.
        indices: where ``x_probe`` stands in your data set; kept in ``state_dict()``, nothing else is done
            with it.
        keep: how many reports ``history`` holds, the latest ones; None for all.
        maps: tag → a :class:`~torchgeom_probe.Line` or :class:`~torchgeom_probe.Plane`, scanned at ``layers``
            and drawn; or a function of the model that returns a matplotlib figure, such as ``lambda model:
            tgp.scan(model, plane, readout=...).plot()``.  For the writers that have a ``write_figure``
            (TensorBoard: an image under the tag); the figure is closed afterwards.
        maps_every: draw the maps at each M-th probe.
        distributed: None: where ``model`` is a DistributedDataParallel, its ranks share the samples of each
            probe; True: all ranks of the default process group do (they hold the same weights); False: each
            process probes for itself.

    With DDP make the monitor on every rank, with the same ``x_probe``, and step it on every rank.  Each measures
    its share; rank 0 has the reports, ``history`` and the writers, elsewhere they stay empty.  No collective is
    called, so nothing hangs where some ranks do not reach a probe: rank 0 measures what is missing.  A schedule
    that goes by the clock (``max_overhead``, one of your own) is due at other steps on other ranks: rank 0
    measures alone then.

    Attributes:
        probes: how many probes were started.
        last_probed: the step of the latest probe, or None.
        failures: how many times measuring, a writer or a map raised.
        last_error: the latest of those exceptions, or None.

    Raises:
        ProbeError: an argument makes no sense; the layers cannot be found; ``step()`` while following or
            after ``close()``.

    Cost: per probe about one forward pass over (1 + k)·B samples and one copy of the report to the host; per
    step in between a comparison.  On an accelerator a probe waits for the work in flight before it starts its
    watch.  What torch imports at its first forward derivative, seconds, comes before the watch is started.

    >>> import torch, torchgeom_probe as tgp
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with tgp.Monitor(model, torch.randn(5, 4), layers=["1"], every=3).follow(optimizer) as monitor:
    ...     for _ in range(7):
    ...         optimizer.zero_grad()
    ...         model(torch.randn(32, 4)).square().mean().backward()
    ...         optimizer.step()
    >>> [step for step, report in monitor.history]
    [0, 3, 6]
    >>> assert monitor.history[-1][1]["1"].log_volume.shape == (5,)

    """

    def __init__(
        self,
        model: nn.Module,
        x_probe: Any,
        *,
        layers: LayerSpec = "auto",
        every: int | None = None,
        max_overhead: float | None = None,
        schedule: Schedule | None = None,
        writer: Writer | Sequence[Writer] | None = None,
        estimator: Estimator | None = None,
        normalize: bool = True,
        transform: Transform | Mapping[str, Transform] | None = None,
        source: str | nn.Module | None = None,
        engine: EngineName = "auto",
        memory_budget: int | None = None,
        mode: Mode = "eval",
        on_error: Literal["warn", "raise"] = "warn",
        indices: Sequence[int] | None = None,
        keep: int | None = 1000,
        maps: Mapping[str, MapOf] | None = None,
        maps_every: int = 10,
        distributed: bool | None = None,
    ) -> None:
        tensors = [leaf for leaf in tree_leaves(x_probe) if isinstance(leaf, Tensor)]
        if not tensors or any(tensor.dim() == 0 or tensor.shape[0] == 0 for tensor in tensors):
            what = (
                ", ".join(f"a tensor of shape {list(t.shape)}" for t in tensors)
                or f"a {type(x_probe).__name__}"
            )
            raise ProbeError(
                f"x_probe is the batch of samples to probe at, a tensor [B, ...] with B of 1 or more; "
                f"got {what}.\n"
                "Write:  tgp.Monitor(model, torch.stack([dataset[i][0] for i in range(16)]), ...)"
            )
        if any(tensor.is_meta for tensor in tensors):
            raise ProbeError(
                "x_probe is on the device 'meta': it has a shape and no numbers.\n"
                "Pass samples of your data:  tgp.Monitor(model, torch.stack([dataset[i][0] for i in range(16)]), ...)"
            )
        if on_error not in ("warn", "raise"):
            raise ProbeError(f"on_error is 'warn' or 'raise'; got {on_error!r}.")
        if keep is not None:
            _refuse_unless_count("keep", keep, example="keep=1000")
        _refuse_unless_count("maps_every", maps_every, example="maps_every=10")
        self.schedule = _schedule(every, max_overhead, schedule)
        self.writers = _writers(writer)
        self.maps = dict(maps or {})
        self.maps_every = maps_every
        for tag, draw_map in self.maps.items():
            if not isinstance(draw_map, Line | Plane) and not callable(draw_map):
                raise ProbeError(
                    f"maps={{{tag!r}: ...}} takes a slice, or a function of the model that returns a figure; "
                    f"got a {type(draw_map).__name__}.\n"
                    f"Write:  maps={{{tag!r}: tgp.Plane(x[0], x[1], x[2])}}"
                )
        if self.maps and not any(hasattr(w, "write_figure") for w in self.writers):
            raise ProbeError(
                "maps= draws figures, and no writer here takes them.\n"
                "Write:  writer=TensorBoardWriter('runs/experiment_1')"
            )
        self.model = model
        self.x_probe = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), x_probe)
        self.indices = None if indices is None else [int(i) for i in indices]
        self.on_error = on_error
        self.probes = 0
        self.last_probed: int | None = None
        self.failures = 0
        self.last_error: Exception | None = None
        self._ranks = Ranks.of(model, distributed, samples=_fingerprint(self.x_probe))
        # A schedule that goes by the clock is due at other steps on other ranks.
        self._alone = type(self.schedule) not in (Every, LogSpaced)
        self._scanned: dict[str, Any] = {
            "layers": layers,
            "normalize": normalize,
            "transform": transform,
            "engine": engine,
            "source": source,
            "memory_budget": memory_budget,
        }
        self._probe = GeometryProbe(
            model,
            estimator=_eight_directions(tensors, source) if estimator is None else estimator,
            mode=mode,
            **self._scanned,
        )
        self._history: deque[tuple[int, GeometryReport]] = deque(maxlen=keep)
        self._step = 0
        #: a moment before which the schedule would say no
        self._rests_until = 0.0
        self._stopwatch = _Stopwatch()
        self._shown: set[tuple[str, str]] = set()
        self._handle: Any = None
        self._closed = False

    @property
    def history(self) -> list[tuple[int, GeometryReport]]:
        """(step, report) of the latest ``keep`` probes, oldest first; tensors on the CPU."""
        return list(self._history)

    @property
    def steps(self) -> int:
        """How many training steps were counted."""
        return self._step

    @property
    def overhead(self) -> float:
        """The share of the wall-clock time that probes took, writers included, since the first step."""
        clock = self._stopwatch.read()
        total = clock.training_seconds + clock.probe_seconds
        return clock.probe_seconds / total if total else 0.0

    def step(self, *, at: int | None = None) -> GeometryReport | None:
        """Count one training step, and probe if it is due; returns the report, or None.

        Args:
            at: how many training steps were made, where the loop keeps its own count.  A count that has not
                grown (gradient accumulation) is no step; one that grew by several probes once if any of them
                was due.

        """
        if self._handle is not None:
            raise ProbeError(
                "this monitor follows an optimizer, which counts the steps; step() would count them twice.\n"
                "Leave out monitor.step(), or monitor.follow(optimizer)."
            )
        return self._counted(at)

    def follow(self, optimizer: torch.optim.Optimizer) -> Monitor:
        """Probe now if training has not begun, then after each optimizer step that is due; return self."""
        if self._handle is not None:
            raise ProbeError(
                "this monitor follows an optimizer already; make a second tgp.Monitor for the second one."
            )
        register = getattr(optimizer, "register_step_post_hook", None)
        if register is None:
            raise ProbeError(
                f"follow() takes a torch.optim.Optimizer, not a {type(optimizer).__name__}.\n"
                "Call  monitor.step()  in the loop instead, once per training step."
            )
        self._refuse_if_closed()
        if self._step == 0 and self.probes == 0:
            self.probe_now()
        self._handle = register(self._after_optimizer_step)
        return self

    def probe_now(self) -> GeometryReport | None:
        """Probe at once, whatever the schedule says, under the current step; return None if it failed.

        With DDP it returns None on all ranks but rank 0.
        """
        self._refuse_if_closed()
        if self._ranks is not None and self._ranks.rank and self._alone:
            return None
        report: GeometryReport | None = None
        self._begin()
        device = self._device()
        _synchronize(device)
        with self._stopwatch.probing():
            draw = bool(self.maps) and self.probes % self.maps_every == 0 and self._writes
            self.probes += 1
            self.last_probed = self._step
            with self._guarded("measuring"):
                self.x_probe = tree_map_only(Tensor, lambda tensor: tensor.to(device), self.x_probe)
                report = self._measured()
                if report is not None:
                    self._history.append((self._step, report))
            working = list(self.writers)
            if report is not None:
                for writer in self.writers:
                    before = self.failures
                    with self._guarded(f"{type(writer).__name__}.write"):
                        writer.write(self._step, report)
                    if self.failures > before:
                        working.remove(writer)
            if draw:
                for tag, draw_map in self.maps.items():
                    with self._guarded(f"the map {tag!r}"):
                        self._write_map(tag, draw_map)
            if self._writes:
                self._write_own_accounts(working)
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain Python values; of ``x_probe`` only a fingerprint."""
        clock = self._stopwatch.read()
        return {
            "step": self._step,
            "probes": self.probes,
            "last_probed": self.last_probed,
            "failures": self.failures,
            "clock": {field.name: getattr(clock, field.name) for field in fields(clock)},
            "x_probe": _fingerprint(self.x_probe),
            "indices": self.indices,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Go on where :meth:`state_dict` was taken; call it before ``follow()`` or the first ``step()``.

        Args:
            state: what :meth:`state_dict` returned.
            strict: refuse a state that was saved with other probe samples: the curves would not compare.

        Raises:
            ProbeError: this monitor has begun already; other probe samples (``strict``); not such a state.

        """
        if self._step or self.probes:
            raise ProbeError(
                f"this monitor has begun: {self._step} steps, {self.probes} probes.\n"
                "Load first:  monitor.load_state_dict(state); monitor.follow(optimizer)"
            )
        missing = [
            key for key in ("step", "probes", "failures", "clock", "x_probe", "indices") if key not in state
        ]
        if missing:
            raise ProbeError(f"this is no state of a Monitor: it lacks {missing}.")
        if strict and state["x_probe"] != _fingerprint(self.x_probe):
            where = "" if state["indices"] is None else f" (it was saved with indices={state['indices']})"
            raise ProbeError(
                "the state was saved with other probe samples: the curves would not compare.\n"
                f"Pass the same x_probe{where}, or write:  monitor.load_state_dict(state, strict=False)"
            )
        self._step = int(state["step"])
        self.probes = int(state["probes"])
        self.last_probed = state.get("last_probed")
        self.failures = int(state["failures"])
        self.indices = self.indices if state["indices"] is None else [int(i) for i in state["indices"]]
        self._stopwatch = _Stopwatch(Clock(**state["clock"]))

    def close(self) -> None:
        """Stop following, let go of the model, and close the writers; the history stays readable."""
        if self._closed:
            return
        self._closed = True
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._stopwatch.stop()
        self._probe.close()
        for writer in self.writers:
            with self._guarded(f"{type(writer).__name__}.close"):
                writer.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Monitor({self.schedule}, steps={self._step}, probes={self.probes}, failures={self.failures}, "
            f"overhead={self.overhead:.2%})"
        )

    def _after_optimizer_step(self, *_: object) -> None:
        self._counted()

    @property
    def _writes(self) -> bool:
        return self._ranks is None or self._ranks.rank == 0

    def _measured(self) -> GeometryReport | None:
        def measured(x: Any) -> GeometryReport:
            return _on_cpu(self._probe.measure(x, progress=False))

        if self._ranks is None or self._alone:
            return measured(self.x_probe)
        return self._ranks.measured(self.model, self.x_probe, self._step, measured)

    def _counted(self, at: int | None = None) -> GeometryReport | None:
        self._refuse_if_closed()
        self._begin()
        before, self._step = self._step, max(self._step, self._step + 1 if at is None else at)
        if time.perf_counter() < self._rests_until:
            return None
        # Reading the clock is most of what a step costs here; these schedules do not look at it.
        clock = self._stopwatch.read() if self._alone else _UNREAD
        due = any(self.schedule.due(step, clock) for step in range(before + 1, self._step + 1))
        if due:
            return self.probe_now()
        if type(self.schedule) is Budget:
            # To ask at every step would cost a small model a per cent.
            self._rests_until = time.perf_counter() + self.schedule.pause(clock)
        return None

    def _begin(self) -> None:
        if not self._stopwatch.running:
            _first_use(self._device())
            self._stopwatch.start()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ProbeError("this monitor is closed; make a new one:  tgp.Monitor(model, x_probe, ...)")

    def _device(self) -> torch.device:
        # The model's, not the batch's: monitors are often made before the model moves.
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            return tensor.device
        return next(leaf.device for leaf in tree_leaves(self.x_probe) if isinstance(leaf, Tensor))

    def _write_own_accounts(self, writers: Sequence[Writer]) -> None:
        accounts = {"geometry/failures": float(self.failures)}
        if self.probes > 1 and self._step:  # until then there is no training to take a share of
            accounts["geometry/overhead"] = self.overhead
        for writer in writers:
            write_scalar = getattr(writer, "write_scalar", None)
            if write_scalar is not None:
                with self._guarded(f"{type(writer).__name__}.write_scalar"):
                    for tag, value in accounts.items():
                        write_scalar(tag, value, self._step)

    def _write_map(self, tag: str, draw_map: MapOf) -> None:
        with on_this_rank():  # the other ranks draw nothing, and would be waited for
            if isinstance(draw_map, Line | Plane):
                figure = scan(self.model, draw_map, progress=False, **self._scanned).plot(
                    title=f"{tag}, step {self._step}"
                )
            else:
                figure = draw_map(self.model)
        for writer in self.writers:
            write_figure = getattr(writer, "write_figure", None)
            if write_figure is not None:
                write_figure(tag, figure, self._step)
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is not None:
            pyplot.close(figure)

    @contextlib.contextmanager
    def _guarded(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failures += 1
            self.last_error = error
            if self.on_error == "raise":
                raise
            kind = (doing, type(error).__name__)
            if kind not in self._shown:
                self._shown.add(kind)
                warnings.warn(
                    f"torchgeom_probe.Monitor, step {self._step}: {doing} failed, and training goes on "
                    f"(shown once, counted in monitor.failures; on_error='raise' stops here).\n"
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=_level_of_the_caller(),
                )


class _Stopwatch:
    """Splits the time since its start into training and probing; goes on from an earlier reading."""

    def __init__(self, earlier: Clock | None = None) -> None:
        self._before = earlier or Clock()
        self._began: float | None = None
        self._stopped: float | None = None
        self._probe_seconds = 0.0
        self._last_probe_seconds = self._before.last_probe_seconds
        self._training_at_probe: float | None = None
        self._entered: float | None = None

    @property
    def running(self) -> bool:
        return self._began is not None

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        if self._stopped is None:
            self._stopped = time.perf_counter()

    def _training(self) -> float:
        if self._began is None:
            return 0.0
        now = time.perf_counter() if self._stopped is None else self._stopped
        return (now if self._entered is None else self._entered) - self._began - self._probe_seconds

    def read(self) -> Clock:
        training = self._training()
        running = 0.0 if self._entered is None else time.perf_counter() - self._entered
        since = self._before.since_last_probe + training
        return Clock(
            training_seconds=self._before.training_seconds + training,
            probe_seconds=self._before.probe_seconds + self._probe_seconds + running,
            last_probe_seconds=self._last_probe_seconds,
            since_last_probe=since if self._training_at_probe is None else training - self._training_at_probe,
        )

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        training = self._training()
        self._entered = begin = time.perf_counter()
        try:
            yield
        finally:
            self._entered = None
            self._last_probe_seconds = time.perf_counter() - begin
            self._probe_seconds += self._last_probe_seconds
            self._training_at_probe = training


def _level_of_the_caller() -> int:
    """How many frames up the training loop is: what lies between is ours, the optimizer's hook and contextlib."""
    between = ("torchgeom_probe", "contextlib", "torch")
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in between:
        level, frame = level + 1, frame.f_back
    return level


def _schedule(every: int | None, max_overhead: float | None, schedule: Schedule | None) -> Schedule:
    if schedule is not None:
        if every is not None or max_overhead is not None:
            raise ProbeError(
                "schedule= stands in place of every= and max_overhead=; pass one or the other.\n"
                "Both limits in one:  schedule=tgp.Budget(0.02, every=100)"
            )
        if not callable(getattr(schedule, "due", None)):
            raise ProbeError(
                f"a schedule has a method due(step, clock); {schedule!r} has none.\n"
                "Write:  schedule=tgp.Every(100)"
            )
        return schedule
    if max_overhead is not None:
        return Budget(max_overhead, every=1 if every is None else every)
    return Every() if every is None else Every(every)


def _writers(writer: Writer | Sequence[Writer] | None) -> tuple[Writer, ...]:
    if writer is None:
        return ()
    candidates = tuple(writer) if isinstance(writer, list | tuple) else (writer,)
    for candidate in candidates:
        if isinstance(candidate, type) or not isinstance(candidate, Writer):
            raise ProbeError(
                f"writer= takes anything with write(step, report) and close(), or a list of such; "
                f"got {candidate!r}.\n"
                "Write:  writer=TensorBoardWriter('runs/a')  or  writer=tgp.CSVWriter('geometry.csv')"
            )
    return candidates


def _refuse_unless_count(name: str, value: Any, *, example: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ProbeError(f"{name} is a whole number of 1 or more; got {value!r}.\nWrite:  {example}")


def _on_cpu(report: GeometryReport) -> GeometryReport:
    layers = {}
    for name, layer in report.items():
        tensors = {
            f.name: getattr(layer, f.name)
            for f in fields(layer)
            if isinstance(getattr(layer, f.name), Tensor)
        }
        moved = {key: value.detach().cpu() for key, value in tensors.items()}
        spectrum = layer.spectrum
        if spectrum is not None:
            spectrum = replace(spectrum, nodes=spectrum.nodes.cpu(), weights=spectrum.weights.cpu())
        layers[name] = replace(layer, **moved, spectrum=spectrum)
    return GeometryReport(layers)


def _eight_directions(tensors: Sequence[Tensor], source: str | nn.Module | None) -> Subspace:
    # The input's dimension bounds k; that of an inner module's output is not known before the model runs.
    sizes = [tensor[0].numel() for tensor in tensors if tensor.is_floating_point()]
    return Subspace(k=min(8, *sizes) if sizes and source is None else 8, seed=0)


def _fingerprint(x_probe: Any) -> str:
    digest = hashlib.sha256()
    shapes = []
    for tensor in tree_leaves(x_probe):
        if isinstance(tensor, Tensor):
            shapes.append(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}")
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{'+'.join(shapes)}:{digest.hexdigest()[:16]}"


@cache
def _first_use(device: torch.device) -> None:
    # The first forward derivative in a process makes torch import some 900 modules (about 4 s). That is no
    # cost of this model's probes: on a budget it would be the price that the second probe has to wait for.
    with contextlib.suppress(Exception):  # what is wrong will show in the first probe
        measure(nn.Tanh(), torch.zeros(1, 2, device=device), layers=[""], estimator=Subspace(k=1))


def _synchronize(device: torch.device) -> None:
    # Kernels of the training step that are still running are not the probe's cost.
    if device.type != "cpu":
        synchronize = getattr(torch.get_device_module(device), "synchronize", None)
        if synchronize is not None:
            synchronize()
