"""Convolutions against torch.func.jvp: deferred for the batch norm that they take in, with channels that lie last."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from dual.rules.comparison import IMAGE, SIGNAL, VOLUME, D, P, agreement, call
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from unseen import Notes

import torchgeom_probe as tgp
from torchgeom_probe.dual import DualTensor, dual_pass
from torchgeom_probe.dual.rules.convolution import KnownPrimals
from torchgeom_probe.errors import EngineRefusal
from torchgeom_probe.jacobian import fused
from torchgeom_probe.jacobian.layout import Layout
from torchgeom_probe.model.hooked import HookedModel
from torchgeom_probe.model.isolation import measuring

K = 3


def _normalised(module):
    """Statistics and affine parameters that do something."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return module.double().eval()


def _compared(model, x, *, tolerance=1e-12):
    """The dual pass against torch.func.jvp, value and tangents."""
    v = torch.randn(K, *x.shape, dtype=x.dtype)
    with measuring(model), dual_pass():
        found = model(DualTensor(torch.cat([x[None], v]))).buffer
        for k in range(K):
            value, tangent = torch.func.jvp(model, (x,), (v[k],))
            assert (found[0] - value).abs().max() <= tolerance * value.abs().max()
            assert (found[1 + k] - tangent).abs().max() <= tolerance * tangent.abs().max()


CASES = {
    "conv1d": [call(SIGNAL, P(5, 3, 3), P(5), padding=1), call(D(3, 11), P(5, 3, 3))],
    "conv2d": [
        call(IMAGE, P(5, 3, 3, 3), P(5), 2, 1),
        call(IMAGE, P(6, 1, 3, 3), None, groups=3),
        call(D(3, 7, 11), P(5, 3, 3, 3), P(5)),
        call(IMAGE, P(5, 3, 3, 3), padding="same"),
    ],
    "conv3d": [call(VOLUME, P(5, 3, 2, 3, 1), P(5))],
    "conv_transpose1d": [call(SIGNAL, P(3, 5, 3), P(5), 2)],
    "conv_transpose2d": [call(IMAGE, P(3, 5, 3, 2), P(5), 2, 1)],
    "conv_transpose3d": [call(VOLUME, P(3, 5, 2, 3, 1))],
}

test_rule_agrees_with_jvp = agreement(CASES)


WITH_NORM = [
    (nn.Conv1d(6, 10, 3, padding=1, bias=False), nn.BatchNorm1d(10), (2, 6, 31)),
    (nn.Conv2d(6, 10, 3, stride=2, padding=(1, 0)), nn.BatchNorm2d(10), (2, 6, 11, 13)),
    (nn.Conv2d(6, 10, (3, 2), dilation=2, groups=2), nn.BatchNorm2d(10, affine=False), (2, 6, 11, 13)),
    (nn.Conv2d(6, 6, 3, groups=6, padding="same"), nn.BatchNorm2d(6), (2, 6, 11, 13)),
    (nn.Conv3d(4, 7, 3), nn.BatchNorm3d(7), (2, 4, 5, 7, 6)),
    (nn.ConvTranspose2d(6, 10, 3, stride=2), nn.BatchNorm2d(10), (2, 6, 5, 7)),
    (nn.Conv2d(3, 128, 1), nn.BatchNorm2d(128), (2, 3, 1, 2)),  # the weight outweighs the result
]


@pytest.mark.parametrize(("convolution", "norm", "shape"), WITH_NORM, ids=lambda c: type(c).__name__)
def test_convolution_and_norm_against_jvp(convolution, norm, shape):
    model = _normalised(nn.Sequential(convolution, norm, nn.Tanh()))
    _compared(model, torch.randn(*shape, dtype=torch.float64))


