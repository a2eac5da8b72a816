"""What the effective volume costs to watch, in training steps of the same batch: cold, warm, at unchanged weights."""

from __future__ import annotations

import copy
import datetime
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchgeom_probe.integrations.timm import cifar_resnet

import torchgeom_probe as tgp
from benchmarks.timing import Settings
from torchgeom_probe.jacobian.layer import layer_jacobians
from torchgeom_probe.model.isolation import measuring

TITLE = "The effective volume, watched"
NOTE = """\
`TopK(10, tol)` at all stages (unpooled) of a network trained for 60 steps on noisy images, 4 samples: CPU seconds of
the process over those of a training step (forward, backward, train mode) of the same 4 samples, in the same process.
"30 steps later": from the report made before 30 more steps of SGD (lr 0.01); "unchanged": from a report at the same
weights.  "rows alone": the products that were made times the time of a product at that layer, timed on its own: what
the method costs without its algebra.  "error": the largest over samples and layers, against `tol=0.005`; "bound": the
largest."""
METHOD = "CPU time of the process, once; the step the smallest of five"


def networks(settings: Settings) -> Iterator[tuple[str, nn.Module, Sequence[str], int]]:
    """Name, network, layers, size of its images."""
    import timm

    if settings.quick:
        small = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GELU(), nn.Conv2d(8, 16, 3, 2), nn.GELU(), nn.Flatten())
        yield "two convolutions", nn.Sequential(small, nn.LazyLinear(10)), ["0.1", "0.3"], 16
        return
    stages = [f"layer{i}" for i in range(1, 5)]
    yield "resnet18", timm.create_model("resnet18", num_classes=10), stages, 64
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10)
    yield "ViT-tiny", vit, [f"blocks.{i}" for i in (1, 4, 6, 9, 11)], 64
    lite = timm.create_model("efficientnet_lite0", num_classes=10)
    yield "efficientnet-lite0", lite, [f"blocks.{i}" for i in (1, 2, 4, 5, 6)], 96


def _trained(model: nn.Module, size: int, steps: int, rate: float) -> None:
    patterns = torch.randn(10, 3, size, size, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9 if rate > 0.01 else 0.0)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(0, 10, (16,))
        optimizer.zero_grad()
        noisy = patterns[chosen] + torch.randn(16, 3, size, size)
        functional.cross_entropy(model(noisy), chosen).backward()
        optimizer.step()
    model.eval()


def _spent(run: Callable[[], object], turns: int) -> float:
    best = float("inf")
    for _ in range(turns):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def _a_product(probe: tgp.GeometryProbe, x: Tensor) -> dict[str, float]:
    """Seconds of a product at one sample, a push and a pull on average, in blocks of four."""
    found = {}
    inputs, plan = probe._planned(x)
    with (
        measuring(probe.model, mode="eval"),
        layer_jacobians(probe._jacobians(inputs, plan, "auto"), estimator="watch", at_once=4) as maps,
    ):
        for entry, jacobian in maps.items():
            v = torch.randn(len(x), 4, jacobian.num_inputs, dtype=torch.float64)
            u = torch.randn(len(x), 4, jacobian.num_features, dtype=torch.float64)
            both = _spent(lambda j=jacobian, v=v: j.push(v), 3) + _spent(lambda j=jacobian, u=u: j.pull(u), 3)  # type: ignore[misc]
            found[entry] = both / 8 / len(x)
    return found


