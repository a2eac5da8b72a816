"""Ops of which torch differentiates another function than the one that runs, written out in parts that it has right.

Those that read one triangle of a matrix are differentiated as if the other were its mirror; the inverse of a Cholesky
factor has a wrong forward derivative; null vectors have none, and a pseudo-inverse that drops singular values has that
of one which does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from torchgeom_probe.dual.ops import ops_named
from torchgeom_probe.shapes import Tensor

#: What a body is called with before the op's own arguments: the op as torch differentiates it, and what makes a
#: constant of a tensor.
Op: TypeAlias = Callable[..., Any]
Fixed: TypeAlias = Callable[[Any], Tensor]
BODIES: dict[Any, Callable[..., Any]] = {}


def _body(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def registered(body: Callable[..., Any]) -> Callable[..., Any]:
        BODIES.update(dict.fromkeys(ops_named(*names), body))
        return body

    return registered


def _triangle(A: Any, upper: bool, without: int = 0) -> Any:
    return A.triu(without) if upper else A.tril(-without)


def _mirrored(A: Any, upper: bool) -> Any:
    return _triangle(A, upper) + _triangle(A, upper, 1).mH


@_body("linalg.eigh linalg.eigvalsh")
def _eigh(op: Op, fixed: Fixed, A: Any, UPLO: str = "L") -> Any:
    return op(_mirrored(A, UPLO in "Uu"), UPLO)


@_body("cholesky linalg.cholesky_ex")
def _cholesky(op: Op, fixed: Fixed, input: Any, upper: bool = False, **options: Any) -> Any:
    return op(_mirrored(input, upper), upper=upper, **options)


@_body("cholesky_solve")
def _cholesky_solve(op: Op, fixed: Fixed, B: Any, L: Any, upper: bool = False) -> Any:
    return op(B, _triangle(L, upper), upper)


@_body("cholesky_inverse")
def _cholesky_inverse(op: Op, fixed: Fixed, L: Any, upper: bool = False) -> Any:
    one = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(_triangle(L, upper), one.expand(L.shape), upper=upper)
    return inverse @ inverse.mH if upper else inverse.mH @ inverse


@_body("triangular_solve")
def _triangular_solve(
    op: Op, fixed: Fixed, b: Any, A: Any, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    triangle, options = _triangle(A, upper), {"unitriangular": unitriangular}
    if transpose:
        triangle, upper = triangle.mT, not upper
    found = torch.linalg.solve_triangular(triangle, b, upper=upper, **options)
    return torch.return_types.triangular_solve((found, A.clone()))


@_body("svd")
def _svd(op: Op, fixed: Fixed, A: Any, *args: Any, **options: Any) -> Any:
    found = op(A, *args, **options)
    U, S, V = found
    of_torch = isinstance(found, torch.return_types.svd)  # V, where torch.linalg has Vᴴ
    count, (rows, columns) = S.shape[-1], A.shape[-2:]
    left, right = U.shape[-1] == rows > count, V.shape[-1] == columns > count and V.shape[-2] == columns
    if not (left or right):
        return found
    inverse = torch.linalg.pinv(fixed(A))
    if left:
        U = torch.cat([U[..., :count], _null(fixed(U)[..., count:], A.mH, inverse.mH, fixed)], -1)
    if right:
        null = _null((fixed(V) if of_torch else fixed(V).mH)[..., count:], A, inverse, fixed)
        V = torch.cat([V[..., :count], null], -1) if of_torch else torch.cat([V[..., :count, :], null.mH], -2)
    return type(found)((U, S, V))


def _null(N: Tensor, A: Any, inverse: Tensor, fixed: Fixed) -> Any:
    """N with A N = 0 and dN = −A⁺ dA N; of more than one such vector each alone is any: nan."""
    moved = inverse @ (A @ N)
    N = N - (moved - fixed(moved))
    if N.shape[-1] > 1:
        nothing = A.real.sum((-2, -1), keepdim=True) if A.is_complex() else A.sum((-2, -1), keepdim=True)
        N = N + (nothing - fixed(nothing)).abs().sqrt()  # 0, of slope nan
    return N


@_body("linalg.pinv")
def _pinv(op: Op, fixed: Fixed, A: Any, rcond: Any = None, hermitian: bool = False, **given: Any) -> Any:
    options = ({} if rcond is None else {"rcond": rcond}) | given
    if hermitian:
        A, options = _mirrored(A, False), options | {"hermitian": True}
    return op(A, **options) if given.get("out") is not None else _truncated(op, fixed, A, **options)


@_body("pinverse")
def _pinverse(op: Op, fixed: Fixed, input: Any, rcond: float = 1e-15) -> Any:
    return _truncated(op, fixed, input, rcond=rcond)


def _truncated(op: Op, fixed: Fixed, A: Any, **options: Any) -> Any:
    S = torch.linalg.svdvals(fixed(A))
    kept = torch.linalg.matrix_rank(op(fixed(A), **options))
    if not bool((kept < (S > 16 * torch.finfo(S.dtype).eps * max(A.shape[-2:]) * S[..., :1]).sum(-1)).any()):
        return op(A, **options)
    options.pop("hermitian", None)
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    place = torch.arange(S.shape[-1], device=S.device)
    inverse = torch.where(place < kept[..., None], S.reciprocal(), torch.zeros_like(S))
    return (Vh.mH * inverse[..., None, :]) @ U.mH
