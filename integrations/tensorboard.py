"""Reports as TensorBoard charts: a tag per layer, a band and a histogram over the samples.

``Monitor(writer="runs/a")`` and ``Monitor(writer=SummaryWriter(...))`` come here: the last line registers them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.monitor.writers import Writer, chart_of, charts, label, local_path, register_writer
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.report import GeometryReport, LayerGeometry
from torchgeom_probe.shapes import Float, Tensor

# Our event files end in this, so that a resumed run can tell its own earlier files from those of the training loop.
_SUFFIX = ".geometry"

# TensorBoard stores float32: what overflows it would come back as inf.
_FLOAT32_MAX = 3.4028234e38

#: Every tag that is written for every report, and what it shows.  CHART stands for what was measured: ``logvol`` (log
#: √det g, or the effective volume), ``frame_volume``, ``scale``, …; NN_layer for each layer's own name.
TAGS = {
    "CHART/NN_layer": "median over the finite samples",
    "CHART_band/NN_layer/p10": "10th percentile: the lower edge of the band",
    "CHART_band/NN_layer/median": "the median again: the middle of the band",
    "CHART_band/NN_layer/p90": "90th percentile: the upper edge of the band",
    "sigma_max/NN_layer": "largest singular value of any sample, of J or of JV on a frame",
    "rank/NN_layer": "median rank",
    "nonfinite/NN_layer": "how many samples have a value of ±inf or nan",
    "CHART_histogram/NN_layer": "histogram of the finite values (histograms=True)",
    "geometry/conventions": "text: estimand, units, n, d, k, normalised or not; anew on a change",
}
#: And where the estimator found them, beside its own value.
EXTRA_TAGS = {
    "scale/NN_layer": "median ½ log(tr g/d), nats: the log of the root mean square stretch of a direction",
    "effective_dimension/NN_layer": "median (tr g)²/tr g²: over how many directions g is spread",
}
#: And by a Monitor, once for all layers.
MONITOR_TAGS = {
    "geometry/failures": "how many times measuring, a writer or a map raised so far",
    "geometry/overhead": "the share of the time that probes took so far (from the second probe on)",
}


class TensorBoardWriter(Writer):
    """Write reports to TensorBoard: a :class:`~torchgeom_probe.Writer`.

    Every layer has the name ``NN_layer``: its zero-padded place in the order of firing, then its name with every
    character other than letters, digits, ``.``, ``-`` and ``_`` replaced by ``_`` (``block#1`` becomes ``04_block_1``;
    the model itself is ``00_model``).  Per report and layer the tags of :data:`TAGS` are written, over the samples of
    the batch: the chart of what was measured, a band and a histogram of it, ``sigma_max/…``, ``rank/…``,
    ``nonfinite/…``.  A :class:`~torchgeom_probe.Monitor` adds those of :data:`MONITOR_TAGS`; the TEXT tab explains all.

    The chart is ``logvol`` for log √det g and the effective volume alone (``Exact``, ``TopK``, and ``Along`` on a
    slice's tangents); else the report's ``quantity``: ``frame_volume``, ``scale``, ….  Whatever else the estimator
    measured has a tag of its own name, with medians over the finite samples: ``scale/…``, ``effective_dimension/…``,
    ``std_error/…``, ``error_bound/…``, ``trace/…``; ``log_pseudo_volume/…`` where a layer has samples of volume 0.  A
    map is an image under its own tag.  The CUSTOM SCALARS tab has all layers in one chart, and one chart with the band
    per layer.  A non-finite number never reaches a chart or a histogram: it is left out, and counted.

    Args:
        log_dir: a directory, or a ``SummaryWriter`` that you already have (yours to resume and to close).
        histograms: whether to write the histograms, the largest part of the file.
        layout: whether to write the custom-scalars layout; a run has one, so turn it off where you write your own.

    A resumed run continues in its directory: at the first write the event file is opened, and where an earlier
    ``TensorBoardWriter`` left events, those at this step and later are hidden (``purge_step``), so no point is doubled.
    TensorBoard hides them for all tags of the directory; so where another ``SummaryWriter`` logs to the same directory
    nothing is purged: pass that writer instead, made with its own ``purge_step``.

    Every write ends with a flush: a run that is killed loses nothing.  Values are stored in float32, as TensorBoard
    does.

    Raises:
        ProbeError: tensorboard is not installed; the events cannot be written (a full disk, a read-only directory).

    Cost: a copy of the report to the host and some 10 kB per report and layer with histograms, 1 kB without.

    >>> import tempfile, torch, torchgeom_probe as tgp
    >>> from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    >>> model, log_dir = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh()), tempfile.mkdtemp()
    >>> report = tgp.measure(model, torch.randn(5, 2), layers=["0", "1"], estimator=tgp.Exact())
    >>> writer = TensorBoardWriter(log_dir)
    >>> writer.write(0, report)
    >>> writer.close()
    >>> events = EventAccumulator(log_dir).Reload()
    >>> written, = events.Scalars("logvol/01_1")
    >>> assert abs(written.value - report["1"].statistics()["median"]) < 1e-5
    """

    def __init__(self, log_dir: str | os.PathLike[str] | Any, *, histograms: bool = True, layout: bool = True) -> None:
        self.histograms = histograms
        self.layout = layout
        # Imported here, a second or two, and not inside of the first probe, whose cost a budget goes by.
        optional("tensorboard", extra="tensorboard")
        optional("torch.utils.tensorboard", extra="tensorboard")
        self._labels: dict[str, str] = {}
        self._charted: tuple[str, ...] = ()
        self._conventions = ""
        self._events: Any = None
        self._log_dir: Path | None = None
        if isinstance(log_dir, str | os.PathLike):
            self._log_dir = local_path(log_dir)
            if self._log_dir.exists() and not self._log_dir.is_dir():
                raise ProbeError(
                    f"TensorBoardWriter needs a directory, and {self._log_dir} is a file.\n"
                    "Write:  TensorBoardWriter('runs/experiment_1')"
                )
        elif _takes(log_dir):
            self._events = log_dir
        else:
            raise ProbeError(
                f"TensorBoardWriter takes a directory or a SummaryWriter, not a {type(log_dir).__name__}.\n"
                "Write:  TensorBoardWriter('runs/experiment_1')"
            )

    @property
    def log_dir(self) -> str:
        """Where the event files are."""
        return str(self._log_dir if self._log_dir is not None else getattr(self._events, "log_dir", ""))

    def tags(self, report: GeometryReport) -> dict[str, str]:
        """Return layer name → ``NN_layer``; a layer keeps its number for the writer's whole life."""
        width = max(2, len(str(len(report) - 1)))
        for name in report:
            if name not in self._labels:
                self._labels[name] = label(len(self._labels), name, width=width)
        return {name: self._labels[name] for name in report}

    def write(self, step: int, report: GeometryReport) -> None:
        """Write every tag of the class's table at ``step``, and flush."""
        labels = self.tags(report)
        with self._opened(step) as events:
            for name, layer in report.items():
                self._write_layer(events, step, labels[name], layer)
            text = _conventions(report, labels)
            if text != self._conventions:
                self._conventions = text
                events.add_text("geometry/conventions", text, step)
            if self.layout and self._charted != tuple(self._labels.values()):
                self._charted = tuple(self._labels.values())
                events.add_custom_scalars(_layout(self._charted, next(iter(report.values()))))

    def write_scalar(self, tag: str, value: float, step: int) -> None:
        """Write one number of the run as a whole; one that is not finite in float32 is left out."""
        if abs(value) <= _FLOAT32_MAX:
            with self._opened(step) as events:
                events.add_scalar(tag, value, step)

    def write_map(self, tag: str, result: Any, step: int) -> None:
        """Write a result, drawn as by ``tgp.plot``, or a matplotlib figure as an image; the figure stays open."""
        figure_class = optional("matplotlib.figure", extra="figures").Figure
        figure = result if isinstance(result, figure_class) else plot(result, title=f"{tag}, step {step}")
        with self._opened(step) as events:
            events.add_figure(tag, figure, step, close=False)

    def close(self) -> None:
        """Flush and close the event file; a ``SummaryWriter`` of yours stays open.  Writing reopens."""
        if self._events is not None:
            with self._explained():
                if self._log_dir is None:
                    self._events.flush()
                else:
                    events, self._events = self._events, None
                    events.close()

    def _write_layer(self, events: Any, step: int, name: str, layer: LayerGeometry) -> None:
        found, chart = layer.statistics(), chart_of(layer)
        scalars = charts(layer, name)
        scalars |= {f"{chart}_band/{name}/{part}": found[part] for part in ("p10", "median", "p90")}
        for tag, value in scalars.items():
            if abs(value) <= _FLOAT32_MAX:  # false for nan and ±inf too
                events.add_scalar(tag, value, step)
        finite = layer.value[layer.value.isfinite()]
        if self.histograms and finite.numel():
            values = finite.detach().double().cpu()
            events.add_histogram(f"{chart}_histogram/{name}", values, step, bins=_edges(values))

    @contextmanager
    def _opened(self, step: int) -> Iterator[Any]:
        with self._explained():
            if self._events is None:
                self._events = self._open(step)
            yield self._events
            self._events.flush()

    def _open(self, step: int) -> Any:
        assert self._log_dir is not None
        earlier = sorted(self._log_dir.glob("events.out.tfevents.*"))
        ours_alone = bool(earlier) and all(path.name.endswith(_SUFFIX) for path in earlier)
        if earlier:
            _try_bytes(self._log_dir)
        # Everything that a fresh reader needs is written anew: what is purged takes the layout and the text with it.
        self._charted, self._conventions = (), ""
        return optional("torch.utils.tensorboard", extra="tensorboard").SummaryWriter(
            str(self._log_dir), purge_step=step if ours_alone else None, filename_suffix=_SUFFIX
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._log_dir is not None:
                self._events = None  # its worker is dead; the next write opens a new file
            raise ProbeError(
                f"TensorBoard events could not be written to {self.log_dir}: {error}.\n"
                "Likely the disk is full, or the directory is not writable; what was written stays.\n"
                "Free some space or choose another directory:  TensorBoardWriter('/other/disk/runs')"
            ) from error


def _try_bytes(folder: Path) -> None:
    # On a full disk an event file comes into being empty, and its worker thread dies with a traceback: at every probe.
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 14))
        file.flush()


