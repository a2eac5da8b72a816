"""From the fields of a layer at the points of all lines to its effect.

Legend of axes: N pairs (lines), P points of a line, C of them in the contrast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from torchgeom_probe.boundary.contrasts import CONTRASTS
from torchgeom_probe.boundary.design import LEAST_PAIRS, LEAST_UNITS, Design, refuse_few
from torchgeom_probe.boundary.effect import BoundaryEffect
from torchgeom_probe.boundary.paired import Tested, paired_effect
from torchgeom_probe.boundary.pairs import Pairs
from torchgeom_probe.boundary.statistics import Estimate
from torchgeom_probe.shapes import Tensor

_PATH = "the path's speed |Jv| along the line (no volume)"
#: Nats: where no pair differs by more, as of an affine layer, the differences are rounding, whatever their pattern.
_ROUNDING = 1e-5


@dataclass
class LayerFields:
    """What was measured of a layer.

    Attributes:
        trained, initial: quantity → [N, P], of the network and of the untrained one, which may have none: ``"speed"``,
            log |Jv|; ``"trace"``, ½ log tr g; ``"volume"``, [N, C].
        volume: in words.
        dimensions: of the volume.
    """

    trained: dict[str, Tensor] = field(default_factory=dict)
    initial: dict[str, Tensor] = field(default_factory=dict)
    volume: str | None = None
    dimensions: int | None = None

    def minus_initial(self, quantity: str) -> Tensor:
        """Trained minus untrained, or the trained field where there is no other."""
        own = self.trained[quantity].double()
        return own - self.initial[quantity].double() if self.initial else own


def effect_of(
    name: str, fields: LayerFields, design: Design, contrast: str, offsets: Sequence[float]
) -> BoundaryEffect:
    """Test one layer.

    Raises:
        ProbeError: too few pairs at which its log-volume is finite.
    """
    pairs = design.pairs
    main = "volume" if contrast == "same_class" else "speed"
    effect = design.contrasted(fields.minus_initial(main))
    inside = design.within[:, : len(design.weights)].all(1)
    kept = effect.isfinite() & inside
    dropped = pairs.dropped | {
        "no such point of one class": int((~inside).sum()),
        "log-volume not finite": int((inside & ~effect.isfinite()).sum()),
    }
    dropped = {why: count for why, count in dropped.items() if count}
    refuse_few(int(kept.sum()), len(pairs.units[kept].unique()), dropped, layer=name)
    (estimate, p_value), num_units, units = _tested(effect, pairs, kept)

    def beside(quantity: str) -> Tested | None:
        if quantity not in fields.trained or contrast == "same_class":  # the others of its fields compare two lines
            return None
        values = design.contrasted(fields.minus_initial(quantity))
        finite = values.isfinite() & kept
        return _tested(values, pairs, finite)[0] if finite.sum() >= LEAST_PAIRS else None

    own, untrained = fields.trained, fields.initial
    return BoundaryEffect(
        name=name,
        estimand=f"{_PATH if main == 'speed' else fields.volume}, {CONTRASTS[contrast].words}",
        contrast=contrast,
        estimate=estimate,
        p_value=p_value,
        own=_tested(design.contrasted(own[main]), pairs, kept)[0],
        initial=_tested(design.contrasted(untrained[main]), pairs, kept)[0] if untrained else None,
        trace=beside("trace"),
        volume=beside("volume"),
        volume_estimand=fields.volume,
        dimensions=fields.dimensions,
        profile=_profile(own["speed"], design, offsets),
        initial_profile=_profile(untrained["speed"], design, offsets) if untrained else None,
        margin_slope=_slope(fields.minus_initial("speed"), design, kept),
        num_pairs=int(kept.sum()),
        num_units=num_units,
        units=units,
        dropped=dropped,
    )


def _tested(values: Tensor, pairs: Pairs, where: Tensor) -> tuple[Tested, int, str]:
    """The mean by the units that give the wider interval, how many these are, and what."""
    if values[where].abs().max() < _ROUNDING:
        values = torch.zeros_like(values)
    kinds = {"samples or groups": pairs.units[where]}
    if len(pairs.regions[where].unique()) >= LEAST_UNITS:
        kinds[pairs.regions_are] = pairs.regions[where]
    found = {kind: paired_effect(values[where], units) for kind, units in kinds.items()}

    def width(kind: str) -> float:
        low, high = found[kind].estimate.interval or (0.0, 0.0)
        return high - low

    widest = max(found, key=width)
    return found[widest], len(kinds[widest].unique()), widest


def _profile(speed: Tensor, design: Design, offsets: Sequence[float]) -> dict[float, Estimate]:
    """Signed distance → mean log-speed minus that at the crossing, over the lines that reach so far."""
    found = {0.0: Estimate(0.0, (0.0, 0.0))}
    for i, offset in enumerate(offsets, start=design.ends.stop):
        values = (speed[:, i] - speed[:, 0]).double()
        there = values.isfinite() & design.within[:, i]
        if offset and there.sum() >= LEAST_PAIRS:
            found[float(offset)] = _tested(values, design.pairs, there)[0].estimate
    return dict(sorted(found.items()))


def _slope(speed: Tensor, design: Design, kept: Tensor) -> Tested:
    """Regress the difference of log-speed between a line's two ends on that of their margins, through the origin."""
    first, second = speed[:, design.ends].T
    rise, run = second - first, (design.margins[:, 1] - design.margins[:, 0]).double()
    kept = kept & rise.isfinite() & run.isfinite()
    mean = run[kept].square().mean().clamp_min(torch.finfo(torch.float64).tiny)
    slope = (run * rise)[kept].mean() / mean
    return _tested(slope + run * (rise - slope * run) / mean, design.pairs, kept)[0]  # each pair's part in the slope
