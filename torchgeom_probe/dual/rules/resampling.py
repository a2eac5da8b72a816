"""Padding, resampling and rearranging of images: linear in the image."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F

from torchgeom_probe.dual.registry import folded, ndim_of, on_batch, on_rows, rule, rule_of_each
from torchgeom_probe.dual.tensor import DualTensor, Rule

rule_of_each("F.unfold nn.im2col")(functools.partial(on_batch, ndim=4))
rule_of_each("F.fold nn.col2im")(functools.partial(on_batch, ndim=3))
rule_of_each("channel_shuffle grid_sample grid_sampler")(on_rows)


@rule_of_each("pixel_shuffle pixel_unshuffle")
def _pixel_shuffle(op: Any) -> Rule:
    # these take any number of axes in front of the last three
    return lambda input, factor: DualTensor(op(input.buffer, factor))


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
