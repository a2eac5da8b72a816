"""``python -m benchmarks --gpu-check``: what only a GPU can tell, in nine minutes, what decides first.

Each step is a process of its own with a limit of its own, and writes a file of its own: a card that is lent for ten
minutes still tells something where one step hangs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.limit import made, stages
from torchgeom_probe import GeometryProbe, Subspace
from torchgeom_probe.jacobian import fused
from torchgeom_probe.linalg.gram import Factor
from torchgeom_probe.model.hooked import HookedModel
from torchgeom_probe.model.isolation import measuring

TITLE = "On a GPU"
NOTE = """\
Times over the limit's (a plain float32 forward pass without gradients over (1 + k)·B samples, TF32 off), by the wall.
"TF32" and "bf16" are that pass in these precisions.

- "pass": one dual pass, up to five stages. "measure": `GeometryProbe.measure(x)`. "graph": that pass captured once in a
  `torch.cuda.CUDAGraph`; beside it how far its log-volumes are from the eager ones (nats), and after every weight was
  multiplied by 1.01 (a replay has to follow the weights).
- "TF32 pass": with TF32 on, and its error (nats). "memory": peak over that of the limit. "error": `measure(x)` in
  float32 against float64 on the CPU (nats), on the card, then on the CPU."""
COLUMNS = (
    "model", "B, k", "limit [ms]", "TF32", "bf16", "pass", "measure", "graph", "graph: error", "follows weights",
    "TF32 pass", "TF32: error", "memory", "error: GPU", "error: CPU",
)  # fmt: skip
FAMILIES = (
    "resnet50",
    "vit_tiny_patch16_224",
    "mobilenetv3_small_100",
    "convnext_tiny",
    "resnet18",
    "densenet121",
    "swin_tiny_patch4_window7_224",
    "efficientnet_b0",
)
SHAPES = [(8, 2), (2, 16), (8, 16)]
QUICK = (("test_resnet",), [(2, 3)])
#: step → seconds at most; together they stay under nine minutes
STEPS = {"speed": 210, "tests": 100, "syncs": 40, "kernels": 40}


def check(out: Path, *, quick: bool = False) -> str:
    """Run every step, and return the section that benchmarks/README.md shows."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    summary = []
    for step, limit in STEPS.items():
        left = sum(STEPS.values()) - (time.monotonic() - start)
        begun = time.monotonic()
        with (out / f"{step}.txt").open("w", encoding="utf-8") as file:
            command = [sys.executable, "-m", "benchmarks.gpu", step, *(["--quick"] if quick else [])]
            try:
                ended = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, timeout=min(limit, left)
                ).returncode
            except subprocess.TimeoutExpired:
                ended = "its limit"
        summary.append(f"{step}: ended with {ended} after {time.monotonic() - begun:.0f} s")
        print(summary[-1], flush=True)
    table = [line for line in (out / "speed.txt").read_text().splitlines() if line.startswith("|")]
    lines = [f"## {TITLE}", "", NOTE, "", circumstances(), "", *table]
    for step in ("tests", "syncs"):
        lines += ["", f"{step}:", "", "```", *_last(out / f"{step}.txt", 30), "```"]
    section = "\n".join(lines)
    (out / "section.md").write_text(section + "\n", encoding="utf-8")
    (out / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")
    return section


def _last(file: Path, count: int) -> list[str]:
    return [line[:180] for line in file.read_text(errors="replace").splitlines() if line.strip()][-count:]


def circumstances() -> str:
    """Card and versions."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__}; no GPU"
    cudnn = torch.backends.cudnn.version()
    return (
        f"torch {torch.__version__}, cuDNN {cudnn}; {torch.cuda.get_device_name()}; by the wall, smallest of 12 turns."
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], turns: int = 12) -> float:
    """The smallest wall time of a run, the device's work included."""
    for _ in range(3):
        run()
    best = float("inf")
    for _ in range(turns):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """TF32 in matrix products and convolutions, for the body."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _pass(hooked: HookedModel, x: Tensor, v: Tensor) -> dict[str, Factor]:
    found: dict[str, Factor] = {}
    fused.push(
        hooked, hooked.inputs(x), v, lambda entry, blocks: found.__setitem__(entry, Factor.of(blocks)), any_order=True
    )
    return found


def _volumes(factors: dict[str, Factor]) -> dict[str, Tensor]:
    return {entry: factor.singular_values().log().sum(-1) for entry, factor in factors.items()}


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[e].cpu() - other[e].cpu()).abs().max().item() for e in other)


def _inputs(name: str, batch: int, k: int) -> tuple[nn.Module, HookedModel, Tensor, Tensor]:
    model, size = made(name, _device())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator).to(_device())
    v = torch.randn(k, *x.shape, generator=generator).to(_device()) / x[0].numel() ** 0.5
    modules = dict(model.named_modules())
    return model, HookedModel(model, {layer: modules[layer] for layer in stages(model)}), x, v


def speed(quick: bool) -> Iterator[str]:
    """The table, a row at a time."""
    families, shapes = QUICK if quick else (FAMILIES, SHAPES)
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + "---|" * len(COLUMNS)
    for name in families:
        for batch, k in shapes:
            try:
                yield f"| {name} | {batch}, {k} | {' | '.join(_row(name, batch, k))} |"
            except Exception as error:  # the other rows are still worth having
                yield f"{name} {batch}, {k} failed: {type(error).__name__}: {str(error)[:300]}"


def _row(name: str, batch: int, k: int) -> list[str]:
    model, hooked, x, v = _inputs(name, batch, k)
    rows = torch.cat([x[None], v]).flatten(0, 1)

    def plain(model: nn.Module, rows: Tensor) -> None:
        with torch.no_grad():
            model(rows)

    def peak(run: Callable[[], Any]) -> int:
        if not torch.cuda.is_available():
            return 1
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    with tf32(False):
        limit, limit_bytes = milliseconds(lambda: plain(model, rows)), peak(lambda: plain(model, rows))
    with tf32(True):
        in_tf32 = milliseconds(lambda: plain(model, rows)) / limit
    narrow = functools.partial(plain, copy.deepcopy(model).bfloat16(), rows.bfloat16())
    in_bf16 = milliseconds(narrow) / limit
    del narrow
    with measuring(model):
        expected = _volumes(_pass(hooked, x, v))
        pass_bytes = peak(lambda: _pass(hooked, x, v))
        eager = milliseconds(lambda: _pass(hooked, x, v)) / limit
        with tf32(True):
            error_tf32 = _apart(_volumes(_pass(hooked, x, v)), expected)
            pass_tf32 = milliseconds(lambda: _pass(hooked, x, v)) / limit
        graph = _graph(hooked, x, v, expected, limit) if torch.cuda.is_available() else ["–"] * 3
    probe = GeometryProbe(model, layers=stages(model), estimator=Subspace(k))
    whole = milliseconds(lambda: probe.measure(x, progress=False)) / limit
    errors = ["", ""]
    if (batch, k) == (8, 2):
        errors = _errors(model, x[:2], k)
    return [
        f"{limit:.2f}", f"{in_tf32:.2f}", f"{in_bf16:.2f}", f"{eager:.2f}", f"{whole:.2f}", *graph, f"{pass_tf32:.2f}",
        f"{error_tf32:.0e}", f"{pass_bytes / max(limit_bytes, 1):.2f}", *errors,
    ]  # fmt: skip


def _graph(hooked: HookedModel, x: Tensor, v: Tensor, expected: dict[str, Tensor], limit: float) -> list[str]:
    """The eager pass in a CUDA graph: its time over the limit's, its error, and whether it follows the weights."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                _pass(hooked, x, v)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static = _pass(hooked, x, v)
        graph.replay()
        error = _apart(_volumes(static), expected)
        ratio = milliseconds(graph.replay) / limit
        with torch.no_grad():
            for parameter in hooked.model.parameters():
                parameter.data.mul_(1.01)  # no version of it changes: the measurement around would object
        graph.replay()
        follows = _apart(_volumes(static), _volumes(_pass(hooked, x, v)))
        with torch.no_grad():
            for parameter in hooked.model.parameters():
                parameter.data.div_(1.01)
        return [f"{ratio:.2f}", f"{error:.0e}", f"{follows:.0e}"]
    except Exception as failure:
        print(f"graph failed: {type(failure).__name__}: {str(failure)[:300]}", flush=True)
        return ["failed", "–", "–"]


def _errors(model: nn.Module, x: Tensor, k: int) -> list[str]:
    """Log-volumes in float32, here and on the CPU, against float64 on the CPU."""
    layers = stages(model)

    def volumes(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        report = GeometryProbe(model, layers=layers, estimator=Subspace(k)).measure(x, progress=False)
        return {layer: report[layer].value for layer in layers}

    cpu = copy.deepcopy(model).cpu()
    here, narrow = volumes(model, x), volumes(cpu, x.cpu())
    exact = volumes(cpu.double(), x.cpu().double())
    return [f"{_apart(here, exact):.0e}", f"{_apart(narrow, exact):.0e}"]


def tests(quick: bool) -> Iterator[str]:
    """``pytest -m cuda``, in a process of its own."""
    arguments = ["-m", "pytest", "-n", "0", "-m", "cuda", "-p", "no:cacheprovider", "-q", "tests"]
    ended = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    yield from ended.stdout.splitlines()
    yield from ended.stderr.splitlines()[-5:]


def syncs(quick: bool) -> Iterator[str]:
    """Whether the pass waits for the device: torch's own detector."""
    for name in QUICK[0] if quick else FAMILIES:
        model, hooked, x, v = _inputs(name, 2, 4)
        with measuring(model):
            _pass(hooked, x, v)
            try:
                if torch.cuda.is_available():
                    torch.cuda.set_sync_debug_mode("error")
                _pass(hooked, x, v)
                yield f"{name}: no synchronisation in the pass"
            except Exception as error:
                yield f"{name}: waits for the device: {str(error)[:200]}"
            finally:
                if torch.cuda.is_available():
                    torch.cuda.set_sync_debug_mode("default")


def kernels(quick: bool) -> Iterator[str]:
    """Where a pass spends the device's time, and how long the host needs to launch it."""
    from torch.profiler import ProfilerActivity, profile

    for name in QUICK[0] if quick else ("resnet50", "vit_tiny_patch16_224", "mobilenetv3_small_100"):
        model, hooked, x, v = _inputs(name, 8, 4)
        with measuring(model):
            for _ in range(3):
                _pass(hooked, x, v)
            on = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            with profile(activities=on) as seen:
                _pass(hooked, x, v)
                _wait()
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        yield name
        yield seen.key_averages().table(sort_by=by, row_limit=14, max_name_column_width=60)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for line in globals()[sys.argv[1]]("--quick" in sys.argv):
        print(line, flush=True)
