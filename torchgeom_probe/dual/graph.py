"""A dual pass that autograd follows: backwards written by hand where they pay, and what has no right one is refused.

A rule's fast form writes into memory that autograd has saved, or calls a kernel that has no derivative.  In a pass with
``graph`` it takes the form here instead.  torch itself differentiates forward mode through some ops wrongly, without an
error (:data:`WRONG`): of these a rule has the derivative, or they are refused.

Legend: b is a buffer [1 + k, *shape], p its row 0, t the others; g is the gradient of what is put out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from torchgeom_probe.dual.followed import inside_a_custom_function
from torchgeom_probe.dual.ops import name_of
from torchgeom_probe.dual.passes import followed
from torchgeom_probe.errors import EngineRefusal
from torchgeom_probe.shapes import Tensor


def _as_given(method: Callable[..., Any]) -> Callable[..., Any]:
    """A forward or backward in the types that it is given, whatever autocast says."""

    @functools.wraps(method)
    def run(ctx: Any, first: Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *others)

    return run


def _backward(method: Callable[..., Any]) -> Any:
    return once_differentiable(_as_given(method))


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
        return Shifted.apply(b, shift, rows)
    b[:rows].add_(shift)
    return b


class Standardised(torch.autograd.Function):
    """x̂ = r (p - mean p), r = 1/√(var + ε), over the last axis;  x̂' = r P t with P = 1 - mean - x̂ mean(x̂ ·).

    r P is symmetric: torch's own backward kernel applies it.
    """

    @staticmethod
    @_as_given
    def forward(ctx: Any, b: Tensor, eps: float) -> Tensor:
        """[1 + k, *shape]."""
        p = b[0].contiguous()
        hat, mean, r = torch.native_layer_norm(p, p.shape[-1:], None, None, eps)
        out = torch.stack([hat, *(_projected(t, p, mean, r) for t in b[1:])])
        ctx.save_for_backward(b, hat, mean, r)
        return out

    @staticmethod
    @_backward
    def backward(ctx: Any, g: Tensor) -> Any:
        """∂/∂t = r P g;  ∂/∂p through x̂, on which x̂' depends as -m g - s e, and through r, a factor of x̂'.

        e = r (t - mean t), m = mean(x̂ e), s = mean(x̂ g), x̂' = e - x̂ m;  δx̂ = r P δp, δ log r = -r mean(x̂ δp).
        """
        b, hat, mean, r = ctx.saved_tensors
        p, r_p = b[0].contiguous(), r.to(b.dtype)
        by_hat, by_r, out = g[0], 0.0, torch.empty_like(g)
        for t, g_t, out_t in zip(b[1:], g[1:], out[1:], strict=True):
            e = t - t.mean(-1, keepdim=True)
            e *= r_p
            m, s = (hat * e).mean(-1, keepdim=True), (hat * g_t).mean(-1, keepdim=True)
            by_hat = torch.addcmul(by_hat, m, g_t, value=-1).addcmul_(s, e, value=-1)
            by_r = by_r + (e.mul_(g_t).mean(-1, keepdim=True) - m * s)  # mean(x̂' g)
            out_t.copy_(_projected(g_t, p, mean, r))
        out[0] = torch.addcmul(_projected(by_hat, p, mean, r), hat, by_r * r_p, value=-1)
        return out, None


def _projected(t: Tensor, p: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    return torch.ops.aten.native_layer_norm_backward(
        t.contiguous(), p, p.shape[-1:], mean, r, None, None, [True, False, False]
    )[0]


class BatchNormed(torch.autograd.Function):
    """Batch normalisation by the batch's statistics, which are constants along x and none along the parameters."""

    @staticmethod
    @_as_given
    def forward(
        ctx: Any, b: Tensor, weight: Any, bias: Any, running: tuple[Any, Any], momentum: Any, eps: Any
    ) -> Tensor:
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
    @_backward
    def backward(ctx: Any, g: Tensor) -> Any:
        """Torch's own for row 0, and the tangents' share through w and through 1/√(var + ε)."""
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
        return (
            out,
            None if weight is None else by_weight + by_scale * r,
            by_bias if wanted[2] else None,
            None,
            None,
            None,
        )


