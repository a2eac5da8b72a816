"""Where a monitor sends its reports: the base of all writers, CSV and JSON Lines, and how a path becomes a writer."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.files import finite_or_null, write_atomically
from torchgeom_probe.report import GeometryReport, LayerGeometry

if TYPE_CHECKING:
    from torchgeom_probe.boundary.study import BoundaryStudy
    from torchgeom_probe.monitor.samples import ProbeSamples

# Layer → its quantity and its statistics, by name.
Layers = Mapping[str, Mapping[str, float | str]]


class Writer:
    """Where a :class:`~torchgeom_probe.Monitor` sends its reports: derive from it, and override what you record.

    Nothing here does anything, so a writer need not have more than a :meth:`write`.

    >>> class Medians(Writer):
    ...     def write(self, step, report):
    ...         print(step, {name: layer.statistics()["median"] for name, layer in report.items()})
    """

    def write(self, step: int, report: GeometryReport) -> None:
        """Record the report of one training step."""

    def write_samples(self, step: int, samples: ProbeSamples) -> None:
        """Take note of what the report that comes next was measured at."""

    def write_scalar(self, tag: str, value: float, step: int) -> None:
        """Record one number of the run as a whole."""

    def write_study(self, study: BoundaryStudy, step: int) -> None:
        """Record a study of decision boundaries."""

    def write_map(self, tag: str, result: Any, step: int) -> None:
        """Draw a result that ``tgp.plot`` knows (a slice scan), or show a figure of matplotlib as it is."""

    def close(self) -> None:
        """Flush and let go of the file."""

    @property
    def draws(self) -> bool:
        """Whether a monitor's ``maps`` go here: whether this writer has a :meth:`write_map` of its own."""
        return type(self).write_map is not Writer.write_map


def writers_of(target: Any) -> tuple[Writer, ...]:
    """Return the writers that a monitor's ``writer`` means: none, one, or one for each of a list or tuple.

    A path that ends in ``.csv`` is a :class:`CSVWriter`, one in ``.jsonl`` a :class:`JSONWriter`; any other path is a
    directory of TensorBoard events.  A ``SummaryWriter`` is written to and left open.

    Raises:
        ProbeError: an address with a scheme (``s3://…``); a file ``.txt``, ``.json``, …; what is neither a path, a
            SummaryWriter nor a Writer; tensorboard is not installed.

    >>> [type(writer).__name__ for writer in writers_of(["geometry.csv", "geometry.jsonl", Writer()])]
    ['CSVWriter', 'JSONWriter', 'Writer']
    """
    if target is None:
        return ()
    return tuple(map(_writer_of, target if isinstance(target, list | tuple) else [target]))


def _writer_of(target: Any) -> Writer:
    if isinstance(target, Writer):
        return target
    path = Path(target) if isinstance(target, str | os.PathLike) else None
    if path is not None and path.suffix in (".csv", ".jsonl"):
        return CSVWriter(path) if path.suffix == ".csv" else JSONWriter(path)
    folder = path is not None and (path.is_dir() or str(target).endswith(("/", os.sep)))
    if path is not None and not folder and path.suffix in (".txt", ".log", ".json", ".tsv", ".parquet", ".db"):
        raise ProbeError(
            f"writer={str(target)!r} names a file of a kind that no writer here makes.\n"
            f"Write:  writer={str(path.with_suffix('.csv'))!r}, a file .jsonl, or a directory for TensorBoard:  "
            f"writer={str(path.with_suffix(''))!r}"
        )
    if path is None and not is_summary_writer(target):
        raise ProbeError(
            f"writer= takes a path, a SummaryWriter, a tgp.Writer, or a list of such; got {target!r}.\n"
            "Write:  writer='runs/a'  or  writer='geometry.csv'; a writer of your own derives from tgp.Writer."
        )
    # Not at the top: the integrations stand above this room, and only who writes to one needs it.
    return optional("torchgeom_probe.integrations.tensorboard", extra="tensorboard").TensorBoardWriter(target)


def is_summary_writer(target: Any) -> bool:
    """Whether this is a ``SummaryWriter``: of torch, of tensorboardX, or one that looks like it."""
    return not isinstance(target, type) and callable(getattr(target, "add_scalar", None))


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return a path as a Path.

    Raises:
        ProbeError: an address with a scheme, of which a folder ``s3:`` would be made here.
    """
    scheme = re.match(r"[A-Za-z][\w+.-]+(?=:/)", str(path))  # two letters or more: C:/ is a disk
    if scheme is not None:
        address = re.sub(":/+", "://", str(path), count=1)
        raise ProbeError(
            f"{address!r} is an address with the scheme {scheme[0]!r}, and reports are written to local files.\n"
            "Write to a local path and copy it, or open it yourself:  "
            f"writer=torch.utils.tensorboard.SummaryWriter({address!r})"
        )
    return Path(path)


def chart_of(layer: LayerGeometry) -> str:
    """Return the group of the charts with a layer's value: ``"logvol"`` of a log-volume, else its ``quantity``."""
    return "logvol" if layer.quantity == "log_volume" else layer.quantity


