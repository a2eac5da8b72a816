"""How far off a Krylov space's values may be, at any moment: bounds from Ritz values, residuals and their progress.

The pairs are those of :mod:`torchgeom_probe.linalg.krylov`, S_i their values, r_i their residuals, a_j = Σ log S_i over
the k wanted after the j-th half-step.  Four bounds on the error of a_j; the smallest that counts is taken.

- **Progress.**  Where σ_1 … σ_k are close together the iteration advances as 1/j² and faster, so that what is left is
  at most some j times the last two half-steps' gain.  How many times was calibrated (``_AHEAD``).  It is no less than
  what a value could add that the start hardly knows of: there gains cease while it is still missing.
- **The top.**  All k values are below σ_1, whose own bound is that of k = 1; before progress is to be seen, the random
  start W says |JW|² ≥ σ_1² h², h its part along the first singular vector.
- **Linear.**  Some singular value lies within |r_i| of S_i.
- **Quadratic.**  Take the first j ≥ k vectors v_i and complete them to an orthonormal basis of the inputs.  In it
    g = JᵀJ = [[Θ, Rᵀ], [R, M]],  Θ = diag(S_1², …, S_j²),  and R has the columns S_i r_i,
  since g v_i = S_i Jᵀ u_i = S_i² v_i + S_i r_i.  Let μ be the largest eigenvalue of M.  Where μ < S_k², the Schur
  complement says of the k largest eigenvalues of g, which are at least S_k², that
    λ_i(g) ≤ λ_i(Θ + RᵀR/(S_k² − μ)),  i ≤ k.
  μ is not known: it is taken to be (S_{j+1} + |r_{j+1}|)².  Every split j is tried and the best one used.
  The last two count only where residuals are small, in two half-steps in a row, and the values have gained no more
  since than they say: large residuals bound the distance to SOME singular value, not to the one of the same number.

**What neither residuals nor progress can see** is a further copy of a multiple value: b random vectors meet b copies of
it and no more.  Where b Ritz values in a row agree and rest, what hidden copies could add is part of the bound; where
that is too much, the sample starts again from k + 2 vectors, among which no copy can be missed.

Legend of axes: S samples, c Ritz pairs, k the values wanted, b the block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import scipy
import torch
from torch.nn import functional

from torchgeom_probe.linalg.lanczos import rademacher
from torchgeom_probe.shapes import Bool, Float, Tensor

_LN10 = math.log(10.0)

#: Half-steps' gains that may lie ahead, as a share of the half-steps made; for k values _AHEAD + _AHEAD_FEW/k.
_AHEAD, _AHEAD_FEW = 0.7, 2.1
#: How often, for a singular vector, a random start may have a smaller part along it than is counted on.
_UNLUCKY = 1e-3
#: Linear and quadratic bounds count only where log10 σ_i is known within the first number and |r_i|/S_i is below the
#: second, in two half-steps in a row.
_CREDIBLE = 1e-3
_CLOSE = 0.03
#: Where fewer values are wanted, so many must be close: among values that are close together one of which the start
#: knows little is missed at first, those below it rest in its place, and others move.
_FEW = 8

#: As many Ritz values as the block has vectors are crowded where they agree within the first number; or within the
#: second, if they agree ten times better than with the next value.
_TIGHT = 1e-3
#: A warm start goes on where its first values have lost or won less than this, in nats on average, and a cold one takes
#: so many products; or where none has changed by more than the last.
_LOST, _DEAR, _SAME = 0.035, 100, 1e-2
#: After a warm start gains may lie ahead as after so many half-steps more, and residuals of pairs that were good before
#: say less of what is new.
_WARM, _WARM_MARGIN = 9, 6.0
#: Numbers of a row's sketch.
_SKETCH = 64
_ALIKE = 0.05


@dataclass(frozen=True, eq=False)
class Before:
    """What was found of a J close by: k values, their bound, and as many right singular vectors, or a few more.

    The vectors are orthonormal, in the order of the values; ``cold_products``: what the latest cold start took;
    ``sketch``: what that J made of the random start.
    """

    values: Float[Tensor, "S k"]
    bound: Float[Tensor, " S"]
    vectors: Float[Tensor, "S q D"]
    cold_products: Float[Tensor, " S"]
    sketch: Float[Tensor, "S b s"]

    def at(self, samples: list[int]) -> Before:
        """Of some samples."""
        return Before(*(value[samples] for value in vars(self).values()))

    def change(self, sketch_Sbs: Float[Tensor, "S b s"]) -> tuple[Float[Tensor, " S"], Bool[Tensor, " S"]]:
        """What the change Δ of J may do to Σ log σ_i, in nats; and whether it is that of a few new directions.

        The same random rows W were pushed before.  |ΔW|² is |Δ|_F² · h², where h² follows a beta law if Δ has one
        direction, and is nearer to its mean if it has more.  Σ_i (σ_i(J + Δ) − σ_i(J))² ≤ |Δ|_F² (Mirsky).
        """
        stretch = torch.linalg.svdvals(torch.nan_to_num(sketch_Sbs - self.sketch)).square()
        norm = (stretch.sum(1) / _least_part(sketch_Sbs.shape[1], self.vectors.shape[2])).sqrt()
        few = stretch[:, 0] > 0.5 * stretch.sum(1)
        return norm * self.values.clamp_min(1e-300).reciprocal().square().sum(1).sqrt(), few

    def helps(self, image_SbN: Float[Tensor, "S b N"]) -> Bool[Tensor, " S"]:
        """Whether to go on from the vectors, by what J makes of the first few.

        Where they are stretched as they were before; or have lost little, and a cold start is dear: the block that goes
        on from them is a wide one.
        """
        count = min(image_SbN.shape[1], self.values.shape[1])
        now = torch.linalg.svdvals(torch.nan_to_num(image_SbN))[:, :count].clamp_min(1e-300)
        loss = (self.values[:, :count].clamp_min(1e-300) / now).log()
        return (loss.abs().amax(1) < _SAME) | ((loss.mean(1).abs() < _LOST) & (self.cold_products >= _DEAR))

    @property
    def apart(self) -> Bool[Tensor, " S"]:
        """Whether the values are so far from each other that they do not take each other's vectors at any change."""
        return (self.values[:, 0] / self.values[:, -1].clamp_min(1e-300)).log() > self.values.shape[1] * _TIGHT


