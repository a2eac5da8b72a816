"""Models that FSDP2 (``fully_shard``) spreads over ranks: whose weights are there while their own module runs.

A dual pass runs as a forward pass does: a module's weights are gathered before it and let go after it, on every rank at
once.  Reverse mode reads weights again after the pass, so the whole model is gathered for as long as it lasts.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torchgeom_probe.shapes import Tensor

#: The models that are held whole at the moment.
_WHOLE: list[nn.Module] = []


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a parameter is spread over ranks."""
    return type(getattr(tensor, "data", tensor)).__name__ == "DTensor"


def parts(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def groups(part: Any) -> list[Any]:
    """What FSDP keeps of a module's weights."""
    state = part._get_fsdp_state()
    return list(getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group]))


def comes_and_goes(model: nn.Module) -> bool:
    """Whether weights are there for their own module's forward pass alone."""
    return bool(parts(model)) and not any(model is whole for whole in _WHOLE)


def at_rest(model: nn.Module) -> None:
    """Let go of weights that a forward pass has left gathered, as FSDP does at its root."""
    if comes_and_goes(model):
        for part in parts(model):
            state = part._get_fsdp_state()
            for running in (state, *groups(part)):  # a pass that was cut short never came to its end
                running._training_state = type(running._training_state).IDLE
            state._state_ctx.iter_forward_root = None
            if not all(hasattr(weight, "_unsharded_param") for group in groups(part) for weight in group.fsdp_params):
                part.unshard()  # makes the tensors that it gathers into, which a first pass must not be seen to leave
            part.reshard()


def agreed(model: nn.Module, count: int) -> int:
    """The least that any rank says: chunks of different sizes would leave ranks waiting for each other."""
    mesh = next((p.data.device_mesh for p in model.parameters() if is_dtensor(p)), None)  # type: ignore[attr-defined]
    if mesh is None:
        return count
    least = torch.tensor(count, device=mesh.device_type)
    for dimension in range(mesh.ndim):
        dist.all_reduce(least, dist.ReduceOp.MIN, group=mesh.get_group(dimension))
    return int(least)


@contextlib.contextmanager
def before_weights_go(model: nn.Module, act: Callable[[], None]) -> Iterator[None]:
    """Call ``act()`` at the end of every module whose weights are let go after it, while they are there."""
    leaving = parts(model) if comes_and_goes(model) else []
    handles = [part.register_forward_hook(lambda module, args, output: act(), prepend=True) for part in leaving]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[bool]:
    """Hold the whole model on every rank for the body, its FSDP hooks off; yields whether there was anything to do."""
    sharded = parts(model)
    kept = [(hooks, dict(hooks)) for m in sharded for hooks in (m._forward_pre_hooks, m._forward_hooks)]
    try:
        _WHOLE.append(model)
        for part in sharded:
            part.unshard()
        for hooks, all_of_them in kept:
            for key, hook in all_of_them.items():
                if str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp"):
                    del hooks[key]
        yield bool(sharded)
    finally:
        _WHOLE.pop()
        for hooks, all_of_them in kept:
            hooks.clear()
            hooks.update(all_of_them)
        for part in sharded:
            part.reshard()