def charts(layer: LayerGeometry, name: str, statistics: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return one layer's statistics by the tags of their charts: all but the band over the samples.

    The log pseudo-volume is left out where no volume is zero: it would be the volume again.

    >>> import torch, torchgeom_probe as tgp
    >>> report = tgp.measure(torch.nn.Linear(3, 5), torch.randn(7, 3), layers=[""])
    >>> list(charts(report[""], "00_model"))
    ['logvol/00_model', 'sigma_max/00_model', 'rank/00_model', 'nonfinite/00_model', 'scale/00_model', \
'effective_dimension/00_model']
    """
    found = layer.statistics() if statistics is None else statistics
    value = {f"{chart_of(layer)}/{name}": found["median"]}
    left_out = {"mean", "p10", "median", "p90"}
    if not layer.value.isneginf().any():
        left_out.add("log_pseudo_volume")
    return value | {f"{key}/{name}": number for key, number in found.items() if key not in left_out}


def label(place: int, name: str, *, width: int = 2) -> str:
    """Return a layer's name in charts: its place in the order of firing, zero-padded, then its name made safe.

    >>> label(4, "block#1"), label(0, "")
    ('04_block_1', '00_model')
    """
    return f"{place:0{width}d}_{re.sub(r'[^a-zA-Z0-9_.-]', '_', name) or 'model'}"


class _LogFile(Writer):
    """What appends to a text file step by step, and goes on with the file of an interrupted run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = local_path(path)
        self._begun = False

    def write(self, step: int, report: GeometryReport) -> None:
        """Append the numbers of every layer at this step; they are on disk when it returns."""
        layers: Layers = {name: {"quantity": layer.quantity, **layer.statistics()} for name, layer in report.items()}
        begun, self._begun = self._begun, False  # after a failure, of a full disk, half a line is to be cut off
        if not begun:
            text = self.path.read_bytes().decode() if self.path.exists() else ""
            write_atomically(self.path, self._resumed(text, step, layers).encode())
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(self._lines(step, layers))
        self._begun = True

    def _resumed(self, text: str, step: int, layers: Layers) -> str:
        """Return what stays of the file: the steps before this one."""
        raise NotImplementedError

    def _lines(self, step: int, layers: Layers) -> str:
        raise NotImplementedError


class JSONWriter(_LogFile):
    """A :class:`Writer` of one JSON object per step and line (JSON Lines), appended and on disk at once.

    ``{"step": …, "layers": {name: {"quantity": …, statistics}}}``: of each layer the ``quantity`` and its
    :meth:`~torchgeom_probe.LayerGeometry.statistics` (logarithms in nats; null where not finite).  An existing file is
    continued as by :class:`CSVWriter`.

    Raises:
        ProbeError: at the first write, a file that is no such log.

    >>> import json, pathlib, tempfile, torch, torchgeom_probe as tgp
    >>> path = pathlib.Path(tempfile.mkdtemp(), "geometry.jsonl")
    >>> writer = tgp.JSONWriter(path)
    >>> writer.write(0, tgp.measure(torch.nn.Linear(2, 3), torch.zeros(4, 2), layers=[""], estimator=tgp.Exact()))
    >>> json.loads(path.read_text())["layers"][""]["rank"]
    2.0
    """

    def _resumed(self, text: str, step: int, layers: Layers) -> str:
        kept = ""
        for line in text.splitlines(keepends=True):
            if line.startswith('{"step": ') and not line.endswith("\n"):
                continue  # cut short by a kill
            try:
                kept += line if json.loads(line)["step"] < step else ""
            except (ValueError, TypeError, KeyError) as error:
                raise ProbeError(
                    f"{self.path} exists and is no geometry log: it has the line {line[:60]!r}.\n"
                    "Write to another file:  JSONWriter('geometry.jsonl')"
                ) from error
        return kept

    def _lines(self, step: int, layers: Layers) -> str:
        return json.dumps(finite_or_null({"step": step, "layers": layers}), allow_nan=False) + "\n"


class CSVWriter(_LogFile):
    """A :class:`Writer` of one row per step and layer, appended and flushed at once: a killed run loses nothing.

    Columns: step, layer, ``quantity`` (of which mean, median, … are), then the
    :meth:`~torchgeom_probe.LayerGeometry.statistics` (logarithms in nats; empty where there is no number).  An existing
    file is continued: rows of an earlier, interrupted run at or after the first step written now are dropped, so a
    resumed run has no doubles.

    Raises:
        ProbeError: at the first write, a file that is no such log, or one with other columns.

    >>> import pathlib, tempfile, torch, torchgeom_probe as tgp
    >>> path = pathlib.Path(tempfile.mkdtemp(), "geometry.csv")
    >>> writer = tgp.CSVWriter(path)
    >>> writer.write(0, tgp.measure(torch.nn.Linear(2, 3), torch.zeros(4, 2), layers=[""], estimator=tgp.Exact()))
    >>> path.read_text().splitlines()[0]
    'step,layer,quantity,mean,p10,median,p90,sigma_max,rank,nonfinite,log_pseudo_volume,scale,effective_dimension'
    """

    def _resumed(self, text: str, step: int, layers: Layers) -> str:
        self._header = ["step", "layer", *dict.fromkeys(name for found in layers.values() for name in found)]
        found, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [self._header]
        if rows and not text.endswith("\n"):
            rows.pop()  # cut short by a kill
        if found != self._header:
            raise ProbeError(
                f"{self.path} exists and is no geometry log of such reports: its first line is {found}.\n"
                "Write to another file:  CSVWriter('geometry.csv')"
            )
        return _csv(found, *(row for row in rows if len(row) == len(found) and int(row[0]) < step))

    def _lines(self, step: int, layers: Layers) -> str:
        def cell(value: float | str | None) -> Any:
            return "" if value is None or value != value else value  # nan

        return _csv(
            *([step, name, *(cell(found.get(key)) for key in self._header[2:])] for name, found in layers.items())
        )


def _csv(*rows: Sequence[Any]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()
