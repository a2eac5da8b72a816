"""Slices of input space: the line through two samples, the plane through three.

Legend of axes: P all points of the slice, k its dimension (1 or 2), T = P on a line, H × W = P on a plane.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.files import digest
from torchgeom_probe.shapes import Float, Tensor


class Slice:
    """What lines and planes share: coordinates in which the points lie on a grid and x is affine."""

    def __post_init__(self) -> None:
        kind, named = type(self).__name__, dict(zip("abc", self.samples, strict=False))
        first = self.samples[0]
        for name, sample in named.items():
            if not isinstance(sample, Tensor):
                seen = f"{kind}: {name} is a {type(sample).__name__}, not a tensor."
                raise ProbeError(f"{seen}\nWrite:  torch.as_tensor({name})")
            if not sample.is_floating_point():
                call = ", ".join(f"{other}.float()" if other == name else other for other in named)
                raise ProbeError(
                    f"{kind}: {name} has dtype {sample.dtype}, and between integers there is no line.\n"
                    f"Take the model's own floating-point input:  {kind}({call})"
                )
            if sample.shape != first.shape or sample.dtype != first.dtype or sample.device != first.device:
                seen = ", ".join(f"{n} is {tuple(s.shape)} {s.dtype} on {s.device}" for n, s in named.items())
                example = ", ".join(f"x[{i}]" for i in range(len(named)))
                raise ProbeError(
                    f"{kind}: the samples differ: {seen}.\n"
                    f"Each is one input of the model, without a batch axis:  {kind}({example})"
                )
            if not bool(sample.isfinite().all()):
                raise ProbeError(
                    f"{kind}: {name} holds numbers that are not finite.\nTake another sample, or:  {name}.nan_to_num()"
                )
        steps = self.options["steps"]
        if not isinstance(steps, int) or steps < 2:
            raise ProbeError(
                f"{kind}: steps={steps!r} must be a whole number of at least 2: both ends are points.\nWrite steps=64."
            )

    @property
    def samples(self) -> tuple[Tensor, ...]:
        """The samples that span the slice: a, b and, of a plane, c."""
        return tuple(getattr(self, name) for name in "abc" if hasattr(self, name))

    @property
    def options(self) -> dict[str, Any]:
        """What beside the samples makes this slice."""
        return {key: value for key, value in vars(self).items() if key not in "abc"}

    def tangents(self) -> Float[Tensor, " k *input"]:
        """[k, *input]: the derivatives of x in the k coordinates, the same at every point."""
        raise NotImplementedError

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{type(self).__name__}({len(self.samples)} samples of shape {tuple(self.samples[0].shape)}, {options})"

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that tell this slice from any other."""
        return digest(f"{type(self).__name__} {self.options}", *self.samples)

    @property
    def log_measure(self) -> float:
        """Natural log of the length (area) per unit of the coordinates: the log-volume of a map that keeps lengths."""
        factor = torch.linalg.qr(self.tangents().detach().flatten(1).double().cpu().T, mode="r").R
        return float(factor.diagonal().abs().log().sum())


