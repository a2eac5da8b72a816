"""The maps of figure 4, all four blocks of a CIFAR ResNet on a plane, against the authors' method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchgeom_probe.integrations.timm import cifar_resnet

import torchgeom_probe as tgp
from benchmarks.timing import Settings, smallest
from torchgeom_probe.estimators.topk import paper_pool

TITLE = "Maps over a plane: four blocks in one scan, against a full Jacobian a block"
NOTE = """\
Seconds per point of figure 4's plane, four blocks of a CIFAR ResNet-34 with GELU a quarter as wide as the paper's. The
authors' method: a full Jacobian of 512 pooled features a block. The others are one `scan()` each, prediction and
entropy included; "slice tangents" is another quantity, the area magnification on the plane. "all 512" agrees with the
authors' to 1e-3 nats a singular value, or the run stops."""

BLOCKS = ("layer1", "layer2", "layer3", "layer4")


def global_pool(output: Tensor) -> Tensor:
    """Pool to one pixel: the miniature's, so that its Jacobians are small."""
    return functional.adaptive_avg_pool2d(output, 1)


def authors_way(model: nn.Module, point: Tensor, pool: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return per block the singular values of its pooled features' Jacobian over √n, as the authors do."""
    found = {}
    for block in BLOCKS:

        def features(x: Tensor, block: str = block) -> Tensor:
            kept: list[Tensor] = []
            hook = model.get_submodule(block).register_forward_hook(lambda m, a, out: kept.append(out))
            try:
                model(x[None])
            finally:
                hook.remove()
            return pool(kept[0]).flatten()

        jacobian = torch.autograd.functional.jacobian(features, point, create_graph=True)
        jacobian = jacobian.flatten(1).detach()
        found[block] = torch.linalg.svdvals(jacobian / math.sqrt(len(jacobian)))
    return found


def check(model: nn.Module, plane: tgp.Plane, pool: Callable[[Tensor], Tensor]) -> None:
    """Compare the authors' Σ log σ with the scan's at the plane's first point, in nats per singular value."""
    measured = tgp.measure(model, plane.points()[:1], layers=BLOCKS, estimator=tgp.Exact(), transform=pool)
    for block, values in authors_way(model, plane.points()[0], pool).items():
        ours = measured[block].singular_values[0].double()
        floor = 1e-4 * float(values[0])  # below it float32 holds no digit
        large = values.double().clamp_min(floor).log() - ours.clamp_min(floor).log()
        if not float(large.abs().max()) < 1e-3 or len(ours) != len(values):
            raise RuntimeError(
                f"{block}: all singular values differ from the authors' by {float(large.abs().max()):.1e} nats"
            )


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    torch.manual_seed(0)
    if settings.quick:
        model, pool, top = cifar_resnet("resnet18", channels=(4, 8, 16, 32)), global_pool, 2
    else:
        model, pool, top = cifar_resnet("resnet34", channels=(16, 32, 64, 128)), paper_pool, 10
    model = model.eval().to(settings.device).requires_grad_(False)
    corners = torch.rand(3, 3, 32, 32).to(settings.device)

    def plane(steps: int) -> tgp.Plane:
        return tgp.Plane(*corners, steps=steps)

    check(model, plane(2), pool)

    def scanned(steps: int, **options: Any) -> Callable[[], Any]:
        return lambda: tgp.scan(model, plane(steps), layers=BLOCKS, batch_size=steps * steps, progress=False, **options)

    everything = "all pooled features" if settings.quick else "all 512"
    #: name → (points, run)
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "slice tangents": (16, scanned(4)),
        f"TopK({top})": (4, scanned(2, estimator=tgp.TopK(k=top, tol=3e-3), transform=pool)),
        everything: (4, scanned(2, estimator=tgp.Exact(), transform=pool)),
        "the authors' method": (1, lambda: authors_way(model, plane(2).points()[0], pool)),
    }
    best = smallest(
        {name: run for name, (_, run) in runs.items()},
        settings.device,
        settings.turns,
        slow_turns=1,
        quick_ones=("slice tangents",),
    )
    per_point = {name: best[name] / runs[name][0] for name in runs}
    authors = per_point["the authors' method"]
    yield "| four blocks at a point | points timed | s a point | authors / this |"
    yield "|---|---|---|---|"
    for name, seconds in per_point.items():
        yield f"| {name} | {runs[name][0]} | {seconds:.3g} | {authors / seconds:.3g} |"
