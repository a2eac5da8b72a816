"""Softmax, and scaled dot-product attention, whose score tangents are never held for all rows at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from torchgeom_probe.dual.graph import Attended
from torchgeom_probe.dual.passes import current_pass, followed
from torchgeom_probe.dual.registry import (
    any_dual,
    from_end,
    reduced,
    register,
    row_by_row,
    rows_like,
    rows_of,
    rule,
    with_rows,
)
from torchgeom_probe.dual.tensor import DualTensor
from torchgeom_probe.shapes import Tensor

aten = torch.ops.aten

#: Bytes of score tangents worked on at once: on the CPU what stays in cache, elsewhere what keeps the device busy.
_SCORE_BYTES = {"cpu": 1 << 20}
_SCORE_BYTES_ELSEWHERE = 1 << 28


def softmax_rows(buffer: Tensor, dim: int, softmax: Callable[..., Tensor] = torch.softmax) -> Tensor:
    """The softmax of a buffer along a negative axis; torch's safe one is 0 where all is -∞."""
    # y = softmax(p);  y' = y (t - Σ y t), a symmetric Jacobian: torch's own backward kernel applies it in one sweep
    y = softmax(buffer[0], dim)
    buffer = buffer.to(y.dtype)  # autocast may widen it
    if followed():
        weighted = buffer[1:] * y
        return torch.cat([y[None], weighted - weighted.sum(dim, keepdim=True) * y])
    out = rows_like(y, len(buffer))
    out[0].copy_(y)
    if row_by_row(buffer) and buffer.is_contiguous():
        for row in range(1, buffer.shape[0]):
            aten._softmax_backward_data.out(buffer[row], y, dim, buffer.dtype, grad_input=out[row])
        return out
    weighted = torch.mul(buffer[1:], y, out=out[1:])
    weighted.addcmul_(weighted.sum(dim, keepdim=True), y, value=-1)
    return out


def _softmax(
    input: DualTensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None, softmax: Any = torch.softmax
) -> Any:
    if dim is None or input.buffer.ndim == 1:
        return NotImplemented
    b = input.buffer if dtype is None else input.buffer.to(dtype)
    return DualTensor(softmax_rows(b, from_end(dim, b.ndim - 1), softmax))