def _edges(values: Float[Tensor, " samples"]) -> list[float]:
    # Thirty equal bins. The default ones lie at powers of 1.1, too coarse around -300 nats, and numpy's own
    # refuse a range of a few ulps and take gigabytes for one far outlier.
    low, high = values.min().item(), values.max().item()
    width = max(high - low, 1e-6 * max(abs(low), abs(high), 1.0)) * (1 + 1e-9)
    middle = (low + high) / 2
    return torch.linspace(middle - width / 2, middle + width / 2, 31, dtype=torch.float64).tolist()


def _layout(labels: tuple[str, ...], layer: LayerGeometry) -> dict[str, dict[str, list[Any]]]:
    chart, unit = chart_of(layer), f" [{layer.unit}]" if layer.unit else ""
    beside = [name for name in ("scale", "effective_dimension") if name in layer.extras]
    together = {
        f"{layer.heading} by layer{unit}": ["Multiline", [rf"{chart}/\d+_.*"]],
        **{f"{name.replace('_', ' ')} by layer": ["Multiline", [rf"{name}/\d+_.*"]] for name in beside},
        "largest σ by layer": ["Multiline", [r"sigma_max/\d+_.*"]],
        "rank by layer": ["Multiline", [r"rank/\d+_.*"]],
        "samples that are not finite, by layer": ["Multiline", [r"nonfinite/\d+_.*"]],
    }
    # A margin chart looks its three tags up as they are: escaped like the patterns above, it stays empty for `a.b`.
    parts = ("median", "p10", "p90")
    bands = {
        f"{name}: p10, median, p90{unit}": ["Margin", [f"{chart}_band/{name}/{part}" for part in parts]]
        for name in labels
    }
    return {"volume element": together, "volume element, band over the samples": bands}


