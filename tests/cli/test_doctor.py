"""``torchgeom-probe doctor``, ``--json``, ``--device`` and the shell's completion."""

import importlib.metadata
import json

import pytest
import torch

from torchgeom_probe.cli import doctor
from torchgeom_probe.cli.main import main


def test_the_doctor_checks_itself_against_a_closed_form(capsys, monkeypatch):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [check["ok"] for check in found["self_check"]] == [True, True]
    assert found["self_check"][0]["error"] < 1e-10
    assert found["packages"]["timm"][0] == importlib.metadata.version("timm")

    # A derivative that is off by a factor makes it fail.
    monkeypatch.setattr(doctor.shallow, "log_volume", lambda *a: torch.zeros(16, dtype=torch.float64))
    assert main(["doctor"]) == 1
    assert "WRONG on cpu" in capsys.readouterr().out


def test_the_doctor_names_what_is_missing(capsys, monkeypatch):
    def version(package):
        if package == "lightly":
            raise importlib.metadata.PackageNotFoundError
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "_self_check", lambda *_: {"ok": True, "verdict": "ok"})
    assert main(["doctor"]) == 0
    assert "not installed: python -m pip install 'torchgeom_probe[lightly]'" in capsys.readouterr().out


def test_an_exception_in_the_self_check_is_a_finding(capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(doctor, "measure", broken)
    assert main(["doctor"]) == 1
    assert "FAILED on cpu, torch.float64: RuntimeError: no kernel image\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fpga", "cuda:77"])
def test_a_device_that_is_not_there(name, model_file, capsys):
    assert main(["measure", "--model", f"{model_file}:make", "--device", name]) == 1
    assert f"--device {name} cannot be used here" in capsys.readouterr().err


def test_json_is_what_the_table_says(model_file, capsys):
    model = ["--model", f"{model_file}:make"]
    assert main(["measure", *model, "--layers", "head", "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    assert layer["name"] == "head"
    assert len(layer["log_volume"]) == 4
    assert main(["check", *model, "--layers", "head", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engine"] == "fused"
    assert main(["layers", *model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][-1] == {
        "name": "head",
        "type": "Linear",
        "parameters": 24,
        "stage": False,
    }


def test_the_shell_can_complete(capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 0
    assert "doctor" in capsys.readouterr().out
