"""From the fields of a layer at the points of all lines to its effect.

Legend of axes: N pairs (lines), P points of a line, C of them in the contrast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from torchgeom_probe.boundary.design import CONTRASTS, LEAST_PAIRS, LEAST_UNITS, Design, refuse_few
from torchgeom_probe.boundary.effect import BoundaryEffect
from torchgeom_probe.boundary.paired import Estimate, Tested, paired_effect
from torchgeom_probe.boundary.pairs import CLASSES, Pairs
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor

_PATH = "the path's speed |Jv| along the line (no volume)"
#: Nats: where no pair differs by more, as of an affine layer, the differences are rounding, whatever their pattern.
_ROUNDING = 1e-5
#: The share of a constant that a trend between classes must leave.
_CONFOUNDED = 1e-3


@dataclass
class LayerFields:
    """What was measured of a layer.

    Attributes:
        trained, initial: quantity → [N, P], of the network and of the untrained one, which may have none: ``"speed"``,
            log |Jv|; ``"trace"``, ½ log tr g, and ``"volume"``, [N, C]; ``"switches"``, [N, C], of ReLU networks.
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
        ProbeError: too few pairs at which its log-volume is finite; of few classes, boundaries that all lie nearer to
            the same one.
    """
    pairs, own, untrained = design.pairs, fields.trained, fields.initial
    main = "volume" if contrast == "same_class" else "speed"
    effect = design.contrasted(fields.minus_initial(main))
    inside = design.within[:, : len(design.weights)].all(1)
    kept = effect.isfinite() & inside
    dropped = pairs.dropped | {
        f"no such point {'of one class' if main == 'volume' else 'within the data'}": int((~inside).sum()),
        "log-volume not finite": int((inside & ~effect.isfinite()).sum()),
    }
    dropped = {why: count for why, count in dropped.items() if count}
    refuse_few(int(kept.sum()), len(pairs.units[kept].unique()), dropped, layer=name)

    def tested(values: Tensor) -> tuple[Tested, int, str]:
        """Of a contrast, where both it and the main one are finite."""
        where = values.isfinite() & kept
        if contrast == "mirror" and pairs.regions_are != CLASSES and where.sum() >= LEAST_PAIRS:
            values = _without_trend(values, pairs, where)
        return _tested(values, pairs, where)

    def beside(quantity: str) -> Tested | None:
        known = quantity in own and (not untrained or quantity in untrained)
        if not known or contrast == "same_class":  # the others of its fields compare two lines
            return None
        found = tested(design.contrasted(fields.minus_initial(quantity)))[0]
        return None if math.isnan(found.p_value) else found

    (estimate, p_value), num_units, units = tested(effect)
    return BoundaryEffect(
        name=name,
        estimand=f"{_PATH if main == 'speed' else fields.volume}, {CONTRASTS[contrast].words}",
        contrast=contrast,
        estimate=estimate,
        p_value=p_value,
        own=tested(design.contrasted(own[main]))[0],
        initial=tested(design.contrasted(untrained[main]))[0] if untrained else None,
        trace=beside("trace"),
        volume=beside("volume"),
        volume_estimand=fields.volume,
        dimensions=fields.dimensions,
        switches=beside("switches"),
        profile=_profile(own["speed"], design, offsets),
        initial_profile=_profile(untrained["speed"], design, offsets) if untrained else None,
        margin_slope=_slope(fields.minus_initial("speed"), design, kept),
        num_pairs=int(kept.sum()),
        num_units=num_units,
        units=units,
        dropped=dropped,
    )


def _without_trend(values: Tensor, pairs: Pairs, where: Tensor) -> Tensor:
    """What of a contrast is left when a change from one predicted class to another along the lines is regressed out.

    Boundaries lie nearer to some classes than to others, so 2t* − 1 is not 0 on average from class a to class b, and
    a field that falls from a to b has a contrast between t* and 1 − t* without any boundary.  Among many classes these
    cancel; of two there is one such pair, and a test without this rejects 7 to 11 % of smooth nulls.
    """
    classes, ends = pairs.classes[where].unique(), pairs.classes[where]
    signs = (ends[:, 1:] == classes).double() - (ends[:, :1] == classes).double()
    trends, ones = (2 * pairs.t[where] - 1)[:, None] * signs, torch.ones(len(ends), dtype=torch.float64)
    level = ones - trends @ (torch.linalg.pinv(trends) @ ones)  # what of a constant is no trend
    if level.mean() < _CONFOUNDED:
        raise ProbeError(
            "the boundary lies nearer to the same class on every line, so that a change from class to class cannot be "
            "told from what is at the boundary.\n"
            "Compare with the neighbours on both sides, in which a trend cancels:  contrast='peak'"
        )
    design, found = torch.cat([ones[:, None], trends], 1), values.clone()
    residuals = values[where] - design @ (torch.linalg.pinv(design) @ values[where])
    # Each pair's part in the intercept, about it.
    found[where] = (level @ values[where]) / level.sum() + level / level.mean() * residuals
    return found


def _tested(values: Tensor, pairs: Pairs, where: Tensor) -> tuple[Tested, int, str]:
    """The mean by the units that give the wider interval, how many these are, and what; nan of too few pairs."""
    if where.sum() < LEAST_PAIRS:
        return Tested(Estimate(math.nan), math.nan), 0, ""
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
