"""What the crossing is compared with.

Each contrast is a weighted sum of a log-volume l over a few places, and within one line its weights and places are
such that a change of l's overall level cancels.

mirror: l(t*) − l(1 − t*).  Both are equally far from the nearer end of the line, and so from the samples.

peak: what l(t*) has above its neighbours at t* ± 0.2, minus the same at 1 − t*.  A slope along the line cancels, too.
The bare peak l(t*) − ½ l(t* − s) − ½ l(t* + s) is no test: in the middle of a line between samples any smooth field
bends, so that of random fields it is "significant" in 4 of 10 cases (benchmarks/README.md).

same_class: l at the crossing minus l at a point of one class that is as far from its sample.  These lie on different
lines, so it takes a volume that knows no line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchgeom_probe.shapes import Float, Tensor

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
