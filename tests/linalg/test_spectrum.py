"""Moments of a density whose eigenvalues are known.  Densities of Lanczos runs: tests/estimators/test_logdet.py."""

import pytest
import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.linalg.spectrum import SpectralDensity


def test_chunks_join_to_one_density():
    one = SpectralDensity.of_singular_values(torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64), 5)
    run = SpectralDensity(torch.full((2, 3, 7), 4.0).double(), torch.full((2, 3, 7), 5 / 7).double(), 5, exact=False)
    both = SpectralDensity.joined([one, run])
    assert both.nodes.shape == (3, 3, 7)
    torch.testing.assert_close(both.trace()[0], torch.tensor([6.0, 20.0, 20.0], dtype=torch.float64))
    torch.testing.assert_close(both.log_det(1.0)[0][0], torch.tensor([5.0, 2.0, 2.0]).double().log().sum())
    torch.testing.assert_close(both.effective_rank()[0][1:], torch.full((2,), 5.0, dtype=torch.float64))
    assert not both.exact


def test_one_probe_has_no_standard_error():
    density = SpectralDensity(torch.ones(1, 1, 3), torch.ones(1, 1, 3), 3, exact=False)
    assert density.trace()[1].isnan().all()
    assert density.participation_ratio()[1].isnan().all()


def test_refused_arguments():
    exact = SpectralDensity.of_singular_values(torch.ones(1, 3), 3)
    with pytest.raises(ProbeError, match="needs a positive ε"):
        exact.log_det(0.0)
    with pytest.raises(ProbeError, match="a positive number of decades"):
        exact.per_decade(torch.zeros(1), width=0.0)
