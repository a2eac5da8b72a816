"""The dual pass compiled: hooks and reductions included, traced once per shape with ``make_fx`` and compiled by Inductor.

Weights and buffers are inputs of the graph: the next step of a training runs the same compiled code on the new weights.  What the
trace does bake in (Python numbers on the modules, hooks, the set of modules) is part of the key, so a change of it is traced anew.
"""

from __future__ import annotations

import itertools
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchgeom_probe.jacobian import fused
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.gram import Factor
from torchgeom_probe.model.hooked import Batch, Task
from torchgeom_probe.model.isolation import FRAMEWORKS
from torchgeom_probe.shapes import Tensor

#: Attributes of nn.Module that hold what is an input of the graph, or is walked on its own.
_WALKED = {"_parameters", "_buffers", "_modules"}
#: How often the same shapes are compiled anew because something else changed.
_MOST_VERSIONS = 4
#: Containers longer than this are known by who they are and how long.
_MANY = 1000
_NEVER_THE_SAME = itertools.count()
_CONTAINERS = (list, tuple, set, frozenset, dict)
_SIMPLE = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


@dataclass
class _Traced:
    """What a compiled call gives back, flat: per entry the factor's matrix and what it is."""

    entries: list[tuple[str, bool, torch.dtype | None]] = field(default_factory=list)

    def flat(self, factors: dict[str, Factor]) -> list[Tensor]:
        self.entries = [(e, f.triangle is not None, f.dtype) for e, f in factors.items()]
        return [_matrix(f) for f in factors.values()]

    def factors(self, matrices: Sequence[Tensor]) -> dict[str, Factor]:
        return {
            entry: Factor(triangle=m, dtype=dtype) if triangular else Factor(gram=m, dtype=dtype)
            for (entry, triangular, dtype), m in zip(self.entries, matrices, strict=True)
        }


class CompiledPasses:
    """The compiled passes of one probe, by shape.  What cannot be compiled runs eagerly, with one warning that says why."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._passes: dict[Any, tuple[Callable[..., Any], _Traced, list[Any]]] = {}
        self._refusal: str | None = None

    def factors(self, batch: Batch, directions: Tensor, plan: Plan) -> dict[str, Factor] | None:
        """Push the directions and reduce, per entry; None where the eager pass has to do it."""
        if self._refusal is not None:
            return None
        if plan.random:
            self.refuse(
                "the model draws random numbers, which compiled code would draw from another generator"
            )
            return None
        names, inputs, layout = self._inputs(batch, directions)
        held: list[Any] = []
        leaves, spec = layout
        fixed = (
            [None if isinstance(v, Tensor) else _fixed(v, held) for v in leaves],
            str(spec),
            _ties(self._task.model),
            _settings(self._task.model, held),
        )
        key = (tuple(_signature(v) for v in inputs), repr(fixed))
        if key not in self._passes:
            if sum(known[0] == key[0] for known in self._passes) >= _MOST_VERSIONS:
                self.refuse(
                    f"the same shapes were compiled {_MOST_VERSIONS} times, because attributes of the model's modules change between "
                    "measurements (a counter, say); a tensor that changes belongs into a buffer"
                )
                return None
            try:
                # Held: an id in the key must not become that of another object.
                self._passes[key] = (*self._compiled(names, inputs, layout, batch, plan), held)
            except Exception as error:  # whatever breaks in a compiler, the eager pass is there
                first = str(error).strip().splitlines()
                self.refuse(f"{type(error).__name__}: {first[0] if first else ''}")
                return None
        run, traced, _ = self._passes[key]
        matrices = run(*inputs)
        # Under CUDA graphs the next replay writes over what this one returned.
        return traced.factors([m.clone() if m.is_cuda else m for m in matrices])

    def refuse(self, why: str) -> None:
        """Run eagerly from now on, and say so once."""
        if self._refusal is None:
            self._refusal = why
            warnings.warn(f"compile=True has no effect here, the pass runs eagerly: {why}", stacklevel=5)

    def _inputs(self, batch: Batch, directions: Tensor) -> tuple[list[str], list[Tensor], Any]:
        model = self._task.model
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        leaves, layout = tree_flatten((batch.args, dict(batch.kwargs)))
        tensors = [v.detach() for v in leaves if isinstance(v, Tensor)]
        return list(state), [*(v.detach() for v in state.values()), *tensors, directions], (leaves, layout)

    def _compiled(
        self, names: list[str], inputs: list[Tensor], layout: Any, batch: Batch, plan: Plan
    ) -> tuple[Callable[..., Any], _Traced]:
        import torch._inductor
        from torch.fx.experimental.proxy_tensor import make_fx

        leaves, spec = layout
        traced = _Traced()

        def whole_pass(*tensors: Tensor) -> list[Tensor]:
            state = dict(zip(names, tensors, strict=False))
            given = iter(tensors[len(names) : -1])
            args, kwargs = tree_unflatten([next(given) if isinstance(v, Tensor) else v for v in leaves], spec)
            point = None
            if batch.point is not None:
                point = next(
                    v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()
                )
            factors: dict[str, Factor] = {}

            def reduce(entry: str, blocks: list[Tensor]) -> None:
                factors[entry] = Factor.of(blocks)

            given_batch = Batch(args, kwargs, batch.size, point)
            fused.push(
                self._task,
                given_batch,
                tensors[-1],
                reduce,
                state=state,
                any_order=True,
                own_layout=not plan.writes_through_views,
            )
            return traced.flat(factors)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a compiler's own, of its own code
            graph = make_fx(whole_pass)(*inputs)
            on_cuda = inputs[-1].is_cuda
            options = {"triton.cudagraphs": True} if on_cuda else None
            run = torch._inductor.compile(graph, list(inputs), options=options)
            eager, compiled = whole_pass(*inputs), run(*inputs)
        self._refuse_another_result(traced, eager, compiled)
        return run, traced

    def _refuse_another_result(
        self, traced: _Traced, eager: list[Tensor], compiled: Sequence[Tensor]
    ) -> None:
        """Compare the first result with the eager pass on the same numbers: a compiler's mistake must not become ours."""
        for (entry, triangular, dtype), expected, found in zip(traced.entries, eager, compiled, strict=True):
            if triangular:  # the signs of the rows of R are free
                expected, found = expected.mT @ expected, found.mT @ found
            eps = torch.finfo(dtype or expected.dtype).eps
            allowed = 1e-6 if eps < 1e-12 else max(1e-2, 8 * eps)
            scale = expected.abs().amax().nan_to_num(posinf=0.0)
            if ((found - expected).abs() > allowed * scale).any():
                raise RuntimeError(
                    f"the compiled pass gives layer {entry!r} another result than the eager one"
                )


