"""What is compared, and which points of which lines are measured for it: the contrast, the two ends, the profile.

A contrast is a weighted sum of a log-volume l over a few places, and within one line its weights and places are such
that a change of l's overall level cancels.

mirror: l(t*) − l(1 − t*).  Both are equally far from the nearer end of the line, and so from the samples.

peak: what l(t*) has above its neighbours at t* ± 0.2, minus the same at 1 − t*.  A slope along the line cancels, too.
The bare peak l(t*) − ½ l(t* − s) − ½ l(t* + s) is no test: in the middle of a line between samples any smooth field
bends, so that of random fields it is "significant" in 4 of 10 cases (benchmarks/README.md).

same_class: l at the crossing minus l at a point of one class that is as far from its sample.  These lie on different
lines, so it takes a volume that knows no line.

Legend of axes: N pairs (lines), P points of a line, C of them in the contrast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchgeom_probe.boundary.pairs import Pairs, crossing_pairs, same_class_points
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.predictions import Readout, predicted
from torchgeom_probe.shapes import Bool, Float, Int, Tensor
from torchgeom_probe.slices.resume import Parts

LEAST_PAIRS, LEAST_UNITS = 10, 5
_NEIGHBOUR = 0.2


@dataclass(frozen=True)
class Contrast:
    """Places of a line and their weights.

    Attributes:
        words: what is compared, for a sentence.
        steps: places relative to the crossing, and to its mirror image.
        weights: of the steps; those of the mirror image are their negatives.
        apart: how far the crossing must be from the middle of the line.
    """

    words: str
    steps: tuple[float, ...] = (0.0,)
    weights: tuple[float, ...] = (1.0,)
    apart: float = 0.1

    @property
    def reach(self) -> float:
        """How far from the crossing its places lie."""
        return max(map(abs, self.steps))

    def places(self, t: Float[Tensor, " pairs"]) -> tuple[Tensor, Tensor]:
        """Where on each line, [N, C], and the weights [C]; the crossing comes first."""
        steps, weights = torch.tensor(self.steps).to(t), torch.tensor(self.weights).to(t)
        return torch.cat([t[:, None] + steps, 1 - t[:, None] + steps], 1), torch.cat([weights, -weights])


CONTRASTS = {
    "mirror": Contrast("at the crossing against the mirrored point of its line"),
    "peak": Contrast(
        f"at the crossing above its neighbours at ± {_NEIGHBOUR} of the line, against the same at the mirrored point",
        steps=(0.0, -_NEIGHBOUR, _NEIGHBOUR),
        weights=(1.0, -0.5, -0.5),
    ),
    "same_class": Contrast("at the crossing against a point of one class as far from its sample", apart=0.0),
}


@dataclass(frozen=True, eq=False)
class Design:
    """What is measured where, and how it is compared.

    Attributes:
        pairs: the lines.
        points: [N, P, *input]: the C of the contrast, the two ends, those of the profile.
        along: [N, *input], the lines' unit directions.
        weights: [C], of the contrast.
        within: [N, P], which points lie on their line.
        margins: [N, 2], of the two ends.
    """

    pairs: Pairs
    points: Float[Tensor, " N P *input"]
    along: Float[Tensor, " N *input"]
    weights: Float[Tensor, " C"]
    within: Bool[Tensor, "N P"]
    margins: Float[Tensor, "N 2"]

    @property
    def ends(self) -> slice:
        """Which of the points are the two samples; those of the profile come after them."""
        return slice(len(self.weights), len(self.weights) + 2)

    def contrasted(self, field: Tensor) -> Float[Tensor, " N"]:
        """The contrast of a field [N, P] or [N, C] on each line."""
        return field[:, : len(self.weights)].double() @ self.weights


def designed(
    model: nn.Module,
    x: Float[Tensor, " batch *input"],
    groups: Int[Tensor, " batch"],
    readout: Readout | None,
    settings: Mapping[str, Any],
    *,
    parts: Parts | None = None,
    progress: bool | None = False,
) -> Design:
    """Draw the pairs and lay out their points.

    ``settings``: ``contrast``, ``pairs``, ``share``, ``seed`` and ``offsets`` of the study; ``parts``: what is known.

    Raises:
        ProbeError: one predicted class, too few usable pairs, an output that is no logits.
    """
    contrast, seed = CONTRASTS[settings["contrast"]], settings["seed"]
    decided = predicted(model, x, readout)
    classes = decided["predictions"]
    if len(classes[classes >= 0].unique()) < 2:
        raise ProbeError(
            f"all {len(x)} samples are predicted as one class ({int(classes[0])}), so no boundary lies between them.\n"
            "Give held-out samples of several classes, and a trained model:  boundary_study(model, x)"
        )
    draw = {"count": settings["pairs"], "share": settings["share"], "reach": contrast.reach, "apart": contrast.apart}
    kept: dict[str, Any] = {"parts": parts, "progress": progress}
    found = crossing_pairs(model, x, classes, groups, readout=readout, seed=seed, **draw, **kept)
    refuse_few(len(found.t), len(found.units.unique()), found.dropped)
    return laid_out(model, x, found, decided, readout, settings)


def laid_out(
    model: nn.Module,
    x: Float[Tensor, " batch *input"],
    found: Pairs,
    decided: Mapping[str, Tensor],
    readout: Readout | None,
    settings: Mapping[str, Any],
) -> Design:
    """The points of known pairs; ``settings`` as above, of which ``contrast``, ``offsets`` and ``seed`` count."""
    contrast = CONTRASTS[settings["contrast"]]
    places, weights = contrast.places(found.t)
    offsets = found.t[:, None] + torch.tensor(settings["offsets"], dtype=torch.float64)
    t_NP = torch.cat([places, torch.tensor([0.0, 1.0]).to(places).expand(len(places), 2), offsets], 1)
    points = found.points(x, t_NP.clamp(0, 1))
    within = (t_NP >= 0) & (t_NP <= 1)
    if settings["contrast"] == "same_class":
        classes = decided["predictions"]
        points[:, 1], within[:, 1] = same_class_points(model, x, classes, found, readout=readout, seed=settings["seed"])
    along = found.lines(x)[1]
    along = along / along.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))
    return Design(found, points, along, weights, within, decided["margin"][found.ends])


def refuse_few(pairs: int, units: int, dropped: Mapping[str, int], *, layer: str | None = None) -> None:
    """Refuse fewer pairs, or samples or groups that they are made of, than the test needs."""
    if pairs >= LEAST_PAIRS and units >= LEAST_UNITS:
        return
    where = "" if layer is None else f"layer {layer!r}: "
    why = "; ".join(f"{reason}: {count}" for reason, count in dropped.items() if count) or "none was left out"
    raise ProbeError(
        f"{where}{pairs} usable pairs of {units} samples or groups; the test needs {LEAST_PAIRS} of {LEAST_UNITS} "
        f"({why}).\n"
        "Give more held-out samples, or let each be in several pairs:  boundary_study(model, x, share=True)"
    )
