"""Figure 1: the closed form beside the measurement."""

import copy

import pytest
import torch

import torchgeom_probe as tgp
from torchgeom_probe.reproduce import points


@pytest.mark.parametrize("width", [5, 25, 250])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_float32_equals_the_closed_form_to_1e_minus_5_over_the_whole_grid(width, scale):
    torch.manual_seed(width)
    model = points.PaperNetwork(2, width, 2)
    with torch.no_grad():
        model.hidden.weight *= scale  # 8: as after 10 000 epochs, when most units are saturated
    found = tgp.scan(model, points.the_plane(40), layers=[points.LAYER], progress=False)
    apart, ratio, count = points.disagreement(model, found)
    assert apart <= 1e-5
    assert ratio <= 2
    assert count < 160 if width == 5 else count == 0


def test_the_comparison_sees_a_wrong_measurement():
    model = points.PaperNetwork(2, 5, 2)
    plane = points.the_plane(8)
    found = tgp.scan(model, plane, layers=[points.LAYER], progress=False)
    with torch.no_grad():
        model.hidden.weight[0, 0] *= 1.001
    assert points.disagreement(model, found)[0] > 1e-5


def test_the_curvature_of_the_maps_is_the_measured_metrics():
    model = points.PaperNetwork(2, 7, 2).double()
    plane = tgp.Plane(*torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double(), steps=4, coordinates="barycentric")
    found = tgp.scan(model, plane, layers=[points.LAYER], progress=False)
    measured = tgp.scalar_curvature(model, plane.points(), layer=points.LAYER)  # of J, not J / √n
    assert torch.allclose(points.ricci(model, found).flatten(), 7 * measured, rtol=1e-8)


def test_the_profile_along_normals_finds_a_ridge_on_the_boundary_and_none_before():
    torch.manual_seed(0)
    initial = points.PaperNetwork(2, 40, 2)
    x, labels = points.sinusoid(400)
    model = copy.deepcopy(initial)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    effect = points.along_normals(model, initial)[points.LAYER]
    assert effect.supported
    assert effect.estimate > 0.3
    assert abs(effect.initial.estimate) < 0.1
    assert effect.profiled == "log √det g"
    assert effect.profile[0.2] < -0.3 < effect.initial_profile[0.2]
    assert effect.margin_slope.estimate < 0  # larger at the end that is less certain
    assert effect.margin_slope.p_value < 0.5
