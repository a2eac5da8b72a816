"""Engines that lean on torch's autograd take a cut-off tensor for a constant; here that is refused."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from torchgeom_probe.dual.ops import CONSTANT, DETACHES, ESCAPES, MADE_LIKE, mutates, name_of
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor

_BATCH_NORMS = {torch.nn.functional.batch_norm, torch.batch_norm}


class _Refusals(TorchFunctionMode):
    def __init__(self, carries: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.carries = carries

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DETACHES or func in ESCAPES:
            target = args[0] if args else kwargs.get("input")
            if isinstance(target, Tensor) and target.is_floating_point() and self.carries(target):
                raise ProbeError(
                    f"the tangent was lost: the forward pass calls .{name_of(func)}() on a tensor that depends on the "
                    "input, which "
                    "autograd would take for a constant.\n"
                    "Take it out of the forward pass, or measure with engine='fused', which "
                    "follows what is made of it and refuses only a layer that depends on it."
                )
        if func in _BATCH_NORMS and (kwargs.get("training") or (len(args) > 5 and args[5])):
            raise ProbeError(
                "batch normalisation by the statistics of the batch couples the samples: no sample has a metric of its "
                "own.\n"
                "Measure in eval mode (mode='eval') with running statistics (track_running_stats=True)."
            )
        return func(*args, **kwargs)


@contextlib.contextmanager
def refused_cuts(carries: Callable[[Tensor], bool]) -> Iterator[None]:
    """Refuse ``detach``, ``.data``, ``.item()`` … in the body, on tensors that carry a derivative."""
    with _Refusals(carries):
        yield


class GradientsOff(TorchFunctionMode):
    """Refuses ops on tensors that carry a gradient while gradients are switched off inside the model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        off = not torch.is_grad_enabled() and func not in CONSTANT and func not in MADE_LIKE
        carried = off and any(isinstance(a, Tensor) and a.requires_grad for a in tree_leaves((args, kwargs)))
        out = func(*args, **kwargs)
        lost = carried and (mutates(func, args, kwargs) or any(map(_lost, tree_leaves(out))))
        if lost and not _inside_a_custom_function():
            raise ProbeError(
                f"the tangent was lost: the forward pass runs {name_of(func)!r} under torch.no_grad() or "
                "torch.inference_mode(), "
                "where reverse mode sees nothing.\n"
                "Measure with engine='fused', which does not mind, or take the block out."
            )
        return out


def _inside_a_custom_function() -> bool:
    """Whether the op runs in the forward of an autograd.Function: without gradients, but its backward has them."""
    running: FrameType | None = sys._getframe()
    codes = set()
    while running is not None:
        codes.add(running.f_code)
        running = running.f_back
    kinds = [torch.autograd.Function]
    for kind in kinds:  # grows as it is walked: their subclasses, too
        kinds.extend(kind.__subclasses__())
    return any(getattr(kind.forward, "__code__", None) in codes for kind in kinds)


def _lost(out: Any) -> bool:
    return isinstance(out, Tensor) and (out.is_floating_point() or out.is_complex()) and not out.requires_grad
