"""Ranks and log-volumes of singular values that are known, and Jacobians made regular."""

import math

import pytest
import torch

from torchgeom_probe.linalg.volume import log_volume, rank_tolerance, regular


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_below_the_rounding_of_the_tangents_has_no_volume(dtype):
    tolerance = rank_tolerance(dtype)
    sigma = torch.tensor([[2.0, 4 * tolerance], [2.0, tolerance], [0.0, 0.0], [math.inf, 1.0]], dtype=torch.float64)
    volume, rank, pseudo = log_volume(sigma, num_directions=2, tolerance=tolerance)
    torch.testing.assert_close(volume[0].item(), math.log(8 * tolerance))
    assert volume[1:3].tolist() == [-math.inf, -math.inf]
    assert rank.tolist() == [2, 1, 0, -1]
    torch.testing.assert_close(pseudo[:3].tolist(), [math.log(8 * tolerance), math.log(2), 0.0])
    assert volume[3].isnan()
    assert pseudo[3].isnan()


def test_without_any_value_the_rank_is_zero():
    volume, rank, pseudo = log_volume(torch.zeros(2, 0), num_directions=1, tolerance=1e-6)
    assert volume.tolist() == [-math.inf] * 2
    assert rank.tolist() == pseudo.tolist() == [0, 0]


def test_regular_scales_so_that_nothing_underflows():
    # LAPACK rescales by itself; a batched QR that squares float32 numbers of 1e-30 does not, so it gets none
    # of these.
    J = torch.full((2, 3, 2), 1e-30) * torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]])
    scaled, scale, defect = regular(J)
    assert scaled.abs().amax((1, 2)).tolist() == [1, 1]
    torch.testing.assert_close(scaled * scale[:, None, None], J)
    assert defect.tolist() == [0, 0]
