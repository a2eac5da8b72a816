"""A training step around pushforward is the plain step with something added, and what it cannot follow is refused."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from models import cifar_resnet, resnet18
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import torchgeom_probe as tgp
from torchgeom_probe.errors import EngineRefusal


def noisy():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout2d(0.3), nn.Flatten(),
        nn.Linear(8 * 36, 16), nn.AlphaDropout(0.2), nn.GELU(), nn.Dropout(0.4, inplace=True), nn.Linear(16, 7),
    )  # fmt: skip


def drops_paths():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, depth=2, embed_dim=12, num_heads=3, num_classes=7,
        drop_path_rate=0.5, proj_drop_rate=0.2, attn_drop_rate=0.3,
    )  # fmt: skip


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.TransformerEncoderLayer(24, 2, 17, dropout=0.3, batch_first=True)
        self.head = nn.Linear(24, 7)

    def forward(self, x):
        return self.head(self.body(x.flatten(2)).mean(1))


def stepped(model, x, y, step):
    """(output, gradients, state, random state) after one step from the same seed."""
    model = copy.deepcopy(model)
    torch.manual_seed(11)
    output = step(model, x)
    F.cross_entropy(output, y).backward()
    gradients = [p.grad for p in model.parameters()]
    return output.detach(), gradients, model.state_dict(), torch.get_rng_state()


def linear(name, module):
    return isinstance(module, nn.Linear) and "out_proj" not in name  # which attention never calls


@pytest.mark.parametrize("make", [noisy, drops_paths, Encoder, cifar_resnet, resnet18])
@pytest.mark.parametrize("track", ["all", "primal"])
def test_without_a_penalty_it_is_the_plain_step(make, track):
    model = make().train()
    size = 32 if make is resnet18 else 8
    x, y = torch.randn(8, 3, size, size), torch.randint(0, 7, (8,))
    if make is Encoder:
        x = torch.randn(8, 5, 4, 6)
    plain = stepped(model, x, y, lambda model, x: model(x))
    ours = stepped(model, x, y, lambda model, x: tgp.pushforward(model, x, layers=linear, k=2, track=track).output)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(ours[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-7)
    parameters = dict(model.named_parameters())
    # Statistics are of what a convolution puts out, whose last bit may depend on the processor's kernels: on how many
    # rows it takes, and on whether it adds the bias itself.  Ask it alone.
    alike = False
    if make is noisy:
        conv = model[0]
        rows = nn.functional.conv2d(torch.cat([x] * 3), conv.weight)[: len(x)] + conv.bias[:, None, None]
        alike = torch.equal(conv(x), rows)
    for name, value in plain[2].items():
        exact = name in parameters or track == "primal" or not value.is_floating_point() or alike
        torch.testing.assert_close(ours[2][name], value, **({"rtol": 0, "atol": 0} if exact else {}))
    assert torch.equal(ours[3], plain[3])
    assert all(type(value) in (torch.Tensor, nn.Parameter) for value in ours[2].values())


def test_the_mode_of_every_module_is_kept_and_no_hook_stays():
    model = noisy().train()
    model[3].eval()
    before = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    tgp.pushforward(model, torch.randn(8, 3, 8, 8), layers="5")
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == before


def smooth():
    return nn.Sequential(nn.Linear(5, 11), nn.Tanh(), nn.LayerNorm(11), nn.Linear(11, 3)).double()


def loss_of(step, layer="3"):
    return step.output.square().mean() + step[layer].trace.mean()


def test_gradients_accumulate_and_a_scaler_scales_them():
    model, x = smooth(), torch.randn(6, 5, dtype=torch.float64)
    v = torch.randn(2, 6, 5, dtype=torch.float64)
    loss_of(tgp.pushforward(model, x, layers="3", directions=v)).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for part in (slice(0, 3), slice(3, 6)):
        scaler.scale(loss_of(tgp.pushforward(model, x[part], layers="3", directions=v[:, part])) / 2).backward()
    scaler.unscale_(torch.optim.SGD(model.parameters(), 0.1))
    for p, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_the_gradient_by_the_input():
    model, x = smooth(), torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    v, w = torch.randn(1, 6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)

    def value(x):
        return loss_of(tgp.pushforward(model, x, layers="3", directions=v))

    found, h = (torch.autograd.grad(value(x), x)[0] * w).sum(), 1e-3
    quotient = (8 * (value(x + h * w) - value(x - h * w)) - (value(x + 2 * h * w) - value(x - 2 * h * w))) / (12 * h)
    torch.testing.assert_close(found, quotient, rtol=1e-8, atol=0)


@pytest.mark.parametrize("normed", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_parametrised_weights(normed):
    model = smooth().train()
    normed(model[0])
    x, v = torch.randn(6, 5, dtype=torch.float64), torch.randn(1, 6, 5, dtype=torch.float64)
    twin = copy.deepcopy(model)
    step = tgp.pushforward(model, x, layers="3", directions=v, normalize=False)
    loss_of(step).backward()
    twin(x)  # the power iteration moves once in a step
    buffers = zip(model.buffers(), twin.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in buffers)
    again = copy.deepcopy(twin).eval()  # and stands still
    again.zero_grad()
    loss_of(tgp.pushforward(again, x, layers="3", directions=v, normalize=False)).backward()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_autocast_is_kept():
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 10))
    x, v = torch.randn(32, 64), torch.randn(2, 32, 64)
    full = tgp.pushforward(model, x, layers="3", directions=v)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        half = tgp.pushforward(model, x, layers="3", directions=v)
    assert half.output.dtype == plain.dtype == half["3"].raw.dtype == torch.bfloat16
    assert half["3"].trace.dtype == half["3"].gram.dtype == torch.float32
    torch.testing.assert_close(half.output, plain, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(half["3"].trace.mean(), full["3"].trace.mean(), rtol=2e-2, atol=0)
    found = torch.autograd.grad(half["3"].trace.mean(), model[0].weight)[0]
    exact = torch.autograd.grad(full["3"].trace.mean(), model[0].weight)[0]
    assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("make", [drops_paths, noisy, Encoder])
def test_autocast_is_kept_in_train_mode(make):
    model, x = make().train(), torch.randn(8, 5, 4, 6) if make is Encoder else torch.randn(8, 3, 8, 8)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        plain = twin(x)
        torch.manual_seed(3)
        step = tgp.pushforward(model, x, k=2)
        loss = step.output.float().square().mean() + step[""].trace.mean()
    loss.backward()
    assert step.output.dtype == plain.dtype
    torch.testing.assert_close(step.output, plain, rtol=5e-2, atol=5e-2)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("unused", [False, True])
def test_ddp_is_called_itself(one_process, unused):
    model, x = smooth(), torch.randn(6, 5, dtype=torch.float64)
    v = torch.randn(1, 6, 5, dtype=torch.float64)
    loss_of(tgp.pushforward(model, x, layers="3", directions=v)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ddp, calls = DistributedDataParallel(model, find_unused_parameters=unused), []
    ddp.register_comm_hook(None, lambda state, bucket: _counted(calls, bucket))
    for _ in range(2):
        model.zero_grad()
        loss_of(tgp.pushforward(ddp, x, layers="3", directions=v)).backward()
    assert len(calls) == 2
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


def _counted(calls, bucket):
    calls.append(1)
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_a_compiled_model_runs_its_eager_code():
    model, x = smooth(), torch.randn(6, 5, dtype=torch.float64)
    v = torch.randn(1, 6, 5, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    step = tgp.pushforward(compiled, x, layers="3", directions=v)
    assert list(step) == ["3"]
    torch.testing.assert_close(step["3"].trace, tgp.pushforward(model, x, layers="3", directions=v)["3"].trace)


# ------------------------------------------------------------------------------------------------------ what is refused


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.enter, self.body, self.reentrant = nn.Linear(5, 5), smooth(), reentrant

    def forward(self, x):
        return checkpoint(self.body, self.enter(x.float()).double(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_activation_checkpointing_is_refused(reentrant):
    with pytest.raises(EngineRefusal, match=r"[Aa]ctivation checkpointing"):
        tgp.pushforward(Checkpointed(reentrant), torch.randn(6, 5))
    step = tgp.pushforward(Checkpointed(reentrant), torch.randn(6, 5), track="primal")
    step.output.sum().backward()


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        return -grads[0]


class Returned(Reversed):
    @staticmethod
    def forward(ctx, x):
        return x


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.enter, self.function = nn.Linear(5, 5), function

    def forward(self, x):
        return self.function(self.enter(x))


@pytest.mark.parametrize("function", [Reversed.apply, Returned.apply])
def test_a_custom_function_is_refused(function):
    with pytest.raises(EngineRefusal, match=r"custom autograd\.Function"):
        tgp.pushforward(Calls(function), torch.randn(6, 5))
    deferred = nn.Sequential(nn.Conv1d(6, 3, 1), Calls(function))
    deferred[1].enter = nn.Identity()
    with pytest.raises(EngineRefusal, match=r"custom autograd\.Function"):
        tgp.pushforward(deferred, torch.randn(2, 6, 5))


def test_detach_stops_the_gradient_and_not_the_derivative():
    model, x = Calls(lambda h: h.detach() * 2), torch.randn(6, 5)
    step = tgp.pushforward(model, x, normalize=False, k=5, probes="frame")
    torch.testing.assert_close(step[""].trace, (4 * model.enter.weight.square().sum()).expand(6).detach())
    assert not step[""].trace.requires_grad


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(5, 5)
        self.register_buffer("written", torch.zeros(5))
        self.register_buffer("assigned", torch.zeros(5))

    def forward(self, x):
        h = self.enter(x)
        with torch.no_grad():
            self.written.mul_(0.9).add_(0.1 * h.mean(0))
            self.assigned = 0.9 * self.assigned + 0.1 * h.mean(0)
        self.features = h
        return h.tanh()


def test_what_the_model_keeps_is_what_a_plain_step_leaves():
    model, x = Remembers(), torch.randn(6, 5)
    twin = copy.deepcopy(model)
    step = tgp.pushforward(model, x)
    twin(x)
    for name in ("written", "assigned", "features"):
        assert type(getattr(model, name)) is torch.Tensor
        torch.testing.assert_close(getattr(model, name), getattr(twin, name))
    (step.output.sum() + model.features.square().sum()).backward()
    step = tgp.pushforward(model, x)
    twin(x)
    torch.testing.assert_close(model.written, twin.written)


def test_a_forward_that_raises_leaves_no_trace():
    model, x = Remembers(), torch.randn(6, 5)
    model.register_forward_hook(lambda module, args, out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tgp.pushforward(model, x)
    assert all(type(value) is torch.Tensor for value in (model.written, model.assigned, model.features))
    assert len(model._forward_hooks) == 1


def test_a_layer_that_is_written_to_afterwards_is_refused():
    model, x = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), torch.randn(6, 5)
    with pytest.raises(
        tgp.ProbeError, match=r"writes in place to the output of layer '0'.*\n.*transform={'0': torch.clone}"
    ):
        tgp.pushforward(model, x, layers=["0", "2"])
    step = tgp.pushforward(
        model, x, layers=["0", "2"], transform={"0": torch.clone}, k=5, probes="frame", normalize=False
    )
    torch.testing.assert_close(step["0"].trace, model[0].weight.square().sum().expand(6))


def test_wrong_calls_are_refused():
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)), torch.randn(6, 5)
    with torch.no_grad(), pytest.raises(tgp.ProbeError, match="gradients are disabled"):
        tgp.pushforward(model, x)
    with pytest.raises(tgp.ProbeError, match="k=0 directions"):
        tgp.pushforward(model, x, k=0)
    with pytest.raises(tgp.ProbeError, match=r"frame of k=6 .* d=5"):
        tgp.pushforward(model, x, k=6, probes="frame")
    with pytest.raises(tgp.ProbeError, match="n=1 features and k=2"):
        tgp.pushforward(model, x, k=2)[""].log_volume  # noqa: B018
    assert tgp.pushforward(model, x, k=2)[""].log_volume_eps(1e-3).isfinite().all()
    with pytest.raises(tgp.ProbeError, match=r"eps=0\.0 must be above 0"):
        tgp.pushforward(model, x)[""].log_volume_eps(0.0)
    with pytest.raises(tgp.ProbeError, match="pairs of drawn directions; here k=1"):
        tgp.pushforward(model, x)[""].isometry  # noqa: B018
    with pytest.raises(tgp.ProbeError, match="here they are given"):
        tgp.pushforward(model, x, directions=torch.randn(2, 6, 5))[""].isometry  # noqa: B018
    with pytest.raises(tgp.ProbeError, match=r"directions= is \(2, 6, 4\); x has shape \(6, 5\)"):
        tgp.pushforward(model, x, directions=torch.randn(2, 6, 4))
    with pytest.raises(tgp.ProbeError, match="2 directions= for 1 inputs"):
        tgp.pushforward(model, x, directions=(x, x))
    with pytest.raises(tgp.ProbeError, match="no layer '1' was pushed forward; there are ''"):
        tgp.penalty(tgp.pushforward(model, x), {"1": 0.1})
    step = tgp.pushforward(model, x)
    assert "1" not in step
    assert step.get("1") is None
    with pytest.raises(KeyError, match="'1' was not pushed forward"):
        step["1"]
    with pytest.raises(tgp.ProbeError, match="weights= names no layer"):
        tgp.penalty(tgp.pushforward(model, x), {})
    with pytest.raises(tgp.ProbeError, match="DataParallel runs its replicas in threads"):
        tgp.pushforward(nn.DataParallel(model), x)
    model.spare = nn.Linear(5, 5)
    model.forward = lambda x: model[1](model[0](x))
    with pytest.raises(tgp.ProbeError, match="layer '2' never ran"):
        tgp.pushforward(model, x, layers=["0", "2"])


# ------------------------------------------------------------------------------------ the output alone; several inputs


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 17), nn.SiLU(), nn.Linear(17, 5))

    def forward(self, x, t):
        return self.body(torch.cat([x, t[:, None]], 1))


def test_the_output_alone_is_tracked_along_several_inputs():
    model, x, t = Flow().double(), torch.randn(6, 5, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    velocity = torch.randn_like(x), torch.ones_like(t)
    step = tgp.pushforward(model, (x, t), directions=velocity, track="primal", normalize=False)
    output, tangent = torch.func.jvp(model, (x, t), velocity)
    torch.testing.assert_close(step.output, output)
    torch.testing.assert_close(step[""].tangents[0], tangent)
    assert step.output.requires_grad
    assert not step[""].tangents.requires_grad
    both = tgp.pushforward(model, {"x": x, "t": t}, directions=velocity, normalize=False)
    torch.testing.assert_close(both[""].tangents[0], tangent)
    step = tgp.pushforward(model, (x, t), wrt=["x", "t"], k=6, probes="frame", normalize=False)
    rows = torch.func.vmap(torch.func.jacrev(lambda x, t: model(x[None], t[None])[0], argnums=(0, 1)))(x, t)
    exact = sum(r.square().flatten(1).sum(1) for r in rows)
    torch.testing.assert_close(step[""].trace, exact)


# -------------------------------------------------------------------------------------------------------- the estimates


def test_estimates_are_unbiased():
    model, x = smooth(), torch.randn(1, 5, dtype=torch.float64).expand(4000, 5)
    jacobian = torch.autograd.functional.jacobian(model, x[:1]).reshape(3, 5)
    metric = jacobian.T @ jacobian
    trace, square = metric.trace(), metric.square().sum()
    for probes in ("signs", "gaussian", "frame"):
        layer = tgp.pushforward(model, x, layers="3", k=3, probes=probes, normalize=False)["3"]
        for found, exact in ((layer.trace, trace), (layer.isometry, square)):
            assert abs(found.mean() - exact) < 4 * found.std() / 4000**0.5
    whole = tgp.pushforward(model, x[:2], layers="3", k=5, probes="frame", normalize=False)["3"]
    torch.testing.assert_close(whole.isometry, square.expand(2))
    halved = tgp.pushforward(model, x[:2], layers="3", k=5, probes="frame")["3"]
    torch.testing.assert_close(halved.trace, trace.expand(2) / 3)
    torch.testing.assert_close(halved.tangents.square().sum((0, 2)), trace.expand(2) / 3)


def test_the_length_along_the_first_singular_vector_has_the_gradient_of_sigma_1():
    model, x = smooth(), torch.randn(6, 5, dtype=torch.float64)
    rows = torch.func.vmap(torch.func.jacrev(model))(x)
    exact = torch.autograd.grad(torch.linalg.matrix_norm(rows, 2).sum(), model[3].weight)[0]
    v = torch.linalg.svd(rows.detach()).Vh[:, 0]
    found = tgp.pushforward(model, x, layers="3", directions=v, normalize=False)["3"].length.sum()
    torch.testing.assert_close(torch.autograd.grad(found, model[3].weight)[0], exact)


def test_log_volume_is_that_of_a_measurement():
    model, x = smooth(), torch.randn(6, 5, dtype=torch.float64)
    v = torch.randn(2, 6, 5, dtype=torch.float64)
    step = tgp.pushforward(model, x, layers="3", directions=v)
    torch.testing.assert_close(step["3"].log_volume, tgp.measure(model, x, layers="3", directions=v)["3"].log_volume)
    torch.testing.assert_close(step["3"].log_volume_eps(1e-13), step["3"].log_volume)


def test_probes_differ_from_step_to_step_and_follow_the_seed():
    model, x = smooth(), torch.randn(6, 5, dtype=torch.float64)
    before = torch.get_rng_state()
    a, b = (tgp.pushforward(model, x)[""].raw for _ in range(2))
    assert not torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)
    c, d = (tgp.pushforward(model, x, generator=torch.Generator().manual_seed(3))[""].raw for _ in range(2))
    assert torch.equal(c, d)


def test_tokens_from_a_source():
    model = nn.Sequential(nn.Embedding(19, 8), nn.Linear(8, 5), nn.LayerNorm(5))
    ids = torch.randint(0, 19, (6, 4))
    step = tgp.pushforward(model, ids, layers=["1", "2"], source="0", k=32, probes="frame", normalize=False)
    torch.testing.assert_close(step["1"].trace, 4 * model[1].weight.square().sum().expand(6))
