"""The Geometry tab without a browser: its index over event files of every kind, and what its routes answer."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
import zlib
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboards import ROOT, TAB, entry_point, serving
from torchgeom_probe.integrations.tensorboard import TensorBoardWriter

import torchgeom_probe as tgp
from torchgeom_probe.report import GeometryReport, LayerGeometry

pytest.importorskip("tensorboard")
from tensorboard.compat.proto import event_pb2
from tensorboard.plugins import base_plugin
from torchgeom_tab import reading
from torchgeom_tab.plugin import GeometryPlugin
from torchgeom_tab.reading import Index
from werkzeug.test import Client


def report(step, *, layers=("a", "b"), size=5):
    value = torch.arange(float(size), dtype=torch.float64) + step
    made = {"estimand": "log √det g", "engine": "fused", "num_features": 3, "num_inputs": 2, "num_directions": 2}
    sigma = torch.ones(size, 2, dtype=torch.float64)
    return GeometryReport(
        {
            name: LayerGeometry(name, value=value * 2**i, singular_values=sigma, normalized=True, **made)
            for i, name in enumerate(layers)
        }
    )


def log(folder, steps, **options):
    with closing(TensorBoardWriter(folder, histograms=False, **options)) as writer:
        for step in steps:
            writer.write(step, report(step))
    (path,) = sorted(folder.glob("events*"), key=os.path.getmtime)[-1:]
    return path


def index_of(folder):
    index = Index({str(folder): None})
    index.update()
    return index


class Tab:
    """A plugin over a folder, and its routes without a server."""

    def __init__(self, folder, **context):
        self.plugin = GeometryPlugin(base_plugin.TBContext(logdir=str(folder), **context))
        self.apps = self.plugin.get_plugin_apps()

    def __call__(self, route, **query):
        answer = Client(self.apps[f"/{route}"]).get("/", query_string=query)
        return answer.status_code, json.loads(answer.data, parse_constant=pytest.fail)

    def read(self):
        for _ in range(100):
            status, found = self("runs")
            assert status == 200
            if not found["reading"]:
                return {run["name"]: run for run in found["runs"]}
        raise AssertionError("still reading")


def test_runs_have_tensorboards_own_names(tmp_path):
    log(tmp_path, [0])
    log(tmp_path / "sweep" / "lr=0.1", [0])
    (tmp_path / "elsewhere").mkdir()
    assert set(Tab(tmp_path).read()) == {".", "sweep/lr=0.1"}
    flags = SimpleNamespace(logdir="", logdir_spec=f"mine:{tmp_path / 'sweep'},{tmp_path / 'sweep'}")
    assert set(Tab("", flags=flags).read()) == {"lr=0.1"}  # as TensorBoard: the later name of one path holds
    flags = SimpleNamespace(logdir="", logdir_spec=f"mine:{tmp_path / 'sweep'}")
    assert set(Tab("", flags=flags).read()) == {"mine/lr=0.1"}


def test_a_live_runs_new_probes_come_without_reading_again_what_was_read(tmp_path, monkeypatch):
    taken = []
    read_bytes = reading._bytes
    monkeypatch.setattr(reading, "_bytes", lambda *place: taken.append(place) or read_bytes(*place))
    with closing(TensorBoardWriter(tmp_path)) as writer:
        for step in range(8):
            writer.write(step, report(step))
        index = index_of(tmp_path)
        assert index.runs["."].steps("probe") == list(range(8))
        (path,) = tmp_path.iterdir()
        before = path.stat().st_size
        taken.clear()
        index.update()
        assert not taken
        writer.write(8, report(8))
        index.update()
        assert index.runs["."].steps("probe") == list(range(9))
        assert min(start for _, start, _ in taken) == before
        assert sum(size for *_, size in taken) == path.stat().st_size - before


def test_values_are_read_where_they_lie_and_remembered(tmp_path, monkeypatch):
    path = log(tmp_path, range(6))
    index = index_of(tmp_path)
    kept = index.runs["."].records["probe", ""]
    for step in (4, 0, 5):
        np.testing.assert_array_equal(index.unpacked(kept[step], "value")["value"][1], 2 * (np.arange(5.0) + step))
    path.unlink()
    assert index.unpacked(kept[4], "value")["value"][0, 0] == 4
    monkeypatch.setattr(reading, "CACHE", 100)
    log(tmp_path, range(6))
    index = index_of(tmp_path)
    for one in index.runs["."].records["probe", ""].values():
        index.unpacked(one, "value", "sigma")
        assert sum(array.nbytes for array in index._cache.values()) == index._cached <= 100


def test_the_index_of_a_long_run_is_bounded_and_keeps_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MOST", 16)
    log(tmp_path, range(100))
    steps = index_of(tmp_path).runs["."].steps("probe")
    assert len(steps) <= 16
    assert (steps[0], steps[-1]) == (0, 99)


def test_a_resumed_run_hides_what_it_writes_anew(tmp_path):
    log(tmp_path, [0, 10, 20, 30])
    log(tmp_path, [20, 40])
    index = index_of(tmp_path)
    assert index.runs["."].steps("probe") == [0, 10, 20, 40]


def test_a_run_that_was_deleted_or_begun_anew_is_read_anew(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    path = log(first, [0, 1, 2])
    log(second, [5])
    index = index_of(tmp_path)
    path.unlink()
    for old in second.iterdir():
        old.unlink()
    log(second, [7])
    index.update()
    assert list(index.runs) == ["second"]
    assert index.runs["second"].steps("probe") == [7]


def test_a_file_cut_short_anywhere_shows_what_is_whole_and_goes_on_when_it_has_grown(tmp_path):
    path = log(tmp_path / "whole", range(3))
    data = path.read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    file = cut / path.name
    ends = []
    for size in sorted({*range(0, len(data), 97), *range(len(data) - 40, len(data) + 1)}):
        file.write_bytes(data[:size])
        index = index_of(cut)
        steps = index.runs["."].steps("probe") if index.runs else []
        assert steps == list(range(len(steps)))
        ends.append(len(steps))
        file.write_bytes(data)
        index.update()
        assert index.runs["."].steps("probe") == [0, 1, 2]
    assert ends == sorted(ends)
    assert {0, 1, 2, 3} == set(ends)


def test_empty_foreign_and_damaged_files_harm_nothing(tmp_path):
    good = log(tmp_path / "good", range(3)).read_bytes()
    files = {
        "empty": b"",
        "text": b"this is no event file, whatever its name says\n" * 50,
        "zeros": bytes(4096),
        "huge record": (1 << 62).to_bytes(8, "little") + bytes(100),
        "no event": (20).to_bytes(8, "little") + bytes(4) + b"\x0a\x08geometry" + b"\xff" * 10 + bytes(4),
        "damaged": bytes(b ^ (i % 701 == 700) for i, b in enumerate(good)),
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.out.tfevents.1.host").write_bytes(data)
    (tmp_path / "good" / "notes.txt").write_text("not read")
    framed = b""
    for strings in ([b"not compressed"], [], [b"[]"], [b'{"arrays": 3, "tag": ""}'], [b'{"arrays": {}, "tag": ""}']):
        foreign = event_pb2.Event(step=3)
        value = foreign.summary.value.add(tag="geometry/probe")
        value.metadata.plugin_data.plugin_name, value.metadata.plugin_data.content = "geometry", b"probe"
        value.tensor.string_val.extend(s if b" " in s[:5] else zlib.compress(s) for s in strings)
        record = foreign.SerializeToString()
        framed += len(record).to_bytes(8, "little") + bytes(4) + record + bytes(4)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "events.out.tfevents.1.host").write_bytes(framed + good)
    asked = Tab(tmp_path)
    runs = asked.read()
    assert runs["good"]["probes"] == runs["foreign"]["probes"] == 3
    assert set(runs) <= {"good", "damaged", "foreign"}
    for run in runs:
        for route, query in (("depth", {}), ("layer", {"layer": "a", "step": 0}), ("samples", {})):
            status, _ = asked(route, run=run, **query)
            assert status in ((200,) if run == "good" else (200, 404))


def test_a_value_that_rots_under_the_index_is_an_answer_not_a_crash(tmp_path):
    path = log(tmp_path, [0])
    asked = Tab(tmp_path)
    asked.read()
    kept = asked.plugin._index.runs["."].records["probe", ""][0]
    data = bytearray(path.read_bytes())
    data[kept.place.start : kept.place.start + kept.place.size] = b"\xff" * kept.place.size
    path.write_bytes(data)
    status, answer = asked("layer", run=".", layer="a", step=0)
    assert status == 404
    assert "error" in answer
    path.unlink()
    assert asked("layer", run=".", layer="a", step=0)[0] == 404


def test_any_file_system_that_tensorboard_reads(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    path = log(tmp_path, range(4))
    memory = fsspec.filesystem("memory")
    memory.makedirs("/logs/run", exist_ok=True)
    memory.pipe(f"/logs/run/{path.name}", path.read_bytes()[:-30])
    try:
        index = Index({"memory://logs": None})
        index.update()
        (run,) = index.runs.values()
        assert run.steps("probe") == [0, 1, 2, 3][: len(run.steps("probe"))]
        memory.pipe(f"/logs/run/{path.name}", path.read_bytes())
        index.update()
        assert list(index.runs) == ["run"]
        kept = index.runs["run"].records["probe", ""]
        assert sorted(kept) == [0, 1, 2, 3]
        assert index.unpacked(kept[3], "value")["value"][0].tolist() == [3, 4, 5, 6, 7]
    finally:
        memory.rm("/logs", recursive=True)


def old_log(folder):
    """What was written before there was a tab."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as events:
        events.add_text("geometry/conventions", "| tag |", 0)
        for step in (0, 5):
            events.add_scalar("loss", 1.0, step)
            for place, name in enumerate(("00_stem", "01_head")):
                events.add_scalar(f"logvol/{name}", step + place, step)
                events.add_scalar(f"logvol_band/{name}/p10", 0.0, step)
                events.add_scalar(f"rank/{name}", 3.0, step)
            events.add_scalar("geometry/failures", 0.0, step)


