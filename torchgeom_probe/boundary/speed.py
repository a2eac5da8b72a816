"""The speed |Jv| along a line at each of its points, and in the same pass how much any direction is stretched there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from torchgeom_probe.estimators.base import Estimator, ProductCount, conventions
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.probe import GeometryProbe
from torchgeom_probe.report import GeometryReport, LayerGeometry
from torchgeom_probe.shapes import Float, Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Speed(Estimator):
    """log |Jv| of the first direction, and as ``log_trace`` ½ log of the mean |Jw|² over the others.

    Shapes: [1 + m, B, *x.shape[1:]].  Exact, and the second, up to a constant, an estimate of ½ log tr g for random w.
    Cost: one dual pass over 1 + m directions for all layers; no Gram matrix.
    """

    directions: Float[Tensor, "k batch *space"]

    def cost(self, plan: Plan, *, engine: str = "auto") -> dict[str, ProductCount]:
        """One dual pass over the directions, for all layers."""
        k = len(self.directions)
        each = ProductCount(k, 0, k, True, k, f"the line and {k - 1} random directions, one dual pass for all layers")
        return dict.fromkeys(plan.features, each)

    def estimate(
        self, jacobians: Jacobians, *, start: Mapping[str, LayerGeometry] | None = None
    ) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk; an earlier result is of no use to it."""
        inputs = jacobians.inputs
        some = self.directions[:, inputs.start : inputs.start + inputs.size]
        found = {}
        for entry, energies_KB in jacobians.energies(some).items():
            speed = energies_KB[0].log() / 2
            found[entry] = LayerGeometry(
                **conventions(jacobians, entry, jacobians.engine),
                estimand="log |Jv|, v along the line",
                quantity="log_speed",
                value=speed,
                singular_values=energies_KB[:1].T.sqrt(),
                num_directions=1,
                extras={"log_trace": energies_KB[1:].mean(0).log() / 2} if len(some) > 1 else {},
            )
        return found


def with_random(line: Float[Tensor, " N *space"], count: int, *, seed: int) -> Float[Tensor, "k N *space"]:
    """Each line's own direction, then so many random ones: other ones for every line, the same along it."""
    drawn = torch.randn(count, *line.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([line[None], drawn.to(line)])


def along_lines(
    probe: GeometryProbe, points: Float[Tensor, " N P *space"], directions: Float[Tensor, "k N *space"], contrasted: int
) -> dict[str, dict[str, Tensor]]:
    """Layer → ``"speed"`` [N, P], and ``"trace"`` [N, C] at the first C points, which alone take random directions.

    By a probe whose estimator this replaces.
    """

    def measured(some: Tensor, along: Tensor) -> GeometryReport:
        many = along[:, :, None].expand(-1, -1, some.shape[1], *some.shape[2:])
        probe.estimator = Speed(many.flatten(1, 2))
        return probe.measure(some.flatten(0, 1), progress=False)

    count, near = len(points), measured(points[:, :contrasted], directions)
    far = measured(points[:, contrasted:], directions[:1])
    return {
        layer: {
            "speed": torch.cat([each.value.reshape(count, -1), far[layer].value.reshape(count, -1)], 1),
            "trace": each.extras["log_trace"].reshape(count, -1),
        }
        for layer, each in near.items()
    }
