"""k random directions: √det VᵀgV on an orthonormal frame, or its mean over frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import scipy
import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators.along import on_directions
from torchgeom_probe.estimators.base import Estimator, ProductCount
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.directions import for_every_sample, orthonormal_frame
from torchgeom_probe.report import LayerGeometry

#: Directions of a frame where none are named and the input space has as many.
_DEFAULT = 8


@dataclass(frozen=True)
class Subspace(Estimator):
    """√det VᵀgV: how much the layer magnifies k-dimensional volume within the span of k directions V.

    Definition: log √det VᵀgV = Σ log σ_i(JV), in nats.  V is a random orthonormal k-frame, drawn from ``seed`` and the
    same for every sample, layer and epoch, so that differences between them carry little noise.  For directions of your
    own see :class:`Along`.

    It is no estimate of log √det g unless k = d, nor of k/d of it: planes that are magnified more count for more, so it
    follows the top of the spectrum.  Over random frames
        (k/d) log √det g ≤ E log √det VᵀgV ≤ ½ log E det VᵀgV = ½ log(e_k(λ)/C(d, k)),
    with e_k the elementary symmetric polynomial of g's eigenvalues λ.  Compare points, layers and epochs with it, all
    on the same frames.

    With ``frames=M`` the right-hand side is estimated, from M independent frames: the root mean square magnification of
    random k-planes, which is finite for any rank ≥ k.  The logarithms L of the M determinants are taken to be normal,
    so that log E det VᵀgV = mean(L) + s²/2; ``std_error`` comes from √(s²/M + s⁴/(2(M − 1))), and ``interval`` [B, 2]
    is the 95 % confidence interval (Cox), both halved.  ``singular_values``, ``rank`` and ``log_pseudo_volume`` are
    those of the first frame, which is the frame of ``frames=1``.

    Bias: of one frame's own volume none; of its mean over frames as an estimate of (k/d) log √det g, for g = λ(I + ε)
    of second order, k(d − k) / (4(d − 1)(d + 2)) · tr ε².  Variance: over frames, that of L/2.  Cost: one dual pass
    over frames · k directions for all layers.

    Args:
        k: how many random directions; by default 8, or d where that is less.
        seed: of the frames.
        frames: how many; 1, or at least 4 for an interval.

    Raises:
        ProbeError: k > d; frames of 2 or 3, which have no interval to speak of.

    >>> import torch, torchgeom_probe as tgp
    >>> model = torch.nn.Linear(6, 11)
    >>> report = tgp.measure(model, torch.randn(3, 6), layers="", estimator=tgp.Subspace(k=2, seed=0))
    >>> report[""].singular_values.shape
    torch.Size([3, 2])
    >>> several = tgp.measure(model, torch.randn(3, 6), layers="", estimator=tgp.Subspace(k=2, frames=16))[""]
    >>> low, high = several.interval.T
    >>> bool(((low < several.log_volume) & (several.log_volume < high)).all())
    True
    """

    k: int | None = None
    seed: int = 0
    frames: int = 1
    argument: ClassVar[str] = "k"

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ProbeError(f"k={self.k} directions were asked for; at least one is needed.\nWrite Subspace(k=8)")
        if self.frames < 1 or self.frames in (2, 3):
            raise ProbeError(
                f"Subspace(frames={self.frames}): one frame, or at least 4, whose spread gives an interval.\n"
                "Write frames=16"
            )

    def _size(self, plan: Plan) -> int:
        return min(_DEFAULT, plan.num_inputs) if self.k is None else self.k

    def cost(self, plan: Plan, *, engine: str = "auto") -> dict[str, ProductCount]:
        """One dual pass over k directions a frame, for all layers."""
        k = self._size(plan)
        count = self.frames * k
        frames = "" if self.frames == 1 else f" of each of {self.frames} frames"
        why = f"{k} directions{frames}, one dual pass for all layers"
        return dict.fromkeys(plan.features, ProductCount(count, 0, count, True, k, why))

    def estimate(
        self, jacobians: Jacobians, *, start: Mapping[str, LayerGeometry] | None = None
    ) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk, on the frames of the seed; ``start`` is of no use to it."""
        measured = [self._on_frame(number, jacobians) for number in range(self.frames)]
        if self.frames == 1:
            return measured[0]
        return {entry: _over_frames([part[entry] for part in measured]) for entry in measured[0]}

    def _on_frame(self, number: int, jacobians: Jacobians) -> dict[str, LayerGeometry]:
        plan = jacobians.plan
        k, seed = self._size(plan), self.seed + 7919 * number
        # Drawn on the CPU: once, not at every step of a training.
        frame = jacobians.remembered((k, seed), lambda: orthonormal_frame(k, plan.num_inputs, seed=seed))
        directions = for_every_sample(frame, plan.space, jacobians.inputs.size)
        return on_directions(directions, jacobians, f"log √det VᵀgV, V a random orthonormal {k}-frame")


def _over_frames(parts: Sequence[LayerGeometry]) -> LayerGeometry:
    """½ log E det VᵀgV and its interval from the log-volumes of M frames (Cox's interval for a log-normal mean)."""
    count = len(parts)
    logs = 2 * torch.stack([part.value for part in parts])
    some = logs.isfinite()
    # A determinant of zero has no logarithm: the frames' mean is over all of them, the spread over the others.
    kept = some.sum(0)
    logs = torch.where(some, logs, 0.0)
    mean = logs.sum(0) / kept.clamp_min(1)
    variance = (torch.where(some, (logs - mean).square(), 0.0)).sum(0) / (kept - 1).clamp_min(1)
    value = mean + variance / 2 + (kept.clamp_min(1) / count).log()
    error = (variance / count + variance.square() / (2 * (count - 1))).sqrt()
    margin = float(scipy.stats.t.ppf(0.975, count - 1)) * error
    none = kept == 0
    diverged = torch.stack([part.value for part in parts]).isnan().any(0)
    value = torch.where(diverged, torch.nan, torch.where(none, -torch.inf, value))
    first = parts[0]
    return replace(
        first,
        estimand=f"½ log E det VᵀgV over {count} random orthonormal {first.num_directions}-frames"
        " = ½ log(e_k(λ)/C(d, k))",
        value=value / 2,
        std_error=torch.where(none | diverged, 0.0, error / 2),
        extras={"interval": torch.stack([(value - margin) / 2, (value + margin) / 2], dim=1)},
    )
