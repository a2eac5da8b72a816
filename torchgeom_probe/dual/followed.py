"""What torch's autograd would drop without a word is refused: op by op, for every derivative that it makes."""

from __future__ import annotations

import functools
import sys
from types import FrameType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from torchgeom_probe.dual.bodies import BODIES, Way
from torchgeom_probe.dual.ops import (
    DETACHES,
    ESCAPES,
    METADATA,
    ONE_FOR_EACH,
    as_called,
    body_of,
    is_constant,
    meaning_of,
    mutates,
    name_of,
    reads_bits,
    refuse_dropped,
    smooth,
    unfollowable,
)
from torchgeom_probe.dual.passes import current_pass
from torchgeom_probe.errors import EngineRefusal, ProbeError
from torchgeom_probe.shapes import Tensor

_BATCH_NORMS = {torch.nn.functional.batch_norm, torch.batch_norm}
COPIES = {torch.tensor, torch.Tensor.new_tensor, torch.normal}
#: Forward mode's own, and what autograd.Function.apply calls on its way out: a view is known by its memory.
_NOT_THE_MODELS = {torch._VF._unpack_dual, torch._VF._make_dual, torch.Tensor.view_as}
_GRADIENT_HOOKS = {torch.Tensor.register_hook, torch.Tensor.retain_grad}


