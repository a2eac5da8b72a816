"""Block Golub-Kahan with full reorthogonalisation: the leading singular values of J from products Jv and Jᵀu alone.

Legend of axes: B samples, b the block, m the Krylov dimension, k the values wanted, D inputs, N features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch.nn import functional

from torchgeom_probe.jacobian.layer import LayerJacobian, orthonormal
from torchgeom_probe.shapes import Bool, Float, Int, Tensor

_LN10 = math.log(10.0)

#: A bound speaks of the LEADING values only where the residuals are small: log10 σ_i within the first number, |r_i|/S_i below the
#: second, in two half-steps in a row.  tests/estimators/test_calibration.py: no bound below the error in 6480 runs (nine spectra,
#: n = 256, d = 512, k = 1, 3 and 10, block 4, tol 1e-2 and 1e-3); with those for whole steps, below, it fails.
_CREDIBLE = 1e-3
_CLOSE = 0.03
#: The same where only whole steps can be judged, as after a warm start: two of them in a row see as much with less; and what the bound
#: is multiplied by.  The same test: no bound below the error in 3240 warm starts (without the margin there was one, by a hundredth).
_CREDIBLE_IN_WHOLE_STEPS = 3e-3
_CLOSE_IN_WHOLE_STEPS = 0.06
_MARGIN_IN_WHOLE_STEPS = 1.5

#: A window of as many Ritz values as the block has vectors is crowded where they agree this well, or ten times better than with the next
#: value: a Krylov space from b random vectors holds b copies of a multiple value and cannot show that there are more.
_TIGHT = 1e-3
_ALIKE = 0.05

#: Vectors beyond the k wanted that a warm start keeps.
SPARE = 2


@dataclass(frozen=True, eq=False)
class Leading:
    """The k leading singular values of every sample, and how far off they may be.

    Attributes:
        values: [B, k] float64, descending; lower bounds of the true ones.
        bound: [B] on the sum of the errors of their logarithms, in nats; inf where the residuals are too large to say.
        converged: [B], whether the stopping rule was met, and nothing crowded.
        crowded: [B], whether more copies of a multiple value than the block holds may be missing among the k: a larger block tells.
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
    jacobian: LayerJacobian,
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

    Where a value may have more copies than the block holds (a convolution over patches that do not overlap has one for each
    patch), once more from a block of k + 2 vectors, in which no copy among the k can be missed.
    """
    options = {"k": k, "tolerance": tolerance, "max_products": max_products, "generator": generator}
    found = _expanded(jacobian, start, block=block, warm=warm, **options)  # type: ignore[arg-type]
    larger = min(max(2 * block, k + 2), jacobian.num_features, jacobian.num_inputs)
    if jacobian.products + 2 * larger > max_products or not bool(found.crowded.any()):
        return found
    rows = torch.randn(larger, jacobian.num_inputs, generator=generator, dtype=torch.float64).to(start.device)
    again = _expanded(jacobian, rows.expand(len(start), -1, -1), block=larger, **options)  # type: ignore[arg-type]

    def chosen(name: str) -> Tensor:
        first, second = getattr(found, name), getattr(again, name)
        return torch.where(found.crowded.view(-1, *(1,) * (first.ndim - 1)), second, first)

    return Leading(*(chosen(field.name) for field in fields(Leading)))


def _expanded(
    jacobian: LayerJacobian,
    start: Float[Tensor, "B b D"],
    *,
    k: int,
    block: int,
    tolerance: float,
    max_products: float,
    generator: torch.Generator,
    warm: bool = False,
) -> Leading:
    """One Krylov space, from its first block to its end.

    Right and left Krylov bases V and U with J V = U B exactly; from B = P S Q, u = U P_i and v = V Q_i, the residual of a Ritz pair is
    r_i = Jᵀu_i − S_i v_i.  The next block is what the residuals, each relative to its value, span best: for a cold start that is the
    block Krylov space; for a warm one it goes where the old vectors fail.  A sample's result is the one of its own stopping round,
    whatever its neighbours need.
    """
    eps, full = jacobian.eps, min(jacobian.num_features, jacobian.num_inputs)
    device, samples = start.device, start.shape[0]
    right = start.new_zeros(samples, 0, jacobian.num_inputs)
    left = start.new_zeros(samples, 0, jacobian.num_features)
    pulled = right  # Jᵀ U
    cross = start.new_zeros(samples, 0, 0)  # UᵀJV, m x m
    verdict = _Verdict(jacobian, k=k, block=start.shape[1], tolerance=tolerance, warm=warm)
    largest = start.new_zeros(samples)
    fresh = orthonormal(start, None, eps=eps)
    random = torch.full((samples,), not warm, device=device)
    while True:
        image = jacobian.push(fresh, at=verdict.waiting)  # a sample that is done costs no more pushes
        largest = torch.maximum(largest, image.norm(dim=2).amax(1))
        fresh_left = orthonormal(image, left, eps=eps, noise=8 * eps * largest[:, None, None])
        # What J makes of a random block lies in the known range: there are no more singular values than have been seen.
        complete = random & (fresh_left.square().sum((1, 2)) < 0.5)
        finite = image.isfinite().all(-1).all(-1)
        reached = right.shape[1]
        rows = torch.cat([cross, pulled @ fresh.mT], dim=2)  # Jᵀ U in the basis of V and its fresh block
        corner = fresh_left @ image.mT
        right, left = torch.cat([right, fresh], dim=1), torch.cat([left, fresh_left], dim=1)
        seen = (right.shape[1], complete, finite)
        if reached:
            values, residuals = _left_pairs(rows, pulled, right, corner, verdict.wanted(reached), eps)
            verdict.judge(values, residuals, *seen, half=True, exhausted=False)
            if verdict.all_done():  # a synchronisation in the middle of the round
                known = functional.pad(corner, (reached, 0))
                cross, pulled = (
                    torch.cat([rows, known], dim=1),
                    functional.pad(pulled, (0, 0, 0, fresh.shape[1])),
                )
                break
        fresh_pulled = jacobian.pull(fresh_left)
        cross = torch.cat([rows, fresh_pulled @ right.mT], dim=1)
        pulled = torch.cat([pulled, fresh_pulled], dim=1)
        vectors_left, values, vectors_right = torch.linalg.svd(torch.nan_to_num(cross))
        count = verdict.wanted(right.shape[1])
        values = values[:, :count]
        residuals = vectors_left.mT[:, :count] @ pulled - values[:, :, None] * (
            vectors_right[:, :count] @ right
        )
        verdict.judge(values, residuals, *seen, half=False, exhausted=right.shape[1] >= full)
        # The round's other synchronisation.
        if verdict.all_done() or jacobian.products + 2 * block > max_products:
            break
        fresh, random = _expansion(values, residuals, right, block, eps, generator)
    values, vectors, left = _best_values(cross, pulled, right, left, verdict, k)
    return Leading(
        values,
        verdict.bound,
        verdict.done & ~verdict.crowded,
        verdict.crowded,
        verdict.products,
        vectors,
        left,
    )


def _left_pairs(
    rows_Bmr: Tensor, pulled_BmD: Tensor, right_BrD: Tensor, corner_Bbb: Tensor, count: int, eps: float
) -> tuple[Tensor, Tensor]:
    """After a push: the pairs of JᵀU, half a step beyond those of UᵀJV, with residuals J w − s u.

    All of them lie in the fresh block of U, so they are made of small matrices: ``rows`` is JᵀU in the basis of V and its fresh block,
    ``corner`` what J makes of the fresh block there.  What JᵀU has outside of that basis (after a warm start, where the residuals span
    more than a block) is not known to J: it makes the residual infinite.
    """
    vectors, values, basis = torch.linalg.svd(torch.nan_to_num(rows_Bmr), full_matrices=False)
    vectors, values, basis = vectors[:, :, :count], values[:, :count], basis[:, :count]
    residuals = basis[:, :, -corner_Bbb.shape[2] :] @ corner_Bbb.mT
    outside = (vectors.mT @ torch.nan_to_num(pulled_BmD) - values[:, :, None] * (basis @ right_BrD)).norm(
        dim=2
    )
    return values, torch.where((outside <= 64 * eps * values[:, :1])[:, :, None], residuals, torch.inf)


class _Verdict:
    """What is known of each sample: whether it is done, and with what bound, after how many products and vectors."""

    def __init__(self, jacobian: LayerJacobian, *, k: int, block: int, tolerance: float, warm: bool) -> None:
        self.jacobian = jacobian
        self.k, self.block, self.tolerance = k, block, tolerance
        samples, device = jacobian.batch, jacobian.device
        self.done = torch.zeros(samples, dtype=torch.bool, device=device)
        self.crowded = torch.zeros_like(self.done)
        #: vectors of V in use, those of a fresh block whose Jᵀu is not known included: then it was half a step
        self.size = torch.zeros(samples, dtype=torch.long, device=device)
        self.half = torch.zeros_like(self.done)
        self.products = torch.zeros_like(self.size)
        self.bound = torch.full((samples,), torch.inf, dtype=torch.float64, device=device)
        self._credible_before = torch.zeros_like(self.done)
        self._halves_tell = torch.full_like(self.done, not warm)
        #: samples that are not done, as of the last synchronisation
        self.waiting = list(range(samples))

    def wanted(self, reached: int) -> int:
        """How many pairs the stopping rule looks at."""
        return min(reached, max(self.k + 1, self.block) + 2 * self.block)

    def judge(
        self,
        values: Tensor,
        residuals: Tensor,
        size: int,
        complete: Tensor,
        finite: Tensor,
        *,
        half: bool,
        exhausted: bool,
    ) -> None:
        """Take in what a half-step has found."""
        bound, met = _stopping_rule(
            values,
            residuals,
            k=self.k,
            tolerance=self.tolerance,
            eps=self.jacobian.eps,
            exhausted=exhausted,
            complete=complete,
            credible_error=torch.where(self._halves_tell, _CREDIBLE, _CREDIBLE_IN_WHOLE_STEPS),
            close=torch.where(self._halves_tell, _CLOSE, _CLOSE_IN_WHOLE_STEPS),
        )
        # What lies below the k values is known worse where no half-step has been there.
        bound = torch.where(self._halves_tell, bound, _MARGIN_IN_WHOLE_STEPS * bound)
        # One half-step's word is not enough: a value that the space has only begun to see shows in the next one.
        known = complete | exhausted
        told = residuals.isfinite().all(-1).all(-1) | ~finite  # or it was no half-step
        credible = bound.isfinite()
        confirmed = credible & (self._credible_before | known)
        self._credible_before = torch.where(told, credible, self._credible_before)
        if half:
            self._halves_tell = told
        hidden, in_doubt = _crowding(values, residuals, k=self.k, block=self.block, tolerance=self.tolerance)
        bound = torch.where(known, bound, bound + hidden)
        bound = torch.where(confirmed, bound, torch.inf)
        # A block that is larger than k holds every copy that counts: what is in doubt is their values, and further steps tell.
        in_doubt = in_doubt & ~known
        waits = in_doubt if self.block > self.k else torch.zeros_like(in_doubt)
        met = (met & confirmed & told & ~waits) | ~finite
        kept = self.done | ~told
        self.bound = torch.where(kept, self.bound, bound)
        self.crowded = torch.where(kept, self.crowded, in_doubt & confirmed)
        self.size = torch.where(kept, self.size, size)
        self.half = torch.where(kept, self.half, half)
        self.products = torch.where(kept, self.products, self.jacobian.products)
        self.done = self.done | met

    def all_done(self) -> bool:
        """Whether the last sample is done; from here on ``waiting`` are those that are not."""
        self.waiting = [i for i, done in enumerate(self.done.tolist()) if not done]
        return not self.waiting


def _stopping_rule(
    values_Bc: Tensor,
    residuals_BcD: Tensor,
    *,
    k: int,
    tolerance: float,
    eps: float,
    exhausted: bool,
    complete: Tensor,
    credible_error: Tensor,
    close: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return ([B] bound in nats on Σ log σ_i, [B] whether each of the k is within ``tolerance`` of log10).

    Linear: |σ − S_i| ≤ |r_i| for some σ.  Quadratic, for any split j ≥ k of the Ritz values: in the basis of the first j Ritz vectors and
    the rest, g is [[Θ, Rᵀ], [R, C]] with Θ = diag S_i² and columns S_i r_i of R, so λ_i ≤ eig_i(Θ + RᵀR/(S_k²
    − μ)), μ = λ_max(C), for i ≤ k
    (Schur complement).  μ is taken to be (S_{j+1} + |r_{j+1}|)²; the best j is used: the gap to a far value may be wide where the
    one to σ_{k+1} is narrow.
    """
    top = values_Bc[:, :1]
    count = values_Bc.shape[1]
    floor = (16 * eps * top).clamp_min(1e-300)
    if count < k or (count == k and not exhausted):
        return torch.full_like(top[:, 0], torch.inf), torch.zeros_like(top[:, 0], dtype=torch.bool)
    norms = residuals_BcD.norm(dim=2)
    wanted, slack = values_Bc[:, :k], norms[:, :k]
    zero = wanted <= floor
    rounding_each = torch.where(zero, 0.0, 8 * eps * top / wanted.clamp_min(1e-300))
    rounding = rounding_each.sum(1)
    if exhausted:
        return rounding, torch.ones_like(zero[:, 0])
    linear = (slack / wanted.clamp_min(1e-300)).log1p()
    linear = torch.where(zero, torch.where(complete[:, None] & (slack <= floor), 0.0, torch.inf), linear)
    # One matrix per split j = k … c−1, relative to the largest value; j beyond the split is uncoupled and smaller.
    theta = (values_Bc / top.clamp_min(1e-300)).square()
    coupling = torch.nan_to_num(residuals_BcD * (values_Bc / top.clamp_min(1e-300).square())[:, :, None])
    coupling = coupling @ coupling.mT
    split = torch.arange(k, count, device=top.device)
    within = torch.arange(count, device=top.device)[None, :] < split[:, None]
    beyond = ((values_Bc + norms)[:, k:] / top.clamp_min(1e-300)).square()
    gap = theta[:, k - 1 : k] - beyond
    matrix = (
        (within[:, :, None] & within[:, None, :]) * coupling[:, None] / gap.clamp_min(1e-12)[:, :, None, None]
    )
    matrix = matrix + torch.diag_embed(theta)[:, None]
    above = torch.linalg.eigvalsh(torch.nan_to_num(matrix)).flip(-1)[:, :, :k]
    each = (above / theta[:, None, :k].clamp_min(1e-300)).clamp_min(1.0).log() / 2
    each = torch.where((gap > 1e-12)[:, :, None], torch.where(zero[:, None], 0.0, each), torch.inf)
    best = each.sum(2).argmin(1)
    quadratic = each.gather(1, best[:, None, None].expand(-1, 1, k))[:, 0]
    # A value that is zero has no logarithm: that there are no more must be shown.
    quadratic = torch.where(zero, torch.inf, quadratic)
    error = torch.minimum(linear, quadratic)
    # Large residuals bound the distance to SOME singular value, not to the one of the same number.
    credible = ((error < credible_error[:, None] * _LN10) & (linear < close[:, None])).all(1)
    # Below its own rounding no value can be asked to settle.
    met = (error < torch.maximum(rounding_each, torch.full_like(rounding_each, tolerance * _LN10))).all(1)
    return torch.where(credible, error.sum(1) + rounding, torch.inf), met & credible