def test_an_old_log_shows_the_numbers_that_it_has(tmp_path):
    old_log(tmp_path / "old")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "other")) as events:
        events.add_scalar("acc/00_train", 1.0, 0)
    asked = Tab(tmp_path)
    runs = asked.read()
    assert list(runs) == ["old"]
    assert runs["old"]["old"]
    _, found = asked("depth", run="old", number="median")
    assert found["numbers"] == ["logvol", "rank"]
    assert found["values"] == [[0, 5], [1, 6]]
    assert [layer["name"] for layer in found["layers"]] == ["00_stem", "01_head"]
    _, found = asked("depth", run="old", number="rank")
    assert found["values"] == [[3, 3], [3, 3]]
    assert asked("depth", run="old", number="sigma_max")[1]["values"] == []
    assert asked("layer", run="old", layer="00_stem", step=0)[0] == 404


def test_depth_follows_layers_that_come_later(tmp_path):
    with closing(TensorBoardWriter(tmp_path)) as writer:
        writer.write(0, report(0, layers=("a",)))
        writer.write(1, report(1, layers=("b", "a"), size=3))
    asked = Tab(tmp_path)
    asked.read()
    _, found = asked("depth", run=".", number="median")
    assert [layer["name"] for layer in found["layers"]] == ["a", "b"]
    assert found["values"] == [[2, 4], [None, 2]]
    _, found = asked("layer", run=".", layer="a", step=1)
    assert found["steps"] == [0, 1]
    assert found["value"] == [[0, 1, 2, 3, 4], [2, 4, 6, None, None]]
    _, found = asked("depth", run=".", number="no such number")
    assert found["values"] == [[None, None], [None, None]]


