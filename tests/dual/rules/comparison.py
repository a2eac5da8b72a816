"""Every fused rule against torch.func.jvp of the same op, one direction at a time, in float64.

A theme's test file has a table of cases, names of ops → calls, in which ``D`` stands for a dual operand and ``P`` for
a plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from dual.judge import Verdict, judged
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchgeom_probe.dual import RULES, DualTensor, dual_pass, recording
from torchgeom_probe.dual.ops import NAMESPACES, mutates


@dataclass(frozen=True)
class Operand:
    shape: tuple[int, ...]
    low: float = -2.0
    high: float = 2.0
    dtype: torch.dtype = torch.float64
    dual: bool = True

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        real = self.dtype if self.dtype.is_floating_point else torch.float64
        u = torch.rand(self.shape, generator=generator, dtype=real)
        value = self.low + (self.high - self.low) * u
        if self.dtype.is_complex:
            value = torch.complex(value, torch.rand(self.shape, generator=generator, dtype=real))
        return value


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def D(*shape: int, low: float = -2.0, high: float = 2.0, dtype: torch.dtype = torch.float64) -> Operand:
    return Operand(shape, low, high, dtype)


def P(*shape: int, low: float = -2.0, high: float = 2.0, dtype: torch.dtype = torch.float64) -> Operand:
    return Operand(shape, low, high, dtype, dual=False)


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs)


def mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4


def index(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(5))


IMAGE, VOLUME, SIGNAL = D(2, 3, 7, 11), D(2, 3, 5, 7, 3), D(2, 3, 11)


# ------------------------------------------------------------------------------------------------------- the table


def labels() -> dict[Any, list[str]]:
    """Op → the names that it goes by, with and without its namespace."""
    found: dict[Any, list[str]] = {}
    for space, holder in NAMESPACES.items():
        for name in dir(holder):
            value = getattr(holder, name)
            for op in (value, getattr(value, "__get__", None)):
                try:
                    known = op in RULES
                except TypeError:
                    continue
                if known:
                    found.setdefault(op, []).extend([f"{space}.{name}", name])
    return found


LABELS = labels()

#: In-place forms without a forward derivative in torch, or (celu_) with one in single precision: the twin's is right.
TWINS = set("acosh_ asinh_ atanh_ arccosh_ arcsinh_ arctanh_ rrelu_ celu_".split())
#: Ops that torch itself refuses on the numbers in memory the other way round.
CONTIGUOUS_ONLY = {"view", "view_as", "view_as_complex"}


def cases_of(op: Any, cases: dict[str, list[Call]]) -> list[Call]:
    by_name = {name: calls for names, calls in cases.items() for name in names.split()}
    names = sorted(LABELS[op], key=lambda n: "." not in n)  # the namespaced names first
    return next((by_name[n] for n in names if n in by_name), [])


def agreement(cases: dict[str, list[Call]]) -> Callable[[Any, Call], None]:
    """The test of a theme: each of its rules against jvp, in each of its cases."""
    table = [
        pytest.param(op, case, id=f"{LABELS[op][0]}-{i}") for op in LABELS for i, case in enumerate(cases_of(op, cases))
    ]

    @pytest.mark.parametrize(("op", "case"), table)
    def test_rule_agrees_with_jvp(op: Any, case: Call) -> None:
        label, name = LABELS[op][:2]
        if not (label.startswith("Tensor.") and hasattr(torch, name)):  # there torch's own has been compared
            _agrees(op, case, k=3, strided=False, seed=0)
        _agrees(op, case, k=1, strided=name not in CONTIGUOUS_ONLY, seed=1)

    return test_rule_agrees_with_jvp


def agreement_with_differences(cases: dict[str, list[Call]]) -> Callable[[Any, Call], None]:
    """The same for ops that torch has no forward derivative of, or none that can be trusted."""
    table = [
        pytest.param(op, case, id=f"{LABELS[op][0]}-{i}") for op in LABELS for i, case in enumerate(cases_of(op, cases))
    ]

    @pytest.mark.parametrize(("op", "case"), table)
    def test_rule_agrees_with_differences(op: Any, case: Call) -> None:
        leaves, spec, where, *_ = drawn(case, 0, 1, strided=False)
        with recording() as used:
            assert judged(op, *tree_unflatten(leaves, spec), where) == Verdict("equal")
        assert not used["fallback"], used

    return test_rule_agrees_with_differences


# ----------------------------------------------------------------------------------------------------- the comparison


def drawn(
    call: Call, seed: int, k: int, *, strided: bool
) -> tuple[list[Any], Any, list[int], list[torch.Tensor], list[Any]]:
    """The call's arguments as leaves, their tree, the places of the duals, their primals and tangents [k, *shape]."""
    generator = torch.Generator().manual_seed(seed)
    leaves, spec = tree_flatten((list(call.args), call.kwargs))
    where, primals, tangents = [], [], []
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Operand):
            continue
        value = leaf.draw(generator)
        if strided and value.ndim >= 2:  # the same numbers, in memory the other way round
            value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
        leaves[i] = value
        if leaf.dual:
            where.append(i)
            primals.append(value)
            tangents.append(torch.randn(k, *leaf.shape, generator=generator, dtype=leaf.dtype))
    return leaves, spec, where, primals, tangents


