"""The optimizer whose steps a monitor counts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor


class Followed:
    """Calls ``on_step`` after each step of an optimizer, with what AMP's scaler handed to it, if anything.

    A fused optimizer is told of an overflow by the scaler (``found_inf``) and skips the update itself, inside a step.

    Args:
        optimizer: a torch optimizer, or a wrapper of one, of which the one inside is followed.
        model: whose weights it trains.
        on_step: called with ``found_inf`` or None.

    Raises:
        ProbeError: neither.
    """

    def __init__(self, optimizer: Any, model: nn.Module, on_step: Callable[[Tensor | None], Any]) -> None:
        self._name = type(optimizer).__name__
        self._on_step = on_step
        self._parameters = list(model.parameters())
        self._versions: list[int] | None = self._versions_now()
        self._handle = _inside(optimizer).register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._versions = None  # it was heard of
        self._on_step(getattr(optimizer, "found_inf", None))

    def _versions_now(self) -> list[int]:
        return [-1 if p.is_inference() else p._version for p in self._parameters]

    def close(self) -> None:
        """Follow no more; say so where the weights changed and no step was ever heard of."""
        self._handle.remove()
        if self._versions is not None and self._versions != self._versions_now():
            warnings.warn(
                f"this monitor followed {self._name}, whose step() never ran, while the weights changed: no training "
                "step was counted or probed.\nLikely another optimizer makes the updates, as in SAM.  Follow that one:"
                "  monitor.follow(optimizer.base_optimizer)  or call  monitor.step()  in the loop.",
                RuntimeWarning,
                stacklevel=3,
            )


def _inside(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose ``step`` runs hooks: the one given, or the one inside of a wrapper that has no hooks."""
    given = type(optimizer).__name__
    while not isinstance(optimizer, torch.optim.Optimizer) or "_optimizer_step_post_hooks" not in vars(optimizer):
        inner = [v for v in getattr(optimizer, "__dict__", {}).values() if isinstance(v, torch.optim.Optimizer)]
        if len(inner) != 1:
            raise ProbeError(
                f"follow() takes a torch.optim.Optimizer, not a {given}.\n"
                "Call  monitor.step()  in the loop instead, once per training step."
            )
        optimizer = inner[0]
    return optimizer
