"""Pooling by averages and by the places of a maximum, against torch.func.jvp."""

from __future__ import annotations

import torch
from dual.rules.comparison import IMAGE, SIGNAL, VOLUME, D, P, agreement, call


def places(count: int, *shape: int) -> torch.Tensor:
    """Places in a plane of so many, none of them twice in one plane."""
    generator = torch.Generator().manual_seed(7)
    chosen = [torch.randperm(count, generator=generator) for _ in range(shape[0] * shape[1])]
    size = torch.Size(shape[2:]).numel()
    return torch.stack([each[:size] for each in chosen]).reshape(shape)


CASES = {
    "avg_pool1d": [call(SIGNAL, 3, 2), call(D(3, 11), 3)],
    "avg_pool2d": [call(IMAGE, 3, 2, 1), call(IMAGE, 2, ceil_mode=True, count_include_pad=False), call(D(3, 7, 11), 3)],
    "avg_pool3d max_pool3d max_pool3d_with_indices": [call(VOLUME, 2)],
    "adaptive_avg_pool1d adaptive_max_pool1d adaptive_max_pool1d_with_indices": [call(SIGNAL, 3)],
    "adaptive_avg_pool2d": [call(IMAGE, (3, 2)), call(IMAGE, 1)],
    "F.adaptive_avg_pool2d": [call(IMAGE, (3, None))],
    "adaptive_avg_pool3d adaptive_max_pool3d adaptive_max_pool3d_with_indices": [call(VOLUME, (2, 3, 1))],
    "max_pool1d max_pool1d_with_indices": [call(SIGNAL, 3, 2)],
    "max_pool2d": [call(IMAGE, 3, 2, 1), call(IMAGE, 2, ceil_mode=True)],
    "adaptive_max_pool2d adaptive_max_pool2d_with_indices": [call(IMAGE, (3, 2))],
    "max_pool2d_with_indices": [call(IMAGE, 3, 2, 1)],
    "fractional_max_pool2d fractional_max_pool2d_with_indices": [
        call(IMAGE, 2, (3, 5), _random_samples=P(2, 3, 2, low=0, high=1))
    ],
    "fractional_max_pool3d fractional_max_pool3d_with_indices": [
        call(VOLUME, 2, (3, 5, 1), _random_samples=P(2, 3, 3, low=0, high=1))
    ],
    "max_unpool1d": [call(D(2, 3, 4), places(8, 2, 3, 4), 2)],
    "max_unpool2d": [
        call(D(2, 3, 2, 3), places(24, 2, 3, 2, 3), 2),
        call(D(2, 3, 2, 3), places(24, 2, 3, 2, 3), 2, output_size=(5, 7)),
    ],
    "max_unpool3d": [call(D(2, 3, 2, 2, 1), places(32, 2, 3, 2, 2, 1), 2)],
}

test_rule_agrees_with_jvp = agreement(CASES)
