"""The default of every verb: the volume element itself where that is cheap, and a frame where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torchgeom_probe.estimators.base import Estimator, ProductCount
from torchgeom_probe.estimators.exact import Exact
from torchgeom_probe.estimators.subspace import FRAME, Subspace
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.report import LayerGeometry


@dataclass(frozen=True)
class Auto(Estimator):
    """What is measured where no estimator is named: :class:`Exact` where d ≤ 16, :class:`Subspace` otherwise.

    All d directions then cost no more than twice the 8 of a frame: on a small MLP 1.8 times at d = 16, 3 to 11 times at
    d = 64.  The choice depends on d alone, so it is the same for all samples, layers, epochs and processes;
    ``quantity`` and ``estimand`` say what it was.

    Args:
        seed: of the frame.

    >>> import torch, torchgeom_probe as tgp
    >>> few, many = (tgp.measure(torch.nn.Linear(d, 32), torch.randn(3, d), layers="")[""] for d in (16, 17))
    >>> few.quantity, many.quantity
    ('log_volume', 'frame_volume')
    """

    seed: int = 0

    def cost(self, plan: Plan, *, engine: str = "auto") -> dict[str, ProductCount]:
        """That of the one that is chosen."""
        return self._chosen(plan).cost(plan, engine=engine)

    def estimate(
        self, jacobians: Jacobians, *, start: Mapping[str, LayerGeometry] | None = None
    ) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk, by the one that is chosen."""
        return self._chosen(jacobians.plan).estimate(jacobians, start=start)

    def _chosen(self, plan: Plan) -> Estimator:
        return Exact() if plan.num_inputs <= 2 * FRAME else Subspace(seed=self.seed)