def _conventions(report: GeometryReport, labels: dict[str, str]) -> str:
    header = ("tag", "layer", "estimand", "n", "d", "k", "J divided by √n", "samples", "engine")
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, layer in report.items():
        cells = (
            labels[name],
            f"`{name or '(the model itself)'}`",
            layer.estimand,
            layer.num_features,
            layer.num_inputs,
            layer.num_directions,
            "yes" if layer.normalized else "no",
            layer.value.numel(),
            layer.engine,
        )
        rows.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    units = (
        "Volumes and scales are natural logarithms (nats); divide by ln 10 ≈ 2.3026 for base 10, as in the paper's "
        "figures.  n: the layer's features per sample; d: the numbers per sample of the space pulled back to; k: "
        "tangent directions.  Medians, percentiles and histograms are over the finite samples; `nonfinite` counts the "
        "others."
    )
    legend = ["| tag | shows |", "|---|---|"]
    charts_of = dict.fromkeys(chart_of(layer) for layer in report.values())
    named = {t.replace("CHART", chart): meaning for chart in charts_of for t, meaning in TAGS.items()}
    extras = {name for layer in report.values() for name in layer.extras}
    named |= {tag: meaning for tag, meaning in EXTRA_TAGS.items() if tag.split("/")[0] in extras}
    legend += [f"| {tag} | {meaning} |" for tag, meaning in (named | MONITOR_TAGS).items()]
    return "\n".join([*rows, "", units, "", *legend])


def _takes(target: Any) -> bool:
    if isinstance(target, str | os.PathLike):
        return True
    return not isinstance(target, type) and callable(getattr(target, "add_scalar", None))  # tensorboardX has one too


register_writer(_takes, TensorBoardWriter)
