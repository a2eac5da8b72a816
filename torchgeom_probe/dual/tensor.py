"""DualTensor: a tensor that carries its own k directional derivatives through any model.

One buffer of shape ``[1 + k, *shape]``: row 0 is the primal, rows 1 … k its tangents.  To the model the tensor looks like its
primal.  Every call that reaches torch with a DualTensor among its arguments lands in ``__torch_function__`` (from Python) or
``__torch_dispatch__`` (from C++), where one of three things happens:

* a fused rule (:data:`RULES`, filled by ``rules.py``) works on the whole buffer at once;
* without one, that one op alone goes through ``vmap(jvp(op))``: right for every op that has a forward derivative;
* what has none raises an :class:`EngineRefusal` that names the op.

A tensor that was cut off from its tangents on purpose (``detach``, ``.data``) becomes a :class:`LostTensor`: it computes as usual,
everything made from it is lost too, and a hook that is handed one refuses.  So no missing tangent is ever read as zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from torchgeom_probe.errors import EngineRefusal, ProbeError
from torchgeom_probe.shapes import Tensor

Rule = Callable[..., Any]

#: op → fused rule.  A rule is called with the op's own arguments and may return NotImplemented to decline them.
RULES: dict[Any, Rule] = {}

#: Ops that ask about a tensor (shape, device, …) and never touch its numbers.
METADATA: set[Any] = set()

#: Ops whose result is piecewise constant in the input (comparisons, argmax, round, random fills): its derivative IS zero.
CONSTANT: set[Any] = set()

#: Ops that take numbers out of torch: no derivative can follow them there.
ESCAPES: set[Any] = set()

#: Ops that cut a tensor off from its derivative on purpose.
CUTS: set[Any] = set()

_USED: ContextVar[dict[str, set[str]] | None] = ContextVar("used", default=None)


class DualTensor(torch.Tensor):
    """A tensor and its k tangents in one buffer ``[1 + k, *shape]``; looks like the primal.

    >>> x = DualTensor(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))     # primal (1, 2), one tangent (1, 0)
    >>> torch.sin(x).buffer[1].tolist() == [torch.tensor(1.0).cos().item(), 0.0]
    True
    """

    buffer: Tensor

    @staticmethod
    def __new__(cls, buffer: Tensor) -> DualTensor:
        dual = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, buffer.shape[1:], strides=buffer.stride()[1:], dtype=buffer.dtype, device=buffer.device
        )
        dual.buffer = buffer
        return dual

    def __init__(self, buffer: Tensor) -> None:
        pass

    @property
    def primal(self) -> Tensor:
        """Row 0 of the buffer: the value that the model sees."""
        return self.buffer[0]

    @property
    def tangents(self) -> Tensor:
        """Rows 1 … k of the buffer, [k, *shape]."""
        return self.buffer[1:]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DualTensor(shape={tuple(self.buffer.shape[1:])}, k={self.buffer.shape[0] - 1}, dtype={self.buffer.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None:
            out = rule(*args, **kwargs)
            if out is not NotImplemented:
                _note("fused", func)
                return out
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _unfused(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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

    @staticmethod
    def lose(value: Tensor, reason: str) -> LostTensor:
        """Wrap a plain tensor as lost."""
        lost = LostTensor(value.unsqueeze(0))
        lost.reason = reason
        return lost

    def __repr__(self, *, tensor_contents: Any = None) -> str:
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
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _spread(func, args, kwargs or {})


def _spread(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute with plain values, and mark every floating result, and every tensor written to, as lost."""
    duals = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, DualTensor)]
    reason = next(a.reason for a in duals if isinstance(a, LostTensor))
    if mutates(func, kwargs) and isinstance(args[0], DualTensor) and not isinstance(args[0], LostTensor):
        # Other views of the same memory cannot be marked as lost: NaN tangents make sure that they are not read.
        args[0].tangents.fill_(float("nan"))
        args[0].__class__ = LostTensor
        args[0].reason = reason  # type: ignore[attr-defined]
    plain_args, plain_kwargs = tree_map(lambda a: a.primal if isinstance(a, DualTensor) else a, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if mutates(func, kwargs):
        return args[0]
    return tree_map(lambda o: LostTensor.lose(o, reason) if isinstance(o, Tensor) and o.is_floating_point() else o, out)


def _unfused(func: Any, args: Any, kwargs: Any) -> Any:
    if func in CONSTANT:
        _note("fused", func)
        args, kwargs = tree_map(lambda a: a.primal if isinstance(a, DualTensor) else a, (args, kwargs))
        return func(*args, **kwargs)
    if func in CUTS:
        return LostTensor.lose(args[0].primal, f".{name_of(func)}()")
    if func in ESCAPES:
        raise _escape(func)
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
    if kwargs.get("out") is not None:
        raise EngineRefusal(
            f"the op {name_of(func)!r} writes to out=, which cannot carry tangents.\n"
            "Use its return value in the model, or measure with engine='vjp'."
        )
    writes = mutates(func, kwargs)
    target = args[0] if writes else None
    if writes and not isinstance(target, DualTensor):
        raise EngineRefusal(
            f"{name_of(func)!r} writes a tensor that depends on the input into a plain one, which cannot carry tangents.\n"
            "Make the plain one from the input:  torch.zeros_like(x) or x.new_zeros(...); or measure with engine='vjp'."
        )
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
        smooth = [isinstance(o, Tensor) and (o.is_floating_point() or o.is_complex()) for o in flat]
        layout[:] = [out_spec, smooth, [None if isinstance(o, Tensor) else o for o in flat]]
        rough = [o for o, s in zip(flat, smooth, strict=True) if isinstance(o, Tensor) and not s]
        return [o for o, s in zip(flat, smooth, strict=True) if s], rough

    def pushed(*tangents: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
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
    results_left, rough_left = iter(results), iter(r[0] for r in rough)
    flat: list[Any] = []
    for is_smooth, value in zip(smooth, plain, strict=True):
        flat.append(next(results_left) if is_smooth else value if value is not None else next(rough_left, None))
    return tree_unflatten(flat, out_spec)


def mutates(func: Any, kwargs: Any = None) -> bool:
    """Whether the op writes to its first argument."""
    schema = getattr(func, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = name_of(func)
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    return name.endswith("_") or bool(kwargs and kwargs.get("inplace"))


_NOT_IN_PLACE = {"__invert__", "__index__", "__int__", "__iter__"}


def name_of(func: Any) -> str:
    """Return the op's name, as a user would write it."""
    name = getattr(func, "__name__", None) or str(func)
    if name == "__get__":  # a property, such as Tensor.data
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def _note(kind: str, func: Any) -> None:
    used = _USED.get()
    if used is not None:
        used.setdefault(kind, set()).add(name_of(func))


@contextlib.contextmanager
def recording() -> Iterator[dict[str, set[str]]]:
    """Collect the names of the ops that run inside the body: ``"fused"``, ``"fallback"``, ``"refused"``."""
    token = _USED.set({"fused": set(), "fallback": set(), "refused": set()})
    try:
        yield _USED.get()  # type: ignore[misc]
    finally:
        _USED.reset(token)


def _escape(func: Any) -> ProbeError:
    return ProbeError(
        f".{name_of(func)}() takes numbers that depend on the input out of torch: what the model computes from them has no "
        "derivative, in any engine.\nKeep the value a tensor: write  x * y.max()  for  x * y.max().item()"
    )


def _raise_if_the_models_own(func: Any, args: Any, kwargs: Any) -> None:
    """Run the op on plain copies: if that fails too, the error is the model's own and is raised as it is."""
    plain_args, plain_kwargs = tree_map(lambda a: a.primal.clone() if isinstance(a, DualTensor) else a, (args, kwargs))
    func(*plain_args, **plain_kwargs)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
