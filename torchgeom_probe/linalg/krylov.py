"""The k leading singular values of J, with a bound on their error, from products Jv and Jᵀu alone: block Golub-Kahan.

**What grows.**  For every sample two sets of orthonormal vectors: V of inputs and U of features (columns in these
formulas, rows in the code).  U spans what J makes of V:
    J V = U C,  C = Uᵀ J V [m, m].
A round adds b vectors to each, in two half-steps:
    push   J F, for a block F of b new vectors orthogonal to V; what of J F lies outside of U is added to U, as G;
    pull   Jᵀ G, which completes Jᵀ U.
F spans the residuals (below) as well as b vectors can.  From a random start, V is then the block Krylov space of
g = JᵀJ; from the singular vectors of an earlier measurement it grows where those fail.  What is added is made
orthogonal to all that is there, twice.

**What is read off.**  The SVD C = P S Qᵀ gives the Ritz values S_i and the Ritz pairs u_i = U P_i, v_i = V Q_i:
    J v_i = S_i u_i,   Jᵀ u_i = S_i v_i + r_i,   with residuals r_i orthogonal to V.
S_i is at most σ_i, and only rises as the spaces grow.  After a push, before the pull, the old vectors of U have their
Jᵀ U within the grown V; its SVD gives pairs that are half a step further:
    Jᵀ u_i = S_i w_i,  J w_i = S_i u_i + r_i,   with residuals r_i orthogonal to the old U.

**When it ends,** and why the bound on the error holds: see :mod:`torchgeom_probe.linalg.stopping`.

Legend of axes: B samples, b the block, m the vectors so far, c Ritz pairs that are looked at, k the values wanted,
D inputs, N features.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.nn import functional

from torchgeom_probe.linalg.operator import Operator
from torchgeom_probe.linalg.orthonormal import orthonormal
from torchgeom_probe.linalg.stopping import Verdict
from torchgeom_probe.shapes import Bool, Float, Int, Tensor

#: Vectors beyond the k wanted that a warm start keeps.
SPARE = 2


@dataclass(frozen=True, eq=False)
class Leading:
    """The k leading singular values of every sample, and how far off they may be.

    Attributes:
        values: [B, k] float64, descending; lower bounds of the true ones.
        bound: [B] on the sum of the errors of their logarithms, in nats; inf where the residuals are too large to say.
        converged: [B], whether the stopping rule was met, and nothing crowded.
        crowded: [B], whether more copies of a multiple value than the block holds may be missing among the k.
        products: [B], Jv and Jᵀu together.
        vectors: [B, q, D], right singular vectors, k and two spare ones; zero where there are no more.
        left: [B, q, N], the left ones.
    """

    values: Float[Tensor, "B k"]
    bound: Float[Tensor, " B"]
    converged: Bool[Tensor, " B"]
    crowded: Bool[Tensor, " B"]
    products: Int[Tensor, " B"]
    vectors: Float[Tensor, "B q D"]
    left: Float[Tensor, "B q N"]


def leading(
    jacobian: Operator,
    start: Float[Tensor, "B b D"],
    *,
    k: int,
    block: int,
    tolerance: float,
    max_products: float,
    generator: torch.Generator,
    warm: bool = False,
) -> Leading:
    """Expand until every sample meets the stopping rule, or the next round would go beyond ``max_products``.

    A sample's result is that of its own last round, whatever its neighbours need.  Bias: downward, within ``bound``.
    Cost: 2 · block products a round; 40 to 140 in all at k = 10, n = 512, d = 3072 (benchmarks/README.md).

    Args:
        jacobian: J, by its products.
        start: the first block, float64: random, or with ``warm`` the singular vectors of a Jacobian close by.
        k: how many values.
        block: vectors a round, at least 4: with fewer the stopping rule misfires.
        tolerance: on each log10 σ_i.
        max_products: per sample.
        generator: of the random directions that fill up a block.
        warm: whether ``start`` is not random, so that two whole steps must agree before the first verdict.

    >>> from torchgeom_probe.linalg.operator import MatrixOperator
    >>> J = torch.diag(torch.arange(60.0, 0.0, -1.0).double())[None]
    >>> generator = torch.Generator().manual_seed(0)
    >>> start = torch.randn(1, 4, 60, dtype=torch.float64, generator=generator)
    >>> options = {"block": 4, "tolerance": 1e-4, "max_products": 240, "generator": generator}
    >>> found = leading(MatrixOperator(J), start, k=2, **options)
    >>> error = torch.tensor([60.0, 59.0]).double().log().sum() - found.values.log().sum()
    >>> bool(found.converged), bool(0 <= error <= found.bound < 1e-3)
    (True, True)
    """
    expanded = functools.partial(
        _expanded, jacobian, k=k, tolerance=tolerance, max_products=max_products, generator=generator
    )
    found = expanded(start, block=block, warm=warm)
    larger = min(max(2 * block, k + 2), jacobian.num_features, jacobian.num_inputs)
    if jacobian.products + 2 * larger > max_products or not bool(found.crowded.any()):
        return found
    again = expanded(random_block(jacobian, larger, generator), block=larger, warm=False)

    def chosen(first: Tensor, second: Tensor) -> Tensor:
        return torch.where(found.crowded.view(-1, *(1,) * (first.ndim - 1)), second, first)

    return Leading(*map(chosen, vars(found).values(), vars(again).values()))


def random_block(jacobian: Operator, block: int, generator: torch.Generator) -> Float[Tensor, "B b D"]:
    """Random vectors to start from, the same at every sample (an expanded view)."""
    rows = torch.randn(block, jacobian.num_inputs, generator=generator, dtype=torch.float64)
    return rows.to(jacobian.device).expand(jacobian.batch, -1, -1)


def _expanded(
    jacobian: Operator,
    start: Float[Tensor, "B b D"],
    *,
    k: int,
    block: int,
    tolerance: float,
    max_products: float,
    generator: torch.Generator,
    warm: bool,
) -> Leading:
    """One pair of spaces, from the first block to the end; ``all_done`` makes the host wait twice a round."""
    space = _Space(jacobian, start)
    verdict = Verdict(jacobian, k=k, block=start.shape[1], tolerance=tolerance, warm=warm)
    full = min(jacobian.num_features, jacobian.num_inputs)
    fresh = orthonormal(start, None, eps=jacobian.eps)
    random = torch.full((len(start),), not warm, device=start.device)
    while True:
        known = space.size
        space.push(fresh, at=verdict.waiting)  # a sample that is done costs no more pushes
        # What J makes of a random block lies in the known range: there are no more singular values than have been seen.
        complete = random & space.silent
        judge = functools.partial(verdict.judge, size=space.size, complete=complete, finite=space.finite)
        if known:
            values, residuals = space.left_pairs(verdict.wanted(known))
            judge(values, residuals, half=True, exhausted=False)
            if verdict.all_done():
                break
        space.pull()
        values, residuals = space.right_pairs(verdict.wanted(space.size))
        judge(values, residuals, half=False, exhausted=space.size >= full)
        if verdict.all_done() or jacobian.products + 2 * block > max_products:
            break
        fresh, random = _expansion(values, residuals, space.right, block, jacobian.eps, generator)
    values, vectors, left = _best_values(space, verdict, k)
    return Leading(
        values=values,
        bound=verdict.bound,
        converged=verdict.done & ~verdict.crowded,
        crowded=verdict.crowded,
        products=verdict.products,
        vectors=vectors,
        left=left,
    )


class _Space:
    """The bases V and U of every sample, and what J makes of them.

    Attributes:
        right: V, [B, m, D].
        left: U, [B, m, N].
        cross: C = UᵀJV, [B, m, m].
        pulled: JᵀU, [B, m, D]; zero for the fresh rows of U until they are pulled.
        silent: [B], whether the last push brought nothing outside of U.
        finite: [B], whether what it brought was finite.
    """

    def __init__(self, jacobian: Operator, start: Float[Tensor, "B b D"]) -> None:
        self.jacobian = jacobian
        samples = len(start)
        self.right = start.new_zeros(samples, 0, jacobian.num_inputs)
        self.left = start.new_zeros(samples, 0, jacobian.num_features)
        self.cross = start.new_zeros(samples, 0, 0)
        self.pulled = self.right
        self._largest = start.new_zeros(samples)
        self._fresh_left = self.left

    @property
    def size(self) -> int:
        """m, the rows of V."""
        return self.right.shape[1]

    def push(self, fresh: Float[Tensor, "B b D"], *, at: list[int]) -> None:
        """Take the fresh rows into V, and what is new in J F into U; only ``at`` these samples is it needed."""
        eps, known = self.jacobian.eps, self.size
        image = self.jacobian.push(fresh, at=at)
        self._largest = torch.maximum(self._largest, image.norm(dim=2).amax(1))
        noise = 8 * eps * self._largest[:, None, None]
        self._fresh_left = orthonormal(image, self.left, eps=eps, noise=noise)
        self.silent = self._fresh_left.square().sum((1, 2)) < 0.5
        self.finite = image.isfinite().all(-1).all(-1)
        above = torch.cat([self.cross, self.pulled @ fresh.mT], dim=2)
        below = functional.pad(self._fresh_left @ image.mT, (known, 0))
        self.cross = torch.cat([above, below], dim=1)
        self.pulled = functional.pad(self.pulled, (0, 0, 0, fresh.shape[1]))
        self.right = torch.cat([self.right, fresh], dim=1)
        self.left = torch.cat([self.left, self._fresh_left], dim=1)

    def pull(self) -> None:
        """Complete JᵀU by the fresh rows of U."""
        pulled = self.jacobian.pull(self._fresh_left)
        fresh = pulled.shape[1]
        self.pulled[:, -fresh:] = pulled
        self.cross[:, -fresh:] = pulled @ self.right.mT

    def left_pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """After a push, for the old rows of U: the first pairs Jᵀu = S w, as S [B, c], and J w − S u [B, c, b].

        w is known in the basis of V with its fresh block, and J w − S u lies in the fresh rows of U.  What JᵀU has
        outside of that basis (after a warm start, whose residuals span more than a block) no product has met: it makes
        the residual infinite.
        """
        known = self.size - self._fresh_left.shape[1]
        vectors, values, basis = torch.linalg.svd(torch.nan_to_num(self.cross[:, :known]), full_matrices=False)
        vectors, values, basis = vectors[:, :, :count], values[:, :count], basis[:, :count]
        residuals = basis[:, :, known:] @ self.cross[:, known:, known:].mT
        inside = values[:, :, None] * (basis @ self.right)
        outside = (vectors.mT @ torch.nan_to_num(self.pulled[:, :known]) - inside).norm(dim=2)
        met = outside <= 64 * self.jacobian.eps * values[:, :1]
        return values, torch.where(met[:, :, None], residuals, torch.inf)

    def right_pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """After a pull: the first values of C, [B, c], and their residuals, [B, c, D]."""
        vectors_left, values, vectors_right = torch.linalg.svd(torch.nan_to_num(self.cross))
        values = values[:, :count]
        ritz = values[:, :, None] * (vectors_right[:, :count] @ self.right)
        return values, vectors_left.mT[:, :count] @ self.pulled - ritz


def _expansion(
    values_Bc: Tensor, residuals_BcD: Tensor, right: Tensor, block: int, eps: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return ([B, b, D] the next block; [B] whether all of it is random).

    It spans the residuals best, each relative to its value; where they hold nothing but rounding, random directions
    stand in.
    """
    top = values_Bc[:, :1]
    weights = 1 / torch.maximum(values_Bc, 16 * eps * top).clamp_min(1e-300)
    weighted = torch.nan_to_num(residuals_BcD * weights[:, :, None])
    energies, mixing = torch.linalg.eigh(weighted @ weighted.mT)
    energies, mixing = energies.flip(-1)[:, :block], mixing.flip(-1)[:, :, :block]
    rounding = (mixing.square() * (8 * eps * top * weights)[:, :, None].square()).sum(1)
    candidates = torch.where((energies > rounding)[:, :, None], mixing.mT @ weighted, 0.0)
    candidates = functional.pad(candidates, (0, 0, 0, block - candidates.shape[1]))
    candidates = orthonormal(candidates, right, eps=eps)
    random = torch.randn(block, right.shape[2], generator=generator, dtype=torch.float64).to(right.device)
    empty = candidates.square().sum(2, keepdim=True) < 0.5
    filled = torch.where(empty, random / random.norm(dim=1, keepdim=True), candidates)
    return orthonormal(filled, right, eps=eps), empty[:, :, 0].all(1)