def test_the_norm_is_taken_into_the_weight(monkeypatch):
    """One convolution and no pass over its result: what the rule is there for."""
    calls = []
    monkeypatch.setattr(
        "torchgeom_probe.dual.rules.convolution.Convolution.scaled",
        lambda self, scale, shift: calls.append(self) or torch.zeros(1 + K, 2, 10, 9, 11, dtype=scale.dtype),
    )
    model = _normalised(nn.Sequential(nn.Conv2d(6, 10, 3), nn.BatchNorm2d(10)))
    x = torch.randn(1 + K, 2, 6, 11, 13, dtype=torch.float64)
    with measuring(model), dual_pass():
        model(DualTensor(x))
    assert len(calls) == 1


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "kernel"),
    list(itertools.product((1, 2, (1, 3)), (0, (2, 1)), (1, 2), (1, (3, 2)))),
)
def test_a_deferred_result_answers_as_the_real_one(stride, padding, dilation, kernel, channels_last):
    """Shape, strides and type are asked for before the convolution runs."""
    convolution = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups=2)
    x = torch.randn(2, 4, 11, 13)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    rows = torch.stack([x, torch.randn_like(x)])
    if channels_last:
        rows = rows.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 2))
    with torch.no_grad(), dual_pass():
        plain, dual = convolution(x), convolution(DualTensor(rows))
        assert dual._buffer is None
        assert (dual.shape, dual.dtype, dual.stride()) == (plain.shape, plain.dtype, plain.stride())
        assert dual.buffer.shape[1:] == plain.shape
        assert dual.buffer.stride()[1:] == dual.stride()
        assert torch.allclose(dual.buffer[0], plain, atol=1e-5)


class Twice(nn.Module):
    """Uses the convolution's result before the norm and after it."""

    def __init__(self, *, writes):
        super().__init__()
        self.convolution, self.norm, self.writes = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), writes

    def forward(self, x):
        x = x * 2
        y = self.convolution(x)
        z = self.norm(y)
        if self.writes:
            x.sigmoid_()
        return y + z


def test_a_result_that_is_used_twice():
    _compared(_normalised(Twice(writes=False)), torch.randn(2, 3, 7, 9, dtype=torch.float64))


def test_an_input_that_is_written_to_before_a_late_use_is_refused():
    model = _normalised(Twice(writes=True))
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    with measuring(model), dual_pass(), pytest.raises(EngineRefusal, match="writes in place to the input"):
        model(DualTensor(torch.cat([x[None], torch.randn(K, *x.shape, dtype=x.dtype)])))
    report = tgp.measure(model, x, layers="", estimator=tgp.Subspace(k=2))  # another engine takes over
    reference = tgp.measure(model, x, layers="", estimator=tgp.Subspace(k=2), engine="functorch")
    assert report[""].engine == "functorch"
    assert torch.allclose(report[""].value, reference[""].value)


