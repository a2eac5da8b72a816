"""Checks what ``reproduce`` wrote: results that read back and agree with the scans, pictures that are not blank."""

import json
import math
import sys
from pathlib import Path

import matplotlib.image

import torchgeom_probe as tgp

out, gallery = Path(sys.argv[1]), Path(sys.argv[2])
figures = sys.argv[3:] or [f"fig{i}" for i in range(1, 7)]


def refuse(constant):
    """NaN and Infinity are no JSON."""
    raise ValueError(f"{constant} in a JSON file")


count = {"studies": 0, "slices": 0, "pictures": 0, "scans": 0}
for figure in figures:
    stored = json.loads((out / figure / "results.json").read_text(), parse_constant=refuse)
    assert stored["figure"] == figure
    assert stored["settings"]["quick"] is True
    assert stored["quirks"], f"{figure} lists no quirk of the paper's code"
    # After one epoch a network may predict one class: then it says so.
    assert stored["studies"] or all("\n" in refusal["because"] for refusal in stored["refused"]), f"{figure}: no study"
    assert stored["studies"] or figure not in ("fig1", "fig2")
    assert stored["slices"], f"{figure} describes no slice"
    for study in stored["studies"]:
        assert 0 <= study["p_value"] <= 1
        assert all(math.isfinite(number) for number in study["estimate"])
        assert study["sentence"].startswith(study["name"])
        assert study["initial"] is not None, f"{figure}: no untrained network beside {study['name']}"
        assert study["num_pairs"] >= 10
    for found in stored["slices"]:
        if "rho" in found:
            assert found["rho"] is None or -1 <= found["rho"] <= 1
            assert "an illustration" in found["sentence"]
            assert found["initial"] is not None
    assert all(check["ok"] for check in stored["checks"].values())
    count["studies"] += len(stored["studies"])
    count["slices"] += len(stored["slices"])

    pictures = sorted((out / figure).glob("*.png"))
    assert pictures, f"{figure} drew nothing"
    for path in pictures:
        picture = matplotlib.image.imread(path)
        assert picture.shape[0] > 300, f"{path} has only {picture.shape[0]} rows"
        assert picture[..., :3].std() > 0.04, f"{path} is blank"
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    count["pictures"] += len(pictures)

for path in out.glob("trainings/*/*/epoch_*.safetensors"):
    scan = tgp.SliceScan.load(path)
    for name, volume in scan.log_volume.items():
        assert volume.isfinite().double().mean() > 0.5, f"{path}: most of {name} is not finite"
    count["scans"] += 1
assert count["scans"], "no scan was kept"
assert not list(out.rglob("*.parts")), "a scan was left half done"

for path in gallery.glob("*.png"):
    assert path.stat().st_size <= 150_000, f"{path} is too large for the page"

print(
    f"reproduce: {', '.join(f'{n} {what}' for what, n in count.items())} read back, "
    f"gallery of {len(list(gallery.glob('*.png')))}"
)
