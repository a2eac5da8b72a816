"""The products that LogDet takes to one per cent, beside what a search with hindsight needed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import torchgeom_probe as tgp
from benchmarks.timing import Settings

TITLE = "log det(g + εI) to one per cent"
NOTE = """\
Products (Jv and Jᵀu) of `LogDet(eps=…, tol=…)` for two standard errors of 1 % of |log det(JJᵀ + εI)|, λ_1 = 1, at n =
512 and d = 3072, for singular values 10^(−i/4), 1/i and those of a Gaussian matrix. "hindsight": the fewest with which
a grid search over steps and probes reached the same, without deflation. The whole Jacobian takes 512: where the end is
not in sight at that price the value is exact."""

#: spectrum → ε relative to λ_1 → products that a search with hindsight needed
HINDSIGHT: dict[str, dict[float, int]] = {
    "10^(−i/4)": {1e-2: 6, 1e-4: 24, 1e-6: 40},
    "1/i": {1e-2: 12, 1e-4: 104, 1e-6: 448},
    "Gaussian": {1e-2: 426, 1e-4: 420, 1e-6: 420},
}


def spectrum(kind: str, n: int, d: int) -> Tensor:
    """Singular values, the largest 1."""
    i = torch.arange(n, dtype=torch.float64)
    if kind == "10^(−i/4)":
        return 10 ** (-i / 4)
    if kind == "1/i":
        return 1 / (1 + i)
    generator = torch.Generator().manual_seed(0)
    sigma = torch.linalg.svdvals(torch.randn(n, d, generator=generator, dtype=torch.float64))
    return sigma / sigma[0]


def layer(sigma: Tensor, d: int) -> nn.Linear:
    """A linear layer with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(1)
    n = len(sigma)
    left, right = (
        torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64))[0] for rows in (n, d)
    )
    model = nn.Linear(d, n, bias=False)
    model.weight.data.copy_((left * sigma) @ right.T)
    return model


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    n, d, seeds = (100, 200, 2) if settings.quick else (512, 3072, 5)
    yield "| spectrum | ε/λ_1 | hindsight | products, median (range) | error, worst of the seeds | how |"
    yield "|---|---|---|---|---|---|"
    for kind, needed in HINDSIGHT.items():
        sigma = spectrum(kind, n, d)
        model, x = layer(sigma, d).to(settings.device), torch.zeros(1, d, device=settings.device)
        for eps, hindsight in needed.items():
            floor = eps * sigma[0].square().item()
            true = (sigma.square() + floor).log().sum()
            products, errors, hows = [], [], set()
            for seed in range(seeds):
                estimator = tgp.LogDet(eps=floor, probes=4, tol=0.005 * abs(true.item()), seed=seed)
                g = tgp.measure(model, x, layers="", estimator=estimator, normalize=False)[""]
                assert g.log_det is not None
                assert g.num_products is not None
                found = g.log_det.item() - (d - n) * math.log(floor)
                errors.append(abs(found - true.item()) / abs(true.item()))
                products.append(int(g.num_products))
                hows.add("exact" if "exact" in g.estimand else "deflated" if "deflated" in g.estimand else "Lanczos")
            products.sort()
            counts = f"{products[len(products) // 2]} ({products[0]}–{products[-1]})"
            known = "" if settings.quick else hindsight
            how = ", ".join(sorted(hows))
            yield f"| {kind} | {eps:g} | {known} | {counts} | {100 * max(errors):.2f} % | {how} |"
