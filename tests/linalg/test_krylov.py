"""The parts of a Krylov step in plain dense algebra.  Values and bounds: test_stopping.py and
tests/estimators/test_topk.py."""

import problems
import pytest
import torch

from torchgeom_probe.linalg.krylov import _Space, leading, random_block
from torchgeom_probe.linalg.operator import MatrixOperator


def test_what_a_half_step_says_of_the_pairs_before_it():
    """Values and residuals in plain dense algebra: after a push those of JᵀU's pairs, after a pull those of JV's."""
    jacobian = problems.linear(problems.spectrum("harmonic", 30), 30, 50, dtype=torch.float64).weight.detach()
    generator = torch.Generator().manual_seed(3)
    v = problems.orthonormal(50, 4, generator).T
    space = _Space(MatrixOperator(jacobian[None]), v[None], [0], generator)
    for _ in range(2):
        space.half_step()
        (right,), (left,) = space.right.rows, space.left.rows
        torch.testing.assert_close(left @ jacobian @ right.T, space.matrix[0], rtol=0, atol=1e-12)
        after_push = space.values[0]
        u, sigma, v = torch.linalg.svd(jacobian @ right.T, full_matrices=False)
        torch.testing.assert_close(after_push, sigma)
        expected = jacobian.T @ u - right.T @ v.T * sigma
        space.half_step()
        torch.testing.assert_close(space.before[0][0], sigma)
        torch.testing.assert_close(space.before[1][0].norm(dim=1), expected.norm(dim=0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(space.values[0], torch.linalg.svdvals(left @ jacobian))


@pytest.mark.parametrize("k", [1, 7])
def test_vectors_are_singular_pairs_of_what_was_found(k):
    jacobian = problems.linear(problems.spectrum("geometric", 40), 40, 60, dtype=torch.float64).weight.detach()
    generator = torch.Generator().manual_seed(0)
    operator = MatrixOperator(jacobian.expand(2, -1, -1))
    found = leading(
        operator,
        random_block(operator, 4, generator),
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
