"""How the time grows: with the directions, the batch, the depth and the resolution; beside the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.limit import dual_pass
from benchmarks.timing import Settings, slope, smallest
from torchgeom_probe.model.isolation import measuring

TITLE = "Scaling"
NOTE = """\
Seconds of the dual pass and of the limit (a plain forward pass of (1 + k)·B rows) as one size grows and the others stay
at B = 2, k = 8, 4 residual blocks, 32 × 32 pixels. "slope": the power p in time ∝ sizeᵖ; the two should be the same."""


@dataclass(frozen=True)
class Size:
    """What is measured at one point."""

    k: int = 8
    batch: int = 2
    depth: int = 4
    side: int = 32


#: axis → (field, values, what of the value the slope is against)
AXES: dict[str, tuple[str, Sequence[int], Callable[[int], int]]] = {
    "rows 1 + k": ("k", (3, 7, 15, 31, 63), lambda k: 1 + k),
    "batch B": ("batch", (1, 2, 4, 8, 16), lambda b: b),
    "depth, blocks": ("depth", (2, 4, 8, 16, 32), lambda n: n),
    "side of the image": ("side", (16, 32, 64, 128), lambda s: s),
}
_WIDTH = 32


def network(depth: int, width: int) -> nn.Module:
    """A timm ResNet of basic blocks in one stage of constant width and resolution."""
    from timm.models.resnet import BasicBlock

    torch.manual_seed(0)
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *(BasicBlock(width, width) for _ in range(depth))).eval()


def times(size: Size, settings: Settings) -> dict[str, float]:
    """Seconds of the limit and of the dual pass."""
    model = network(size.depth, 8 if settings.quick else _WIDTH).to(settings.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.batch, 3, size.side, size.side, generator=generator).to(settings.device)
    v = torch.randn(size.k, *x.shape, generator=generator).to(settings.device)
    rows = torch.cat([x[None], v]).flatten(0, 1)

    def plain() -> Tensor:
        with torch.no_grad():
            return model(rows)

    runs = {"limit": plain, "dual pass": lambda: dual_pass(model, x, v)}
    for_dual = {"dual pass": lambda: measuring(model)}
    smallest(runs, settings.device, 1, inside=for_dual)
    return smallest(runs, settings.device, settings.turns, inside=for_dual)


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    yield "| grows | size | limit [s] | dual pass [s] | dual pass ÷ limit |"
    yield "|---|---|---|---|---|"
    for axis, (field, values, against) in AXES.items():
        taken = values[:2] if settings.quick else values
        found = [times(replace(Size(), **{field: value}), settings) for value in taken]
        sizes = [against(value) for value in taken]
        for size, point in zip(sizes, found, strict=True):
            ratio = point["dual pass"] / point["limit"]
            yield f"| {axis} | {size} | {point['limit']:.4f} | {point['dual pass']:.4f} | {ratio:.2f} |"
        slopes = [slope(sizes, [point[run] for point in found]) for run in ("limit", "dual pass")]
        yield f"| {axis} | slope | {slopes[0]:.2f} | {slopes[1]:.2f} | |"