def _best_values(space: _Space, verdict: Verdict, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading values, and singular vectors, each sample's by the space that it stopped with.

    Both are half a step beyond the pairs that were judged, at no price: after a push those of JV, after a pull those of
    JᵀU.
    """
    rows = torch.arange(space.size, device=space.right.device)[None, :, None]
    within = rows < verdict.size[:, None, None]
    matrix = torch.nan_to_num(torch.where(within, space.pulled, 0.0))
    basis, triangle = torch.linalg.qr(matrix.mT)
    rotation, values, mixing = torch.linalg.svd(triangle)
    kept = min(k + SPARE, values.shape[1])
    vectors, left = (basis @ rotation[:, :, :kept]).mT, mixing[:, :kept] @ space.left
    after_push = torch.nan_to_num(torch.where(within.mT, space.cross, 0.0))  # J V = U C
    rotation, pushed, mixing = torch.linalg.svd(after_push)
    half = verdict.half[:, None]
    values = torch.where(half, pushed[:, : values.shape[1]], values)
    vectors = torch.where(half[:, :, None], mixing[:, :kept] @ space.right, vectors)
    left = torch.where(half[:, :, None], rotation.mT[:, :kept] @ space.left, left)
    values = torch.where(space.pulled.isfinite().all(-1).all(-1)[:, None], values, torch.nan)
    missing = (0, 0, 0, k + SPARE - kept)
    return values[:, :k], functional.pad(vectors, missing), functional.pad(left, missing)
