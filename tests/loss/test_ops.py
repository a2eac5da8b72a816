"""Gradients through every op of torch's own table in a pass that keeps a graph, and what is refused for cause."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from dual.tables import calls_of
from dual.test_torch_ops import COMMON, EVERY, OPS
from loss.gradients import judged_gradient
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.dual import DualTensor, dual_pass
from torchgeom_probe.dual.graph import WRONG
from torchgeom_probe.dual.ops import ops_named
from torchgeom_probe.dual.rules.elementwise import BY_ONE_JVP, SLOPES
from torchgeom_probe.errors import EngineRefusal, ProbeError

pytestmark = pytest.mark.filterwarnings("ignore")
#: name → why the gradient is not that of the differences, for a plain tensor in a plain step of torch either
AS_IN_TORCH = {
    "igamma": "raises: no derivative by its first argument",
    "igammac": "raises: no derivative by its first argument",
    "special_zeta": "raises: no derivative by its first argument",
    "linalg_eig": "raises: of complex eigenvectors only a part is unique",
    "linalg_eigh": "nan where eigenvalues are equal",
    "nn_functional_cosine_embedding_loss": "none by the target",
    "nn_functional_hinge_embedding_loss": "none by the target",
    "nn_functional_max_unpool1d": "the samples name a place twice",
    "nn_functional_max_unpool2d": "the samples name a place twice",
    "nn_functional_max_unpool3d": "the samples name a place twice",
}
#: casts to types in which a difference sees the steps of rounding and no slope: of these the derivative is known
CASTS = {"half": torch.half, "bfloat16": torch.bfloat16, "chalf": torch.chalf}


@contextlib.contextmanager
def as_in_a_step():
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def faults(name, most):
    with as_in_a_step():
        verdicts = [(call, judged_gradient(*rest)) for call, *rest in calls_of(OPS[name], most, layouts=False)]
    return [f"{call}: {v.kind}: {v.what}" for call, v in verdicts if v.kind in ("wrong", "crashed")]


@pytest.mark.parametrize("name", COMMON[::3])
def test_gradients_of_common_ops(name):
    assert not faults(name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EVERY if name not in {*AS_IN_TORCH, *CASTS}])
def test_gradients_of_every_op(name):
    assert not faults(name, 3)


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_has_the_gradient_of_the_identity(name):
    x, u = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    with dual_pass(graph=True):
        leaf = x.clone().requires_grad_()
        out = getattr(DualTensor(leaf * 1.0), name)().buffer
        wide = out.to(torch.cdouble).real
        assert out.dtype == CASTS[name]
        assert torch.equal(wide, x.to(out.dtype).to(torch.cdouble).real)
        (found,) = torch.autograd.grad((wide * u).sum(), leaf)
    torch.testing.assert_close(found, u, rtol=2 * torch.finfo(out.dtype).eps, atol=0)


RIGHT = torch.arange(25, dtype=torch.float64).sin().view(5, 5)
TAU = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)


def _square(n=5):
    return torch.randn(n, n, dtype=torch.float64)


#: name in WRONG → a call that shows it: (function, point)
EVIDENCE = {
    "layer_norm": lambda: (lambda x: F.layer_norm(x, (8,)), torch.randn(6, 8).double()),
    "native_layer_norm": lambda: (
        lambda x: torch.native_layer_norm(x, [8], None, None, 1e-5)[0], torch.randn(6, 8).double(),
    ),
    "batch_norm": lambda: (lambda x: F.batch_norm(x, None, None, None, None, True), torch.randn(6, 8).double()),
    "native_batch_norm": lambda: (
        lambda x: torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0], torch.randn(6, 8).double(),
    ),
    "instance_norm": lambda: (lambda x: F.instance_norm(x), torch.randn(2, 3, 10).double()),
    "cumprod": lambda: (lambda x: x.cumprod(-1), torch.randn(3, 5).double().index_fill_(1, torch.tensor([1]), 0.0)),
    "det": lambda: (torch.det, torch.randn(4, 5, 5).double()),
    "slogdet": lambda: (lambda x: torch.linalg.slogdet(x)[1], torch.randn(4, 5, 5).double()),
    "logdet": lambda: (lambda x: torch.logdet(x @ x.mT), torch.randn(4, 5, 5).double()),
    "solve": lambda: (lambda x: torch.linalg.solve(x, RIGHT), _square()),
    "solve_ex": lambda: (lambda x: torch.linalg.solve_ex(x, RIGHT)[0], _square()),
    "tensorsolve": lambda: (lambda x: torch.linalg.tensorsolve(x, RIGHT[0]), _square()),
    "householder_product": lambda: (
        lambda x: torch.linalg.householder_product(x, TAU), torch.randn(5, 3).double(),
    ),
    "orgqr": lambda: (lambda x: torch.orgqr(x, TAU), torch.randn(5, 3).double()),
}  # fmt: skip


#: of these a rule has the derivative
HAVE_RULES = ("layer_norm", "instance_norm")


def test_every_entry_of_the_list_has_its_evidence():
    assert {op for ops in WRONG.values() for op in ops.split()} == set(EVIDENCE)


@pytest.mark.parametrize("name", EVIDENCE)
def test_what_torch_has_wrong_is_refused_or_has_a_rule(name):
    function, x = EVIDENCE[name]()
    v, w = torch.randn_like(x), torch.randn_like(x)
    u = torch.randn_like(function(x))

    def value(y):
        return (u * torch.func.jvp(function, (y,), (v,))[1]).sum()

    def quotient(h):
        return float(
            (8 * (value(x + h * w) - value(x - h * w)) - (value(x + 2 * h * w) - value(x - 2 * h * w))) / (12 * h)
        )

    leaf = x.clone().requires_grad_()
    try:
        torchs = float((torch.autograd.grad(value(leaf), leaf)[0] * w).sum())
        wrong = not abs(torchs - quotient(1e-4)) < 1e-4 * max(1.0, abs(quotient(1e-4)))
    except RuntimeError:  # the graph of the tangent does not hold x at all
        wrong = True
    assert wrong, "mended in this torch: bound its version in WRONG"
    with dual_pass(graph=True):
        b = torch.stack([x, v]).requires_grad_()
        if name not in HAVE_RULES:
            with pytest.raises(ProbeError, match=r"wrong, without an error|couples the samples|could be used"):
                function(DualTensor(b * 1.0))
            return
        out = function(DualTensor(b * 1.0)).buffer[1]
        found = (torch.autograd.grad((u * out).sum(), b)[0][0] * w).sum()
    assert abs(float(found) - quotient(1e-4)) < 1e-6 * max(1.0, abs(float(found)))


def test_ops_that_torch_has_no_gradient_of_are_refused():
    with dual_pass(graph=True):
        x = DualTensor(torch.rand(2, 5, dtype=torch.float64).requires_grad_() * 1.0)
        with pytest.raises(EngineRefusal, match=r"torch has no gradient of 'special_bessel_j0'"):
            torch.special.bessel_j0(x)
        with pytest.raises(EngineRefusal, match=r"torch has no gradient of 'special_hermite_polynomial_h'"):
            torch.special.hermite_polynomial_h(x, 3)
        with pytest.raises(EngineRefusal, match=r"write it|Write  mean \+ std"):
            torch.normal(x, 1.0)
        with pytest.raises(EngineRefusal, match="has no derivative that could be used"):
            torch.scatter_reduce(x, 0, torch.zeros(5, dtype=torch.int64), x, "prod")


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h.norm(dim=-1),
        lambda h: torch.linalg.vector_norm(h, 3, dim=-1),
        lambda h: h.std(-1),
        lambda h: F.cosine_similarity(h, h.roll(1, 1), -1),
        lambda h: torch.cdist(h[:, None], h[:, None].cos() - 1).flatten(1),
    ],
)
def test_a_length_of_zero_leaves_the_gradients_finite(function):
    class Model(nn.Linear):
        def forward(self, x):
            return function(super().forward(x))

    model, x = Model(4, 4, bias=False).double(), torch.randn(3, 4, dtype=torch.float64)
    x[1] = 0
    step = tgp.pushforward(model, x, k=2)
    (found,) = torch.autograd.grad(step.output.square().sum() + step.output.sum(), model.weight, retain_graph=True)
    (plain,) = torch.autograd.grad(model(x).square().sum() + model(x).sum(), model.weight)
    torch.testing.assert_close(found, plain)
    assert torch.autograd.grad(step[""].trace.sum(), model.weight)[0].isfinite().all()


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h ** torch.tensor(2),
        lambda h: h ** torch.tensor([3.0, 2.0, 1.0, 2.0]),
        lambda h: (y := h * 1.0, y.__setitem__(True, h * 3), y.sin())[2],
    ],
)
def test_a_constant_exponent_and_a_written_whole_have_a_gradient(function):
    assert judged_gradient(function, (torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 4),), {}).kind == "equal"


def test_the_slope_of_sinc_near_zero_has_all_its_digits():
    at = torch.tensor([1e-9, 1e-6, 1e-4, 1e-2], dtype=torch.float64)
    with dual_pass():
        slope = torch.sinc(DualTensor(torch.stack([at, torch.ones_like(at)]))).buffer[1]
    v = math.pi * at
    series = -math.pi * v / 3 * (1 - v**2 / 10 + v**4 / 280 - v**6 / 15120)
    torch.testing.assert_close(slope, series, rtol=1e-13, atol=0)


#: where formulas of slopes cancel, divide by 0 or saturate
SPECIAL_POINTS = torch.tensor([0.0, 1e-3, 0.3, 0.5, 1.0, -2.0, 20.0, -30.0], dtype=torch.float64)
MORE_ARGUMENTS = {
    "threshold": (0.1, 0.5), "mvlgamma": (2,), "float_power": (2.0,), "clamp": (-1.0, 1.0), "clip": (-1.0, 1.0),
    "clamp_min": (0.2,), "clamp_max": (0.2,),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted([*SLOPES, *BY_ONE_JVP]))
def test_the_slope_of_a_slope_at_special_points(name):
    op, more = next(iter(ops_named(name))), MORE_ARGUMENTS.get(name, ())

    def slope(at):
        directions = torch.ones_like(at)
        with dual_pass(graph=True):
            return op(DualTensor(torch.stack([at, directions])), *more).buffer[1]

    h = 1e-6
    at = SPECIAL_POINTS.clone().requires_grad_()
    pushed = slope(at)
    (found,) = torch.autograd.grad(pushed.sum(), at)
    before, here, after = (slope(SPECIAL_POINTS + step).detach() for step in (-h, 0, h))
    # at a kink of the slope either side will do, and the mean of both; where it jumps there is nothing to be had
    quotients = torch.stack([(after - before) / (2 * h), (here - before) / h, (after - here) / h])
    defined = ((after - before).abs() < 1e-3 * (1 + here.abs())) & ((after - here).abs() < 1e-3 * (1 + here.abs()))
    error = ((found - quotients).abs() / (1 + quotients.abs())).amin(0)
    assert defined.any()
    assert (error[defined] < 2e-3).all(), error
