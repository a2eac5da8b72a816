"""Random small programs over many ops, views and writes in place, against central differences in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from torchgeom_probe.dual import DualTensor, dual_pass

Step = Callable[[list[torch.Tensor], int, int], torch.Tensor]

#: Each takes the tensors so far and two numbers that choose among them; all tensors are [3, 4].
STEPS: dict[str, Step] = {
    "sin": lambda ts, i, j: ts[i].sin(),
    "tanh": lambda ts, i, j: torch.tanh(ts[i]),
    "gelu": lambda ts, i, j: F.gelu(ts[i]),
    "sigmoid": lambda ts, i, j: torch.sigmoid(ts[i]),
    "relu": lambda ts, i, j: F.relu(ts[i]),
    "abs": lambda ts, i, j: ts[i].abs(),
    "exp": lambda ts, i, j: ts[i].clamp(-2, 2).exp(),
    "log": lambda ts, i, j: (ts[i] ** 2 + 1).log(),
    "round": lambda ts, i, j: ts[i].round() + ts[j],
    "softmax": lambda ts, i, j: ts[i].softmax(j % 2),
    "layer_norm": lambda ts, i, j: F.layer_norm(ts[i], (4,)),
    "cumsum": lambda ts, i, j: ts[i].cumsum(axis=j % 2),
    "sort": lambda ts, i, j: ts[i].sort(dim=j % 2).values,
    "max": lambda ts, i, j: ts[i] - ts[j].max(axis=1, keepdims=True).values,
    "mean": lambda ts, i, j: ts[i] * ts[j].mean(dim=[], keepdim=True),
    "add": lambda ts, i, j: ts[i] + 0.5 * ts[j],
    "mul": lambda ts, i, j: torch.mul(ts[i], x2=ts[j]),
    "div": lambda ts, i, j: ts[i] / (1 + ts[j] ** 2),
    "where": lambda ts, i, j: torch.where(ts[i] > ts[j], ts[i], 0.5 * ts[j]),
    "matmul": lambda ts, i, j: ts[i] @ (ts[j].mT @ ts[j]) / 4,
    "einsum": lambda ts, i, j: torch.einsum("ab,cb->ac", ts[i], ts[j]) @ ts[i] / 4,
    "cat": lambda ts, i, j: torch.cat([ts[i][:, :2], ts[j][:, 2:]], 1),
    "roll": lambda ts, i, j: ts[i].roll(j, 1),
    "flip": lambda ts, i, j: ts[i].flip(0),
    "transposed": lambda ts, i, j: ts[i].t().reshape(3, 4),
    "gather": lambda ts, i, j: ts[i].gather(1, torch.arange(12).reshape(3, 4) * (j + 1) % 4),
    "detach": lambda ts, i, j: ts[i] + (ts[j] - ts[i]).detach(),
    "copy": lambda ts, i, j: ts[i].clone() * torch.as_tensor(ts[j]),
    "mul_": lambda ts, i, j: ts[i].mul_(0.5 + ts[j].sigmoid()),
    "square_": lambda ts, i, j: ts[i].mul_(ts[i]).tanh_(),
    "column_": lambda ts, i, j: (ts[i][:, j % 4].mul_(0.5), ts[i])[1],
    "setitem_": lambda ts, i, j: (ts[i].__setitem__((slice(None), 0), ts[j].cos()[:, 1]), ts[i])[1],
    "fill_": lambda ts, i, j: (ts[i][j % 3].fill_(0.3), ts[i])[1],
    "data_": lambda ts, i, j: (ts[i].data[:, 1:3].add_(ts[j][:, 1:3]), ts[i])[1],
    "cumprod": lambda ts, i, j: ts[i].tanh().cumprod(1),
    "norm": lambda ts, i, j: ts[i] / (1 + torch.linalg.vector_norm(ts[j], axis=1, keepdims=True)),
}
PROGRAMS = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5), st.integers(0, 5)), max_size=8)


def run(program: list[tuple[str, int, int]], x: torch.Tensor) -> torch.Tensor:
    tensors = [x.sin(), x * 1.0]  # copies: a program may write to them
    for name, i, j in program:
        tensors.append(STEPS[name](tensors, i % len(tensors), j % len(tensors)))
    return torch.stack(tensors)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(program=PROGRAMS, seed=st.integers(0, 5))
def test_a_program_has_the_derivative_that_differences_see(program: list[tuple[str, int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    with torch.no_grad(), dual_pass():
        value, tangent = run(program, DualTensor(torch.stack([x, v]))).buffer
    torch.testing.assert_close(value, run(program, x), rtol=1e-10, atol=1e-10)
    slopes = [(run(program, x + h * v) - run(program, x - h * v)) / (2 * h) for h in (1e-5, 1e-6)]
    smooth = (slopes[0] - slopes[1]).abs() <= 1e-4 * (1 + slopes[1].abs())  # not at a kink
    apart = (tangent - slopes[1]).abs() / (1 + slopes[1].abs())
    assert smooth.float().mean() > 0.5
    assert not (apart[smooth] > 1e-4).any()
