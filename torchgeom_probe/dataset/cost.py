"""What measuring a data set will take, from a few seconds of it."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from torchgeom_probe.dataset.batches import Units
from torchgeom_probe.dataset.stream import Rows
from torchgeom_probe.dataset.table import arrow
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators.cost import Cost, cost_of
from torchgeom_probe.probe import GeometryProbe

#: For how long units are measured, after a first one that warms up.
_SECONDS = 5.0


@dataclass(frozen=True)
class DatasetCost:
    """What ``measure_dataset`` will take on one process; ``str()`` says it.

    Attributes:
        samples: of the data set.
        samples_per_second: with loading, the prediction and the rows.
        seconds: for all samples.
        bytes: of the table on disk.
        batch: the cost of one batch of the loader, as ``probe.cost(x)`` has it.
    """

    samples: int
    samples_per_second: float
    seconds: float
    bytes: int
    batch: Cost

    def __str__(self) -> str:
        return (
            f"{self.samples} samples, {self.samples_per_second:.3g} a second: {self.seconds / 3600:.3g} hours on one "
            f"process, {self.bytes / 2**20:.3g} MiB on disk; of each batch:\n{self.batch}"
        )


@cost_of.register(DataLoader)
@cost_of.register(Dataset)
def dataset_cost(data: Any, probe: GeometryProbe) -> DatasetCost:
    """Measure units of a data set for a few seconds, and carry it on to all of them.

    Raises:
        ProbeError: an iterable, whose length is not known; no sample that can be measured.
    """
    units = Units.of(data, batch_size=None, num_workers=None, collate_fn=None)
    if not len(units):
        raise ProbeError(
            f"a {type(data).__name__} does not say how many samples it has.\nAsk of a batch:  probe.cost(x)"
        )
    rows, loaded = Rows(probe, units), units.loaded(lambda number: True)
    first = next((unit for unit in loaded if unit.indices), None)
    if first is None:
        raise ProbeError("no sample of the data set could be loaded.\nLook at one:  data[0]")
    batch = rows.probe.cost(rows.input_of(first))
    rows.of(first)  # plans
    tables, began = [], time.perf_counter()
    for unit in loaded:
        tables.append(rows.of(unit))
        if time.perf_counter() - began > _SECONDS:
            break
    tables = tables or [rows.of(first)]
    table = arrow("pyarrow").concat_tables(tables, promote_options="permissive")
    rate = len(table) / (time.perf_counter() - began)
    buffer = io.BytesIO()
    arrow("pyarrow.parquet").write_table(table, buffer)
    samples = len(units.order)
    return DatasetCost(samples, rate, samples / rate, samples * buffer.tell() // len(table), batch)
