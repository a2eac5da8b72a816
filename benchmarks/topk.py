"""TopK on the paper's network against the full Jacobian and its singular values."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchgeom_probe.integrations.timm import cifar_resnet

import torchgeom_probe as tgp
from benchmarks.timing import Settings, seconds, smallest

TITLE = "The ten largest singular values of the paper's network"
NOTE = """\
`TopK(k=10)` on the CIFAR ResNet-34 with GELU (512 pooled features, 3 × 32 × 32, float32), at initialisation and briefly
trained; seconds a sample, in a batch of two. "warm": from a report made before every weight moved by 1e-3 of its
tensor's mean size. "max error": of log10 σ, against float64; "bound": TopK's own, on the sum of the logarithms, beside
its error. "full": the Jacobian and its `svdvals`, by `jacrev(chunk_size=32)`, as the authors do (`create_graph=True`,
32 of the 512 features timed) and by `Exact()`; it takes 512 products."""


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Return the first digits of scikit-learn's set as [count, 3, 32, 32] images, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images[:count], dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return (images - 0.3) / 0.35, torch.tensor(data.target[:count])


def trained(steps: int, settings: Settings) -> nn.Module:
    """Return the network after that many steps of AdamW."""
    torch.manual_seed(0)
    model = cifar_resnet(
        "resnet18" if settings.quick else "resnet34", **({"channels": (4, 4, 8, 16)} if settings.quick else {})
    )
    images, labels = digits(1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (32,))
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().to(settings.device)


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    yield (
        "| weights | products, cold | warm | max error | error ≤ bound | TopK s | full s: jacrev / authors / "
        "`Exact()` | "
        "TopK is faster by |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, steps in (("random", 0), (f"{1 if settings.quick else 20} steps", 1 if settings.quick else 20)):
        yield row(name, trained(steps, settings), settings)


def row(name: str, model: nn.Module, settings: Settings) -> str:
    """Measure one network."""
    k, samples = (3, 1) if settings.quick else (10, 2)
    x = digits(1010)[0][-samples:].contiguous().to(settings.device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def features(sample: Tensor) -> Tensor:
        return model.global_pool(model.forward_features(sample[None]))[0]  # type: ignore[operator]

    def by_jacrev(sample: Tensor) -> Tensor:
        jacobian = torch.func.jacrev(features, chunk_size=32)(sample).flatten(1)
        torch.linalg.svdvals(jacobian)
        return jacobian

    n = len(features(x[0]))
    share = max(1, n // 16)

    def in_their_way() -> None:
        z = x[0].clone().requires_grad_()
        torch.autograd.functional.jacobian(lambda s: features(s)[:share], z, create_graph=True)

    options = {"layers": ["global_pool"], "normalize": False}
    topk = tgp.GeometryProbe(model, estimator=tgp.TopK(k=k, method="krylov"), **options)  # type: ignore[arg-type]
    exact = tgp.GeometryProbe(model, estimator=tgp.Exact(), **options)  # type: ignore[arg-type]
    cold = topk.measure(x)
    jacobians: list[Tensor] = []
    best = smallest(
        {
            "topk": lambda: topk.measure(x),
            "jacrev": lambda: jacobians.append(by_jacrev(x[0])),
            "authors": in_their_way,
            "exact": lambda: exact.measure(x[:1]),
        },
        settings.device,
        turns=2,
        slow_turns=1,
        quick_ones=("topk", "authors"),
    )
    svd = seconds(lambda: torch.linalg.svdvals(jacobians[0]), settings.device)
    full = {"jacrev": best["jacrev"], "authors": best["authors"] * n / share + svd, "exact": best["exact"]}
    each = best["topk"] / samples
    g = cold["global_pool"]
    true = torch.linalg.svdvals(jacobians[0].double())[:k]
    error = (g.singular_values[0].log10() - true.log10()).abs().max().item()
    total = (g.log_volume[0] - true.log().sum()).abs().item()
    assert g.error_bound is not None
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(1e-3 * parameter.abs().mean() * torch.randn_like(parameter))
    again = tgp.GeometryProbe(moved, estimator=tgp.TopK(k=k, method="krylov"), **options)  # type: ignore[arg-type]
    warm = again.measure(x, start=cold)["global_pool"]
    assert g.num_products is not None
    assert warm.num_products is not None
    cells = (
        name,
        ", ".join(map(str, g.num_products.tolist())),
        ", ".join(map(str, warm.num_products.tolist())),
        f"{error:.1e}",
        f"{total:.1e} ≤ {g.error_bound[0].item():.1e}",
        f"{each:.2f}",
        " / ".join(f"{seconds_:.1f}" for seconds_ in full.values()),
        " / ".join(f"{seconds_ / each:.1f}" for seconds_ in full.values()),
    )
    return f"| {' | '.join(cells)} |"
