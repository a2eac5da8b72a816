"""The dual pass compiled, against the same pass in eager mode and against the limit."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.limit import FAMILIES, QUICK, SHAPES, made, stages
from benchmarks.timing import Settings, smallest
from torchgeom_probe import GeometryProbe, Subspace

TITLE = "The compiled pass"
NOTE = """`GeometryProbe(model, layers=[up to five stages], estimator=Subspace(k), compile=True).measure(x)`, hooks and reductions included,
and the same in eager mode, over the limit (a plain forward pass over (1 + k)·B samples). "compilation" is the wall time of the one
measurement that compiles; every shape is compiled anew. "difference" is the largest between the two
log-volumes, in nats.

It does not pay on a CPU. Convolutions and matrix products are most of a pass, and compiled code calls them from the same library as
eager code; what could be fused around them (batch norms, copies of channels, derivatives of activations) the eager rules leave out
already; and of the loops that the compiler writes, those that gather (the winners of a max pool) or change the type of channels that
lie last run a number at a time. `compile=True` is made for CUDA, where it takes the launches of hundreds of small kernels out of the
pass."""
RESUMES = True


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    header = "| model | input | B, k | limit [s] | eager | compiled | compilation [s] | difference |"
    yield header
    yield "|---|---|---|---|---|---|---|---|"
    known = settings.finished if header in settings.finished else ()
    for name in QUICK[:1] if settings.quick else settings.families or tuple(FAMILIES):
        model, size = made(name, settings.device)
        for batch, k in [(2, 3)] if settings.quick else SHAPES:
            row = f"| {name} | {size} | {batch}, {k} |"
            yield next((line for line in known if line.startswith(row)), None) or (
                f"{row} {measured(model, size, batch, k, settings)} |"
            )


def measured(model: nn.Module, size: int, batch: int, k: int, settings: Settings) -> str:
    """The numbers of one row."""
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(settings.device)
    eager = GeometryProbe(model, layers=stages(model), estimator=Subspace(k))
    compiled = GeometryProbe(model, layers=stages(model), estimator=Subspace(k), compile=True)
    compiled.measure(x, progress=False)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = compiled.measure(x, progress=False)
    compilation = time.perf_counter() - start
    refusal = next((str(w.message) for w in caught if "compile=True" in str(w.message)), None)
    expected = eager.measure(x, progress=False)
    difference = max(
        (found[layer].log_volume - expected[layer].log_volume).abs().max().item() for layer in expected
    )
    runs = {
        "limit": functools.partial(_plain, model, x.repeat(1 + k, 1, 1, 1)),
        "eager": functools.partial(eager.measure, x, progress=False),
        "compiled": functools.partial(compiled.measure, x, progress=False),
    }
    best = smallest(runs, settings.device, settings.turns)
    ratio = "–" if refusal else f"{best['compiled'] / best['limit']:.2f}"
    took = refusal or f"{compilation:.1f}"
    eagerly = f"{best['eager'] / best['limit']:.2f}"
    return f"{best['limit']:.3f} | {eagerly} | {ratio} | {took} | {difference:.0e}"


def _plain(model: torch.nn.Module, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(rows)
