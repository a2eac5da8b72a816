"""Sums, moments, norms and selections along axes."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F

from torchgeom_probe.dual.registry import at, joined, ndim_of, on_rows, reduced, register, rule, rule_of_each, wide
from torchgeom_probe.dual.tensor import RULES, DualTensor, Rule
from torchgeom_probe.shapes import Tensor


@rule_of_each("sum mean")
def _sum_like(op: Any) -> Rule:
    def push(input: DualTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        if ndim_of(input) == 0 or isinstance(dim, torch.dtype):
            return NotImplemented
        return DualTensor(op(input.buffer, reduced(dim, ndim_of(input)), keepdim=keepdim, dtype=dtype))

    return push


@rule("cumsum")
def _cumsum(input: DualTensor, dim: int, *, dtype: Any = None) -> Any:
    return NotImplemented if ndim_of(input) == 0 else DualTensor(input.buffer.cumsum(at(dim), dtype=dtype))


rule_of_each("trace trapezoid trapz")(on_rows)


@rule("diff")
def _diff(input: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    # of what stands in a row, put together by the rule of cat
    if not n:
        return input.clone()
    parts = [part for part in (prepend, input, append) if part is not None]
    whole: Any = torch.cat(parts, dim) if len(parts) > 1 else input
    return DualTensor(torch.diff(whole.buffer, n, at(dim))) if ndim_of(whole) else NotImplemented


@rule("F.binary_cross_entropy")
def _cross_entropy_of_a_target(
    input: Any, target: Any, weight: Any = None, *old: Any, reduction: str = "mean", **names: Any
) -> Any:
    # affine in the target: torch's derivative by a target alone cannot be differentiated in turn
    legacy = any(given is not None for given in (*old, *names.values()))  # size_average=, reduce=
    if legacy or isinstance(input, DualTensor) or isinstance(weight, DualTensor):
        return NotImplemented
    p = target.primal
    of = functools.partial(F.binary_cross_entropy, input, weight=weight, reduction="none")
    each = torch.cat([of(p)[None], target.tangents * (of(torch.ones_like(p)) - of(torch.zeros_like(p)))])
    return DualTensor(each if reduction == "none" else getattr(each.flatten(1), reduction)(1))


# ------------------------------------------------------------------------------------------------- moments and norms


def _var(input: DualTensor, *args: Any, **kwargs: Any) -> Any:
    # var = Σ c²/m, c = p - mean p;  var' = 2 Σ c t / m
    if ndim_of(input) == 0 or input.buffer.is_complex() or set(kwargs) - _MOMENT_ARGUMENTS:
        return NotImplemented
    dims, keepdim, correction = _moment_arguments(*args, **kwargs)
    p = wide(input.primal)
    variance = torch.var(input.primal, *args, **kwargs)
    dims = reduced(dims, p.ndim)
    centred = (p - p.mean(dims, keepdim=True)).to(variance.dtype)
    count = math.prod(p.shape[d] for d in set(dims)) - correction
    tangents = (input.tangents * centred).sum(dims, keepdim=keepdim) * (2 / count if count else math.inf)
    return DualTensor(torch.cat([variance[None], tangents]))


_MOMENT_ARGUMENTS = {"dim", "unbiased", "keepdim", "correction"}


def _moment_arguments(*args: Any, **kwargs: Any) -> tuple[Any, bool, float]:
    """(dims, keepdim, correction), which var takes as (unbiased), (dim, unbiased, keepdim) or (dim, *, correction)."""
    args = (None, *args) if args and isinstance(args[0], bool) else args
    given = dict(zip(("dim", "unbiased", "keepdim"), args, strict=False)) | kwargs
    dim, correction = given.get("dim"), given.get("correction")
    if correction is None:
        correction = int(given.get("unbiased", True))
    return dim, given.get("keepdim", False), correction


def _std(input: DualTensor, *args: Any, **kwargs: Any) -> Any:
    # σ' = var'/(2 σ), and 0 at σ = 0 as torch has it: there the root has no derivative
    variance = _var(input, *args, **kwargs)
    if variance is NotImplemented:
        return NotImplemented
    value = torch.std(input.primal, *args, **kwargs)
    return DualTensor(torch.cat([value[None], variance.tangents / (2 * value).masked_fill(value == 0, math.inf)]))


def _with_mean(moment: Rule) -> Rule:
    def push(input: DualTensor, *args: Any, **kwargs: Any) -> Any:
        spread = moment(input, *args, **kwargs)
        if spread is NotImplemented:
            return NotImplemented
        dims, keepdim, _ = _moment_arguments(*args, **kwargs)
        mean: Any = input.mean(dims, keepdim)
        mean.primal.copy_(torch.var_mean(input.primal, *args, **kwargs)[1])  # it sums in an order of its own
        return spread, mean

    return push


register(_var, "var")
register(_std, "std")
register(_with_mean(_var), "var_mean")
register(_with_mean(_std), "std_mean")


@rule("linalg.vector_norm")
def _vector_norm(input: DualTensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    # y = (Σ|p|^q)^(1/q);  y' = Σ sign(p) (|p|/y)^(q-1) t, and 0 at p = 0; for q = 2 Σ p t / y
    regular = isinstance(ord, (int, float)) and 1 <= ord < float("inf")
    if not regular or dtype is not None or ndim_of(input) == 0 or input.buffer.is_complex():
        return NotImplemented
    dims = reduced(dim, ndim_of(input))
    y = torch.linalg.vector_norm(input.primal, ord, dim=dims, keepdim=True)
    share = input.primal / y.masked_fill(y == 0, math.inf)  # 0, and so is its gradient
    slope = share if ord == 2 else share.sign() * share.abs() ** (ord - 1)
    tangents = (input.tangents * slope).sum(dims, keepdim=True)
    out = torch.cat([y[None], tangents])
    return DualTensor(out if keepdim else out.squeeze(dims))


@rule("torch.norm Tensor.norm")
def _norm(input: DualTensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    if p not in ("fro", 2) or isinstance(p, bool):
        return NotImplemented
    return _vector_norm(input, 2, dim, keepdim, dtype=dtype)


@rule("linalg.norm")
def _linalg_norm(
    input: DualTensor, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if ord is not None and not (ord == 2 and (isinstance(dim, int) or input.ndim == 1)):
        return NotImplemented
    return _vector_norm(input, 2, dim, keepdim, dtype=dtype)


@rule("cosine_similarity")
def _cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    # ⟨x/|x|, y/|y|⟩, by the rules of its parts
    if not ndim_of(x1) or ndim_of(x1) != ndim_of(x2) or x1.shape[dim] != x2.shape[dim]:
        return NotImplemented
    unit_1, unit_2 = (x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(eps) for x in (x1, x2))
    return (unit_1 * unit_2).sum(dim)


# |x - y + ε|, and |x_i - y_j| for all pairs (torch has no forward derivative of it), by the rules of their parts
_length: Any = torch.linalg.vector_norm
register(
    lambda x1, x2, p=2.0, eps=1e-6, keepdim=False: _length(x1 - x2 + eps, p, dim=-1, keepdim=keepdim),
    "pairwise_distance",
)
register(lambda x1, x2, p=2.0, compute_mode=None: _length(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1), "cdist")


@rule("pdist")
def _pdist(input: DualTensor, p: float = 2.0) -> Any:
    i, j = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return torch.linalg.vector_norm(input[i] - input[j], p, dim=-1)


# ---------------------------------------------------------------------------------------------------------- selections


@rule_of_each("amax amin")
def _extreme_along(op: Any) -> Rule:
    def push(input: DualTensor, dim: Any = (), keepdim: bool = False) -> Any:
        # y' = the mean of t over the places where p = y
        if ndim_of(input) == 0:
            return NotImplemented
        p = input.primal
        dims = reduced(dim, p.ndim)
        y = op(p, dims, keepdim=True)
        chosen = (p == y).to(p.dtype)
        tangents = (input.tangents * (chosen / chosen.sum(dims, keepdim=True))).sum(dims, keepdim=True)
        out = torch.cat([y[None], tangents])
        return DualTensor(out if keepdim else out.squeeze(dims))

    return push


@rule_of_each("topk kthvalue sort median nanmedian mode cummax cummin")
def _chosen(op: Any, binary: Any = None, full: Any = None) -> Rule:
    def push(input: Any, *args: Any, **kwargs: Any) -> Any:
        # values = p[indices], so values' = t[indices]
        if binary is not None and len(args) == 1 and isinstance(args[0], Tensor) and not kwargs:
            return RULES[binary](input, args[0])
        if not isinstance(input, DualTensor) or any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
            return NotImplemented
        if ndim_of(input) == 0 or set(kwargs) - _CHOICE_ARGUMENTS:
            return NotImplemented
        if full is not None and not args and not kwargs:
            return RULES[full](input)
        found = op(input.primal, *args, **kwargs)
        if isinstance(found, Tensor):  # the median of everything has no index
            return NotImplemented
        values, indices = found
        dim = _dim_of(op, args, kwargs)
        where = indices.unsqueeze(dim) if values.ndim < ndim_of(input) else indices
        rows = input.buffer.shape[0]
        tangents = input.tangents.gather(at(dim), where.expand(rows - 1, *where.shape))
        return type(found)((joined(values, tangents.view(rows - 1, *values.shape)), indices))

    return push


_CHOICE_ARGUMENTS = {"k", "dim", "keepdim", "largest", "sorted", "descending", "stable"}


def _dim_of(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    if "dim" in kwargs:
        return kwargs["dim"]
    place = 1 if op.__name__ in ("topk", "kthvalue") else 0  # behind k
    return args[place] if len(args) > place and not isinstance(args[place], bool) else -1


register(_chosen(torch.max, torch.maximum, torch.amax), "torch.max Tensor.max")
register(_chosen(torch.min, torch.minimum, torch.amin), "torch.min Tensor.min")
