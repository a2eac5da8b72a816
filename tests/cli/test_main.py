"""The command line: every verb, its refusals, and the demo from end to end."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import torchgeom_probe as tgp
from torchgeom_probe.cli.main import main
from torchgeom_probe.reproduce.data.digits import load_mnist

FACTORY = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(5, 7), nn.Tanh()), nn.Linear(7, 3)
    def forward(self, x):
        return self.head(self.body(x))
def make():
    return Net()
def broken():
    return 3
def cut():
    net = Net()
    net.body.register_forward_hook(lambda m, a, out: out.detach())
    return net
"""


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(FACTORY)
    return path


def test_layers_lists_names_and_marks_stages(model_file, capsys):
    assert main(["layers", "--model", f"{model_file}:make"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["*", "body.0", "Linear", "42"] for line in lines)
    assert [line.split()[1] for line in lines if line.startswith("*")] == ["body.0"]
    assert main(["layers", "--model", "timm:resnet10t", "--match", "layer?"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("*")] == [
        f"layer{i}" for i in range(1, 5)
    ]


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
    assert (
        main(["measure", "--model", f"{model_file}:make", "--layers", "body", "--estimator", name, "-k", "3"])
        == 0
    )
    estimand = {
        "subspace": "3-frame",
        "exact": "all d directions",
        "topk": "3",
        "logdet": "det",
        "trace": "tr g",
    }[name]
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


def test_a_tag_names_weights_that_are_fetched_or_given(tmp_path, monkeypatch, capsys):
    import timm
    import torch
    from PIL import Image

    asked, create = [], timm.create_model

    def no_network(name, pretrained=False, **options):
        asked.append(pretrained)
        if pretrained:
            raise FileNotFoundError("An error happened while trying to locate the file on the Hub\nmore")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", no_network)
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in (("a.png", (40, 30)), ("b.JPG", (9, 50))):
        Image.new("RGB", size, "red").save(folder / name)
    (folder / "labels.csv").write_text("no image")
    command = ["measure", "--images", str(folder), "-k", "2", "--layers", "layer4", "--model"]
    assert main([*command, "timm:test_resnet.r160_in1k"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "torchgeom-probe: the weights of timm:test_resnet.r160_in1k could not be fetched: FileNot"
    )
    assert "--checkpoint model.pth" in said
    assert "--model timm:test_resnet\n" in said

    assert main([*command, "timm:test_resnet"]) == 0
    printed = capsys.readouterr().out
    assert "2 samples in" in printed
    assert "The weights are random" in printed
    torch.save(create("test_resnet").state_dict(), tmp_path / "model.pth")
    assert main([*command, "timm:test_resnet.r160_in1k", "--checkpoint", str(tmp_path / "model.pth")]) == 0
    assert "weights are random" not in capsys.readouterr().out
    assert main(["layers", "--model", "timm:test_resnet.r160_in1k"]) == 0
    assert asked == [True, False, False, False]


def test_check_says_ok_or_why_not(model_file, capsys):
    assert main(["check", "--model", f"{model_file}:make", "--layers", "**"]) == 0
    assert "OK: engine fused" in capsys.readouterr().out
    assert main(["check", "--model", f"{model_file}:cut", "--layers", "head"]) == 1
    assert "NOT OK" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["measure", "--model", "resnet18"], "--model 'resnet18' is not understood"),
        (["measure", "--model", "timm:resnet19"], "Did you mean"),
        (["measure", "--model", "torchvision:resnet19"], "Did you mean resnet18"),
        (["measure", "--model", "nowhere.py:make"], "no Python file nowhere.py"),
        (["measure", "--model", "FILE:absent"], "has no 'absent'"),
        (["measure", "--model", "FILE:broken"], "returned a int, not an nn.Module"),
        (["measure", "--model", "FILE:make", "--layers", "bodi"], "Did you mean 'body'"),
        (["measure", "--model", "FILE:make", "-k", "9"], "Write Subspace\\(k=5\\)"),
        (["measure", "--model", "FILE:make", "--input-shape", "5x5"], "is no list of sizes"),
        (["measure", "--model", "FILE:make", "--images", "a.png"], "Write --model timm:NAME"),
        (["measure", "--model", "FILE:make", "--checkpoint", "absent.pth"], "cannot be loaded"),
        (["demo", "--width", "3", "--out", "TMP"], "--width 3 is below the 64 pixels"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "",
)
def test_refusals_are_one_message_and_status_1(arguments, match, model_file, tmp_path, capsys):
    import re

    filled = [a.replace("FILE", str(model_file)).replace("TMP", str(tmp_path / "out")) for a in arguments]
    assert main(filled) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("torchgeom-probe: ")
    assert re.search(match, captured.err), captured.err
    assert "Traceback" not in captured.err


def test_mnist_that_cannot_be_had_says_what_to_do(monkeypatch, tmp_path):
    import torchvision

    def refused(*args, **kwargs):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets, "MNIST", refused)
    with pytest.raises(
        tgp.ProbeError, match=r"MNIST is not under .*\n.*train-images-idx3-ubyte.gz.*--data digits"
    ):
        load_mnist(tmp_path, instead="torchgeom-probe demo --data digits")


def test_mnist_files_that_are_there_are_read(tmp_path):
    import gzip
    import struct

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        images = (
            struct.pack(">IIII", 2051, count, 28, 28)
            + bytes(range(256)) * (count * 784 // 256)
            + bytes(count * 784 % 256)
        )
        labels = struct.pack(">II", 2049, count) + bytes(range(count))
        for name, content in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            (raw / name).write_bytes(content)
            with gzip.open(raw / f"{name}.gz", "wb") as file:
                file.write(content)
    digits = load_mnist(tmp_path, instead="")
    assert digits.train_images.shape == (3, 784)
    assert digits.side == 28
    assert digits.test_labels.tolist() == [0, 1]
    assert digits.train_images.max() == 255


def test_demo_from_end_to_end(tmp_path, capsys):
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for phrase in (
        "log √det g, all d directions",
        "On the line: sigmoid",
        "On the plane: sigmoid",
        "the untrained network: ρ",
        "tensorboard --logdir",
    ):
        assert phrase in printed
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert len(events.Scalars("logvol/00_sigmoid")) >= 10
    for name in ("line.png", "plane.png"):
        assert matplotlib.image.imread(tmp_path / name)[..., :3].std() > 0.05
    scan = tgp.SliceScan.load(tmp_path / "plane_after.safetensors")
    assert scan.report["sigmoid"].num_directions == 64


def test_ctrl_c_says_where_things_are_and_loses_nothing(tmp_path):
    run = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torchgeom_probe.cli.main",
            "demo",
            "--out",
            str(tmp_path / "run"),
            "--epochs",
            "5000",
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # Under a shell that runs the tests in the background, SIGINT is ignored by all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "run" / "geometry.csv"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "stopped; what was computed so far is under" in errors
    assert "Traceback" not in errors
    assert log.read_text().count("\n") >= 2
    assert list((tmp_path / "run" / "events").glob("events.*"))


def test_version_and_module_entry():
    out = subprocess.run(
        [sys.executable, "-m", "torchgeom_probe.cli.main", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split() == ["torchgeom-probe", tgp.__version__]


def test_a_missing_package_is_told_with_its_pip_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['tensorboard'] = None\nsys.modules['timm'] = None\n"
    )
    for verb, extra in (
        (["demo", "--quick", "--out", str(tmp_path / "o")], "tensorboard"),
        (["layers", "--model", "timm:resnet18"], "timm"),
    ):
        out = subprocess.run(
            [sys.executable, "-m", "torchgeom_probe.cli.main", *verb],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(tmp_path), "PATH": str(Path(sys.executable).parent)},
        )
        assert out.returncode == 1
        assert f"pip install 'torchgeom_probe[{extra}]'" in out.stderr
