"""A dual pass that autograd follows: backwards written by hand where they pay, and what has no right one is refused.

A rule's fast form writes into memory that autograd has saved, or calls a kernel that has no derivative.  In a pass with
``graph`` it takes the form here instead.  torch itself differentiates forward mode through some ops wrongly, without an
error (:data:`WRONG`): of these a rule has the derivative, or they are refused.

Legend: b is a buffer [1 + k, *shape], p its row 0, t the others; g is the gradient of what is put out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from torchgeom_probe.dual.followed import inside_a_custom_function
from torchgeom_probe.dual.ops import name_of
from torchgeom_probe.dual.passes import followed
from torchgeom_probe.errors import EngineRefusal
from torchgeom_probe.shapes import Tensor


class Pushed(torch.autograd.Function):
    """f(p) in row 0, f'(p) t in the others; f'' is in the graph of f' at a p of their own, ``at_p`` = (p, f, f')."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, at_p: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """[1 + k, *shape]."""
        p, value, slope = at_p
        out = torch.empty_like(b, dtype=value.dtype)
        torch.mul(b[1:], slope.detach(), out=out[1:])
        out[0].copy_(value)
        ctx.save_for_backward(b, slope.detach())
        ctx.at_p = p, *(get_gradient_edge(y) if y.requires_grad else None for y in (value, slope))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        """∂/∂p = f' g₀ + f'' Σ t g, ∂/∂t = f' g."""
        (b, slope), (p, *edges) = ctx.saved_tensors, ctx.at_p
        out = torch.empty_like(b)
        torch.mul(g[1:], slope, out=out[1:])
        # of a piecewise linear function f' has no edge
        gradients = [g[0], summed(g[1:] * b[1:]).to(slope.dtype) if edges[1] else None]
        outs = [(e, at) for e, at in zip(edges, gradients, strict=True) if e]
        found = torch.autograd.grad([e for e, _ in outs], p, [at for _, at in outs], retain_graph=True)[0]
        out[0].copy_(found)
        return out, None


class Shifted(torch.autograd.Function):
    """Add to the first rows alone, in place: the gradient passes as it is, without a copy of it."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, shift: Tensor, rows: int) -> Tensor:
        """The buffer itself."""
        ctx.mark_dirty(b)
        ctx.of_shift = shift.shape, shift.dtype, rows
        b[:rows].add_(shift)
        return b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        """The gradient, and that of the first rows summed to the shift's shape."""
        shape, dtype, rows = ctx.of_shift
        return g, g[:rows].sum_to_size(shape).to(dtype) if ctx.needs_input_grad[1] else None, None


def shifted(b: Tensor, shift: Any, rows: int = 1) -> Tensor:
    """Add to row 0, in place; ``rows``: of a buffer whose rows are folded into the batch, so many."""
    if followed() and isinstance(shift, Tensor):
        return Shifted.apply(b, shift, rows)  # type: ignore[no-untyped-call]
    b[:rows].add_(shift)
    return b


class Standardised(torch.autograd.Function):
    """x̂ = (p - mean) r, r = 1/√(var + ε), over the last axis, and x̂' = e - x̂ m, e = r (t - mean t), m = mean(x̂ e)."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, eps: float) -> Tensor:
        """[1 + k, *shape]."""
        variance, mean = torch.var_mean(b[0], -1, correction=0, keepdim=True)
        r = torch.rsqrt(variance + eps)
        out = (b - torch.cat([mean[None], b[1:].mean(-1, keepdim=True)])).mul_(r)
        m = (out[1:] * out[0]).mean(-1, keepdim=True)
        out[1:].addcmul_(m, out[0], value=-1)
        ctx.save_for_backward(out, r, m)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        """With P = 1 - mean - x̂ mean(x̂ ·), symmetric: ∂/∂t = r P g, and by p through x̂ and through r."""
        out, r, m = ctx.saved_tensors
        hat, pushed = out[0], out[1:]
        s = (g[1:] * hat).mean(-1, keepdim=True)
        # x̂' depends on x̂ as -m g - s e, e = x̂' + x̂ m, and on r as a multiple of it
        by_hat = g[0] - summed(g[1:] * m + s * (pushed + hat * m))
        by_r = summed((g[1:] * pushed).mean(-1, keepdim=True))
        rows = torch.cat([by_hat[None], g[1:]])
        s = torch.cat([(by_hat * hat).mean(-1, keepdim=True)[None], s])
        s[0] += by_r  # δ log r = -r mean(x̂ δp)
        return (rows - rows.mean(-1, keepdim=True)).sub_(s * hat).mul_(r), None


class BatchNormed(torch.autograd.Function):
    """Batch normalisation by the batch's statistics, which are constants along x and none along the parameters."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, weight: Any, bias: Any, running: tuple[Any, Any], momentum: Any, eps: Any) -> Tensor:
        """Row 0 as torch makes it, with the running statistics; the tangents times w/√(var + ε)."""
        value, mean, r = torch.native_batch_norm(b[0], weight, bias, *running, True, momentum, eps)
        scale = r if weight is None else r * weight
        out = torch.empty_like(b, dtype=value.dtype)
        torch.mul(b[1:], _channels(scale, b), out=out[1:])
        out[0].copy_(value)
        ctx.save_for_backward(b, weight, mean, r)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        """torch's own for row 0, and the tangents' share through w and through 1/√(var + ε)."""
        b, weight, mean, r = ctx.saved_tensors
        p, axes = b[0], [0, *range(2, b.ndim - 1)]
        wanted = [True, weight is not None, ctx.needs_input_grad[2]]
        by_p, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            g[0].contiguous(), p, weight, None, None, mean, r, True, ctx.eps, wanted
        )
        scale = r if weight is None else r * weight
        by_scale = (g[1:] * b[1:]).sum([0, *(a + 1 for a in axes)])
        by_r = by_scale if weight is None else by_scale * weight
        factor = -(r**3) * by_r * (b.shape[2] / p.numel())  # ∂r/∂p = -r³ (p - mean)/N
        out = torch.empty_like(b)
        torch.mul(g[1:], _channels(scale, b), out=out[1:])
        out[0] = by_p + (p - _channels(mean, b)) * _channels(factor, b)
        return out, None if weight is None else by_weight + by_scale * r, by_bias if wanted[2] else None, None, None, None