def _log_softmax(input: DualTensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    # y = log softmax(p);  y' = t - Σ e^y t
    if dim is None or input.buffer.ndim == 1:
        return NotImplemented
    dim = from_end(dim, input.buffer.ndim - 1)
    b = input.buffer if dtype is None else input.buffer.to(dtype)
    y = torch.log_softmax(b[0], dim)
    b = b.to(y.dtype)
    mean = (b[1:] * y.exp()).sum(dim, keepdim=True)
    if followed():
        return DualTensor(torch.cat([y[None], b[1:] - mean]))
    out = rows_like(y, len(b))
    torch.sub(b[1:], mean, out=out[1:])
    out[0].copy_(y)
    return DualTensor(out)


# F's third positional argument is a stack level, torch's and Tensor's is a type.
register(_softmax, "F.softmax")
register(
    lambda input, dim, dtype=None: _softmax(input, dim, dtype=dtype), "torch.softmax Tensor.softmax special.softmax"
)
register(
    lambda input, dim, dtype=None: _softmax(input, dim, dtype=dtype, softmax=torch._safe_softmax), "torch._safe_softmax"
)
register(_log_softmax, "F.log_softmax")
register(
    lambda input, dim, dtype=None: _log_softmax(input, dim, dtype=dtype),
    "torch.log_softmax Tensor.log_softmax special.log_softmax",
)


register(
    lambda input, dim=None, _stacklevel=3, dtype=None: _softmax(DualTensor(-input.buffer), dim, dtype=dtype),
    "F.softmin",
)


@rule("logsumexp")
def _logsumexp(input: DualTensor, dim: Any, keepdim: bool = False) -> Any:
    # y = log Σ e^p;  y' = Σ e^(p - y) t
    if input.buffer.ndim == 1:
        return NotImplemented
    dims = reduced(dim, input.buffer.ndim - 1)
    y = torch.logsumexp(input.primal, dims, keepdim=True)
    tangents = (input.tangents * (input.primal - y).exp()).sum(dims, keepdim=True)
    out = torch.cat([y[None], tangents])
    return DualTensor(out if keepdim else out.squeeze(dims))


@rule("scaled_dot_product_attention")
def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    # o = y v, y = softmax(s), s = c q kᵀ + mask.  With a = y s':  y' = a - y Σ a,  so  o' = a v - (Σ a) o + y v'
    if is_causal and attn_mask is not None:
        return NotImplemented
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as torch's own attention does: in the narrow type, all of it
        narrow = torch.get_autocast_dtype(device)
        query, key, value, attn_mask = (
            x.to(narrow) if getattr(x, "dtype", None) == torch.float32 else x for x in (query, key, value, attn_mask)
        )
        with torch.autocast(device, enabled=False):
            return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    batched = min(query.ndim, key.ndim, value.ndim) > 2 and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if not batched or dropout_p or any_dual(attn_mask) or not any_dual(query, key, value):
        return _attention_by_parts(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    q, k, v = _Heads(query), _Heads(key), _Heads(value)
    c = 1 / math.sqrt(q.width) if scale is None else scale
    rows: int = rows_of(query, key, value)
    mask = _mask(attn_mask, is_causal, query.shape[:-2], q, k)
    if followed():
        bias = mask.flatten(0, 1) if mask is not None and mask.ndim == 4 else mask
        softmax = torch.softmax if attn_mask is None else torch._safe_softmax
        flat = [with_rows(x, rows).flatten(1, -3) for x in (query, key, value)]
        out = Attended.apply(*flat, bias, c, softmax)
        return DualTensor(out.view(rows, *query.shape[:-1], v.width))
    # Laid out as [..., L, H, E] under the hood: the model's next step puts the heads side by side.
    out = q.primal.new_empty((rows, q.samples, q.length, q.heads, v.width)).transpose(2, 3)
    for samples, heads, tangents in _pieces(q, k, rows - 1):
        here = (samples, heads)
        q_here, k_here, v_here = (x.primal[here].flatten(0, 1) for x in (q, k, v))
        scores = q_here @ (k_here * c).mT
        if mask is not None:
            scores = scores + (mask[here].flatten(0, 1) if mask.ndim == 4 else mask)
        y = torch.softmax(scores, -1) if attn_mask is None else torch._safe_softmax(scores, -1)
        o = y @ v_here
        shape = out[0, samples, heads].shape
        out[0, samples, heads] = o.view(shape)
        for t in tangents:
            moves = (x.tangents_at(t, *here) for x in (q, k, v))
            pushed = _pushed(y, o, q_here * c, k_here * c, v_here, *moves)
            out[1:][t, samples, heads] = pushed.view(*shape[:3], -1, v.width).permute(3, 0, 1, 2, 4)
    return DualTensor(out.reshape(rows, *query.shape[:-1], v.width))


class _Heads:
    """Queries, keys or values as [samples, heads, length, width], and their tangents where they have some."""

    samples: int
    heads: int
    length: int
    width: int

    def __init__(self, x: Any) -> None:
        buffer = x.buffer if isinstance(x, DualTensor) else x[None]
        buffer = buffer.unsqueeze(1) if buffer.ndim == 4 else buffer.flatten(1, -4)
        self.primal, self.tangents = buffer[0], buffer[1:]
        self.samples, self.heads, self.length, self.width = self.primal.shape

    def tangents_at(self, t: slice, samples: slice, heads: slice) -> Tensor | None:
        """[H, L, T, E] of some tangents, samples and heads (both in H); None without any."""
        if not len(self.tangents):
            return None
        return self.tangents[t, samples, heads].permute(1, 2, 3, 0, 4).flatten(0, 1)


def _pieces(q: _Heads, k: _Heads, tangents: int) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Samples, heads and groups of tangents whose score tangents fit into the budget together."""
    budget = _SCORE_BYTES.get(q.primal.device.type, _SCORE_BYTES_ELSEWHERE)
    fit = budget // (q.length * k.length * q.primal.element_size())
    tangents_at_once = max(1, min(tangents, fit))
    heads_at_once = max(1, min(q.heads, fit // tangents_at_once))
    samples_at_once = max(1, min(q.samples, fit // (tangents_at_once * q.heads)))
    groups = _slices(tangents, tangents_at_once)
    for samples in _slices(q.samples, samples_at_once):
        for heads in _slices(q.heads, heads_at_once):
            yield samples, heads, groups


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _pushed(
    y: Tensor, o: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> Tensor:
    """Return o' as [H, L, T, E], from tangents [H, L, T, E] of some heads.

    Every product is one bmm over H, and nothing is repeated to broadcast it.
    """
    low = current_pass().low if y.dtype == torch.float32 else None
    if low is not None:
        y, o, q, k, v = (x.to(low) for x in (y, o, q, k, v))
        dq, dk, dv = (None if x is None else x.to(low) for x in (dq, dk, dv))
    heads, length, span = y.shape
    out: Tensor | None = None
    a: Tensor | None = None
    if dq is not None:
        a = torch.bmm(dq.flatten(1, 2), k.mT).view(heads, length, -1, span)
    if dk is not None:
        wide = dk.transpose(1, 2).flatten(1, 2).mT  # [H, E, T S]
        if a is None:
            a = torch.bmm(q, wide).view(heads, length, -1, span)
        else:
            a.view(heads, length, -1).baddbmm_(q, wide)
    if a is not None:
        a.mul_(y[:, :, None])
        out = torch.bmm(a.view(heads, -1, span), v).view(heads, length, -1, v.shape[-1])
        out.addcmul_(a.sum(-1, keepdim=True), o[:, :, None], value=-1)
    if dv is not None:
        wide = dv.flatten(2, 3)  # [H, S, T E]
        if out is None:
            out = torch.bmm(y, wide).view(heads, length, -1, dv.shape[-1])
        else:
            out.view(heads, length, -1).baddbmm_(y, wide)
    assert out is not None
    return out


def _mask(attn_mask: Any, is_causal: bool, batch: Any, q: _Heads, k: _Heads) -> Tensor | None:
    """Return what is added to the scores: [L, S], or [samples, heads, L, S] where it differs between them."""
    mask, like = attn_mask, q.primal
    if is_causal:
        mask = torch.ones(q.length, k.length, dtype=torch.bool, device=like.device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, -torch.inf)
    if mask.shape[:-2].numel() == 1:
        return mask.reshape(mask.shape[-2:])
    if len(batch) > 2:
        mask = mask.expand(*batch, q.length, k.length).flatten(0, -4)
    return mask.expand(q.samples, q.heads, q.length, k.length)


def _attention_by_parts(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    c = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * c
    mask = attn_mask
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1) if attn_mask is None else torch._safe_softmax(scores, -1)
    return (F.dropout(weights, dropout_p) if dropout_p else weights) @ value
