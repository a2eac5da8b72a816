"""Does a metric find duplicates better than the cosine of features: crops of one photograph against those of others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torchgeom_probe.integrations.timm import load_pretrained_efficientnet_lite0

from benchmarks.timing import Settings
from torchgeom_probe.reproduce.data import PHOTOGRAPHS, reduced

TITLE = "Duplicates: a metric against the cosine"
NOTE = """\
Crops of ten photographs, each augmented twice (efficientnet-lite0 with its ImageNet weights, 96²). A pair is a
duplicate where both are of one crop. AUC over all pairs, with the 95 % interval of a bootstrap over photographs, of:
the cosine of the pooled features; their distance; "metric", the length of the straight line from a to b in the
pulled-back metric, √((b−a)ᵀg(b−a)), mean of both ends; "tangent distance", the least |Φ(a) + J_a T_a s − Φ(b)| over s,
T_a two shifts, brightness and contrast of a."""
METHOD = "no times but one process"

_SCORES = ("cosine", "distance", "metric", "tangent distance")
#: Name → (the smallest share of a crop's side that an augmentation keeps, the change of brightness and contrast).
_STRENGTHS = {"mild": (0.9, 0.1), "strong": (0.6, 0.4)}


@dataclass(frozen=True)
class Pairs:
    """Scores [pairs] by name, larger for duplicates; which are duplicates; photographs [pairs, 2]."""

    scores: dict[str, np.ndarray]
    same: np.ndarray
    photographs: np.ndarray


def table(settings: Settings) -> Iterator[str]:
    yield f"| augmentations | {' | '.join(_SCORES)} |"
    yield f"|---|{'---|' * len(_SCORES)}"
    model = load_pretrained_efficientnet_lite0().model
    features = nn.Sequential(model.conv_stem, model.bn1, model.blocks, model.conv_head, model.bn2, model.global_pool)
    features.requires_grad_(False)
    for name in _STRENGTHS:
        pairs = compared(features.eval(), 1 if settings.quick else 3, name, size=32 if settings.quick else 96)
        yield f"| {name} | {' | '.join(interval(pairs, score, 20 if settings.quick else 500) for score in _SCORES)} |"


def compared(features: nn.Module, each: int, strength: str, *, size: int) -> Pairs:
    """All pairs of two augmentations of every crop."""
    first, second, photographs = views(each, strength, size=size)
    a, b = features(first).flatten(1), features(second).flatten(1)
    count = len(a)
    scores = {"cosine": nn.functional.cosine_similarity(a[:, None], b[None], dim=2), "distance": -torch.cdist(a, b)}
    metric, tangent = torch.empty(count, count), torch.empty(count, count)
    along = tangents(first)
    for i in range(count):
        lines = (second - first[i])[:, None]  # from a_i to every b
        start = _pushed(features, first[i : i + 1], lines[:, 0])
        ends = torch.stack([_pushed(features, second[j : j + 1], lines[j])[0] for j in range(count)])
        metric[i] = -(start.norm(dim=1) + ends.norm(dim=1)) / 2
        basis = torch.linalg.qr(_pushed(features, first[i : i + 1], along[:, i]).T).Q
        rest = b - a[i]
        tangent[i] = -(rest - rest @ basis @ basis.T).norm(dim=1)
    scores |= {"metric": metric, "tangent distance": tangent}
    number = torch.arange(count)
    pairs = torch.stack(torch.broadcast_tensors(photographs[:, None], photographs[None]), dim=2)
    return Pairs(
        {name: score.flatten().numpy() for name, score in scores.items()},
        (number[:, None] == number[None]).flatten().numpy(),
        pairs.flatten(0, 1).numpy(),
    )


def _pushed(features: nn.Module, x: Tensor, directions: Tensor) -> Tensor:
    """[k, n]: J at one sample times k directions, by forward mode."""
    return torch.func.vmap(lambda v: torch.func.jvp(lambda z: features(z).flatten(1)[0], (x,), (v[None],))[1])(
        directions
    )


def tangents(x: Tensor) -> Tensor:
    """[4, B, ...]: a shift to the right and down, brightness, contrast."""
    shifts = [(x.roll(1, axis) - x.roll(-1, axis)) / 2 for axis in (2, 3)]
    return torch.stack([*shifts, torch.ones_like(x), x - x.mean((1, 2, 3), keepdim=True)])


def views(each: int, strength: str, *, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two augmentations of each crop, and its photograph: another crop of it, flipped or not, in another light."""
    generator, (least, light) = torch.Generator().manual_seed(0), _STRENGTHS[strength]
    both: list[list[Tensor]] = [[], []]
    for name in PHOTOGRAPHS:
        photograph = reduced(name)
        _, height, width = photograph.shape
        side = height // 2
        for _ in range(each):
            y, x = (int(torch.randint(0, extent - side + 1, (1,), generator=generator)) for extent in (height, width))
            crop = photograph[None, :, y : y + side, x : x + side]
            for found in both:
                keep, down, right, flip, bright, contrast = torch.rand(6, generator=generator).tolist()
                kept = int(side * (least + (1 - least) * keep))
                top, left = int(down * (side - kept)), int(right * (side - kept))
                part = crop[:, :, top : top + kept, left : left + kept]
                part = nn.functional.interpolate(part, size=size, mode="bilinear", antialias=True)
                part = part.flip(3) if flip > 0.5 and strength == "strong" else part
                middle = part.mean()
                part = middle + (part - middle) * (1 + light * (2 * contrast - 1)) + light * (bright - 0.5)
                found.append(2 * part.clamp(0, 1) - 1)
    return torch.cat(both[0]), torch.cat(both[1]), torch.arange(len(PHOTOGRAPHS)).repeat_interleave(each)


def auc(score: np.ndarray, same: np.ndarray, weight: np.ndarray) -> float:
    """The chance that a duplicate scores above another pair, each pair as often as its weight says."""
    yes, no = same & (weight > 0), ~same & (weight > 0)
    if (weight[yes | no] == 1).all():
        ranks = rankdata(score)
        return (ranks[yes].sum() - yes.sum() * (yes.sum() + 1) / 2) / (yes.sum() * no.sum())
    above = (score[yes][:, None] > score[no][None]) + 0.5 * (score[yes][:, None] == score[no][None])
    return float(np.average(above, weights=weight[yes][:, None] * weight[no][None]))


def interval(pairs: Pairs, score: str, draws: int) -> str:
    """AUC and its interval, photographs drawn with replacement: a pair counts as often as both of its own are drawn."""
    random, values = np.random.default_rng(0), pairs.scores[score]
    names = np.unique(pairs.photographs)
    found = []
    for _ in range(draws):
        times = np.bincount(random.choice(names, len(names)), minlength=names.max() + 1)
        first, second = times[pairs.photographs].T
        own = pairs.photographs[:, 0] == pairs.photographs[:, 1]
        found.append(auc(values, pairs.same, np.where(own, first, first * second).astype(float)))
    low, high = np.nanquantile(found, [0.025, 0.975])
    return f"{auc(values, pairs.same, np.ones(len(values))):.3f} [{low:.3f}, {high:.3f}]"
