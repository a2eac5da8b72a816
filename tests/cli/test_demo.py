"""``torchgeom-probe demo``, from end to end, and stopped."""

import signal
import subprocess
import sys
import time

import matplotlib.image
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import torchgeom_probe as tgp
from torchgeom_probe.cli.main import main


@pytest.mark.slow  # .ci/run does it, and looks closer
def test_demo_from_end_to_end(tmp_path, capsys):
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for phrase in (
        "log √det g, all d directions",
        "line: sigmoid, on this one slice",
        "plane: sigmoid2, on this one slice",
        "sigmoid2: ",
        "trained minus untrained",
        "tensorboard --logdir",
    ):
        assert phrase in printed
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for tag in ("logvol/00_sigmoid", "logvol/01_sigmoid2", "training/loss", "training/test_accuracy"):
        assert len(events.Scalars(tag)) >= 10
    assert list(tgp.BoundaryStudy.load(tmp_path / "study.json")) == ["sigmoid", "sigmoid2"]
    for name in ("line.png", "plane.png", "digits_profile.png"):
        assert matplotlib.image.imread(tmp_path / name)[..., :3].std() > 0.05
    scan = tgp.SliceScan.load(tmp_path / "plane" / "epoch_00010.safetensors")
    assert scan.report["sigmoid"].num_directions == 64


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--quick"], ["--epochs", "2", "--width", "70"]])
def test_a_full_demo_is_not_replaced_by_another(tmp_path, capsys, options):
    full = ["demo", "--epochs", "1", "--width", "80", "--grid", "12", "--out", str(tmp_path)]
    assert main(full) == 0
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["demo", "--grid", "12", "--out", str(tmp_path), *options]) == 1
    assert "holds another training" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.slow
def test_a_quick_demo_has_a_folder_of_its_own_and_makes_room_for_the_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in ("0", "1"):
        assert main(["demo", "--quick", "--epochs", "1", "--grid", "12", "--seed", seed]) == 0
    assert [path.name for path in (tmp_path / "torchgeom_runs").iterdir()] == ["demo_quick"]


def test_ctrl_c_says_where_things_are_and_loses_nothing(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-m", "torchgeom_probe.cli.main", "demo", "--out", str(tmp_path / "run"), "--epochs", "5000"],
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
