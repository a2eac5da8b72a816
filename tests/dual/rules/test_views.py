"""Views and what joins them, against torch.func.jvp; and writing to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from dual.rules.comparison import (
    LABELS,
    D,
    P,
    agreement,
    agreement_with_differences,
    call,
    cases_of,
    index,
    writes_through,
)

from torchgeom_probe.dual import DualTensor
from torchgeom_probe.errors import EngineRefusal

CASES = {
    "view": [call(D(2, 3, 5), 6, 5), call(D(2, 3, 5), (2, 15)), call(D(2, 3, 5), -1), call(D(), 1)],
    "reshape": [call(D(2, 3, 5), (6, 5)), call(D(2, 3, 5), shape=(5, -1))],
    "view_as": [call(D(2, 3, 5), P(6, 5))],
    "reshape_as": [call(D(2, 3, 5), P(6, 5)), call(P(6, 5), D(2, 3, 5))],
    "flatten": [call(D(2, 3, 5, 7), 1), call(D(2, 3, 5, 7), -2, -1), call(D(2, 3, 5, 7)), call(D())],
    "ravel": [call(D(2, 3))],
    "unflatten": [call(D(2, 15, 7), 1, (3, 5)), call(D(2, 15), -1, (3, -1))],
    "permute": [call(D(2, 3, 5), (2, 0, 1)), call(D(2, 3, 5), dims=(-1, 0, 1))],
    "transpose swapaxes swapdims": [
        call(D(2, 3, 5), 0, 2),
        call(D(2, 3, 5), -1, 1),
        call(D(5), 0, -1),
        call(D(), 0, -1),
    ],
    "movedim moveaxis": [call(D(2, 3, 5), 0, -1), call(D(2, 3, 5), (0, 1), (-1, 0)), call(D(), 0, -1)],
    "t": [call(D(3, 5)), call(D(3))],
    "mT mH adjoint": [call(D(2, 3, 5))],
    "T H flipud fliplr __iter__": [call(D(3, 5))],
    "unsqueeze": [call(D(3, 5), 1), call(D(3, 5), -1), call(D(), 0)],
    "squeeze": [call(D(1, 3, 1, 5)), call(D(1, 3, 1, 5), 2), call(D(1, 3, 1, 5), (0, -2)), call(D(3, 5), 1), call(D())],
    "expand": [call(D(3, 1), 3, 5), call(D(5), (2, 3, 5)), call(D(3, 1), -1, 5)],
    "broadcast_to": [call(D(3, 1), (2, 3, 5))],
    "expand_as": [call(D(3, 1), P(2, 3, 5)), call(P(3, 1), D(2, 3, 5)), call(D(), P())],
    "repeat": [call(D(3, 5), 2, 1, 3), call(D(3, 5), (2, 2))],
    "tile": [call(D(3, 5), (2,)), call(D(3, 5), (2, 1, 3))],
    "repeat_interleave": [call(D(3, 5), 2, 1), call(D(3, 5), torch.tensor([1, 0, 2]), dim=0), call(D(3, 5), 2)],
    "roll": [call(D(3, 5, 7), 2, 1), call(D(3, 5, 7), (1, -2), (-1, 0)), call(D(3, 5, 7), 2), call(D(5, 7), 1, [])],
    "flip": [call(D(3, 5, 7), (0, -1)), call(D(3, 5, 7), dims=[1])],
    "Tensor.flip": [call(D(3, 5, 7), 0, 2)],
    "tril triu": [call(D(2, 5, 7)), call(D(5, 7), -1), call(D(5, 7), diagonal=2)],
    "Tensor.unfold": [call(D(3, 11), 1, 3, 2), call(D(3, 11), -1, 2, 2)],
    "diagonal": [call(D(2, 5, 7)), call(D(2, 5, 5), 1, -2, -1)],
    "linalg.diagonal": [call(D(2, 5, 7))],
    "diag": [call(D(5)), call(D(5, 7), 1)],
    "diag_embed": [call(D(3, 5)), call(D(3, 5), 1, 0, 2)],
    "rot90": [call(D(3, 5)), call(D(3, 5, 7), 1, (1, 2))],
    "hsplit": [call(D(3, 6), 2)],
    "vsplit": [call(D(6, 5), 2)],
    "dsplit": [call(D(3, 5, 6), 2)],
    "conj conj_physical resolve_conj resolve_neg real imag view_as_real": [call(D(3, 5, dtype=torch.complex128))],
    "torch.real": [call(D(3, 5, dtype=torch.complex128)), call(D(3, 5))],
    "view_as_complex": [call(D(3, 5, 2))],
    "take_along_dim": [call(D(3, 5), index(5, 3, 2), 1)],
    "torch.atleast_1d torch.atleast_2d torch.atleast_3d": [call(D(5)), call(D(2, 3)), call(D(5), P(2, 3), D())],
    "VF.atleast_1d VF.atleast_2d VF.atleast_3d": [call([D(5), P()])],
    "fft ifft rfft fftshift ifftshift fftn ifftn rfftn ihfft fft2 ifft2 rfft2": [call(D(3, 5, 7))],
    "irfft irfftn irfft2 hfft": [call(D(3, 5, 7, dtype=torch.complex128))],
    "sum_to_size": [call(D(3, 5, 7), 5, 1)],
    "narrow": [call(D(3, 7), 1, 2, 3), call(D(3, 7), -1, 0, 2)],
    "select": [call(D(3, 7), 1, 2), call(D(3, 7), -2, -1)],
    "chunk unsafe_chunk": [call(D(3, 7), 2, 1), call(D(7, 3), 3), call(D(3, 7), chunks=2, dim=-1)],
    "split unsafe_split": [call(D(3, 7), 3, 1), call(D(7, 3), 2), call(D(3, 7), 3, dim=-1)],
    "split_with_sizes": [call(D(3, 7), (2, 5), 1)],
    "tensor_split": [call(D(3, 7), 3, 1), call(D(3, 7), (2, 5), dim=-1)],
    "unbind": [call(D(3, 5)), call(D(3, 5), -1)],
    "cat concat concatenate": [
        call([D(3, 5), D(2, 5)]),
        call([D(3, 5), P(3, 2), D(3, 7)], 1),
        call((P(3, 5), D(3, 5)), dim=-1),
        call([P(0), D(3, 5)], 1),
        call([P(0), D(3)]),
    ],
    "as_strided": [call(D(5, 7), (2, 3), (7, 2)), call(D(5, 7), (3, 2), (1, 7), 4)],
    "stack": [call([D(3, 5), P(3, 5)]), call([D(3, 5), D(3, 5)], 1), call([D(3, 5), D(3, 5)], dim=-1)],
    "hstack vstack dstack column_stack row_stack": [call([D(3, 5), P(3, 5)]), call([D(5), D(5)]), call([D(), P()])],
    "broadcast_tensors": [call(D(3, 1), P(5), D(2, 1, 1))],
    "meshgrid": [call(D(3), P(5), indexing="ij"), call(D(3), D(5), indexing="ij")],
}

DIFFERENCES = {
    "as_strided_scatter": [
        call(D(5, 7), D(2, 3), (2, 3), (7, 2)),
        call(D(5, 7), P(3, 2), (3, 2), (1, 7), 4),
        call(P(5, 7), D(3), (3,), (2,)),
    ]
}

test_rule_agrees_with_jvp = agreement(CASES)
test_rule_agrees_with_differences = agreement_with_differences(DIFFERENCES)


VIEWS = (
    "view reshape flatten ravel unflatten permute transpose movedim t mT T adjoint unsqueeze squeeze narrow select"
    " chunk split tensor_split unbind Tensor.unfold diagonal hsplit view_as reshape_as swapaxes split_with_sizes"
).split()


@pytest.mark.parametrize("name", VIEWS)
def test_writing_to_a_view_writes_to_the_whole(name: str) -> None:
    op = next(o for o in LABELS if {name, f"Tensor.{name}"} & set(LABELS[o]))
    writes_through(op, cases_of(op, CASES)[0])


def test_what_torch_copies_is_copied() -> None:
    x = DualTensor(torch.randn(3, 4, 6))
    before = x.buffer.clone()
    x[:, ::2][0].ravel().mul_(2)  # a strided row could be had as a view
    x[[0, 1]].mul_(2)
    assert torch.equal(x.buffer, before)


def test_what_torch_gives_as_a_view_is_one() -> None:
    views = {
        "a list of tensors": lambda z: torch.atleast_2d([z, z])[0],
        "places in memory": lambda z: z.as_strided((2, 3), (6, 2), 1),
        "places from where it starts": lambda z: z[1].as_strided((2, 3), (6, 2), z[1].storage_offset() + 1),
        "a 0-dim index": lambda z: z[torch.tensor(1)],
        "an axis of a row": lambda z: z[0].transpose(0, -1),
    }
    for name, view in views.items():
        x = DualTensor(torch.randn(3, 4, 6))
        rows = [row.clone() for row in x.buffer]
        view(x).mul_(2)
        for row in rows:
            view(row).mul_(2)
        assert torch.equal(x.buffer, torch.stack(rows)), name


def test_memory_that_is_laid_out_otherwise_is_refused() -> None:
    rows_inside = DualTensor(torch.randn(4, 3).t())
    with pytest.raises(EngineRefusal, match=r"as_strided\(\) reaches into memory"):
        rows_inside.as_strided((2,), (1,))


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.softmax(0),
        lambda x: x.log_softmax(1),
        lambda x: x / (2 + x.cos()),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: torch.maximum(x, 1 - x),
        lambda x: torch.hypot(x, 1 + x),
        lambda x: x % 0.7,
        lambda x: x.sort(0).values,
        lambda x: torch.zeros_like(x).copy_(x),
        lambda x: F.layer_norm(x, (3,)),
        lambda x: x.index_fill(0, torch.tensor([1]), 0.3),
    ],
)
def test_a_result_is_laid_out_as_the_plain_one(op: Callable[[torch.Tensor], torch.Tensor]) -> None:
    # reshape() gives a view of the one and a copy of the other, which a write in place tells apart
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    assert op(DualTensor(x.clone()).t()).stride() == op(x[0].t()).stride()
