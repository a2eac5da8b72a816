"""When a Krylov space's values are good enough, and how far off they may be: bounds from Ritz values and residuals.

The pairs are those of :mod:`torchgeom_probe.linalg.krylov`: J v_i = S_i u_i, with residuals r_i = Jᵀ u_i − S_i v_i.

**Why the bound holds.**  Linear: some singular value lies within |r_i| of S_i.  Quadratic: take the first j ≥ k vectors
v_i and complete them to an orthonormal basis of the inputs.  In it
    g = JᵀJ = [[Θ, Rᵀ], [R, M]],  Θ = diag(S_1², …, S_j²),  and R has the columns S_i r_i,
since g v_i = S_i Jᵀ u_i = S_i² v_i + S_i r_i.  Let μ be the largest eigenvalue of M.  Where μ < S_k², the Schur
complement says of the k largest eigenvalues of g, which are at least S_k², that
    λ_i(g) ≤ λ_i(Θ + RᵀR/(S_k² − μ)),  i ≤ k.
μ is not known: it is taken to be (S_{j+1} + |r_{j+1}|)².  Every split j is tried and the best one used, for the gap
below a far value may be wide where the one below σ_k is narrow.  Of both bounds the smaller counts, value by value.

**What no residual can see,** and what is done about it:
- A value that the space has not met.  The bound counts only where all residuals are small, in two half-steps in a row:
  a value that the space has begun to see shows in the next one.  How small was calibrated (the constants, below).
- A further copy of a multiple value: b random vectors meet b copies of it and no more.  Where b Ritz values in a row
  agree, what a hidden copy could add is part of the bound; where that is too much, the sample starts again from k + 2
  vectors, among which no copy can be missed.

Legend of axes: B samples, c Ritz pairs that are looked at, k the values wanted, D what a residual is a vector of.
"""

from __future__ import annotations

import math

import torch

from torchgeom_probe.linalg.operator import Operator
from torchgeom_probe.shapes import Bool, Float, Tensor

_LN10 = math.log(10.0)

#: A bound counts only where log10 σ_i is known within the first number and |r_i|/S_i is below the second, in two
#: half-steps in a row.  tests/linalg/test_stopping.py: no bound below the error in 6480 runs (nine spectra, n = 256,
#: d = 512, k = 1, 3 and 10, block 4, tol 1e-2 and 1e-3); with the numbers for whole steps, below, it fails.
_CREDIBLE = 1e-3
_CLOSE = 0.03
#: The same where only whole steps can be judged, as after a warm start: two of them in a row see as much with less; and
#: what the bound is then multiplied by.  The same test: no bound below the error in 3240 warm starts (without the
#: margin there was one, by a hundredth).
_CREDIBLE_IN_WHOLE_STEPS = 3e-3
_CLOSE_IN_WHOLE_STEPS = 0.06
_MARGIN_IN_WHOLE_STEPS = 1.5

#: As many Ritz values as the block has vectors are crowded where they agree within the first number; or within the
#: second, if they agree ten times better than with the next value.
_TIGHT = 1e-3
_ALIKE = 0.05


