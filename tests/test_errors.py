"""Bad input: each refusal says what was seen and the line to write."""

import warnings

import models
import numpy as np
import pytest
import torch
from annotations import shapes_unchecked
from torch import nn

import torchgeom_probe as tgp

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))  # the same, whatever ran before


def _refused(match, model, x=X, *, layers="", estimator=None, **options):
    with shapes_unchecked(), pytest.raises(tgp.ProbeError, match=match):
        tgp.measure(model, x, layers=layers, estimator=estimator or tgp.Subspace(k=2), **options)


# ------------------------------------------------------------------------------------------------------------- layers


def test_a_misspelt_layer_lists_the_close_names():
    _refused(r"no layer 'layer33'.*\n.*'layer3'", models.cifar_resnet(), torch.zeros(1, 3, 8, 8), layers="layer33")


def test_a_glob_that_matches_nothing():
    _refused(r"no layer matches 'block\*'.*stays within one level", models.mlp(), layers="block*")


def test_no_layers():
    _refused(r"layers=\[\] asks for no layer", models.mlp(), layers=[])


def test_a_module_of_another_model():
    _refused("is no part of this model", models.mlp(), layers=nn.Linear(2, 3))


def test_a_type_that_the_model_has_not():
    _refused("no module of type Conv2d", models.mlp(), layers=nn.Conv2d)


def test_a_callable_that_accepts_nothing():
    _refused("accepted none of the model's 6 modules", models.mlp(), layers=lambda name, module: False)


def test_layers_of_a_wrong_kind():
    _refused("layers= got 3 of type int", models.mlp(), layers=3)


def test_a_layer_that_never_fires():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.used(x)

    _refused(r"layer 'spare' never fired.*\nLikely", Unused(), layers=["used", "spare"])


def test_a_checkpointed_container_never_fires():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3)
    model.set_grad_checkpointing(True)
    model.train()  # checkpoints even so: the model asks for the flag alone
    _refused(r"set_grad_checkpointing\(False\)", model, torch.zeros(1, 3, 32, 32), layers="layer2")


# -------------------------------------------------------------------------------------------------------------- input


def test_an_integer_input_points_to_the_embedding():
    _refused("of integer type.*\n.*source='embed'", models.Tokens(), torch.zeros(2, 3, dtype=torch.long))


def test_several_floating_inputs():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    _refused("2 floating tensors", Sum(), (X, X))


def test_no_tensor_and_no_sample():
    _refused("x is a str", models.mlp(), "image.png")
    _refused("x holds no tensor", models.mlp(), ())
    _refused("no sample to measure at", models.mlp(), X[:0])


def test_another_dtype_or_a_wrong_shape():
    _refused(r"Convert it:  x.to\(torch.float32\)", models.mlp(), X.double())
    _refused(r"own forward pass fails on x of shape \(4, 7\)", models.mlp(), torch.zeros(4, 7))


def test_another_device():
    _refused(r"x is on meta, the model on cpu.*\nMove it", models.mlp(), X.to("meta"))


def test_more_directions_than_inputs():
    _refused(r"k=8 orthonormal directions.*d=5.*\nWrite Subspace\(k=5\)", models.mlp(), estimator=tgp.Subspace(k=8))
    for k in (0, -1):
        with pytest.raises(tgp.ProbeError, match=f"k={k} directions"):
            tgp.Subspace(k=k)


def test_directions_of_a_wrong_shape_or_with_another_estimator():
    _refused(r"directions= has shape \(4, 5\)", models.mlp(), directions=X)
    _refused("must be a floating tensor", models.mlp(), directions=torch.ones(1, 4, 5, dtype=torch.long))
    _refused(
        r"directions= are an estimator of their own.*\n.*estimator=Along\(directions\)",
        models.mlp(),
        directions=X[None],
        estimator=tgp.Exact(),
    )


# -------------------------------------------------------------------------------------------------------- the tangent


class Cut(nn.Module):
    """Two linear maps with something in between that no derivative survives."""

    def __init__(self, cut):
        super().__init__()
        self.a, self.b, self.cut = nn.Linear(5, 3), nn.Linear(3, 7), cut

    def forward(self, x):
        return self.b(self.cut(self.a(x)))


