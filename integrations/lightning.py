"""A Lightning callback around :class:`~torchgeom_probe.Monitor`, for pytorch_lightning and lightning.pytorch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from math import isfinite
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils._pytree import tree_map_only

from torchgeom_probe.errors import ProbeError, optional, refuse_unknown
from torchgeom_probe.monitor.monitor import Monitor
from torchgeom_probe.monitor.schedules import refuse_unless_count
from torchgeom_probe.monitor.writers import Writer, charts, label
from torchgeom_probe.probe import ProbeOptions
from torchgeom_probe.report import GeometryReport
from torchgeom_probe.shapes import Tensor

# Under these names a batch that is a dict keeps the model's input, as data sets have them.
_INPUT_KEYS = ("x", "input", "inputs", "image", "images", "img", "pixel_values", "features", "data")

# Strategies whose parameters lie in parts on several ranks: one rank alone cannot run the model.
_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel", "XLAFSDP")


def _callback_bases() -> tuple[type, ...]:
    # The same library goes by two names, and each knows its own base class only. Whichever the user has
    # imported is the one that the Trainer comes from; both, where something else (lightly) imported the other.
    loaded = [name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules]
    if not loaded:
        loaded = ["pytorch_lightning" if find_spec("lightning") is None else "lightning.pytorch"]
    return tuple(optional(name, extra="lightning").Callback for name in loaded)


if TYPE_CHECKING:

    class _Callback:
        """What the type checker sees of Lightning's base class."""
else:
    _about = {"__doc__": "Lightning's own base class, or both of them.", "__module__": "lightning"}
    _Callback = type("_Callback", _callback_bases(), _about)


