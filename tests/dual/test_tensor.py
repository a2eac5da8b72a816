"""DualTensor and LostTensor: what the model sees, what is refused, what falls back, and what is never read as zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torchgeom_probe.dual import RULES, DualTensor, LostTensor, dual_pass, recording
from torchgeom_probe.errors import EngineRefusal, ProbeError


@pytest.fixture(autouse=True)
def _in_a_pass():
    with torch.no_grad(), dual_pass():
        yield


def dual(*shape: int, k: int = 3, dtype: torch.dtype = torch.float64) -> DualTensor:
    return DualTensor(torch.randn(1 + k, *shape, dtype=dtype))


def pushed(function: Callable[..., Any], x: DualTensor) -> torch.Tensor:
    """[1 + k, ...] of the function at x, one direction at a time."""
    rows = [torch.func.jvp(function, (x.primal,), (t,)) for t in x.tangents]
    return torch.stack([rows[0][0], *(push for _, push in rows)])


def check(function: Callable[..., Any], x: DualTensor, *, fallback: set[str] | None = None) -> None:
    with recording() as used:
        out = function(x)
    assert type(out) is DualTensor
    torch.testing.assert_close(out.buffer, pushed(function, x))
    if fallback is not None:
        assert used["fallback"] == fallback


# ------------------------------------------------------------------------------------------------- what the model sees


def test_it_looks_like_its_primal() -> None:
    x = dual(2, 3, 5, 7)
    assert x.shape == x.size() == (2, 3, 5, 7)
    assert (x.ndim, x.dim(), len(x), x.numel(), x.size(1), x.dtype) == (4, 4, 2, 210, 3, torch.float64)
    assert x.stride() == (105, 35, 7, 1)
    assert x.is_floating_point()
    assert torch.is_floating_point(x)
    assert x.device == torch.device("cpu")
    assert not x.requires_grad
    assert isinstance(x, torch.Tensor)
    assert repr(x) == "DualTensor(shape=(2, 3, 5, 7), k=3, dtype=torch.float64)"
    assert [row.shape for row in x] == [(3, 5, 7)] * 2
    assert torch.equal(torch.stack(list(x)).buffer, x.buffer)


def test_channels_last_is_seen_and_kept() -> None:
    x = dual(2, 3, 5, 7)
    assert x.is_contiguous()
    y = x.to(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()
    assert torch.equal(y.buffer, x.buffer)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    for out in (F.relu(y), y * 2, y + y, F.max_pool2d(y, 2), F.conv2d(y, weight), F.silu(y)):
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_new_tensors_take_duals() -> None:
    x = dual(2, 5)

    def padded(z: torch.Tensor) -> torch.Tensor:
        wide = z.new_zeros(2, 7)
        wide[:, 1:6] = z
        other = torch.zeros_like(wide)
        other += wide
        return other

    check(padded, x, fallback=set())
    assert type(torch.zeros_like(x, dtype=torch.int64)) is torch.Tensor


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x > 0,
        lambda x: x.argmax(-1),
        lambda x: torch.floor(x),
        lambda x: x.round(),
        lambda x: torch.sign(x),
        lambda x: x == x.flip(0),
        lambda x: torch.isnan(x),
        lambda x: x.long(),
        lambda x: torch.randn_like(x),
        lambda x: x // 1,
    ],
)
def test_what_is_piecewise_constant_is_plain(function: Callable[..., Any]) -> None:
    x = dual(5, 7)
    torch.manual_seed(0)
    out = function(x)
    torch.manual_seed(0)
    assert type(out) is torch.Tensor
    assert torch.equal(out, function(x.primal))


def test_branches_follow_the_primal() -> None:
    x = DualTensor(torch.tensor([[2.0], [1.0]]))
    assert x.sum() > 1
    assert bool(x.max() == 2)
    assert 2.0 in x


# -------------------------------------------------------------------------------------------------- what cannot follow


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: x.data_ptr(),
        lambda x: f"{x.sum():.3f}",
    ],
)
def test_numbers_do_not_leave_torch(function: Callable[..., Any]) -> None:
    with pytest.raises(ProbeError, match="takes numbers that depend on the input out of torch"):
        function(dual(5))
    with pytest.raises(ProbeError, match="takes numbers that depend on the input out of torch"):
        function(dual(5).detach())


class Doubled(torch.autograd.Function):
    """A custom function as models have them: its forward pass, and a backward that forward mode cannot use."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone().mul_(2).sin()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * (2 * x).cos() * grads[0]


