"""Whole models: the dual pass against torch.func.vmap(jvp), in float64, with no op left to the fallback."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import QUICK, TIMM, TORCHVISION, made
from torch import nn

from torchgeom_probe.dual import DualTensor, recording
from torchgeom_probe.model.isolation import measuring


def perturbed(model: nn.Module) -> nn.Module:
    """Move every parameter that starts at zero, where a wrong tangent would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() or parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def agrees(model: nn.Module, size: int) -> None:
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    v = torch.randn(2, *x.shape, dtype=torch.float64)
    with measuring(model):
        with recording() as used:
            out = model(DualTensor(torch.cat([x[None], v])))
        value = model(x)
        want = torch.func.vmap(lambda t: torch.func.jvp(model, (x,), (t,))[1], randomness="same")(v)
    assert not used["fallback"], used["fallback"]
    assert want.norm() > 0
    torch.testing.assert_close(out.primal, value, rtol=1e-9, atol=1e-9 * value.abs().max().item())
    assert (out.tangents - want).norm() <= 1e-9 * want.norm()


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in (*TIMM, *(f"tv:{n}" for n in TORCHVISION)))]
)
def test_models(name: str) -> None:
    model, size = made(name)
    agrees(perturbed(model), size)


class Recurrent(nn.Module):
    def __init__(self, cell: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell = cell(7, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x.flatten(1, 2)[..., :7])[0]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "transformer": lambda: nn.Sequential(
        nn.Flatten(1, 2),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False),
    ),
    "decoder": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 5, 2, 2), nn.InstanceNorm2d(5, affine=True), nn.PReLU(5), nn.Upsample(scale_factor=2)
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    agrees(perturbed(MODULES[name]()), 8)


@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_cells(cell: Callable[..., nn.Module]) -> None:
    model = Recurrent(cell).double().eval()
    x, v = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    with measuring(model):
        out = model(DualTensor(torch.cat([x[None], v])))
        want = torch.func.vmap(lambda t: torch.func.jvp(model, (x,), (t,))[1])(v)
    torch.testing.assert_close(out.tangents, want)
