"""The 45 models that the project answers for, each in its smallest handy form, and timm's miniatures of them."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

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
#: torchvision's, in the same way.
TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {}),
    "resnet50": (32, {}),
    "inception_v3": (96, {"init_weights": True, "aux_logits": False}),
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


def made(name: str, *, num_classes: int = 5) -> tuple[nn.Module, int]:
    """The model of that name (``tv:`` for torchvision's), untrained, and the size of its square images."""
    library, _, inner = name.rpartition(":")
    if library == "tv":
        import torchvision

        size, arguments = TORCHVISION[inner]
        return getattr(torchvision.models, inner)(num_classes=num_classes, **arguments), size
    size, arguments = (QUICK | TIMM)[name]
    return timm.create_model(name, pretrained=False, num_classes=num_classes, **arguments), size
