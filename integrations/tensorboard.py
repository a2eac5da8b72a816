"""Reports in TensorBoard: packed for the Geometry tab, and as charts of each layer for the other tabs.

``Monitor(writer="runs/a")`` and ``Monitor(writer=SummaryWriter(...))`` come here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torchgeom_probe.integrations.tensorboard_packed import (
    Record,
    packed_identity,
    packed_map,
    packed_report,
    packed_study,
    summary,
)

from torchgeom_probe.boundary.study import BoundaryStudy
from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.monitor.samples import ProbeSamples
from torchgeom_probe.monitor.writers import Writer, chart_of, charts, is_summary_writer, label, local_path
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.report import GeometryReport, LayerGeometry
from torchgeom_probe.shapes import Float, Tensor
from torchgeom_probe.slices.result import SliceScan

# Our event files end in this, so that a resumed run can tell its own earlier files from those of the training loop.
_SUFFIX = ".geometry"

# TensorBoard stores float32: what overflows it would come back as inf.
_FLOAT32_MAX = 3.4028234e38

#: The group of what is looked at last: TensorBoard opens on the groups that come first in the alphabet.
REST = "z_geometry"

#: Every tag that is written for every report, and what it shows.  CHART stands for what was measured: ``logvol`` (log
#: √det g, or the effective volume), ``frame_volume``, ``scale``, …; NN_layer for each layer's own name.
TAGS = {
    "CHART/NN_layer": "median over the finite samples",
    "CHART_band/NN_layer/p10": "10th percentile: the lower edge of the band",
    "CHART_band/NN_layer/p90": "90th percentile: the upper edge of the band",
    "sigma_max/NN_layer": "largest singular value of any sample, of J or of JV on a frame",
    "CHART_histogram/NN_layer": "histogram of the finite values (histograms=True)",
    f"{REST}/rank/NN_layer": "median rank",
    f"{REST}/nonfinite/NN_layer": "how many samples have a value of ±inf or nan",
    "geometry/conventions": "text: estimand, units, n, d, k, normalised or not; anew on a change",
}
#: And where the estimator found them, beside its own value.
EXTRA_TAGS = {
    f"{REST}/scale/NN_layer": "median ½ log(tr g/d), nats: the log of the root mean square stretch of a direction",
    f"{REST}/effective_dimension/NN_layer": "median (tr g)²/tr g²: over how many directions g is spread",
}
#: And by a Monitor, once for all layers.
MONITOR_TAGS = {
    f"{REST}/failures": "how many times measuring, a writer or a map raised so far",
    f"{REST}/overhead": "the share of the time that probes took so far (from the second probe on)",
}


_UNITS = (
    "Volumes and scales are natural logarithms (nats); divide by ln 10 ≈ 2.3026 for base 10, as in the paper's "
    "figures.  n: the layer's features per sample; d: the numbers per sample of the space pulled back to; k: tangent "
    "directions.  Medians, percentiles and histograms are over the finite samples; `nonfinite` counts the others."
)


class TensorBoardWriter(Writer):
    """Write reports to TensorBoard: a :class:`~torchgeom_probe.Writer`.

    Of every report ONE event, all layers packed, has what TensorBoard's Geometry tab shows: the values, extras and
    singular values of every sample; once, what the samples are; the numbers of every map.  The other tabs have, per
    layer, the tags of :data:`TAGS`: the chart of what was measured with a band and a histogram over the samples,
    ``sigma_max/…``, and under ``z_geometry/…`` the rest; the TEXT tab explains them, CUSTOM SCALARS has all layers in
    one chart.  There a layer's name is ``NN_layer``: its place in the order of firing, then its name made safe
    (``block#1`` becomes ``04_block_1``; the model itself is ``00_model``).  The chart is ``logvol`` for log √det g and
    the effective volume alone, else the report's ``quantity``: ``frame_volume``, ``scale``, ….  A non-finite number
    never reaches a chart or a histogram: it is left out, and counted.

    Args:
        log_dir: a directory, or a ``SummaryWriter`` that you already have (yours to resume and to close; what is not
            torch's own gets no events for the Geometry tab).
        histograms: whether to write the histograms.
        layout: whether to write the custom-scalars layout; a run has one, so turn it off where you write your own.

    A resumed run continues in its directory: at the first write the event file is opened, and where an earlier
    ``TensorBoardWriter`` left events, those at this step and later are hidden (``purge_step``), so no point is doubled.
    TensorBoard hides them for all tags of the directory; so where another ``SummaryWriter`` logs to the same directory
    nothing is purged: pass that writer instead, made with its own ``purge_step``.

    Every write ends with a flush: a run that is killed loses nothing.  Values are stored in float32, the logarithms of
    the singular values in float16 (within 0.05 % of the logarithm).

    Raises:
        ProbeError: tensorboard is not installed; the events cannot be written (a full disk, a read-only directory).

    Cost: under a Monitor a plain forward pass, for the predictions; a copy of the report to the host; for 64 samples
    with 16 singular values some 4 kB per report and layer.

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
        self._samples: ProbeSamples | None = None
        self._identified = False
        self._events: Any = None
        self._log_dir: Path | None = None
        if isinstance(log_dir, str | os.PathLike):
            self._log_dir = local_path(log_dir)
            if self._log_dir.exists() and not self._log_dir.is_dir():
                raise ProbeError(
                    f"TensorBoardWriter needs a directory, and {self._log_dir} is a file.\n"
                    "Write:  TensorBoardWriter('runs/experiment_1')"
                )
        elif is_summary_writer(log_dir):
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

    def write_samples(self, step: int, samples: ProbeSamples) -> None:
        """Take note of the samples of the next :meth:`write`: who they are, and what the model predicts."""
        self._samples = samples

    def write(self, step: int, report: GeometryReport) -> None:
        """Write every tag of the class's table at ``step``, and flush."""
        labels = self.tags(report)
        statistics = {name: layer.statistics() for name, layer in report.items()}
        samples, self._samples = self._samples, None  # it knows the model: not to be kept
        with self._opened(step) as events:
            if samples is not None and not self._identified:
                self._add(events, "samples", "", packed_identity(samples), step)
                self._identified = True
            self._add(events, "probe", "", packed_report(report, statistics, samples), step)
            for name, layer in report.items():
                self._write_layer(events, step, labels[name], layer, statistics[name])
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
                own = tag.removeprefix("geometry/")  # a monitor's own accounts
                events.add_scalar(tag if own == tag else f"{REST}/{own}", value, step)

    def write_map(self, tag: str, result: Any, step: int) -> None:
        """Write a scan's numbers; any other result, drawn as by ``tgp.plot``, or a figure, as an image (it stays open).

        A :class:`~torchgeom_probe.SliceScan` is shown by the Geometry tab: each layer's values, the predictions, the
        entropy and the samples at the corners.
        """
        with self._opened(step) as events:
            if isinstance(result, SliceScan) and _torchs_own(events):
                self._add(events, "map", tag, packed_map(result), step)
                return
            figure_class = optional("matplotlib.figure", extra="figures").Figure
            figure = result if isinstance(result, figure_class) else plot(result, title=f"{tag}, step {step}")
            events.add_figure(tag, figure, step, close=False)

    def write_study(self, study: BoundaryStudy, step: int) -> None:
        """Write the profiles of a :class:`~torchgeom_probe.BoundaryStudy`, for the Geometry tab."""
        with self._opened(step) as events:
            self._add(events, "profile", "", packed_study(study), step)

    def _add(self, events: Any, kind: str, tag: str, record: Record, step: int) -> None:
        if _torchs_own(events):
            events._get_file_writer().add_summary(summary(kind, tag, record), step)

    def close(self) -> None:
        """Flush and close the event file; a ``SummaryWriter`` of yours stays open.  Writing reopens."""
        if self._events is None:
            return
        events = self._events
        try:
            if self._log_dir is None:
                events.flush()
            else:
                self._events = None
                events.close()
        except OSError as error:
            raise self._failed(error) from error

    def _write_layer(
        self, events: Any, step: int, name: str, layer: LayerGeometry, statistics: Mapping[str, float]
    ) -> None:
        chart = chart_of(layer)
        scalars = dict(zip(_band(chart, name), (statistics["p10"], statistics["p90"]), strict=True))
        for tag, value in charts(layer, name, statistics).items():
            scalars[tag if tag.startswith((f"{chart}/", "sigma_max/")) else f"{REST}/{tag}"] = value
        for tag, value in scalars.items():
            if abs(value) <= _FLOAT32_MAX:  # false for nan and ±inf too
                events.add_scalar(tag, value, step)
        finite = layer.value[layer.value.isfinite()]
        if self.histograms and finite.numel():
            values = finite.detach().double().cpu()
            events.add_histogram(f"{chart}_histogram/{name}", values, step, bins=_edges(values))

    @contextmanager
    def _opened(self, step: int) -> Iterator[Any]:
        try:
            if self._events is None:
                self._events = self._open(step)
            yield self._events
            self._events.flush()
        except OSError as error:
            raise self._failed(error) from error

    def _open(self, step: int) -> Any:
        assert self._log_dir is not None
        earlier = sorted(self._log_dir.glob("events.out.tfevents.*"))
        ours_alone = bool(earlier) and all(path.name.endswith(_SUFFIX) for path in earlier)
        if earlier:
            _try_bytes(self._log_dir)
        # Everything that a fresh reader needs is written anew: what is purged takes the layout and the text with it.
        self._charted, self._conventions, self._identified = (), "", False
        return optional("torch.utils.tensorboard", extra="tensorboard").SummaryWriter(
            str(self._log_dir), purge_step=step if ours_alone else None, filename_suffix=_SUFFIX
        )

    def _failed(self, error: OSError) -> ProbeError:
        if self._log_dir is not None:
            self._events = None  # its worker is dead; the next write opens a new file
        return ProbeError(
            f"TensorBoard events could not be written to {self.log_dir}: {error}.\n"
            "Likely the disk is full, or the directory is not writable; what was written stays.\n"
            "Free some space or choose another directory:  TensorBoardWriter('/other/disk/runs')"
        )


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
    together = {
        f"{layer.heading} by layer{unit}": ["Multiline", [rf"{chart}/\d+_.*"]],
        "largest σ by layer": ["Multiline", [r"sigma_max/\d+_.*"]],
    }
    # A margin chart looks its three tags up as they are: escaped like the patterns above, it stays empty for `a.b`.
    bands = {f"{name}: p10, median, p90{unit}": ["Margin", [f"{chart}/{name}", *_band(chart, name)]] for name in labels}
    return {"volume element": together, "volume element, band over the samples": bands}


def _band(chart: str, name: str) -> tuple[str, str]:
    return f"{chart}_band/{name}/p10", f"{chart}_band/{name}/p90"


def _conventions(report: GeometryReport, labels: dict[str, str]) -> str:
    header = ("tag", "layer", "estimand", "n", "d", "k", "J divided by √n", "samples", "engine")
    about: list[tuple[Any, ...]] = [header, ("---",) * len(header)]
    for name, layer in report.items():
        sizes = (layer.num_features, layer.num_inputs, layer.num_directions)
        rest = ("yes" if layer.normalized else "no", layer.value.numel(), layer.engine)
        about.append((labels[name], f"`{name or '(the model itself)'}`", layer.estimand, *sizes, *rest))
    extras = {name for layer in report.values() for name in layer.extras}
    every = TAGS | {tag: meaning for tag, meaning in EXTRA_TAGS.items() if tag.split("/")[1] in extras} | MONITOR_TAGS
    charts_of = dict.fromkeys(chart_of(layer) for layer in report.values())
    named = {tag.replace("CHART", chart): meaning for chart in charts_of for tag, meaning in every.items()}
    return "\n\n".join([_table(about), _UNITS, _table([("tag", "shows"), ("---", "---"), *named.items()])])


def _table(rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def _torchs_own(events: Any) -> bool:
    return isinstance(events, optional("torch.utils.tensorboard", extra="tensorboard").SummaryWriter)
