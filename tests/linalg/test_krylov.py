"""The parts of a Krylov step in plain dense algebra.  Values and bounds: test_stopping.py and
tests/estimators/test_topk.py."""

import problems
import pytest
import torch

from torchgeom_probe.linalg.krylov import _Space, leading
from torchgeom_probe.linalg.operator import MatrixOperator


@pytest.mark.parametrize("spans", [True, False], ids=["spans", "falls short"])
def test_after_a_push_the_residuals_are_those_of_the_left_pairs(spans):
    """V and U of one step, with a fresh block that spans what JᵀU has outside of V; or not, as after a warm start."""
    jacobian = problems.linear(problems.spectrum("harmonic", 30), 30, 50, dtype=torch.float64).weight.detach()
    generator = torch.Generator().manual_seed(3)
    v = problems.orthonormal(50, 4, generator).T
    space = _Space(MatrixOperator(jacobian[None]), v[None])
    space.push(v[None], at=[0])
    space.pull()
    (u,), (pulled,) = space.left, space.pulled
    torch.testing.assert_close(pulled, u @ jacobian)
    beyond = pulled - pulled @ v.T @ v if spans else torch.randn(4, 50, generator=generator).double()
    fresh = torch.linalg.qr((beyond - beyond @ v.T @ v).T).Q.T
    space.push(fresh[None], at=[0])
    values, residuals = space.left_pairs(4)
    if not spans:
        assert residuals.isinf().all()
        return
    left, sigma, vectors = torch.linalg.svd(pulled, full_matrices=False)
    torch.testing.assert_close(values[0], sigma, rtol=1e-12, atol=0)
    expected = vectors @ jacobian.T - sigma[:, None] * (left.T @ u)
    torch.testing.assert_close(residuals[0].norm(dim=1), expected.norm(dim=1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [1, 7])
def test_vectors_are_singular_pairs_of_what_was_found(k):
    jacobian = problems.linear(problems.spectrum("geometric", 40), 40, 60, dtype=torch.float64).weight.detach()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 4, 60, generator=generator, dtype=torch.float64)
    found = leading(
        MatrixOperator(jacobian.expand(2, -1, -1)),
        start,
        k=k,
        block=4,
        tolerance=1e-6,
        max_products=400,
        generator=generator,
    )
    assert found.converged.all()
    torch.testing.assert_close(found.values, torch.linalg.svdvals(jacobian)[:k].expand(2, -1), rtol=1e-6, atol=0)
    right, left = found.vectors[:, :k], found.left[:, :k]
    identity = torch.eye(k, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(right @ right.mT, identity)
    torch.testing.assert_close(left @ left.mT, identity)
    torch.testing.assert_close(right @ jacobian.T, found.values[:, :, None] * left, rtol=0, atol=1e-3 * 10 ** (-k / 4))
