"""How far training has moved the metric of each layer: lazy or rich."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators.base import Estimator, ProductCount, from_singular_values, resolution
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.directions import for_every_sample, orthonormal_frame
from torchgeom_probe.monitor.samples import fingerprint, refuse_no_samples
from torchgeom_probe.monitor.writers import label
from torchgeom_probe.probe import GeometryProbe, ProbeOptions, probe_of
from torchgeom_probe.report import LayerGeometry
from torchgeom_probe.shapes import Float, Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, eq=False)
class LayerDrift:
    """From g₀ to g_t of one layer, both on the same k directions; λ_i are the eigenvalues of g₀⁻¹g_t.

    Attributes:
        distance: √(mean log²λ), nats, [B]: the affine-invariant distance over √k; 0 where nothing moved.
        relative: ‖g_t - g₀‖_F / ‖g₀‖_F, [B].
        volume: ½ Σ log λ = log √det VᵀgV now minus then, nats, [B], signed.
        shape: √(var log λ), nats, [B]: the distance up to a scale.
    """

    distance: Float[Tensor, " batch"]
    relative: Float[Tensor, " batch"]
    volume: Float[Tensor, " batch"]
    shape: Float[Tensor, " batch"]

    @staticmethod
    def between(before: Float[Tensor, "batch k k"], now: Float[Tensor, "batch k k"]) -> LayerDrift:
        """The drift between two metrics, the first of them regular.

        >>> drift = LayerDrift.between(torch.eye(2)[None].double(), 4 * torch.eye(2)[None].double())
        >>> round(drift.distance.exp().item(), 6), round(drift.volume.exp().item(), 6), drift.shape.item()
        (4.0, 4.0, 0.0)
        """
        inverse = torch.linalg.inv(torch.linalg.cholesky(before))
        logs = torch.linalg.eigvalsh(inverse @ now @ inverse.mT).clamp_min(0).log()
        return LayerDrift(
            distance=logs.square().mean(1).sqrt(),
            relative=(now - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1),
            volume=logs.sum(1) / 2,
            shape=logs.var(1, correction=0).sqrt(),
        )


class Drift:
    """Distance of every layer's metric from where it was when this was made, on k directions at fixed samples.

    A lazy network learns without moving its metric (kernel regime), a rich one moves it.  The distance has a ruler:
    that between two independent initialisations, ``drift.measure(another_untrained_network)``, 0.5 to 0.6 for the tanh
    networks of ``torchgeom-probe reproduce regimes``.  The signed volume is none: it is small in both regimes.

    Args:
        model: any ``nn.Module``, or a probe of one, whose options hold; its metric now is g₀.
        x_probe: [B, ...], copied; the samples to compare at.
        k: how many random orthonormal directions of the input; d where that is smaller.
        seed: of the directions.
        options: of the probe: ``layers``, ``normalize``, …

    Raises:
        ProbeError: a layer of fewer features than directions, a singular g₀, options beside a probe.

    Cost: a measurement of k directions each time.

    >>> import torchgeom_probe as tgp
    >>> model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 8))
    >>> drift = tgp.Drift(model, torch.randn(4, 5), layers=["0", "2"], k=3)
    >>> _ = nn.init.normal_(model[2].weight)
    >>> now = drift.measure()
    >>> now["0"].distance.max().item() < 1e-6 < now["2"].distance.min().item()
    True
    """

    def __init__(
        self,
        model: nn.Module | GeometryProbe,
        x_probe: Any,
        *,
        k: int = 8,
        seed: int = 0,
        **options: Unpack[ProbeOptions],
    ) -> None:
        refuse_no_samples(x_probe)
        if "estimator" in options:
            raise ProbeError("a Drift compares metrics on k directions of its own.\nLeave out estimator=, and give k=")
        self._probe = probe_of(model, options).like(estimator=_Metric(k, seed), replay=False)
        self.x_probe = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), x_probe)
        self._about = {"x_probe": fingerprint(self.x_probe), "k": k, "seed": seed}
        self._metrics = self._measured(None)
        for layer, metric in self._metrics.items():
            values = torch.linalg.eigvalsh(metric)
            singular = values[:, 0] <= 1e-13 * values[:, -1]
            if bool(singular.any()):
                raise ProbeError(
                    f"the metric of layer {layer!r} is singular at {int(singular.sum())} of {len(metric)} samples to"
                    f" begin with (dead units, or k={k} directions too many): nothing has a distance from it.\n"
                    f"Take fewer directions:  tgp.Drift(model, x_probe, k={max(1, k // 2)}, ...), or other layers"
                )

    def measure(self, model: nn.Module | None = None) -> dict[str, LayerDrift]:
        """Layer → how far it is from g₀ now; or how far another network of the same layers is, for a ruler.

        Raises:
            ProbeError: layers that were not there to begin with.
        """
        now = self._measured(model)
        if set(now) != set(self._metrics):
            raise ProbeError(
                f"the layers are now {', '.join(map(repr, now))}; g₀ is of {', '.join(map(repr, self._metrics))}.\n"
                "Measure a network of the same layers"
            )
        return {layer: LayerDrift.between(self._metrics[layer], metric) for layer, metric in now.items()}

    def charts(self) -> dict[str, float]:
        """The median distance of each layer, by the tag of its chart."""
        moved = self.measure().items()
        return {f"drift/{label(i, layer)}": float(own.distance.median()) for i, (layer, own) in enumerate(moved)}

    def state_dict(self) -> dict[str, Any]:
        """g₀, and what it was measured on: a resumed run goes on from the same beginning."""
        return {"metrics": dict(self._metrics), **self._about}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take g₀ from :meth:`state_dict`.

        Raises:
            ProbeError: other samples, directions or layers; not such a state.
        """
        missing = [key for key in ("metrics", *self._about) if key not in state]
        if missing:
            raise ProbeError(f"this is no state of a Drift: it lacks {missing}.")
        other = [key for key, value in self._about.items() if state[key] != value]
        if other or set(state["metrics"]) != set(self._metrics):
            raise ProbeError(
                f"the state was saved with another {other[0] if other else 'set of layers'}: the metrics do not"
                " compare.\nMake the Drift with the same x_probe, k=, seed= and layers="
            )
        self._metrics = {layer: metric.to(self._metrics[layer]) for layer, metric in state["metrics"].items()}

    def _measured(self, model: nn.Module | None) -> dict[str, Tensor]:
        probe = self._probe if model is None else self._probe.like(model)
        report = probe.measure(self.x_probe, progress=False)
        return {layer: geometry.extras["metric"].cpu() for layer, geometry in report.items()}