@pytest.mark.parametrize("engine", ["functorch", "vjp"])
@pytest.mark.parametrize(
    "cut",
    [
        lambda h: h.detach(),
        lambda h: h.data,
        lambda h: h + torch.tensor(h),
        lambda h: h + torch.autograd.Variable(h),
        lambda h: h + nn.Parameter(h),
    ],
    ids=["detach", "data", "tensor", "Variable", "Parameter"],
)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_what_autograd_would_take_for_a_constant(cut, engine):
    _refused("the tangent was lost", Cut(cut), layers="b", engine=engine)


def test_a_stopped_gradient_stops_no_derivative():
    """x + (f(x) - x).detach() is f(x), and moves with x: reading the cut as a constant would be silently wrong."""
    torch.manual_seed(0)
    model, straight = Cut(torch.sin), Cut(lambda h: h + (h.sin() - h).detach())
    straight.load_state_dict(model.state_dict())
    for engine in ("auto", "fused"):
        true, found = (tgp.measure(m, X, layers="b", engine=engine)["b"].singular_values for m in (model, straight))
        assert torch.allclose(found, true, rtol=1e-5, atol=1e-7)


def test_a_detached_statistic_on_the_side_is_no_cut():
    class Logged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 3)

        def forward(self, x):
            h = self.a(x)
            self.norm = h.detach().norm()
            return h

    model = Logged()
    g = tgp.measure(model, X, layers="a", estimator=tgp.Exact(), normalize=False)["a"]
    assert torch.allclose(
        g.singular_values, torch.linalg.svdvals(model.a.weight.detach().double()).expand(4, 3), rtol=1e-5
    )
    assert not hasattr(model, "norm")  # nothing stays behind


def test_numbers_taken_out_of_torch():
    _refused(r"\.item\(\) takes numbers", Cut(lambda h: h * h.max().item()), layers="b")
    _refused(r"\.numpy\(\) takes numbers", Cut(lambda h: torch.from_numpy(h.numpy() * 2)), layers="b")


def test_inference_mode_and_no_grad_inside_the_model():
    def inferred(h):
        with torch.inference_mode():
            return h * 2

    def ungraded(h):
        with torch.no_grad():
            return h * 2

    def in_place(h):
        with torch.no_grad():
            h.mul_(2)
        return h

    def by_keyword(h):
        with torch.no_grad():
            return torch.mul(input=h, other=2)

    def as_a_tuple(h):
        with torch.no_grad():
            return torch.cat((h * 2).chunk(3, 1), 1)

    for cut in (inferred, ungraded, in_place, by_keyword, as_a_tuple):
        model = Cut(cut)
        _refused("the tangent was lost.*under torch.no_grad", model, layers="b", engine="vjp")
        product = model.b.weight @ (2 * model.a.weight)  # forward mode does not mind
        g = tgp.measure(model, X, layers="b", estimator=tgp.Subspace(k=5), normalize=False)["b"]
        assert torch.allclose(g.singular_values[0, :3], torch.linalg.svdvals(product.detach().double())[:3], rtol=1e-4)


def test_a_layer_that_does_not_depend_on_the_input():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 3)

        def forward(self, x):
            return x[:, :3] + self.table(torch.arange(x.shape[0], device=x.device))

    for engine in ("fused", "functorch", "vjp"):
        _refused("the tangent was lost.*does not depend on it", Table(), layers="table", engine=engine)


