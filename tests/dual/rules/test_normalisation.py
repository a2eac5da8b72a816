"""Normalisation layers in eval mode, against torch.func.jvp."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from dual.rules.comparison import IMAGE, SIGNAL, D, P, agreement, call, dual

from torchgeom_probe.dual import DualTensor
from torchgeom_probe.errors import ProbeError

CASES = {
    "F.batch_norm": [
        call(IMAGE, P(3), P(3, low=0.5), P(3), P(3)),
        call(D(5, 7), P(7), P(7, low=0.5), eps=0.1),
        call(SIGNAL, P(3), P(3, low=0.5), P(3)),
        call(SIGNAL, P(3), P(3, low=0.5), None, P(3)),
    ],
    "torch.batch_norm": [call(IMAGE, P(3), P(3), P(3), P(3, low=0.5), False, 0.1, 1e-5, False)],
    "F.layer_norm": [
        call(D(3, 5, 7), (7,), P(7), P(7)),
        call(D(3, 5, 7), (5, 7)),
        call(D(3, 5, 7), (5, 7), P(5, 7), None, 0.1),
        call(D(2, 97, 101), (101,), P(101), P(101)),
        call(D(2, 97, 101), (97, 101)),
    ],
    "torch.layer_norm": [call(D(3, 5, 7), (7,), P(7), P(7), 1e-5, False)],
    "group_norm": [
        call(D(2, 6, 5, 7), 3, P(6), P(6)),
        call(D(2, 6, 5), 2),
        call(D(5, 6), 2),
        call(D(2, 6, 61, 67), 3, P(6)),
    ],
    "F.instance_norm": [
        call(IMAGE, weight=P(3), bias=P(3)),
        call(SIGNAL),
        call(IMAGE, P(3), P(3, low=0.5), P(3), None, False),
    ],
    "torch.instance_norm": [call(IMAGE, P(3), P(3), None, None, True, 0.1, 1e-5, False)],
    "rms_norm": [call(D(3, 5, 7), (7,), P(7), 0.1), call(D(3, 5, 7), (5, 7)), call(D(3, 5, 7), (7,), eps=0.1)],
    "F.normalize": [call(D(3, 5, 7)), call(D(3, 5, 7), dim=-1), call(D(3, 5, 7), 2.0, 1, 100.0)],
}

test_rule_agrees_with_jvp = agreement(CASES)


def test_batch_statistics_are_refused() -> None:
    x = dual(torch.randn(5, 3), torch.randn(2, 5, 3))
    with pytest.raises(ProbeError, match="couples the samples"):
        F.batch_norm(x, torch.zeros(3), torch.ones(3), training=True)


def test_running_statistics_that_depend_on_the_input_keep_their_tangents() -> None:
    x, mean, var = (torch.randn(3, *shape).double() for shape in ((2, 5, 7), (5,), (5,)))

    def updated(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return torch.stack([0.9 * mean + 0.1 * x.mean((0, 2)), 0.9 * var + 0.1 * x.var(2).mean(0)])

    dual_x, *running = DualTensor(x), DualTensor(mean.clone()), DualTensor(var.clone())
    F.instance_norm(dual_x, *running, momentum=0.1)
    for row in (1, 2):
        value, pushed = torch.func.jvp(updated, (x[0], mean[0], var[0]), (x[row], mean[row], var[row]))
        assert torch.allclose(torch.stack([r.buffer[0] for r in running]), value)
        assert torch.allclose(torch.stack([r.buffer[row] for r in running]), pushed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("norm", "mean", "deviation"),
    [
        (lambda x: F.layer_norm(x, (64,)), 100, 2),
        (lambda x: F.group_norm(x, 4), 100, 2),
        (lambda x: torch.stack(torch.var_mean(x, 1)), 100, 2),
        (lambda x: F.rms_norm(x, (64,)), 0, 1000),  # whose squares have no float16
        (lambda x: F.rms_norm(x, (64,)), 0, 1e-3),  # to which ε is that of float32
    ],
)
def test_statistics_of_a_narrow_type_are_held_as_torch_holds_them(
    norm: Callable[[torch.Tensor], torch.Tensor], mean: float, deviation: float, dtype: torch.dtype
) -> None:
    x, t = (torch.randn(3, 64) * deviation + mean).to(dtype), torch.randn(3, 64).to(dtype)
    out, tangent = norm(dual(x, t[None])), torch.func.jvp(norm, (x.float(),), (t.float(),))[1]
    torch.testing.assert_close(out.primal, norm(x), rtol=2e-2, atol=1e-3)
    assert (out.tangents[0] - tangent).norm() < 0.02 * tangent.norm()
