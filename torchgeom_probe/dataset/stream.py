"""Measuring a whole data set: unit by unit, on disk as it goes, on one process or several, resumable after any end.

data → units (fixed batches of indices) → per unit: input, geometry of every layer, decision → rows → Parquet parts.

What makes a row the same in whatever run it is made: a unit is always the same batch, and the first process writes into
the manifest what chunks and kernels depend on (units, memory budget, threads).  Every process begins with the first
unit, done or not: what a probe learns from its first batch (plan, engine, a frame of the data) is then the same, too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from torchgeom_probe.dataset.batches import Unit, Units, by_length, input_of, labels_of, names_in
from torchgeom_probe.dataset.table import KEY, DatasetTable, arrow
from torchgeom_probe.errors import ProbeError, first_line, refuse_unknown
from torchgeom_probe.estimators import Along
from torchgeom_probe.files import digest, finite_or_null, write_atomically, write_json
from torchgeom_probe.jacobian.memory import free_memory
from torchgeom_probe.jacobian.plan import SHARE_OF_FREE_MEMORY
from torchgeom_probe.model.inputs import parameter_names
from torchgeom_probe.model.predictions import Readout, decided
from torchgeom_probe.model.sharded import comes_and_goes
from torchgeom_probe.probe import GeometryProbe, ProbeOptions, probe_of
from torchgeom_probe.progress import tqdm
from torchgeom_probe.report import LayerGeometry
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.resume import in_words, probe_settings, refuse_other, state_digest

if TYPE_CHECKING:
    import pyarrow
    from typing_extensions import Unpack

#: A part is written so often: the seconds of work that a kill can cost.
FLUSH_SECONDS = 10.0
#: Rows that wait for room on a full disk; more would fill the memory.
_MOST_WAITING = 1 << 16
#: How long a rank waits for the others without seeing anything new of them.
PATIENCE_SECONDS = 60.0


def measure_dataset(
    model_or_probe: nn.Module | GeometryProbe,
    data: Any,
    *,
    path: str | os.PathLike[str],
    label: int | str | None = None,
    input: Any = None,
    readout: Readout | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    progress: bool | None = None,
    **options: Unpack[ProbeOptions],
) -> DatasetTable:
    """Measure every sample of a data set, a row a sample, on disk; stopped or killed, the same call goes on.

    Several processes (``torchrun``, with a process group or without) share the units, and each returns when all are
    done.  A run may be resumed by another number of them.  The rows are the same bits.

    Args:
        model_or_probe: any ``nn.Module``, or a :class:`~torchgeom_probe.GeometryProbe`.
        data: a ``DataLoader``, a map-style ``Dataset`` (a Hugging Face one, a tensor of samples), or an iterable of
            batches.  A batch is a tensor, a tuple, a dict, or lightly's triple.  The order of a map-style data set
            is its own, also behind a loader that shuffles; an iterable's must repeat for a run to be resumed, which is
            checked.
        path: a folder for the rows; one that holds another measurement is refused.
        label: the label's place or key in a batch; it becomes a column and is not needed for anything.
        input: place or key of what the model takes, or several; None: the first entry that is no label, of a dict those
            that ``forward`` names.  Padding at the end that an ``attention_mask`` marks is cut off first.
        readout: maps the model's output to logits [B, C]; where there are none, there are no predictions.
        batch_size: samples a batch; None: the loader's, else 64.
        num_workers: processes that load, while this one measures; None: the loader's, else 0.
        collate_fn: from samples to a batch; None: the loader's.
        progress: show a progress bar; None: only on a terminal.
        options: the probe's: layers, estimator, normalize, engine, ….

    Returns:
        The table, read from disk when it is asked.  A sample that fails to load has its ``error`` there; one that
        is not finite, nan.

    Raises:
        ProbeError: no pyarrow; a folder of another measurement; what cannot be measured at all.

    Cost: per sample that of ``measure``, and a plain pass for the prediction; ``probe.cost(loader)`` times it
    beforehand.  Memory does not grow with the data set.

    >>> import tempfile, torch, torchgeom_probe as tgp
    >>> model, x = torch.nn.Linear(3, 5), torch.randn(20, 3)
    >>> data = torch.utils.data.TensorDataset(x, torch.arange(20) % 2)
    >>> table = measure_dataset(model, data, path=tempfile.mkdtemp(), label=1, layers="", batch_size=8)
    >>> volume = torch.tensor(table.layer("")["log_volume"])
    >>> assert torch.equal(volume, tgp.measure(model, x, layers="")[""].log_volume)
    """
    arrow("pyarrow")
    refuse_unknown(options, measure_dataset, *ProbeOptions.__annotations__)
    units = Units.of(data, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_fn)
    rows = Rows(probe_of(model_or_probe, options, replay=False), units, label=label, input=input, readout=readout)
    stored = _manifest(Path(path), rows)
    rows.probe.memory_budget = stored["memory_budget"]
    table = DatasetTable(path)
    if not (Path(path) / "table.parquet").exists():
        before = torch.get_num_threads()
        torch.set_num_threads(stored["threads"])
        try:
            _Run(rows, table).go(progress)
        finally:
            torch.set_num_threads(before)
    return table


class Rows:
    """From a loaded unit to its rows: input, label, file, geometry of every layer, decision.

    Attributes:
        layers: what was measured of each layer, in words; empty before the first unit.
    """

    def __init__(
        self, probe: GeometryProbe, units: Units, *, label: Any = None, input: Any = None, readout: Any = None
    ) -> None:
        if isinstance(probe.estimator, Along):
            raise ProbeError(
                f"{probe.estimator} has tangents of one batch, and a data set has many.\n"
                "Take the same directions at every sample:  estimator=Subspace(k=8)"
            )
        if comes_and_goes(probe.model):
            raise ProbeError(
                "the model is sharded (FSDP2) and needs all ranks at once; a data set is shared out over the ranks.\n"
                "Measure batch by batch, on every rank:  tgp.measure(model, x)"
            )
        # One of its own: plans are made for another budget, and the caller's stays as it is.
        self.probe = probe.like(replay=False)
        self.units, self.label, self.input, self.readout = units, label, input, readout
        self.layers: dict[str, Any] = {}
        model = probe.model
        self.device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def settings(self) -> dict[str, Any]:
        """What tells this measurement from another, as JSON can hold it."""
        order = self.units.order
        which = "" if isinstance(order, range) else f" {digest(str(order))}"
        return {
            "model": state_digest(self.probe.model),
            **probe_settings(self.probe),
            "data": f"{type(self.units.dataset).__qualname__} of {len(order) or 'unknown'} samples{which}",
            "label": self.label,
            "input": in_words(self.input),
            "readout": in_words(self.readout),
            "batch_size": self.units.size,
            "units": len(self.units) or None,  # of an iterable: when its end is reached
        }

    def input_of(self, unit: Unit) -> Any:
        """What the model takes of a unit's batch, on its device."""
        x = input_of(unit.batch, self.input, self.label, parameter_names(self.probe.model))
        return tree_map_only(Tensor, lambda t: t.to(self.device, non_blocking=True), x)

    def of(self, unit: Unit) -> pyarrow.Table:
        """The rows of a unit; where it cannot be measured as one, of each of its samples alone.

        Raises:
            Exception: no sample of it could be measured, nor was one before.
        """
        tables: list[pyarrow.Table] = []
        failed = dict(unit.failed)
        if unit.indices:
            try:
                tables += self._measured(unit)
            except Exception as error:
                several = len(unit.indices) > 1 and self.units.size
                for index in unit.indices if several else ():
                    alone = self.units.load(unit.number, [index])
                    try:
                        tables += self._measured(alone)
                    except Exception as own:
                        failed[index] = alone.failed.get(index, first_line(own))
                if not self.layers:
                    raise  # it is no matter of one sample
                if not several:
                    failed |= dict.fromkeys(unit.indices, first_line(error))
        if failed:
            files = [self.units.file(index) if self.units.size else None for index in failed]
            tables.append(_table({"index": list(failed)}, file=files, error=list(failed.values())))
        return arrow("pyarrow").concat_tables(tables, promote_options="permissive") if tables else _table({"index": []})

    def _measured(self, unit: Unit) -> list[pyarrow.Table]:
        if isinstance(unit.batch, ProbeError):
            raise unit.batch
        size, found = len(unit.indices), []
        labels = None if self.label is None else labels_of(unit.batch, self.label)
        names = names_in(unit.batch, self.label, size)
        if names is None and self.units.size:
            names = [self.units.file(index) for index in unit.indices]  # type: ignore[misc]
        for places, x in by_length(self.input_of(unit), size):
            report = self.probe.measure(x, progress=False)
            columns: dict[str, Any] = {"index": [unit.indices[place] for place in places]}
            if labels is not None:
                columns["label"] = [labels[place] for place in places]
            columns |= self._decision(x, len(places))
            for name, layer in report.items():
                columns["num_inputs"] = [layer.num_inputs] * len(places)
                columns |= {f"{name}/{column}": values for column, values in _columns(layer).items()}
            files = [None] * len(places) if names is None else [names[place] for place in places]
            found.append(_table(columns, file=files, error=[None] * len(places)))
            words = ("quantity", "unit", "estimand", "engine", "normalized")
            self.layers = self.layers or {n: {word: getattr(g, word) for word in words} for n, g in report.items()}
        return found

    def _decision(self, x: Any, size: int) -> dict[str, Any]:
        probe = self.probe
        try:
            found = decided(probe.model, x, readout=self.readout, batch=size, mode=probe.mode)
        except ProbeError:
            if self.readout is not None:
                raise
            return {}  # a network without classes
        return {"prediction": found["predictions"], "entropy": found["entropy"], "margin": found["margin"]}


