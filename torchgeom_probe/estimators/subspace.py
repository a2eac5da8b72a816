"""k directions: a slice's own tangents, or a random orthonormal frame."""

from __future__ import annotations

from dataclasses import dataclass

from torchgeom_probe.directions import for_every_sample, orthonormal_frame
from torchgeom_probe.engines.linearization import Linearization
from torchgeom_probe.engines.plan import Plan
from torchgeom_probe.estimators.base import Estimator, geometry
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
    upward and follows the top of the spectrum.  Compare points, layers and epochs with it; do not read it as (k/d) of the log-volume.

    Cost: one dual pass over k directions for all layers.

    Args:
        k: how many random directions; ignored when ``measure(x, directions=...)`` brings its own.
        seed: of the frame.

    Raises:
        ProbeError: k > d.

    >>> import torch, torchgeom_probe as tgp
    >>> model = torch.nn.Linear(6, 11)
    >>> report = tgp.measure(model, torch.randn(3, 6), layers="", estimator=tgp.Subspace(k=2, seed=0))
    >>> report[""].singular_values.shape
    torch.Size([3, 2])
    """

    k: int = 8
    seed: int = 0

    def num_rows(self, plan: Plan) -> int:
        """Rows that one sample needs at once: k directions."""
        return self.k

    def estimate(self, linear: Linearization, *, normalize: bool) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk, on the frame of the seed."""
        plan = linear.plan
        frame = orthonormal_frame(self.k, plan.num_inputs, seed=self.seed).to(device=linear.device, dtype=plan.dtype)
        directions = for_every_sample(frame, plan.space, linear.batch.size)
        return along(directions, linear, normalize=normalize, estimand=f"log √det VᵀgV, V a random orthonormal {self.k}-frame")


def along(
    directions: Tensor, linear: Linearization, *, normalize: bool, estimand: str = "log √det VᵀgV, V the given directions"
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
