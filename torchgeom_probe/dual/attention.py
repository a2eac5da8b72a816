"""Softmax, and scaled dot-product attention, whose score tangents are never held for all rows at once."""

from __future__ import annotations

import math
from typing import Any

import torch

from torchgeom_probe.dual.table import any_dual, enter, from_end, primal_of, row_by_row, rows_of, rule
from torchgeom_probe.dual.tensor import DualTensor
from torchgeom_probe.shapes import Tensor

aten = torch.ops.aten

#: Bytes of score tangents worked on at once: on the CPU what stays in cache, elsewhere what keeps the device busy.
_SCORE_BYTES = {"cpu": 1 << 20}
_SCORE_BYTES_ELSEWHERE = 1 << 28


def softmax_rows(buffer: Tensor, dim: int) -> Tensor:
    """The softmax of a buffer along a negative axis."""
    # y = softmax(p);  y' = y (t - Σ y t), a symmetric Jacobian: torch's own backward kernel applies it in one sweep
    out = torch.empty_like(buffer)
    y = torch.softmax(buffer[0], dim)
    out[0].copy_(y)
    if row_by_row(buffer) and buffer.is_contiguous():
        for row in range(1, buffer.shape[0]):
            aten._softmax_backward_data.out(buffer[row], y, dim, buffer.dtype, grad_input=out[row])
        return out
    weighted = torch.mul(buffer[1:], y, out=out[1:])
    weighted.addcmul_(weighted.sum(dim, keepdim=True), y, value=-1)
    return out


