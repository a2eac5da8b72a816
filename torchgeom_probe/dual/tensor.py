"""DualTensor: a tensor that carries its own k directional derivatives through any model.

It holds one buffer of shape ``[1 + k, *shape]``: row 0 is the primal, rows 1 … k are its tangents.  To the model it
looks like the primal.  A call of torch with a DualTensor among its arguments lands in ``__torch_function__`` (from
Python) or ``__torch_dispatch__`` (from C++).  There one of four things happens:

* a fused rule (:data:`RULES`, filled by ``rules/``) works on the whole buffer at once;
* a function that torch itself writes in Python (multi-head attention, …) runs its own body, op by op;
* any other op, that one alone, goes through ``vmap(jvp(op))``: right for every op that has a forward derivative;
* an op that has none raises an :class:`EngineRefusal` that names it.

A tensor that was cut off from its tangents on purpose (``detach``, ``.data``) becomes a :class:`LostTensor`.  It
computes as usual, all that is made from it is lost too, and a hook refuses it: no missing tangent is ever read as zero.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from torchgeom_probe.dual.ops import CONSTANT, DETACHES, ESCAPES, MADE_LIKE, METADATA, TAKES_DEFERRED, mutates, name_of
from torchgeom_probe.dual.passes import current_pass
from torchgeom_probe.errors import EngineRefusal, ProbeError
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
    #: the key of the pass that made it
    _made_in: object
    #: builds the buffer of a deferred tensor
    _make: Any = None

    @staticmethod
    def __new__(cls, buffer: Tensor) -> DualTensor:
        """Wrap a buffer, which the tensor then owns: in-place ops write to it."""
        dual = torch.Tensor._make_wrapper_subclass(
            cls, buffer.shape[1:], strides=buffer.stride()[1:], dtype=buffer.dtype, device=buffer.device
        )
        dual._buffer = buffer
        dual._made_in = current_pass().key
        return dual

    def __init__(self, buffer: Tensor) -> None:
        pass

    @staticmethod
    def deferred(make: Callable[[], Tensor], shape: Sequence[int], strides: Sequence[int], like: Tensor) -> DualTensor:
        """A tensor whose buffer the next op asks ``make()`` for, or builds in its own way; only inside a pass.

        ``shape`` and ``strides`` are the primal's, type and device those of ``like``.
        """
        dual = torch.Tensor._make_wrapper_subclass(
            DualTensor, tuple(shape), strides=tuple(strides), dtype=like.dtype, device=like.device
        )
        running = current_pass()
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
            raise ProbeError(
                "the model kept a tensor of an earlier measurement (in a list, a cache or an object of its own) and"
                " computes with it now.\nKeep such state in a buffer or an attribute of the module, which a measurement"
                " puts back, or clear it after measuring.\nA model that computes in threads of its own looks the same: "
                " measure it with engine='vjp'"
            )
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
        kwargs = kwargs or {}
        running = current_pass()
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
        if func in _ALIASES:
            return args[0]
        return _unfused(func, args, kwargs or {})


_ALIASES = {torch.ops.aten.alias.default, torch.ops.aten.view_as.default, torch.ops.aten.lift_fresh.default}


class LostTensor(DualTensor):
    """A tensor whose tangents were cut off on purpose (``detach``, ``.data``); it remembers by what.

    It computes like the plain tensor that it is, and everything computed from it is lost as well.
    """

    reason: str
    #: Whether it shares its memory with a tensor that still has its tangents.
    alias: bool = False

    @staticmethod
    def lose(value: Tensor, reason: str, *, alias: bool = False) -> LostTensor:
        """Wrap a plain tensor as lost."""
        lost = LostTensor(value.unsqueeze(0))
        lost.reason = reason
        lost.alias = alias
        return lost

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LostTensor(shape={tuple(self.buffer.shape[1:])}, cut by {self.reason})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in ESCAPES:
            raise _escape(func)
        return _spread(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _spread(func, args, kwargs or {})


def _spread(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute with plain values, and mark every floating result, and every tensor written to, as lost."""
    leaves = tree_flatten((args, kwargs))[0]
    lost = next(a for a in leaves if isinstance(a, LostTensor))
    writes = mutates(func, args, kwargs)
    _refuse_unfollowable_writes(func, args, kwargs, writes)
    if writes and isinstance(args[0], LostTensor) and args[0].alias:
        raise ProbeError(
            f"the tangent was lost: {name_of(func)!r} writes through {args[0].reason} into a tensor that depends on the"
            " input, past its derivative.\nWrite to the tensor itself in the model (h.mul_(2) for h.data.mul_(2))."
        )
    if writes and not isinstance(args[0], LostTensor):
        _lose_in_place(args[0], lost.reason)
    out = _on_primals(func, args, kwargs)
    if writes:
        return args[0]
    if func in CONSTANT or func in MADE_LIKE:  # these hold nothing of the derivative in any case
        return out
    shared = {
        a.buffer.untyped_storage()._cdata
        for a in leaves
        if isinstance(a, DualTensor) and (a.alias if isinstance(a, LostTensor) else True)
    }

    def lose(o: Any) -> Any:
        if not _smooth(o):
            return o
        return LostTensor.lose(o, lost.reason, alias=o.untyped_storage()._cdata in shared)

    return tree_map(lose, out)