class OldFunction(torch.autograd.Function):
    """An op with neither a forward derivative nor a vmap rule, and a C-level body that no rule can look into."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def test_an_op_without_forward_derivative():
    model = Cut(OldFunction.apply)
    _refused(r"\.numpy\(\)|\.detach\(\)", model, layers="b", engine="fused")
    assert torch.isfinite(model(X)).all()


@torch.library.custom_op("tests::without_a_derivative", mutates_args=())
def without_a_derivative(h: torch.Tensor) -> torch.Tensor:
    return h**3


@pytest.mark.parametrize("engine", ["auto", "fused", "functorch", "vjp"])
def test_an_op_without_a_derivative_is_named(engine):
    """torch reads it as zero, in both of its modes, so that x + f(x) would look right."""
    _refused("without_a_derivative", Cut(lambda h: h + without_a_derivative(h)), layers="b", engine=engine)


def test_a_fake_quantised_layer_is_constant_as_it_runs():
    def quantised(h):
        return torch.fake_quantize_per_tensor_affine(h, 0.1, 0, -9, 9).sin()

    _refused("constant between its jumps", Cut(quantised), layers="b")


def test_auto_goes_on_to_the_next_engine():
    """Writing through a view of a plain tensor: refused by the dual pass, fine elsewhere."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 3)

        def forward(self, x):
            out = torch.zeros(x.shape[0], 2, 3)
            for step in range(2):
                out[:, step].copy_(torch.tanh(self.a(x)) * (step + 1))
            return out

    model = Recurrent()
    _refused("writes a tensor that depends on the input into a plain one", model, engine="fused")
    g = tgp.measure(model, X, layers="", estimator=tgp.Subspace(k=5), normalize=False)[""]
    assert g.engine == "functorch"
    stacked = torch.stack(
        [
            torch.func.jacrev(lambda s: torch.tanh(model.a(s)).repeat(2) * torch.tensor([1.0] * 3 + [2.0] * 3))(s)
            for s in X
        ]
    )
    assert torch.allclose(g.singular_values[:, :3], torch.linalg.svdvals(stacked.detach().double())[:, :3], rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- the batch


def test_train_mode_batch_norm():
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).train()
    _refused("couples the samples.*\n.*mode='eval'", model, mode="as_is")
    no_statistics = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False))
    _refused("couples the samples.*\n.*track_running_stats=True", no_statistics)
    functional = Cut(lambda h: nn.functional.batch_norm(h, None, None, training=True))
    for engine in ("auto", "fused", "functorch", "vjp"):
        _refused("couples the samples", functional, engine=engine)


def test_a_first_axis_that_is_not_the_batch():
    class Sequence(nn.Module):
        def forward(self, x):
            return x.view(-1, 5, 1).transpose(0, 1)

    _refused(r"first axis is not the batch of \d samples.*\n.*transform=", Sequence())
    g = tgp.measure(
        Sequence(), X, layers="", transform=lambda out: out.transpose(0, 1), estimator=tgp.Exact(), normalize=False
    )[""]
    assert g.log_volume.abs().max() < 1e-6


def test_an_output_as_wide_as_the_longest_sample():
    class Packed(nn.Module):
        def forward(self, x, lengths):
            return (x.tanh() * (torch.arange(x.shape[1]) < lengths[:, None])[..., None])[:, : lengths.max()]

    def batch(*lengths):
        return {"x": torch.randn(len(lengths), 4, 5), "lengths": torch.tensor(lengths)}

    refused = r"or how wide, changes with the others.*\n.*measure one at a time"
    with pytest.raises(tgp.ProbeError, match=refused):
        tgp.measure(Packed(), batch(4, 2, 2), layers="")
    assert tgp.measure(Packed(), batch(4, 4, 2), layers="")[""].num_features == 20  # together they are as wide as that
    with pytest.raises(tgp.ProbeError, match=refused):
        tgp.measure(Packed(), batch(4, 4, 2, 2), layers="", memory_budget=4000)  # and one by one they are not
    assert tgp.measure(Packed(), batch(2), layers="")[""].num_features == 10


def test_an_encoder_that_is_two_functions():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

        def forward(self, x):
            padding = torch.arange(5).expand(len(x), 5) >= 3
            return self.encoder(x, src_key_padding_mask=padding)

    model, x = Padded(), torch.randn(2, 5, 8)
    with pytest.raises(tgp.ProbeError, match=r"is two functions.*\n.*use_nested_tensor = False"):
        tgp.measure(model, x, layers="")
    model.get_submodule("encoder").use_nested_tensor = False
    assert tgp.measure(model, x, layers="")[""].engine == "fused"


def test_check_finds_coupled_samples_that_no_shape_gives_away():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    report = tgp.GeometryProbe(Centred(), layers="").check(X)
    assert report.coupled_layers == [""]
    assert not report.ok
    assert "samples depend on each other" in str(report)


