"""Pairs of held-out samples with different predictions, and where the line between them crosses a decision boundary.

Legend of axes: N pairs, P points of a line.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import scipy  # its submodules are loaded when they are first used: importing this costs little
import torch
from torch import nn

from torchgeom_probe.boundary.points import bisected
from torchgeom_probe.files import digest
from torchgeom_probe.model.predictions import Readout, predicted
from torchgeom_probe.shapes import Float, Int, Tensor
from torchgeom_probe.slices.resume import Parts, by_chunks

#: Pairs that are looked at together, until there are enough.
_AT_ONCE = 64
#: Of fewer predicted classes the samples are clustered instead: of two, each line would share both with every other.
_FEW_CLASSES, _REGIONS = 5, 6
CLASSES = "predicted classes"


@dataclass(frozen=True, eq=False)
class Pairs:
    """N lines, each from a sample to another one that is predicted as another class.

    Attributes:
        ends: [N, 2], which samples.
        classes: [N, 2], as what they are predicted.
        units: [N, 2], what they belong to: themselves, or their groups.
        t: [N], where the line crosses a boundary: 0 at its first end, 1 at its second.
        regions: [N, 2], where in input space the two ends lie: lines between the same regions are not independent.
        regions_are: ``"predicted classes"``, or, of fewer than five, ``"regions of the input"``.
        dropped: reason → how many more were looked at and left out.
    """

    ends: Int[Tensor, "pairs 2"]
    classes: Int[Tensor, "pairs 2"]
    units: Int[Tensor, "pairs 2"]
    t: Float[Tensor, " pairs"]
    regions: Int[Tensor, "pairs 2"]
    regions_are: str
    dropped: dict[str, int]

    def lines(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where the lines begin, and from there to their ends, [N, *input] both."""
        a, b = x[self.ends.T.to(x.device)]
        return a, b - a

    def points(self, x: Tensor, t_NP: Tensor) -> Tensor:
        """[N, P, *input], the points of each line at these places."""
        a, along = self.lines(x)
        return a[:, None] + along[:, None] * t_NP.to(x).reshape(*t_NP.shape, *[1] * (x.dim() - 1))