def test_a_custom_autograd_function_is_followed() -> None:
    x = dual(5, 7)
    torch.testing.assert_close(Doubled.apply(x).buffer, pushed(lambda z: (2 * z).sin(), x))


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads


def test_a_custom_function_that_returns_its_input() -> None:
    x = dual(5, 7)
    out = OldStyle.apply(x)
    torch.testing.assert_close((out * 2).buffer, x.buffer * 2)


def test_an_op_without_a_forward_derivative_is_refused_by_name() -> None:
    grid = DualTensor(torch.rand(3, 2, 5, 5, 2) * 2 - 1)
    with recording() as used, pytest.raises(EngineRefusal, match=r"'grid_sample' has no forward derivative"):
        F.grid_sample(torch.randn(2, 3, 7, 7), grid, align_corners=False)
    assert "grid_sample" in used["refused"]


def test_the_models_own_mistake_is_its_own_error() -> None:
    x = dual(5, 7)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as raised:
        F.linear(x, torch.randn(3, 5, dtype=torch.float64))
    assert not isinstance(raised.value, ProbeError)
    with pytest.raises(RuntimeError, match="must match the size") as raised:
        x + torch.randn(3, 2)
    assert not isinstance(raised.value, ProbeError)
    with pytest.raises(TypeError):
        torch.sin(x, 3)
    with pytest.raises(RuntimeError) as raised:  # an op without a rule
        torch.cholesky_solve(x, torch.eye(3, dtype=torch.float64))
    assert not isinstance(raised.value, ProbeError)


def test_out_arguments_are_refused() -> None:
    x = dual(5)
    for out in (torch.zeros(5, dtype=torch.float64), dual(5)):
        with pytest.raises(EngineRefusal, match="writes to out="):
            torch.sin(x, out=out)
        with pytest.raises(EngineRefusal, match="writes to out="):
            torch.add(x.detach(), 1, out=out)
        with pytest.raises(EngineRefusal, match="writes to out="):
            torch.cumprod(x, 0, out=out)


WRITES = {
    "add_": lambda plain, x: plain.add_(x),
    "mul_": lambda plain, x: plain.mul_(x),
    "copy_": lambda plain, x: plain.copy_(x),
    "__setitem__": lambda plain, x: plain.__setitem__(slice(2), x[:2]),
    "__iadd__": lambda plain, x: plain.__iadd__(x),
    "masked_fill_": lambda plain, x: plain.masked_fill_(plain > 0, x.sum()),
    "index_add_": lambda plain, x: plain.index_add_(0, torch.arange(5), x),
    "lerp_": lambda plain, x: plain.lerp_(x, 0.5),
    "atan2_": lambda plain, x: plain.atan2_(x),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("lost", [False, True], ids=["dual", "lost"])
def test_a_plain_tensor_cannot_take_tangents(write: Callable[..., Any], lost: bool) -> None:
    x = dual(5).detach() if lost else dual(5)
    with pytest.raises(EngineRefusal, match="into a plain one, which cannot carry tangents"):
        write(torch.zeros(5, dtype=torch.float64), x)


def test_assigning_to_data_is_refused() -> None:
    for x in (dual(5), dual(5).detach()):
        with pytest.raises(EngineRefusal, match=r"assigns to \.data"):
            x.data = torch.zeros(5, dtype=torch.float64)


def test_a_gradient_of_its_own_is_refused() -> None:
    with pytest.raises(EngineRefusal, match="requires_grad_"):
        dual(5).requires_grad_()


# -------------------------------------------------------------------------------------------------------- cut tensors


@pytest.mark.parametrize(
    ("cut", "reason"),
    [(lambda x: x.detach(), ".detach()"), (lambda x: x.data, ".data"), (lambda x: torch.detach(x), ".detach()")],
    ids=["detach", "data", "torch.detach"],
)
def test_what_depends_on_a_cut_tensor_is_lost(cut: Callable[..., Any], reason: str) -> None:
    x = dual(5, 7)
    lost = cut(x)
    assert isinstance(lost, LostTensor)
    assert lost.reason == reason
    assert repr(lost) == f"LostTensor(shape=(5, 7), cut by {reason})"
    linear = F.linear(lost, torch.randn(3, 7).double())
    for out in (lost * 2, x + lost, torch.cat([x, lost]), linear, lost[0], lost.to(x)):
        assert isinstance(out, LostTensor)
        assert out.reason == reason
    assert torch.equal((x + lost).primal, 2 * x.primal)
    top, where = torch.max(lost, dim=1)
    assert isinstance(top, LostTensor)
    assert type(where) is torch.Tensor
    assert type(x * 2) is DualTensor  # what does not depend on it goes on


def test_what_a_cut_tensor_is_only_asked_about_is_not_lost() -> None:
    x = dual(5, 7)
    lost = x.detach()
    assert type(lost > 0) is torch.Tensor
    assert type(torch.zeros_like(lost)) is torch.Tensor
    assert type(lost.new_ones(3)) is torch.Tensor
    assert type(torch.sign(lost)) is torch.Tensor
    assert type(torch.where(lost > 0, x, 0.0)) is DualTensor
    assert lost.shape == (5, 7)


def test_detach_in_place() -> None:
    x = dual(5)
    assert x.detach_() is x
    assert isinstance(x, LostTensor)


def test_writing_a_cut_tensor_into_a_dual_loses_it() -> None:
    x = dual(5, 7)
    view, cut = x[:, 1:], x.detach()
    view.mul_(cut[:, 1:])
    assert isinstance(view, LostTensor)
    assert x.tangents[..., 1:].isnan().all()  # the whole does not know of it: what is read there must show
    assert x.tangents[..., 0].isfinite().all()
    y = dual(5, 7)
    y[0] = cut[0]
    assert isinstance(y, LostTensor)


# ----------------------------------------------------------------------------------------------- op by op, by
# vmap(jvp)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: torch.cumprod(x, 0), "cumprod"),
        (lambda x: torch.linalg.inv(x[:, :5] + 9 * torch.eye(5).double()), "inv"),
        (lambda x: torch.copysign(x, x.flip(0)), "copysign"),
        (lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(5).double()), "cholesky"),
        (lambda x: torch.logcumsumexp(x, 1), "logcumsumexp"),
        (lambda x: torch.prod(x, 1), "prod"),
        (lambda x: torch.renorm(x, 2, 0, 1.0), "renorm"),
    ],
)
def test_an_op_without_a_rule_falls_back_alone(function: Callable[..., Any], name: str) -> None:
    x = dual(5, 7)
    with recording() as used:
        out = function(x)
    torch.testing.assert_close(out.buffer, pushed(function, x))
    assert any(name in op for op in used["fallback"]), used