def _matrix(factor: Factor) -> Tensor:
    matrix = factor.triangle if factor.triangle is not None else factor.gram
    assert matrix is not None
    return matrix


def _signature(tensor: Tensor) -> Any:
    return (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _ties(model: nn.Module) -> list[tuple[str, int]]:
    """Names of the parameters and buffers, each with the place of the first that is the same tensor."""
    first: dict[int, int] = {}
    found = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, first.setdefault(id(tensor), place)) for place, (name, tensor) in enumerate(found)]


def _settings(model: nn.Module, held: list[Any]) -> list[Any]:
    """Everything of the modules but their tensors' numbers: what a trace takes as constant; objects known by their id go to ``held``."""
    held.extend(model.modules())
    return [
        (
            name,
            id(module),
            _of_class(type(module), held),
            _fixed({k: v for k, v in vars(module).items() if k not in _WALKED}, held),
        )
        for name, module in model.named_modules()
    ]


def _of_class(cls: type, held: list[Any]) -> list[Any]:
    """The attributes of a module's class, and those that it inherits below nn.Module."""
    own = [base for base in cls.__mro__ if base not in nn.Module.__mro__]
    held.extend(own)
    return [
        (id(base), key, _fixed(value, held) if isinstance(value, (*_SIMPLE, *_CONTAINERS)) else id(value))
        for base in own
        for key, value in vars(base).items()
        if not key.startswith("__")
    ]


def _fixed(value: Any, held: list[Any], depth: int = 6) -> Any:
    if isinstance(value, _SIMPLE):
        return (type(value).__name__, value)
    held.append(value)
    if isinstance(value, Tensor):  # read where it lies; replaced or written to, it is another
        return (id(value), -1 if value.is_inference() else value._version)
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, types.SimpleNamespace):
        return _fixed(vars(value), held, depth)
    framework = type(value).__module__.split(".")[0] in FRAMEWORKS and not isinstance(value, _CONTAINERS)
    if framework or isinstance(value, (type, nn.Module, types.ModuleType)):
        return id(value)
    long = isinstance(value, _CONTAINERS) and len(value) > _MANY
    if depth == 0 or long:
        # Too deep or too long to compare: never the same again, so that it is compiled anew, and soon not at all.
        return ("another", next(_NEVER_THE_SAME))
    if isinstance(value, dict):
        return [(repr(k), _fixed(v, held, depth - 1)) for k, v in value.items()]
    if isinstance(value, _CONTAINERS):
        return (type(value).__name__, [_fixed(v, held, depth - 1) for v in value])
    inner = dict(getattr(value, "__dict__", {}))
    for slot in getattr(type(value), "__slots__", ()):
        inner[slot] = getattr(value, slot, None)
    return (id(value), _fixed(inner, held, depth - 1) if inner else None)
