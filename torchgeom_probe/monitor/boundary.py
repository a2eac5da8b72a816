"""Decision boundaries while they form: fixed pairs of samples, whose crossings are found anew at each probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torchgeom_probe.boundary.design import CONTRASTS
from torchgeom_probe.boundary.paired import Tested, paired_effect
from torchgeom_probe.boundary.pairs import crossing_pairs, predicted
from torchgeom_probe.boundary.points import boundary_points
from torchgeom_probe.boundary.speed import Speed, with_random
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.wrappers import unwrapped
from torchgeom_probe.monitor.samples import fingerprint
from torchgeom_probe.monitor.writers import label
from torchgeom_probe.probe import GeometryProbe
from torchgeom_probe.shapes import Float, Int, Tensor

_PAIRS, _LEAST = 100, 10


class BoundaryWatch:
    """How much larger log |Jv| is where lines between samples cross a boundary than at their mirrored points.

    The pairs are those that the model predicts as two classes at the first probe that finds ten; from then on they stay
    the same, and those count that it still tells apart.  A raw contrast, for curves: what training adds to the
    untrained network at the same points is :func:`torchgeom_probe.boundary_study`'s to say.

    Attributes:
        history: (step, layer → mean over pairs, in nats, with interval and p-value), oldest first.
    """

    def __init__(self, x: Float[Tensor, " batch *input"]) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or len(x) < 2 * _LEAST:
            seen = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ProbeError(
                f"boundary= takes {2 * _LEAST} held-out samples or more, a floating tensor [B, *input]; got {seen}.\n"
                "Write:  Monitor(model, x_probe, boundary=x_held_out)"
            )
        self._x = x.detach().clone()
        self._ends: Int[Tensor, "pairs 2"] | None = None
        self._probe: GeometryProbe | None = None
        self.history: list[tuple[int, dict[str, Tested]]] = []

    def state_dict(self) -> dict[str, Any]:
        """The pairs, and of which samples they are."""
        return {"samples": fingerprint(self._x), "pairs": None if self._ends is None else self._ends.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the pairs of :meth:`state_dict`; of other samples none, and the curves begin anew."""
        if state["samples"] == fingerprint(self._x) and state["pairs"] is not None:
            self._ends = torch.tensor(state["pairs"])

    def charts(self, probe: GeometryProbe, step: int) -> dict[str, float]:
        """Measure; each layer's mean by the tag of its chart."""
        found = enumerate(self.measured(probe, step).items())
        return {f"boundary/{label(i, layer)}": float(tested.estimate) for i, (layer, tested) in found}

    def measured(self, probe: GeometryProbe, step: int) -> dict[str, Tested]:
        """Measure at the crossings of now; nothing where fewer than ten of the pairs have one."""
        model = unwrapped(probe.model)
        x = self._x.to(next((t.device for t in (*model.parameters(), *model.buffers())), self._x.device))
        classes = predicted(model, x, None)["predictions"]
        if self._ends is None:
            alone, apart = torch.arange(len(x)), CONTRASTS["mirror"].apart
            found = crossing_pairs(
                *(model, x, classes, alone), count=_PAIRS, share=False, reach=0.0, apart=apart, readout=None, seed=0
            )
            if len(found.ends) < _LEAST:
                return {}
            self._ends = found.ends
        ends = self._ends[(classes[self._ends[:, 0]] != classes[self._ends[:, 1]]) & (classes[self._ends] >= 0).all(1)]
        if len(ends) < _LEAST:
            return {}
        a, b = x[ends.T.to(x.device)]
        t = boundary_points(model, a, b, near="middle").t
        shaped = (-1, 1, *[1] * (x.dim() - 1))
        points = a[:, None] + torch.stack([t, 1 - t], 1).reshape(len(t), 2, *shaped[2:]) * (b - a)[:, None]
        along = (b - a) / (b - a).flatten(1).norm(dim=1).reshape(-1, *shaped[2:])
        # One of its own, which keeps its plans: a record of a pass at other points would be of no use.
        self._probe = self._probe or probe.like(layers=probe.layers, replay=False)
        speed = Speed(with_random(along, 1, seed=0)[:, :, None].expand(-1, -1, 2, *x.shape[1:]).flatten(1, 2))
        self._probe.estimator = speed
        effects, clear = {}, ((t - 0.5).abs() >= CONTRASTS["mirror"].apart).cpu()
        for layer, geometry in self._probe.measure(points.flatten(0, 1), progress=False).items():
            crossing, mirrored = geometry.value.detach().double().cpu().reshape(-1, 2).T
            contrast = crossing - mirrored
            kept = contrast.isfinite() & clear
            if kept.sum() >= _LEAST:
                effects[layer] = paired_effect(contrast[kept], ends[kept])
        self.history.append((step, effects))
        return effects
