"""``torchgeom-probe boundary``: the table, the files, the control that it has and says."""

import pytest
import torch

import torchgeom_probe as tgp
from torchgeom_probe.cli.main import main

pytest.importorskip("matplotlib")


def command(model_file, tmp_path, *more):
    start = ["boundary", "--model", f"{model_file}:make", "--input-shape", "5", "--batch", "150"]
    return [*start, "--layers", "body.1", "--pairs", "20", "--out", str(tmp_path / "out"), *more]


@pytest.fixture
def weights(model_file, tmp_path):
    """Two files of weights of that model."""
    make = __import__("runpy").run_path(str(model_file), run_name="my_model")["make"]
    for name in ("trained", "before"):
        torch.save(make().state_dict(), tmp_path / f"{name}.pth")
    return tmp_path / "trained.pth", tmp_path / "before.pth"


def test_it_prints_the_table_and_writes_picture_and_study(model_file, weights, tmp_path, capsys):
    trained, before = weights
    arguments = command(model_file, tmp_path, "--checkpoint", str(trained), "--initial", str(before))
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    study = tgp.BoundaryStudy.load(tmp_path / "out" / "study.json")
    assert str(study) in printed
    assert study["body.1"].initial is not None
    assert "random weights" not in printed
    assert {"profile.png", "profile.pdf", "study.json"} == {p.name for p in (tmp_path / "out").iterdir()}
    assert main([*arguments[:-4], "--pairs", "21"]) == 1  # another study is not overwritten
    assert "holds another boundary_study" in capsys.readouterr().err


def test_without_weights_from_before_the_control_is_random_and_it_says_so(model_file, weights, tmp_path, capsys):
    assert main(command(model_file, tmp_path, "--checkpoint", str(weights[0]), "--estimator", "subspace:1")) == 0
    printed = capsys.readouterr().out
    assert "The control has random weights (--seed 0)" in printed
    assert tgp.BoundaryStudy.load(tmp_path / "out" / "study.json")["body.1"].initial is not None


def test_a_model_of_ones_own_without_weights_has_no_control(model_file, tmp_path, capsys):
    assert main(command(model_file, tmp_path, "--estimator", "subspace:1")) == 0
    assert "not tested" in capsys.readouterr().out


def test_random_weights_are_refused(capsys):
    pytest.importorskip("timm")
    assert main(["boundary", "--model", "timm:resnet18"]) == 1
    assert "Give trained ones:  --checkpoint trained.pth, or --pretrained" in capsys.readouterr().err
