"""Arguments whose derivative torch drops without a word, in every engine, and changes that a tensor cannot follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from torchgeom_probe.dual.ops import name_of, ops_named
from torchgeom_probe.dual.registry import any_dual, rule_of_each
from torchgeom_probe.dual.tensor import RULES, DualTensor, Rule
from torchgeom_probe.errors import EngineRefusal, ProbeError

#: ops → of the arguments by name, the one that torch takes for a constant
DROPPED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "F.cross_entropy F.nll_loss F.linear_cross_entropy": lambda given: given.get("weight"),
    "F.soft_margin_loss": lambda given: given.get("target"),
    "F.embedding": lambda given: None if given.get("max_norm") is None else given["weight"],
    "cov": lambda given: given.get("aweights"),
}


def _drops(op: Any, argument: Callable[[dict[str, Any]], Any]) -> Rule:
    names = list(inspect.signature(op).parameters) if inspect.isfunction(op) else ["input"]

    def push(*args: Any, **kwargs: Any) -> Any:
        if any_dual(argument(dict(zip(names, args, strict=False)) | kwargs)):
            raise ProbeError(
                f"torch drops the derivative of {name_of(op)!r} by one of its arguments (a class weight, a target, a"
                " table that max_norm= rescales), and here it depends on the input: any engine would read it as zero.\n"
                "Write this op out in the model with elementwise ones."
            )
        return NotImplemented

    return push


for _names, _argument in DROPPED.items():
    for _op in ops_named(_names):
        RULES[_op] = _drops(_op, _argument)


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
