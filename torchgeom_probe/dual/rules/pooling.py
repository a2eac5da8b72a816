"""Pooling by chosen places: what a maximum of random windows picked, and putting values back where a maximum was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from torchgeom_probe.dual.registry import any_dual, ndim_of
from torchgeom_probe.dual.rules.convolution import _max_pooling
from torchgeom_probe.dual.tensor import RULES, DualTensor

for _spatial in (2, 3):
    _op = getattr(F, f"fractional_max_pool{_spatial}d")
    # The windows are drawn once, for the primal, as in a plain pass: the tangents follow its winners.
    RULES[_op] = _max_pooling(_op, _spatial, with_indices=False)
    RULES[getattr(F, f"fractional_max_pool{_spatial}d_with_indices")] = _max_pooling(
        _op, _spatial, with_indices=True
    )


def _max_unpooling(op: Callable[..., Any], spatial: int) -> Callable[..., Any]:
    def push(input: Any, indices: Any, *args: Any, **kwargs: Any) -> Any:
        # linear in the values, the places given: the same places in every row
        if not isinstance(input, DualTensor) or any_dual(indices) or ndim_of(input) != spatial + 2:
            return NotImplemented
        rows = input.buffer.shape[0]
        places = indices.expand(rows, *indices.shape).flatten(0, 1)
        return DualTensor(op(input.buffer.flatten(0, 1), places, *args, **kwargs).unflatten(0, (rows, -1)))

    return push


for _spatial in (1, 2, 3):
    _op = getattr(F, f"max_unpool{_spatial}d")
    RULES[_op] = _max_unpooling(_op, _spatial)
