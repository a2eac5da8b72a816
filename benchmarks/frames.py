"""What each quantity that can be watched follows: rank correlations over crops of photographs."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Sequence

import scipy
import torch
from torch import Tensor, nn
from torchgeom_probe.integrations.timm import cifar_resnet, load_pretrained_efficientnet_lite0

import torchgeom_probe as tgp
from benchmarks.timing import Settings
from torchgeom_probe.reproduce.data import PHOTOGRAPHS, reduced

TITLE = "What a frame is sensitive to"
NOTE = """\
Spearman's rank correlation over 30 crops of ten photographs, at an early / middle / late block: with tr g
(`Trace(probes=64)`), with the effective volume `TopK(10)`, and of two seeds. A row whose first column is near 1 says
what `scale` says; one whose third is low says mostly what its own frame is. "seconds": CPU, for all crops and blocks.
Networks: efficientnet-lite0 with its ImageNet weights (96²), and a CIFAR ResNet-18 (32²) after 150 steps on other crops
of the same photographs, and at initialisation."""
METHOD = "CPU time of the process, once"

_ROWS = {
    "`Subspace(8)`: `frame_volume`": (lambda seed: tgp.Subspace(8, seed=seed), "frame_volume"),
    "`Subspace(8)`: `scale`": (lambda seed: tgp.Subspace(8, seed=seed), "scale"),
    "`Subspace(8)`: `effective_dimension`": (lambda seed: tgp.Subspace(8, seed=seed), "effective_dimension"),
    '`Subspace(8, frame="smooth")`: `frame_volume`': (
        lambda seed: tgp.Subspace(8, frame="smooth", seed=seed),
        "frame_volume",
    ),
    '`Subspace(8, frame="data")`: `frame_volume`': (lambda seed: tgp.Subspace(8, frame="data"), "frame_volume"),
    "`TopK(10)`: `log_volume`": (lambda seed: tgp.TopK(10), "log_volume"),
}


def crops(each: int, size: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Square crops [10 · each, 3, size, size] of half a photograph's height and more, in [-1, 1], and which it was."""
    generator, images = torch.Generator().manual_seed(seed), []
    for name in PHOTOGRAPHS:
        photograph = reduced(name)
        _, height, width = photograph.shape
        for _ in range(each):
            low, high, side = torch.rand(3, generator=generator).tolist()
            side = int(height * (0.5 + side / 2))
            y, x = int(low * (height - side)), int(high * (width - side))
            crop = photograph[None, :, y : y + side, x : x + side]
            images.append(nn.functional.interpolate(crop, size=size, mode="bilinear", antialias=True))
    return 2 * torch.cat(images) - 1, torch.arange(len(PHOTOGRAPHS)).repeat_interleave(each)


def networks(settings: Settings) -> Iterator[tuple[str, nn.Module, Sequence[str], Tensor]]:
    """Name, network, three layers, crops."""
    each = 1 if settings.quick else 3
    if not settings.quick:
        lite = load_pretrained_efficientnet_lite0().model
        yield "efficientnet-lite0", lite, ["blocks.2", "blocks.4", "blocks.6"], crops(each, 96, seed=0)[0]
    for steps in (0,) if settings.quick else (150, 0):
        name = f"ResNet-18, {steps} steps" if steps else "ResNet-18, untrained"
        yield name, _resnet(steps), ["layer1", "layer2", "layer4"], crops(each, 32, seed=0)[0]


def _resnet(steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = cifar_resnet("resnet18", channels=(16, 32, 64, 128))
    images, labels = crops(100, 32, seed=1) if steps else (torch.empty(0), torch.empty(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model.eval()


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    yield f"Measured on {datetime.date.today().isoformat()}.\n"
    yield "| network | quantity | with tr g | with `TopK(10)` | two seeds | seconds |"
    yield "|---|---|---|---|---|---|"
    for network, model, layers, x in networks(settings):
        model, x = model.to(settings.device), x.to(settings.device)
        found: dict[tuple[str, int], tuple[tgp.GeometryReport, float]] = {}

        def measured(estimator: tgp.Estimator, model=model, layers=layers, x=x, found=found):  # type: ignore[no-untyped-def]
            key = repr(estimator)
            if key not in found:
                start = time.process_time()
                report = tgp.measure(model, x, layers=layers, estimator=estimator, progress=False)
                found[key] = report, time.process_time() - start
            return found[key]

        trace, effective = measured(tgp.Trace(probes=64))[0], measured(tgp.TopK(2 if settings.quick else 10))[0]
        against = [[report[layer].value for layer in layers] for report in (trace, effective)]
        for title, (make, name) in _ROWS.items():
            k = 2 if settings.quick and "TopK" in title else None
            estimators = [tgp.TopK(k)] * 2 if k else [make(seed) for seed in (0, 1)]
            (report, spent), (other, _) = (measured(estimator) for estimator in estimators)
            own, again = ([getattr(r[layer], name) for layer in layers] for r in (report, other))
            columns = [_correlations(own, values) for values in against]
            seeds = _correlations(own, again) if estimators[0] != estimators[1] else "–"
            yield f"| {network} | {title} | {columns[0]} | {columns[1]} | {seeds} | {spent:.1f} |"


def _correlations(left: Sequence[Tensor], right: Sequence[Tensor]) -> str:
    pairs = zip(left, right, strict=True)
    return " / ".join(f"{scipy.stats.spearmanr(a.cpu(), b.cpu()).statistic:.2f}" for a, b in pairs)
