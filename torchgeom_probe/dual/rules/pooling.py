"""Pooling by averages, by the places of a maximum, and putting values back where a maximum was."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F

from torchgeom_probe.dual.registry import any_dual, folded, ndim_of, on_batch, register, rows_like, rule_of_each
from torchgeom_probe.dual.tensor import RULES, DualTensor, Rule

for _spatial in (1, 2, 3):
    rule_of_each(f"avg_pool{_spatial}d adaptive_avg_pool{_spatial}d")(functools.partial(on_batch, ndim=_spatial + 2))


def _max_pooling(pool: Any, spatial: int, *, with_indices: bool) -> Rule:
    # behind the input, as the with_indices form has them
    names = list(inspect.signature(getattr(F, f"{pool.__name__}_with_indices")).parameters)[1:]

    def push(input: Any, *args: Any, **kwargs: Any) -> Any:
        # y = p[argmax]; y' = t[argmax]: the primal's winners, gathered from the tangents
        if not isinstance(input, DualTensor) or ndim_of(input) != spatial + 2:
            return NotImplemented
        kwargs |= dict(zip(names, args, strict=False))
        return_indices = kwargs.pop("return_indices", False)
        value, index = pool(input.primal, return_indices=True, **kwargs)
        rows, start = input.buffer.shape[0], -spatial
        out = rows_like(value, rows)
        out[0].copy_(value)
        winners = index.flatten(start).expand(rows - 1, *index.shape[:start], -1)
        out[1:] = input.tangents.flatten(start).gather(-1, winners).view(rows - 1, *index.shape)
        return (DualTensor(out), index) if return_indices or with_indices else DualTensor(out)

    return push


# The windows of fractional pooling are drawn once, for the primal, as in a plain pass: the tangents follow its winners.
for _name in (
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
    " fractional_max_pool2d fractional_max_pool3d"
).split():
    _op, _spatial = getattr(F, _name), int(_name[-2])
    register(_max_pooling(_op, _spatial, with_indices=False), f"F.{_name}")
    register(_max_pooling(_op, _spatial, with_indices=True), f"F.{_name}_with_indices")
for _spatial in (1, 2, 3):
    RULES[getattr(torch, f"max_pool{_spatial}d")] = RULES[getattr(F, f"max_pool{_spatial}d")]


def _max_unpooling(op: Any, spatial: int) -> Rule:
    def push(input: Any, indices: Any, *args: Any, **kwargs: Any) -> Any:
        # linear in the values, the places given: the same places in every row
        if not isinstance(input, DualTensor) or any_dual(indices) or ndim_of(input) != spatial + 2:
            return NotImplemented
        places = indices.expand(input.buffer.shape[0], *indices.shape).flatten(0, 1)
        return folded(input, lambda rows: op(rows, places, *args, **kwargs))

    return push


for _spatial in (1, 2, 3):
    rule_of_each(f"F.max_unpool{_spatial}d")(functools.partial(_max_unpooling, spatial=_spatial))