@pytest.mark.parametrize("engine", ["fused", "functorch", "vjp"])
@pytest.mark.parametrize("estimator", ["exact", "subspace:2", "topk:2", "logdet:1e-3"])
def test_a_value_that_is_not_finite_has_no_geometry(engine, estimator):
    """Behind a ReLU the tangent of a nan is 0, and LAPACK's QR drops a nan at the head of a single column."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU())
    x = X.clone()
    x[1, 0] = torch.nan
    report = tgp.measure(model, x, layers=["1", "3"], estimator=estimator, engine=engine)
    clean = tgp.measure(model, X, layers=["1", "3"], estimator=estimator, engine=engine)
    for name, g in report.items():
        others = torch.tensor([True, False, True, True])
        assert g.value[1].isnan()
        assert g.singular_values[1].isnan().all()
        assert g.rank is None or g.rank[1] == -1
        assert torch.allclose(g.value[others], clean[name].value[others], atol=1e-5)
    with torch.no_grad():  # an overflow in the weights, which a ReLU hides in half of the units
        model[0].weight.mul_(1e38)
        model[2].weight.mul_(1e10)
    assert tgp.measure(model, X, layers="3", estimator=estimator, engine=engine)["3"].value.isnan().all()


@pytest.mark.parametrize("estimator", [tgp.Exact(), tgp.Subspace(k=1)], ids=str)
def test_a_weight_that_is_nan(estimator):
    model = nn.Linear(5, 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    assert tgp.measure(model, torch.zeros(1, 5).double(), layers="", estimator=estimator)[""].value.isnan().all()


def test_check_finds_a_wrong_derivative():
    from torchgeom_probe.dual import RULES, DualTensor

    right = RULES[torch.tanh]
    RULES[torch.tanh] = RULES[torch.Tensor.tanh] = lambda x: DualTensor(x.buffer.tanh())
    try:
        report = tgp.GeometryProbe(nn.Sequential(nn.Linear(5, 3), nn.Tanh()), layers="*").check(3 * X)
    finally:
        RULES[torch.tanh] = RULES[torch.Tensor.tanh] = right
    assert not report.ok
    assert report.adjoint_errors["0"] <= report.tolerance < report.adjoint_errors["1"]
    assert report.difference_errors["0"] <= report.difference_tolerance < report.difference_errors["1"]
    assert "TOO LARGE" in str(report)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 0.01), (torch.float64, 0.01)])
def test_check_finds_a_derivative_that_is_a_little_wrong(dtype, off):
    """In either type: both sides are made in float64."""
    from torchgeom_probe.dual import RULES, DualTensor

    right = RULES[torch.tanh]

    def wrong(input):
        buffer = right(input).buffer.clone()
        buffer[1:] *= 1 + off
        return DualTensor(buffer)

    RULES[torch.tanh] = RULES[torch.Tensor.tanh] = wrong
    try:
        model = nn.Sequential(nn.Linear(5, 3), nn.Tanh()).to(dtype)
        report = tgp.GeometryProbe(model, layers="*").check(X.to(dtype))
    finally:
        RULES[torch.tanh] = RULES[torch.Tensor.tanh] = right
    assert not report.ok
    assert report.difference_errors["0"] <= report.difference_tolerance < report.difference_errors["1"]
    assert 0.5 * off < report.difference_errors["1"] < 1.5 * off


def test_check_finds_a_wrong_derivative_of_what_has_no_float64():
    class Narrow(torch.autograd.Function):
        """float32 alone, with a derivative that is 1.15 times too large in both modes, which agree with each other."""

        @staticmethod
        def forward(x):
            assert x.dtype == torch.float32
            return torch.from_numpy(np.sin(x.numpy()))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            return 1.15 * grad * ctx.saved_tensors[0].cos()

    class Body(nn.Module):
        def forward(self, x):
            return Narrow.apply(x)

    torch.manual_seed(0)
    layers = [m for _ in range(10) for m in (nn.Linear(16, 16), nn.ReLU())]
    report = tgp.GeometryProbe(nn.Sequential(*layers, Body()), layers="", engine="vjp").check(torch.randn(3, 16))
    assert max(report.adjoint_errors.values()) < report.tolerance
    assert not report.ok


def test_empty_tensors_in_every_engine():
    class Empty(nn.Module):
        """Puts an empty part of its input beside an empty constant, as caches begin."""

        def forward(self, x):
            begun = x[:, :0] * 2
            return torch.cat([begun, x.new_zeros(len(x), 0), x.sin()], 1)

    for engine in ("fused", "functorch", "vjp"):
        values = tgp.measure(Empty(), X, layers="", engine=engine)[""].singular_values
        assert torch.allclose(values, X.cos().abs().double().sort(descending=True).values / 5**0.5, atol=1e-6)


def test_a_layer_without_a_single_feature():
    class Nothing(nn.Module):
        def forward(self, x):
            return x[:, :0]

    _refused(r"layer '' puts out no feature: its shape is \[4, 0\]", Nothing(), layers="")


class Surrogate(torch.autograd.Function):
    """sin with the derivative of the identity, in both modes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.clone()