class Between(nn.Module):
    """Writes to the convolution's input between the convolution and its norm."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)

    def forward(self, x):
        x = x * 2
        y = self.convolution(x)
        x.sigmoid_()
        return self.norm(y) + x.mean()


def test_an_input_that_is_written_to_in_between():
    _compared(_normalised(Between()), torch.randn(2, 3, 7, 9, dtype=torch.float64))


def test_a_hook_on_the_convolution_sees_its_own_result():
    model = _normalised(nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)))
    x, v = torch.randn(2, 3, 7, 9, dtype=torch.float64), torch.randn(2, 2, 3, 7, 9, dtype=torch.float64)
    probe = tgp.GeometryProbe(model, layers=["0", "1"], estimator=tgp.Subspace(k=2), normalize=False)
    report = probe.measure(x, directions=v)
    for layer, module in (("0", model[0]), ("1", model)):
        tangents = torch.stack([torch.func.jvp(module, (x,), (t,))[1].flatten(1) for t in v])
        sigma = torch.linalg.svdvals(tangents.transpose(0, 1))
        assert torch.allclose(report[layer].singular_values, sigma.detach(), rtol=1e-10)


def test_half_precision_keeps_its_weights():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).eval().bfloat16()
    x = torch.randn(1 + K, 2, 3, 9, 9).bfloat16()
    with measuring(model), dual_pass():
        convolved = model[0](DualTensor(x))
        assert not convolved.taken().can_be_scaled
        assert torch.allclose(model(DualTensor(x)).primal, model(x[0]), atol=0.05)


class Reshapes(nn.Module):
    """``view`` after convolutions: legal on contiguous tensors, which the plain pass has."""

    def __init__(self):
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5 * 5 * 7, 4)

    def forward(self, x):
        return self.head(F.gelu(self.convolution(x)).view(x.shape[0], -1))


def test_channels_last_inside_changes_no_number():
    model, x = Reshapes(), torch.randn(2, 3, 7, 9)
    found = tgp.measure(model, x, layers=["convolution", ""], estimator=tgp.Subspace(k=3))
    exact = tgp.measure(
        model.double(), x.double(), layers=["convolution", ""], estimator=tgp.Subspace(k=3), engine="functorch"
    )
    for layer in found:
        assert found[layer].engine == "fused"
        assert torch.allclose(found[layer].value, exact[layer].value, atol=1e-4)


def test_channels_do_lie_last():
    seen = Notes()
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    model[2].register_forward_hook(lambda module, args, out: seen.append(out.stride()))
    probe = tgp.GeometryProbe(model, layers="2", estimator=tgp.Subspace(k=3))
    probe.measure(torch.randn(2, 3, 7, 9))
    assert seen.read()[-1] == torch.empty(2, 5, 5, 7).contiguous(memory_format=torch.channels_last).stride()


class WritesThroughAView(nn.Module):
    """A write that reaches the convolution's result in the model's own layout, and a copy of it in another."""

    def __init__(self, reshape):
        super().__init__()
        self.convolution, self.reshape = nn.Conv2d(3, 5, 3), reshape

    def forward(self, x):
        h = self.convolution(x)
        self.reshape(h).mul_(2)
        return h.square() + h


@pytest.mark.parametrize(
    "reshape",
    [
        lambda h: h.flatten(1),
        lambda h: h.view(h.shape[0], -1),
        # a copy in the model's layout, a view in the other
        lambda h: h.permute(0, 2, 3, 1).reshape(h.shape[0], -1, 5),
    ],
    ids=["flatten", "view", "permute_reshape"],
)
def test_a_write_through_a_view_keeps_the_models_layout(reshape):
    model, x = WritesThroughAView(reshape), torch.randn(2, 3, 7, 9)
    probe = tgp.GeometryProbe(model, layers="", estimator=tgp.Subspace(k=3))
    reference = tgp.GeometryProbe(model, layers="", estimator=tgp.Subspace(k=3), engine="functorch")
    for scale in (1e-2, 10.0):  # the second time nothing compares the values with the plain pass
        found, expected = probe.measure(scale * x)[""], reference.measure(scale * x)[""]
        assert torch.allclose(found.value, expected.value, atol=1e-4)
        assert found.engine == "fused"


def test_a_bias_that_is_written_to_before_a_late_use_is_refused():
    class Shifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

        def forward(self, x):
            bias = self.convolution.bias.clone()
            y = F.conv2d(x, self.convolution.weight, bias)
            bias.add_(1)
            return self.norm(y)

    model = _normalised(Shifts())
    x = torch.randn(1 + K, 2, 3, 7, 9, dtype=torch.float64)
    with measuring(model), dual_pass(), pytest.raises(EngineRefusal, match="writes in place"):
        model(DualTensor(x))


def test_inference_mode_inside_the_model():
    class Inferring(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))

        def forward(self, x):
            with torch.inference_mode():
                return self.layers(x * 2)

    model, x = Inferring(), torch.randn(2, 3, 7, 9)
    found = tgp.measure(model, x, layers="", estimator=tgp.Subspace(k=2), engine="fused")
    expected = tgp.measure(model.layers, 2 * x, layers="", estimator=tgp.Subspace(k=2))
    assert torch.allclose(found[""].value, expected[""].value + 2 * torch.log(torch.tensor(2.0)), atol=1e-4)


@pytest.mark.parametrize("reshaped", [False, True])
def test_a_write_to_fresh_memory_is_no_write_through_a_view(reshaped):
    """Memory that was viewed, freed and taken again is another tensor's: in-place activations keep the fast layout."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(5, 5, 3, padding=1) for _ in range(20))

        def forward(self, x):
            for layer in self.layers:
                x = F.relu_(layer(x)).flatten(1).unflatten(1, (5, 7, 9)) + 0
            h = x.flatten(1)
            return (h if reshaped else h + 0).mul_(2)

    probe = tgp.GeometryProbe(Block(), layers="", estimator=tgp.Subspace(k=2))
    _, plan = probe._planned(torch.randn(2, 5, 7, 9))
    assert (plan.layout is None) == reshaped


