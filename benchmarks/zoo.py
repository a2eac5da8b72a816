"""``python -m benchmarks --zoo FOLDER``: models of other libraries, measured, checked against differences, timed.

A process a library, which a watchdog ends where a model takes too long; what is known of a model is a line of
``rows.jsonl`` at once, so that ``--resume`` goes on.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import faulthandler
import fnmatch
import importlib.metadata
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.timing import Settings, circumstances, smallest
from benchmarks.zoo_models import LIBRARIES, Animal
from torchgeom_probe import GeometryProbe, ProbeError, Subspace
from torchgeom_probe.errors import first_line

TITLE = "The zoo"
NOTE = """\
Models of other libraries, small configurations, random weights and statistics. Two samples, two directions,
`layers="auto"` and the output; token models from their embedding.

- "error": singular values of `measure(x)` against this script's own central differences in float64, relative to the
  largest; the worst sample and layer. Above 1e-5 it is wrong, unless below 1e-2 where `torch.func.jvp` agrees to 1e-9.
- "check": whether `check(x)` says OK, in float32. "time": `measure(x)` over a plain pass of as many rows; of
  miniatures, so mostly Python."""
SAMPLES = DIRECTIONS = TURNS = 2
#: Of the size of the input: too long a step crosses kinks, too short a one rounds.
STEPS = (1e-5, 1e-7, 1e-8)
#: From here on an error is called wrong; and where differences had to be made in float32.
WRONG, WRONG_NARROW = 1e-5, 1e-2
#: Kinks and curvature make differences wrong by less than the first; torch.func.jvp is then as near as the second.
KINKED, AGREES = 1e-2, 1e-9
WIDE = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64)
#: Seconds that a model may take in all.
LIMIT = 600


def run(folder: Path, *, only: str, resume: bool, quick: bool = False) -> str:
    """Visit every library, and return the section that benchmarks/README.md shows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    if not resume:
        rows.write_text("", encoding="utf-8")
    for library in LIBRARIES:
        command = [sys.executable, "-m", "benchmarks.zoo", library, str(rows), only, *(["quick"] if quick else [])]
        while subprocess.run(command).returncode:
            # The model that was at work is the last line of `current`; it is not tried again.
            current = (folder / "current").read_text(encoding="utf-8")
            if current in _known(rows):
                print(f"{library} cannot be visited", flush=True)
                break
            _keep(rows, {"library": library, "model": current.partition(" ")[2], "died": "crashed or took too long"})
    return section(list(_known(rows).values()))


def visit(library: str, rows: Path, only: str, quick: bool) -> None:
    """Measure the animals of one library that have no row yet."""
    try:
        animals = list(LIBRARIES[library]())
    except ImportError as error:
        print(f"{library}: {error}", flush=True)
        return
    known = _known(rows)
    for animal in animals[:1] if quick else animals:
        name = f"{library} {animal.name}"
        if name in known or not fnmatch.fnmatch(name, only):
            continue
        (rows.parent / "current").write_text(name, encoding="utf-8")
        # By the wall: a limit on the processor's seconds would have the clock of the process tick in hundredths.
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = {"library": library, "model": animal.name, "of": len(animals), **judged(animal)}
        _keep(rows, found)
        print(said(found), flush=True)


def _known(rows: Path) -> dict[str, dict[str, Any]]:
    lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
    found = [json.loads(line) for line in lines]
    return {f"{row['library']} {row['model']}": row for row in found}


def _keep(rows: Path, row: Mapping[str, Any]) -> None:
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def judged(animal: Animal) -> dict[str, Any]:
    """All that is told of one animal."""
    start = time.monotonic()
    torch.manual_seed(0)
    row: dict[str, Any] = {}
    try:
        model = animal.make().float().eval()
        x = animal.x()
        enliven(model, x)
        with torch.no_grad():
            _call(model, x)  # some take their first batch for an initialisation
    except Exception as error:
        return {"own": first_line(error)}
    try:
        row |= _measured(animal, model, x)
    except ProbeError as error:
        row |= {"refusal": str(error)}
    except Exception as error:
        row |= {"raised": first_line(error)}
    return {**row, "seconds": round(time.monotonic() - start, 1)}


def _measured(animal: Animal, model: nn.Module, x: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"layers": ["auto", ""], "estimator": Subspace(DIRECTIONS), "normalize": False}
    options |= {"source": animal.source, "wrt": animal.wrt}
    options["transform"] = animal.transform and {"": animal.transform}
    row: dict[str, Any] = {}
    row["error"], row["worst"], row["narrow"], row["apart"] = _error(animal, model, x, options)
    with GeometryProbe(model, **options) as probe:
        torch.manual_seed(1)
        report = probe.measure(x)
        row |= {"engine": next(iter(report.values())).engine, "left_out": dict(report.left_out)}
        torch.manual_seed(1)
        found = probe.check(x)
        row |= {"check": found.ok, "fallback": found.fallback, "said": "" if found.ok else str(found)}
        row["time"] = _over_plain(probe, model, x)
    if row["engine"] != "fused":
        try:
            GeometryProbe(model, **options, engine="fused").measure(x)
        except ProbeError as error:
            row["lost"] = first_line(error)
    return row