def test_a_long_trajectory_is_thinned_and_keeps_the_step_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("torchgeom_tab.plugin._POINTS", 10)
    log(tmp_path, range(95))
    asked = Tab(tmp_path)
    asked.read()
    _, found = asked("layer", run=".", layer="b", step=33)
    assert found["step"] == 33
    assert found["steps"] == [*range(0, 33, 10), 33, *range(40, 95, 10), 94]
    assert [row[0] for row in found["value"]] == [2 * step for step in found["steps"]]


def test_a_first_read_says_how_far_it_is(tmp_path, monkeypatch):
    path = log(tmp_path, range(6))
    chunks, goes_on, size = reading._chunks, threading.Event(), path.stat().st_size

    def slow(*place):
        yield from chunks(*place)
        assert goes_on.wait(60)

    monkeypatch.setattr(reading, "_chunks", slow)
    monkeypatch.setattr("torchgeom_tab.plugin._PATIENCE", 0.05)
    asked = Tab(tmp_path)
    while not (found := asked("runs")[1])["read"]:
        time.sleep(0.01)
    assert found["reading"]
    assert (found["read"], found["total"]) == (size, size)
    assert found["runs"][0]["probes"] == 6  # what is read is there to be looked at
    walk = asked.plugin._walk
    asked("runs")
    assert asked.plugin._walk is walk  # one walk at a time
    goes_on.set()
    assert asked.read()["."]["probes"] == 6


