"""Decision boundaries while they form: fixed pairs of samples, whose crossings are found anew at each probe."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchgeom_probe.boundary.design import CONTRASTS, LEAST_PAIRS, laid_out
from torchgeom_probe.boundary.effect import BoundaryEffect
from torchgeom_probe.boundary.inference import LayerFields, effect_of
from torchgeom_probe.boundary.pairs import Pairs, clustered, crossing_pairs, pairs_of
from torchgeom_probe.boundary.points import bisected
from torchgeom_probe.boundary.speed import along_lines, with_random
from torchgeom_probe.boundary.study import BoundaryStudy
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.predictions import predicted
from torchgeom_probe.model.wrappers import unwrapped
from torchgeom_probe.monitor.samples import fingerprint
from torchgeom_probe.monitor.writers import label
from torchgeom_probe.probe import GeometryProbe
from torchgeom_probe.shapes import Float, Int, Tensor

_SETTINGS: dict[str, Any] = {
    "contrast": "mirror",
    "pairs": 100,
    "share": False,
    "seed": 0,
    "offsets": (-0.2, -0.1, 0.1, 0.2),
}


class BoundaryWatch:
    """A :class:`torchgeom_probe.BoundaryStudy` at each probe, of the same pairs of samples, whose crossings move.

    The pairs are those that the model predicts as two classes at the first probe that finds ten; from then on they stay
    the same, and those count that it still tells apart.  A raw contrast, for curves and profiles: what training adds to
    the untrained network at the same points is :func:`torchgeom_probe.boundary_study`'s to say.

    Cost: of each pair a bisection, and one dual pass over two directions at eight points.

    Attributes:
        history: (step, study), oldest first; a layer that cannot be tested now is not in it.
    """

    def __init__(self, x: Float[Tensor, " batch *input"]) -> None:
        usable = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 and len(x) >= 2 * LEAST_PAIRS
        if not (usable and bool(x.isfinite().all())):
            seen = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            seen += ", not all of it finite" if usable else ""
            raise ProbeError(
                f"boundary= takes {2 * LEAST_PAIRS} held-out samples or more, a floating tensor [B, *input], finite; "
                f"got {seen}.\nWrite:  Monitor(model, x_probe, boundary=x_held_out)"
            )
        self._x = x.detach().clone()
        self._ends: Int[Tensor, "pairs 2"] | None = None
        self._clusters: Int[Tensor, " batch"] | None = None
        self._probe: GeometryProbe | None = None
        self._tags: dict[str, str] = {}
        self.history: list[tuple[int, BoundaryStudy]] = []

    def state_dict(self) -> dict[str, Any]:
        """The pairs, and of which samples they are."""
        return {"samples": fingerprint(self._x), "pairs": None if self._ends is None else self._ends.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the pairs of :meth:`state_dict`; of other samples none, and the curves begin anew."""
        if state["samples"] == fingerprint(self._x) and state["pairs"] is not None:
            self._ends = torch.tensor(state["pairs"])

    def charts(self, study: BoundaryStudy | None) -> dict[str, float]:
        """Each layer's effect, in nats, by the tag of its chart."""
        return {} if study is None else {self._tags[name]: float(effect.estimate) for name, effect in study.items()}

    def measured(self, probe: GeometryProbe, step: int) -> BoundaryStudy | None:
        """Study the crossings of now; None where fewer than ten of the pairs have one, or no layer can be tested."""
        model = unwrapped(probe.model)
        x = self._x.to(next((t.device for t in (*model.parameters(), *model.buffers())), self._x.device))
        decided = predicted(model, x, None)
        pairs = self._pairs(model, x, decided["predictions"])
        if pairs is None:
            return None
        design = laid_out(model, x, pairs, decided, None, _SETTINGS)
        # One of its own, which keeps its plans: a record of a pass at other points would be of no use.
        self._probe = self._probe or probe.like(layers=probe.layers, replay=False)
        directions = with_random(design.along, 1, seed=0)
        measured = along_lines(self._probe, design.points, directions, len(design.weights))
        effects: dict[str, BoundaryEffect] = {}
        self._tags = {name: f"boundary/{label(i, name)}" for i, name in enumerate(measured)}
        for name, fields in measured.items():
            trained = LayerFields({quantity: field.detach().double().cpu() for quantity, field in fields.items()})
            with contextlib.suppress(ProbeError):  # too few pairs at which it is finite
                effects[name] = effect_of(name, trained, design, _SETTINGS["contrast"], _SETTINGS["offsets"])
        if not effects:
            return None
        study = BoundaryStudy(effects, settings=_SETTINGS)
        self.history.append((step, study))
        return study

    def _pairs(self, model: nn.Module, x: Tensor, classes: Tensor) -> Pairs | None:
        alone, apart = torch.arange(len(x)), CONTRASTS["mirror"].apart
        if len(classes[classes >= 0].unique()) < 2:
            return None
        if self._ends is None:
            found = crossing_pairs(model, x, classes, alone, count=_SETTINGS["pairs"], apart=apart)
            if len(found.ends) < LEAST_PAIRS:
                return None
            self._ends = found.ends
        first, second = classes[self._ends].T
        ends = self._ends[(first != second) & (first >= 0) & (second >= 0)]
        if len(ends) < LEAST_PAIRS:
            return None
        a, b = x[ends.T.to(x.device)]
        points, differ = bisected(model, a, b, near="middle")
        t = points.t.double().cpu()
        clear = ((t - 0.5).abs() >= apart) & differ.cpu()
        lost = {"of one class now": len(self._ends) - len(ends), "crossing at the middle now": int((~clear).sum())}
        return (
            pairs_of(ends[clear], t[clear], classes, alone, lost, self._regions) if clear.sum() >= LEAST_PAIRS else None
        )

    def _regions(self) -> Int[Tensor, " batch"]:
        if self._clusters is None:
            self._clusters = clustered(self._x, torch.Generator().manual_seed(0))
        return self._clusters
