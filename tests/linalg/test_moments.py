"""Scale and effective dimension from random frames: no bias, and errors that hold, against the dense values."""

import pytest
import torch

from torchgeom_probe.linalg.directions import orthonormal_frame
from torchgeom_probe.linalg.moments import _unbiased, frame_moments

SPECTRA = {
    "nearly isotropic": lambda i: 1 + 0.2 * torch.sin(i),
    "1/i": lambda i: 1 / i,
    "1/sqrt(i)": lambda i: i**-0.5,
    "exponential": lambda i: torch.exp(-i / 8),
    "rank 3": lambda i: (i <= 3).double(),
}


def _haar_frames(k, d, count):
    gaussian = torch.randn(count, d, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k * d))
    return torch.linalg.qr(gaussian).Q.mT  # signs do not matter to VᵀgV's spectrum


def _sigma(eigenvalues, frames):
    return torch.linalg.eigvalsh((frames * eigenvalues) @ frames.mT).clamp_min(0).flip(1).sqrt()


@pytest.mark.parametrize(("k", "d"), [(2, 5), (4, 7), (8, 23), (6, 7)])
def test_both_moments_are_without_bias_on_orthonormal_frames(k, d):
    eigenvalues = torch.arange(1.0, d + 1, dtype=torch.float64) ** 2
    energies = _sigma(eigenvalues, _haar_frames(k, d, 40_000)).square()
    square_of_trace, trace_of_square = _unbiased(energies.sum(1), energies.square().sum(1), k, d)
    for found, true in ((square_of_trace, eigenvalues.sum().square()), (trace_of_square, eigenvalues.square().sum())):
        assert abs(found.mean() - true) < 4 * found.std() / len(found) ** 0.5
    # The formula for independent Gaussian vectors is wrong by far more than that.
    energies = energies * d
    as_if = (k * energies.square().sum(1) - energies.sum(1).square()) / (k * (k - 1) * (k + 2))
    assert abs(as_if.mean() - eigenvalues.square().sum()) > 20 * trace_of_square.std() / len(as_if) ** 0.5


@pytest.mark.parametrize("name", SPECTRA)
def test_the_truth_lies_within_three_and_a_half_standard_errors(name):
    d, k, runs = 300, 8, 2000
    eigenvalues = SPECTRA[name](torch.arange(1.0, d + 1, dtype=torch.float64))
    found = frame_moments(_sigma(eigenvalues, _haar_frames(k, d, runs))[None], num_directions=k, num_inputs=d)
    scale = (eigenvalues.sum() / d).log() / 2
    dimension = eigenvalues.sum().square() / eigenvalues.square().sum()
    for value, error, true in (
        (found["scale"], found["scale_error"], scale),
        (found["effective_dimension"], found["effective_dimension_error"], dimension),
    ):
        assert ((value - true).abs() <= 3.5 * error).double().mean() >= 0.99
        assert error.median() < 2 * (value - true).square().mean().sqrt() + 1e-9  # and not by being huge


def test_several_frames_sharpen_both_numbers():
    d, k = 200, 8
    eigenvalues = 1 / torch.arange(1.0, d + 1, dtype=torch.float64)
    sigma = _sigma(eigenvalues, _haar_frames(k, d, 16 * 100)).view(16, 100, k)
    one, sixteen = (frame_moments(some, num_directions=k, num_inputs=d) for some in (sigma[:1], sigma))
    for name in ("scale_error", "effective_dimension_error"):
        ratio = (one[name].median() / sixteen[name].median()).item()
        assert 3 < ratio < 5.5, name
    true = eigenvalues.sum().square() / eigenvalues.square().sum()
    assert (sixteen["effective_dimension"] - true).abs().median() < 0.1 * true


def test_what_is_known_without_error():
    d = 9
    rank_one = _sigma(torch.eye(d, dtype=torch.float64)[0], _haar_frames(5, d, 50))[None]
    found = frame_moments(rank_one, num_directions=5, num_inputs=d)
    assert torch.allclose(found["effective_dimension"], torch.ones(50).double())
    isotropic = frame_moments(torch.full((1, 1, 5), 3.0), num_directions=5, num_inputs=d)
    assert torch.allclose(isotropic["effective_dimension"], torch.tensor([9.0]).double())
    assert isotropic["scale_error"] < 1e-6
    assert torch.allclose(isotropic["scale"].exp(), torch.tensor([3.0]).double())
    eigenvalues = torch.arange(1.0, d + 1, dtype=torch.float64)
    whole = frame_moments(
        _sigma(eigenvalues, orthonormal_frame(d, d, seed=0)[None])[None], num_directions=d, num_inputs=d
    )
    assert torch.allclose(whole["effective_dimension"], (eigenvalues.sum() ** 2 / eigenvalues.square().sum()).view(1))
    assert whole["scale_error"].item() == whole["effective_dimension_error"].item() == 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_few_directions_give_a_scale_alone(k):
    eigenvalues = 1 / torch.arange(1.0, 101.0, dtype=torch.float64)
    found = frame_moments(_sigma(eigenvalues, _haar_frames(k, 100, 1000))[None], num_directions=k, num_inputs=100)
    assert list(found) == ["scale", "scale_error"]
    off = (found["scale"] - (eigenvalues.sum() / 100).log() / 2).abs()
    assert (off <= 3.5 * found["scale_error"]).double().mean() > 0.98


def test_a_layer_that_is_zero_or_not_finite_has_no_numbers_and_spoils_none():
    sigma = torch.stack([torch.arange(8.0, 0, -1), torch.zeros(8), torch.full((8,), torch.nan)])[None]
    found = frame_moments(sigma, num_directions=8, num_inputs=50)
    assert found["scale"][1] == -torch.inf
    assert found["effective_dimension"][1:].isnan().all()
    alone = frame_moments(sigma[:, :1], num_directions=8, num_inputs=50)
    assert torch.equal(found["effective_dimension"][:1], alone["effective_dimension"])
