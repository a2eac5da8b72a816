"""45 models at initialisation and after training: their stages, and volumes that are float64's.

The reference shares nothing with the probe: a float64 copy of the model, ``torch.func.vmap`` of ``torch.func.jvp``
over directions of our own, and an SVD of the tangents that plain hooks return.

Legend of axes: K directions, B samples, N features of a layer.
"""

from __future__ import annotations

import copy

import pytest
import torch
from families import QUICK, TIMM, TORCHVISION, made
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import update_bn
from torch.utils._pytree import tree_leaves
from torchgeom_probe.integrations.timm import stage_layers

import torchgeom_probe as tgp

K, B = 3, 2
FAMILIES = (*TIMM, *(f"tv:{name}" for name in TORCHVISION))

# Nats, of a sum of K logarithms. Measured over the 45 models, untrained and trained: in float64 1e-9 at most; in
# float32 mostly below 1e-6, and up to 7e-3 where the float32 network itself differs from the float64 one: a ReLU whose
# input is zero up to rounding is open in one and shut in the other, which one depends on the processor. That is the
# bad luck of a sample; a wrong rule would be off at every one, so in float32 one of the two samples may be, and by so
# much.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-3}
UNLUCKY = 1e-2


def directions(x):
    """K orthonormal directions of each sample's own, the same numbers in float32 and float64."""
    frames = torch.linalg.qr(torch.randn(len(x), x[0].numel(), K, dtype=torch.float64))[0]
    return frames.permute(2, 0, 1).reshape(K, *x.shape).float()


def reference(model, layers, x, v):
    """Layer → [B, K] float64 singular values of JV/√N."""
    exact = copy.deepcopy(model).double().eval().requires_grad_(False)

    def outputs(z):
        seen = {}
        hooks = [
            exact.get_submodule(layer).register_forward_hook(
                lambda module, args, output, layer=layer: seen.__setitem__(layer, output)
            )
            for layer in layers
        ]
        exact(z)
        for hook in hooks:
            hook.remove()
        # a layer of several outputs (hrnet's branches) has the features of all of them
        return [torch.cat([leaf.flatten(1) for leaf in tree_leaves(seen[layer])], 1) for layer in layers]

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it has no forward derivative, fused attention neither
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            pushed = torch.func.vmap(lambda t: torch.func.jvp(outputs, (x.double(),), (t,))[1], randomness="same")(
                v.double()
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return {
        layer: torch.linalg.svdvals(tangents_KBN.permute(1, 2, 0) / tangents_KBN.shape[2] ** 0.5)
        for layer, tangents_KBN in zip(layers, pushed, strict=True)
    }


def train(model, size, steps):
    """A few steps of SGD on noise; then running statistics that are these weights' own.

    The statistics lag tens of steps behind the weights at batch normalisation's own momentum: in eval mode such a
    network saturates or collapses, and its volumes are -inf by right (README).
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(4, 3, size, size)), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    update_bn((torch.randn(4, 3, size, size) for _ in range(2)), model)


def agrees(model, size):
    """Measure every stage, in float32 and in float64, and compare with the reference."""
    layers = stage_layers(model)
    assert len(layers) >= 3
    x = torch.randn(B, 3, size, size)
    v = directions(x)
    expected = reference(model, layers, x, v)
    volumes = {}
    for dtype, tolerance in TOLERANCE.items():
        measured = copy.deepcopy(model).to(dtype)
        with tgp.GeometryProbe(measured, layers=layers, estimator=tgp.Subspace()) as probe:
            report = probe.measure(x.to(dtype), directions=v.to(dtype))
        assert sorted(report) == sorted(layers)
        for layer in layers:
            assert report[layer].engine == "fused"
            assert report[layer].rank.tolist() == [K] * B
            volumes[layer] = report[layer].log_volume.double()
            assert volumes[layer].isfinite().all()
            wanted = expected[layer].log().sum(-1)
            error = (volumes[layer] - wanted).abs()
            assert error.min() < tolerance, (layer, dtype, error)
            assert error.max() < (tolerance if dtype == torch.float64 else UNLUCKY), (layer, dtype, error)
    return volumes


@pytest.mark.parametrize(
    "name",
    [
        *("test_resnet", "test_efficientnet", "test_vit"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (*QUICK, *FAMILIES)
            if name not in ("test_resnet", "test_efficientnet", "test_vit")
        ),
    ],
)
@pytest.mark.filterwarnings(
    r"ignore:There is a performance drop because we have not yet implemented"
)  # the reference's
def test_volumes_at_initialisation_and_after_training_are_those_of_float64(name):
    model, size = made(name)
    before = agrees(model, size)
    train(model, size, steps=5)
    after = agrees(model, size)
    assert all(not torch.equal(before[layer], after[layer]) for layer in before), "training moved no weight"


def test_these_are_45_models():
    assert len(set(FAMILIES)) == 45
