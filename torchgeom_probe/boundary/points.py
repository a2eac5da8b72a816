"""Where a decision boundary lies, between samples of different classes.

Legend of axes: B segments, G grid points.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.isolation import measuring
from torchgeom_probe.model.predictions import Readout, logits_of, pieces
from torchgeom_probe.model.wrappers import unwrapped
from torchgeom_probe.shapes import Bool, Float, Int, Tensor

#: Where ``near="middle"`` looks for class changes before it bisects.
_GRID = tuple(i / 10 for i in range(11))


@dataclass(frozen=True, eq=False)
class BoundaryPoints:
    """Where B segments cross a decision boundary.

    Attributes:
        points: [B, *input], the middles of the last brackets.
        t: [B], where on the segment: 0 at a, 1 at b.
        class_before: [B], predicted just before the crossing, on a's side; with ``near="any"`` the class at ``a``.
        class_after: [B], predicted just after it; the class at ``b`` unless a third class lies between.
        tolerance: half of the last bracket, in units of t.
    """

    points: Float[Tensor, " batch *input"]
    t: Float[Tensor, " batch"]
    class_before: Int[Tensor, " batch"]
    class_after: Int[Tensor, " batch"]
    tolerance: float

    def __repr__(self) -> str:
        return f"BoundaryPoints({len(self.points)} of shape {tuple(self.points.shape[1:])}, t ± {self.tolerance:.2g})"


def boundary_points(
    model: nn.Module,
    a: Float[Tensor, " batch *input"],
    b: Float[Tensor, " batch *input"],
    *,
    tol: float = 1e-3,
    near: Literal["any", "middle"] = "any",
    readout: Readout | None = None,
) -> BoundaryPoints:
    """Bisect the segments from a to b for a point where the predicted class changes.

    Per segment one crossing is found, a true one to ± ``tol`` in units of the segment.  Where the class changes more
    than once, ``near="any"`` takes one of the places where it stops being that of a, whichever bisection meets;
    ``near="middle"`` looks at 11 points first and bisects the change among them that is nearest to t = 1/2 (with a
    thousand classes plain bisection lands near a).

    Shapes: a and b [B, *input], each pair predicted as two different classes.  ``readout`` maps the model's
    output to logits [B, C]; None: the output is the logits.  The model, and a readout that is a module, are run in
    eval mode and left as they were.

    Raises:
        ProbeError: shapes that differ, a pair of one class, or an output that is no [B, C] logits.

    Cost: ⌈log₂(1 / tol)⌉ + 1 forward passes over B rows, none with tangents; about 7 more with ``near="middle"``.

    >>> import torch
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> model.weight.data = torch.tensor([[1.0], [-1.0]])   # class 0 where x > 0
    >>> found = boundary_points(model, torch.tensor([[-1.0]]), torch.tensor([[3.0]]), tol=1e-4)
    >>> assert abs(found.t.item() - 0.25) < 1e-4 and found.class_before.item() == 1
    """
    if a.shape != b.shape or a.dim() < 2 or len(a) == 0:
        raise ProbeError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; both must be [B, *input], one segment a row.\n"
            "For single inputs:  boundary_points(model, a[None], b[None])"
        )
    if not 0 < tol < 1:
        raise ProbeError(f"tol={tol} must lie between 0 and 1: it is in units of the segment. Write tol=1e-3.")
    if near not in ("any", "middle"):
        raise ProbeError(f"near={near!r} is unknown.\nWrite near='any' (the default) or near='middle'.")
    points, differ = bisected(model, a, b, tol=tol, near=near, readout=readout)
    _refuse_pairs_of_one_class(points.class_before, differ)
    return points


def bisected(
    model: nn.Module,
    a: Tensor,
    b: Tensor,
    *,
    tol: float = 1e-3,
    near: Literal["any", "middle"] = "any",
    readout: Readout | None = None,
) -> tuple[BoundaryPoints, Bool[Tensor, " batch"]]:
    """The same of segments that may have ends of one class, which of them have not: only those cross a boundary."""
    bare = unwrapped(model)

    def classes(x: Tensor) -> Tensor:
        found = [logits_of(bare(some), readout=readout, batch=len(some)).argmax(-1) for some in pieces(x)]
        return torch.cat(found)

    with measuring(bare), measuring(readout) if isinstance(readout, nn.Module) else contextlib.nullcontext():
        grid = _GRID if near == "middle" else (0.0, 1.0)
        found_GB = torch.stack([classes(_between(a, b, a.new_full((len(a),), t))) for t in grid])
        left = _nearest_to_the_middle(found_GB[1:] != found_GB[:-1])
        first, after = (found_GB.gather(0, index[None])[0] for index in (left, left + 1))
        edges = torch.tensor(grid, dtype=a.dtype, device=a.device)
        low, high = edges[left], edges[left + 1]
        for _ in range(max(0, math.ceil(math.log2((grid[1] - grid[0]) / tol)) - 1)):
            middle = (low + high) / 2
            found = classes(_between(a, b, middle))
            crossed = found != first
            low, high = torch.where(crossed, low, middle), torch.where(crossed, middle, high)
            after = torch.where(crossed, found, after)
        t = (low + high) / 2
        points = BoundaryPoints(_between(a, b, t), t, first, after, float((high - low).max()) / 2)
        return points, found_GB[0] != found_GB[-1]


def _nearest_to_the_middle(changes_GB: Tensor) -> Tensor:
    """[B], which interval of the grid, among those in which the class changes, is nearest to t = 1/2."""
    count = len(changes_GB)
    away = (torch.arange(count, device=changes_GB.device) - (count - 1) / 2).abs()
    return torch.where(changes_GB, away[:, None], math.inf).argmin(0)


def _refuse_pairs_of_one_class(first: Tensor, differ: Tensor) -> None:
    same = (~differ).nonzero().flatten().tolist()
    if same:
        raise ProbeError(
            f"the ends of segment {same[0]} are both predicted as class {int(first[same[0]])} ({len(same)} of "
            f"{len(first)} segments), so bisection has no sign to follow.\n"
            "Keep the pairs that differ:  "
            "keep = model(a).argmax(-1) != model(b).argmax(-1); boundary_points(model, a[keep], b[keep])"
        )


def _between(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    t = t.reshape(-1, *[1] * (a.dim() - 1))
    return a * (1 - t) + b * t
