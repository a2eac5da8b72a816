"""Orthonormal blocks: the span, its dimension, and samples that leave each other alone."""

import torch

from torchgeom_probe.linalg.orthonormal import orthonormal

EPS = torch.finfo(torch.float64).eps


def test_rows_span_the_block_outside_of_what_is_there():
    there = torch.linalg.qr(torch.randn(2, 11, 3, dtype=torch.float64)).Q.mT
    block = torch.randn(2, 5, 11, dtype=torch.float64)
    block[0, 4] = block[0, 0] - 3 * block[0, 1]  # dependent on the others
    block[1, 2:] = there[1]  # inside of what is there
    rows = orthonormal(block, there, eps=EPS)
    assert rows.square().sum((1, 2)).round().tolist() == [4, 2]
    gram = rows @ rows.mT
    torch.testing.assert_close(gram, torch.diag_embed(gram.diagonal(dim1=1, dim2=2)))
    assert (rows @ there.mT).abs().max() < 1e-14
    outside = block - block @ there.mT @ there
    torch.testing.assert_close(outside @ rows.mT @ rows, outside)


def test_what_is_below_the_noise_is_zero_and_a_diverged_sample_stays_alone():
    block = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1e-9, 0.0]]] * 2, dtype=torch.float64)
    assert orthonormal(block, None, eps=EPS).square().sum((1, 2)).tolist() == [2, 2]
    assert orthonormal(block, None, eps=EPS, noise=1e-8).square().sum((1, 2)).tolist() == [1, 1]
    block[1] = torch.nan
    rows = orthonormal(block, None, eps=EPS)
    torch.testing.assert_close(rows[0] @ rows[0].T, torch.eye(2, dtype=torch.float64))
    assert rows[1].abs().max() == 0  # its products tell
