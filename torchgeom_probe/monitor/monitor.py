"""Probing inside a training loop: when (a schedule), at what (a fixed batch), and where the reports go."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from torchgeom_probe.distributed import Ranks
from torchgeom_probe.errors import ProbeError, refuse_unknown
from torchgeom_probe.monitor.affordable import affordable
from torchgeom_probe.monitor.boundary import BoundaryWatch
from torchgeom_probe.monitor.drift import Drift
from torchgeom_probe.monitor.failures import Failures
from torchgeom_probe.monitor.maps import MapOf, refuse_no_maps, write_map
from torchgeom_probe.monitor.optimizer import Followed
from torchgeom_probe.monitor.samples import ProbeSamples, fingerprint, labels_of, refuse_no_samples
from torchgeom_probe.monitor.schedules import (
    Budget,
    Clock,
    Every,
    LogSpaced,
    Schedule,
    refuse_unless_count,
    schedule_of,
)
from torchgeom_probe.monitor.stopwatch import Stopwatch
from torchgeom_probe.monitor.writers import Writer, writers_of
from torchgeom_probe.probe import GeometryProbe, ProbeOptions, probe_of
from torchgeom_probe.report import GeometryReport
from torchgeom_probe.shapes import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

_UNREAD = Clock()


class Monitor:
    """Probe a model while it trains, on a fixed batch and a schedule, and send the reports to a writer.

    The model, its training and the random state are as they would be without it, bit by bit: a probe measures in eval
    mode, draws its directions from its own generator, and puts everything back.

    Two ways to count the training's steps.  ``monitor.follow(optimizer)`` needs no change to the loop: it probes at
    once (step 0: before training), then after every ``optimizer.step()`` that the schedule picks (with gradient
    accumulation that is once per update, and an update that AMP's scaler skips does not count).  Or call
    ``monitor.step()`` in the loop, once per training step; then step 0 is ``monitor.probe_now()`` before the loop.

    Args:
        model_or_probe: any ``nn.Module``, or a :class:`~torchgeom_probe.GeometryProbe` of it (yours to close).
        x_probe: [B, *shape], the samples to probe at, copied; the same at every step, so that curves compare. For a
            model of several inputs a tuple or a dict of them, as in :meth:`GeometryProbe.measure`.
        every: probe each N steps (100 where neither ``max_overhead`` nor ``schedule`` is given).
        max_overhead: the share of the run's time that probes may take; with ``every``, at multiples of it only.
        schedule: any :class:`Schedule` in place of the two: ``Every``, ``LogSpaced``, ``Budget``, or your own.
        writer: a directory for TensorBoard (``"runs/a"``), a file ``*.csv`` or ``*.jsonl``, a ``SummaryWriter`` that
            you already have, a :class:`~torchgeom_probe.Writer`, a sequence of these, or None (then read
            ``monitor.history``).  A writer also gets ``geometry/failures`` and, from the second probe on,
            ``geometry/overhead``, the share of the time.
        on_error: ``"warn"``: an exception inside a probe or a writer is counted (``failures``), kept (``last_error``)
            and shown once per kind as a ``RuntimeWarning``, and the training goes on; ``"raise"``: it is raised.  What
            is wrong with the set-up is raised by the first probe in any case: a batch that the model cannot take,
            layers that never run, a file that cannot be written.
        indices: where ``x_probe`` stands in your data set; kept in ``state_dict()``, and shown by writers.
        labels: each probe sample's class or name, for writers that show samples (TensorBoard's Geometry tab).
        keep: how many reports ``history`` holds, the latest ones; None for all.  Of all but the last, what only a warm
            start would need (``right_singular_vectors``) is let go.
        maps: tag → a :class:`~torchgeom_probe.Line` or :class:`~torchgeom_probe.Plane`, scanned at the same layers
            along its own tangents; or a function of the model that returns a result, such as ``lambda model:
            tgp.scan(model, plane, readout=...)``, or a matplotlib figure (it is closed afterwards).  The writers that
            draw (TensorBoard) show it under the tag.
        maps_every: draw the maps at each M-th probe.
        boundary: [B, *input], held-out samples of a classifier: at each probe a study of the same pairs of them, where
            their boundaries are now: charts ``boundary/…``, profiles in the Geometry tab, ``boundary.history``.
        distributed: None: where the model is a DistributedDataParallel, its ranks share the samples of each probe;
            True: all ranks of the default process group do (they hold the same weights); False: each process probes for
            itself.
        drift: chart the median :class:`~torchgeom_probe.Drift` distance since the first probe, ``drift/NN_layer``.
        options: of the probe, as :class:`~torchgeom_probe.GeometryProbe` has them: ``layers``, ``estimator``, ….  The
            directions that it draws are the same at every step.

    With DDP make the monitor on every rank, with the same ``x_probe``, and step it on every rank.  Each measures its
    share; rank 0 has the reports, ``history`` and the writers, elsewhere they stay empty.  No collective is called, so
    nothing hangs where some ranks do not reach a probe: rank 0 measures what is missing.  A schedule that goes by the
    clock (``max_overhead``, one of your own) is due at other steps on other ranks: rank 0 measures alone then.

    Attributes:
        probes: how many probes were started.
        last_probed: the step of the latest probe, or None.

    Raises:
        ProbeError: an argument makes no sense; the layers cannot be found; ``step()`` while following or after
            ``close()``.

    Cost: per probe about one forward pass over (1 + k)·B samples and one copy of the report to the host; per step in
    between a comparison.  On an accelerator a probe waits for the work in flight before it starts its watch.  What
    torch imports at its first forward derivative, seconds, comes before the watch is started.

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
        model_or_probe: nn.Module | GeometryProbe,
        x_probe: Any,
        *,
        every: int | None = None,
        max_overhead: float | None = None,
        schedule: Schedule | None = None,
        writer: Any = None,
        on_error: Literal["warn", "raise"] = "warn",
        indices: Sequence[int] | None = None,
        labels: Sequence[int | str] | Tensor | None = None,
        keep: int | None = 1000,
        maps: Mapping[str, MapOf] | None = None,
        maps_every: int = 10,
        boundary: Tensor | None = None,
        distributed: bool | None = None,
        drift: bool = False,
        **options: Unpack[ProbeOptions],
    ) -> None:
        refuse_unknown(options, Monitor, *ProbeOptions.__annotations__)
        refuse_no_samples(x_probe)
        if keep is not None:
            refuse_unless_count("keep", keep, example="keep=1000")
        refuse_unless_count("maps_every", maps_every, example="maps_every=10")
        self.schedule = schedule_of(every, max_overhead, schedule)
        self.writers = writers_of(writer)
        self.maps = dict(maps or {})
        self.maps_every = maps_every
        refuse_no_maps(self.maps, self.writers)
        self.boundary = None if boundary is None else BoundaryWatch(boundary)
        self.x_probe = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), x_probe)
        self.indices = None if indices is None else [int(i) for i in indices]
        self.labels = labels_of(labels, x_probe)
        self.probes = 0
        self.last_probed: int | None = None
        self._failures = Failures(on_error)
        self._probe = probe_of(model_or_probe, options)
        self._own_probe = self._probe is not model_or_probe
        self.model = self._probe.wrapped
        self._ranks = Ranks.of(self.model, distributed, samples=fingerprint(self.x_probe))
        self._writes = self._ranks is None or self._ranks.rank == 0
        # A schedule that goes by the clock is due at other steps on other ranks.
        self._alone = type(self.schedule) not in (Every, LogSpaced)
        self._history: deque[tuple[int, GeometryReport]] = deque(maxlen=keep)
        self.drift: Drift | None = None
        self._charts_drift = drift
        self._begun_drift: Mapping[str, Any] | None = None  # where that of the run that goes on here began
        self._step = 0
        #: How many of these steps were none: on the device until a probe is due, for to ask is to wait for it.
        self._skipped: Tensor | int = 0
        self._set_up = False
        self._rests_until = 0.0  # a moment before which the schedule would say no
        self._stopwatch = Stopwatch()
        self._followed: Followed | None = None
        self._closed = False

    @property
    def history(self) -> list[tuple[int, GeometryReport]]:
        """(step, report) of the latest ``keep`` probes, oldest first; tensors on the CPU."""
        return list(self._history)

    @property
    def steps(self) -> int:
        """How many training steps were counted."""
        self._take_off_skipped()
        return self._step

    @property
    def failures(self) -> int:
        """How many times measuring, a writer or a map raised."""
        return self._failures.count

    @property
    def last_error(self) -> Exception | None:
        """The latest of those exceptions, or None."""
        return self._failures.last

    @property
    def overhead(self) -> float:
        """The share of the wall-clock time that probes took, writers included, since the first step."""
        clock = self._stopwatch.read()
        total = clock.training_seconds + clock.probe_seconds
        return clock.probe_seconds / total if total else 0.0

    def step(self, *, at: int | None = None) -> GeometryReport | None:
        """Count one training step, and probe if it is due; returns the report, or None.

        Args:
            at: how many training steps were made, where the loop keeps its own count.  A count that has not grown
                (gradient accumulation) is no step; one that grew by several probes once if any of them was due.
        """
        if self._followed is not None:
            raise ProbeError(
                "this monitor follows an optimizer, which counts the steps; step() would count them twice.\n"
                "Leave out monitor.step(), or monitor.follow(optimizer)."
            )
        return self._counted(at)

    def follow(self, optimizer: torch.optim.Optimizer) -> Monitor:
        """Probe now if training has not begun, then after each optimizer step that is due; return self.

        Of a wrapper such as accelerate's the optimizer inside is followed.
        """
        if self._followed is not None:
            raise ProbeError("this monitor follows an optimizer already; make a second tgp.Monitor for the second one.")
        self._refuse_if_closed()
        followed = Followed(optimizer, self.model, lambda overflow: self._counted(overflow=overflow))
        try:
            if self._step == 0 and self.probes == 0:
                self.probe_now()
        except BaseException:
            followed.close()
            raise
        self._followed = followed
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
        with self._stopwatch.probing(device):
            self._take_off_skipped()
            first, self._set_up = not self._set_up, True
            draw = bool(self.maps) and self.probes % self.maps_every == 0 and self._writes
            self.probes += 1
            self.last_probed = self._step
            if first:  # a batch that the model cannot take, layers that never run, k > d
                with self._failures.counted("the set-up", self._step, raised=True):
                    self._probe.cost(self._samples_on(device))
            with self._failures.counted("measuring", self._step):
                self.x_probe = self._samples_on(device)
                report = self._measured()
                if report is not None:
                    if self._history:
                        earlier, last = self._history.pop()
                        self._history.append((earlier, _without_vectors(last)))
                    self._history.append((self._step, report))
            writers = [writer for writer in self.writers if report is None or self._wrote(writer, report, first)]
            if draw:
                for tag, made_from in self.maps.items():
                    with self._failures.counted(f"the map {tag!r}", self._step):
                        write_map(tag, made_from, self.writers, self._step, self._probe, self.model)
            if self._writes:
                self._write_numbers(writers, first)
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: plain values, of ``x_probe`` a fingerprint, of the drift where it began."""
        return {
            "step": self.steps,
            "probes": self.probes,
            "last_probed": self.last_probed,
            "failures": self.failures,
            "clock": asdict(self._stopwatch.read()),
            "x_probe": fingerprint(self.x_probe),
            "indices": self.indices,
            "drift": self._begun_drift if self.drift is None else self.drift.state_dict(),
            "boundary": None if self.boundary is None else self.boundary.state_dict(),
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
        missing = [key for key in ("step", "probes", "failures", "clock", "x_probe", "indices") if key not in state]
        if missing:
            raise ProbeError(f"this is no state of a Monitor: it lacks {missing}.")
        if strict and state["x_probe"] != fingerprint(self.x_probe):
            where = "" if state["indices"] is None else f" (it was saved with indices={state['indices']})"
            raise ProbeError(
                "the state was saved with other probe samples: the curves would not compare.\n"
                f"Pass the same x_probe{where}, or write:  monitor.load_state_dict(state, strict=False)"
            )
        self._step = int(state["step"])
        self.probes = int(state["probes"])
        self.last_probed = state.get("last_probed")
        self._failures.count = int(state["failures"])
        self.indices = self.indices if state["indices"] is None else [int(i) for i in state["indices"]]
        self._stopwatch = Stopwatch(Clock(**state["clock"]))
        self._begun_drift = state.get("drift")
        if self.boundary is not None and state.get("boundary") is not None:
            self.boundary.load_state_dict(state["boundary"])

    def close(self) -> None:
        """Stop following, let go of the model, and close the writers; the history stays readable."""
        if self._closed:
            return
        self._closed = True
        if self._followed is not None:
            self._followed.close()
            self._followed = None
        self._stopwatch.stop()
        if self._own_probe:
            self._probe.close()
        for writer in self.writers:
            with self._failures.counted(f"{type(writer).__name__}.close", self._step):
                writer.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Monitor({self.schedule}, steps={self.steps}, probes={self.probes}, failures={self.failures}, "
            f"overhead={self.overhead:.2%})"
        )

    def _take_off_skipped(self) -> bool:
        """Count the steps that were none no more; return whether there were any."""
        skipped, self._skipped = int(self._skipped), 0
        self._step -= skipped
        return skipped > 0

    def _measured(self) -> GeometryReport | None:
        def measured(x: Any, start: GeometryReport | None = None) -> GeometryReport:
            return _on_cpu(self._probe.measure(x, start=start, progress=False))

        if self._ranks is None or self._alone:
            last = self._history[-1][1] if self._history else None
            if last is None or all(layer.right_singular_vectors is None for layer in last.values()):
                return measured(self.x_probe)
            estimator = self._probe.estimator
            try:
                self._probe.estimator = affordable(estimator, last, self.schedule, self._stopwatch.read())
                return measured(self.x_probe, last)
            finally:
                self._probe.estimator = estimator
        parts = self._ranks.measured(self.model, self.x_probe, self._step, measured)
        return None if parts is None else GeometryReport.joined(parts)

    def _counted(self, at: int | None = None, *, overflow: Tensor | None = None) -> GeometryReport | None:
        self._refuse_if_closed()
        self._begin()
        before, self._step = self._step, max(self._step, self._step + 1 if at is None else at)
        if overflow is not None:
            self._skipped = self._skipped + (overflow > 0)
        if time.perf_counter() < self._rests_until:
            return None
        # Reading the clock is most of what a step costs here; these schedules do not look at it.
        clock = self._stopwatch.read() if self._alone else _UNREAD
        due = any(self.schedule.due(step, clock) for step in range(before + 1, self._step + 1))
        # No step that is due can be passed over: those that were none are taken off as soon as the count gets there.
        if due and self._take_off_skipped():
            due = not overflow and self.schedule.due(self._step, clock)
        if due:
            return self.probe_now()
        if type(self.schedule) is Budget:
            # To ask at every step would cost a small model a per cent.
            self._rests_until = time.perf_counter() + self.schedule.pause(clock)
        return None

    def _begin(self) -> None:
        if not self._stopwatch.running:
            self._stopwatch.start(self._device())

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ProbeError("this monitor is closed; make a new one:  tgp.Monitor(model, x_probe, ...)")

    def _device(self) -> torch.device:
        # The model's, not the batch's: monitors are often made before the model moves.
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not tensor.is_meta:  # a spare module, or weights that are moved in when they are needed
                return tensor.device
        return next(leaf.device for leaf in tree_leaves(self.x_probe) if isinstance(leaf, Tensor))

    def _samples_on(self, device: torch.device) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), self.x_probe)

    def _wrote(self, writer: Writer, report: GeometryReport, first: bool) -> bool:
        before = self.failures
        with self._failures.counted(f"{type(writer).__name__}.write", self._step, raised=first):
            writer.write_samples(self._step, ProbeSamples(self._probe, self.x_probe, self.indices, self.labels))
            writer.write(self._step, report)
        return self.failures == before

    def _write_numbers(self, writers: Sequence[Writer], first: bool) -> None:
        numbers, study = dict[str, float](), None
        if self._charts_drift:
            with self._failures.counted("the drift", self._step, raised=first):
                numbers |= self._drifted().charts()
        if self.boundary is not None:
            with self._failures.counted("the boundaries", self._step):
                numbers |= self.boundary.charts(study := self.boundary.measured(self._probe, self._step))
        numbers["geometry/failures"] = float(self.failures)
        if self.probes > 1 and self._step:  # until then there is no training to take a share of
            numbers["geometry/overhead"] = self.overhead
        for writer in writers:
            with self._failures.counted(f"{type(writer).__name__}.write_scalar", self._step, raised=first):
                for tag, value in numbers.items():
                    writer.write_scalar(tag, value, self._step)
                if study is not None:
                    writer.write_study(study, self._step)

    def _drifted(self) -> Drift:
        if self.drift is None:
            drift = Drift(self._probe.like(layers=self._probe.layers), self.x_probe)
            if self._begun_drift is not None:
                drift.load_state_dict(self._begun_drift)
            self.drift = drift
        return self.drift


def _on_cpu(report: GeometryReport) -> GeometryReport:
    return GeometryReport.of({n: t.cpu() for n, t in report.tensors(large=True).items()}, report.metadata())


def _without_vectors(report: GeometryReport) -> GeometryReport:
    layers = {name: replace(layer, right_singular_vectors=None, sketch=None) for name, layer in report.items()}
    return GeometryReport(layers, left_out=report.left_out)
