"""Ops of which torch differentiates another function than the one that runs, written out in parts that it has right.

Those that read one triangle of a matrix are differentiated as if the other were its mirror; the inverse of a Cholesky
factor has a wrong forward derivative; null vectors have none, and a pseudo-inverse that drops singular values has that
of one which does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torchgeom_probe.dual.ops import ops_named
from torchgeom_probe.errors import EngineRefusal
from torchgeom_probe.shapes import Tensor


@dataclass(frozen=True)
class Way:
    """How a body is followed.

    Attributes:
        op: the op itself, by torch's derivative.
        fixed: the numbers of a tensor, as a constant.
        undefined: the same tensor, with a derivative of nan for whoever asks.
        graph: whether gradients of what is made are wanted, in which constants have no part.
    """

    op: Callable[..., Any]
    fixed: Callable[[Any], Tensor]
    undefined: Callable[[Any], Any]
    graph: bool = False

    def refuse_gradients(self, what: str) -> None:
        """Raise in a pass that keeps a graph: the body is right in its first derivative alone."""
        if self.graph:
            raise EngineRefusal(f"{what} has no gradient of its derivative here")


#: op → body(way, *the op's own arguments)
BODIES: dict[Any, Callable[..., Any]] = {}
#: torch's general names of the first operands, which its parser takes as well
_OPERANDS = ("input", "input2")


def _body(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def registered(body: Callable[..., Any]) -> Callable[..., Any]:
        own = list(inspect.signature(body).parameters)[1:]

        def called(way: Way, *args: Any, **kwargs: Any) -> Any:
            renamed = dict(zip(_OPERANDS, own, strict=False))
            return body(way, *args, **{renamed.get(k, k) if k not in own else k: v for k, v in kwargs.items()})

        BODIES.update(dict.fromkeys(ops_named(*names), called))
        return body

    return registered


def _triangle(A: Any, upper: bool, without: int = 0) -> Any:
    return A.triu(without) if upper else A.tril(-without)


def _mirrored(A: Any, upper: bool) -> Any:
    strict, diagonal = _triangle(A, upper, 1), A.diagonal(dim1=-2, dim2=-1)
    if A.is_complex():  # of which the imaginary part is not read
        diagonal = torch.complex(diagonal.real, torch.zeros_like(diagonal.real))
    return strict + strict.mH + torch.diag_embed(diagonal)


@_body("linalg.eigh linalg.eigvalsh")
def _eigh(way: Way, A: Any, UPLO: str = "L") -> Any:
    return way.op(_mirrored(A, UPLO in "Uu"), UPLO)


@_body("cholesky linalg.cholesky_ex")
def _cholesky(way: Way, A: Any, upper: bool = False, **options: Any) -> Any:
    return way.op(_mirrored(A, upper), upper=upper, **options)


@_body("cholesky_solve")
def _cholesky_solve(way: Way, B: Any, L: Any, upper: bool = False) -> Any:
    return way.op(B, _triangle(L, upper), upper)


@_body("cholesky_inverse")
def _cholesky_inverse(way: Way, L: Any, upper: bool = False) -> Any:
    one = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(_triangle(L, upper), one.expand(L.shape), upper=upper)
    return inverse @ inverse.mH if upper else inverse.mH @ inverse


@_body("triangular_solve")
def _triangular_solve(
    way: Way, b: Any, A: Any, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    triangle, options = _triangle(A, upper), {"unitriangular": unitriangular}
    if transpose:
        triangle, upper = triangle.mT, not upper
    found = torch.linalg.solve_triangular(triangle, b, upper=upper, **options)
    return torch.return_types.triangular_solve((found, A.clone()))


@_body("svd")
def _svd(way: Way, A: Any, *args: Any, **options: Any) -> Any:
    found = way.op(A, *args, **options)
    U, S, V = found
    of_torch = isinstance(found, torch.return_types.svd)  # V, where torch.linalg has Vᴴ
    count, (rows, columns) = S.shape[-1], A.shape[-2:]
    left, right = U.shape[-1] == rows > count, V.shape[-1] == columns > count and V.shape[-2] == columns
    if not (left or right):
        return found
    way.refuse_gradients("svd of a matrix that is not square, with full_matrices=True,")
    inverse = torch.linalg.pinv(way.fixed(A))
    if left:
        U = torch.cat([U[..., :count], _null(way, way.fixed(U)[..., count:], A.mH, inverse.mH)], -1)
    if right:
        null = _null(way, (way.fixed(V) if of_torch else way.fixed(V).mH)[..., count:], A, inverse)
        V = torch.cat([V[..., :count], null], -1) if of_torch else torch.cat([V[..., :count, :], null.mH], -2)
    return type(found)((U, S, V))


def _null(way: Way, N: Tensor, A: Any, inverse: Tensor) -> Any:
    """N with A N = 0 and dN = −A⁺ dA N; of more than one such vector each alone is any: nan."""
    moved = inverse @ (A @ N)
    N = N - (moved - way.fixed(moved))
    return N if N.shape[-1] == 1 else way.undefined(N)


@_body("linalg.pinv")
def _pinv(way: Way, A: Any, rcond: Any = None, hermitian: bool = False, **given: Any) -> Any:
    options = ({} if rcond is None else {"rcond": rcond}) | given
    if hermitian:
        A, options = _mirrored(A, False), options | {"hermitian": True}
    return _truncated(way, A, **options)


@_body("pinverse")
def _pinverse(way: Way, A: Any, rcond: float = 1e-15) -> Any:
    return _truncated(way, A, rcond=rcond)


def _truncated(way: Way, A: Any, **options: Any) -> Any:
    """The pseudo-inverse of A Π, Π the projector on what is kept: of A itself where nothing is dropped.

    dΠ = V (X + Xᴴ) Vᴴ,  X_ij = (Vᴴ d(AᴴA) V)_ij / (λ_i − λ_j) for i kept and j dropped: what is kept may be alike.
    """
    fixed = way.fixed(A)
    _, S, Vh = torch.linalg.svd(fixed)
    known = (S > 16 * torch.finfo(S.dtype).eps * max(A.shape[-2:]) * S[..., :1]).sum(-1)
    kept = torch.linalg.matrix_rank(way.op(fixed, **options))
    try:
        drops = bool((kept < known).any())
    except RuntimeError:  # inside of a vmap of the model's own
        drops = False
    if not drops:
        return way.op(A, **options)
    way.refuse_gradients("a pseudo-inverse that drops singular values")
    V, M = Vh.mH, A.mH @ A
    eigenvalues = torch.nn.functional.pad(S.square(), (0, V.shape[-1] - S.shape[-1]))
    stays = torch.arange(V.shape[-1], device=S.device) < kept[..., None]
    between = stays[..., :, None] & ~stays[..., None, :]
    gaps = torch.where(between, eigenvalues[..., :, None] - eigenvalues[..., None, :], torch.inf)
    X = (Vh @ (M - way.fixed(M)) @ V) / gaps
    return way.op(A @ (V @ (torch.diag_embed(stays.to(V.dtype)) + X + X.mH) @ Vh), **options)
