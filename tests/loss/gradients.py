"""One call in a dual pass that keeps a graph, judged: the gradient of what it puts out against differences.

L = Σ U₀ f(p) + Σ U_k J(p) t_k for random U, along a random step of everything that it depends on: p, t, and the plain
tensors among the arguments.  The differences are of fourth order, of the pass without a graph, which has oracles of its
own (tests/dual/judge.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from dual.judge import ALL, FIRST, Verdict, _buffers, copied, is_smooth
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchgeom_probe.dual import DualTensor, dual_pass
from torchgeom_probe.errors import ProbeError

__all__ = ["ALL", "FIRST", "judged_gradient"]
STEPS = (1e-2, 1e-3, 1e-4, 1e-5)
#: relative: how far two quotients may be apart to count as one, and the gradient from that one
TRUSTED, EXACT = 1e-5, 1e-7


def judged_gradient(function: Callable[..., Any], args: Any, kwargs: Any, which: slice = ALL) -> Verdict:
    """``function(*args, **kwargs)`` with some of its floating tensors dual."""
    leaves, spec = tree_flatten((args, kwargs))
    smooth = [i for i, leaf in enumerate(leaves) if is_smooth(leaf)]
    where = smooth[which]
    if not where or any(isinstance(leaf, torch.Tensor) and leaf.layout != torch.strided for leaf in leaves):
        return Verdict("skipped", "no strided floating input here")
    generator = torch.Generator().manual_seed(3)
    at = {i: _buffers({i: leaves[i]})[i] if i in where else copied(leaves[i]) for i in smooth}
    if any(
        torch.finfo(x.dtype).eps > 1e-12
        or x.is_complex()
        or (x.numel() != x.unique_consecutive().numel() and x.stride() and 0 in x.stride())
        for x in at.values()
    ):
        return Verdict("skipped", "complex or expanded")
    step = {i: torch.randn(x.shape, dtype=x.dtype, generator=generator) for i, x in at.items()}

    def value(point: dict[int, torch.Tensor], *, graph: bool) -> torch.Tensor:
        filled = [copied(leaf) for leaf in leaves]
        torch.manual_seed(1)
        with dual_pass(graph=graph, batch_statistics=True):
            for i, x in point.items():
                filled[i] = DualTensor(x * 1.0) if i in where else x * 1.0
            op_args, op_kwargs = tree_unflatten(filled, spec)
            outs = tree_flatten(function(*op_args, **op_kwargs))[0]
            draw, total = torch.Generator().manual_seed(5), torch.zeros((), dtype=torch.float64)
            for out in outs:
                if isinstance(out, DualTensor):
                    b = torch.view_as_real(out.buffer) if out.buffer.is_complex() else out.buffer
                    total = total + (b * torch.randn(b.shape, dtype=b.dtype, generator=draw)).sum().double()
        return total

    with torch.no_grad():
        try:
            quotients = [
                _quotient(lambda s: value({i: at[i] + s * step[i] for i in at}, graph=False), h) for h in STEPS
            ]
        except Exception as error:
            return Verdict("skipped", f"without a graph: {type(error).__name__}")
    near = [(abs(a - b), b) for a, b in itertools.pairwise(quotients)]
    apart, difference = min(near, key=lambda pair: float(pair[0].nan_to_num(torch.inf)))
    point = {i: x.clone().requires_grad_() for i, x in at.items()}
    try:
        total = value(point, graph=True)
        if not total.requires_grad:
            found = torch.zeros(())
        else:
            gradients = torch.autograd.grad(total, list(point.values()), allow_unused=True)
            found = sum((g * step[i]).sum() for i, g in zip(point, gradients, strict=True) if g is not None)
    except ProbeError as error:
        return Verdict("refused", str(error).splitlines()[0])
    except Exception as error:
        if "not differentiable with respect to argument" in str(error):  # nor in a plain step
            return Verdict("skipped", str(error))
        return Verdict("crashed", f"{type(error).__name__}: {error}".splitlines()[0])
    scale = max(1.0, abs(difference))
    if not apart <= TRUSTED * scale:
        return Verdict("skipped", "no quotient to trust")
    off = min(abs(found - q) for q in quotients if q.isfinite())
    return (
        Verdict("equal")
        if off <= EXACT * scale + 10 * apart
        else Verdict("wrong", f"{found:.8g}, not {difference:.8g}")
    )


def _quotient(value: Callable[[float], torch.Tensor], h: float) -> torch.Tensor:
    return (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
