"""The thresholds of the stopping rule: over many spectra and seeds no bound may be below the error."""

import math

import problems
import pytest
import torch

from torchgeom_probe.linalg.krylov import leading
from torchgeom_probe.linalg.operator import MatrixOperator

N, D, SEEDS = 256, 512, 120


def _network(model, x):
    jacobian = torch.func.jacrev(lambda z: model(z[None])[0].flatten())(x)
    return jacobian.flatten(1).detach()


def _matrix(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    i = torch.arange(1, N + 1, dtype=torch.float64)
    torch.manual_seed(seed)
    if kind == "gaussian":
        return torch.randn(N, D, generator=generator, dtype=torch.float64) / math.sqrt(D)
    if kind == "mlp":
        return _network(problems.mlp((D, N, N, N)).double(), torch.randn(D, dtype=torch.float64))
    if kind == "resnet":
        model = problems.resnet((4, 8, 8, 8)).double()
        return _network(model, torch.randn(3, 16, 16, dtype=torch.float64))
    sigma = {
        "geometric": 10 ** (-i / 4),
        "harmonic": 1 / i,
        "slow": i**-0.3,
        "steps": 10 ** (-((i - 1) // 3) / 6),
        "pairs": 1 / (1 + (i - 1) // 2),
        "gap": torch.where(i <= 8, 1.0, 0.05 * (1 - i / 2 / N)),
    }[kind]
    return (problems.orthonormal(N, N, generator) * sigma) @ problems.orthonormal(D, N, generator).T


KINDS = ["geometric", "harmonic", "gaussian", "slow", "steps", "pairs", "gap", "mlp", "resnet"]


def _found(matrices, start, k, tolerance, *, warm=False):
    found = leading(
        MatrixOperator(matrices),
        start,
        k=k,
        block=4,
        tolerance=tolerance,
        max_products=4 * N,
        generator=torch.Generator().manual_seed(6),
        warm=warm,
    )
    errors = torch.linalg.svdvals(matrices)[:, :k].log() - found.values.log()
    assert found.converged.all()
    assert (errors.sum(1) <= found.bound + 1e-12).all()
    assert (errors.abs().amax(1) <= tolerance * math.log(10)).all()
    assert (found.bound <= k * tolerance * math.log(10) * (1.51 if warm else 1.01)).all()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_bound_is_below_the_error(kind):
    matrices = torch.stack([_matrix(kind, seed) for seed in range(SEEDS)])
    for k in (1, 3, 10):
        for tolerance in (1e-2, 1e-3):
            generator = torch.Generator().manual_seed(5)
            start = torch.randn(SEEDS, 4, matrices.shape[2], generator=generator, dtype=torch.float64)
            _found(matrices, start, k, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nor_after_a_warm_start(kind):
    matrices = torch.stack([_matrix(kind, seed) for seed in range(SEEDS)])
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(SEEDS, 4, matrices.shape[2], generator=generator, dtype=torch.float64)
    before = _found(matrices, start, 10, 1e-3)
    change = torch.randn(matrices.shape, generator=generator, dtype=torch.float64)
    for size in (1e-4, 1e-3, 1e-2):
        moved = matrices + size * matrices.square().mean((1, 2), keepdim=True).sqrt() * change
        warm = _found(moved, before.vectors, 10, 1e-3, warm=True)
        if size < 1e-3:  # a larger change drowns what decays fast
            assert warm.products.double().mean() < before.products.double().mean()