def _softmax(input: DualTensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if dim is None or input.buffer.ndim == 1:
        return NotImplemented
    b = input.buffer if dtype is None else input.buffer.to(dtype)
    return DualTensor(softmax_rows(b, from_end(dim, b.ndim - 1)))


def _log_softmax(input: DualTensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    # y = log softmax(p);  y' = t - Σ e^y t
    if dim is None or input.buffer.ndim == 1:
        return NotImplemented
    dim = from_end(dim, input.buffer.ndim - 1)
    b = input.buffer if dtype is None else input.buffer.to(dtype)
    y = torch.log_softmax(b[0], dim)
    out = torch.empty_like(b)
    torch.sub(b[1:], (b[1:] * y.exp()).sum(dim, keepdim=True), out=out[1:])
    out[0].copy_(y)
    return DualTensor(out)


# F's third positional argument is a stack level, torch's and Tensor's is a type.
for _name, _rule in {"softmax": _softmax, "log_softmax": _log_softmax}.items():
    enter(_rule, f"F.{_name}")
    enter(
        lambda input, dim, dtype=None, _rule=_rule: _rule(input, dim, dtype=dtype),
        f"torch.{_name}",
        f"Tensor.{_name}",
        f"special.{_name}",
    )


@rule("F.softmin")
def _softmin(input: DualTensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return _softmax(DualTensor(-input.buffer), dim, dtype=dtype)


@rule("logsumexp")
def _logsumexp(input: DualTensor, dim: Any, keepdim: bool = False) -> Any:
    # y = log Σ e^p;  y' = Σ e^(p - y) t
    if input.buffer.ndim == 1:
        return NotImplemented
    dims = [from_end(d, input.buffer.ndim - 1) for d in ((dim,) if isinstance(dim, int) else dim)]
    y = torch.logsumexp(input.primal, dims, keepdim=True)
    tangents = (input.tangents * (input.primal - y).exp()).sum(dims, keepdim=True)
    out = torch.cat([y[None], tangents])
    if not keepdim:
        out = out.squeeze(dims)
    return DualTensor(out)


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
    if dropout_p or not any_dual(query, key, value) or min(query.ndim, key.ndim, value.ndim) < 3:
        return NotImplemented
    if any_dual(attn_mask) or not (query.shape[:-2] == key.shape[:-2] == value.shape[:-2]):
        return _attention_by_parts(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    c = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    rows, batch = rows_of(query, key, value), query.shape[:-2]
    length, span, width = query.shape[-2], key.shape[-2], value.shape[-1]
    mask = _mask(attn_mask, is_causal, length, span, batch, primal_of(query))

    q, k, v = (_flat(x, len(batch)) for x in (query, key, value))
    q_primal, k_primal, v_primal = (
        x[0] if isinstance(o, DualTensor) else x for x, o in ((q, query), (k, key), (v, value))
    )
    q_primal = q_primal * c
    out = _like_heads(q_primal, rows, batch, length, width)
    heads = q_primal.shape[0]
    budget = _SCORE_BYTES.get(q_primal.device.type, _SCORE_BYTES_ELSEWHERE)
    scores_bytes = length * span * q_primal.element_size()
    tangents_at_once = max(1, min(rows - 1, budget // scores_bytes))
    heads_at_once = max(1, min(heads, budget // (scores_bytes * tangents_at_once)))
    results = q_primal.new_empty((heads, length, rows, width))
    for start in range(0, heads, heads_at_once):
        h = slice(start, start + heads_at_once)
        scores = q_primal[h] @ k_primal[h].mT
        if mask is not None:
            scores = scores + (mask[h] if mask.ndim == 3 else mask)
        y = torch._safe_softmax(scores, -1)
        o = y @ v_primal[h]
        results[h, :, 0] = o
        for first in range(1, rows, tangents_at_once):
            t = slice(first, min(first + tangents_at_once, rows))
            results[h, :, t] = _pushed_heads(
                y,
                o,
                q_primal[h],
                k_primal[h],
                v_primal[h],
                q[t, h] * c if isinstance(query, DualTensor) else None,
                k[t, h] if isinstance(key, DualTensor) else None,
                v[t, h] if isinstance(value, DualTensor) else None,
            )
    out.copy_(results.movedim(2, 0).reshape(rows, *batch, length, width))
    return DualTensor(out)


def _pushed_heads(
    y: Tensor,
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> Tensor:
    """Return o' as [H, L, T, E], from tangents [T, H, L, ·] of some heads: every product is one bmm over H, nothing is repeated."""
    heads, length, span = y.shape
    out: Tensor | None = None
    a: Tensor | None = None
    if dq is not None:
        a = torch.bmm(dq.permute(1, 2, 0, 3).reshape(heads, -1, dq.shape[-1]), k.mT).view(
            heads, length, -1, span
        )
    if dk is not None:
        wide = dk.permute(1, 3, 0, 2).reshape(heads, dk.shape[-1], -1)  # [H, E, T S]
        if a is None:
            a = torch.bmm(q, wide).view(heads, length, -1, span)
        else:
            a.view(heads, length, -1).baddbmm_(q, wide)
    if a is not None:
        a.mul_(y[:, :, None])
        out = torch.bmm(a.view(heads, -1, span), v).view(heads, length, -1, v.shape[-1])
        out.addcmul_(a.sum(-1, keepdim=True), o[:, :, None], value=-1)
    if dv is not None:
        wide = dv.permute(1, 2, 0, 3).reshape(heads, span, -1)  # [H, S, T E]
        if out is None:
            out = torch.bmm(y, wide).view(heads, length, -1, dv.shape[-1])
        else:
            out.view(heads, length, -1).baddbmm_(y, wide)
    assert out is not None
    return out


def _flat(x: Any, axes: int) -> Tensor:
    """[R, H, L, E] or, of a plain tensor, [H, L, E]."""
    return x.buffer.flatten(1, axes) if isinstance(x, DualTensor) else x.flatten(0, axes - 1)


def _like_heads(like: Tensor, rows: int, batch: Any, length: int, width: int) -> Tensor:
    # Laid out as [..., L, H, E] under the hood, as the model's next step (heads side by side) wants it.
    *outer, heads = batch
    return like.new_empty((rows, *outer, length, heads, width)).transpose(-3, -2)


def _mask(attn_mask: Any, is_causal: bool, length: int, span: int, batch: Any, like: Tensor) -> Tensor | None:
    """What is added to the scores: [L, S], or [H, L, S] where it differs between heads."""
    mask = attn_mask
    if is_causal:
        mask = torch.ones(length, span, dtype=torch.bool, device=like.device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, -torch.inf)
    if mask.ndim > 2 and mask.shape[:-2].numel() == 1:
        mask = mask.reshape(mask.shape[-2:])
    return mask if mask.ndim <= 2 else mask.expand(*batch, length, span).flatten(0, -3)


def _attention_by_parts(
    query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Any:
    if enable_gqa:
        key, value = (
            torch.repeat_interleave(x, query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value)
        )
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale
        )
    c = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * c
    mask = (
        _mask(attn_mask, is_causal, query.shape[-2], key.shape[-2], (), primal_of(query))
        if is_causal
        else attn_mask
    )
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1) @ value
