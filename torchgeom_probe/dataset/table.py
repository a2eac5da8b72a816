"""What was measured of a data set: a folder of Parquet files, one row a sample, read column by column."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.files import replacing

if TYPE_CHECKING:
    import pyarrow
    from pandas import DataFrame
else:  # optional packages: their types are for the type checker alone
    DataFrame = Any

#: Imports pyarrow or pandas, or a module of theirs, when it is first needed.
arrow = functools.partial(optional, extra="dataset")
#: The key of a file's own metadata: what was measured of each layer, and of a part its units.
KEY = b"torchgeom_probe"
#: Columns of a sample that are of no layer.
SAMPLE = ("index", "label", "file", "prediction", "entropy", "margin", "num_inputs", "error")
#: Rows that :meth:`DatasetTable.compact` holds at a time, and of a row group of its file.
_GROUP = 65536


class DatasetTable:
    """The rows that :func:`~torchgeom_probe.measure_dataset` has put into a folder, in the order of their index.

    Columns: ``index``, ``label``, ``file``, ``prediction``, ``entropy``, ``margin`` (where there are any), ``error``
    (why a sample was not measured), ``num_inputs`` (d); of each layer ``layer/quantity``, ``layer/num_features`` (n),
    ``layer/sigma_max``, ``layer/rank``, ``layer/std_error`` … as its estimator has them.  Natural logarithms.

    Args:
        path: the folder that was given to ``measure_dataset``.

    Raises:
        ProbeError: no such folder; no pyarrow.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        arrow("pyarrow")
        self.path = Path(path)
        if not (self.path / "manifest.json").is_file():
            raise ProbeError(
                f"{self.path} holds no measured data set.\nMeasure one:  tgp.measure_dataset(model, data, path=...)"
            )
        self._seen: dict[Path, tuple[pyarrow.Schema, dict[str, Any]]] = {}

    def __repr__(self) -> str:
        return f"DatasetTable({str(self.path)!r}: {len(self)} samples, layers {list(self.layers)})"

    def __str__(self) -> str:
        failed = self.failures()
        lines = [f"{len(self)} samples{'' if self.complete else ' so far'}, {len(failed)} of them not measured"]
        lines += [f"  {index}: {why}" for index, why in list(failed.items())[:3]]
        return "\n".join([*lines, self.summary().to_string()])

    def __len__(self) -> int:
        return len(self.to_arrow(["index"]))

    @property
    def manifest(self) -> dict[str, Any]:
        """What was measured and how: the settings that an interrupted run goes on with."""
        return json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))

    @property
    def complete(self) -> bool:
        """Whether every unit is measured; of an iterable: whether its end was reached as well."""
        return len(self.done()) == self.manifest["units"] or (self.path / "table.parquet").exists()

    @property
    def layers(self) -> dict[str, Any]:
        """Layer → the quantity, unit, estimand, engine and normalisation that were measured."""
        return next((footer["layers"] for _, footer in self._files().values() if footer["layers"]), {})

    def done(self) -> dict[int, str | None]:
        """The units that are measured → a digest of their input, where the data set is an iterable."""
        return dict(unit for _, footer in self._files().values() for unit in footer.get("units", ()))

    def to_arrow(self, columns: Sequence[str] | None = None, *, among: range | None = None) -> pyarrow.Table:
        """The rows as a pyarrow Table: some columns alone, indices ``among`` a range alone."""
        schema, files = self.schema(), list(self._files())
        index = arrow("pyarrow.compute").field("index")
        within = None if among is None else (index >= among.start) & (index < among.stop)
        wanted = [n for n in schema.names if columns is None or n == "index" or n in columns]
        found = arrow("pyarrow.dataset").dataset(files, schema=schema).to_table(columns=wanted, filter=within)
        # In order, and once: two processes may have measured a unit, which gave the same rows.
        return found.take(np.unique(found["index"].to_numpy(), return_index=True)[1])

    def schema(self) -> pyarrow.Schema:
        """Every column of any part: those of the samples, then layer by layer the value and the others by name."""
        pyarrow = arrow("pyarrow")
        schemas = [pyarrow.schema([("index", pyarrow.int64())]), *(schema for schema, _ in self._files().values())]
        found = pyarrow.unify_schemas(schemas, promote_options="permissive")
        layers = self.layers

        def place(name: str) -> tuple[int, int, str]:
            layer, _, column = name.rpartition("/")
            if name in SAMPLE:
                return -1, SAMPLE.index(name), column
            return list(layers).index(layer), int(column != layers[layer]["quantity"]), column

        return pyarrow.schema([found.field(name) for name in sorted(found.names, key=place)])

    def to_pandas(self, columns: Sequence[str] | None = None) -> DataFrame:
        """The rows as a DataFrame; needs pandas."""
        return arrow("pandas").DataFrame(self.to_arrow(columns).to_pydict())

    def layer(self, name: str) -> DataFrame:
        """One layer's columns by their own names, beside those of the samples.

        Raises:
            ProbeError: a layer that was not measured.
        """
        if name not in self.layers:
            raise ProbeError(f"{name!r} was not measured.\nThere are the layers {list(self.layers)}.")
        own = [n for n in self.schema().names if n in SAMPLE or n.rpartition("/")[0] == name]
        return self.to_pandas(own).rename(columns=lambda column: column.rpartition("/")[2])

    def value(self, layer: str) -> str:
        """The column of a layer's value."""
        return f"{layer}/{self.layers[layer]['quantity']}"

    def summary(self, by: str | None = None) -> DataFrame:
        """Per layer, and per value of the column ``by`` (``"label"``, ``"prediction"``): median, 10 and 90 %, counts.

        ``nonfinite`` counts the samples without a finite value: failed to load, not finite themselves, no volume.

        Raises:
            ProbeError: a column that is not there.
        """
        if by is not None and by not in self.schema().names:
            raise ProbeError(f"by={by!r} is no column.\nThere are {', '.join(self.schema().names)}.")
        rows = []
        for layer, measured in self.layers.items():
            frame = self.to_pandas([self.value(layer), *([by] if by else [])])
            for group, own in frame.groupby(by) if by else [("all", frame)]:
                values = own[self.value(layer)].astype("float64")
                finite = values[np.isfinite(values)]
                p10, median, p90 = finite.quantile([0.1, 0.5, 0.9])
                counts = (len(own), len(own) - len(finite))
                rows.append([layer or "(model)", group, measured["quantity"], p10, median, p90, *counts])
        keys = ["layer", by or "samples"]
        columns = [*keys, "quantity", "p10", "median", "p90", "count", "nonfinite"]
        return arrow("pandas").DataFrame(rows, columns=columns).set_index(keys)

    def failures(self) -> dict[int, str]:
        """Index → why, of the samples that could not be loaded or measured."""
        found = self.to_arrow(["error"]).to_pydict()
        return {i: why for i, why in zip(found["index"], found.get("error", ()), strict=False) if why is not None}

    def compact(self) -> DatasetTable:
        """Make one file of all parts, ``table.parquet``, and delete them; the same bytes however the parts came about.

        Raises:
            ProbeError: units are missing.
        """
        if not self.complete:
            raise ProbeError(
                f"{self.path} is not complete: {len(self.done())} of {self.manifest['units'] or 'unknown'} units.\n"
                "Run the same measure_dataset(...) again: it goes on where it stopped."
            )
        whole = self.path / "table.parquet"
        if not whole.exists():
            last = max(self.to_arrow(["index"])["index"].to_pylist(), default=-1)
            footer = {KEY: json.dumps({"layers": self.layers}, sort_keys=True)}
            with replacing(whole) as beside:
                with arrow("pyarrow.parquet").ParquetWriter(beside, self.schema().with_metadata(footer)) as writer:
                    for start in range(0, last + 1, _GROUP):
                        rows = self.to_arrow(among=range(start, start + _GROUP))
                        writer.write_table(rows.replace_schema_metadata(footer))
        shutil.rmtree(self.path / "parts", ignore_errors=True)
        return self

    def _files(self) -> dict[Path, tuple[pyarrow.Schema, dict[str, Any]]]:
        """The files → their columns and what their footers say; each is read once."""
        while True:
            # The whole table takes the place of parts that a kill has left beside it.
            whole = self.path / "table.parquet"
            files = [whole] if whole.exists() else sorted((self.path / "parts").glob("*.parquet"))
            try:
                for file in files:
                    if file not in self._seen:
                        schema = arrow("pyarrow.parquet").read_schema(file)
                        self._seen[file] = schema.remove_metadata(), json.loads(schema.metadata[KEY])
                return {file: self._seen[file] for file in files}
            except FileNotFoundError:
                continue  # another process has made the whole table meanwhile