def test_check_finds_a_derivative_that_torch_itself_has_wrong():
    """Where forward and reverse mode agree on a surrogate only differences know the function."""
    for engine in ("functorch", "vjp"):
        report = tgp.GeometryProbe(Cut(Surrogate.apply), layers="b", engine=engine).check(X)
        assert not report.ok
        assert report.difference_errors["b"] > 0.01 > report.adjoint_errors["b"]
    report = tgp.GeometryProbe(Cut(Surrogate.apply), layers="b").check(X)
    assert report.difference_errors["b"] < 1e-4 < report.tolerance < report.adjoint_errors["b"]


def test_a_surrogate_gradient_is_no_adjoint():
    class Wide(nn.Module):
        def __init__(self, function):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.function = nn.Linear(40, 30), nn.Linear(30, 20), function

        def forward(self, x):
            return self.b(self.function(self.a(x)))

    x = torch.randn(3, 40)
    for estimator in ("topk:2", "logdet", "trace:probes=6,method=hutch++"):
        with pytest.raises(tgp.ProbeError, match="surrogate gradient"):
            tgp.measure(Wide(Surrogate.apply), x, layers="b", estimator=estimator)
    true, found = (tgp.measure(Wide(f), x, layers="b", estimator="exact")["b"] for f in (torch.sin, Surrogate.apply))
    assert (true.engine, found.engine) == ("vjp", "fused")  # by rows, unless they are another function's
    assert torch.allclose(found.singular_values, true.singular_values, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((X.long()[:, 0],), {}, "If these are labels, none are needed"),
        ((X[0],), {}, r"x\[:1\] in place of x\[0\]"),
        ((X,), {"labels": X[:, 0]}, "'labels' is no option.*\nLeave it out"),
        ((X,), {"estimator": "Exact()"}, "Write, for instance, estimator='exact'"),
        ((X,), {"estimator": "tgp.TopK(k=2)"}, "Write, for instance, estimator='topk:k=2'"),
        ((X,), {"estimator": "TopK(10, 1e-3)"}, "Write, for instance, estimator='topk:10'"),
        (
            (X,),
            {"estimator": "topk:4"},
            r"layer '2' is 2 x 5 and has 2 singular values, the fewest.*\nWrite TopK\(k=2\)",
        ),
    ],
)
def test_what_a_newcomer_wrote(arguments, options, match):
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(3, 2))
    if arguments[0].ndim == 1 and arguments[0].is_floating_point():
        model = nn.Sequential(nn.Conv1d(1, 6, 3), nn.Flatten(), nn.Linear(18, 2))
    with pytest.raises(tgp.ProbeError, match=match):
        tgp.measure(model, *arguments, **{"layers": "*"} | options)


def test_check_cries_no_wolf():
    class Narrow(nn.Module):
        """float64, with a softmax in float32, as transformers have it."""

        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 3).double()

        def forward(self, x):
            return 3 * self.a(x).float().softmax(-1).double()

    straight = Cut(lambda h: h + (h.sin() - h).detach())
    half = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).bfloat16()
    torch.manual_seed(0)
    deep = nn.Sequential(*(m for _ in range(20) for m in (nn.Linear(256, 256), nn.ReLU())))
    for layer in deep[::2]:  # features that are nearly constant, behind thousands of kinks
        nn.init.normal_(layer.weight, std=0.3 * (2 / 256) ** 0.5)
        nn.init.normal_(layer.bias)
    for model, x in ((Narrow(), X.double()), (straight, X), (half, X.bfloat16()), (deep, torch.randn(4, 256))):
        report = tgp.GeometryProbe(model, layers="").check(x)
        assert report.ok, report
    report = tgp.GeometryProbe(straight, layers="").check(X)
    assert not report.adjoint_errors
    assert "reverse mode, which TopK, LogDet and Trace need, cannot run" in str(report)