class _Wide(TorchFunctionMode):
    """Keeps in float64 what a model takes to a narrower type inside, or differences would see its rounding alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = {torch.Tensor.float: torch.Tensor.double, torch.Tensor.half: torch.Tensor.double}.get(func, func)
        args, kwargs = tree_map_only(torch.dtype, lambda d: WIDE.get(d, d), (args, kwargs or {}))
        return func(*args, **kwargs)


def _error(
    animal: Animal, model: nn.Module, x: Any, options: Mapping[str, Any]
) -> tuple[float, str, bool, float | None]:
    """The error of ``measure`` in float64, its layer, whether the model runs in float32 alone, how far jvp is."""
    wide, wide_x = copy.deepcopy(model).double(), _to(torch.float64, x)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        stack.enter_context(_Wide())
        try:
            point = _features(wide, [], wide_x, animal)[1]
        except Exception:  # a kernel of float32 alone
            stack.close()
            wide, wide_x = model, x
            point = _features(wide, [], wide_x, animal)[1]
        torch.manual_seed(1)
        v = torch.randn(DIRECTIONS, *point.shape, dtype=point.dtype)
        torch.manual_seed(1)  # torch's own generator: what a model draws is the same in every pass
        report = GeometryProbe(wide, **options).measure(wide_x, directions=v)
        values = {layer: report[layer].singular_values for layer in report}
        error, worst = difference_error(wide, wide_x, v, values, animal)
        apart = None
        if WRONG < error < KINKED:
            torch.manual_seed(1)
            with contextlib.suppress(ProbeError):
                jvp = GeometryProbe(
                    wide, **{**options, "layers": list({e.partition("#")[0]: 0 for e in report})}, engine="functorch"
                )
                other = jvp.measure(wide_x, directions=v)
                apart = max(
                    float(((values[e] - other[e].singular_values) / values[e][:, :1]).abs().max()) for e in values
                )
        return error, worst, wide is model, apart


def enliven(model: nn.Module, x: Any, seed: int = 0) -> None:
    """Give constant parameters noise, and batch normalisations statistics that a trained model could have."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() and parameter.min() == parameter.max():
                size = 0.2 if parameter.ndim < 2 or parameter.numel() < 5000 else 0.02
                parameter.add_(torch.randn(parameter.shape, generator=noise).to(parameter.dtype) * size)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the passes
        for _ in range(3 if norms else 0):
            _call(model, tree_map_only(Tensor, lambda t: t + torch.randn_like(t) if t.is_floating_point() else t, x))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
            if norm.running_var is not None:
                norm.running_var.clamp_min_(1e-3)


def difference_error(
    model: nn.Module, x: Any, v: Tensor, values: Mapping[str, Tensor], animal: Animal
) -> tuple[float, str]:
    """How far singular values [B, k] of JV are from those of central differences along v [k, B, …]; and where."""
    layers = list(dict.fromkeys(entry.split("#")[0] for entry in values))
    base, point = _features(model, layers, x, animal)
    best = dict.fromkeys(values, float("inf"))
    for step in STEPS:
        h = step * float(point.norm() / v[0].norm() if point.any() else 1 / v[0].norm())
        columns: dict[str, list[Tensor]] = {entry: [] for entry in values}
        for direction in v:
            ahead, behind = (_features(model, layers, x, animal, point + s * h * direction)[0] for s in (1, -1))
            for entry in values:
                columns[entry].append((ahead[entry] - behind[entry]) / (2 * h))
        for entry, found in values.items():
            expected = torch.linalg.svdvals(torch.stack(columns[entry], dim=2))
            # What is smaller than this beside the features themselves is zero, as far as float64 can tell.
            least = 1e-12 * base[entry].norm(dim=1, keepdim=True) * step / h
            apart = (found - expected).abs() / torch.maximum(expected[:, :1], least)
            best[entry] = min(best[entry], float(apart.nan_to_num(nan=0.0 if not found.any() else torch.inf).max()))
    worst = max(best, key=best.__getitem__)
    return best[worst], worst


