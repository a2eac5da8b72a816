"""Padding, resampling and rearranging of images, against torch.func.jvp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dual.rules.comparison import IMAGE, SIGNAL, D, agreement, call, dual

CASES = {
    "F.unfold": [call(IMAGE, 3, padding=1), call(D(3, 7, 11), (2, 3))],
    "im2col": [call(IMAGE, (3, 3), (1, 1), (1, 1), (2, 2))],
    "F.fold": [call(D(2, 12, 60), (7, 11), 2), call(D(12, 60), (7, 11), 2)],
    "col2im": [call(D(2, 12, 60), (7, 11), (2, 2), (1, 1), (0, 0), (1, 1))],
    "pixel_shuffle": [call(D(2, 12, 3, 5), 2), call(D(12, 3, 5), 2)],
    "pixel_unshuffle": [call(D(2, 3, 4, 6), 2)],
    "channel_shuffle": [call(D(2, 6, 3, 5), 3)],
    "interpolate": [
        call(IMAGE, scale_factor=2),
        call(IMAGE, (5, 13), mode="bilinear", align_corners=True),
        call(IMAGE, (5, 13), mode="bicubic", antialias=True),
        call(SIGNAL, 7, mode="linear"),
    ],
    "pad": [
        call(IMAGE, (1, 2)),
        call(IMAGE, (1, 2, 0, 3), "constant", 1.5),
        call(IMAGE, (1, 2, 0, 3), mode="reflect"),
        call(SIGNAL, (1, 2), "replicate"),
        call(D(7), (1, 2)),
    ],
}

test_rule_agrees_with_jvp = agreement(CASES)


def test_grid_sampling_is_linear_in_the_image() -> None:
    # torch has no forward derivative of it to compare with
    x, t = torch.randn(2, 3, 5, 7), torch.randn(3, 2, 3, 5, 7)
    grid = torch.rand(2, 3, 2, 2) * 2 - 1
    for op, arguments in ((F.grid_sample, ("bilinear", "zeros", False)), (torch.grid_sampler, (0, 0, False))):
        out = op(dual(x, t), grid, *arguments)
        for row, of in zip(out.buffer, [x, *t], strict=True):
            torch.testing.assert_close(row, op(of, grid, *arguments))