def test_check_names_what_it_would_use():
    report = tgp.GeometryProbe(nn.Sequential(nn.Linear(5, 3), nn.Softmin(1)), layers="*").check(X)
    assert report.ok
    assert "linear" in report.fused
    refused = tgp.GeometryProbe(Cut(without_a_derivative), layers="b").check(X)
    assert not refused.ok
    assert refused.refused == ["without_a_derivative.default"]


# -------------------------------------------------------------------------------------------------------- the options


def test_options():
    model = models.mlp()
    _refused("engine='fast' is unknown", model, engine="fast")
    _refused("mode='train' is unknown", model, mode="train")
    _refused("estimator=10 is no estimator", model, estimator=10)
    _refused(r"is no estimator.\n.*estimator=Exact\(\)", model, estimator=tgp.Exact)
    _refused(
        "estimator='fast' is unknown; there are auto, directions, exact, logdet, subspace, topk, trace",
        model,
        estimator="fast",
    )
    _refused("TopK has no argument 'p'; it has k, tol, block", model, estimator="topk:p=3")
    _refused("Exact takes no argument", model, estimator="exact:3")
    _refused("source='0' and wrt='input' each say", model, source="0", wrt="input")
    _refused("memory_budget=0", model, memory_budget=0)
    _refused("memory_budget='1GB': it is a number of bytes", model, memory_budget="1GB")
    _refused("model is a function", lambda x: x)
    _refused(r"source='\*' names 5 modules", model, source="*")
    _refused("transform= has the key '1'", model, layers="3", transform={"1": torch.tanh})
    _refused("the model has no layer 'a'", model, layers="3", transform={"a": torch.tanh})


def test_a_source_that_does_not_serve():
    _refused("source='0' runs more than once", _Repeated(), source="0")
    _refused("of source='embed' is torch.int64", _Integers(), torch.zeros(2, 3, dtype=torch.long), source="embed")


class _Repeated(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(5, 5))

    def forward(self, x):
        return self[0](self[0](x))


class _Integers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Identity()

    def forward(self, ids):
        return self.embed(ids).float()


def test_no_features():
    class Labels(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    _refused("puts out no floating tensor", Labels())


def test_a_jacobian_beyond_the_budget():
    _refused(
        r"GiB, and the memory budget is.*\n.*memory_budget=",
        nn.Linear(5, 10**6),
        estimator=tgp.Exact(),
        memory_budget=1000,
    )


def test_a_closed_probe_and_models_that_cannot_be_hooked():
    with tgp.GeometryProbe(models.mlp(), layers="1") as probe:
        probe.measure(X[:, :5], directions=torch.randn(2, 4, 5))
    with pytest.raises(tgp.ProbeError, match="this probe is closed"):
        probe.measure(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch deprecate tracing
        traced = torch.jit.trace(models.mlp(), X)
    _refused("is a ScriptModule", traced)
    _refused("'0.weight' is a lazy parameter", nn.Sequential(nn.LazyLinear(3)))


def test_the_models_own_error_is_told_as_such():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("no such head")

    _refused(r"own forward pass fails .*ValueError: no such head", Broken())


def test_unknown_report_key():
    report = tgp.measure(models.mlp(), X, layers="1", estimator=tgp.Exact())
    with pytest.raises(KeyError, match=r"'2' was not measured; the report has \['1'\]"):
        report["2"]


@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
def test_an_op_of_higher_order_is_refused_by_name():
    """What counts the bytes of the plain pass lets it through: the model's own pass does not fail."""
    attention = pytest.importorskip("torch.nn.attention.flex_attention")

    class Attention(nn.Module):
        def forward(self, x):
            heads = x.view(-1, 1, 5, 16)
            return attention.flex_attention(heads, heads, heads)

    with pytest.raises(tgp.ProbeError, match="'flex_attention' has no derivative that could be used"):
        tgp.measure(Attention(), torch.randn(2, 80), layers="", engine="fused")
