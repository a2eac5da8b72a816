"""Boundary points: a boundary known in closed form, more than two classes, readouts, and no trace left behind."""

import copy

import pytest
import torch
from annotations import shapes_unchecked
from torch import nn

from torchgeom_probe import ProbeError
from torchgeom_probe.boundary.points import boundary_points


def test_boundary_points_of_a_circle():
    class Circle(nn.Module):
        def forward(self, x):
            inside = 1 - x.flatten(1).square().sum(1)
            return torch.stack([inside, torch.zeros_like(inside)], 1)

    a = 0.1 * torch.randn(11, 2, 3, dtype=torch.float64)
    b = a + 5 * torch.nn.functional.normalize(torch.randn(11, 6, dtype=torch.float64)).reshape(11, 2, 3)
    found = boundary_points(Circle(), a, b, tol=1e-6)
    assert (found.class_before == 0).all()
    assert (found.class_after == 1).all()
    assert found.points.shape == a.shape
    assert found.tolerance <= 1e-6
    # |a + t (b - a)|² = 1, solved by hand
    v = (b - a).flatten(1)
    p, q = ((a.flatten(1) * v).sum(1) / v.square().sum(1), (a.flatten(1).square().sum(1) - 1) / v.square().sum(1))
    assert (found.t - (-p + (p * p - q).sqrt())).abs().max() <= 1e-6
    assert torch.allclose(found.points.flatten(1).norm(dim=1), torch.ones(11, dtype=torch.float64), atol=1e-5)


def test_boundary_points_pass_a_third_class_and_read_through_a_readout():
    bands = nn.Module()
    bands.forward = lambda x: {"logits": -(x - torch.tensor([[0.0, 1.0, 2.0]])).abs()}
    found = boundary_points(bands, torch.zeros(1, 1), torch.full((1, 1), 2.0), tol=1e-5, readout=lambda o: o["logits"])
    assert found.class_after.item() != found.class_before.item() == 0
    assert min(abs(found.points.item() - edge) for edge in (0.5,)) < 1e-4


def test_boundary_points_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    before = copy.deepcopy(model.state_dict())
    x = 5 * torch.randn(64, 3)
    with torch.no_grad():
        labels = copy.deepcopy(model).eval()(x).argmax(1)
    a, b = x[labels == 0][:1], x[labels == 1][:1]
    state = torch.get_rng_state()
    boundary_points(model, a, b)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (torch.zeros(3), torch.zeros(3), {}, r"both must be \[B, \*input\].*\n.*a\[None\]"),
        (torch.zeros(2, 3), torch.zeros(1, 3), {}, r"a has shape \(2, 3\) and b \(1, 3\)"),
        (torch.zeros(2, 3), torch.ones(2, 3), {"tol": 0.0}, "tol=0.0 must lie between"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {}, r"segment 0 are both predicted as class .* \(2 of 2"),
        (torch.zeros(2, 3), torch.ones(2, 3), {"readout": lambda z: z[:, :1]}, r"one number a sample.*\n.*torch.cat"),
        (torch.zeros(2, 3), torch.ones(2, 3), {"readout": lambda z: {}}, "readout gives a dict for 2 samples"),
    ],
)
def test_boundary_points_refuse(a, b, options, message):
    with shapes_unchecked(), pytest.raises(ProbeError, match=message):
        boundary_points(nn.Linear(3, 2), a, b, **options)


def test_the_class_change_nearest_to_the_middle():
    bands = nn.Module()
    bands.forward = lambda x: -(x - torch.arange(8.0)).abs()  # the class is the nearest whole number
    a, b = torch.zeros(2, 1), torch.tensor([[7.0], [4.0]])
    middle = boundary_points(bands, a, b, near="middle", tol=1e-5)
    assert torch.allclose(middle.points, torch.tensor([[3.5], [1.5]]), atol=1e-3)  # or 2.5: at 0.375 as at 0.625
    assert middle.class_before.tolist() == [3, 1]
    assert middle.class_after.tolist() == [4, 2]
    assert middle.tolerance <= 1e-5
    with shapes_unchecked(), pytest.raises(ProbeError, match="near='end' is unknown"):
        boundary_points(bands, a, b, near="end")
