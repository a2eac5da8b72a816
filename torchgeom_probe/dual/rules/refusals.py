"""Arguments whose derivative torch drops without a word, in every engine, and changes that a tensor cannot follow."""

from __future__ import annotations

from typing import Any

import torch

from torchgeom_probe.dual.ops import DROPPED, refuse_dropped
from torchgeom_probe.dual.registry import any_dual, rule_of_each
from torchgeom_probe.dual.tensor import RULES, DualTensor, Rule
from torchgeom_probe.errors import EngineRefusal


def _drops(op: Any) -> Rule:
    def push(*args: Any, **kwargs: Any) -> Any:
        refuse_dropped(op, args, kwargs, any_dual)
        return NotImplemented

    return push


for _op in DROPPED:
    RULES[_op] = _drops(_op)


@rule_of_each("t_ Tensor.transpose_ Tensor.swapaxes_ Tensor.swapdims_ Tensor.squeeze_ Tensor.unsqueeze_ as_strided_")
def _shape_in_place(op: Any) -> Rule:
    def push(input: DualTensor, *args: Any, **kwargs: Any) -> Any:
        # a view would keep its shape, and so must the tensor, whose shape is fixed
        seen = RULES[getattr(torch.Tensor, op.__name__[:-1])](input, *args, **kwargs)
        if seen.shape == input.shape and seen.stride() == input.stride():
            return input
        raise EngineRefusal(
            f"{op.__name__!r} changes the shape of a tensor in place. Use the form without the underscore."
        )

    return push