def _crowding(
    values_Bc: Tensor, residuals_BcD: Tensor, *, k: int, block: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return ([B] what hidden copies could add to Σ log σ_i, in nats; [B] whether that is too much to be a bound: then it is inf).

    A copy that is missing behind a window of ``block`` values that agree would take the place of each later one: they are lower than the
    window's first by Σ_j log(S_i/S_j).  Within a window that the polynomial does not resolve a value is no better known than its
    neighbours are alike.
    """
    count = values_Bc.shape[1]
    top = values_Bc[:, :1].clamp_min(1e-300)
    logs = (values_Bc / top).clamp_min(1e-300).log()
    linear = (residuals_BcD.norm(dim=2) / values_Bc.clamp_min(1e-300)).log1p()
    worst = torch.zeros_like(top[:, 0])
    for first in range(min(k, max(0, count - block + 1))):
        last = first + block - 1
        width = logs[:, first] - logs[:, last]
        gap = logs[:, last] - logs[:, last + 1] if last + 1 < count else torch.full_like(width, torch.inf)
        crowded = (width < _TIGHT) | ((width < _ALIKE) & (width < 0.1 * gap))
        unresolved = 2 * width + 3 * linear[:, first : last + 1].amax(1)
        # Later values may all be zero to rounding: the copies would then stand in the place of nothing.
        displaced = (logs[:, first : first + 1] - logs[:, last + 1 : k]).clamp_min(0).sum(1)
        # Where the value after the window lies far below, the block's own vectors resolve the window's values.
        extra = displaced + torch.where(width < _TIGHT, (k - first) * unresolved, 0.0)
        worst = torch.maximum(worst, torch.where(crowded & (logs[:, first] > -60), extra, 0.0))
    in_doubt = worst > k * tolerance * _LN10
    return torch.where(in_doubt, torch.inf, worst), in_doubt


def _expansion(
    values_Bc: Tensor,
    residuals_BcD: Tensor,
    right: Tensor,
    block: int,
    eps: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The block that spans the relative residuals best, random directions where they hold nothing but rounding; and whether all are."""
    top = values_Bc[:, :1]
    weights = 1 / torch.maximum(values_Bc, 16 * eps * top).clamp_min(1e-300)
    weighted = torch.nan_to_num(residuals_BcD * weights[:, :, None])
    energies, mixing = torch.linalg.eigh(weighted @ weighted.mT)
    energies, mixing = energies.flip(-1)[:, :block], mixing.flip(-1)[:, :, :block]
    rounding = (mixing.square() * (8 * eps * top * weights)[:, :, None].square()).sum(1)
    candidates = torch.where((energies > rounding)[:, :, None], mixing.mT @ weighted, 0.0)
    if candidates.shape[1] < block:
        missing = candidates.new_zeros(candidates.shape[0], block - candidates.shape[1], candidates.shape[2])
        candidates = torch.cat([candidates, missing], dim=1)
    candidates = orthonormal(candidates, right, eps=eps)
    random = torch.randn(block, right.shape[2], generator=generator, dtype=torch.float64).to(right.device)
    empty = candidates.square().sum(2, keepdim=True) < 0.5
    filled = torch.where(empty, random / random.norm(dim=1, keepdim=True), candidates)
    return orthonormal(filled, right, eps=eps), empty[:, :, 0].all(1)


def _best_values(
    cross: Tensor, pulled: Tensor, right: Tensor, left: Tensor, verdict: _Verdict, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading values, and singular vectors, each sample's by the space that it stopped with.

    Both are half a step beyond the pairs that were judged, at no price: after a push those of JV, after a pull those of JᵀU.
    """
    within = torch.arange(right.shape[1], device=right.device)[None, :, None] < verdict.size[:, None, None]
    matrix = torch.nan_to_num(torch.where(within, pulled, 0.0))
    basis, triangle = torch.linalg.qr(matrix.mT)
    rotation, values, mixing = torch.linalg.svd(triangle)
    kept = min(k + SPARE, values.shape[1])
    vectors, lefts = (basis @ rotation[:, :, :kept]).mT, mixing[:, :kept] @ left
    after_push = torch.nan_to_num(torch.where(within.mT, cross, 0.0))  # J V = U cross
    rotation, pushed, mixing = torch.linalg.svd(after_push)
    half = verdict.half[:, None]
    values = torch.where(half, pushed[:, : values.shape[1]], values)
    vectors = torch.where(half[:, :, None], mixing[:, :kept] @ right, vectors)
    lefts = torch.where(half[:, :, None], rotation.mT[:, :kept] @ left, lefts)
    values = torch.where(pulled.isfinite().all(-1).all(-1)[:, None], values, torch.nan)
    missing = (0, 0, 0, k + SPARE - kept)
    return values[:, :k], functional.pad(vectors, missing), functional.pad(lefts, missing)
