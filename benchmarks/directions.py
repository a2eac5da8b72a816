"""The direction that a layer stretches most, against plenoptic's Eigendistortion on plenoptic's own models."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import torchgeom_probe as tgp
from benchmarks.timing import Settings

TITLE = "The direction felt most, against plenoptic"
NOTE = """\
`Directions(1)` and plenoptic's `Eigendistortion` by its power method (to its own criterion of 1e-7, or 1000
iterations), on two models of plenoptic, a part of scikit-image's "camera", float64: CPU seconds, once; products Jv or
Jᵀu; λ = σ², and the sine of the angle to the first singular vector of the whole Jacobian, beside our bound on it."""
METHOD = "CPU time of the process, once"
#: Name → its side in pixels, and what makes it of plenoptic's ``models``.
MODELS: dict[str, tuple[int, Callable[[Any, int], Any]]] = {
    "LinearNonlinear": (32, lambda models, side: models.LinearNonlinear((31, 31))),
    "PortillaSimoncelli": (
        64, lambda models, side: models.PortillaSimoncelli((side, side), n_scales=2, spatial_corr_width=5),
    ),
}  # fmt: skip


def photograph(side: int) -> Tensor:
    """[1, 1, side, side] of means over blocks of pixels, in 0 … 1."""
    from skimage.data import camera

    pixels = np.asarray(camera(), dtype=np.float64)[:512, :512] / 255
    return torch.from_numpy(pixels.reshape(side, 512 // side, side, 512 // side).mean((1, 3)))[None, None]


def sine(v: Tensor, u: Tensor) -> float:
    """Of the angle between two unit vectors."""
    v, u = v.flatten(), u.flatten()
    return float((v - u * (u @ v)).norm())


def row(name: str, steps: int) -> str:
    """Measure a model by both."""
    import plenoptic

    warnings.filterwarnings("ignore", module="plenoptic|torch")
    side, make = MODELS[name]
    torch.manual_seed(0)
    x, model = photograph(side), make(plenoptic.models, side).double().eval()
    plenoptic.remove_grad(model)
    whole = torch.func.jacrev(lambda z: model(z[None, None]).flatten(), chunk_size=64)(x[0, 0]).flatten(1)
    true = torch.linalg.svd(whole, full_matrices=False).Vh[0]

    began = time.process_time()
    report = tgp.measure(model, x, layers="", estimator=tgp.Directions(1), normalize=False, progress=False)
    ours, found = time.process_time() - began, report[""]
    room = importlib.import_module(plenoptic.Eigendistortion.__module__)
    product, name_of_it, counted = room._fisher_info_matrix_vector_product, "_fisher_info_matrix_vector_product", []

    def counting(*args: Any) -> Any:
        counted.append(2)  # a Jv and a Jᵀu
        return product(*args)

    theirs, quiet = plenoptic.Eigendistortion(x, model), io.StringIO()
    streams = contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet)
    with streams[0], streams[1], mock.patch.object(room, name_of_it, counting):
        began = time.process_time()
        value, vector = theirs._synthesize_power(1, 0.0, 1e-7, steps)
        took = time.process_time() - began
    cells = [
        f"{ours:.1f}", f"{int(found.num_products[0])}", f"{float(found.singular_values[0, 0] ** 2):.6g}",
        f"{sine(found.directions(1)[0, 0], true):.1g} (≤ {float(found.direction_error[0, 0]):.1g})",
        f"{took:.1f}", f"{sum(counted)}", f"{float(value):.6g}",
        f"{sine(vector, true):.1g}",
    ]  # fmt: skip
    return f"| {name} | {side} | {len(whole)} | {' | '.join(cells)} |"


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    both = ["seconds", "products", "λ", "sin θ"]
    yield f"| model | pixels | n | {' | '.join(both)} | {' | '.join(f'plenoptic: {each}' for each in both)} |"
    yield "|---" * 11 + "|"
    for name in list(MODELS)[: 1 if settings.quick else None]:
        if importlib.util.find_spec("plenoptic") is None:
            yield f"| {name} |" + " plenoptic is not installed |" + " |" * 9
            continue
        yield row(name, 20 if settings.quick else 1000)