@dataclass(frozen=True, eq=False, repr=False)
class Line(Slice):
    """The straight segment from sample a to sample b.

    x(t) = (1 - t) a + t b at ``steps`` values of t from 0 to 1, both ends included.

    (The paper's own code takes t = i / steps and so never reaches b.)

    Shapes: a and b [*input], single samples without a batch axis, floating point.

    Raises:
        ProbeError: a and b that differ in shape, dtype or device, are equal, not finite or integers; fewer
            than 2 steps.

    >>> line = Line(torch.zeros(3), torch.tensor([2.0, 0.0, 0.0]), steps=5)
    >>> line.points().shape, line.points()[-1].tolist()
    (torch.Size([5, 3]), [2.0, 0.0, 0.0])
    >>> assert line.tangents().tolist() == [[2.0, 0.0, 0.0]] and line.log_measure == math.log(2)
    """

    a: Float[Tensor, " *input"]
    b: Float[Tensor, " *input"]
    steps: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if torch.equal(self.a, self.b):
            raise ProbeError(
                "Line: a and b are equal, so there is no line between them.\n"
                "Take two different samples:  Line(x[0], x[1])"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(T,)``: how the points lie."""
        return (self.steps,)

    @property
    def corners(self) -> Float[Tensor, " samples k"]:
        """The coordinates at which the samples lie: t = 0 and t = 1."""
        return torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def grid(self) -> Float[Tensor, " points k"]:
        """[T, 1]: the coordinate t of every point, float64."""
        return torch.linspace(0, 1, self.steps, dtype=torch.float64)[:, None]

    def points(self) -> Float[Tensor, " points *input"]:
        """[T, *input]: the points, in the samples' dtype and on their device."""
        t = self.grid().to(self.a).reshape(-1, *[1] * self.a.dim())
        return self.a * (1 - t) + self.b * t

    def tangents(self) -> Float[Tensor, " k *input"]:
        """[1, *input]: dx/dt = b - a, the same at every point."""
        return (self.b - self.a)[None]


@dataclass(frozen=True, eq=False, repr=False)
class Plane(Slice):
    """The plane through the samples a, b and c, as a square grid in two coordinates (u, v).

    ``coordinates="equilateral"``, the paper's: the origin is the mean o of the three, ∂x/∂u = b - a ("right")
    and ∂x/∂v = 2√3 ((a + b) / 2 - o) ("up").  In these coordinates the samples are corners of an equilateral
    triangle of side 1, whatever their true distances: a at (-1/2, 1/(2√3)), b at (1/2, 1/(2√3)), c at (0,
    -1/√3), below the other two.

    ``coordinates="barycentric"``: x(u, v) = (1 - u - v) a + u b + v c, so a is
    at (0, 0), b at (1, 0) and c at (0, 1).

    ``extent`` is the range of both coordinates, its ends included.  Points are in row-major order over
    ``shape`` = (H, W): u runs along a row, v up the rows, the lowest v first (draw it with
    ``origin="lower"``).

    Shapes: a, b and c [*input], single samples without a batch axis, floating point.

    Raises:
        ProbeError: samples that differ in shape, dtype or device, lie on one line, are not finite or
            integers; fewer than 2 steps; an empty extent; other coordinates.

    Source: the equilateral coordinates are those of the code of arXiv:2301.11375.

    >>> a, b, c = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    >>> plane = Plane(a, b, c, steps=3)
    >>> plane.shape, plane.points().shape, plane.tangents().shape
    ((3, 3), torch.Size([9, 3]), torch.Size([2, 3]))
    >>> u, v = plane.corners[2]  # where c lies
    >>> right, up = plane.tangents()
    >>> origin = plane.points()[4]
    >>> assert torch.allclose(origin + u * right + v * up, c)
    """

    a: Float[Tensor, " *input"]
    b: Float[Tensor, " *input"]
    c: Float[Tensor, " *input"]
    steps: int = 40
    extent: tuple[float, float] = (-1.0, 1.0)
    coordinates: Literal["equilateral", "barycentric"] = "equilateral"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coordinates not in ("equilateral", "barycentric"):
            raise ProbeError(
                f"Plane: coordinates={self.coordinates!r} is unknown.\n"
                "Write coordinates='equilateral' (the default) or 'barycentric'."
            )
        if len(self.extent) != 2 or not -math.inf < self.extent[0] < self.extent[1] < math.inf:
            raise ProbeError(
                f"Plane: extent={self.extent} is no range (low, high) of the coordinates.\n"
                "Write extent=(-1, 1), the default."
            )
        object.__setattr__(self, "extent", (float(self.extent[0]), float(self.extent[1])))
        edges = torch.stack([(self.b - self.a).flatten(), (self.c - self.a).flatten()])
        widths = torch.linalg.svdvals(edges.detach().double().cpu())
        size = max(float(s.detach().double().norm()) for s in self.samples)
        # Rounding alone takes three samples of one line this far off it.
        if len(widths) < 2 or float(widths[1]) <= 10 * torch.finfo(self.a.dtype).eps * size:
            raise ProbeError(
                "Plane: a, b and c lie on one line, so they span no plane.\n"
                "Take three samples in general position:  Plane(x[0], x[1], x[2]); or scan the line:  Line(a, b)"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(H, W)``: how the points lie; rows are v."""
        return (self.steps, self.steps)

    @property
    def corners(self) -> Float[Tensor, " samples k"]:
        """The coordinates (u, v) at which a, b and c lie."""
        if self.coordinates == "barycentric":
            return torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        inner, outer = 1 / (2 * math.sqrt(3)), 1 / math.sqrt(3)
        return torch.tensor([[-0.5, inner], [0.5, inner], [0.0, -outer]], dtype=torch.float64)

    def grid(self) -> Float[Tensor, " points k"]:
        """[H·W, 2]: the coordinates (u, v) of every point, float64."""
        ticks = torch.linspace(*self.extent, self.steps, dtype=torch.float64)
        v, u = torch.meshgrid(ticks, ticks, indexing="ij")
        return torch.stack([u.flatten(), v.flatten()], dim=1)

    def points(self) -> Float[Tensor, " points *input"]:
        """[H·W, *input]: the points, in the samples' dtype and on their device."""
        u, v = self.grid().to(self.a).reshape(-1, 2, *[1] * self.a.dim()).unbind(1)
        origin = self.a if self.coordinates == "barycentric" else (self.a + self.b + self.c) / 3
        right, up = self.tangents()
        return origin + u * right + v * up

    def tangents(self) -> Float[Tensor, " k *input"]:
        """[2, *input]: ∂x/∂u and ∂x/∂v, the same at every point; not orthonormal in general."""
        right = self.b - self.a
        if self.coordinates == "barycentric":
            return torch.stack([right, self.c - self.a])
        # 2√3 ((a + b) / 2 - o), written so that it is a difference of samples.
        return torch.stack([right, (self.a + self.b - 2 * self.c) / math.sqrt(3)])
