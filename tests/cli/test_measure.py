"""``torchgeom-probe measure``: the table, the files, every estimator, images through timm."""

import csv
import json

import pytest

from torchgeom_probe.cli.main import main


def test_measure_prints_a_table_and_writes_the_same_numbers(model_file, tmp_path, capsys):
    out = tmp_path / "run"
    command = [
        "measure",
        "--model",
        f"{model_file}:make",
        "--layers",
        "body.*",
        "head",
        "-k",
        "3",
        "--batch",
        "6",
        "--out",
        str(out),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "random orthonormal 3-frame" in printed
    with (out / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 6
    layers = json.loads((out / "report.json").read_text())["layers"]
    assert [layer["name"] for layer in layers] == ["body.0", "body.1", "head"]
    assert main(command) == 0  # the same seed, the same numbers
    assert capsys.readouterr().out.splitlines()[:5] == printed.splitlines()[:5]


@pytest.mark.parametrize("name", ["subspace", "exact", "topk", "logdet", "trace"])
def test_measure_takes_every_estimator(name, model_file, capsys):
    assert main(["measure", "--model", f"{model_file}:make", "--layers", "body", "--estimator", name, "-k", "3"]) == 0
    estimand = {"subspace": "3-frame", "exact": "all d directions", "topk": "3", "logdet": "det", "trace": "tr g"}[name]
    assert estimand in capsys.readouterr().out.splitlines()[-2]


def test_measure_exact_of_torchvision_and_of_images_through_timm(tmp_path, capsys):
    from PIL import Image

    assert (
        main(
            [
                "measure",
                "--model",
                "torchvision:squeezenet1_1",
                "--layers",
                "classifier.1",
                "-k",
                "1",
                "--batch",
                "1",
                "--input-shape",
                "3,64,64",
            ]
        )
        == 0
    )
    assert "classifier.1" in capsys.readouterr().out
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    assert main(["measure", "--model", "timm:test_resnet", "--images", str(tmp_path), "-k", "2"]) == 0
    assert "1 samples" in capsys.readouterr().out