class Followed(TorchFunctionMode):
    """Sees every op of the body, and refuses one whose result should carry a derivative and does not.

    Args:
        start: what carries a derivative before any op.
        reverse: whether it is reverse mode that follows, or forward mode.
    """

    def __init__(self, *start: Tensor, reverse: bool) -> None:
        super().__init__()
        self.reverse = reverse
        self._open: list[Any] = []
        self._harmless = current_pass().harmless
        # What was cut off, and may be, and what was made of it.
        self._free = WeakTensorKeyDictionary()
        # Where the tensors are that carry one: a constant in their memory was cut off in C++, where no mode sees it.
        self._memory: dict[int, StorageWeakRef] = {}
        self._level = max(map(torch._C._functorch.maybe_get_level, start), default=-1)
        self._remember(list(start))

    def carries(self, tensor: Any) -> bool:
        """Whether a tensor carries a derivative: a graph, or a tangent."""
        if not isinstance(tensor, Tensor):
            return False
        return _innermost(tensor).grad_fn is not None if self.reverse else has_tangent(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, known = as_called(func, kwargs), meaning_of(func)
        if known in METADATA or func in _NOT_THE_MODELS:
            return func(*args, **kwargs)
        tensors = [a for a in tree_leaves((args, kwargs)) if smooth(a)]
        constants = [a for a in tensors if not self.carries(a)]
        self._refuse_alias(func, [a for a in constants if a not in self._free])
        if len(constants) == len(tensors) or (self._harmless and self._cuts(func, args, kwargs)):
            out = func(*args, **kwargs)
            if len(constants) < len(tensors) or any(a in self._free for a in constants):
                self._free.update((o, None) for o in tree_leaves(out) if smooth(o))
            return out
        refuse_dropped(func, args, kwargs, self.carries)
        refusal = unfollowable(func, args, kwargs, self.carries)
        if refusal is not None:
            if inside_a_custom_function():
                return func(*args, **kwargs)
            raise refusal
        # Torch gives a mean the derivative zero, a complex silu the conjugate one.
        if func is torch.normal or (tensors[0].is_complex() and name_of(func).startswith("silu")):
            raise EngineRefusal(self._why_lost(func))
        if func in _BATCH_NORMS and (kwargs.get("training") or (len(args) > 5 and args[5])):
            raise ProbeError(
                "batch normalisation by the statistics of the batch couples the samples: no sample has a metric of its"
                " own.\nMeasure in eval mode (mode='eval') with running statistics (track_running_stats=True)."
            )
        if func in _GRADIENT_HOOKS:
            return _NoHook()  # the user's own: a measurement is no training
        body = body_of(func)
        if func in BODIES:
            body = functools.partial(BODIES[func], Way(func, _constant, _asked if self.reverse else _undefined))
        if body is not None and func not in self._open:  # Tensor.unflatten asks for itself
            self._open.append(func)
            try:
                with self:
                    return body(*args, **kwargs)
            finally:
                self._open.pop()
        writes = mutates(func, args, kwargs)
        if writes:  # torch's forward derivative of v.mul_(v) takes the new v for the old one
            args = (args[0], *(a.clone() if a is args[0] else a for a in args[1:]))
        out = func(*args, **kwargs)
        if known in ONE_FOR_EACH or is_constant(known, args, kwargs, self.carries):
            return out
        found = [o for o in tree_leaves(args[0] if writes else out) if smooth(o) and o.numel()]
        self._remember(found)
        unseen = self.reverse and writes and not torch.is_grad_enabled()
        if (unseen or not all(map(self.carries, found))) and not inside_a_custom_function():
            raise EngineRefusal(self._why_lost(func))
        return out

    def _cuts(self, func: Any, args: Any, kwargs: Any) -> bool:
        known = meaning_of(func)
        if known in DETACHES or known in ESCAPES or func in COPIES or reads_bits(func, args, kwargs):
            return True
        return self.reverse and not torch.is_grad_enabled() and not inside_a_custom_function()

    def _remember(self, carried: list[Tensor]) -> None:
        for storage in map(storage_of, carried):
            if storage is not None and storage.nbytes():  # all that is empty lies at 0
                self._memory[storage.data_ptr()] = StorageWeakRef(storage)

    def _refuse_alias(self, func: Any, constants: list[Tensor]) -> None:
        for tensor in constants if self._memory else ():
            if torch._C._functorch.maybe_get_level(tensor) > self._level:
                continue  # of a transform of the model's own
            storage = storage_of(tensor)
            held = None if storage is None else self._memory.get(storage.data_ptr())
            copied = tensor.is_nested  # torch.nested.nested_tensor(h) is seen by no mode
            if (copied or (held is not None and not held.expired())) and not inside_a_custom_function():
                raise EngineRefusal(
                    f"the tangent was lost: {name_of(func)!r} takes a constant made of a tensor that depends on the "
                    "input (by nn.Parameter(h), from_dlpack, _make_subclass, nested_tensor).\n"
                    "Compute with the tensor itself in the forward pass."
                )

    def _why_lost(self, func: Any) -> str:
        name = name_of(func)
        if meaning_of(func) in DETACHES or func in COPIES:
            why = f"autograd takes what {name!r} makes of a tensor that depends on the input for a constant"
        elif self.reverse and not torch.is_grad_enabled():
            why = f"the forward pass runs {name!r} under torch.no_grad() or torch.inference_mode()"
        else:
            mode, methods = ("reverse", "a backward") if self.reverse else ("forward", "setup_context, jvp and vmap")
            return (
                f"the tangent was lost: the op {name!r} has no derivative in torch's {mode} mode.\n"
                "Measure with engine='auto': the dual pass may know its derivative, or take the other mode for the op; "
                f"or give it one:  torch.autograd.Function with {methods}"
            )
        return (
            f"the tangent was lost: {why}.\n"
            "Measure with engine='fused', which follows the function that runs; for a surrogate gradient write the op "
            "as a torch.autograd.Function whose backward it is, and measure with engine='vjp'"
        )


class _NoHook:
    """What a refused ``register_hook`` returns: it can be removed."""

    def remove(self) -> None:
        pass


def has_tangent(tensor: Tensor) -> bool:
    """Whether a tensor carries a tangent of torch's forward mode."""
    while torch._C._functorch.is_batchedtensor(tensor):  # by a vmap of the model's own
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return forward_ad.unpack_dual(tensor).tangent is not None


def _constant(value: Any) -> Tensor:
    """Of numbers that carry a derivative a copy that carries none, and that no op takes for a cut."""
    with torch._C.DisableTorchFunction():
        return value.detach().clone()


def _undefined(value: Any) -> Any:
    """The same, with a tangent of nan."""
    nothing = value - _constant(value)
    return value + (nothing.abs() if nothing.is_complex() else nothing).abs().sqrt()


def _asked(value: Any) -> Any:
    """The same, with a gradient of nan where one is asked for: a cotangent that is zero asks for nothing."""
    with torch._C.DisableTorchFunction():
        if value.requires_grad:
            value.register_hook(lambda u: torch.where(u == 0, u, torch.nan))
    return value


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Where its numbers are; None for a sparse or an opaque one."""
    tensor = _innermost(tensor)
    return tensor.untyped_storage() if tensor.layout is torch.strided and not tensor.is_nested else None


def _innermost(tensor: Tensor) -> Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def inside_a_custom_function() -> bool:
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