def test_fallback_keeps_tuples_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in (torch.max, torch.topk, torch.sort, torch.var_mean):
        monkeypatch.delitem(RULES, op)
    x = dual(5, 7)
    for op, arguments in ((torch.max, (1,)), (torch.topk, (3,)), (torch.sort, (0,))):
        out, plain = op(x, *arguments), op(x.primal, *arguments)
        assert type(out) is type(plain)
        assert torch.equal(out.indices, plain.indices)
        torch.testing.assert_close(out.values.buffer, pushed(lambda z, op=op, a=arguments: op(z, *a)[0], x))
    var, mean = torch.var_mean(x, 1)
    torch.testing.assert_close(var.buffer, pushed(lambda z: z.var(1), x))
    torch.testing.assert_close(mean.buffer, pushed(lambda z: z.mean(1), x))


def test_fallback_in_place_writes_through_views() -> None:
    x = dual(5, 7)
    whole = x.clone()
    view = whole[:, 1:]
    assert view.copysign_(x[:, 1:] + 3) is view
    view[torch.tensor([0, 1]), :, None][..., 0].mul_(1)

    def plain(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, 1:].copysign_(z[:, 1:] + 3)
        return z

    torch.testing.assert_close(whole.buffer, pushed(plain, x))


def test_setitem_by_fallback() -> None:
    def by_mask(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[torch.tensor([True, False, True, False, False]), :, 1] = z[:2, :, 2].sin()
        z[True] = z[True] * 2
        return z

    check(by_mask, dual(5, 7, 3))


def test_positional_inplace_of_an_op_without_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, F.elu)
    x = dual(5)
    want = pushed(F.elu, x)
    assert F.elu(x, 1.0, True) is x
    torch.testing.assert_close(x.buffer, want)


def test_a_change_of_shape_in_place_is_refused() -> None:
    with pytest.raises(EngineRefusal, match="shape"):
        dual(5, 7).t_()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.local_response_norm(x, 3),
        lambda x: F.lp_pool2d(x.abs() + 1, 2, 3),
        lambda x: F.cosine_similarity(x, x.flip(0)),
        lambda x: torch.stft(x[0, :2, 0], 4, return_complex=True, center=False).abs(),
        lambda x: F.gumbel_softmax(x) * 0 + x,
    ],
    ids=["local_response_norm", "lp_pool2d", "cosine_similarity", "stft", "gumbel_softmax"],
)
def test_functions_that_torch_writes_in_python(function: Callable[..., Any]) -> None:
    x = dual(2, 6, 5, 8)
    torch.testing.assert_close(function(x).buffer, pushed(function, x))


