"""One op's derivative from torch itself, where no rule covers it: forward mode, or else reverse mode, never a guess.

torch reads the derivative of an op that has none (a custom op without a jvp, most of torchvision's kernels, some of
``torch.special``) as zero, without a word.  Asked of that op alone it can tell the two apart: of a true zero it gives
the tangent, of a missing derivative it gives none.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchgeom_probe.dual.followed import Followed, has_tangent
from torchgeom_probe.dual.ops import smooth
from torchgeom_probe.dual.passes import current_pass
from torchgeom_probe.errors import EngineRefusal, first_line
from torchgeom_probe.shapes import Tensor

#: What rounding explains of ⟨u, Jv⟩ − ⟨Jᵀu, v⟩, relative to the vectors' lengths: so many times the type's own.
_ROUNDING = 1e3


@dataclass(frozen=True, eq=False)
class OneOp:
    """A call of one op, some of whose floating arguments carry tangents.

    Attributes:
        func, leaves, spec: the op and its arguments, flattened.
        buffers: place among the leaves → [1 + k, *shape], a primal and its tangents.
        writes: whether the op writes to its first argument, which then is what it puts out.
        may_be_constant: whether an output without a tangent is a constant, and no derivative that is missing.
    """

    func: Any
    leaves: list[Any]
    spec: Any
    buffers: dict[int, Tensor]
    writes: bool
    may_be_constant: bool

    def outputs(self) -> tuple[list[Any], list[bool], Any]:
        """What it puts out, flattened; which of it are buffers [1 + k, *shape]; how to put it together again.

        Raises:
            EngineRefusal: it has no derivative that could be used.
        """
        state = torch.get_rng_state()
        complete, why = False, "torch's forward mode gives no tangent"
        try:
            complete, *found = self._by_jvp()
        except NotImplementedError as error:
            why = first_line(error)
            if "mkldnn" in why:  # its fused LSTM has no derivative, torch's own has
                torch.set_rng_state(state)
                with contextlib.suppress(Exception), _without_mkldnn():
                    complete, *found = self._by_jvp()
        except Exception as error:
            why = first_line(error)
        if complete:
            return tuple(found)
        if current_pass().graph:
            raise EngineRefusal(f"{why}; and of reverse mode there is no gradient")
        torch.set_rng_state(state)  # the same numbers again
        try:
            return self._by_reverse()
        except Exception as error:
            raise EngineRefusal(f"{why}; in reverse mode: {first_line(error)}") from error

    def _run(self, primals: Any) -> tuple[list[Any], Any]:
        """The op at other primals."""
        filled = list(self.leaves)
        for place, primal in zip(self.buffers, primals, strict=True):
            filled[place] = primal
        args, kwargs = tree_unflatten(filled, self.spec)
        if self.writes:
            args = (args[0].clone(), *args[1:])
        out = self.func(*args, **kwargs)
        return tree_flatten(args[0] if self.writes else out)

    def _by_jvp(self) -> tuple[bool, list[Any], list[bool], Any]:
        """``vmap(jvp(op))``: the primal once, the k tangents batched; before it, whether no derivative was missing."""
        layout: list[Any] = []

        def op(*primals: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            with Followed(*primals, reverse=False) if inspect.isfunction(self.func) else contextlib.nullcontext():
                flat, spec = self._run(primals)
            dual = [smooth(o) and has_tangent(o) for o in flat]
            complete = self.may_be_constant or all(d for o, d in zip(flat, dual, strict=True) if _counts(o))
            layout[:] = [spec, dual, [None if isinstance(o, Tensor) else o for o in flat], complete]
            carried = [o for o, d in zip(flat, dual, strict=True) if d]
            # The first primal: jvp refuses to put out nothing.
            return carried or [primals[0]], [
                o for o, d in zip(flat, dual, strict=True) if isinstance(o, Tensor) and not d
            ]

        def pushed(*tangents: Tensor) -> Any:
            return torch.func.jvp(op, tuple(b[0] for b in self.buffers.values()), tangents, has_aux=True)

        tangents = [b[1:] for b in self.buffers.values()]
        values, pushes, constants = torch.func.vmap(pushed, randomness="same")(*tangents)
        spec, dual, outputs, complete = layout
        # vmap repeats what does not depend on the tangents (a view, no copy): row 0 is it.
        carried = iter([torch.cat([v[:1], t.to(v.dtype)]) for v, t in zip(values, pushes, strict=True)])
        plain = iter([c[0] for c in constants])
        flat = [
            next(carried) if d else value if value is not None else next(plain, None)
            for d, value in zip(dual, outputs, strict=True)
        ]
        return complete, flat, dual, spec

    def _by_reverse(self) -> tuple[list[Any], list[bool], Any]:
        """Reverse mode: Jv as the derivative of u ↦ Jᵀu, which is then compared with Jᵀu itself."""
        with torch.inference_mode(False), torch.enable_grad():
            own = replace(self, leaves=[_outside(leaf) for leaf in self.leaves])
            points = [b[0].clone().requires_grad_() for b in self.buffers.values()]
            views = [p.view_as(p) for p in points]
            with Followed(*views, reverse=True) if inspect.isfunction(self.func) else contextlib.nullcontext():
                flat, spec = own._run(views)
            outs = [o for o in flat if _counts(o)]
            if not all(o.requires_grad and not o.is_complex() for o in outs):
                raise EngineRefusal("it has no derivative there either")
            us = [torch.zeros_like(o).requires_grad_() for o in outs]
            found = torch.autograd.grad(outs, points, us, create_graph=True, allow_unused=True)
            pairs = [(g, b[1:].clone()) for g, b in zip(found, self.buffers.values(), strict=True) if g is not None]
            if not pairs or not all(g.requires_grad for g, _ in pairs):
                raise EngineRefusal("its backward cannot be differentiated in turn")
            count = len(next(iter(self.buffers.values()))) - 1
            pushes = [_pushed(pairs, us, j) for j in range(count)]
            inputs = [p for p, g in zip(points, found, strict=True) if g is not None]
            refuse_another_adjoint(
                [sum(parts) for parts in zip(*pushes, strict=True)],
                [t.sum(0) for _, t in pairs],
                lambda us: torch.autograd.grad(outs, inputs, us, retain_graph=True),
            )
        rows = iter([torch.stack([o.detach(), *(p[i] for p in pushes)]) for i, o in enumerate(outs)])
        return [next(rows) if _counts(o) else o for o in flat], [_counts(o) for o in flat], spec


def _counts(output: Any) -> bool:
    """Whether it must have a derivative: some ops put out an empty tensor for what was not asked."""
    return smooth(output) and (output.numel() > 0 or output.requires_grad)


@contextlib.contextmanager
def _without_mkldnn() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(False)
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _outside(leaf: Any) -> Any:
    """A tensor that autograd may keep: one made in inference mode is copied."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _pushed(pairs: list[tuple[Tensor, Tensor]], us: list[Tensor], j: int) -> list[Tensor]:
    """Jv of every output for tangent ``j``, from what u was pulled back to."""
    found = torch.autograd.grad(
        [g for g, _ in pairs], us, [t[j] for _, t in pairs], retain_graph=True, allow_unused=True
    )
    return [torch.zeros_like(u) if f is None else f.detach() for f, u in zip(found, us, strict=True)]