def sketched(image_SbN: Float[Tensor, "S b N"]) -> Float[Tensor, "S b s"]:
    """A few numbers a row from which differences of rows can be measured: sums of N numbers with random signs.

    >>> rows = torch.randn(1, 2, 10_000).double()
    >>> bool((sketched(rows).norm() / rows.norm()).log().abs() < 0.4)
    True
    """
    length = image_SbN.shape[2]
    signs = rademacher(1, length, seed=0)[0].to(image_SbN.device)
    return functional.pad(image_SbN * signs, (0, -length % _SKETCH)).unflatten(2, (-1, _SKETCH)).sum(2)


@cache
def _least_part(block: int, inputs: int) -> float:
    """|Wᵀv|² of a unit vector v and W of ``block`` random orthonormal rows, but for one case in a thousand."""
    return float(scipy.stats.beta.ppf(_UNLUCKY, block / 2, (inputs - block) / 2)) if block < inputs else 1.0


class Verdict:
    """What is known of the samples that are still expanded.

    Attributes:
        bound: [S] on the error of Σ log σ_i, in nats.
        met: [S], whether it is within the tolerance.
        crowded: [S], whether it is, but for copies of a multiple value that may be missing among the k.
    """

    def __init__(
        self,
        *,
        k: int,
        block: int,
        tolerance: float,
        eps: float,
        like: Tensor,
        inputs: int,
        before: Before | None = None,
        unseen: Float[Tensor, " S"] | None = None,
    ) -> None:
        self.k, self.block, self.tolerance, self.eps, self.inputs = k, block, tolerance, eps, inputs
        self._prior, self._unseen = before, unseen
        self.bound = like.new_full((len(like),), torch.inf)
        self.met = torch.zeros(len(like), dtype=torch.bool, device=like.device)
        self.crowded = self.met
        self._credible = self.met
        self._steps = 0
        self._highest = self.bound
        self._alike_from = torch.full_like(self.met, k, dtype=torch.long)
        self._spread = torch.zeros_like(self.bound)
        self._missed = like.new_zeros(len(like), 2)
        nothing = like.new_full((len(like), 2), torch.nan)
        #: [S, 2]: log S_1 and a_j, after this half-step and the two before; nan where there were fewer than k values.
        self._sums = [nothing, nothing, nothing]

    def judge(
        self,
        values_Sc: Float[Tensor, "S c"],
        before_Sc: Float[Tensor, "S c0"],
        residuals_Scb: Float[Tensor, "S c0 b"],
        *,
        weights_Sc: Float[Tensor, "S c"],
        complete: Bool[Tensor, " S"],
        exhausted: bool,
    ) -> Bool[Tensor, " S"]:
        """Take in what a half-step has found; return which samples need no other.

        ``weights``: the squared length of the random start's part along each right vector.
        ``complete`` [S]: a random block was mapped into the known range, so there are no more values; ``exhausted``:
        the space is whole.
        """
        k, self._steps = self.k, self._steps + 1
        values = values_Sc[:, : k + 2 * self.block + 2]
        top = values[:, :1]
        floor = (16 * self.eps * top).clamp_min(1e-300)
        wanted = values[:, :k]
        enough = values.shape[1] >= k
        zero = wanted <= floor
        logs = wanted.clamp_min(1e-300).log()
        rounding = torch.where(zero, 0.0, 8 * self.eps * top / wanted.clamp_min(1e-300)).sum(1)
        known = complete | exhausted
        total = torch.where(zero.any(1) | torch.tensor(not enough), torch.nan, logs.sum(1))
        self._sums = [torch.stack([logs[:, 0], total], 1), *self._sums[:2]]
        if self._steps % 2 and self._prior is None:  # after a push the space holds the polynomials of one degree more
            self._missed = torch.stack([self._missed_values(values_Sc, weights_Sc, rank) for rank in (1, k)], 1)
        ahead = torch.maximum(self._progress(), self._missed)
        hidden, hidden_top = self._hidden_copies(values_Sc, before_Sc, residuals_Scb)
        # From above all values are bounded by σ_1's bound; at first by what the random start says of tr g.
        highest = logs[:, 0] + ahead[:, 0] + hidden_top
        if self._prior is not None:  # old vectors that are still good hide what a random start would have begun to see
            highest = torch.full_like(highest, torch.inf)
        elif self._steps == 1:
            stretch = values_Sc.square().sum(1) / _least_part(self.block, self.inputs)
            highest = stretch.clamp_min(1e-300).log() / 2
        self._highest = torch.minimum(self._highest, highest)
        self._highest = torch.where(self._highest < logs[:, 0], torch.inf, self._highest)  # one case in a thousand
        below_top = torch.where(total.isnan(), torch.inf, k * self._highest - total)
        close = self._by_residuals(values_Sc, before_Sc, residuals_Scb, complete)
        credible = close.isfinite()
        close = torch.where(credible & (self._credible | known), close, torch.inf)
        self._credible = credible
        own = ahead[:, 1]
        if self._prior is not None:  # what was missing then is missing still; a step or two show little of it
            own, close = own + 1.5 * self._prior.bound / self._steps, _WARM_MARGIN * close
        own = torch.minimum(close, own)
        bound = torch.minimum(own + hidden, below_top)
        if self._prior is not None and self._unseen is not None and self._steps == 1:
            # What was missing is missing still; what J's change has added is seen, or measured along random directions.
            lost = self._prior.values.clamp_min(1e-300).log().sum(1) - total
            bound = torch.minimum(bound, torch.nan_to_num(lost + self._prior.bound + self._unseen, nan=torch.inf))
            bound = bound.clamp_min(0)
        bound = torch.where(known, torch.where(torch.tensor(exhausted), 0.0, close), bound)
        settled = bound <= torch.maximum(self.tolerance - rounding, rounding)
        self.bound = bound + rounding
        self.met = self.bound <= self.tolerance
        self.crowded = ~settled & ~known & (hidden > self.tolerance) & (own <= self.tolerance) & (self.block <= k)
        return settled | self.crowded

    def keep(self, samples: list[int]) -> None:
        """Let go of the other samples."""
        for name in ("bound", "met", "_credible", "_highest", "_alike_from", "_spread", "_missed"):
            setattr(self, name, getattr(self, name)[samples])
        self._prior = None if self._prior is None else self._prior.at(samples)
        self._sums = [sums[samples] for sums in self._sums]

    def _progress(self) -> Tensor:
        """[S, 2], the progress bounds on log σ_1 and on a_j."""
        now, last, first = self._sums
        gain = (now - last).clamp_min(0)
        # Where one half-step alone can be seen its gain counts twice.
        gain = torch.where(first.isnan(), 2 * gain, torch.maximum(gain, (last - first).clamp_min(0)))
        few = torch.tensor([1.0, 1 / self.k], dtype=now.dtype, device=now.device)
        steps = self._steps if self._prior is None else self._steps + _WARM
        return torch.nan_to_num((_AHEAD + _AHEAD_FEW * few) * steps * gain, nan=torch.inf)

    def _missed_values(self, values_Sc: Tensor, weights_Sc: Tensor, rank: int) -> Tensor:
        """[S], by how many nats a singular value that the space does not show may exceed the one of this rank.

        The space holds p(g) W for the random start W and every polynomial p of a degree, and the weights ω_j of W along
        the pairs are those of a Gauss quadrature: Σ_j ω_j p(S_j²)² is what W's spectrum gives.  A singular vector v in
        it that no pair stands for has h² = |Wᵀv|², so that h² p(σ²)² ≤ Σ_{j≥rank} ω_j p(S_j²)², where p is small: of
        λ^s T(λ), T the Chebyshev polynomials that stay within 1 up to the rank's own S², the best s is taken.  W does
        not know v, so h² follows a beta law, and is smaller than its first ‰ in one case of a thousand.
        """
        degree = (self._steps - 1) // 2
        if degree < 1 or values_Sc.shape[1] < rank:
            return torch.full_like(self.bound, torch.inf)
        seen = (values_Sc[:, rank - 1 :] / values_Sc[:, rank - 1 : rank].clamp_min(1e-300)).square().clamp_max(1.0)
        s = torch.arange(degree + 1, dtype=seen.dtype, device=seen.device)
        small = seen[..., None] ** s * ((degree - s) * (2 * seen[..., None] - 1).acos()).cos()
        weights = weights_Sc[:, rank - 1 :, None]
        allowed = (weights * small.square()).sum(1) / _least_part(self.block, self.inputs)
        above = torch.logspace(-6, 2, 161, dtype=seen.dtype, device=seen.device)  # (σ/S)² − 1
        large = (degree - s)[:, None] * (1 + 2 * above).acosh()
        growth = s[:, None] * above.log1p() + large + (-2 * large).exp().log1p() - math.log(2)
        possible = (growth <= allowed.clamp_min(1e-300).log()[..., None] / 2).all(1).sum(1)
        return torch.where(possible < len(above), above[possible.clamp_max(len(above) - 1)].log1p() / 2, torch.inf)

    def _by_residuals(self, now_Sc: Tensor, values_Sc: Tensor, residuals_Scb: Tensor, complete: Tensor) -> Tensor:
        """[S], the linear and the quadratic bound, the smaller value by value; inf where they do not count."""
        k, count = self.k, min(values_Sc.shape[1], max(self.k + 1, self.block) + 2 * self.block)
        if count < k or (count == k and not bool(complete.any())):
            return torch.full_like(self.bound, torch.inf)
        values, residuals = values_Sc[:, :count], residuals_Scb[:, :count]
        wanted, slack = values[:, :k], residuals.norm(dim=2)[:, :k]
        floor = (16 * self.eps * values[:, :1]).clamp_min(1e-300)
        zero = wanted <= floor
        linear = (slack / wanted.clamp_min(1e-300)).log1p()
        # A value that is zero has no logarithm: that there are no more must be shown.
        linear = torch.where(zero, torch.where(complete[:, None] & (slack <= floor), 0.0, torch.inf), linear)
        quadratic = torch.where(zero, torch.inf, _quadratic_error(values, residuals, zero)) if count > k else linear
        error = torch.minimum(linear, quadratic)
        # What the values have gained since refutes a smaller error.
        gained = (now_Sc[:, :k] / wanted.clamp_min(1e-300)).clamp_min(1.0).log() > error + 16 * self.eps
        others = residuals.norm(dim=2)[:, k:_FEW] < _CLOSE * values[:, k:_FEW].clamp_min(floor)
        credible = ((error < _CREDIBLE * _LN10) & (linear < _CLOSE) & (zero | ~gained)).all(1) & others.all(1)
        return torch.where(credible, (1 + 1 / k) * error.sum(1), torch.inf)  # of few values each counts

    def _hidden_copies(self, now_Sc: Tensor, values_Sc: Tensor, residuals_Scb: Tensor) -> tuple[Tensor, Tensor]:
        """Return ([S] what hidden copies could add to Σ log σ_i, in nats; [S] what near ones could to log σ_1).

        Hidden copies of S_i, the first of a window of ``block`` values that agree, would take the places of the values
        S_j after the window: they add Σ_j log(S_i/S_j).  Within a window that the space does not resolve, a value is no
        better known than its neighbours are alike.
        """
        k, block, count = self.k, self.block, min(values_Sc.shape[1], self.k + self.block + 1)
        values_Sc, residuals_Scb = values_Sc[:, :count], residuals_Scb[:, :count]
        worst, spread = torch.zeros_like(self.bound), torch.full_like(self.bound, -1.0)
        if not count or self._prior is not None:  # of old vectors there are as many as there were copies
            return worst, worst
        top = values_Sc[:, :1].clamp_min(1e-300)
        logs = (values_Sc / top).clamp_min(1e-300).log()
        linear = (residuals_Scb.norm(dim=2) / values_Sc.clamp_min(1e-300)).log1p()
        gain = (now_Sc[:, :count] / top).clamp_min(1e-300).log() - logs
        for first in range(min(k, max(0, count - block + 1))):
            last = first + block - 1
            width = logs[:, first] - logs[:, last]
            gap = logs[:, last] - logs[:, last + 1] if last + 1 < count else torch.full_like(width, torch.inf)
            # Values of a young space agree because they are means over the spectrum; but they rise.
            rests = gain[:, first : last + 1].amax(1) < (0.3 * width).clamp_min(_TIGHT)
            alike = (width < _TIGHT) | ((width < _ALIKE) & (width < 0.1 * gap))
            crowded = alike & rests & (logs[:, first] > -60)
            # Later values may all be zero to rounding: the copies would then stand in the place of nothing.
            displaced = (logs[:, first : first + 1] - logs[:, last + 1 : k]).clamp_min(0).sum(1)
            worst = torch.maximum(worst, torch.where(crowded, displaced, 0.0))
            self._alike_from = torch.where(crowded, self._alike_from.clamp_max(first), self._alike_from)
            spread = torch.where(crowded, torch.maximum(spread, width), spread)
        self._spread = torch.where(spread < 0, self._spread, spread)
        # Of the first window that was ever crowded: its further values come between and above those that were there.
        places = torch.arange(min(count, k), device=top.device)
        unresolved = 2 * self._spread[:, None] + 3 * linear[:, :k]
        unresolved = torch.where(places >= self._alike_from[:, None], unresolved, 0.0)
        return worst + unresolved.sum(1), unresolved[:, 0]