class Verdict:
    """What is known of each sample: whether it is done, and with what bound, after how many products and vectors.

    Attributes:
        done: [B], whether the stopping rule was met; from then on the sample's other entries stay.
        bound: [B] on Σ log σ_i, in nats; inf where it does not count.
        crowded: [B], whether copies of a multiple value may be missing among the k.
        size: [B], vectors of V in use, those of a fresh block included.
        half: [B], whether Jᵀu of that fresh block is not known: it was half a step.
        products: [B], Jv and Jᵀu together.
        waiting: the samples that were not done at the last synchronisation.
    """

    def __init__(self, jacobian: Operator, *, k: int, block: int, tolerance: float, warm: bool) -> None:
        self.jacobian = jacobian
        self.k, self.block, self.tolerance = k, block, tolerance
        samples, device = jacobian.batch, jacobian.device
        self.done = torch.zeros(samples, dtype=torch.bool, device=device)
        self.crowded = torch.zeros_like(self.done)
        self.size = torch.zeros(samples, dtype=torch.long, device=device)
        self.half = torch.zeros_like(self.done)
        self.products = torch.zeros_like(self.size)
        self.bound = torch.full((samples,), torch.inf, dtype=torch.float64, device=device)
        self._credible_before = torch.zeros_like(self.done)
        self._halves_tell = torch.full_like(self.done, not warm)
        self.waiting = list(range(samples))

    def wanted(self, reached: int) -> int:
        """How many pairs the stopping rule looks at."""
        return min(reached, max(self.k + 1, self.block) + 2 * self.block)

    def judge(
        self,
        values_Bc: Float[Tensor, "B c"],
        residuals_BcD: Float[Tensor, "B c D"],
        *,
        size: int,
        complete: Bool[Tensor, " B"],
        finite: Bool[Tensor, " B"],
        half: bool,
        exhausted: bool,
    ) -> None:
        """Take in what a half-step has found.

        ``complete`` [B]: a random block was mapped into the known range, so there are no more values; ``exhausted``: V
        fills the whole space; ``finite`` [B]: what J gave was.
        """
        bound, met = self._bound(values_Bc, residuals_BcD, complete=complete, exhausted=exhausted)
        # One half-step's word is not enough: a value that the space has only begun to see shows in the next one.
        known = complete | exhausted
        told = residuals_BcD.isfinite().all(-1).all(-1) | ~finite  # or it was no half-step
        credible = bound.isfinite()
        confirmed = credible & (self._credible_before | known)
        self._credible_before = torch.where(told, credible, self._credible_before)
        if half:
            self._halves_tell = told
        hidden, in_doubt = self._hidden_copies(values_Bc, residuals_BcD)
        bound = torch.where(known, bound, bound + hidden)
        bound = torch.where(confirmed, bound, torch.inf)
        # A block that is larger than k holds every copy that counts: in doubt are their values, and further steps tell.
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

    def _bound(
        self, values_Bc: Tensor, residuals_BcD: Tensor, *, complete: Tensor, exhausted: bool
    ) -> tuple[Tensor, Tensor]:
        """Return ([B] bound in nats on Σ log σ_i, [B] whether each of the k values is within tolerance of log10).

        The bound is inf where an error or a residual is large: large residuals bound the distance to SOME singular
        value, not to the one of the same number.
        """
        k, eps = self.k, self.jacobian.eps
        top = values_Bc[:, :1]
        count = values_Bc.shape[1]
        if count < k or (count == k and not exhausted):
            return torch.full_like(self.bound, torch.inf), torch.zeros_like(self.done)
        floor = (16 * eps * top).clamp_min(1e-300)
        wanted = values_Bc[:, :k]
        zero = wanted <= floor
        rounding_each = torch.where(zero, 0.0, 8 * eps * top / wanted.clamp_min(1e-300))
        rounding = rounding_each.sum(1)
        # What lies below the k values is known worse where no half-step has been there.
        margin = torch.where(self._halves_tell, 1.0, _MARGIN_IN_WHOLE_STEPS)
        if exhausted:
            return margin * rounding, torch.ones_like(self.done)
        slack = residuals_BcD.norm(dim=2)[:, :k]
        linear = (slack / wanted.clamp_min(1e-300)).log1p()
        # A value that is zero has no logarithm: that there are no more must be shown.
        linear = torch.where(zero, torch.where(complete[:, None] & (slack <= floor), 0.0, torch.inf), linear)
        quadratic = torch.where(zero, torch.inf, _quadratic_error(values_Bc, residuals_BcD, zero))
        error = torch.minimum(linear, quadratic)
        credible_error = torch.where(self._halves_tell, _CREDIBLE, _CREDIBLE_IN_WHOLE_STEPS)[:, None] * _LN10
        close = torch.where(self._halves_tell, _CLOSE, _CLOSE_IN_WHOLE_STEPS)[:, None]
        credible = ((error < credible_error) & (linear < close)).all(1)
        # Below its own rounding no value can be asked to settle.
        met = (error < rounding_each.clamp_min(self.tolerance * _LN10)).all(1)
        return margin * torch.where(credible, error.sum(1) + rounding, torch.inf), met & credible

    def _hidden_copies(self, values_Bc: Tensor, residuals_BcD: Tensor) -> tuple[Tensor, Tensor]:
        """Return ([B] what hidden copies could add to Σ log σ_i, in nats, inf where that is too much; [B] where it is).

        Hidden copies of S_i, the first of a window of ``block`` values that agree, would take the places of the values
        S_j after the window: they add Σ_j log(S_i/S_j).  Within a window that the space does not resolve, a value is no
        better known than its neighbours are alike.
        """
        k, block, count = self.k, self.block, values_Bc.shape[1]
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
        in_doubt = worst > k * self.tolerance * _LN10
        return torch.where(in_doubt, torch.inf, worst), in_doubt


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
