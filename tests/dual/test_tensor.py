"""DualTensor: what the model sees, what is refused, what falls back, and what is never read as zero."""

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

from torchgeom_probe.dual import RULES, DualTensor, dual_pass, recording
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


def test_reverse_mode_where_torch_has_no_forward_mode() -> None:
    grid, h = DualTensor(torch.rand(3, 2, 5, 5, 2).double() * 2 - 1), 1e-6
    image = torch.randn(2, 3, 7, 7).double()

    def sampled(at: torch.Tensor) -> torch.Tensor:
        return F.grid_sample(image, at, align_corners=False)

    out = sampled(grid)
    for tangent, pushed_tangent in zip(grid.tangents, out.tangents, strict=True):
        slope = (sampled(grid.primal + h * tangent) - sampled(grid.primal - h * tangent)) / (2 * h)
        torch.testing.assert_close(pushed_tangent, slope, rtol=1e-5, atol=1e-6)


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
def test_a_plain_tensor_that_is_written_to_is_dual_until_the_pass_ends(write: Callable[..., Any]) -> None:
    buffer, before = torch.randn(4, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)

    def written(x: torch.Tensor) -> torch.Tensor:
        plain = before.clone()
        write(plain, x)
        return plain

    with dual_pass():
        x, plain = DualTensor(buffer.clone()), before.clone()
        write(plain, x)
        pushed = (plain + 0 * x).buffer
        assert isinstance(plain, DualTensor)
    assert type(plain) is torch.Tensor
    assert torch.equal(plain, before)
    h = 1e-6
    for tangent, found in zip(buffer[1:], pushed[1:], strict=True):
        slope = (written(buffer[0] + h * tangent) - written(buffer[0] - h * tangent)) / (2 * h)
        torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(pushed[0], written(buffer[0]))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_plain_tensor_whose_memory_others_see_cannot_take_tangents(write: Callable[..., Any]) -> None:
    with dual_pass():
        x, plain = dual(5), torch.zeros(2, 5, dtype=torch.float64)
        for target in (plain[1], plain.view(10)[:5]):  # a view, and one whose base is a view's
            with pytest.raises(EngineRefusal, match="into a plain one, which cannot carry tangents"):
                write(target, x)
        seen = torch.zeros(5, dtype=torch.float64)
        view = seen[1:]
        with pytest.raises(EngineRefusal, match="into a plain one, which cannot carry tangents"):
            write(seen, x)
        del view
        write(seen, x)


def test_assigning_to_data_is_refused() -> None:
    for x in (dual(5), dual(5).detach()):
        with pytest.raises(EngineRefusal, match=r"assigns to \.data"):
            x.data = torch.zeros(5, dtype=torch.float64)


# ---------------------------------------------------------------------------------------- what stops a gradient


class Own(torch.Tensor):
    """A class of the user's own."""


COPIES = {
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "torch.detach": lambda x: torch.detach(input=x),
    "tensor": lambda x: torch.tensor(x),
    "as_tensor": lambda x: torch.as_tensor(x),
    "Variable": lambda x: torch.autograd.Variable(x),
    "Parameter": lambda x: nn.Parameter(x),
    "new_tensor": lambda x: torch.zeros(()).double().new_tensor(x),
    "clone": lambda x: x.detach().clone(),
    "requires_grad_": lambda x: x.detach().requires_grad_(),
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_what_stops_a_gradient_changes_no_value_and_no_derivative(copy: Callable[..., Any]) -> None:
    x = dual(5, 7)
    out = x.sin() + copy(x)
    assert type(out) is DualTensor
    torch.testing.assert_close(out.buffer, pushed(lambda z: z.sin() + z, x))


def test_detach_is_an_alias_that_is_written_through() -> None:
    x = dual(5, 7)
    before = x.buffer.clone()
    x.detach()[:, 1:].mul_(3.0)
    x.data[:, 0].mul_(2.0)
    assert torch.equal(x.buffer, torch.cat([before[..., :1] * 2, before[..., 1:] * 3], -1))
    assert x.detach_() is x


def test_a_straight_through_estimator_has_the_derivative_of_the_function_that_runs() -> None:
    x = dual(5, 7)
    rounded = x + (x.round() - x).detach()
    assert torch.equal(rounded.primal.round(), x.primal.round())
    assert rounded.tangents.abs().max() < 1e-15


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x**2).view(torch.int64).view(torch.float64),
        lambda x: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x)),
        lambda x: torch.Tensor._make_subclass(Own, x),
        lambda x: torch.scalar_tensor(x[0, 0]),
    ],
    ids=["bits", "dlpack", "subclass", "scalar_tensor"],
)
def test_what_cannot_be_followed_raises(function: Callable[..., Any]) -> None:
    with pytest.raises((ProbeError, RuntimeError), match=r"out of torch|Cannot access data pointer|already associated"):
        function(dual(5, 7))


# -------------------------------------------------------------------------------- an op without a forward derivative


