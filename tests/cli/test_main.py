"""The command line: its version, its refusals, what it says where a package is missing."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blocks import run_block

import torchgeom_probe as tgp
from torchgeom_probe import cli
from torchgeom_probe.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["measure", "--model", "resnet18"], "--model 'resnet18' is not understood"),
        (["measure", "--model", "resnet18"], "Did you mean timm:resnet18"),
        (["measure", "--model", "efficientnet_lite0"], "Did you mean efficientnet-lite0"),
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
    filled = [a.replace("FILE", str(model_file)).replace("TMP", str(tmp_path / "out")) for a in arguments]
    assert main(filled) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("torchgeom-probe: ")
    assert re.search(match, captured.err), captured.err
    assert "Traceback" not in captured.err


def test_every_verb_obeys_engine_and_source(model_file, tmp_path, capsys):
    start = ["--model", f"{model_file}:make", "--engine", "vjp", "--layers", "head"]
    main(["directions", *start, "-k", "2", "--out", str(tmp_path)])  # five numbers are no picture
    assert "engine vjp" in capsys.readouterr().out
    weights = tmp_path / "weights.pth"
    torch.save(runpy.run_path(str(model_file), run_name="my_model")["make"]().state_dict(), weights)
    assert main(["boundary", *start, "--checkpoint", str(weights), "--batch", "60", "--source", "body"]) == 1
    assert "source='body': a line between samples lies in the model's input" in capsys.readouterr().err


def test_version_and_module_entry(tmp_path):
    entry = "runpy.run_module('torchgeom_probe.cli.main', run_name='__main__')"
    returned, printed, errors = run_block(f"import runpy, sys\nsys.argv[1:] = ['--version']\n{entry}", tmp_path)
    assert returned == 0, errors
    assert printed.split() == ["torchgeom-probe", tgp.__version__]


@pytest.mark.parametrize(
    ("verb", "package"),
    [
        (["layers", "--model", "timm:resnet18"], "timm"),
        pytest.param(["demo", "--quick", "--out", "o"], "tensorboard", marks=pytest.mark.slow),
    ],
)
def test_a_missing_package_is_told_with_its_pip_line(verb, package, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    out = subprocess.run(
        [sys.executable, "-m", "torchgeom_probe.cli.main", *verb],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": str(Path(sys.executable).parent)},
    )
    assert out.returncode == 1
    assert f"pip install 'torchgeom_probe[{package}]'" in out.stderr


def test_a_new_verb_is_one_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "greet.py").write_text(
        "def add(verbs):\n"
        "    parser = verbs.add_parser('greet', help='say hello')\n"
        "    parser.set_defaults(run=run)\n"
        "def run(arguments):\n"
        "    print('hello')\n"
        "    return 3\n"
    )
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    try:
        assert main(["greet"]) == 3
        assert capsys.readouterr().out == "hello\n"
        with pytest.raises(SystemExit):
            main(["--help"])
        assert re.search("greet +say hello", capsys.readouterr().out)
    finally:
        sys.modules.pop("torchgeom_probe.cli.greet", None)
        vars(cli).pop("greet", None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_a_process_of_its_own_keeps_the_memory_that_tensors_free():
    program = (
        "import resource, sys, torch; from torchgeom_probe.cli import main as cli\n"
        "cli._keep_freed_memory() if sys.argv[1] == 'kept' else None\n"
        "for _ in range(20): torch.ones(2**24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "given back")
    )
    assert kept < given_back - 10 * 2**24 * 4 // 2**21  # of 20 tensors, if a page is as large as they come
