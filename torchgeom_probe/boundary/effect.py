"""What the test of a layer over many pairs found, in numbers and in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torchgeom_probe.boundary.paired import Estimate, Tested

#: Nats: an effect that a study should be able to tell from none.
_WORTH_FINDING = 0.1
#: Of an effect: what is a mean with its interval and p-value, and what a mean at each distance.
CONTRASTED = ("own", "initial", "trace", "volume", "switches", "margin_slope")
PROFILES = ("profile", "initial_profile")


@dataclass(frozen=True)
class BoundaryEffect:
    """Whether a layer magnifies near decision boundaries, over many lines between samples; ``str()`` says it.

    All effects are in nats (exp of one is a ratio), each with a 95 % interval, and where an untrained network was given
    they are differences of differences: the trained network's contrast minus the untrained one's at the same points.

    Attributes:
        name: of the layer.
        estimand: what is compared.  By default the speed |Jv| of the path along the line, which is NO volume.
        contrast: where: ``"mirror"``, ``"peak"`` or ``"same_class"``.
        estimate: the effect.
        p_value: two-sided.
        own: the trained network's contrast by itself.
        initial: the untrained network's, or None.
        trace: the same contrast of ½ log tr g, the mean stretch of all directions: what of the effect is not the
            line's own.  None over networks of which one has none.
        volume: the same contrast of a volume, where one was measured; ``volume_estimand`` says which.
        dimensions: of that volume: its effect divided by them compares with a speed.
        switches: the same contrast of the local complexity (Humayun et al., arXiv:2310.12977), a rival account: the
            share of the layer's ReLU units that switch on or off, per length of the line.  None of a layer without.
        profile: signed distance from the crossing, in units of the line, → mean of log |Jv| minus that at the crossing.
        initial_profile: the untrained network's, or None.
        margin_slope: nats that log |Jv| changes with a unit of the margin (a logit), from one end of a line to the
            other; negative where it is larger at the less certain sample.
        num_pairs, num_units, units: pairs used, and how many of what they are made of; ``"networks"`` where several
            networks were compared.
        dropped: reason → pairs left out.
        profiled, distance: what the profile is of, and against, in words.
    """

    name: str
    estimand: str
    contrast: str
    estimate: Estimate
    p_value: float
    own: Tested
    initial: Tested | None
    trace: Tested | None
    volume: Tested | None
    volume_estimand: str | None
    dimensions: int | None
    switches: Tested | None
    profile: Mapping[float, Estimate]
    initial_profile: Mapping[float, Estimate] | None
    margin_slope: Tested
    num_pairs: int
    num_units: int
    units: str
    dropped: Mapping[str, int]
    profiled: str = "log |Jv|"
    distance: str = "along the line between two samples, in units of its length"

    @property
    def supported(self) -> bool | None:
        """Whether training made the layer magnify near boundaries; None where nothing is claimed.

        That is without an untrained network to tell by, and of ``"same_class"`` at one network: crossings lie nearer to
        the middle of the data than points of one class, so that it rejects 12 % of smooth nulls at 5 % and more of
        others (benchmarks/README.md).
        """
        return None if self.initial is None or self._of_the_places else self.p_value < 0.05 and self.estimate > 0

    @property
    def _of_the_places(self) -> bool:
        return self.contrast == "same_class" and self.units != "networks"

    @property
    def verdict(self) -> str:
        """``supported``, in words: yes, no, the opposite, or too few."""
        if self.initial is None:
            return "not tested: give the untrained network as initial="
        if self._of_the_places:
            return "not tested: at one network the places differ as well; compare_networks() of several tells"
        if self.p_value < 0.05:
            return "larger near the boundary" if self.estimate > 0 else "the opposite, smaller near the boundary"
        low, high = self.estimate.interval or (-math.inf, math.inf)
        if high - low <= 2 * _WORTH_FINDING:
            return f"no difference found, and none above {max(abs(low), abs(high)):.2g} nats"
        more = math.ceil(self.num_units * ((high - low) / 2 / _WORTH_FINDING) ** 2)
        return f"too few to tell: ± {_WORTH_FINDING} nats takes about {more} {self.units}"

    @property
    def compared(self) -> str:
        """What the estimate is of, in words: the quantity, where, between which networks, over what."""
        difference = "" if self.initial is None else ", trained minus untrained"
        scope = f"over this network's {self.num_pairs} pairs"
        if self.units == "networks":
            scope = f"over {self.num_units} networks ({self.num_pairs} pairs)"
        return f"{self.estimand}{difference}, {scope}"

    @property
    def notes(self) -> list[str]:
        """What stands behind the numbers: that one network's contrast is no test, and what was left out."""
        found = []
        if self.initial is None:
            found.append("a contrast without initial= is not calibrated: untrained networks often have one")
        if self.dropped:
            found.append("left out: " + ", ".join(f"{count} pairs ({why})" for why, count in self.dropped.items()))
        return found

    def __str__(self) -> str:
        parts = [
            f"{self.name or 'the model'}: {self.verdict}: {self.estimate} nats ({in_words(self.p_value)}) of "
            f"{self.compared}"
        ]
        if self.volume is not None and self.dimensions:
            each = float(self.volume.estimate) / self.dimensions
            parts.append(
                f"of {self.volume_estimand} {self.volume.estimate} ({in_words(self.volume.p_value)}), {each:+.2g} per "
                "dimension"
            )
        if self.trace is not None:
            parts.append(f"of ½ log tr g {self.trace.estimate}")
        if self.switches is not None:
            parts.append(f"share of ReLU units that switch, per line {self.switches.estimate}")
        if self.initial is not None:
            parts.append(f"the trained network by itself {self.own.estimate}, the untrained {self.initial.estimate}")
        return "; ".join([*parts, *self.notes])

    def record(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @staticmethod
    def of(record: Mapping[str, Any]) -> BoundaryEffect:
        """Make an effect of what :meth:`record` gave."""
        read: dict[str, Any] = {"estimate": _estimate(record["estimate"])}
        for name in (name for name in (*CONTRASTED, *PROFILES) if record[name] is not None):
            if name in PROFILES:
                read[name] = {offset: _estimate(value) for offset, value in record[name]}
            else:
                read[name] = Tested(_estimate(record[name][0]), _number(record[name][1]))
        return BoundaryEffect(**dict(record) | read)


def in_words(p_value: float) -> str:
    """A p-value for a sentence."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return [float(value), *(value.interval or (None, None))]
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping) and value and not isinstance(next(iter(value)), str):
        return [[key, _plain(entry)] for key, entry in value.items()]
    return value


def _estimate(numbers: list[float | None]) -> Estimate:
    value, low, high = numbers
    return Estimate(_number(value), None if low is None or high is None else (low, high))


def _number(value: float | None) -> float:
    return math.nan if value is None else value