def _quadratic_error(values_Bc: Tensor, residuals_BcD: Tensor, zero_Bk: Tensor) -> Tensor:
    """[B, k] bounds in nats on each log σ_i by the Schur complement, at the split j for which their sum is smallest."""
    k, count = zero_Bk.shape[1], values_Bc.shape[1]
    # All relative to the largest value.
    top = values_Bc[:, :1].clamp_min(1e-300)
    theta = (values_Bc / top).square()
    coupling = torch.nan_to_num(residuals_BcD * (values_Bc / top.square())[:, :, None])
    coupling = coupling @ coupling.mT
    beyond = ((values_Bc + residuals_BcD.norm(dim=2))[:, k:] / top).square()
    gap = theta[:, k - 1 : k] - beyond
    # One matrix Θ + RᵀR/gap for every split j = k … c − 1; what lies beyond the split is uncoupled, and smaller.
    split = torch.arange(k, count, device=top.device)
    within = torch.arange(count, device=top.device)[None, :] < split[:, None]
    both = within[:, :, None] & within[:, None, :]
    matrix = both * coupling[:, None] / gap.clamp_min(1e-12)[:, :, None, None]
    matrix = matrix + torch.diag_embed(theta)[:, None]
    above = torch.linalg.eigvalsh(torch.nan_to_num(matrix)).flip(-1)[:, :, :k]
    each = (above / theta[:, None, :k].clamp_min(1e-300)).clamp_min(1.0).log() / 2
    each = torch.where((gap > 1e-12)[:, :, None], torch.where(zero_Bk[:, None], 0.0, each), torch.inf)
    best = each.sum(2).argmin(1)
    return each.gather(1, best[:, None, None].expand(-1, 1, k))[:, 0]
