"""DualTensor: a tensor that carries its own k directional derivatives through any model.

It holds one buffer of shape ``[1 + k, *shape]``: row 0 is the primal, rows 1 … k are its tangents.  To the model it
looks like the primal.  A call of torch with a DualTensor among its arguments lands in ``__torch_function__`` (from
Python) or ``__torch_dispatch__`` (from C++).  There one of four things happens:

* a fused rule (:data:`RULES`, filled by ``rules/``) works on the whole buffer at once;
* a function that torch itself writes in Python (multi-head attention, …) runs its own body, op by op;
* any other op, that one alone, is differentiated by torch (:class:`OneOp`): forward mode, or else reverse mode;
* an op that has no derivative raises an :class:`EngineRefusal` that names it.

What stops a gradient (``detach``, ``.data``, ``torch.no_grad()``) changes nothing about the function that runs, so its
derivative goes through.  What takes numbers out of torch (``.item()``) is refused.  No missing tangent is read as zero.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from torchgeom_probe.dual.bodies import BODIES, Way
from torchgeom_probe.dual.followed import inside_a_custom_function
from torchgeom_probe.dual.graph import CUSTOM_FUNCTION, refuse_unfollowed, refuse_wrong
from torchgeom_probe.dual.one_op import OneOp
from torchgeom_probe.dual.ops import (
    DETACHES,
    ESCAPES,
    METADATA,
    ONE_FOR_EACH,
    TAKES_DEFERRED,
    as_called,
    body_of,
    in_torchs_spelling,
    is_constant,
    meaning_of,
    mutates,
    name_of,
    reads_bits,
    smooth,
    unfollowable,
)
from torchgeom_probe.dual.passes import Key, current_pass
from torchgeom_probe.errors import EngineRefusal, ProbeError, first_line
from torchgeom_probe.shapes import Tensor

Rule = Callable[..., Any]

#: op → fused rule.  A rule is called with the op's own arguments and may return NotImplemented to decline them.
RULES: dict[Any, Rule] = {}


class DualTensor(torch.Tensor):
    """A tensor and its k tangents in one buffer ``[1 + k, *shape]``; looks like the primal.

    >>> x = DualTensor(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))     # primal (1, 2), one tangent (1, 0)
    >>> torch.sin(x).buffer[1].tolist() == [torch.tensor(1.0).cos().item(), 0.0]
    True
    """

    _buffer: Tensor | None
    _made_in: Key
    #: builds the buffer of a deferred tensor
    _make: Any = None

    @staticmethod
    def __new__(cls, buffer: Tensor) -> DualTensor:
        """Wrap a buffer, which the tensor then owns: in-place ops write to it."""
        running = current_pass()
        dual = torch.Tensor._make_wrapper_subclass(
            cls,
            buffer.shape[1:],
            strides=buffer.stride()[1:],
            dtype=buffer.dtype,
            device=buffer.device,
            requires_grad=running.graph and buffer.requires_grad,  # a custom function asks
        )
        torch._C._set_throw_on_mutable_data_ptr(dual)  # or C++ that asks for its memory (dlpack) ends the process
        dual._buffer = buffer
        dual._made_in = running.key
        return dual

    def __init__(self, buffer: Tensor) -> None:
        pass

    @staticmethod
    def deferred(make: Callable[[], Tensor], shape: Sequence[int], strides: Sequence[int], like: Tensor) -> DualTensor:
        """A tensor whose buffer the next op asks ``make()`` for, or builds in its own way; only inside a pass.

        ``shape`` and ``strides`` are the primal's, type and device those of ``like``.
        """
        running = current_pass()
        graph = running.graph and torch.is_grad_enabled()
        dual = torch.Tensor._make_wrapper_subclass(
            DualTensor, tuple(shape), strides=tuple(strides), dtype=like.dtype, device=like.device, requires_grad=graph
        )
        torch._C._set_throw_on_mutable_data_ptr(dual)
        assert running.deferred is not None
        dual._buffer = None
        dual._make = make
        dual._made_in = running.key
        running.deferred[:] = [dual]
        return dual

    def taken(self) -> Any:
        """What would build the buffer, for an op that builds its own result with it; None if the buffer is built."""
        if self._buffer is not None:
            return None
        self._defer_no_more()
        return self._make

    def _defer_no_more(self) -> None:
        deferred = current_pass().deferred
        if deferred and deferred[0] is self:
            deferred.clear()

    @property
    def buffer(self) -> Tensor:
        """[1 + k, *shape]: the primal and its tangents.  A tensor that outlived its pass is refused, never read."""
        if self._made_in is not current_pass().key:
            raise self._made_in.outside()
        if self.requires_grad and _GRAD_FN(self) is not None:
            raise EngineRefusal(CUSTOM_FUNCTION)
        if self._buffer is None:
            self._defer_no_more()
            self._buffer = self._make()
            self._make = None
        return self._buffer

    @property
    def primal(self) -> Tensor:
        """Row 0 of the buffer: the value that the model sees."""
        return self.buffer[0]

    @property
    def tangents(self) -> Tensor:
        """Rows 1 … k of the buffer, [k, *shape]."""
        return self.buffer[1:]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        rows, *shape = self.buffer.shape
        return f"DualTensor(shape={tuple(shape)}, k={rows - 1}, dtype={self.buffer.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = as_called(func, kwargs)
        running = current_pass()
        if running.graph:
            refuse_unfollowed()
        if running.deferred and func not in METADATA and func not in TAKES_DEFERRED:
            running.deferred[0].buffer  # noqa: B018  (built before this op can write to what it is built from)
        rule = RULES.get(func)
        if rule is not None:
            out = _ruled(rule, func, args, kwargs)
            if out is not NotImplemented:
                _note("fused", func)
                return out
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _unfused(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached only past __torch_function__: from C++ (custom autograd functions, extensions).
        if current_pass().graph:
            refuse_wrong(func)
        if func in _ALIASES:
            return args[0]
        return _unfused(func, args, kwargs or {})


#: The node that a custom autograd.Function leaves on a tensor, past __torch_function__.
_GRAD_FN: Any = torch._C.TensorBase.grad_fn.__get__  # type: ignore[union-attr]

_ALIASES = {
    torch.ops.aten.alias.default, torch.ops.aten.view_as.default, torch.ops.aten.lift_fresh.default,
    torch.ops.aten.detach.default,
}  # fmt: skip


def _on_primals(func: Any, args: Any, kwargs: Any) -> Any:
    primals = tree_map(lambda a: a.primal if isinstance(a, DualTensor) else a, (args, kwargs))
    return func(*primals[0], **primals[1])


def _is_dual(value: Any) -> bool:
    return isinstance(value, DualTensor)


def _ruled(rule: Rule, func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("out") is not None:
        return NotImplemented
    if kwargs:
        kwargs = in_torchs_spelling(func, kwargs, _names_of(rule))
    try:
        return rule(*args, **kwargs)
    except ProbeError:
        raise
    except Exception as error:
        if isinstance(error, TypeError) and not _binds(rule, args, kwargs):
            return NotImplemented  # an argument that the rule does not know
        _raise_if_the_models_own(func, args, kwargs)
        if mutates(func, args, kwargs):
            raise  # half of it may be written
        if current_pass().graph:
            raise EngineRefusal(f"the rule of {name_of(func)!r} has no gradient here: {first_line(error)}") from error
        return NotImplemented


@functools.cache
def _names_of(rule: Rule) -> frozenset[str]:
    return frozenset(inspect.signature(rule).parameters)


def _binds(rule: Rule, args: Any, kwargs: Any) -> bool:
    try:
        inspect.signature(rule).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _unfused(func: Any, args: Any, kwargs: Any) -> Any:
    known = meaning_of(func)
    _refuse_out(func, kwargs)
    if known in METADATA or is_constant(known, args, kwargs, _is_dual):
        _note("fused", func)
        return _on_primals(func, args, kwargs)
    if known in DETACHES:
        x = args[0] if args else kwargs["input"]
        # The derivative goes through; a gradient of the loss stops as it was told to.
        buffer = x.buffer.detach() if current_pass().graph else x.buffer
        if mutates(func):
            x._buffer = buffer
            return x
        return DualTensor(buffer)
    if current_pass().harmless and (known in ESCAPES or reads_bits(func, args, kwargs)):
        return _on_primals(func, args, kwargs)
    refusal = unfollowable(func, args, kwargs, _is_dual)
    if refusal is not None:  # an autograd.Function has a derivative of its own, which the other engines take
        raise EngineRefusal(str(refusal)) if inside_a_custom_function() else refusal
    writes = mutates(func, args, kwargs)
    if writes and _became_dual(args[0], tree_leaves((args, kwargs))):
        return DualTensor.__torch_function__(func, (DualTensor,), args, kwargs)
    _refuse_unfollowable_writes(func, args, writes)
    if func in BODIES:
        try:
            way = Way(functools.partial(_alone, func), _primal_of, _undefined, current_pass().graph)
            return BODIES[func](way, *args, **kwargs)
        except ProbeError:
            raise
        except Exception as error:
            _raise_if_the_models_own(func, args, kwargs)
            raise EngineRefusal(f"the op {name_of(func)!r} is not followed here ({first_line(error)})") from error
    body = None if writes else body_of(func)
    if body is not None:
        try:
            return body(*args, **kwargs)
        except ProbeError:
            raise
        except Exception:  # then as one op: below, which also finds whose fault it is
            pass
    return _alone(func, *args, **kwargs)


def _primal_of(value: Any) -> Tensor:
    return value.primal if isinstance(value, DualTensor) else value


def _undefined(x: Any) -> Any:
    return DualTensor(torch.cat([x.buffer[:1], torch.full_like(x.buffer[1:], torch.nan)]))


def _alone(func: Any, *args: Any, **kwargs: Any) -> Any:
    """One op by its derivative in torch, or its refusal by name."""
    if not any(map(_is_dual, tree_leaves((args, kwargs)))):
        return func(*args, **kwargs)
    _note("fallback", func)
    try:
        return _by_torch(func, args, kwargs, mutates(func, args, kwargs))
    except EngineRefusal as error:
        _raise_if_the_models_own(func, args, kwargs)
        _note("refused", func)
        raise EngineRefusal(
            f"the op {name_of(func)!r} has no derivative that could be used ({first_line(error)}).\n"
            "Measure a layer before it, or give it one:  torch.autograd.Function with a backward, or for a custom op  "
            "op.register_autograd(...) with a backward made of torch's own ops"
        ) from error


def _by_torch(func: Any, args: Any, kwargs: Any, writes: bool) -> Any:
    """Run one op by its derivative in torch."""
    if current_pass().graph:
        refuse_wrong(func)
    leaves, spec = tree_flatten((args, kwargs))
    buffers = {i: leaf.buffer for i, leaf in enumerate(leaves) if isinstance(leaf, DualTensor)}
    one_op = OneOp(func, leaves, spec, buffers, writes, may_be_constant=meaning_of(func) in ONE_FOR_EACH)
    outputs, dual, out_spec = one_op.outputs()
    if not writes:
        return tree_unflatten([DualTensor(o) if d else o for o, d in zip(outputs, dual, strict=True)], out_spec)
    target = args[0]
    if outputs[0].shape != target.buffer.shape:
        raise EngineRefusal(
            f"{name_of(func)!r} changes the shape of a tensor in place. Use the form without the underscore."
        )
    target.buffer.copy_(outputs[0])
    return target


def _became_dual(target: Any, leaves: list[Any]) -> bool:
    """Make a plain tensor that is about to be written to a DualTensor, if nobody else sees its memory.

    The two exchange what they are until the pass ends: a tensor of the user's own (a cache) is then as it was before.
    """
    running = current_pass()
    if type(target) is not Tensor or running.at_end is None or not (smooth(target) and target.is_contiguous()):
        return False
    if target._is_view() or torch._C._storage_Use_Count(target.untyped_storage()._cdata) > _ALONE:
        return False
    rows = next(leaf for leaf in leaves if isinstance(leaf, DualTensor)).buffer.shape[0]
    buffer = target.new_zeros((rows, *target.shape))
    buffer[0].copy_(target)
    dual = DualTensor(buffer)
    try:
        torch.utils.swap_tensors(target, dual)
    except RuntimeError:  # something in C++ holds it
        return False
    running.at_end.callback(_exchanged_back, target, dual, running.graph)
    return True


#: The uses of a storage that one tensor has: the tensor's own, and that of the handle which was asked.
_ALONE = 2


def _exchanged_back(target: Tensor, dual: Any, keep: bool) -> None:
    with contextlib.suppress(RuntimeError):  # something holds it: it is refused where it is used again
        torch.utils.swap_tensors(target, dual)
        if keep:  # as a plain pass would have left it
            target.detach().copy_(dual._buffer[0].detach())


def _refuse_out(func: Any, kwargs: Any) -> None:
    if kwargs.get("out") is not None:
        raise EngineRefusal(
            f"the op {name_of(func)!r} writes to out=, which cannot carry tangents.\nUse its return value in the model."
        )


def _refuse_unfollowable_writes(func: Any, args: Any, writes: bool) -> None:
    if writes and not isinstance(args[0], DualTensor):
        raise EngineRefusal(
            f"{name_of(func)!r} writes a tensor that depends on the input into a plain one, which cannot carry "
            "tangents (it is a view, or has one).\n"
            "Make the plain one from the input:  torch.zeros_like(x) or x.new_zeros(...); or measure with engine='vjp'."
        )
    if getattr(func, "__name__", "") in ("__set__", "__delete__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "an attribute")
        raise EngineRefusal(
            f"the forward pass assigns to .{attribute} of a tensor that depends on the input, which a dual pass cannot"
            " follow.\nUse copy_() in the model, or measure with engine='vjp'."
        )


def _note(what: str, func: Any) -> None:
    used = current_pass().used
    if used is not None:
        used[what].add(name_of(func))


def _raise_if_the_models_own(func: Any, args: Any, kwargs: Any) -> None:
    """Run the op on plain copies: if that fails too, the error is the model's own and is raised as it is."""
    copies = tree_map(lambda a: a.primal.clone() if isinstance(a, DualTensor) else a, (args, kwargs))
    func(*copies[0], **copies[1])