class Attended(torch.autograd.Function):
    """o = y v with y = softmax(s), s = c q kᵀ + bias;  o' = y' v + y v', y' = y (s' - m), m = Σ y s'.

    Queries, keys and values [1 + k, N, L or S, E].  Folded, [N, L k, ·] or [N, L, k ·], each product is one bmm.
    """

    @staticmethod
    @_as_given
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, c: float, softmax: Callable[..., Tensor]
    ) -> Tensor:
        """[1 + k, N, L, E]."""
        scores = torch.bmm(q[0], k[0].mT).mul_(c)
        y = softmax(scores if bias is None else scores + bias, -1).to(q.dtype)
        shape = (*y.shape[:2], len(q) - 1, y.shape[2])  # [N, L, k, S]
        moved = torch.bmm(_tall(q), k[0].mT).view(shape[0], shape[1], -1)
        moved = moved.baddbmm_(q[0], _beside(k).mT).mul_(c).view(shape)
        m = (moved * y[:, :, None]).sum(-1, keepdim=True)
        moved -= m
        pushed = torch.bmm((moved * y[:, :, None]).flatten(1, 2), v[0])
        pushed = pushed.view(*shape[:2], -1).baddbmm_(y, _tall(v).view(v.shape[1], v.shape[2], -1))
        ctx.save_for_backward(q, k, v, bias, y, moved, m)
        ctx.c = c
        return torch.cat([torch.bmm(y, v[0])[None], pushed.unflatten(2, (shape[2], -1)).permute(2, 0, 1, 3)])

    @staticmethod
    @_backward
    def backward(ctx: Any, g: Tensor) -> Any:
        """By y' first, whose gradient is b; then by y, where what it does in y' adds up; then by the scores."""
        q, k, v, bias, y, moved, m = ctx.saved_tensors
        n, length, count, span = moved.shape
        tall_g, y_k = _tall(g), y[:, :, None]
        wide_g = tall_g.view(n, length, -1)
        b = torch.bmm(tall_g, v[0].mT).view(moved.shape)
        mean = (b * y_k).sum(-1, keepdim=True)
        by_y = (b * moved - mean * (moved + m)).sum(2).baddbmm(g[0], v[0].mT)
        by_y.baddbmm_(wide_g, _tall(v).view(n, span, -1).mT)
        by_moved = (b - mean).mul_(y_k)
        by_scores = (by_y - (by_y * y).sum(-1, keepdim=True)).mul_(y)
        by_bias = by_scores.sum_to_size(bias.shape).to(bias.dtype) if ctx.needs_input_grad[3] else None
        by_moved, by_scores = by_moved.mul_(ctx.c), by_scores * ctx.c  # the bias may hold these very numbers
        tall, wide = by_moved.view(n, -1, span), by_moved.view(n, length, -1)
        rows = (count, -1)
        by_q = torch.bmm(by_scores, k[0]).baddbmm_(wide, _beside(k))
        by_k = torch.bmm(by_scores.mT, q[0]).baddbmm_(tall.mT, _tall(q))
        by_v = torch.bmm(y.mT, g[0]).baddbmm_((moved * y_k).view(n, -1, span).mT, tall_g)
        by_dq = torch.bmm(tall, k[0]).unflatten(1, (length, count)).permute(2, 0, 1, 3)
        by_dk = torch.bmm(wide.mT, q[0]).unflatten(1, rows).transpose(0, 1)
        by_dv = torch.bmm(y.mT, wide_g).unflatten(2, rows).permute(2, 0, 1, 3)
        pairs = ((by_q, by_dq), (by_k, by_dk), (by_v, by_dv))
        return *(torch.cat([first[None], others]) for first, others in pairs), by_bias, None, None


def _tall(b: Tensor) -> Tensor:
    """The tangents [k, N, L, E] as [N, L k, E]."""
    return b[1:].permute(1, 2, 0, 3).flatten(1, 2)


def _beside(b: Tensor) -> Tensor:
    """The tangents [k, N, S, E] as [N, k S, E]."""
    return b[1:].transpose(0, 1).flatten(1, 2)


def _channels(vector: Tensor, b: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (b.ndim - 3)).to(b.dtype)


def summed(rows: Tensor) -> Tensor:
    """The sum over the rows, without a pass where there is one."""
    return rows[0] if len(rows) == 1 else rows.sum(0)


# ---------------------------------------------------------------------------------------------- what cannot be followed

#: minor version of torch → ops through whose forward derivative its gradient is wrong, without an error; each was
#: compared with differences (tests/loss/test_ops.py).  What an earlier version has wrong is taken to be wrong later.
WRONG: dict[tuple[int, int], str] = {
    (2, 14): "layer_norm native_layer_norm batch_norm native_batch_norm instance_norm cumprod det slogdet logdet solve"
    " solve_ex tensorsolve householder_product orgqr"
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
    "the model calls a custom autograd.Function on a tensor that depends on the input: its backward knows nothing of"
    " the tangents, so the gradient would be wrong.  Activation checkpointing with use_reentrant=True is one.\n"
    "Write it with torch's own ops for the loss, or turn checkpointing off:  model.set_grad_checkpointing(False), or "
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
            f"torch's gradient of the forward derivative of {name_of(func)!r} is wrong, without an error.\n"
            "Write it with what is sound: torch.linalg.inv, cholesky, solve_triangular or qr (log |det A| ="
            " qr(A).R.diagonal().abs().log().sum())."
        )
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        raise EngineRefusal(
            f"the op {name_of(func)!r} is called from C++, or is none of torch's: autograd does not follow its"
            " tangents.\nTake a layer before it, or write it with torch's own ops for the loss."
        )
