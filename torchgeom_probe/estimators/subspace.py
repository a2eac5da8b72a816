"""k directions V: √det VᵀgV on an orthonormal frame or its mean over frames, and what a random one says of g."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal

import scipy
import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators.along import on_directions
from torchgeom_probe.estimators.base import Estimator, ProductCount
from torchgeom_probe.files import digest
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.directions import for_every_sample, orthonormal_frame, principal_frame, smooth_frame
from torchgeom_probe.linalg.moments import frame_moments
from torchgeom_probe.linalg.spectrum import SpectralDensity
from torchgeom_probe.model.inputs import Inputs
from torchgeom_probe.report import LayerGeometry
from torchgeom_probe.shapes import Float, Tensor

#: Directions of a frame where none are named and the input space has as many.
FRAME = 8
_FRAMES = {
    "random": "a random orthonormal {}-frame",
    "smooth": "a random orthonormal {}-frame of low spatial frequencies",
    "data": "the {} principal directions of the data",
}


@dataclass(frozen=True)
class Subspace(Estimator):
    """√det VᵀgV on a frame V of k directions; of a random frame also the scale and the effective dimension of g.

    Definition: ``frame_volume`` = log √det VᵀgV = Σ log σ_i(JV), in nats: how much k-dimensional volume within the span
    of V is magnified.  The orthonormal frame V is the same for every sample, layer and epoch, so that differences
    between them carry little noise.  For directions of your own see :class:`Along`.

    It is no estimate of log √det g unless k = d (``log_volume`` then), nor of k/d of it: planes that are magnified more
    count for more, so it follows the top of the spectrum.  Over random frames
        (k/d) log √det g ≤ E log √det VᵀgV ≤ ½ log E det VᵀgV = ½ log(e_k(λ)/C(d, k)) ≤ (k/2) log(tr g/d),
    with e_k the elementary symmetric polynomial of g's eigenvalues λ.

    What it is sensitive to depends on the frame (figures: benchmarks/README.md, "frames"):
        ``"random"``: to tr g, the Frobenius norm of J, and to next to nothing else where k is far below the effective
            dimension: over photographs its ranks are those of ``scale``.  Noise in the pixels.
        ``"smooth"``: to slow changes over the image or the series: light, colour, large shapes.  A random frame in the
            span of the first four cosines of each axis of space.  As cheap, and in a trained network other information
            than the trace (ranks correlate by 0.0 to 0.1 in efficientnet-lite0; by 0.9 in an untrained ResNet).
        ``"data"``: to the directions in which samples differ from each other most: the principal directions of the
            batch, or of ``frame_data``; in images, smooth as well.

    From the same products a random frame gives, each with a standard error (``scale_error``, …):
        ``scale``                ½ log(tr g/d), in nats: the log of the root mean square stretch of a direction;
        ``effective_dimension``  (tr g)²/tr g², from 1 (J of rank 1) to d (an isometry, scaled); for k ≥ 4.
    tr g and tr g² are without bias; see :mod:`torchgeom_probe.linalg.moments`.  Of k = 8 directions the second is known
    to about a third.  A frame may miss a single direction that holds most of tr g², and then cannot know that it did.

    With ``frames=M`` E det VᵀgV is estimated, from M independent random frames: the root mean square magnification of
    random k-planes, which is finite for any rank ≥ k.  The logarithms L of the M determinants are taken to be normal,
    so that log E det VᵀgV = mean(L) + s²/2; ``std_error`` comes from √(s²/M + s⁴/(2(M − 1))), and ``interval`` [B, 2]
    is the 95 % confidence interval (Cox), both halved.  ``singular_values``, ``rank`` and ``log_pseudo_volume`` are
    those of the first frame, which is the frame of ``frames=1``.

    Bias: of one frame's own volume none; of its mean over frames as an estimate of (k/d) log √det g, for g = λ(I + ε)
    of second order, k(d − k) / (4(d − 1)(d + 2)) · tr ε².  Variance: over frames, that of L/2.  Cost: one dual pass
    over frames · k directions for all layers.

    Args:
        k: how many directions; by default 8, or d where that is less.
        seed: of the frames.
        frames: how many random ones; 1, or at least 4 for an interval.
        frame: ``"random"``, ``"smooth"`` or ``"data"``.
        frame_data: [N, *space], the samples whose principal directions are meant, N > k; by default the first batch
            that a probe measures, all samples of it.

    Raises:
        ProbeError: k > d; frames of 2 or 3, which have no interval to speak of; data that span fewer than k directions.

    >>> import torch, torchgeom_probe as tgp
    >>> model = torch.nn.Linear(60, 110)
    >>> frame = tgp.measure(model, torch.randn(3, 60), layers="", estimator=tgp.Subspace(k=8), normalize=False)[""]
    >>> frame.singular_values.shape, torch.equal(frame.frame_volume, frame.value)
    (torch.Size([3, 8]), True)
    >>> true = (model.weight.double().square().sum() / 60).log() / 2
    >>> bool((frame.scale - true).abs().max() < 3 * frame.scale_error.max())
    True
    >>> several = tgp.measure(model, torch.randn(3, 60), layers="", estimator=tgp.Subspace(k=2, frames=16))[""]
    >>> low, high = several.interval.T
    >>> bool(((low < several.frame_volume) & (several.frame_volume < high)).all())
    True
    """

    k: int | None = None
    seed: int = 0
    frames: int = 1
    frame: Literal["random", "smooth", "data"] = "random"
    frame_data: Float[Tensor, "N ..."] | None = field(default=None, compare=False, repr=False)
    argument: ClassVar[str] = "k"

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ProbeError(f"k={self.k} directions were asked for; at least one is needed.\nWrite Subspace(k=8)")
        if self.frames < 1 or self.frames in (2, 3):
            raise ProbeError(
                f"Subspace(frames={self.frames}): one frame, or at least 4, whose spread gives an interval.\n"
                "Write frames=16"
            )
        if self.frame not in _FRAMES:
            raise ProbeError(f"Subspace(frame={self.frame!r}) is unknown.\nWrite 'random', 'smooth' or 'data'.")
        if self.frames > 1 and self.frame != "random":
            raise ProbeError(
                f"Subspace(frames={self.frames}, frame={self.frame!r}): the mean over frames is one over random ones.\n"
                f"Write Subspace(frame={self.frame!r}) or Subspace(frames={self.frames})"
            )
        if self.frame_data is not None and self.frame != "data":
            raise ProbeError(
                f"Subspace(frame={self.frame!r}) takes nothing of frame_data=.\n"
                "Write Subspace(frame='data', frame_data=x)"
            )

    def __repr__(self) -> str:
        # Data by their digest: a scan that goes on compares its estimator with this.
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = (f"{n}={digest(v) if isinstance(v, Tensor) else repr(v)}" for n, v in values.items() if v is not None)
        return f"Subspace({', '.join(shown)})"

    def _size(self, plan: Plan) -> int:
        return min(FRAME, plan.num_inputs) if self.k is None else self.k

    def settled(self, inputs: Inputs) -> Estimator:
        """Of ``frame="data"`` without data: on the principal directions of this batch."""
        if self.frame != "data" or self.frame_data is not None:
            return self
        if inputs.point is None:
            raise ProbeError(
                "frame='data' takes the principal directions of the batch, and with source= the batch does not live "
                "in the space that the metric is pulled back to.\n"
                "Give the source's outputs:  Subspace(frame='data', frame_data=outputs)"
            )
        return replace(self, frame_data=inputs.point.detach().clone())

    def cost(self, plan: Plan, *, engine: str = "auto") -> dict[str, ProductCount]:
        """One dual pass over k directions a frame, for all layers."""
        k = self._size(plan)
        if k > plan.num_inputs:
            orthonormal_frame(k, plan.num_inputs, seed=self.seed)  # refuses it
        count = self.frames * k
        frames = "" if self.frames == 1 else f" of each of {self.frames} frames"
        why = f"{k} directions{frames}, one dual pass for all layers"
        return dict.fromkeys(plan.features, ProductCount(count, 0, count, True, k, why))

    def estimate(
        self, jacobians: Jacobians, *, start: Mapping[str, LayerGeometry] | None = None
    ) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk, on the frames of the seed; ``start`` is of no use to it."""
        plan = jacobians.plan
        k, d = self._size(plan), plan.num_inputs
        measured = [self._on_frame(number, k, jacobians) for number in range(self.frames)]
        found = measured[0]
        if self.frames > 1:
            found = {entry: _over_frames([part[entry] for part in measured]) for entry in found}
        if self.frame != "random":
            return found
        sigma = {entry: torch.stack([part[entry].singular_values for part in measured]) for entry in found}
        # All layers at once, where they have as many singular values: a call costs what its tensors do not.
        widths = {values.shape[2] for values in sigma.values()}
        moments: dict[str, dict[str, torch.Tensor]] = {entry: {} for entry in found}
        for width in widths:
            alike = [entry for entry, values in sigma.items() if values.shape[2] == width]
            whole = frame_moments(torch.cat([sigma[e] for e in alike], 1), num_directions=k, num_inputs=d)
            for name, values in whole.items():
                for entry, part in zip(alike, values.chunk(len(alike)), strict=True):
                    moments[entry][name] = part
        return {entry: replace(g, extras={**g.extras, **moments[entry]}) for entry, g in found.items()}

    def _on_frame(self, number: int, k: int, jacobians: Jacobians) -> dict[str, LayerGeometry]:
        plan, seed = jacobians.plan, self.seed + 7919 * number
        # Made on the CPU: once, not at every step of a training.
        frame = jacobians.remembered((self.frame, k, seed), lambda: self._frame(k, plan, seed))
        directions = for_every_sample(frame, plan.space, jacobians.inputs.size)
        found = on_directions(directions, jacobians, f"log √det VᵀgV, V {_FRAMES[self.frame].format(k)}")
        if k < plan.num_inputs:
            return {entry: replace(g, quantity="frame_volume") for entry, g in found.items()}
        spectra = {entry: SpectralDensity.of_singular_values(g.singular_values, k) for entry, g in found.items()}
        return {entry: replace(g, spectrum=spectra[entry]) for entry, g in found.items()}

    def _frame(self, k: int, plan: Plan, seed: int) -> Float[Tensor, "k d"]:
        if self.frame == "random":
            return orthonormal_frame(k, plan.num_inputs, seed=seed)
        if self.frame == "smooth":
            return smooth_frame(k, plan.space, seed=seed)
        assert self.frame_data is not None  # settled
        if self.frame_data[:1].numel() != plan.num_inputs:
            raise ProbeError(
                f"frame_data= has shape {tuple(self.frame_data.shape)}; a point of the space has {plan.space}.\n"
                f"Give samples [N, {', '.join(map(str, plan.space))}]:  Subspace(frame='data', frame_data=x)"
            )
        return principal_frame(k, self.frame_data)


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