def _lose_in_place(x: DualTensor, reason: str) -> None:
    # Other views of the same memory cannot be marked as lost: NaN tangents make sure that they are not read.
    x.tangents.fill_(float("nan"))
    x.__class__ = LostTensor
    x.reason = reason  # type: ignore[attr-defined]


def _on_primals(func: Any, args: Any, kwargs: Any) -> Any:
    primals = tree_map(lambda a: a.primal if isinstance(a, DualTensor) else a, (args, kwargs))
    return func(*primals[0], **primals[1])


def _smooth(a: Any) -> bool:
    return isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex())


def _ruled(rule: Rule, func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("out") is not None:
        return NotImplemented
    try:
        return rule(*args, **kwargs)
    except ProbeError:
        raise
    except Exception as error:
        if isinstance(error, TypeError) and not _binds(rule, args, kwargs):
            return NotImplemented  # an argument that the rule does not know
        _raise_if_the_models_own(func, args, kwargs)
        raise


def _binds(rule: Rule, args: Any, kwargs: Any) -> bool:
    try:
        inspect.signature(rule).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


@functools.cache
def _opened(func: Any) -> Callable[..., Any] | None:
    """A Python function of torch without its check for overrides: its body then runs on DualTensors, op by op."""
    if not inspect.isfunction(func):
        return None
    checks = {name: _never for name in func.__code__.co_names if name.startswith("has_torch_function")}
    if not checks:
        return None
    opened = FunctionType(
        func.__code__, {**func.__globals__, **checks}, func.__name__, func.__defaults__, func.__closure__
    )
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened


def _never(*_: Any) -> bool:
    return False


def _unfused(func: Any, args: Any, kwargs: Any) -> Any:
    if func in CONSTANT:
        _note("fused", func)
        out = _on_primals(func, args, kwargs)
        copied = (*args[1:], *kwargs.values()) if func is torch.Tensor.new_tensor else ()
        # A copy of values that depend on the input has lost their tangents.
        return LostTensor.lose(out, ".new_tensor()") if any(isinstance(a, DualTensor) for a in copied) else out
    if func in DETACHES:
        reason = f".{name_of(func)}" + ("()" if callable(getattr(torch.Tensor, name_of(func), None)) else "")
        if mutates(func, args, kwargs):
            _lose_in_place(args[0], reason)
            return args[0]
        return LostTensor.lose((args[0] if args else kwargs["input"]).primal, reason, alias=True)
    if func in ESCAPES:
        raise _escape(func)
    writes = mutates(func, args, kwargs)
    _refuse_unfollowable_writes(func, args, kwargs, writes)
    opened = None if writes else _opened(func)
    if opened is not None:
        with contextlib.suppress(Exception):  # then as one op: below, which also finds whose fault it is
            return opened(*args, **kwargs)
    _note("fallback", func)
    try:
        return _by_jvp(func, args, kwargs)
    except ProbeError:
        raise
    except Exception as error:
        _raise_if_the_models_own(func, args, kwargs)
        _note("refused", func)
        raise EngineRefusal(
            f"the op {name_of(func)!r} has no forward derivative that could be used ({_first_line(error)}).\n"
            "Measure with reverse mode, which needs none:  GeometryProbe(model, ..., engine='vjp')"
        ) from error


def _by_jvp(func: Any, args: Any, kwargs: Any) -> Any:
    """Run one op by ``vmap(jvp(op))``: the primal once, the k tangents batched."""
    writes = mutates(func, args, kwargs)
    target = args[0] if writes else None
    leaves, spec = tree_flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, DualTensor)]
    duals = [leaves[i] for i in where]
    layout: list[Any] = []

    def op(*primals: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        filled = list(leaves)
        for i, primal in zip(where, primals, strict=True):
            filled[i] = primal
        op_args, op_kwargs = tree_unflatten(filled, spec)
        if writes:
            op_args = (op_args[0].clone(), *op_args[1:])
        out = func(*op_args, **op_kwargs)
        flat, out_spec = tree_flatten(op_args[0] if writes else out)
        smooth = [_smooth(o) for o in flat]
        layout[:] = [out_spec, smooth, [None if isinstance(o, Tensor) else o for o in flat]]
        rough = [o for o, s in zip(flat, smooth, strict=True) if isinstance(o, Tensor) and not s]
        return [o for o, s in zip(flat, smooth, strict=True) if s], rough

    def pushed(*tangents: Tensor) -> Any:
        return torch.func.jvp(op, tuple(d.primal for d in duals), tangents, has_aux=True)

    values, pushes, rough = torch.func.vmap(pushed, randomness="same")(*(d.tangents for d in duals))
    # vmap repeats what does not depend on the tangents (a view, no copy): row 0 is it.
    results = [DualTensor(torch.cat([v[:1], t])) for v, t in zip(values, pushes, strict=True)]
    if writes:
        assert target is not None
        if results[0].buffer.shape != target.buffer.shape:
            raise EngineRefusal(
                f"{name_of(func)!r} changes the shape of a tensor in place. Use the form without the underscore."
            )
        target.buffer.copy_(results[0].buffer)
        return target
    out_spec, smooth, plain = layout
    smooth_left, rough_left = iter(results), iter(r[0] for r in rough)
    flat = [
        next(smooth_left) if is_smooth else value if value is not None else next(rough_left, None)
        for is_smooth, value in zip(smooth, plain, strict=True)
    ]
    return tree_unflatten(flat, out_spec)


def _refuse_unfollowable_writes(func: Any, args: Any, kwargs: Any, writes: bool) -> None:
    if kwargs.get("out") is not None:
        raise EngineRefusal(
            f"the op {name_of(func)!r} writes to out=, which cannot carry tangents.\n"
            "Use its return value in the model, or measure with engine='vjp'."
        )
    if writes and not isinstance(args[0], DualTensor):
        raise EngineRefusal(
            f"{name_of(func)!r} writes a tensor that depends on the input into a plain one, which cannot carry"
            " tangents.\nMake the plain one from the input:  torch.zeros_like(x) or x.new_zeros(...); or measure with"
            " engine='vjp'."
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


def _escape(func: Any) -> ProbeError:
    return ProbeError(
        f".{name_of(func)}() takes numbers that depend on the input out of torch: what the model computes from them has"
        " no derivative, in any engine.\nKeep the value a tensor: write  x * y.max()  for  x * y.max().item()"
    )


def _raise_if_the_models_own(func: Any, args: Any, kwargs: Any) -> None:
    """Run the op on plain copies: if that fails too, the error is the model's own and is raised as it is."""
    copies = tree_map(lambda a: a.primal.clone() if isinstance(a, DualTensor) else a, (args, kwargs))
    func(*copies[0], **copies[1])


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
