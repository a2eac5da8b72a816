"""The writers that the core carries, and what ``writer=`` may be."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

import torchgeom_probe as tgp
from torchgeom_probe.monitor.writers import writers_of


@pytest.fixture
def report():
    return tgp.measure(models.mlp(), torch.randn(7, 5), layers=["1", "4"], estimator=tgp.Exact())


def test_csv_writer_appends_flushes_and_resumes_without_doubles(report, tmp_path):
    path = tmp_path / "geometry.csv"
    assert isinstance(tgp.CSVWriter(path), tgp.Writer)

    def steps():
        with path.open(newline="", encoding="utf-8") as file:
            return [int(r["step"]) for r in csv.DictReader(file) if r["layer"] == "1"]

    writer = tgp.CSVWriter(path)
    for step in (0, 10, 20):
        writer.write(step, report)
        assert steps()[-1] == step  # on disk at once: a killed run loses nothing
    resumed = tgp.CSVWriter(path)  # the first writer was never closed: the run was killed
    resumed.write(20, report)
    resumed.write(30, report)
    resumed.close()
    assert steps() == [0, 10, 20, 30]
    with path.open(newline="", encoding="utf-8") as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row["median"]) == report["4"].statistics()["median"]


def test_csv_writer_leaves_a_strangers_file_alone(report, tmp_path):
    path = tmp_path / "thesis.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(tgp.ProbeError, match="is no geometry log"):
        tgp.CSVWriter(path).write(0, report)
    assert path.read_text() == "a,b\n1,2\n"


def test_json_writer_holds_the_same_numbers_and_resumes_without_doubles(report, tmp_path):
    path = tmp_path / "geometry.jsonl"
    assert isinstance(tgp.JSONWriter(path), tgp.Writer)
    for start in (0, 10):  # the second run resumes at 10 what the first had taken to 20
        writer = tgp.JSONWriter(path)
        for step in (start, start + 10, start + 20):
            writer.write(step, report)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 10, 20, 30]
    assert entries[-1]["layers"]["4"] == {"quantity": report["4"].quantity, **report["4"].statistics()}
    (tmp_path / "notes.txt").write_text("dear diary")
    with pytest.raises(tgp.ProbeError, match="is no geometry log"):
        tgp.JSONWriter(tmp_path / "notes.txt").write(0, report)


def test_a_log_of_other_columns_is_left_alone(report, tmp_path):
    path = tmp_path / "geometry.csv"
    tgp.CSVWriter(path).write(0, report)
    before = path.read_text()
    traced = tgp.measure(models.mlp(), torch.randn(7, 5), layers=["1"], estimator=tgp.Trace())
    with pytest.raises(tgp.ProbeError, match=r"no geometry log of such reports: its first line is \['step'"):
        tgp.CSVWriter(path).write(1, traced)
    assert path.read_text() == before


def test_whatever_an_estimator_found_is_in_the_logs(tmp_path):
    found = tgp.measure(models.mlp(), torch.randn(7, 5), layers=["1", "4"], estimator=tgp.Trace(probes=3))
    for writer in writers_of([tmp_path / "geometry.csv", tmp_path / "geometry.jsonl"]):
        writer.write(3, found)
    with (tmp_path / "geometry.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    layers = json.loads((tmp_path / "geometry.jsonl").read_text())["layers"]
    for name, layer in found.items():
        median = layer.trace.double().quantile(0.5).item()
        assert float(rows[name]["trace"]) == layers[name]["trace"] == median
        assert rows[name]["sigma_max"] == ""  # a trace says nothing of it
        assert layers[name]["sigma_max"] is None


@pytest.mark.parametrize(("name", "half"), [("a.csv", "10,1,0.25,0."), ("a.jsonl", '{"step": 10, "layers": {"1"')])
def test_a_killed_run_leaves_no_half_line(name, half, report, tmp_path):
    path = tmp_path / name
    for step in (0, 20):
        (writer,) = writers_of(path)
        writer.write(step, report)
        with path.open("a") as file:
            file.write(half)
    (writer,) = writers_of(path)
    writer.write(30, report)
    lines = path.read_text().splitlines()
    assert len({len(line.split(",")) for line in lines}) == 1
    steps = [0, 0, 20, 20, 30, 30] if name == "a.csv" else [0, 20, 30]
    assert [int(re.search(r"\d+", line)[0]) for line in lines if "layer," not in line] == steps
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", [tgp.CSVWriter, tgp.JSONWriter])
def test_a_number_cut_short_is_no_number(kind, report, tmp_path):
    path = tmp_path / "geometry"
    for step in (0, 10):
        kind(path).write(step, report)
    path.write_bytes(path.read_bytes()[:-5])  # by a kill, in the last number of the last line
    kind(path).write(20, report)
    text = path.read_text()
    kind(path).write(20, report)
    assert path.read_text() == text
    found = [line for line in text.splitlines() if re.search(r"\b10\b", line[:11])]
    assert len(found) == (1 if kind is tgp.CSVWriter else 0), "of two layers one is whole"


@pytest.mark.parametrize("kind", [tgp.CSVWriter, tgp.JSONWriter])
def test_after_a_full_disk_no_two_lines_are_one(kind, report, tmp_path, monkeypatch):
    path, lines = tmp_path / "geometry", kind._lines
    writer = kind(path)
    writer.write(0, report)

    def half(self, step, layers):
        text = lines(self, step, layers)
        with path.open("a") as file:
            file.write(text[: len(text) // 3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kind, "_lines", half)
    with pytest.raises(OSError, match="No space left"):
        writer.write(10, report)
    monkeypatch.setattr(kind, "_lines", lines)
    writer.write(20, report)
    kind(tmp_path / "quiet").write(20, report)
    last = (tmp_path / "quiet").read_text().splitlines()[-1]
    assert path.read_text().splitlines()[-1] == last
    assert len({len(line.split(",")) for line in path.read_text().splitlines()}) == 1


# What writer= may be


def test_a_path_becomes_a_writer_by_its_ending(tmp_path):
    pytest.importorskip("tensorboard")
    targets = [tmp_path / "a.csv", str(tmp_path / "b.jsonl"), tmp_path / "runs", str(tmp_path / "run.1")]
    made = writers_of(targets)
    assert [type(writer).__name__ for writer in made] == ["CSVWriter", "JSONWriter", *["TensorBoardWriter"] * 2]
    assert [made[0].path, made[1].path] == [tmp_path / "a.csv", tmp_path / "b.jsonl"]
    assert [made[2].log_dir, made[3].log_dir] == [str(tmp_path / "runs"), str(tmp_path / "run.1")]
    assert [writer.draws for writer in made] == [False, False, True, True]
    assert writers_of(None) == ()
    assert writers_of(tuple(made)) == made


def test_a_summary_writer_is_used_and_left_open(tmp_path):
    SummaryWriter = pytest.importorskip("torch.utils.tensorboard").SummaryWriter
    with SummaryWriter(str(tmp_path)) as events:
        (writer,) = writers_of(events)
        writer.close()
        events.add_scalar("loss", 0.5, 2)
        assert writer.log_dir == str(tmp_path)


@pytest.mark.parametrize("target", ["s3://bucket/run", Path("gs://bucket/run"), "https://host/runs/a.csv"])
def test_an_address_is_refused_with_its_scheme_and_the_way_out(target):
    scheme = str(target).split(":")[0]
    open_it = rf"writer=torch.utils.tensorboard.SummaryWriter\('{scheme}://\w"
    with pytest.raises(tgp.ProbeError, match=rf"the scheme '{scheme}'(.|\n)*{open_it}"):
        writers_of([target])


def test_a_file_that_no_writer_makes_is_no_folder(tmp_path):
    with pytest.raises(tgp.ProbeError, match=r"out.txt' names a file.*\n.*out.csv'(.|\n)*/out'"):
        writers_of(tmp_path / "out.txt")
    assert not list(tmp_path.iterdir())
    pytest.importorskip("tensorboard")
    (tmp_path / "resnet.log").mkdir()
    for folder in (tmp_path / "resnet.log", f"{tmp_path}/new.log/"):
        assert [type(writer).__name__ for writer in writers_of(folder)] == ["TensorBoardWriter"]


@pytest.mark.parametrize("target", [5, object(), tgp.CSVWriter, {"a": "b"}, [["runs/a"]]])
def test_anything_else_is_refused(target):
    with pytest.raises(tgp.ProbeError, match=r"a list of such; got (.|\n)*derives from tgp.Writer"):
        writers_of(target)


def test_without_tensorboard_a_directory_is_refused_with_the_pip_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(tgp.ProbeError, match=re.escape("pip install 'torchgeom_probe[tensorboard]'")):
        tgp.Monitor(models.mlp(), torch.randn(7, 5), writer=tmp_path / "runs")
    assert not list(tmp_path.iterdir())


def test_the_base_does_nothing_and_a_writer_overrides_what_it_likes(report):
    writer = tgp.Writer()
    writer.write(0, report)
    writer.write_scalar("loss", 0.5, 0)
    writer.write_map("plane", None, 0)
    writer.close()
    assert not writer.draws


def test_a_log_in_a_file_loads_no_integration(tmp_path):
    code = (
        "import sys, torch, torchgeom_probe as tgp\n"
        f"tgp.Monitor(torch.nn.Linear(4, 5), torch.randn(3, 4), layers=[''], writer={str(tmp_path / 'a.csv')!r})\n"
        "others = ('torchgeom_probe.integrations', 'tensorboard', 'matplotlib')\n"
        "found = [m for m in sys.modules if m.startswith(others)]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