def _columns(layer: LayerGeometry) -> dict[str, Any]:
    size, sigma = len(layer.value), layer.singular_values
    columns = {layer.quantity: layer.value, "sigma_max": sigma[:, 0] if sigma.shape[1] else None}
    columns |= {name: getattr(layer, name) for name in ("rank", "log_pseudo_volume", "std_error", "error_bound")}
    columns |= {name: extra for name, extra in layer.extras.items() if extra.ndim == 1}
    return {"num_features": [layer.num_features] * size, **{n: v for n, v in columns.items() if v is not None}}


def _table(columns: dict[str, Any], **texts: list[Any]) -> pyarrow.Table:
    plain = {n: v.detach().cpu().numpy() if isinstance(v, Tensor) else v for n, v in columns.items()}
    plain["index"] = arrow("pyarrow").array(plain["index"], "int64")
    return arrow("pyarrow").table(plain | {n: arrow("pyarrow").array(v, "string") for n, v in texts.items()})


def _manifest(folder: Path, rows: Rows) -> dict[str, Any]:
    """What the first process has settled, which every other one keeps; refused where it is of another measurement."""
    file, settings = folder / "manifest.json", rows.settings()
    if not file.exists():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        budget = rows.probe.memory_budget or int(SHARE_OF_FREE_MEMORY * free_memory(rows.device) / ranks)
        kept = {"memory_budget": budget, "threads": torch.get_num_threads()}
        mine = write_json(folder / f"manifest.{os.getpid()}.json", settings | kept)
        with contextlib.suppress(FileExistsError):
            os.link(mine, file)  # whole, and of one process alone
        mine.unlink()
    stored = json.loads(file.read_text(encoding="utf-8"))
    same = {**settings, "memory_budget": stored["memory_budget"], "threads": stored["threads"]}
    if not rows.units.size:
        same["units"] = stored["units"]
    refuse_other(stored, json.loads(json.dumps(finite_or_null(same))), where=folder, what="measure_dataset")
    return stored


