"""k directions: a slice's own tangents, or a random orthonormal frame."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators.base import Estimator, Work, geometry
from torchgeom_probe.jacobian.jacobians import Linearization
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.directions import for_every_sample, orthonormal_frame
from torchgeom_probe.report import LayerGeometry
from torchgeom_probe.shapes import Tensor


@dataclass(frozen=True)
class Subspace(Estimator):
    """√det VᵀgV: how much the layer magnifies k-dimensional volume within the span of k directions V.

    Definition: log √det VᵀgV = Σ log σ_i(JV), in nats.  With ``directions=`` of the caller's own it is exact for the parallelepiped
    that they span (a slice's tangents).  Without, V is one random orthonormal k-frame drawn from ``seed``, the same for every
    sample, layer and epoch, so that differences between them carry little noise.

    NOT an estimate of √det g unless k = d.  Over random frames E det VᵀgV = e_k(λ)/C(d, k), the mean squared magnification of
    k-planes, with e_k the elementary symmetric polynomial of g's eigenvalues λ; and (k/d) log √det g ≤ E log √det VᵀgV: it is biased
    upward and follows the top of the spectrum.  Compare points, layers and epochs with it, all on the same frames; do not read it as
    (k/d) of the log-volume.

    With ``frames=M`` it estimates that mean, on M independent frames: ``log_volume`` = ½ log E det VᵀgV = ½ log(e_k(λ)/C(d, k)), a well
    defined k-volume (the root mean square magnification of random k-planes), finite for any rank ≥ k.  The logarithms L of the M
    determinants are taken to be normal: mean(L) + s²/2, ``std_error`` from √(s²/M + s⁴/(2(M − 1))), and ``interval`` [B, 2] the 95 %
    confidence interval (Cox).  ``singular_values``, ``rank`` and ``log_pseudo_volume`` are then those of the first frame, which is the
    frame of ``frames=1``.

    Bias: none for one frame's own volume; as an estimate of log √det g upward, second order k(d − k)/(4(d −
    1)(d + 2)) tr ε² for g = λ(I + ε).
    Variance: over frames, s² of L/2; zero for a slice's own tangents.  Cost: one dual pass over frames · k directions for all layers.

    Args:
        k: how many random directions; ignored when ``measure(x, directions=...)`` brings its own.
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
    >>> bool((several.interval[:, 0] < several.log_volume).all() and (several.log_volume < several.interval[:, 1]).all())
    True
    """

    k: int = 8
    seed: int = 0
    frames: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ProbeError(
                f"k={self.k} directions were asked for; at least one is needed.\nWrite Subspace(k=8)"
            )
        if self.frames < 1 or self.frames in (2, 3):
            raise ProbeError(
                f"Subspace(frames={self.frames}): one frame, or at least 4, whose spread gives an interval.\nWrite frames=16"
            )

    def num_rows(self, plan: Plan) -> int:
        """Rows that one sample needs at once: k directions."""
        return self.k

    def work(self, plan: Plan, *, engine: str = "auto") -> dict[str, Work]:
        """One dual pass over k directions a frame, for all layers."""
        count = self.frames * self.k
        frames = "" if self.frames == 1 else f" of each of {self.frames} frames"
        return {
            entry: Work(count, 0, count, True, f"{self.k} directions{frames}, one dual pass for all layers")
            for entry in plan.features
        }

    def estimate(self, linear: Linearization, *, normalize: bool) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk, on the frames of the seed."""
        measured = [self._on_frame(number, linear, normalize) for number in range(self.frames)]
        if self.frames == 1:
            return measured[0]
        return {entry: _over_frames([part[entry] for part in measured]) for entry in measured[0]}

    def _on_frame(self, number: int, linear: Linearization, normalize: bool) -> dict[str, LayerGeometry]:
        plan = linear.plan
        key = (self.k, self.seed, number, linear.device)
        if key not in plan.frames:  # drawn on the CPU: once, not in every step of a training run
            drawn = orthonormal_frame(self.k, plan.num_inputs, seed=self.seed + 7919 * number)
            plan.frames[key] = drawn.to(device=linear.device, dtype=plan.dtype)
        frame = plan.frames[key]
        directions = for_every_sample(frame, plan.space, linear.batch.size)
        return along(
            directions,
            linear,
            normalize=normalize,
            estimand=f"log √det VᵀgV, V a random orthonormal {self.k}-frame",
        )


def _over_frames(parts: Sequence[LayerGeometry]) -> LayerGeometry:
    """½ log E det VᵀgV and its interval from the log-volumes of M frames (Cox's interval for a log-normal mean)."""
    count = len(parts)
    logs = 2 * torch.stack([part.log_volume for part in parts])
    some = logs.isfinite()
    # A determinant of zero has no logarithm: the frames' mean is over all of them, the spread over the others.
    kept = some.sum(0)
    logs = torch.where(some, logs, 0.0)
    mean = logs.sum(0) / kept.clamp_min(1)
    variance = (torch.where(some, (logs - mean).square(), 0.0)).sum(0) / (kept - 1).clamp_min(1)
    value = mean + variance / 2 + (kept.clamp_min(1) / count).log()
    error = (variance / count + variance.square() / (2 * (count - 1))).sqrt()
    margin = student_quantile(0.975, count - 1) * error
    none = kept == 0
    diverged = torch.stack([part.log_volume for part in parts]).isnan().any(0)
    value = torch.where(diverged, torch.nan, torch.where(none, -torch.inf, value))
    first = parts[0]
    return replace(
        first,
        estimand=f"½ log E det VᵀgV over {count} random orthonormal {first.num_directions}-frames = ½ log(e_k(λ)/C(d, k))",
        log_volume=value / 2,
        std_error=torch.where(none | diverged, 0.0, error / 2),
        interval=torch.stack([(value - margin) / 2, (value + margin) / 2], dim=1),
    )


@functools.lru_cache
def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t, by bisection of its distribution function: with t = √ν tan θ the density is cos^(ν−1) θ.

    >>> round(student_quantile(0.975, 15), 4), round(student_quantile(0.975, 3), 4)
    (2.1314, 3.1824)
    """
    angles = torch.linspace(-math.pi / 2, math.pi / 2, 200_001, dtype=torch.float64)
    cumulative = torch.cumulative_trapezoid(angles.cos().clamp_min(0) ** (freedom - 1), angles)
    target = probability * float(cumulative[-1])
    place = int(torch.searchsorted(cumulative, target))
    low, high = float(cumulative[place - 1]), float(cumulative[place])
    step = float(angles[1] - angles[0])
    return math.sqrt(freedom) * math.tan(float(angles[place]) + step * (target - low) / (high - low))


def along(
    directions: Tensor,
    linear: Linearization,
    *,
    normalize: bool,
    estimand: str = "log √det VᵀgV, V the given directions",
) -> dict[str, LayerGeometry]:
    """Measure every layer on directions [k, B, *space]."""
    plan, k = linear.plan, directions.shape[0]
    factors = linear.factors(k, lambda start, stop: directions[start:stop])
    return {
        entry: geometry(
            entry,
            factors[entry],
            estimand=estimand,
            engine=linear.engine,
            num_features=n,
            num_inputs=plan.num_inputs,
            num_directions=k,
            full_rank=k,
            dtype=plan.dtype,
            normalize=normalize,
        )
        for entry, n in plan.features.items()
    }
