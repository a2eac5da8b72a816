"""Padding, resampling and rearranging of images: linear in the image."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from torchgeom_probe.dual.registry import (
    folded,
    ndim_of,
    on_batch,
    on_rows,
    primal_of,
    rows_like,
    rows_of,
    rule,
    rule_of_each,
)
from torchgeom_probe.dual.tensor import DualTensor, Rule

aten = torch.ops.aten

rule_of_each("F.unfold nn.im2col")(functools.partial(on_batch, ndim=4))
rule_of_each("F.fold nn.col2im")(functools.partial(on_batch, ndim=3))
rule_of_each("channel_shuffle")(on_rows)


@rule_of_each("pixel_shuffle pixel_unshuffle")
def _pixel_shuffle(op: Any) -> Rule:
    # these take any number of axes in front of the last three
    return lambda input, *factor, **named: DualTensor(op(input.buffer, *factor, **named))


@rule("interpolate")
def _interpolate(input: DualTensor, *args: Any, **kwargs: Any) -> Any:
    # linear in the input in every mode
    if ndim_of(input) < 3:
        return NotImplemented
    return folded(input, lambda rows: F.interpolate(rows, *args, **kwargs))


@rule("pad")
def _pad(input: DualTensor, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    if mode == "constant":
        if len(pad) > 2 * ndim_of(input):
            return NotImplemented
        out = F.pad(input.buffer, pad)
        if value:
            out[0].copy_(F.pad(input.primal, pad, value=value))
        return DualTensor(out)
    if ndim_of(input) < len(pad) // 2 + 2:
        return NotImplemented
    return folded(input, lambda rows: F.pad(rows, pad, mode=mode))


@rule("grid_sampler grid_sampler_2d grid_sampler_3d")
def _grid_sampler(input: Any, grid: Any, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Any:
    # y' = the same sample of the image's tangents + Σ_d ∂y/∂grid_d grid'_d
    how = interpolation_mode, padding_mode, align_corners
    rows = rows_of(input, grid)
    image, places = primal_of(input), primal_of(grid)
    value = torch.grid_sampler(image, places, *how)
    out = rows_like(value, rows)
    out[0].copy_(value)
    out[1:].zero_()
    if isinstance(input, DualTensor):
        for row, tangent in enumerate(input.tangents, start=1):
            out[row].copy_(torch.grid_sampler(tangent, places, *how))
    if isinstance(grid, DualTensor):
        # torch's backward kernel sums over the channels: each of them becomes a sample of its own
        channels = image.shape[1]
        alone = image.flatten(0, 1).unsqueeze(1)
        backward = aten.grid_sampler_2d_backward if image.ndim == 4 else aten.grid_sampler_3d_backward
        repeated = places.repeat_interleave(channels, 0)
        one = value.new_ones(()).expand(len(alone), 1, *value.shape[2:])
        slope = backward(one.contiguous(), alone, repeated, *how, [False, True])[1].unflatten(0, image.shape[:2])
        out[1:].add_((slope * grid.tangents.unsqueeze(2)).sum(-1))
    return DualTensor(out)


@rule("F.grid_sample")
def _grid_sample(
    input: Any, grid: Any, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool | None = None
) -> Any:
    modes, paddings = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
    return _grid_sampler(input, grid, modes.index(mode), paddings.index(padding_mode), bool(align_corners))
