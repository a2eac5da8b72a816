"""The directions that a layer feels most and least, against the SVD of the float64 Jacobian."""

import copy

import pytest
import torch
from models import cifar_resnet, mlp
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.estimators.directions import _of_products, angles
from torchgeom_probe.linalg.operator import MatrixOperator


def jacobian(model, layer, x):
    """[B, n, d] float64, divided by √n, by torch's own reverse mode."""
    model, found = copy.deepcopy(model).double(), []
    handle = dict(model.named_modules())[layer].register_forward_hook(lambda m, a, out: found.append(out))

    def features(sample):
        found.clear()
        model(sample[None])
        return found[0].flatten()

    rows = torch.stack([torch.func.jacrev(features)(sample).flatten(1) for sample in x.double()])
    handle.remove()
    return rows / rows.shape[1] ** 0.5


def sines(vectors, truth, values):
    """[B, k]: the sine of each vector's angle with the span of all true vectors whose values agree to 1e-4."""
    found = torch.empty(vectors.shape[:2])
    for b in range(len(vectors)):
        for i in range(vectors.shape[1]):
            same = (values[b] - values[b, i]).abs() < 1e-4 * values[b, 0]
            v = vectors[b, i].double()
            found[b, i] = (v - truth[b, same].mT @ (truth[b, same] @ v)).norm()
    return found


def compared(model, layers, x, estimator, k, *, smallest=False):
    report = tgp.measure(model, x, layers=layers, estimator=estimator)
    for layer in layers:
        _, values, truth = torch.linalg.svd(jacobian(model, layer, x), full_matrices=False)
        if smallest:
            values, truth = values.flip(1), truth.flip(1)
        g = report[layer]
        vectors = g.directions()
        assert vectors.shape == (k, *x.shape)
        flat = vectors.flatten(2).transpose(0, 1)
        torch.testing.assert_close(g.singular_values, values[:, :k], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(flat.norm(dim=2), torch.ones(len(x), k), check_dtype=False, rtol=1e-5, atol=1e-5)
        assert bool((flat.gather(2, flat.abs().argmax(2, keepdim=True)) > 0).all())
        measured = sines(flat, truth, values)
        assert bool((measured <= g.direction_error).all()), (layer, measured, g.direction_error)
        assert bool((g.direction_error < 1).any()), "the bound says something"
    return report


def test_the_largest_and_the_smallest_within_their_bounds():
    x = torch.randn(3, 5)
    compared(mlp().eval(), ["1", "3"], x, tgp.Directions(k=3), 3)
    compared(mlp().eval(), ["1", "3"], x, tgp.Directions(k=2, smallest=True), 2, smallest=True)
    report = tgp.measure(mlp().eval(), x, layers=["3"], estimator=tgp.Directions(k=3))
    assert torch.equal(report["3"].directions(2), report["3"].directions()[:2])


def test_by_products_and_saved(tmp_path):
    model = nn.Sequential(nn.Linear(300, 310), nn.Tanh(), nn.Linear(310, 290)).eval()
    report = compared(model, ["1", "2"], torch.randn(2, 300) / 4, tgp.Directions(k=3), 3)
    loaded = tgp.GeometryReport.load(report.save(tmp_path / "r.safetensors"))
    assert torch.equal(loaded["2"].directions(), report["2"].directions())


@pytest.mark.slow
def test_every_layer_of_a_cifar_resnet():
    layers = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    compared(cifar_resnet().eval(), layers, torch.randn(2, 3, 8, 8), tgp.Directions(k=4), 4)
    layers = ["conv1", "layer1", "layer2"]
    compared(cifar_resnet().eval(), layers, torch.randn(2, 3, 8, 8), tgp.Directions(3, smallest=True), 3, smallest=True)


def test_values_that_coincide_are_one_space():
    basis = torch.linalg.qr(torch.randn(2, 280, 280, dtype=torch.float64)).Q
    values = torch.cat([torch.tensor([5.0, 3.0, 3.0, 2.0]), torch.linspace(1, 0.1, 276)]).double()
    matrix = basis * values @ torch.linalg.qr(torch.randn(2, 280, 280, dtype=torch.float64)).Q.mT
    truth = torch.linalg.svd(matrix).Vh
    found, vectors, error = _of_products(MatrixOperator(matrix), 4, tol=1e-8, most=560, seed=0)
    torch.testing.assert_close(found, values[:4].expand(2, 4), rtol=1e-6, atol=1e-6)
    assert bool((sines(vectors, truth, values.expand(2, -1)) <= error).all())
    assert bool((error < 1e-3).all())
    alone = (vectors[:, 1:3] * truth[:, 1:3]).sum(2).abs()
    assert bool((alone < 0.999).any())  # by themselves they are not the same vectors
    apart = angles(torch.tensor([[2.0, 1.0]]), torch.zeros(1, 2), 1e-3, below=torch.tensor([0.99]))
    assert apart[0, 1] == 1.0  # a value so close below that it may be the same: nothing is known


def test_what_has_no_directions_says_so():
    model, x = mlp().eval(), torch.randn(3, 5)
    for estimator in ("exact", "subspace:2", "topk:2"):
        g = tgp.measure(model, x, layers=["1"], estimator=estimator)["1"]
        with pytest.raises(
            tgp.ProbeError, match=r"keeps none of its directions.\nMeasure with estimator=Directions\(k=4"
        ):
            g.directions()
    g = tgp.measure(model, x, layers=["1"], estimator="directions:2")["1"]
    for k in (0, 3):
        with pytest.raises(tgp.ProbeError, match="keeps 2 of its directions"):
            g.directions(k)
    with pytest.raises(tgp.ProbeError, match=r"n = 3 features and d = 5 inputs, so it does not feel 2 directions"):
        tgp.measure(model, x, layers=["4"], estimator=tgp.Directions(k=1, smallest=True))
    with pytest.raises(tgp.ProbeError, match=r"is 3 x 5 and has 3 singular values.\nWrite Directions\(k=3\)"):
        tgp.measure(model, x, layers=["4"], estimator=tgp.Directions(k=4))
    with pytest.raises(tgp.ProbeError, match="at least one direction is needed"):
        tgp.Directions(k=0)
    with pytest.raises(tgp.ProbeError, match="at least one product is needed"):
        tgp.Directions(max_products=0)
    x[1] = torch.nan
    g = tgp.measure(model, x, layers=["1"], estimator=tgp.Directions(k=2))["1"]
    assert g.directions().flatten(2).isnan().all(2).tolist() == [[False, True, False]] * 2


def test_the_directions_of_topk():
    model, x = nn.Sequential(nn.Linear(300, 310), nn.Tanh()).eval(), torch.randn(2, 300) / 4
    found = tgp.measure(model, x, layers=["1"], estimator=tgp.TopK(3))["1"].directions()
    best = tgp.measure(model, x, layers=["1"], estimator=tgp.Directions(3))["1"].directions()
    assert (found * best).flatten(2).sum(2)[0].min() > 0.99
