"""Reading and writing by an index, against torch.func.jvp."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dual.rules.comparison import Call, D, P, agreement, agreement_with_differences, call, index, mask, writes_through

from torchgeom_probe.dual import DualTensor

CASES = {
    "take": [call(D(3, 5), index(15, 7)), call(D(), index(1, 2))],
    "index_select": [call(D(3, 7), 1, index(7, 5)), call(D(3, 7), -1, index(7, 2))],
    "gather": [call(D(3, 7), 1, index(7, 3, 2)), call(D(3, 7), 0, index(3, 2, 5))],
    "__getitem__": [
        call(D(5, 7, 3), 2),
        call(D(5, 7, 3), torch.tensor(2)),
        call(D(5, 7, 3), np.int64(2)),
        call(D(5, 7, 3), (slice(None), 1)),
        call(D(5, 7, 3), (..., slice(1, None, 2))),
        call(D(5, 7, 3), (None, slice(1, 3), None, -1)),
        call(D(5, 7, 3), mask(5, 7)),
        call(D(5, 7, 3), index(5, 2, 3)),
        call(D(5, 7, 3), [0, 2]),
        call(D(5, 7, 3), ((0, 2), slice(None), (1, 2))),
        call(D(5, 7, 3), (slice(None), index(7, 4), 1)),
        call(D(5, 7, 3), (index(5, 4), index(7, 4))),
        call(D(5, 7, 3), (slice(None), index(7, 4), index(3, 4))),
        call(D(5, 7, 3), (index(5, 4), slice(None), index(3, 4))),
        call(D(5, 7, 3, 2), (slice(None), index(7, 2, 4), slice(1, None), [1, 0, 1, 1])),
    ],
    "__setitem__": [
        call(D(5, 7, 3), 2, D(7, 3)),
        call(D(5, 7, 3), (slice(None), 1), D(3)),
        call(D(5, 7, 3), (..., slice(1, None, 2)), 0.5),
        call(D(5, 7, 3), 0, D(1, 7, 3)),
        call(D(5, 7, 3), mask(5, 7), P()),
        call(D(5, 7, 3), index(5, 2), D(7, 3)),
        call(D(5, 7, 3), ..., D()),
        call(D(5, 3, 7, 4), (torch.tensor([0, 2]), slice(None), torch.tensor([3, 1])), D(2, 3, 4)),
        call(D(5, 3, 7, 4), (torch.tensor([0, 2]), slice(None), torch.tensor([3, 1])), D(3, 1)),
        call(D(5, 3, 7, 4), (torch.tensor([0, 2]), slice(None), torch.tensor([3, 1])), P(3, 4)),
    ],
    "scatter": [call(D(5, 7), 1, index(7, 5, 1), D(5, 1)), call(D(5, 7), 0, index(5, 1, 7), P(1, 7))],
    "scatter_add": [call(D(5, 7), 1, index(7, 5, 3), D(5, 3)), call(P(5, 7), -1, index(7, 5, 3), D(5, 3))],
    "index_add": [call(D(5, 7), 1, index(7, 3), D(5, 3)), call(P(5, 7), 0, index(5, 3), D(3, 7), alpha=2.0)],
    "index_copy": [call(D(5, 7), 1, torch.tensor([3, 1]), D(5, 2)), call(D(5, 7), 0, torch.tensor([3, 1]), P(2, 7))],
    "scatter_": [call(D(5, 7), 1, index(6, 5, 1), D(5, 1))],
    "scatter_add_": [call(D(5, 7), 1, index(6, 5, 3), D(5, 3))],
    "index_add_": [call(D(5, 7), 1, index(6, 3), D(5, 3))],
    "index_copy_": [call(D(5, 7), 1, torch.tensor([3, 1]), D(5, 2))],
    "masked_select": [call(D(5, 7), mask(5, 7)), call(D(5, 1), mask(3, 1, 7))],
    "select_scatter": [call(D(5, 7), D(5), 1, 2), call(P(5, 7), D(7), 0, 2), call(D(5, 7), P(5), -1, 3)],
    "slice_scatter": [call(D(5, 7), D(5, 3), 1, 2, 5), call(D(5, 7), D(2, 7), 0, start=1, step=2)],
    "index_fill": [call(D(5, 7), 1, index(7, 3), 2.5), call(D(5, 7), -1, index(7, 3), D())],
    "index_fill_": [call(D(5, 7), 1, index(6, 3), 2.5), call(D(5, 7), -1, index(6, 3), D())],
}
DIFFERENCES = {"index_fill": [call(P(), 0, index(1, 1), D()), call(P(5, 7), 0, index(5, 2), D())]}

test_rule_agrees_with_jvp = agreement(CASES)
test_rule_agrees_with_differences = agreement_with_differences(DIFFERENCES)


@pytest.mark.parametrize("case", CASES["__getitem__"][:4], ids=str)
def test_writing_to_a_view_writes_to_the_whole(case: Call) -> None:
    writes_through(torch.Tensor.__getitem__, case)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_a_list_of_lists_is_what_torch_takes_it_for() -> None:
    x = torch.randn(3, 4, 5)
    out = DualTensor(x.clone())[[[0, 1], [1, 2]]]
    for got, row in zip(out.buffer, x, strict=True):
        assert torch.equal(got, row[[[0, 1], [1, 2]]])