def reference(
    function: Any, primals: list[torch.Tensor], tangents: list[torch.Tensor]
) -> tuple[list[Any], list[list[Any]]]:
    """Values, and per direction the tangents, of every tensor that the function returns, by jvp."""
    values: list[Any] = []
    pushes = []
    for direction in range(len(tangents[0])):
        values, push = torch.func.jvp(function, tuple(primals), tuple(t[direction] for t in tangents))
        pushes.append(push)
    return values, pushes


def compare(out: Any, values: list[Any], pushes: list[list[Any]], tolerance: float = 1e-11) -> None:
    flat = tree_flatten(out)[0]
    assert len(flat) == len(values)
    for i, (got, want) in enumerate(zip(flat, values, strict=True)):
        if isinstance(got, DualTensor):
            assert got.shape == want.shape
            assert got.dtype == want.dtype
            torch.testing.assert_close(got.primal, want, rtol=tolerance, atol=tolerance, equal_nan=True)
            for row, push in zip(got.tangents, pushes, strict=True):
                torch.testing.assert_close(row, push[i], rtol=tolerance, atol=tolerance, equal_nan=True)
        elif isinstance(got, torch.Tensor):
            torch.testing.assert_close(got, want)
            assert all(not push[i].any() for push in pushes), "a plain result for an output that has tangents"
        else:
            assert got == want


def dual(primal: torch.Tensor, tangents: torch.Tensor, *, strided: bool = False) -> DualTensor:
    buffer = torch.cat([primal[None], tangents])
    if strided and primal.ndim >= 2:
        buffer = buffer.transpose(-1, -2).contiguous().transpose(-1, -2)
    return DualTensor(buffer)


def _agrees(op: Any, case: Call, *, k: int, strided: bool, seed: int) -> None:
    leaves, spec, where, primals, tangents = drawn(case, seed, k, strided=strided)
    writes = mutates(op) and op is not torch.Tensor.requires_grad_

    def run(*operands: torch.Tensor) -> Any:
        filled = list(leaves)
        for i, operand in zip(where, operands, strict=True):
            filled[i] = operand
        if writes:  # into a view of a larger tensor, which must change with it
            base = filled[0].clone()
            filled[0] = base[..., 1:] if base.ndim else base
            args, kwargs = tree_unflatten(filled, spec)
            if LABELS[op][1] in TWINS and not isinstance(base, DualTensor):
                args[0].copy_(getattr(torch, LABELS[op][1][:-1])(*args, **kwargs))
            else:
                op(*args, **kwargs)
            return [base]
        args, kwargs = tree_unflatten(filled, spec)
        out = op(*args, **kwargs)
        return list(out) if op is torch.Tensor.__iter__ else out

    if writes and case.args[0].shape:  # the view has one column less: so have the operands of the same size
        size = case.args[0].shape[-1]
        for i, value in enumerate(leaves[1:], start=1):
            numbers = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim
            if numbers and value.shape[-1] == size:
                leaves[i] = value[..., 1:]
        for n, i in enumerate(where[1:], start=1):
            if leaves[i].shape != primals[n].shape:
                primals[n], tangents[n] = primals[n][..., 1:], tangents[n][..., 1:]

    not_tensors: list[Any] = []

    def flat(*operands: torch.Tensor) -> list[torch.Tensor]:
        found = tree_flatten(run(*operands))[0]
        not_tensors[:] = [f if not isinstance(f, torch.Tensor) else None for f in found]
        return [f if isinstance(f, torch.Tensor) else torch.zeros(()) for f in found]

    with torch.no_grad():
        values, pushes = reference(flat, primals, tangents)
        values = [v if p is None else p for v, p in zip(values, not_tensors, strict=True)]
        with dual_pass(), recording() as used:
            out = run(*(dual(p, t, strided=strided) for p, t in zip(primals, tangents, strict=True)))
            compare(out, values, pushes)
    assert not used["fallback"], used


def writes_through(op: Any, case: Call) -> None:
    """Writing to what a view op gives writes to the whole."""
    leaves, spec, _, primals, tangents = drawn(case, 0, 3, strided=False)

    def run(x: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
        base = x.clone()
        args, kwargs = tree_unflatten([base, *leaves[1:]], spec)
        for piece in tree_flatten(op(*args, **kwargs))[0]:
            piece[..., :1].mul_(3).add_(piece[..., :1].sin())
        return [base]

    with torch.no_grad():
        values, pushes = reference(run, primals[:1], tangents[:1])
        compare(run(dual(primals[0], tangents[0])), values, pushes)