def test_numbers_keep_seven_digits_at_any_size():
    plain = importlib.import_module("torchgeom_tab.plugin")._plain
    values = np.array([1.23456789e-30, -9.87654321e20, 0.0, 0.1, np.inf, np.nan, -300.25], "f8")
    assert plain(values) == [pytest.approx(1.234568e-30), pytest.approx(-9.876543e20), 0, 0.1, None, None, -300.25]


@pytest.mark.parametrize("route", ["depth", "layer", "samples", "map", "profile"])
@pytest.mark.parametrize("run", ["../../etc", "/etc/passwd", "", "\0", "nobody"])
def test_no_route_takes_a_run_for_a_path(tmp_path, route, run):
    log(tmp_path / "logs" / "run", [0])
    log(tmp_path / "secret", [0])
    asked = Tab(tmp_path / "logs")
    asked.read()
    assert asked(route, run=run, layer="a", step=0, tag="../secret")[0] == 404
    assert asked(route, run="../secret", layer="a", step="0")[0] == 404
    assert asked(route, run="run", layer="../a", tag="/etc/passwd", step="1e9; drop")[0] in (200, 404)


def test_the_files_are_those_of_one_table(tmp_path):
    asked = Tab(tmp_path)
    modules = sorted(path.name for path in TAB.glob("*.js"))
    assert [f"/{name}" for name in modules] == sorted(r for r in asked.apps if r.endswith(".js") and "plotly" not in r)
    for name in modules:
        answer = Client(asked.apps[f"/{name}"]).get("/../plugin.py")
        assert answer.data == (TAB / name).read_bytes()
        text = answer.data.decode()
        assert "innerHTML" not in text
        assert "https://" not in text
        assert max(map(len, text.splitlines())) <= 120


def test_without_plotly_the_tab_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    asked = Tab(tmp_path)
    assert asked("runs")[1]["plotly"] is False
    assert Client(asked.apps["/plotly.min.js"]).get("/").status_code == 404


def test_a_server_does_not_load_torch():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import tensorboards\n"
        "import torchgeom_tab.plugin\n"
        "assert not {'torch', 'torchgeom_probe', 'plotly'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pyproject_names_the_plugin_and_what_it_serves():
    module, _, name = entry_point().partition(":")
    assert getattr(importlib.import_module(module), name) is GeometryPlugin
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'torchgeom_tab = ["*.js", "*.css"]' in text


def test_the_tab_is_active_where_an_old_log_is_and_only_there(tmp_path):
    old_log(tmp_path / "logs" / "old")
    with serving(tmp_path / "logs", tmp_path / "beside") as ask:
        deadline = time.monotonic() + 60
        while not ask("plugins_listing")["geometry"]["enabled"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    for told in ({}, {"run": {}}):
        provider = SimpleNamespace(list_tensors=lambda *_, found=told, **__: found)
        assert not Tab(tmp_path, data_provider=provider).plugin.is_active()


def test_a_map_is_answered_with_one_range_for_all_steps(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    x, values = torch.randn(3, 2), []
    with closing(TensorBoardWriter(tmp_path)) as writer:
        for step in range(3):
            scan = tgp.scan(model, tgp.Plane(*x, steps=4), layers=["1"], progress=False)
            writer.write_map("p", scan, step)
            values.append(scan.value["1"])
            torch.nn.init.normal_(model[0].weight)
    asked = Tab(tmp_path)
    assert asked.read()["."]["map"] == {"p": [0, 1, 2]}
    _, found = asked("map", run=".", tag="p", step=1)
    every = torch.stack(values)
    assert found["range"][0] == pytest.approx([every.min().item(), every.max().item()])
    np.testing.assert_allclose(found["value"][0], values[1], rtol=1e-5)
    assert asked("map", run=".", tag="p", step=7)[0] == 404
