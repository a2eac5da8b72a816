"""Checks what a demo wrote: events that read back, logs with the same numbers, figures that are not blank."""

import csv
import json
import math
import sys
from pathlib import Path

import matplotlib.image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import torchgeom_probe as tgp

out = Path(sys.argv[1])

events = EventAccumulator(str(out / "events"), size_guidance={"scalars": 0, "histograms": 0}).Reload()
curve = events.Scalars("logvol/00_sigmoid")
assert len(curve) >= 10, f"only {len(curve)} points in TensorBoard"
assert curve[0].step == 0, "the network before training is missing"
assert all(math.isfinite(point.value) for point in curve)
assert len({point.value for point in curve}) > 5, "the curve does not move"
assert len(events.Histograms("logvol_histogram/00_sigmoid")) == len(curve)

with (out / "geometry.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
assert [int(row["step"]) for row in rows] == [point.step for point in curve]
assert all(abs(float(row["median"]) - point.value) < 1e-3 for row, point in zip(rows, curve, strict=True))

(layer,) = json.loads((out / "report.json").read_text())["layers"]
assert len(layer["log_volume"]) == 32
assert layer["nonfinite"] == 0

for name in ("line.png", "plane.png"):
    picture = matplotlib.image.imread(out / name)
    assert picture.shape[0] > 400, f"{name} has only {picture.shape[0]} rows"
    assert picture[..., :3].std() > 0.05, f"{name} is blank"

for name in ("line_before", "line_after", "plane_before", "plane_after"):
    scan = tgp.SliceScan.load(out / f"{name}.safetensors")
    assert scan.log_volume["sigmoid"].isfinite().all(), name

print(f"demo: {len(curve)} probes in TensorBoard and CSV, figures drawn, scans read back")
