"""One call with dual inputs, judged: the value is that of the plain call, the tangents are those of two oracles.

Central differences say what the derivative is wherever they can be trusted.  torch.func.jvp is exact, and knows what
torch means by a derivative at a kink; but it reads some missing derivatives as zero, so it counts only where it agrees
with the differences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchgeom_probe.dual import DualTensor
from torchgeom_probe.errors import ProbeError

ALL, FIRST, OTHERS = slice(None), slice(0, 1), slice(1, None)
K = 2
STEP, ROUGH, EXACT, HUGE = 1e-6, 2e-5, 1e-9, 1e100


@dataclass(frozen=True)
class Verdict:
    """``equal``, ``refused`` (by a ProbeError), ``wrong``, ``crashed`` or ``skipped``, and what was seen."""

    kind: str
    what: str = ""


def is_smooth(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def memory_of(x: torch.Tensor) -> int:
    """How many numbers lie between the first and the last of a strided tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def stretch(x: torch.Tensor) -> torch.Tensor:
    """All of that memory, [memory_of(x)]."""
    return x.as_strided((memory_of(x),), (1,), x.storage_offset()) if x.numel() else x.new_empty(0)


def laid_like(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of memory [R, memory_of(x)] seen as [R, *x.shape], each row laid out as x is (expanded axes stay so)."""
    return rows.as_strided((len(rows), *x.shape), (rows.shape[1], *x.stride()))


def copied(x: Any) -> Any:
    """The same numbers in new memory, laid out in the same way; ops write to their inputs."""
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
        return x
    return laid_like(x, stretch(x)[None].clone())[0]


def judged(
    function: Callable[..., Any], args: Any, kwargs: Any, which: slice | Sequence[int] = ALL, *, jvp: bool = True
) -> Verdict:
    """``function(*args, **kwargs)`` with some of its floating tensors dual, against the plain call and both oracles.

    ``which`` of them are dual is a slice of the floating tensors among the leaves, or the places of the leaves.
    Where the plain call writes to its first tensor, what another view of that memory sees is compared as well.
    Without ``jvp``, which torch has wrong for a few ops, differences are the only oracle.
    """
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    smooth = [i for i in tensors if is_smooth(leaves[i])]
    where = smooth[which] if isinstance(which, slice) else list(which)
    if not where or any(leaves[i].layout != torch.strided for i in tensors):
        return Verdict("skipped", "no strided floating input here")

    def call(filled: list[Any]) -> tuple[list[Any], Any]:
        torch.manual_seed(1)
        op_args, op_kwargs = tree_unflatten(filled, spec)
        return tree_flatten(function(*op_args, **op_kwargs))

    plain, first = [copied(leaf) for leaf in leaves], tensors[0]
    seen = {i: plain[i].view_as(plain[i]) for i in tensors}  # in-place ops may change what a tensor is a view of
    untouched = plain[first]._version
    try:
        values, shape_of_values = call(plain)
    except Exception as error:
        return Verdict("skipped", f"the plain call fails: {type(error).__name__}")
    if any(isinstance(v, torch.Tensor) and v.layout != torch.strided for v in values):
        return Verdict("skipped", "a sparse result")
    target = first if plain[first]._version > untouched else None

    buffers = _buffers({i: leaves[i] for i in where})
    starts = {i: buffer.clone() for i, buffer in buffers.items()}
    duals = [DualTensor(buffers[i]) if i in buffers else copied(leaf) for i, leaf in enumerate(leaves)]
    try:
        outs, shape_of_outs = call(duals)
    except ProbeError as error:
        return Verdict("refused", str(error).splitlines()[0])
    except Exception as error:
        return Verdict("crashed", f"{type(error).__name__}: {error}".splitlines()[0])

    if shape_of_outs != shape_of_values:
        return Verdict("wrong", f"it returns {shape_of_outs}, not {shape_of_values}")
    pairs = list(zip(outs, values, strict=True))
    faults = [f"output {n}: {fault}" for n, pair in enumerate(pairs) if (fault := _primal_fault(*pair))]
    for i in where:
        if _differs(buffers[i][0], seen[i]):
            faults.append(f"input {i} holds another value afterwards")
        kept = i != target and not _differs(buffers[i][0], starts[i][0], exact=True)
        if kept and _differs(buffers[i][1:], starts[i][1:], exact=True):
            faults.append(f"the tangents of input {i} were written to")
    if faults:
        return Verdict("wrong", faults[0])

    def smooth_outputs(*primals: torch.Tensor) -> list[torch.Tensor]:
        filled = [copied(leaf) for leaf in leaves]
        for i, primal in zip(where, primals, strict=True):
            filled[i] = primal
        if target is None:
            return [o for o in call(filled)[0] if is_smooth(o)]
        filled[target] = filled[target].clone()  # not copied(): torch.func's tensors have no memory to lay out
        view = filled[target].view_as(filled[target])
        return [*(o for o in call(filled)[0] if is_smooth(o)), view]

    tangents = [o.buffer[1:] if isinstance(o, DualTensor) else None for o, v in pairs if is_smooth(v)]
    if target is not None:
        tangents.append(buffers[target][1:] if target in buffers else None)
    for k in range(K):
        got = [None if t is None else t[k] for t in tangents]
        points, direction = ([starts[i][row] for i in where] for row in (0, 1 + k))
        fault = _tangent_fault(smooth_outputs, points, direction, got, by_jvp=jvp)
        if fault:
            return Verdict("wrong", fault)
    return Verdict("equal")


def _buffers(primals: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The primals and K random tangents of each, every row laid out as the primal is, what lies between included."""
    generator, found = torch.Generator().manual_seed(7), {}
    for i, primal in primals.items():
        memory = torch.randn(1 + K, memory_of(primal), dtype=primal.dtype, generator=generator)
        memory[0] = stretch(primal)
        found[i] = laid_like(primal, memory)
    return found


def _primal_fault(out: Any, value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        same = out == value or (out != out and value != value)
        return "" if same and not isinstance(out, torch.Tensor) else f"{out!r}, not {value!r}"
    if not isinstance(out, torch.Tensor):
        return f"a {type(out).__name__}, no tensor"
    primal = out
    if isinstance(out, DualTensor):
        primal = out.buffer[0]
        if len(out.buffer) != 1 + K:
            return f"{len(out.buffer) - 1} tangents"
        if out.shape != primal.shape or out.dtype != primal.dtype:
            return f"it says {tuple(out.shape)} {out.dtype}, and holds {tuple(primal.shape)} {primal.dtype}"
    if primal.shape != value.shape or primal.dtype != value.dtype:
        return f"{tuple(primal.shape)} {primal.dtype}, not {tuple(value.shape)} {value.dtype}"
    return "another value" if _differs(primal, value, exact=not is_smooth(value)) else ""


def _differs(a: torch.Tensor, b: torch.Tensor, *, exact: bool = False) -> bool:
    return a.shape != b.shape or bool(_errors(a, b, 0.0 if exact else EXACT).any())


def _errors(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Where a is not b, relative to the largest finite entry of b; both NaN, or infinite alike, are equal."""
    a, b = _real(a), _real(b)
    if not b.is_floating_point():
        return a != b
    a, b = a.double(), b.double()
    scale = b[b.isfinite()].abs().amax() if b.isfinite().any() else b.new_zeros(())
    return ~((a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= tolerance * scale.clamp_min(1e-3)))


def _tangent_fault(
    function: Callable[..., list[torch.Tensor]],
    points: list[torch.Tensor],
    direction: list[torch.Tensor],
    got: list[torch.Tensor | None],
    by_jvp: bool,
) -> str:
    def at(step: float) -> list[torch.Tensor]:
        return [o.clone() for o in function(*(p + step * t for p, t in zip(points, direction, strict=True)))]

    here = at(0.0)
    try:
        after, before = at(STEP), at(-STEP)
    except Exception:  # a step leaves the domain: no difference can be trusted
        after = before = [torch.full_like(x, torch.nan) for x in here]
    exact = [None] * len(here)
    if by_jvp:
        with contextlib.suppress(Exception):
            exact = torch.func.jvp(function, tuple(points), tuple(direction))[1]
    for n, (f, x, b, jvp, mine) in enumerate(zip(after, here, before, exact, got, strict=True)):
        if x.shape != f.shape or x.shape != b.shape:  # masked by values
            continue
        finite = _real(x).abs() < HUGE  # infinity has no derivative, and jvp's own squares overflow before
        if mine is None:
            mine = torch.zeros_like(x)
        if mine.shape != x.shape:
            return f"tangents of output {n} are {tuple(mine.shape)}"
        slope, trusted = _difference(f, x, b)
        confirmed = jvp is not None and not (_errors(jvp, slope, ROUGH) & trusted & finite).any()
        right = jvp if confirmed else slope
        tolerance = ROUGH if not confirmed else EXACT if x.dtype in (torch.float64, torch.complex128) else 1e-4
        wrong = _errors(mine, right, tolerance) & (trusted | confirmed) & finite
        if wrong.any():
            seen, wanted = (_real(z)[wrong][0].item() for z in (mine, right))
            return f"tangent of output {n}: {seen:.6g}, by {'jvp' if confirmed else 'differences'} {wanted:.6g}"
    return ""


def _real(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x.resolve_conj().resolve_neg()) if x.is_complex() else x


def _difference(after: torch.Tensor, here: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The central difference, and where it can be trusted: in double precision, and no kink, jump or pole in reach.

    It is NaN elsewhere.
    """
    after, here, before = _real(after), _real(here), _real(before)
    slope = (after - before) / (2 * STEP)
    curved = (after - 2 * here + before).abs() / STEP
    trusted = slope.isfinite() & (curved <= ROUGH * (1 + slope.abs())) & (here.dtype == torch.float64)
    slope = slope.masked_fill(~trusted, torch.nan)
    if trusted.any():
        noise = 1e-9 * here[trusted].abs().amax()
        trusted &= noise <= ROUGH * slope[trusted].abs().amax().clamp_min(1e-3)
    return slope, trusted
