"""Frames: orthonormal all; of low frequencies; of the data's leading principal directions."""

import pytest
import scipy.fft
import torch

from torchgeom_probe import ProbeError
from torchgeom_probe.linalg.directions import orthonormal_frame, principal_frame, smooth_frame
from torchgeom_probe.linalg.krylov import random_block
from torchgeom_probe.linalg.operator import MatrixOperator


@pytest.mark.parametrize("shape", [(3, 17, 19), (1, 23), (29,), (2, 5, 7, 11), (3, 2, 2)])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_smooth_frames_are_orthonormal_and_hold_the_lowest_frequencies_alone(shape, k):
    frame = smooth_frame(k, shape, seed=3)
    assert torch.allclose(frame @ frame.T, torch.eye(k, dtype=torch.float64))
    space = tuple(range(1, len(shape))) if len(shape) > 2 else tuple(range(len(shape)))
    waves = scipy.fft.dctn(frame.view(k, *shape).numpy(), type=2, norm="ortho", axes=[1 + a for a in space])
    needed = 4
    while torch.tensor([min(needed, n) if a in space else n for a, n in enumerate(shape)]).prod() < k:
        needed += 1
    for axis in space:
        high = torch.tensor(waves).movedim(1 + axis, 0)[needed:]
        assert high.numel() == 0 or high.abs().max() < 1e-12


def test_a_smooth_frame_has_a_seed_and_all_directions_where_k_asks_for_them():
    assert not torch.allclose(smooth_frame(4, (3, 8, 8), seed=0), smooth_frame(4, (3, 8, 8), seed=1))
    whole = smooth_frame(12, (3, 2, 2), seed=0)
    assert torch.allclose(whole.T @ whole, torch.eye(12, dtype=torch.float64))
    with pytest.raises(ProbeError, match="d=12"):
        smooth_frame(13, (3, 2, 2), seed=0)


def test_the_data_frame_spans_the_leading_principal_directions():
    directions = orthonormal_frame(7, 30, seed=5)
    spread = torch.tensor([9.0, 7.0, 5.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    weights = torch.linalg.qr(torch.randn(40, 8, generator=generator, dtype=torch.float64)).Q
    weights = torch.linalg.qr(weights - weights.mean(0)).Q[:, :7]
    points = 100 + (weights * spread) @ directions
    frame = principal_frame(3, points.view(40, 5, 6))
    assert torch.allclose(frame @ frame.T, torch.eye(3, dtype=torch.float64))
    assert torch.allclose((frame @ directions[:3].T).square().sum(1), torch.ones(3, dtype=torch.float64))


def test_data_that_span_too_little_are_refused_with_what_they_span():
    points = torch.randn(4, 11)
    with pytest.raises(ProbeError, match=r"4 points span 3 directions.*k=4.*\n.*Subspace\(k=3, frame='data'\)"):
        principal_frame(4, points)
    assert principal_frame(3, points).shape == (3, 11)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_no_direction_is_what_randn_of_the_same_seed_is(k):
    """Or x would be its own direction, to which every normalisation is blind."""
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    frame = orthonormal_frame(k, 48, seed=0)
    start = random_block(MatrixOperator(torch.eye(48, dtype=torch.float64)[None]), k, torch.Generator().manual_seed(0))
    for rows in (frame, start[0]):
        assert (rows @ x.T).norm(dim=0).max() < 0.7
