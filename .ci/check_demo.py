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
assert len(events.Scalars("logvol/01_sigmoid2")) == len(curve)
losses, accuracies = (events.Scalars(f"training/{name}") for name in ("loss", "test_accuracy"))
assert losses[-1].value < losses[0].value
assert 0 < accuracies[-1].value <= 1

with (out / "geometry.csv").open(newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["layer"] == "sigmoid"]
assert [int(row["step"]) for row in rows] == [point.step for point in curve]
assert all(abs(float(row["median"]) - point.value) < 1e-3 for row, point in zip(rows, curve, strict=True))

layers = json.loads((out / "report.json").read_text())["layers"]
assert len(layers) == 2
assert all(len(layer["log_volume"]) == 32 and layer["nonfinite"] == 0 for layer in layers)

study = tgp.BoundaryStudy.load(out / "study.json")
assert list(study) == ["sigmoid", "sigmoid2"]
assert all(effect.num_pairs >= 100 and math.isfinite(effect.estimate) for effect in study.values())

for name in ("line.png", "plane.png", "digits_profile.png"):
    picture = matplotlib.image.imread(out / name)
    assert picture.shape[0] > 300, f"{name} has only {picture.shape[0]} rows"
    assert picture[..., :3].std() > 0.05, f"{name} is blank"

for view in ("line", "plane"):
    scans = sorted((out / view).glob("epoch_*.safetensors"))
    assert len(scans) >= 2, f"{view}: {len(scans)} scans, not one before and one after training"
    assert all(tgp.SliceScan.load(path).log_volume["sigmoid"].isfinite().all() for path in scans), view

print(f"demo: {len(curve)} probes in TensorBoard and CSV, figures drawn, scans read back")
