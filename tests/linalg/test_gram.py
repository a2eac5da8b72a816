"""Factors against the SVD of all tangents; inner products in blocks and in pieces; streamed rows give what whole rows
give."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchgeom_probe.linalg import gram
from torchgeom_probe.linalg.gram import Factor, inner_products, streamed_factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "sizes"), [(3, [101]), (5, [7, 1, 13]), (29, [11, 2]), (7, [3, 4])])
def test_a_factor_has_the_singular_values_of_all_blocks_together(count, sizes, dtype):
    blocks = [torch.randn(count, 2, n, dtype=torch.float64).to(dtype) for n in sizes]
    expected = torch.linalg.svdvals(torch.cat(blocks, dim=2).double().transpose(0, 1))
    factor = Factor.of(blocks)
    torch.testing.assert_close(factor.singular_values(), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(factor.scaled(3.0).singular_values(), 3 * expected, rtol=1e-7, atol=1e-7)
    assert factor.scaled(1.0) is factor
    assert factor.dtype == factor.scaled(3.0).dtype == dtype
    assert (factor.triangle is None) == (dtype != torch.float64)


def test_float64_keeps_what_a_gram_matrix_would_lose_and_a_diverged_sample_is_nan_alone():
    tangents = torch.zeros(2, 3, 5, dtype=torch.float64)
    tangents[0, :, 0], tangents[1, :, 1] = 1.0, 1e-12
    tangents[0, 1, 3] = torch.nan
    sigma = Factor.of([tangents]).singular_values()
    torch.testing.assert_close(sigma[0], torch.tensor([1.0, 1e-12], dtype=torch.float64), rtol=1e-12, atol=0)
    assert Factor.of([tangents.float()]).singular_values().isnan().all(1).tolist() == [False, True, False]
    assert sigma.isnan().all(1).tolist() == [False, True, False]


def test_features_of_different_precision_are_as_coarse_as_the_coarsest():
    assert Factor.of([torch.ones(2, 1, 5), torch.ones(2, 1, 3).bfloat16()]).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("share", [2.0, 0.6, 0.3, 0.1])
@pytest.mark.parametrize(("count", "length"), [(13, 101), (101, 13), (29, 29)])
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_streamed_factor_is_the_whole_one(count, length, share, dtype, at_once):
    rows = torch.randn(count, 2, length, dtype=dtype)
    made = 0

    def some(start, stop):
        nonlocal made
        assert stop - start <= at_once
        made += stop - start
        return rows[start:stop].clone()

    itemsize = rows.element_size()
    budget = int(share * count * 2 * length * itemsize)
    factor = streamed_factor(
        some, count=count, length=length, at_once=at_once, batch=2, budget=budget, itemsize=itemsize
    )
    expected = torch.linalg.svdvals(rows.double().transpose(0, 1))
    accuracy = 1e-12 if dtype == torch.float64 and share > 1 else 2e-7
    torch.testing.assert_close(factor.singular_values(), expected, rtol=1e-6, atol=accuracy * expected.max().item())
    if share > 1 or length < count:
        assert made == count
    else:
        held = max(1, int(budget / 4 // (2 * length * itemsize)))
        assert made <= (1 + math.ceil(count / held)) / 2 * count + count


def test_inner_products_in_blocks_of_columns_are_float64():
    left, right = torch.randn(5, 3, 200_001), torch.randn(7, 3, 200_001)
    expected = torch.einsum("pbn,qbn->bpq", left.double(), right.double())
    torch.testing.assert_close(inner_products(left, right), expected, rtol=1e-12, atol=1e-9)


class LargestResult(TorchDispatchMode):
    """The bytes of the largest tensor that any op made."""

    def __init__(self):
        super().__init__()
        self.bytes, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and not func._schema.is_mutable:
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        self.products += func.overloadpacket.__name__ == "bmm"
        return out


@pytest.mark.parametrize(("batch", "length"), [(8, 65_536), (3, 10_007), (1, 200_001), (2, 900), (2000, 11)])
@pytest.mark.parametrize("same", [True, False])
def test_pieces_side_by_side_as_on_a_gpu_are_the_same_products(batch, length, same, monkeypatch):
    monkeypatch.setattr(gram, "_SIDE_BY_SIDE", {"cpu": 1024})
    monkeypatch.setattr(gram, "_BLOCK_BYTES", {"cpu": 1 << 20})
    left = torch.randn(length, batch, 3).permute(2, 1, 0)  # strided in every axis
    right = left if same else torch.randn(5, batch, length)
    expected = torch.einsum("pbn,qbn->bpq", left.double(), right.double())
    with LargestResult() as largest:
        products = inner_products(left, right)
    torch.testing.assert_close(products, expected, rtol=1e-12, atol=1e-9)
    assert largest.bytes <= max(1 << 20, expected.nbytes)
    assert (largest.products > 0) == (length >= 2048)


def test_pieces_are_not_shorter_than_what_their_products_would_take(monkeypatch):
    monkeypatch.setattr(gram, "_SIDE_BY_SIDE", {"cpu": 1024})
    rows = torch.randn(300, 1, 5_000)
    with LargestResult() as largest:
        products = inner_products(rows, rows)
    assert largest.bytes <= 2 << 20
    torch.testing.assert_close(products[0], rows[:, 0].double() @ rows[:, 0].double().T)


@pytest.mark.parametrize("length", [100_003, 1 << 20, 77])
def test_on_a_gpu_the_pieces_fill_it(length):
    with FakeTensorMode():
        rows = torch.empty(3, 2, length, device="cuda")
        with LargestResult() as made:
            products = inner_products(rows, rows)
        pieces = gram._pieces(rows.transpose(0, 1), rows.transpose(0, 1))
    assert (products.device.type, products.shape, products.dtype) == ("cuda", (2, 3, 3), torch.float64)
    assert made.products == (length > 2048)
    assert pieces == {100_003: 64, 1 << 20: 512, 77: 1}[length]