@pytest.mark.parametrize(("side", "last"), [(16, False), (200, True)])
def test_channels_lie_last_where_the_rows_outweigh_the_weights(side, last):
    """Laying large weights anew in every pass is dear, and few pixels do not make up for it."""
    model = nn.Sequential(nn.Conv2d(3, 512, 3, stride=2), nn.Conv2d(512, 512, 3, stride=4)).eval()
    x = torch.randn(1, 3, side, side)
    v = torch.randn(2, 1, 3, side, side)
    layouts, pushed = [], []
    with model[0].register_forward_hook(lambda module, args, output: layouts.append(args[0].stride()[1] == 1)):
        hooked = HookedModel(model, {"": model})
        fused.push(hooked, hooked.inputs(x), v, lambda _, blocks: pushed.append(blocks[0]), layout=Layout.of(model))
    assert layouts == [last and torch.backends.mkldnn.is_available()]
    expected = torch.func.vmap(lambda t: torch.func.jvp(model, (x,), (t,))[1])(v)
    assert torch.allclose(pushed[0], expected.flatten(2), atol=1e-4)


class _ConvolvedRows(TorchDispatchMode):
    """How many rows each convolution gets."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "last"])
def test_a_pass_with_known_primals_is_the_same_pass_with_fewer_rows(layout):
    model = _normalised(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=2, bias=False),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.Conv2d(8, 4, 1),
        )
    )
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64).contiguous(memory_format=layout)
    hooked = HookedModel(model, {"": model})
    inputs = hooked.inputs(x)

    def pushed(v):
        found = []
        with measuring(model), _ConvolvedRows() as convolved:
            fused.push(hooked, inputs, v, lambda _, blocks: found.append(blocks[0].clone()))
        return found[0], set(convolved.rows)

    known = KnownPrimals()
    for number, v in enumerate(torch.randn(3, K, 2, 3, 9, 9, dtype=torch.float64)):
        expected, rows = pushed(v)
        assert rows == {2 * (1 + K)}
        with known.running():
            found, rows = pushed(v)
        assert rows == ({2 * K} if number else {2 * (1 + K)})
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_pass_that_broke_off_leaves_nothing_known():
    known = KnownPrimals()
    x = DualTensor(torch.randn(1 + K, 2, 3, 6, 6))
    weight = torch.randn(4, 3, 3, 3)

    def run(weight):
        with dual_pass(), known.running():
            dual = DualTensor(x._buffer.clone())
            out = F.conv2d(dual, weight).buffer
            if weight.isnan().any():
                raise RuntimeError("broken off")
            return out

    with pytest.raises(RuntimeError, match="broken off"):
        run(weight * torch.nan)
    for _ in range(3):
        assert torch.allclose(run(weight)[0], F.conv2d(x._buffer[0], weight), atol=1e-5)


def test_autocast_is_that_of_the_place_where_the_model_calls_it():
    x, weight = torch.randn(1 + K, 2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    with dual_pass():
        outside = F.conv2d(DualTensor(x), weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert outside.buffer.dtype == torch.float32
            inside = F.conv2d(DualTensor(x), weight)
            assert inside.dtype == torch.bfloat16
        assert inside.buffer.dtype == torch.bfloat16
        torch.testing.assert_close(outside.buffer[0], F.conv2d(x[0], weight))