class _Run:
    """One process's share of the units: number u is that of rank u mod size, whatever is done and whoever is there."""

    def __init__(self, rows: Rows, table: DatasetTable) -> None:
        self.rows, self.table = rows, table
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.done = table.done()
        self.waiting: list[tuple[int, str | None, pyarrow.Table]] = []
        self.flushed = time.monotonic()

    def go(self, progress: bool | None) -> None:
        """Measure what is this process's and not done; then wait for the others."""
        units, hidden = self.rows.units, None if progress is None else not progress
        count = 0
        try:
            with tqdm(total=len(units) or None, desc="measure_dataset", unit="batch", disable=hidden) as bar:
                for unit in units.loaded(lambda number: number == 0 or self._wanted(number)):
                    self._take(unit)
                    count = unit.number + 1
                    bar.update(count - bar.n)
            self._flush(last=True)
            if not units.size:
                write_json(self.table.path / "manifest.json", {**self.table.manifest, "units": count})
        except BaseException as stop:
            self._flush()
            if isinstance(stop, KeyboardInterrupt):
                raise KeyboardInterrupt(
                    f"measure_dataset was stopped: {len(self.table.done())} of {len(units) or 'unknown'} batches are "
                    f"in {self.table.path}, and the same call goes on from there"
                ) from None
            raise
        self._wait()
        if not self.table.layers:
            why = next(iter(self.table.failures().values()), "it is empty")
            raise ProbeError(f"no sample of the data set could be measured: {why}.\nLook at one:  data[0]")

    def _wanted(self, number: int) -> bool:
        return number % self.size == self.rank and number not in self.done

    def _take(self, unit: Unit) -> None:
        known = None
        if not self.rows.units.size:
            known = digest(*(leaf for leaf in tree_leaves(self.rows.input_of(unit)) if isinstance(leaf, Tensor)))
        if self.done.get(unit.number, known) != known:
            raise ProbeError(
                f"batch {unit.number} is another one than in the run that is resumed: the iterable's order does not "
                "repeat.\nPass a map-style Dataset, whose samples have indices of their own; or another path=."
            )
        if unit.number and not self._wanted(unit.number):
            return
        rows = self.rows.of(unit)
        if self._wanted(unit.number):
            self.waiting.append((unit.number, known, rows))
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self._flush()

    def _flush(self, *, last: bool = False) -> None:
        """Write the rows that wait as one part.  On a full disk they go on waiting, as long as memory allows."""
        self.flushed = time.monotonic()
        if not self.waiting:
            return
        whole = arrow("pyarrow").concat_tables([rows for *_, rows in self.waiting], promote_options="permissive")
        footer = {"units": [unit for *unit, _ in self.waiting], "layers": self.rows.layers}
        buffer = io.BytesIO()
        arrow("pyarrow.parquet").write_table(whole.replace_schema_metadata({KEY: json.dumps(footer)}), buffer)
        name = f"{self.waiting[0][0]:09d}-{self.rank}-{os.getpid()}-{time.time_ns()}.parquet"
        try:
            write_atomically(self.table.path / "parts" / name, buffer.getvalue())
            self.waiting = []
        except OSError as error:
            what = f"{len(whole)} rows could not be written to {self.table.path}: {error}"
            if last or len(whole) > _MOST_WAITING:
                raise ProbeError(f"{what}.\nMake room and call measure_dataset(...) again: it goes on.") from error
            warnings.warn(f"{what}; they wait", RuntimeWarning, stacklevel=2)

    def _wait(self) -> None:
        """Wait for the other ranks, as long as something new comes of them."""
        seen, since = -1, time.monotonic()
        while self.size > 1 and not self.table.complete:
            if len(self.table.done()) > seen:
                seen, since = len(self.table.done()), time.monotonic()
            if time.monotonic() - since > PATIENCE_SECONDS:
                warnings.warn(
                    f"{self.table.path}: batches of other ranks are missing, and nothing new has come for "
                    f"{PATIENCE_SECONDS:g} s.\nRun the same command again: it measures what is missing.",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return
            time.sleep(0.1)