def _features(
    model: nn.Module, layers: list[str], x: Any, animal: Animal, point: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Layers' features [B, n] of a plain pass, and where it was made; ``point``: in place of the input's own."""
    found: dict[str, Tensor] = {}
    seen: list[Tensor] = []
    modules = dict(model.named_modules())

    def at(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().clone())
        return output if point is None else point.clone()

    def after(layer: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if layer == "" and animal.transform is not None:
                output = animal.transform(output)
            if isinstance(module, nn.RNNBase):
                output = output[0] if module.batch_first else output[0].transpose(0, 1)
            tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
            real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
            count = sum(entry.partition("#")[0] == layer for entry in found)
            found[f"{layer}#{count}" if count else layer] = torch.cat(
                [t.detach().reshape(len(t), -1) for t in real if t.is_floating_point()], dim=1
            )

        return hook

    given = animal.place(x) if animal.source is None else None
    if given is not None:
        seen.append(given)
        swapped = given if point is None else point
        x = tree_map_only(Tensor, lambda t: swapped if t is given else t, x)
    handles = [] if animal.source is None else [modules[animal.source].register_forward_hook(at)]
    handles += [modules[layer].register_forward_hook(after(layer)) for layer in layers]
    torch.manual_seed(1)
    try:
        with torch.no_grad():
            _call(model, tree_map_only(Tensor, Tensor.clone, x))
    finally:
        for handle in handles:
            handle.remove()
    return found, seen[0]


def _over_plain(probe: GeometryProbe, model: nn.Module, x: Any) -> float | None:
    rows = 1 + DIRECTIONS
    many = tree_map_only(Tensor, lambda t: torch.cat([t] * rows) if t.ndim and len(t) == SAMPLES else t, x)

    def plain() -> None:
        with torch.no_grad():
            _call(model, many)

    try:
        plain()
    except Exception:  # a model of one number of samples
        return None
    runs = {"plain": plain, "measure": lambda: probe.measure(x)}
    times = smallest(runs, torch.device("cpu"), TURNS)
    return round(times["measure"] / times["plain"], 2)


def _call(model: nn.Module, x: Any) -> Any:
    return model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)


def _to(dtype: torch.dtype, x: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, x)


def verdict(row: Mapping[str, Any]) -> str:
    """One word for what became of a model."""
    for word in ("own", "died", "raised", "refusal"):
        if word in row:
            return {"own": "cannot run", "refusal": "refused"}.get(word, word)
    kinked = row.get("apart") is not None and row["apart"] <= AGREES
    if not (kinked or row["error"] <= (WRONG_NARROW if row["narrow"] else WRONG)):
        return "wrong"
    return "fused" if row["engine"] == "fused" else "right"


def said(row: Mapping[str, Any]) -> str:
    """A line of what is printed."""
    start = f"{row['library']:12} {row['model']:44} {verdict(row):10}"
    if "error" not in row:
        why = next(str(row[word]) for word in ("own", "died", "raised", "refusal") if word in row)
        return f"{start} {why.splitlines()[0]}"
    checked = "OK" if row["check"] else "NOT OK"
    return f"{start} {row['engine']:9} {row['error']:.0e} {checked:6} {row['time']} {row.get('lost', '')}".rstrip()


def section(rows: list[dict[str, Any]]) -> str:
    """The section of the page: counts by library, and all that is not fused, right and OK."""
    lines = [
        "| library | version | models | fused | another engine | refused | wrong | worst error | check OK | time |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    alive = [row for row in rows if "own" not in row]
    for library in [*LIBRARIES, ""]:
        of_it = [row for row in alive if library in ("", row["library"])]
        if not of_it:
            continue
        verdicts = [verdict(row) for row in of_it]
        measured = [row for row in of_it if "error" in row]
        times = sorted(row["time"] for row in measured if row["time"])
        cells = [
            library or "all",
            _version(library),
            len(of_it) if not library else f"{len(of_it)} of {max(row.get('of', 0) for row in of_it)}",
            f"{sum(row.get('engine') == 'fused' for row in of_it)}",
            sum(row.get("engine", "fused") != "fused" for row in of_it),
            sum(v in ("refused", "raised", "died") for v in verdicts),
            verdicts.count("wrong"),
            f"{max((row['error'] for row in measured), default=float('nan')):.0e}",
            sum(row["check"] for row in measured),
            f"{times[len(times) // 2]:.2f}" if times else "–",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    fused = sum(row.get("engine") == "fused" for row in alive)
    lines += [
        "",
        f"Fused: {100 * fused / max(len(alive), 1):.1f} %. The time is the median. What is not fused, right and OK:",
        "",
    ]
    lines += [f"- {_told(row)}" for row in alive if verdict(row) != "fused" or not row["check"]]
    under = circumstances(Settings(turns=TURNS))
    return "\n".join([f"## {TITLE}", "", NOTE, "", f"{datetime.date.today()}; {under}", "", *lines])


def _told(row: Mapping[str, Any]) -> str:
    why = row.get("refusal") or row.get("raised") or row.get("died") or row.get("lost") or ""
    word = verdict(row)
    if "error" in row and not row["check"]:
        bad = [line for line in row["said"].splitlines() if "TOO LARGE" in line or "depend" in line]
        why, word = (bad or [row["said"]])[0].strip(), "check() says NOT OK"
    return f"{row['library']} `{row['model']}`: {word}. {why.splitlines()[0] if why else ''}".rstrip()


def _version(library: str) -> str:
    try:
        return importlib.metadata.version({"kan": "pykan"}.get(library, library)) if library else ""
    except importlib.metadata.PackageNotFoundError:
        return "–"


if __name__ == "__main__":
    torch.set_num_threads(1)
    visit(sys.argv[1], Path(sys.argv[2]), sys.argv[3], "quick" in sys.argv[4:])
