"""How images lie in memory during a pass: channels last where oneDNN's convolutions run faster so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from torchgeom_probe.shapes import Tensor

#: Measured on 11 timm models and CIFAR ResNets: below the first, and from the second on, channels last are the faster
#: layout.
_CACHED_WEIGHTS = 2_000_000
_WEIGHTS_A_PIXEL = 60


@dataclass(frozen=True)
class Layout:
    """What a model's convolutions say about the layout that suits them.

    Attributes:
        convolves: whether it has 2-d convolutions.
        wide_weights: numbers in the weights of those whose kernel is larger than a pixel; the others lie the same
            either way.
    """

    convolves: bool
    wide_weights: int

    @staticmethod
    def of(model: nn.Module) -> Layout:
        """Read it off the modules' sizes: to read a weight may be to compute it."""
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        wide = sum(
            c.out_channels * (c.in_channels // c.groups) * math.prod(c.kernel_size)
            for c in convolutions
            if tuple(c.kernel_size) != (1, 1)
        )
        return Layout(bool(convolutions), wide)

    def suits(self, images: Tensor) -> bool:
        """Whether these images [B, C, H, W] are for convolutions that run faster so: oneDNN's, on a CPU."""
        if images.ndim != 4 or images.device.type != "cpu" or images.dtype not in (torch.float32, torch.bfloat16):
            return False
        return self.convolves and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)

    def pays(self, images: Tensor, rows: int) -> bool:
        """Whether so many rows are worth laying the weights anew in every pass; what stays in the cache is free."""
        pixels = rows * images.shape[-2:].numel()
        return self.wide_weights <= _CACHED_WEIGHTS or _WEIGHTS_A_PIXEL * pixels >= self.wide_weights


def weights_with_channels_last(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights that many passes over such images would each lay anew, by name."""
    owners: dict[int, tuple[str, Tensor]] = {}  # one name for each: torch gives a tied weight to all that have it
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and tuple(module.kernel_size) != (1, 1):
            weight = module._parameters.get("weight")
            if type(weight) is nn.Parameter and not weight.is_meta:  # offloaded: it is there in its own forward alone
                owners.setdefault(id(weight), (f"{name}.weight" if name else "weight", weight))
    return {name: w.detach().contiguous(memory_format=torch.channels_last) for name, w in owners.values()}