class GeometryCallback(_Callback):
    """Probe a LightningModule while it trains, and send the reports to the Trainer's own loggers.

    Works with a Trainer of ``pytorch_lightning`` and of ``lightning.pytorch``; give it in a list:
    ``Trainer(callbacks=[GeometryCallback(...)])``.  It probes before the first step (step 0), after every optimizer
    step that the schedule picks (``trainer.global_step``: with gradient accumulation once an update), at the end of
    each epoch (``epoch_ends=True``) and of the fit; never in the sanity check, never twice at one step.  Weights,
    gradients, random state and modes stay bit for bit as they would be without it; autocast is off inside a probe, and
    true half or double precision is the model's own.

    Every TensorBoard logger gets all charts of :class:`~torchgeom_probe.integrations.tensorboard.TensorBoardWriter`,
    any other logger those with one number a step (no bands, histograms or maps); without a logger, and under
    ``fast_dev_run``, read ``callback.history``.

    What a resumed run needs is in the checkpoint: the step, the latest probe, the fingerprint of the probe samples, and
    the samples themselves where the callback chose them.  A run that is resumed into the same TensorBoard directory
    hides the events from the checkpoint's step on and probes at that step anew, so no point is missing or doubled.

    With DDP the ranks share the samples of each probe, and rank 0 writes.  Several callbacks in one Trainer need
    different ``layers`` or ``model``, and a ``writer`` each.

    Args:
        every: probe each N optimizer steps (100 by default).
        x_probe: [B, *shape], the samples to probe at, in the model's own preprocessing.  By default the first
            ``samples`` of the first validation batch that the sanity check shows, or else of the first training batch.
        samples: how many of that batch.
        inputs: batch → the model's input, for ``x_probe`` by default.  Without it: a tensor itself, the first part of a
            tuple or list (the first view of lightly's ``(views, targets, names)``), and of a dict what goes by ``x``,
            ``input``, ``image``, ``pixel_values`` or the like.
        model: what to probe: the LightningModule (``""``), a submodule's name, or a function of the LightningModule
            that returns an ``nn.Module`` (such as ``integrations.lightly.encoder``).
        epoch_ends: probe after every training epoch too.
        writer: what :class:`~torchgeom_probe.Monitor` takes, in place of the Trainer's loggers.
        options: anything else that :class:`~torchgeom_probe.Monitor` takes (``max_overhead``, ``maps``, ``on_error``,
            …), and the options of :class:`~torchgeom_probe.GeometryProbe` (``layers``, ``estimator``, …).

    Attributes:
        monitor: the :class:`~torchgeom_probe.Monitor` of the running or latest fit, or None before it.

    Raises:
        ProbeError: neither package is installed; an option that Monitor does not have; a batch without a tensor that
            could be the input; FSDP or DeepSpeed; at the start of the fit, what Monitor refuses.

    Cost: that of the Monitor; volumes and scales are in nats.

    >>> import torch, pytorch_lightning as pl
    >>> class Classifier(pl.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    ...     def forward(self, x):
    ...         return self.net(x)
    ...     def training_step(self, batch, index):
    ...         return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> geometry = GeometryCallback(layers=["net.1"], every=2)
    >>> assert isinstance(geometry, pl.Callback) and geometry.history == []
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        x_probe: Any = None,
        samples: int = 16,
        inputs: Callable[[Any], Any] | None = None,
        model: str | Callable[[Any], nn.Module] = "",
        epoch_ends: bool = False,
        writer: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        passed_on = set(inspect.signature(Monitor).parameters) - {"model_or_probe", "distributed", "options"}
        refuse_unknown(options, GeometryCallback, *sorted(passed_on), *ProbeOptions.__annotations__)
        refuse_unless_count("samples", samples, example="samples=16")
        self.every = every
        self.x_probe = x_probe
        self.samples = samples
        self.inputs = _input_of if inputs is None else inputs
        self.model = model
        self.epoch_ends = epoch_ends
        self.writer = writer
        self.options = options
        self.monitor: Monitor | None = None
        self._running = False
        self._chosen: Any = None
        self._state: Mapping[str, Any] = {}
        self._earlier: list[tuple[int, GeometryReport]] = []

    @property
    def history(self) -> list[tuple[int, GeometryReport]]:
        """(step, report) of the latest probes, oldest first; of the earlier fits that this one goes on from too."""
        return self._earlier + ([] if self.monitor is None else self.monitor.history)

    @property
    def state_key(self) -> str:
        """Under which a checkpoint keeps this callback's state: its model and layers tell several apart."""
        layers = _spelled(self.options.get("layers", "auto"))
        return f"GeometryCallback{{'model': {_spelled(self.model)}, 'layers': {layers}}}"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the monitor's state, and the samples if the callback chose them."""
        if self.monitor is None:
            return dict(self._state)
        return {"monitor": self.monitor.state_dict(), "x_probe": self._chosen}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of a checkpoint; the Trainer calls it before the fit starts."""
        self._state = dict(state_dict)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first batch of the sanity check: no probe, only its samples."""
        if trainer.sanity_checking and self.x_probe is None and self._chosen is None and not self._state:
            self._chosen = self._first_samples(batch)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Probe before the first step, if the samples are known by now."""
        self._end()
        self._chosen = self._state.get("x_probe", self._chosen)
        if self.x_probe is not None or self._chosen is not None:
            self._begin(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Probe before the first step, at the samples of the first training batch."""
        if not self._running:
            self._chosen = self._first_samples(batch)
            self._begin(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Probe if an optimizer step was made and it is due."""
        if self._running and self.monitor is not None:
            self.monitor.step(at=trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Probe with ``epoch_ends``, unless this very step was probed."""
        if self.epoch_ends:
            self._probe_unless_done(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Probe the trained network while its loggers are open, unless this very step was probed."""
        self._probe_unless_done(trainer)
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the writers of a run that ends early, Ctrl-C included."""
        self._end()

    def _probe_unless_done(self, trainer: Any) -> None:
        if not self._running or self.monitor is None:
            return
        self.monitor.step(at=trainer.global_step)
        if self.monitor.last_probed != trainer.global_step:
            self.monitor.probe_now()

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        _refuse_sharded(trainer)
        x_probe = self._chosen if self.x_probe is None else self.x_probe
        if trainer.world_size > 1:
            # Every rank gets here at the start of the fit. Each saw another batch, and all must probe at one.
            x_probe = trainer.strategy.broadcast(x_probe, src=0)
            self._chosen = x_probe if self.x_probe is None else None
        self._earlier = [probed for probed in self.history if probed[0] < trainer.global_step]
        self.monitor = Monitor(
            self._probed_part(pl_module),
            trainer.precision_plugin.convert_input(x_probe),
            every=self.every,
            writer=self._writers(trainer),
            distributed=trainer.world_size > 1,
            **self._options(trainer),
        )
        self._running = True
        state, self._state = self._state.get("monitor"), {}
        if state is not None and state["step"] <= trainer.global_step:
            self.monitor.load_state_dict(state)
        # One probe at the start of every fit: a resumed one hides the events from its checkpoint's step on.
        before = self.monitor.probes
        self.monitor.step(at=trainer.global_step)
        if self.monitor.probes == before:
            self.monitor.probe_now()

    def _end(self) -> None:
        if self.monitor is not None and self._running:
            self._running = False
            # A later fit with the same Trainer goes on counting where this one ended.
            self._state = self.state_dict()
            self.monitor.close()

    def _options(self, trainer: Any) -> dict[str, Any]:
        # Maps need a writer, and there is none by design on other ranks and in a trial run.
        unwritten = not trainer.is_global_zero or trainer.fast_dev_run
        return {k: v for k, v in self.options.items() if not (unwritten and k in ("maps", "maps_every"))}

    def _probed_part(self, pl_module: Any) -> nn.Module:
        if not isinstance(self.model, str):
            return self.model(pl_module)
        try:
            return pl_module.get_submodule(self.model)
        except AttributeError as error:
            names = ", ".join(repr(name) for name, _ in pl_module.named_children())
            raise ProbeError(
                f"model={self.model!r} is no submodule of this {type(pl_module).__name__}; it has {names}."
            ) from error

    def _first_samples(self, batch: Any) -> Any:
        x = self.inputs(batch)
        return tree_map_only(Tensor, lambda t: t.detach()[: self.samples].to("cpu", copy=True) if t.dim() else t, x)

    def _writers(self, trainer: Any) -> Any:
        if not trainer.is_global_zero:
            return None
        if self.writer is not None:
            return self.writer
        writers: list[Any] = []
        for logger in trainer.loggers:
            kinds = {kind.__name__ for kind in type(logger).__mro__}
            if "TensorBoardLogger" in kinds:
                if trainer.global_step:
                    _hide_events_from(trainer.global_step, logger.experiment)
                writers.append(logger.experiment)
            elif "DummyLogger" not in kinds:
                writers.append(_Numbers(logger))
        return writers


class _Numbers(Writer):
    """Into a Lightning logger of which nothing is known but that it takes numbers."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def write(self, step: int, report: GeometryReport) -> None:
        for place, (name, layer) in enumerate(report.items()):
            scalars = charts(layer, label(place, name))
            self.logger.log_metrics({tag: value for tag, value in scalars.items() if isfinite(value)}, step=step)

    def write_scalar(self, tag: str, value: float, step: int) -> None:
        self.logger.log_metrics({tag: value}, step=step)


def _input_of(batch: Any) -> Any:
    part = batch
    while not isinstance(part, Tensor):
        if isinstance(part, Mapping):
            key = next((key for key in _INPUT_KEYS if isinstance(part.get(key), Tensor)), None)
            part = None if key is None else part[key]
        elif isinstance(part, Sequence) and not isinstance(part, str) and part:
            part = part[0]
        else:
            part = None
        if part is None:
            keys = f" with the keys {list(batch)}" if isinstance(batch, Mapping) else ""
            raise ProbeError(
                "the probe samples are taken from the first batch, and it is not clear where in a "
                f"{type(batch).__name__}{keys} the model's input is.\n"
                "Say it:  GeometryCallback(inputs=lambda batch: batch[...])  or give the samples:  x_probe=..."
            )
    return part


def _refuse_sharded(trainer: Any) -> None:
    name = type(trainer.strategy).__name__
    if name.startswith(_SHARDED):
        raise ProbeError(
            f"with the strategy {name} no rank has the whole model, and a probe would need them all at once.\n"
            "Train with strategy='ddp', or probe a gathered copy of the checkpoint:  tgp.measure(model, x)"
        )


def _hide_events_from(step: int, events: Any) -> None:
    # What SummaryWriter(purge_step=...) writes: a reader drops whatever an interrupted run left from there on.
    # The Trainer counts from 0, so what it logged before the checkpoint's step lies below it.
    protocol = optional("tensorboard.compat.proto.event_pb2", extra="tensorboard")
    start = protocol.SessionLog(status=protocol.SessionLog.START)
    writer = events._get_file_writer()
    writer.add_event(protocol.Event(step=step, file_version="brain.Event:2"), step)
    writer.add_event(protocol.Event(step=step, session_log=start), step)


def _spelled(spec: Any) -> str:
    if isinstance(spec, str):
        return repr(spec)
    if isinstance(spec, Sequence) and not isinstance(spec, nn.Module):
        return f"[{', '.join(map(_spelled, spec))}]"
    return getattr(spec, "__qualname__", type(spec).__qualname__)
