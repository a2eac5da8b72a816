"""Arguments whose derivative torch drops, and changes of shape in place: refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from dual.rules.comparison import Call, dual

import torchgeom_probe as tgp
from torchgeom_probe.dual import DualTensor
from torchgeom_probe.errors import EngineRefusal, ProbeError

CASES: dict[str, list[Call]] = {}
X, LABELS = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])


@pytest.mark.parametrize(
    "op",
    [
        lambda w: F.cross_entropy(X, LABELS, w),
        lambda w: F.nll_loss(X, LABELS, weight=w),
        lambda w: F.embedding(LABELS, w.expand(3, 3), None, 1.0),
        lambda w: F.soft_margin_loss(X, w),
        lambda w: torch.cov(X.mT @ X, aweights=w),
    ],
)
def test_a_derivative_that_torch_drops_is_refused_in_every_engine(op: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(ProbeError, match="torch drops the derivative of") as raised:
        op(dual(torch.rand(3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)))
    assert not isinstance(raised.value, EngineRefusal)


def test_the_same_ops_are_followed_in_their_other_arguments() -> None:
    x = dual(X, torch.randn(2, 4, 3, dtype=torch.float64))
    weight = torch.rand(3, dtype=torch.float64)
    push = torch.func.jvp(lambda z: F.cross_entropy(z, LABELS, weight), (X,), (x.tangents[1],))[1]
    torch.testing.assert_close(F.cross_entropy(x, LABELS, weight).tangents[1], push)


ZERO = torch.tensor(0, dtype=torch.int32)


@pytest.mark.parametrize("engine", ["fused", "functorch"])
@pytest.mark.parametrize(
    "op",
    [
        lambda h: torch.bincount(torch.tensor([0, 1, 1]), weights=h),
        lambda h: torch.heaviside(torch.tensor([0.0, 1.0, 0.0], dtype=h.dtype), h),
        lambda h: torch.zeros(3, dtype=h.dtype).heaviside_(h),
        lambda h: torch.fake_quantize_per_tensor_affine(torch.ones(3, dtype=h.dtype), h.square().sum(), ZERO, -9, 9),
        lambda h: torch.full_like(h, h.sum()),
        lambda h: h.new_full((3,), fill_value=h.sum()),
        lambda h: (out := h * 1.0, torch.floor(h, out=out))[0],
    ],
)
def test_what_is_constant_in_its_first_argument_alone_is_refused(
    engine: str, op: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.stack([op(row) for row in x])

    probe = tgp.GeometryProbe(Model(), layers=[""], engine=engine, estimator=tgp.Exact())
    with pytest.raises(ProbeError):
        probe.measure(torch.rand(1, 3, dtype=torch.float64))


@pytest.mark.parametrize("engine", ["fused", "functorch"])
@pytest.mark.parametrize(
    "op",
    [
        lambda h: torch.add(h, h.cos(), alpha=h.mean()),
        lambda h: (h * 1.0).sub_(h.cos(), alpha=h.mean()),
        lambda h: F.leaky_relu(-h, h.mean()),
        lambda h: F.softplus(h, beta=1 + h.mean()),
        lambda h: torch.nan_to_num(h * torch.nan, nan=h.mean()),
    ],
)
def test_a_tensor_that_torch_reads_as_a_number_is_refused(
    engine: str, op: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([op(row) for row in x])

    probe = tgp.GeometryProbe(Model(), layers=[""], engine=engine, estimator=tgp.Exact())
    with pytest.raises(ProbeError, match="for a plain number"):
        probe.measure(torch.rand(1, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.t_(),
        lambda x: x.transpose_(0, 1),
        lambda x: x.swapaxes_(0, 1),
        lambda x: x.unsqueeze_(0),
        lambda x: x.as_strided_((2, 2), (1, 4)),
    ],
)
def test_a_change_of_shape_in_place_is_refused(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = DualTensor(torch.randn(3, 4, 4))
    before = x.buffer.clone()
    with pytest.raises(EngineRefusal, match="changes the shape of a tensor in place"):
        change(x)
    assert torch.equal(x.buffer, before)
    assert x.squeeze_() is x
