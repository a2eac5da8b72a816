"""Engines that differentiate with torch's own autograd take a cut-off tensor for a constant; here that is refused instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchgeom_probe.dual.tensor import CUTS, ESCAPES, name_of
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor


class _RefusedCuts(TorchFunctionMode):
    def __init__(self, carries: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.carries = carries

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (func in CUTS or func in ESCAPES) and args and isinstance(args[0], Tensor) and self._cut(args[0]):
            raise ProbeError(
                f"the tangent was lost: the forward pass calls .{name_of(func)}() on a tensor that depends on the input, which "
                "autograd would take for a constant.\nTake it out of the forward pass, or measure with engine='fused', which "
                "follows what is made of it and refuses only a layer that depends on it."
            )
        return func(*args, **(kwargs or {}))

    def _cut(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and self.carries(tensor)


@contextlib.contextmanager
def refused_cuts(carries: Callable[[Tensor], bool]) -> Iterator[None]:
    """Refuse ``detach``, ``.data``, ``.item()`` … in the body on tensors of which ``carries`` says that they hold a derivative."""
    with _RefusedCuts(carries):
        yield


class GradientsOff(TorchFunctionMode):
    """Refuses ops on tensors that carry a gradient while gradients are switched off inside the model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, Tensor)
            and out.is_floating_point()
            and not torch.is_grad_enabled()
            and not out.requires_grad
        ):
            if any(isinstance(a, Tensor) and a.requires_grad for a in args):
                raise ProbeError(
                    f"the tangent was lost: the forward pass runs {name_of(func)!r} under torch.no_grad() or torch.inference_mode(), "
                    "where reverse mode sees nothing.\nMeasure with engine='fused', which does not mind, or take the block out."
                )
        return out
