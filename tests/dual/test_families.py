"""Whole models: the dual pass against torch.func.vmap(jvp), in float64, with no op left to the fallback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torchgeom_probe.dual import DualTensor, recording
from torchgeom_probe.footprint import measuring

#: name → (smallest handy input size, the architecture's own arguments for it)
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {}),
    "resnet34": (32, {}),
    "resnet50": (32, {}),
    "resnet50d": (32, {}),
    "seresnet50": (32, {}),
    "resnext50_32x4d": (32, {}),
    "regnety_008": (32, {}),
    "convnext_tiny": (32, {}),
    "efficientnet_b0": (32, {}),
    "efficientnet_lite0": (32, {}),
    "densenet121": (32, {}),
    "vgg11_bn": (32, {}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64}),
    "mixer_s16_224": (32, {"img_size": 32}),
    "levit_128s": (224, {}),
    "efficientformer_l1": (224, {}),
    "efficientformerv2_s0": (224, {}),
    "edgenext_xx_small": (64, {}),
    "eca_nfnet_l0": (32, {}),
    "dm_nfnet_f0": (32, {}),
    "tresnet_m": (64, {}),
    "inception_v3": (96, {}),
    "poolformer_s12": (32, {}),
    "hrnet_w18_small": (64, {}),
    "fastvit_t8": (64, {}),
    "gcvit_xxtiny": (224, {}),
    "mobilenetv3_small_100": (32, {}),
    "vit_tiny_patch16_224": (32, {"img_size": 32}),
    "deit_tiny_patch16_224": (32, {"img_size": 32}),
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32}),
    "vit_small_patch14_dinov2": (28, {"img_size": 28}),
    "eva02_tiny_patch14_224": (28, {"img_size": 28}),
    "vit_small_patch16_rope_224": (32, {"img_size": 32}),
    "vit_small_patch16_rope_mixed_224": (32, {"img_size": 32}),
    "naflexvit_base_patch16_gap": (32, {}),
    "maxvit_pico_rw_256": (64, {"img_size": 64}),
    "coatnet_pico_rw_224": (64, {"img_size": 64}),
    "xcit_nano_12_p16_224": (32, {"img_size": 32}),
    "mobilevit_xxs": (64, {}),
    "pvt_v2_b0": (32, {}),
}
TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {}),
    "resnet50": (32, {}),
    "inception_v3": (96, {"init_weights": True}),
    "vit_b_16": (32, {"image_size": 32}),
}
#: timm's own miniatures: a block or two of each family.
QUICK: dict[str, tuple[int, dict[str, Any]]] = {
    "test_resnet": (32, {}),
    "test_convnext": (32, {}),
    "test_efficientnet": (32, {}),
    "test_efficientnet_gn": (32, {}),
    "test_nfnet": (32, {}),
    "test_byobnet": (32, {}),
    "test_vit": (32, {"img_size": 32}),
    "test_maxvit": (64, {"img_size": 64}),
    "mobilenetv3_small_050": (32, {}),
}


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


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in TIMM)])
def test_timm_models(name: str) -> None:
    timm = pytest.importorskip("timm")
    size, arguments = (QUICK | TIMM)[name]
    agrees(perturbed(timm.create_model(name, pretrained=False, num_classes=5, **arguments)), size)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    size, arguments = TORCHVISION[name]
    agrees(perturbed(getattr(models, name)(num_classes=5, **arguments)), size)


class Recurrent(nn.Module):
    def __init__(self, cell: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell = cell(7, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x.flatten(1, 2)[..., :7])[0]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "transformer": lambda: nn.Sequential(
        nn.Flatten(1, 2),
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ),
    ),
    "decoder": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 5, 2, 2),
        nn.InstanceNorm2d(5, affine=True),
        nn.PReLU(5),
        nn.Upsample(scale_factor=2),
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