def crossing_pairs(
    model: nn.Module,
    x: Tensor,
    classes: Tensor,
    groups: Tensor,
    *,
    count: int,
    share: bool = False,
    reach: float = 0.0,
    apart: float = 0.0,
    readout: Readout | None = None,
    seed: int = 0,
    parts: Parts | None = None,
    progress: bool | None = False,
) -> Pairs:
    """Draw pairs of samples [B, *input] until ``count`` of them can be used, or there are no more.

    Of two predicted ``classes`` [B] and two ``groups`` [B]; with ``share`` a sample may be in several.  A crossing must
    be ``apart`` from the middle of its line and leave ``reach`` to either end, in units of the line.  ``parts`` keeps
    the crossings that were found before an interruption.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = _sharing(classes, groups, count, generator) if share else _disjoint(classes, groups, generator)
    ends, t = [torch.empty(0, 2, dtype=torch.long)], [torch.empty(0, dtype=torch.float64)]
    dropped, missing = Counter[str](), count

    def bisect(some: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        a, b = x[some.T.to(x.device)]
        points, differ = bisected(model, a, b, near="middle", readout=readout)
        return {"t": points.t.double(), "differ": differ}, {}

    drawn = draw.split(_AT_ONCE)
    kept = None if parts is None else parts.named(f"crossings-{digest(draw)}")  # of other pairs they are no use
    shown: dict[str, Any] = {"desc": "boundary crossings, at most", "unit": "pair", "progress": progress}
    for index, (tensors, _) in by_chunks(enumerate(drawn), bisect, kept, kind="crossings", **shown):
        some, found, differ = drawn[index], tensors["t"], tensors["differ"]
        reasons = {
            "a tie of two logits, which the size of the batch decides": ~differ,
            "crossing at the middle, where it is its own mirror image": differ & ((found - 0.5).abs() < apart),
            "crossing too near to a sample": differ & (torch.minimum(found, 1 - found) < reach),
        }
        good = (~torch.stack(list(reasons.values())).any(0)).nonzero().flatten()[:missing]
        looked_at = len(some) if len(good) < missing else int(good[-1]) + 1
        dropped += Counter({reason: int(where[:looked_at].sum()) for reason, where in reasons.items()})
        ends.append(some[good])
        t.append(found[good])
        missing -= len(good)
        if missing <= 0:
            break
    return pairs_of(torch.cat(ends), torch.cat(t), classes, groups, dropped, lambda: clustered(x, generator))


def pairs_of(
    ends: Tensor, t: Tensor, classes: Tensor, groups: Tensor, dropped: Mapping[str, int], clusters: Callable[[], Tensor]
) -> Pairs:
    """The pairs of these samples, and where in input space they lie: of few classes, in which of the clusters [B]."""
    regions, are = classes, CLASSES
    if len(classes[ends].unique()) < _FEW_CLASSES:
        regions, are = clusters(), "regions of the input"
    return Pairs(ends, classes[ends], groups[ends], t, regions[ends], are, dict(dropped))


def clustered(x: Tensor, generator: torch.Generator) -> Tensor:
    """[B], the samples in a few clusters, by k-means."""
    flat = x.flatten(1).double().cpu()
    centres = flat[torch.randperm(len(flat), generator=generator)[:_REGIONS]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a cluster that is left empty
        _, nearest = scipy.cluster.vq.kmeans2(flat.numpy(), centres.numpy(), iter=20, minit="matrix")
    return torch.from_numpy(nearest).long()


def _disjoint(classes: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """[N, 2], random pairs of different classes and groups in which no sample stands twice."""
    rest, matched = torch.arange(len(classes)), [torch.empty(0, 2, dtype=torch.long)]
    for _ in range(50):  # every round leaves those that met their like, to meet others
        rest = rest[torch.randperm(len(rest), generator=generator)]
        met, odd = rest[: len(rest) // 2 * 2].reshape(-1, 2), rest[len(rest) // 2 * 2 :]
        differ = _differ(met, classes, groups)
        matched.append(met[differ])
        rest = torch.cat([met[~differ].flatten(), odd])
        if len(classes[rest].unique()) < 2:
            break
    return torch.cat(matched)


def _sharing(classes: Tensor, groups: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[N, 2], random pairs of different classes and groups, none of them twice; more than are wanted."""
    drawn = torch.randint(len(classes), (16 * count, 2), generator=generator)
    drawn = drawn[_differ(drawn, classes, groups)]
    known = torch.unique(drawn.sort(1).values, dim=0)
    known = known[torch.randperm(len(known), generator=generator)[: 4 * count]]
    turned = torch.rand(len(known), generator=generator) < 0.5  # sorted: without it the first end is the earlier sample
    return torch.where(turned[:, None], known.flip(1), known)


def _differ(pairs: Tensor, classes: Tensor, groups: Tensor) -> Tensor:
    a, b = pairs.T
    decided = (classes[a] >= 0) & (classes[b] >= 0)  # -1: logits that are not finite
    return decided & (classes[a] != classes[b]) & (groups[a] != groups[b])


def same_class_points(
    model: nn.Module, x: Tensor, classes: Tensor, pairs: Pairs, *, readout: Readout | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Points of that sample's class as far from a sample as each crossing is from the nearer end of its line.

    From that end towards a random sample that is predicted as the same class; up to eight are tried.  Returns the
    points [N, *input], and [N], where one was found.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    near = pairs.ends.gather(1, (pairs.t >= 0.5).long()[:, None])[:, 0]
    start = x[near.to(x.device)]
    length = pairs.lines(x)[1].flatten(1).norm(dim=1) * torch.minimum(pairs.t, 1 - pairs.t).to(x)
    points, found = start.clone(), torch.zeros(len(near), dtype=torch.bool)
    for _ in range(8):
        alike = classes[near][:, None] == classes[None]
        alike[torch.arange(len(near)), near] = False
        chosen = torch.where(alike, torch.rand(alike.shape, generator=generator), -1.0).argmax(1)
        along = x[chosen.to(x.device)] - start
        step = length / along.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
        tried = start + along * step.reshape(-1, *[1] * (x.dim() - 1))
        kept = predicted(model, tried, readout)["predictions"] == classes[near]
        fresh = kept & alike.any(1) & ~found
        points[fresh.to(x.device)] = tried[fresh.to(x.device)]
        found |= fresh
    return points, found
