"""Lanczos quadrature against dense quadratic forms."""

import problems
import pytest
import torch

from torchgeom_probe.linalg.lanczos import Bidiagonalisation, rademacher
from torchgeom_probe.linalg.operator import MatrixOperator


def _forms(gram, probes, function):
    values, vectors = torch.linalg.eigh(gram)
    return ((probes @ vectors).square() * function(values.clamp_min(0))).sum(1)


def test_gauss_and_radau_bracket_the_truth():
    model, _, _ = problems.problem("harmonic", n=60, d=90, dtype=torch.float64)
    jacobian, probes = model.weight.detach(), rademacher(3, 60, seed=1)
    exact = _forms(jacobian @ jacobian.T, probes, lambda values: (values + 1e-3).log())
    run = Bidiagonalisation(MatrixOperator(jacobian[None]), probes)
    widths = []
    for _ in range(12):
        run.step()
        rules = run.quadrature(radau=True), run.quadrature()
        lower, upper = ((weights * (nodes + 1e-3).log()).sum(2) for nodes, weights in rules)
        assert (lower[0] <= exact + 1e-9).all()
        assert (exact <= upper[0] + 1e-9).all()
        widths.append((upper - lower).max().item())
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.1 * widths[0]


@pytest.mark.parametrize(("n", "d"), [(20, 31), (31, 20)])
def test_m_nodes_are_exact_up_to_degree_2m_minus_1_also_outside_of_deflated_directions(n, d):
    generator = torch.Generator().manual_seed(3)
    jacobian = torch.randn(n, d, generator=generator, dtype=torch.float64) / 10
    gram = jacobian @ jacobian.T if n < d else jacobian.T @ jacobian
    probes = rademacher(5, 20, seed=2)
    top = torch.linalg.eigh(gram).eigenvectors[:, -3:].T
    for deflated in (None, top[None]):
        run = Bidiagonalisation(MatrixOperator(jacobian[None]), probes, deflated)
        left = probes if deflated is None else probes - probes @ top.T @ top
        torch.testing.assert_close(run.mass[0], left.square().sum(1))
        for _ in range(3):
            run.step()
        nodes, weights = run.quadrature()
        assert nodes.shape == weights.shape == (1, 5, run.steps)
        for degree in range(2 * run.steps):
            form = _forms(gram, left, lambda values, degree=degree: values**degree)
            torch.testing.assert_close((weights * nodes**degree).sum(2)[0], form)