def test_arguments_by_keyword() -> None:
    x = dual(5, 7)
    check(lambda z: torch.softmax(input=z, dim=1), x, fallback=set())
    check(lambda z: torch.cat(tensors=[z, z], dim=0), x, fallback=set())
    check(lambda z: torch.add(input=z, other=z, alpha=2), x, fallback=set())
    check(lambda z: F.linear(input=z, weight=torch.ones(3, 7).double()), x, fallback=set())
    check(lambda z: torch.sum(input=z, dim=1), x, fallback=set())


# ------------------------------------------------------------------------------------------ whole modules, other tools


CAUSAL = nn.Transformer.generate_square_subsequent_mask(5).double()
ATTENTION = {
    "self": lambda m, x: m(x, x, x, need_weights=False)[0],
    "weights": lambda m, x: m(x, x, x)[1],
    "masked": lambda m, x: m(x, x, x, attn_mask=CAUSAL)[0],
    "padding": lambda m, x: m(x, x, x, key_padding_mask=torch.tensor([[False] * 4 + [True]] * 2))[0],
    "cross": lambda m, x: m(x, x[:, :3], x[:, :3])[0],
}


@pytest.mark.parametrize("how", ATTENTION.values(), ids=ATTENTION)
def test_multi_head_attention(how: Callable[..., Any]) -> None:
    module = nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64).eval()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            check(lambda x: how(module, x), dual(2, 5, 6), fallback=set())
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    block = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = dual(2, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)  # torch's "none of the inputs requires grad"
        out = checkpoint(block, x, use_reentrant=reentrant)
    torch.testing.assert_close(out.buffer, pushed(block, x))


def test_einops() -> None:
    einops = pytest.importorskip("einops")
    check(lambda z: einops.rearrange(z, "b (h d) n -> b h n d", h=2), dual(2, 6, 5), fallback=set())
    check(lambda z: einops.reduce(z, "b c (h 5) -> b h", "mean"), dual(2, 6, 5), fallback=set())
    check(lambda z: einops.reduce(z, "b c h -> b h", "max"), dual(2, 6, 5), fallback=set())
    check(lambda z: einops.repeat(z, "b c h -> b h (c r)", r=2), dual(2, 6, 5), fallback=set())
    check(lambda z: einops.einsum(z, z, "b c h, b d h -> b c d"), dual(2, 6, 5), fallback=set())


class Block(nn.Module):
    """One of each kind of rule, small enough to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.act = nn.GELU()
        self.pool = nn.MaxPool2d(2)
        self.qkv = nn.Linear(6, 18)
        self.norm = nn.LayerNorm(6)
        self.gn = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.act(self.bn(self.conv(x))))
        x = F.silu(self.gn(x), inplace=True) + x
        x = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v) + (q @ k.transpose(-2, -1)).softmax(-1) @ v
        x = torch.cat([x, y.transpose(1, 2).flatten(2)], dim=1)
        return self.head(x[:, 1:].mean(1)) * torch.where(x[:, 0, :1] > 0, 2.0, 3.0)


def test_a_block_of_every_kind_of_op() -> None:
    block = Block().double().eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        check(block, dual(2, 3, 8, 6), fallback=set())


def test_fake_cuda_tensors_stay_on_their_device() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        block = Block().eval()
        out = block(DualTensor(torch.randn(4, 2, 3, 8, 6, device="cuda")))
        assert out.buffer.device.type == "cuda"
        assert out.shape == (2, 5)


def test_make_fx_traces_the_dual_pass() -> None:
    block = Block().eval()
    buffer = torch.randn(4, 2, 3, 8, 6)
    graph = make_fx(lambda b: block(DualTensor(b)).buffer)(buffer)
    assert all(
        n.op != "call_function" or "aten" in str(n.target) or "getitem" in str(n.target) for n in graph.graph.nodes
    )
    other = torch.randn(4, 2, 3, 8, 6)
    torch.testing.assert_close(graph(other), block(DualTensor(other)).buffer)


class NoSync(TorchDispatchMode):
    """Fails on whatever would make the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "item", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in self.WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_dual_pass_waits_for_no_device() -> None:
    block = Block().eval()
    with NoSync():
        block(dual(2, 3, 8, 6, dtype=torch.float32))
