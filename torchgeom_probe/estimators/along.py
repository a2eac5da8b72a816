"""Directions of the caller's own: how much the volume that they span is magnified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators.base import Estimator, ProductCount, from_singular_values, resolution
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.gram import singular_values
from torchgeom_probe.report import LayerGeometry
from torchgeom_probe.shapes import Float, Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Along(Estimator):
    """√det VᵀgV on directions V of your own: the tangents of a slice, a path's velocity, the axes of a generator.

    Definition: log √det VᵀgV = Σ log σ_i(JV), in nats: the k-volume of the image of the parallelepiped that V spans.  V
    need not be orthonormal; of the magnification proper, subtract log √det VᵀV.

    Shapes: V [k, B, *x.shape[1:]], k tangents for every sample; ``probe.measure(x, directions=V)`` is its short form.

    Bias and variance: none but rounding.  Cost: one dual pass over k directions for all layers.

    Raises:
        ProbeError: another shape than the samples have, an integer dtype, no direction at all.

    >>> import torch, torchgeom_probe as tgp
    >>> model, x = torch.nn.Linear(3, 5, bias=False), torch.zeros(2, 3)
    >>> along = tgp.measure(model, x, layers="", estimator=tgp.Along(torch.ones(1, 2, 3)), normalize=False)[""]
    >>> torch.allclose(along.log_volume.exp(), (model.weight @ torch.ones(3)).norm().double())           # |Jv|
    True
    """

    directions: Float[Tensor, "k batch *space"]

    def __post_init__(self) -> None:
        given = self.directions
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.ndim < 2:
            seen = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise ProbeError(
                f"directions= must be a floating tensor [k, B, *x.shape[1:]]; it is {seen}.\n"
                "Write, for one direction, directions=v.unsqueeze(0)"
            )

    def __repr__(self) -> str:
        return f"Along({list(self.directions.shape)})"

    def cost(self, plan: Plan, *, engine: str = "auto") -> dict[str, ProductCount]:
        """One dual pass over the k directions, for all layers."""
        k = self.directions.shape[0]
        each = ProductCount(k, 0, k, True, k, f"{k} directions, one dual pass for all layers")
        return dict.fromkeys(plan.features, each)

    def estimate(
        self, jacobians: Jacobians, *, start: Mapping[str, LayerGeometry] | None = None
    ) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk; an earlier result is of no use to it."""
        inputs, plan, given = jacobians.inputs, jacobians.plan, self.directions.detach()
        point = (inputs.total, *plan.space)
        if given.shape[1:] != point or not len(given):
            hint = "directions.unsqueeze(0)" if given.shape == point else "directions.expand(k, *x.shape)"
            raise ProbeError(
                f"directions= has shape {tuple(given.shape)}; x has shape {point}, so it must be "
                f"[k, {', '.join(map(str, point))}]: k tangents for every sample.\n"
                f"Perhaps:  directions={hint}"
            )
        directions = given[:, inputs.start : inputs.start + inputs.size].to(device=inputs.device, dtype=plan.dtype)
        return on_directions(directions, jacobians, "log √det VᵀgV, V the given directions")


def on_directions(directions: Tensor, jacobians: Jacobians, estimand: str) -> dict[str, LayerGeometry]:
    """Measure every layer on directions [k, B, *space]."""
    k = directions.shape[0]
    factors = jacobians.factors(k, lambda start, stop: directions[start:stop])
    sigma = singular_values(factors)
    return {
        entry: from_singular_values(
            jacobians,
            entry,
            sigma[entry],
            estimand=estimand,
            engine=jacobians.engine,
            num_directions=k,
            tolerance=resolution(jacobians.plan.dtype, factors[entry]),
        )
        for entry in jacobians.plan.features
    }
