"""What TensorBoard's Geometry tab costs: the training that writes, the disk, the server, who waits for a picture."""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torchgeom_probe.integrations.tensorboard import TensorBoardWriter

from benchmarks.timing import Settings
from torchgeom_probe.report import GeometryReport, LayerGeometry

TITLE = "TensorBoard's Geometry tab"
NOTE = """\
A log of 12 layers × 64 samples × 16 singular values, 1000 probes. "write": one `TensorBoardWriter.write`. "index": the
walk through the files by a server that has just started; "again": after one more probe. By the wall, in a headless
Chromium: "first paint", server fresh or indexed; "click" until the samples are drawn. The smallest of three servers,
six pages, 27 clicks (their median in brackets). "server": peak memory above the same TensorBoard on an empty folder."""

METHOD = "CPU time of the process where it is ours, by the wall where somebody waits, the smallest"

LAYERS, SAMPLES, RANK = 12, 64, 16


def reports(generator: torch.Generator) -> Callable[[int], GeometryReport]:
    """Return step → a report of noise around curves that differ from layer to layer."""

    def layer(name: str, place: int, step: int) -> LayerGeometry:
        noise = torch.randn(SAMPLES, RANK, generator=generator)
        curve = math.sin(step / 3000 + place / 3) - torch.arange(RANK) / 8
        sigma = (0.3 * noise + curve).exp().sort(-1, descending=True).values
        value = sigma.log().sum(-1)
        return LayerGeometry(
            name=name,
            estimand="log √det VᵀgV, V a random orthonormal 16-frame",
            engine="fused",
            value=value,
            singular_values=sigma,
            num_features=512,
            num_inputs=3072,
            num_directions=RANK,
            normalized=True,
            quantity="frame_volume",
            rank=torch.full((SAMPLES,), RANK),
            log_pseudo_volume=value,
            extras={"scale": sigma.square().mean(-1).log() / 2, "effective_dimension": sigma.sum(-1)},
        )

    return lambda step: GeometryReport({f"blocks.{k}": layer(f"blocks.{k}", k, step) for k in range(LAYERS)})


def written(folder: Path, probes: int) -> tuple[float, float, TensorBoardWriter]:
    """Write a log; return the CPU seconds and the bytes of one probe."""
    made = reports(torch.Generator().manual_seed(0))
    writer, spent = TensorBoardWriter(folder), 0.0
    for step in range(probes):
        report = made(10 * step)
        began = time.process_time()
        writer.write(10 * step, report)
        spent += time.process_time() - began
    return spent / probes, sum(path.stat().st_size for path in folder.iterdir()) / probes, writer


def peak(process: Any) -> float:
    """The most MB that a process has had in memory so far."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))


class Seen:
    """A tab in a browser, and how long things take in it."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def paint(self, address: str) -> float:
        """Seconds until everything is drawn."""
        began = time.perf_counter()
        self.browser.get(f"{address}/data/plugin_entry.html?name=geometry")
        while not self.browser.execute_script("return document.body.dataset.drawn"):
            time.sleep(0.01)
        return time.perf_counter() - began

    def click(self, row: int, step: int) -> float:
        """Seconds from a click on a cell to the samples of its layer, as the page's own clock has them."""
        return self.browser.execute_async_script(
            "const [row, x, done] = arguments, began = performance.now();"
            "const before = document.body.dataset.drawn, plots = document.querySelectorAll('.js-plotly-plot');"
            "plots[0].emit('plotly_click', { points: [{ curveNumber: 0, x, y: row }] });"
            "const look = () => document.body.dataset.drawn === before ? setTimeout(look, 5)"
            "  : requestAnimationFrame(() => done((performance.now() - began) / 1000));"
            "look();",
            row,
            step,
        )


def seen(logs: Path, beside: Path, probes: int) -> list[str]:
    """First paint unread and indexed, a click, the server's memory: as a row has them."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from tensorboards import chromium, serving, why_no_browser  # what the tests look at the tab with

    if why_no_browser():
        return ["–"] * 4
    (beside / "nothing").mkdir()
    with serving(beside / "nothing", beside / "empty") as ask:
        ask("plugin/geometry/runs")
        base = peak(ask.process)
    unread, again, clicks, most = list[float](), list[float](), list[float](), 0.0
    for turn in range(3):
        with serving(logs, beside / f"full{turn}") as ask, chromium() as browser:
            tab = Seen(browser)
            unread.append(tab.paint(ask.address))
            again += [tab.paint(ask.address) for _ in range(2)]
            clicks += [tab.click(k, 10 * (probes // (k + 2))) for k in range(9)]
            most = max(most, peak(ask.process))
    clicks.sort()
    waited = [f"{min(unread):.1f}", f"{min(again):.1f}", f"{clicks[0]:.2f} ({clicks[13]:.2f})"]
    return [*waited, f"{most - base:.0f}"]


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    probes = 20 if settings.quick else 1000
    yield (
        "| probes | write [ms] | a probe on disk [kB] | the log [MB] | index [s] | again [s] | "
        "first paint, unread [s] | indexed [s] | click [s] | server [MB] |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        logs, beside = Path(folder, "logs"), Path(folder, "beside")
        beside.mkdir()
        spent, size, writer = written(logs / "run", probes)
        with contextlib.closing(writer):
            last = reports(torch.Generator())(10 * probes)
            walks = indexed(logs, lambda: writer.write(10 * probes, last))
        others = [f"{spent * 1e3:.1f}", f"{size / 1e3:.1f}", f"{size * probes / 1e6:.1f}", *walks]
        yield "| " + " | ".join([str(probes), *others, *seen(logs, beside, probes)]) + " |"


def indexed(logs: Path, more: Callable[[], None]) -> list[str]:
    """Seconds of the first walk through the files, and of the one after another probe."""
    from integrations.tensorboard_tab.reading import Index  # of this checkout, by the place that it lies in

    index, took = Index({str(logs): None}), []
    for before in (lambda: None, more):
        before()
        began = time.process_time()
        index.update()
        took.append(time.process_time() - began)
    return [f"{took[0]:.2f}", f"{took[1]:.3f}"]
