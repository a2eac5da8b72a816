"""Lines and planes: geometry by hand, and what is refused."""

import math

import pytest
import torch
from annotations import shapes_unchecked

from torchgeom_probe import ProbeError
from torchgeom_probe.slices.slice import Line, Plane


def line():
    return Line(*torch.randn(2, 7, dtype=torch.float64), steps=17)


def plane(steps=6, **options):
    return Plane(*torch.randn(3, 7, dtype=torch.float64), steps=steps, **options)


def test_a_line_reaches_both_ends_exactly():
    a, b = torch.randn(2, 3, 5)
    points = Line(a, b, steps=11).points()
    assert points.shape == (11, 3, 5)
    assert torch.equal(points[0], a)
    assert torch.equal(points[-1], b)
    assert torch.allclose(points[5], (a + b) / 2, atol=1e-6)
    assert torch.equal(Line(a, b).tangents(), (b - a)[None])
    assert Line(a, b).shape == (64,)


def test_the_equilateral_plane_is_the_papers():
    a, b, c = torch.randn(3, 2, 3, 5, dtype=torch.float64)
    surface = Plane(a, b, c, steps=9)
    origin = (a + b + c) / 3
    right, up = b - a, ((a + b) / 2 - origin) * 2 * math.sqrt(3)
    assert torch.allclose(surface.tangents(), torch.stack([right, up]))
    grid, points = surface.grid(), surface.points()
    assert points.shape == (81, 2, 3, 5)
    assert torch.allclose(points[40], origin)
    for (u, v), point in zip(grid.tolist(), points, strict=True):
        assert torch.allclose(point, origin + u * right + v * up)
    assert grid[0].tolist() == [-1, -1]
    assert grid[1].tolist() == [-0.75, -1]  # u runs along a row
    assert grid[9].tolist() == [-1, -0.75]
    # an equilateral triangle in the coordinates, whatever the samples' true distances
    assert torch.allclose(torch.pdist(surface.corners), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("coordinates", ["equilateral", "barycentric"])
def test_the_samples_lie_at_the_corners(coordinates):
    surface = plane(coordinates=coordinates)
    base = surface.a - torch.einsum("k,k...->...", surface.corners[0], surface.tangents())
    for corner, sample in zip(surface.corners, surface.samples, strict=True):
        assert torch.allclose(base + torch.einsum("k,k...->...", corner, surface.tangents()), sample)
    first = surface.points()[0]
    assert torch.allclose(first, base + torch.einsum("k,k...->...", surface.grid()[0], surface.tangents()))


def test_extent_bounds_both_coordinates():
    grid = plane(steps=5, extent=(0.0, 2.0), coordinates="barycentric").grid()
    assert grid.amin(0).tolist() == [0, 0]
    assert grid.amax(0).tolist() == [2, 2]


def test_log_measure_is_the_length_or_area_of_a_unit_of_the_coordinates():
    along, surface = line(), plane()
    assert along.log_measure == pytest.approx(math.log(torch.dist(along.a, along.b)))
    tangents = surface.tangents()
    assert surface.log_measure == pytest.approx(0.5 * math.log(torch.linalg.det(tangents @ tangents.T)))


def test_a_digest_tells_slices_apart_and_their_repr_is_short():
    a, b, c = torch.randn(3, 3, 5, 5)
    slices = [
        Line(a, b),
        Line(b, a),
        Line(a, b, steps=65),
        Line(a.double(), b.double()),
        Plane(a, b, c),
        Plane(a, b, c, extent=(-1.0, 2.0)),
        Plane(a, b, c, coordinates="barycentric"),
    ]
    assert len({along.digest for along in slices}) == len(slices)
    assert Plane(a, b, c).digest == Plane(a.clone(), b, c, extent=(-1.0, 1.0)).digest
    assert repr(slices[0]) == "Line(2 samples of shape (3, 5, 5), steps=64)"
    assert repr(slices[5]).startswith("Plane(3 samples of shape (3, 5, 5), steps=40, extent=(-1.0, 2.0), ")


X = torch.arange(5.0)
REFUSED = {
    "equal": (lambda: Line(X, X.clone()), "a and b are equal.*\n.*two different samples"),
    "collinear": (lambda: Plane(X, X + 1, X + 2.5), r"lie on one line.*\n.*Line\(a, b\)"),
    "collinear by rounding": (
        lambda: (lambda a, b: Plane(a, b, 0.3 * a + 0.7 * b))(*torch.randn(2, 3, 32, 32)),
        "lie on one line",
    ),
    "one pixel": (lambda: Plane(X[:1], X[1:2], X[3:4]), "lie on one line"),
    "integers": (lambda: Line(X.long(), X), r"a has dtype torch.int64.*\n.*a.float\(\)"),
    "integers in a plane": (
        lambda: Plane(X.long(), X, X + 1),
        r"a has dtype torch.int64.*\n.*Plane\(a.float\(\), b, c\)",
    ),
    "shapes": (lambda: Plane(X, X + 1, X[:3]), r"the samples differ: .*c is \(3,\)"),
    "dtypes": (lambda: Line(X, X.double() + 1), "b is .* torch.float64"),
    "no tensor": (lambda: Line([1.0], X), r"a is a list, not a tensor.*\n.*torch.as_tensor\(a\)"),
    "not finite": (lambda: Line(X, X / 0), r"b holds numbers that are not finite.*\n.*nan_to_num"),
    "one step": (lambda: Line(X, X + 1, steps=1), "steps=1 must be a whole number of at least 2"),
    "extent": (lambda: Plane(X, X + 1, X**2, extent=(1.0, 1.0)), r"extent=\(1.0, 1.0\) is no range"),
    "coordinates": (lambda: Plane(X, X + 1, X**2, coordinates="polar"), "coordinates='polar' is unknown"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    make, message = REFUSED[case]
    with shapes_unchecked(), pytest.raises(ProbeError, match=message):
        make()