@torch.library.custom_op("tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


@torch.library.custom_op("tests::half_cube", mutates_args=())
def half_cube(x: torch.Tensor) -> torch.Tensor:
    return x**3 / 2


@torch.library.custom_op("tests::bare", mutates_args=())
def bare(x: torch.Tensor) -> torch.Tensor:
    return x**3


@torch.library.custom_op("tests::into", mutates_args={"out"})
def into(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x**3)


def _kept(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


cube.register_autograd(lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g, setup_context=_kept)
#: a backward whose second half autograd cannot see
half_cube.register_autograd(
    lambda ctx, g: ctx.saved_tensors[0] ** 2 * (g + bare(g.sign() * g.abs() ** (1 / 3)) / 2), setup_context=_kept
)


def test_reverse_mode_where_there_is_no_forward_derivative() -> None:
    x = dual(5, 7)
    with recording() as used:
        out = x + cube(x)
    torch.testing.assert_close(out.buffer, pushed(lambda z: z + z**3, x))
    assert used["fallback"] == {"cube.default"}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x + bare(x), "bare"),
        (lambda x: x + half_cube(x), "half_cube"),
        (lambda x: torch.native_layer_norm(x, [7], None, None, 1e-5)[1], "native_layer_norm"),
    ],
    ids=["no derivative", "a backward that hides a part", "a statistic"],
)
def test_a_missing_derivative_is_refused_by_name(function: Callable[..., Any], name: str) -> None:
    with pytest.raises(EngineRefusal, match=rf"the op '{name}.*has no derivative that could be used"):
        function(dual(5, 7))


def test_an_op_that_writes_beside_its_first_argument_is_refused() -> None:
    x = dual(5, 7)
    with pytest.raises(ProbeError, match=r"'into\.default' writes its result into its argument 'out'"):
        into(x, torch.empty(5, 7).double())


def test_true_zeros_are_no_missing_derivatives() -> None:
    x = dual(5, 7)
    for function in (torch.round, torch.trunc, lambda z: z.fmod(1) * 0, lambda z: z.clone().fill_(1.0)):
        out = function(x)
        tangents = out.tangents if isinstance(out, DualTensor) else torch.zeros(1)
        assert not tangents.any()


def test_what_takes_a_shape_alone_is_plain() -> None:
    x, plain = dual(5, 7), torch.ones(1, 7).double()
    for out in (plain.expand_as(x), plain.type_as(x), torch.broadcast_tensors(plain, x)[0], x.new_tensor([1.0])):
        assert type(out) is torch.Tensor


# ----------------------------------------------------------------------------------------------- op by op, by
# vmap(jvp)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: torch.cumprod(x, 0), "cumprod"),
        (lambda x: torch.linalg.inv(x[:, :5] + 9 * torch.eye(5).double()), "inv"),
        (lambda x: torch.fmax(x, x.flip(0)), "fmax"),
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
    assert view.xlogy_(x[:, 1:] + 9) is view
    view[torch.tensor([0, 1]), :, None][..., 0].mul_(1)

    def plain(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, 1:].xlogy_(z[:, 1:] + 9)
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
        lambda x: torch.stft(x[0, :2, 0], 4, window=torch.ones(4).double(), return_complex=True, center=False).abs(),
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


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_in_single_precision(kind: type[nn.RNNBase]) -> None:
    """oneDNN's fused LSTM has no forward derivative: torch's own takes its place for the op."""
    module = kind(3, 5, 2, batch_first=True).eval()
    x = dual(2, 7, 3, dtype=torch.float32)
    out = module(x)[0]
    wide = module.double()
    expected = pushed(lambda z: wide(z)[0], DualTensor(x.buffer.double()))
    torch.testing.assert_close(out.buffer.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.backends.mkldnn.enabled


AXES = {
    "max": lambda z: z.max(axis=1).values,
    "min": lambda z: torch.min(z, axis=1).values,
    "sort": lambda z: z.sort(axis=1).values,
    "topk": lambda z: torch.topk(z, 2, axis=1).values,
    "kthvalue": lambda z: z.kthvalue(2, axis=1, keepdims=True).values,
    "median": lambda z: torch.median(z, axis=1, keepdims=True).values,
    "mode": lambda z: z.mode(axis=1).values,
    "cummax": lambda z: torch.cummax(z, axis=1).values,
    "cummin": lambda z: z.cummin(axis=1).values,
    "cumsum": lambda z: z.cumsum(axis=1),
    "sum": lambda z: torch.sum(z, axis=(1, 2), keepdims=True),
    "mean": lambda z: z.mean(axis=-1, keepdims=True),
    "var": lambda z: z.var(axis=1, keepdims=True),
    "logsumexp": lambda z: torch.logsumexp(z, axis=1),
    "softmax": lambda z: z.softmax(axis=1),
    "cat": lambda z: torch.cat([z, z.sin()], axis=1),
    "stack": lambda z: torch.stack([z, z.sin()], axis=1),
    "chunk": lambda z: torch.chunk(z, 2, axis=1)[0],
    "squeeze": lambda z: z[:, :1].squeeze(axis=1),
    "unsqueeze": lambda z: torch.unsqueeze(z, axis=1),
    "norm": lambda z: torch.linalg.vector_norm(z, axis=1),
    "index_select": lambda z: torch.index_select(z, axis=1, index=torch.tensor([2, 0])),
    "x": lambda z: torch.sum(x=z, axis=0),
    "x1": lambda z: torch.mul(x1=z, x2=z.sin()),
}


@pytest.mark.parametrize("function", AXES.values(), ids=AXES)
def test_numpys_names_of_arguments_are_torchs(function: Callable[..., Any]) -> None:
    check(function, dual(4, 4, 4))


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
