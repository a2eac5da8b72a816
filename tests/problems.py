"""Jacobians with a known spectrum, as models; MATH sections 5 and 6 name the five kinds."""

import itertools
import math

import pytest
import torch
from torch import nn


def orthonormal(rows, columns, generator):
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def spectrum(kind, count):
    i = torch.arange(1, count + 1, dtype=torch.float64)
    return {"geometric": 10 ** (-i / 4), "harmonic": 1 / i, "flat": torch.ones(count, dtype=torch.float64)}[kind]


def linear(sigma, n, d, *, seed=0, dtype=torch.float32):
    """A linear layer d → n whose singular values are ``sigma``."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    left, right = orthonormal(n, len(sigma), generator), orthonormal(d, len(sigma), generator)
    model = nn.Linear(d, n, bias=False, dtype=dtype)
    model.weight.data.copy_((left * sigma) @ right.T)
    return model


def resnet(widths=(8, 16, 24, 32), blocks=1):
    """A narrow GELU ResNet for small images: the shape of the paper's network."""

    class Block(nn.Module):
        def __init__(self, before, after, stride):
            super().__init__()
            self.one = nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after))
            self.two = nn.Sequential(nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after))
            self.short = nn.Conv2d(before, after, 1, stride, bias=False)

        def forward(self, x):
            y = nn.functional.gelu(self.one(x))
            return nn.functional.gelu(self.two(y) + self.short(x))

    stages, before = [nn.Conv2d(3, widths[0], 3, 1, 1)], widths[0]
    for number, width in enumerate(widths):
        stages.append(
            nn.Sequential(
                *(Block(before if b == 0 else width, width, 2 if b == 0 and number else 1) for b in range(blocks))
            )
        )
        before = width
    return nn.Sequential(*stages).eval()


def mlp(sizes):
    """A GELU MLP at initialisation."""
    layers = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.GELU()]
    for layer in layers[::2]:
        nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
    return nn.Sequential(*layers).eval()


KINDS = ("geometric", "harmonic", "gaussian", "resnet", "mlp")
FAST = [*KINDS[:3], pytest.param("resnet", marks=pytest.mark.slow), "mlp"]


def problem(kind, *, seed=0, n=128, d=192, dtype=torch.float32, batch=1):
    """(model, layer, x) of one of the five kinds."""
    torch.manual_seed(seed)
    if kind == "gaussian":
        model = nn.Linear(d, n, bias=False)
        model.weight.data.normal_(std=1 / math.sqrt(d))
        layer, shape = "", (d,)
    elif kind == "resnet":
        model, layer, shape = resnet((4, 8, 8, 8)), "4", (3, 16, 16)
    elif kind == "mlp":
        model, layer, shape = mlp((d, n, n, n)), "5", (d,)
    else:
        model, layer, shape = linear(spectrum(kind, n), n, d, seed=seed), "", (d,)
    return model.to(dtype), layer, torch.randn(batch, *shape).to(dtype)
