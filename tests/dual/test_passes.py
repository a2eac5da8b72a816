"""The pass that is running: where its tensors can be read, and what it shares with its rules."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.dual import DualTensor, dual_pass, recording
from torchgeom_probe.dual.passes import current_pass
from torchgeom_probe.errors import ProbeError


def test_a_tensor_lives_as_long_as_its_pass() -> None:
    with dual_pass():
        outer = DualTensor(torch.ones(3, 2))
        with dual_pass(), pytest.raises(ProbeError, match="kept a tensor of an earlier measurement"):
            outer * 2
        assert torch.equal((outer * 2).buffer, 2 * torch.ones(3, 2))
    with pytest.raises(ProbeError, match="kept a tensor of an earlier measurement"):
        outer * 2


def test_recording_is_of_the_same_pass() -> None:
    x, weight = torch.randn(3, 2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    with dual_pass(), torch.no_grad():
        image = DualTensor(x.clone())
        with recording() as used:
            y = F.conv2d(image, weight)
            assert y._buffer is None
        image.mul_(2)  # builds what is deferred first
        torch.testing.assert_close(y.primal, F.conv2d(x[0], weight))
    assert used == {"fused": {"conv2d"}, "fallback": set(), "refused": set()}


def test_outside_of_a_pass_nothing_is_deferred_or_recorded() -> None:
    y = F.conv2d(DualTensor(torch.randn(3, 2, 3, 5, 5)), torch.randn(4, 3, 3, 3))
    assert y._buffer is not None
    assert (current_pass().deferred, current_pass().known, current_pass().used) == (None, None, None)


def test_each_thread_has_a_pass_of_its_own() -> None:
    barrier, buffer = Barrier(2), torch.randn(3, 5)

    def run(scale: float) -> torch.Tensor:
        with dual_pass():
            x = DualTensor(buffer)
            barrier.wait(timeout=60)  # now both passes have begun
            out = (x * scale).buffer
            barrier.wait(timeout=60)
            return out

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, (2.0, 3.0)))
    assert torch.equal(found[0], 2 * buffer)
    assert torch.equal(found[1], 3 * buffer)


class Branches(nn.Module):
    """Computes in threads of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 7), nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(2) as pool:
            left, right = pool.map(lambda branch: branch(x), (self.left, self.right))
        return torch.tanh(left * right)


def test_a_model_with_threads_of_its_own_is_refused_with_a_way_out() -> None:
    model, x = Branches(), torch.randn(3, 5)
    with pytest.raises(ProbeError, match=r"threads of its own(.|\n)*Measure it with engine='vjp'"):
        tgp.measure(model, x, layers="", estimator=tgp.Exact())
    with pytest.raises(ProbeError, match=r"the tangents of the engine 'functorch' are lost"):
        tgp.measure(model, x, layers="", estimator=tgp.Exact(), engine="functorch")
    assert not any(module._forward_pre_hooks for module in model.modules())
    found = tgp.measure(model, x, layers="", estimator=tgp.Exact(), engine="vjp")[""]
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: torch.tanh(model.left(z) * model.right(z))))(x)
    sigma = torch.linalg.svdvals(jacobian / 7**0.5)
    torch.testing.assert_close(found.log_volume.float(), sigma.log().sum(1), rtol=1e-4, atol=1e-4)