def refuse_another_adjoint(
    pushed: Sequence[Tensor],
    v: Sequence[Tensor],
    pull: Callable[[list[Tensor]], Sequence[Tensor]],
    why: str = "the derivative of its backward is not what its backward says",
) -> None:
    """Compare ⟨u, Jv⟩ with ⟨Jᵀu, v⟩, where Jv was made as the derivative of u ↦ Jᵀu: one plain backward pass.

    A backward that hides a part of itself from autograd (a kernel, a custom op, ``detach``) loses that part when it is
    differentiated, and torch says nothing.

    Raises:
        EngineRefusal: they differ by more than rounding explains; it says ``why``.
    """
    # Jv itself, so that no part of it goes unseen, and something that is not zero where Jv is.
    us = [p / (p.norm() + torch.finfo(p.dtype).tiny) + waves(p) for p in pushed]
    pulled = pull(us)
    apart = (_inner(us, pushed) - _inner(pulled, v)).abs()
    size = (_inner(us, us) * _inner(pushed, pushed)).sqrt() + (_inner(pulled, pulled) * _inner(v, v)).sqrt()
    allowed = min(_ROUNDING * max(torch.finfo(p.dtype).eps for p in pushed), 0.05)
    if not bool((apart <= allowed * size) | ~size.isfinite()):
        raise EngineRefusal(why)


def waves(like: Tensor) -> Tensor:
    """A vector of length 1 without a pattern, the same at every call: no generator is touched."""
    numbers = torch.arange(1, like.numel() + 1, device=like.device, dtype=torch.float64).sin().reshape(like.shape)
    return (numbers / numbers.norm().clamp_min(1e-300)).to(like.dtype)


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)]).sum()
