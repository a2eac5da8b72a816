"""All four stages of the paper's CIFAR ResNet-34 at once, against a full Jacobian for each, the authors' way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchgeom_probe.integrations.timm import cifar_resnet

import torchgeom_probe as tgp
from benchmarks.timing import Settings, seconds
from torchgeom_probe.dual import DualTensor
from torchgeom_probe.model.isolation import measuring

TITLE = "Four stages of a ResNet-34: one probe against a Jacobian for each"
METHOD = "process time (wall time on a GPU) of one run"
NOTE = """\
The paper's network (CIFAR ResNet-34, GELU), one 32 × 32 sample, each stage average-pooled to 512 features; seconds. The
singular values agree, or the run stops.

- "sequential Jacobian": the authors' way, `torch.autograd.functional.jacobian(..., create_graph=True)` a stage, then
  `svdvals`. "vmap(vjp)": a stage at a time, 64 rows at once.
- "Exact": `Exact()`; "forward": with `engine="fused"`, 3072 directions. "512 forward rows": one dual pass over 512."""

STAGES = ("layer1", "layer2", "layer3", "layer4")
#: Average pooling of each stage: [64, 32, 32], [128, 16, 16], [256, 8, 8], [512, 4, 4] → 512 features.
WINDOWS = {"layer1": (16, 8), "layer2": (8, 8), "layer3": (8, 4), "layer4": (4, 4)}
_SIDES = {"layer1": (32, 32), "layer2": (16, 16), "layer3": (8, 8), "layer4": (4, 4)}
_CHUNK = 64


def pooled(name: str) -> Callable[[Tensor], Tensor]:
    """The authors' pooling of a stage (the windows divide its sides, so that adaptive pooling is the same)."""
    rows, columns = (size // window for size, window in zip(_SIDES[name], WINDOWS[name], strict=True))
    return lambda features: F.adaptive_avg_pool2d(features, (rows, columns))


def stage(model: Any, name: str) -> Callable[[Tensor], Tensor]:
    """One sample [1, 3, 32, 32] → the pooled features [n] of a stage; runs no further than it."""

    def features(x: Tensor) -> Tensor:
        x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
        for each in STAGES[: STAGES.index(name) + 1]:
            x = getattr(model, each)(x)
        return pooled(name)(x).flatten()

    return features


def sequential(model: nn.Module, x: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Singular values of J/√n per stage, by a row at a time with a graph of the graph."""
    found = {}
    for name in names:
        jacobian: Any = torch.autograd.functional.jacobian(stage(model, name), x, create_graph=True)
        rows = jacobian.detach().flatten(1)
        found[name] = torch.linalg.svdvals(rows / len(rows) ** 0.5)
    return found


def batched(model: nn.Module, x: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The same by ``torch.func``: pullbacks of 64 rows at a time over one saved pass per stage."""
    found = {}
    for name in names:
        value, pull = torch.func.vjp(stage(model, name), x)
        basis = torch.eye(len(value), dtype=x.dtype, device=x.device)
        rows = torch.cat([torch.func.vmap(pull)(part)[0].flatten(1) for part in basis.split(_CHUNK)])
        found[name] = torch.linalg.svdvals(rows.detach() / len(value) ** 0.5)
    return found


def exact(model: nn.Module, x: Tensor, names: tuple[str, ...], *, engine: Any = "auto") -> dict[str, Tensor]:
    """The same by the library, all stages in one probe."""
    report = tgp.measure(
        model,
        x,
        layers=list(names),
        transform={name: pooled(name) for name in names},
        estimator=tgp.Exact(),
        engine=engine,
        progress=False,
    )
    return {name: report[name].singular_values[0] for name in names}


def forward_rows(model: nn.Module, x: Tensor, rows: int) -> None:
    """Push as many directions as that through the model."""
    directions = torch.randn(rows, *x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    with measuring(model):
        model(DualTensor(torch.cat([x[None], directions])))


def agree(found: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """Stop the run where singular values differ by more than float32 rounding of the largest."""
    for name, expected in reference.items():
        error = ((found[name].cpu() - expected.cpu()).abs().max() / expected.max()).item()
        if not error < 1e-4:
            raise RuntimeError(f"the singular values of {name} differ by {error:.1e} of the largest")


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    torch.manual_seed(0)
    small = {"channels": (4, 8, 16, 32)} if settings.quick else {}
    model = cifar_resnet("resnet18" if settings.quick else "resnet34", **small).eval().to(settings.device)
    side = 16 if settings.quick else 32
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(settings.device)
    features = stage(model, STAGES[-1])(x).numel()
    ways: dict[str, Callable[..., dict[str, Tensor]]] = {
        "sequential Jacobian": sequential,
        f"vmap(vjp), {_CHUNK} rows at a time": batched,
        "Exact": exact,
    }
    yield f"| | {' | '.join(STAGES)} | all four |"
    yield "|---|" + "---|" * (len(STAGES) + 1)
    batched(model, x, STAGES[:1])  # what torch sets up at its first pullback is not timed
    reference: dict[str, Tensor] = {}
    for way, run in ways.items():
        found: dict[str, Tensor] = {}

        def one(names: tuple[str, ...], run: Any = run, found: dict[str, Tensor] = found) -> None:
            found.update(run(model, x, names))

        times = [seconds(partial(one, (name,)), settings.device) for name in STAGES]
        whole = sum(times)
        if run is exact:  # the point of it: one probe for all
            whole = seconds(partial(one, STAGES), settings.device)
        reference = reference or found
        agree(found, reference)
        yield f"| {way} | {' | '.join(f'{t:.2f}' for t in times)} | {whole:.2f} |"
    forward: dict[str, Tensor] = {}
    time = seconds(lambda: forward.update(exact(model, x, STAGES, engine="fused")), settings.device)
    agree(forward, reference)
    yield f"| Exact, forward | – | – | – | – | {time:.2f} |"
    time = seconds(lambda: forward_rows(model, x, features), settings.device)
    yield f"| {features} forward rows | – | – | – | – | {time:.2f} |"
