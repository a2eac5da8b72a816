"""Padding, resampling and rearranging of images, against torch.func.jvp."""

from __future__ import annotations

from dual.rules.comparison import IMAGE, SIGNAL, D, P, agreement, agreement_with_differences, call

CASES = {
    "F.unfold": [call(IMAGE, 3, padding=1), call(D(3, 7, 11), (2, 3))],
    "im2col": [call(IMAGE, (3, 3), (1, 1), (1, 1), (2, 2))],
    "F.fold": [call(D(2, 12, 60), (7, 11), 2), call(D(12, 60), (7, 11), 2)],
    "col2im": [call(D(2, 12, 60), (7, 11), (2, 2), (1, 1), (0, 0), (1, 1))],
    "pixel_shuffle": [call(D(2, 12, 3, 5), 2), call(D(12, 3, 5), 2), call(D(12, 3, 5), upscale_factor=2)],
    "pixel_unshuffle": [call(D(2, 3, 4, 6), 2), call(D(2, 3, 4, 6), downscale_factor=2)],
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

PLACES, VOLUME_PLACES = D(2, 4, 5, 2, low=-1.2, high=1.2), D(2, 2, 4, 5, 3, low=-1.2, high=1.2)
DIFFERENCES = {
    "F.grid_sample": [
        call(IMAGE, PLACES, align_corners=False),
        call(P(2, 3, 7, 11), PLACES, "bicubic", "border", True),
        call(IMAGE, P(2, 4, 5, 2, low=-1.2, high=1.2), padding_mode="reflection", align_corners=False),
        call(D(2, 3, 5, 7, 3), VOLUME_PLACES, mode="nearest", align_corners=True),
    ],
    "grid_sampler": [call(IMAGE, PLACES, 0, 0, False), call(D(2, 3, 5, 7, 3), VOLUME_PLACES, 0, 1, True)],
    "grid_sampler_2d": [call(IMAGE, PLACES, 2, 1, False)],
    "grid_sampler_3d": [call(D(2, 3, 5, 7, 3), VOLUME_PLACES, 0, 2, False)],
}

test_grid_sampling = agreement_with_differences(DIFFERENCES)