def training(steps: int, *, channels: Sequence[int] = (16, 32, 64, 128)) -> tuple[tgp.Monitor, tgp.Monitor, float]:
    """A CIFAR ResNet-18 trained under two monitors, TopK on two per cent of the time and a frame at every 50th step.

    Returns the two, and the share of the first by the wall: of a clock around its own calls.
    """
    torch.manual_seed(0)
    model = cifar_resnet("resnet18", channels=channels)
    patterns, x = torch.randn(10, 3, 32, 32), torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    layers = [f"layer{i}" for i in range(1, 5)]
    effective = tgp.Monitor(model, x, layers=layers, estimator=tgp.TopK(10, tol=0.1), max_overhead=0.02)
    frame = tgp.Monitor(model, x, layers=layers, estimator=tgp.Subspace(8), every=50)
    effective.probe_now()  # what torch loads at the first of all is no cost of a probe; the second count starts here
    inside, begun = 0.0, time.perf_counter()
    for _ in range(steps):
        chosen = torch.randint(0, 10, (64,))
        optimizer.zero_grad()
        functional.cross_entropy(model(patterns[chosen] + torch.randn(64, 3, 32, 32)), chosen).backward()
        optimizer.step()
        before = time.perf_counter()
        effective.step()
        inside += time.perf_counter() - before
        frame.step()
    return effective, frame, inside / (time.perf_counter() - begun)


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    yield f"Measured on {datetime.date.today().isoformat()}.\n"
    yield "| network | start | tol | steps | rows alone | products | error | bound |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, model, layers, size in networks(settings):
        torch.manual_seed(0)
        k, x = 3 if settings.quick else 10, torch.randn(4, 3, size, size)
        model(x)
        _trained(model, size, 2 if settings.quick else 60, 0.05)

        other = copy.deepcopy(model).train()  # a step moves the batch norms' statistics

        def step(model: nn.Module = other, x: Tensor = x) -> None:
            model.zero_grad()
            functional.cross_entropy(model(x), torch.zeros(4, dtype=torch.long)).backward()

        unit = _spent(step, 6)

        def measured(
            tol: float,
            start: tgp.GeometryReport | None = None,
            of: tuple[nn.Module, Sequence[str], Tensor, int] = (model, layers, x, k),
        ) -> tuple[tgp.GeometryReport, float]:
            model, layers, x, k = of
            probe = tgp.GeometryProbe(model, layers=layers, estimator=tgp.TopK(k, tol=tol, method="krylov"))
            probe.cost(x)
            begun = time.process_time()
            return probe.measure(x, start=start, progress=False), time.process_time() - begun

        price = _a_product(tgp.GeometryProbe(model, layers=layers), x)
        reference, _ = measured(0.005)
        first, spent = measured(0.1)
        rows = [("cold", 0.1, first, spent, reference)]
        rows += [("unchanged", tol, *measured(tol, first), reference) for tol in (0.1, 0.3)]
        _trained(model, size, 2 if settings.quick else 30, 0.01)
        reference, _ = measured(0.005)
        rows += [("cold", 0.1, *measured(0.1), reference)]
        rows += [("30 steps later", tol, *measured(tol, first), reference) for tol in (0.1, 0.3)]
        for title, tol, report, seconds, true in rows:
            alone = sum(float(g.num_products.sum()) * price[entry] for entry, g in report.items())
            error = max(float((true[e].value + true[e].error_bound / 2 - g.value).max()) for e, g in report.items())  # type: ignore[operator]
            bound = max(float(g.error_bound.max()) for g in report.values())  # type: ignore[union-attr]
            products = " / ".join(f"{g.num_products.double().mean():.0f}" for g in report.values())
            yield (
                f"| {name} | {title} | {tol} | {seconds / unit:.0f} | {alone / unit:.0f} | {products} | {error:.3f} | "
                f"{bound:.3f} |"
            )
    steps = 20 if settings.quick else 2000
    effective, _, share = training(steps, channels=(4, 4, 8, 8) if settings.quick else (16, 32, 64, 128))
    yield (
        f"\n{steps} steps of a CIFAR ResNet-18 (16 to 128 channels, 64 samples a step) under "
        f"`Monitor(estimator=TopK(10, tol=0.1), max_overhead=0.02)`, 4 samples: {effective.probes} probes, {share:.2%} "
        f"of the time by the wall after the first, {effective.overhead:.2%} with it, {effective.failures} failures."
    )