@dataclass(frozen=True)
class _Metric(Estimator):
    """Finds VᵀgV of every layer: the extra ``metric`` [B, k, k], float64."""

    k: int
    seed: int

    def cost(self, plan: Plan, *, engine: str = "auto") -> dict[str, ProductCount]:
        k = min(self.k, plan.num_inputs)
        few = next((entry for entry, n in plan.features.items() if n < k), None)
        if few is not None:
            raise ProbeError(
                f"layer {few!r} has n={plan.features[few]} features and k={k} directions: its metric on them is"
                f" singular.\nTake k={plan.features[few]} or fewer, or leave the layer out of layers="
            )
        return dict.fromkeys(plan.features, ProductCount(k, 0, k, True, k, f"{k} directions"))

    def estimate(
        self, jacobians: Jacobians, *, start: Mapping[str, LayerGeometry] | None = None
    ) -> dict[str, LayerGeometry]:
        plan = jacobians.plan
        k = min(self.k, plan.num_inputs)
        frame = orthonormal_frame(k, plan.num_inputs, seed=self.seed).to(jacobians.device, plan.dtype)
        directions = for_every_sample(frame, plan.space, jacobians.inputs.size)
        found = {}
        for entry, factor in jacobians.factors(k, lambda a, b: directions[a:b]).items():
            metric = factor.gram if factor.triangle is None else factor.triangle.mT @ factor.triangle
            assert metric is not None
            geometry = from_singular_values(
                jacobians,
                entry,
                factor.singular_values(),
                estimand="VᵀgV",
                engine=jacobians.engine,
                num_directions=k,
                tolerance=resolution(jacobians.plan.dtype, factor),
            )
            found[entry] = replace(geometry, extras={"metric": metric.double()})
        return found
