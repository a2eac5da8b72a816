"""Folders of real files: what Pillow makes of them, the command line, the figure."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchgeom_probe.integrations.timm import ImageFiles

import torchgeom_probe as tgp
from torchgeom_probe.cli import dataset as verb
from torchgeom_probe.cli.main import main
from torchgeom_probe.plotting.files import save

pytest.importorskip("pyarrow")
ODD = "$x^2$ <b>né\nw<b> ☃.png"


def _to_tensor(image):
    return torch.from_numpy(np.array(image.resize((6, 4)))).permute(2, 0, 1) / 255


@pytest.fixture
def folder(tmp_path):
    """Images of two folders in every form that a data set has, one of them cut short."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for place in range(3):
            image.rotate(place * 90).save(tmp_path / name / f"{place}.png")
    cats = tmp_path / "cats"
    image.save(cats / "whole.jpg")
    data = (cats / "whole.jpg").read_bytes()
    (cats / "truncated.jpg").write_bytes(data[: len(data) // 2])
    image.convert("L").save(cats / "grey.png")
    image.convert("CMYK").save(cats / "cmyk.jpg")
    image.convert("P").save(cats / "animated.gif", save_all=True, append_images=[image.rotate(180).convert("P")])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° to the right
    image.rotate(90, expand=True).save(cats / "turned.png", exif=exif)
    image.resize((6000, 5000)).save(cats / "huge.jpg", quality=30)
    image.save(cats / ODD)
    (cats / "empty.png").write_bytes(b"")
    (cats / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_of_odd_files(folder, tmp_path, monkeypatch):
    to_arrow = tgp.DatasetTable.to_arrow
    data = ImageFiles(folder, _to_tensor)
    by_name = {file.name: index for index, file in enumerate(data.files)}
    assert "notes.txt" not in by_name
    assert torch.equal(data[by_name["turned.png"]][0], data[by_name["0.png"]][0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 13), nn.Tanh(), nn.Linear(13, 5)).eval()
    table = tgp.measure_dataset(
        model, data, path=tmp_path / "run", label=1, layers=["3"], batch_size=4, estimator="subspace:2"
    )
    failures = table.failures()
    assert set(failures) == {by_name["truncated.jpg"], by_name["empty.png"]}
    assert "truncated" in failures[by_name["truncated.jpg"]]
    frame = table.layer("3")
    assert frame["file"][by_name[ODD]].endswith(ODD)
    assert frame["label"].dropna().value_counts().to_dict() == {"cats": 10, "dogs": 3}
    assert frame["frame_volume"].notna().sum() == 13
    # with markup in a name, and two groups; of each panel what it says
    figure = tgp.plot(table, by="label", count=13, title="a folder")
    assert save(figure, tmp_path / "figure.png").stat().st_size > 10_000
    axes = [axes for part in figure.subfigs for axes in part.axes]
    titles = [a.get_title() for a in axes]
    assert titles[:2] == ["3", f"against the margin: Spearman ρ = {_rho(frame):.2f}"]
    assert "$x^2$ <b>né·w…" in titles
    assert axes[0].get_xlabel() == "frame volume [nat]"
    least = frame.sort_values("frame_volume")["file"].iloc[0].rpartition("/")[2]
    assert titles[2] == least
    assert len(tgp.plot(table, pictures=data, unit="log10", layers="3").subfigs) == 2
    monkeypatch.setattr(tgp.DatasetTable, "to_arrow", lambda self, columns: _without_a_file(to_arrow(self, columns)))
    assert tgp.plot(table).subfigs  # a sample without a file has no picture
    monkeypatch.undo()
    flat = nn.Sequential(nn.Flatten(), nn.Linear(72, 2))  # 8 directions into 2 features: no volume anywhere
    none = tgp.measure_dataset(flat, data, path=tmp_path / "flat", label=1, layers=["1"])
    assert tgp.plot(none, by="label").axes[0].get_title() == "1"
    assert [axes.get_title() for axes in tgp.plot(none).subfigs[0].axes] == ["1", "against the margin: nothing varies"]
    with pytest.raises(tgp.ProbeError, match="by='colour' is no column"):
        tgp.plot(table, by="colour")
    with pytest.raises(tgp.ProbeError, match="by='colour' is no column"):
        table.summary(by="colour")
    with pytest.raises(tgp.ProbeError, match=r"'9' was not measured.\nThere are the layers \['3'\]"):
        table.layer("9")


def _without_a_file(rows):
    files = [None if row % 2 else file for row, file in enumerate(rows["file"].to_pylist())]
    return rows.set_column(rows.column_names.index("file"), "file", [files])


def _rho(frame):
    kept = frame[frame["margin"].notna()]
    return kept["margin"].corr(kept["frame_volume"], method="spearman")


def test_the_verb(folder, tmp_path, capsys):
    command = ["dataset", "--model", "timm:resnet18", "--layers", "maxpool", "-k", "2", "--workers", "0"]
    out = ["--images", str(folder / "dogs"), "--out", str(tmp_path / "run")]
    assert main([*command, *out]) == 0
    assert "3 samples, 0 of them not measured" in capsys.readouterr().out
    assert (tmp_path / "run" / "table.parquet").exists()
    assert (tmp_path / "run" / "dataset.png").exists()
    within = ["--images", str(folder / "dogs"), "--out", str(folder / "dogs" / "run")]
    for _ in range(2):  # the second finds a picture of the first
        assert main([*command, *within]) == 0
        assert "3 samples, 0 of them not measured" in capsys.readouterr().out
    (tmp_path / "net.py").write_text("import torch\ndef make():\n    return torch.nn.Conv2d(3, 5, 3)\n")
    assert main(["dataset", "--model", f"{tmp_path / 'net.py'}:make", *out]) == 1
    assert "dataset takes a model that knows its own preprocessing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(command)  # without --images
    with pytest.raises(SystemExit):
        main([*command, *out, "--input-shape", "3"])  # nothing here would obey it


def test_every_process_of_torchrun_has_a_card_of_its_own(folder, tmp_path, monkeypatch):
    asked = []

    def asks(arguments):
        asked.append(arguments.device)
        raise tgp.ProbeError("enough")

    monkeypatch.setattr(verb, "model_of", asks)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for device in ("cuda", "cuda:1", "cpu"):
        main(["dataset", "--model", "timm:resnet18", "--images", str(folder), "--device", device])
    assert asked == ["cuda:3", "cuda:1", "cpu"]


@pytest.mark.slow
def test_the_verb_under_torchrun(folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp(
        "out"
    )  # not among the images, where the second run would find the first's picture
    command = [*"dataset --model timm:resnet18 --layers layer4 -k 2 --batch-size 4".split(), "--images", str(folder)]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    run += ["--rdzv-endpoint", "localhost:0", "-m", "torchgeom_probe.cli.main"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*run, *command, "--out", str(tmp_path / "two")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("15 samples, 2 of them not measured") == 1
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    tables = [(tmp_path / name / "table.parquet").read_bytes() for name in ("one", "two")]
    assert tables[0] == tables[1]
