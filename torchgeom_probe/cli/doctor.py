"""``torchgeom-probe doctor``: what is installed, and whether a measurement comes out right on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
import time
from typing import Any

import torch
from torch import nn

from torchgeom_probe import __version__
from torchgeom_probe.analytic import shallow
from torchgeom_probe.cli.models import add_device, add_json, device_of, show
from torchgeom_probe.errors import first_line
from torchgeom_probe.probe import measure

# Rounding of 64 logarithms; a wrong derivative is off by far more.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser(
        "doctor", help="versions, devices, optional packages, and a self-check against a closed form"
    )
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; status 1 where the self-check fails."""
    device = device_of(arguments)
    checks = [_self_check(device, dtype) for dtype in _TOLERANCE if device.type != "mps" or dtype == torch.float32]
    found: dict[str, Any] = {
        "torchgeom_probe": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "devices": _devices(),
        "packages": _packages(),
        "self_check": checks,
    }
    rows = [(name, found[name]) for name in ("torchgeom_probe", "python", "torch")]
    rows += [("device", name) for name in found["devices"]]
    for package, (version, extra) in found["packages"].items():
        rows.append((package, version or f"not installed: python -m pip install 'torchgeom_probe[{extra}]'"))
    rows += [("self-check", check["verdict"]) for check in checks]
    show(arguments, "\n".join(f"{name:<32} {said}" for name, said in rows), found)
    return 0 if all(check["ok"] for check in checks) else 1


def _devices() -> list[str]:
    names = ["cpu"]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        names.append(f"cuda:{i} {card.name}, {card.total_memory / 2**30:.0f} GiB")
    return names + (["mps"] if torch.backends.mps.is_available() else [])


def _packages() -> dict[str, tuple[str | None, str]]:
    """Optional package → its version (None: not installed) and the extra that brings it, as this package's own say."""
    found: dict[str, tuple[str | None, str]] = {}
    for line in importlib.metadata.requires("torchgeom_probe") or ():
        name, _, marker = line.partition(";")
        package = re.split(r"[^\w.-]", name)[0]
        extra = re.search(r"extra == ['\"](.+)['\"]", marker)
        if extra is None or package == "torchgeom_probe" or extra[1] == "dev":
            continue
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = None
        found.setdefault(package, (version, extra[1]))
    return found


def _self_check(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Log √det g of 256 sigmoid units at 16 points of 64 numbers, by the dual pass and in closed form."""
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((16, 64), (256, 64), (256,)))
    layer = nn.Linear(64, 256, dtype=torch.float64)
    layer.weight.data, layer.bias.data = W / 8, b
    model = nn.Sequential(layer, nn.Sigmoid()).to(device, dtype)
    began = time.perf_counter()
    try:
        measured = measure(model, x.to(device, dtype), layers=["1"], estimator="exact", progress=False)["1"].value
        error = float((measured.double().cpu() - shallow.log_volume(x, W / 8, b, "sigmoid")).abs().max())
    except Exception as problem:  # whatever is broken here is what was asked for
        return {"dtype": str(dtype), "ok": False, "verdict": f"FAILED on {device}, {dtype}: {first_line(problem)}"}
    ok = error <= _TOLERANCE[dtype]
    verdict = (
        f"{'ok' if ok else 'WRONG'} on {device}, {dtype}: {error:.0e} nats off the closed form "
        f"({_TOLERANCE[dtype]:.0e} allowed), {time.perf_counter() - began:.2f} s"
    )
    return {"dtype": str(dtype), "ok": ok, "error": error, "verdict": verdict}