def _channels(vector: Tensor, b: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (b.ndim - 3)).to(b.dtype)


def summed(rows: Tensor) -> Tensor:
    """The sum over the rows, without a pass where there is one."""
    return rows[0] if len(rows) == 1 else rows.sum(0)


# ------------------------------------------------------------------------------------------------ what cannot be followed

#: minor version of torch → ops through whose forward derivative its gradient is wrong, without an error; each was compared
#: with differences (tests/loss/test_ops.py).  What an earlier version has wrong is taken to be wrong in later ones.
WRONG: dict[tuple[int, int], str] = {
    (2, 14): "layer_norm native_layer_norm batch_norm native_batch_norm instance_norm cumprod det slogdet logdet solve"
    " solve_ex tensorsolve householder_product orgqr",
}


def refuse_unfollowed() -> None:
    """Refuse an op whose derivative autograd would not see: in a custom function, or in what is computed again later.

    Raises:
        EngineRefusal: a custom ``autograd.Function``, activation checkpointing.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and "checkpoint" in getattr(hooks[0], "__qualname__", ""):
        raise EngineRefusal(_CHECKPOINTS)
    if not torch.is_grad_enabled() and inside_a_custom_function():
        raise EngineRefusal(CUSTOM_FUNCTION)


def refuse_no_gradient(op: Any, value: Tensor, *primals: Any) -> None:
    """Refuse an op of which a rule knows the derivative, and torch does not: the value itself would have no gradient.

    Raises:
        EngineRefusal: one of the primals has a graph, and the value has none.
    """
    if not value.requires_grad and any(getattr(p, "requires_grad", False) for p in primals):
        raise EngineRefusal(f"torch has no gradient of {name_of(op)!r}.\nWrite it with what torch has a gradient of.")


CUSTOM_FUNCTION = (
    "the model calls a custom autograd.Function on a tensor that depends on the input: its backward knows nothing of the"
    " tangents, so the gradient would be wrong.  Activation checkpointing with use_reentrant=True is one.\nWrite it with"
    " torch's own ops for the loss, or turn checkpointing off:  model.set_grad_checkpointing(False), or "
    " model.gradient_checkpointing_disable()"
)
_CHECKPOINTS = (
    "the model runs a part under activation checkpointing, which is run again in the backward pass, without the"
    " tangents.\nTurn it off for the loss:  model.set_grad_checkpointing(False), or "
    " model.gradient_checkpointing_disable()"
)


def refuse_wrong(func: Any) -> None:
    """Refuse an op that has no rule, and whose forward derivative torch cannot be trusted to differentiate.

    Raises:
        EngineRefusal: it is on the list, or it is not torch's own.
    """
    installed = tuple(int(part) for part in torch.__version__.split(".")[:2])
    listed = [op for version, ops in WRONG.items() if version <= max(installed, min(WRONG)) for op in ops.split()]
    if name_of(func).removeprefix("linalg_").removesuffix("_") in listed:
        raise EngineRefusal(
            f"torch's gradient of the forward derivative of {name_of(func)!r} is wrong, without an error.\nWrite it with"
            " what is sound: torch.linalg.inv, cholesky, solve_triangular or qr (log |det A| ="
            " qr(A).R.diagonal().abs().log().sum())."
        )
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        raise EngineRefusal(
            f"the op {name_of(func)!r} is called from C++, or is none of torch's: autograd does not follow its"
            " tangents.\nTake a layer before it, or write it with torch's own ops for the loss."
        )
