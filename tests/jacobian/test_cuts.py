"""What is cut off from its derivative: looked at alone it changes nothing, read again it is followed or refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn

import torchgeom_probe as tgp

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
V = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
KEPT: dict[str, Any] = {}
LIBRARY = torch.library.Library("cuts", "DEF")
LIBRARY.define("double_(Tensor(a!) x) -> ()")
LIBRARY.impl("double_", lambda x: [None, x.copy_(2 * x)][0], "CPU")


@torch.library.custom_op("cuts::square_in_place", mutates_args={"x"})
def square_in_place(x: torch.Tensor) -> None:
    x.copy_(x * x)


class Between(nn.Module):
    """Two linear maps with a function, and a hook, in between."""

    def __init__(self, function=torch.tanh, hook=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.function = nn.Linear(6, 6).double(), nn.Linear(6, 5).double(), function
        if hook is not None:
            self.a.register_forward_hook(hook)

    def forward(self, x):
        return self.b(self.function(self.a(x)))


def measured(model, **options):
    options = {"normalize": False, "layers": "", **options}
    return tgp.measure(model, X, **options)[""]


def right(model, engine="auto"):
    """Whether the singular values of JV are those of central differences."""
    with torch.no_grad():
        columns = [(model(X + 1e-6 * v) - model(X - 1e-6 * v)).flatten(1) / 2e-6 for v in V]
    expected = torch.linalg.svdvals(torch.stack(columns, 2))
    return torch.allclose(measured(model, directions=V, engine=engine).singular_values, expected, rtol=1e-6, atol=1e-7)


def under_no_grad(module, args, out):
    with torch.no_grad():
        KEPT["seen"] = out.norm()


LOGS = {
    "detach": lambda module, args, out: KEPT.update(seen=out.detach()),
    "a view": lambda module, args, out: KEPT.update(seen=out.data.cpu().flatten()[:3]),
    "item": lambda module, args, out: KEPT.update(seen=out.norm().item()),
    "format": lambda module, args, out: KEPT.update(seen=f"{out.mean():.2f}"),
    "numpy": lambda module, args, out: KEPT.update(seen=out.detach().numpy().copy()),
    "no_grad": under_no_grad,
}


@pytest.mark.parametrize("log", LOGS)
def test_a_log_of_activations_changes_no_measurement(log):
    plain, logged = Between(), Between(hook=LOGS[log])
    for estimator in (tgp.Subspace(k=2), tgp.TopK(2), tgp.Exact()):
        expected = measured(plain, estimator=estimator).value
        assert torch.equal(measured(logged, estimator=estimator).value, expected)


def scaled(module, args, out):
    KEPT["scale"] = out.detach().abs().amax(1, keepdim=True)
    return out / KEPT["scale"]


def doubled_outside(module, args, out):
    out.detach().numpy()[:] *= 2


def test_what_is_read_again_is_no_log():
    for hook in (scaled, lambda module, args, out: out + (out.round() - out).detach()):
        assert right(Between(hook=hook), "fused")
        with pytest.raises(tgp.ProbeError, match="'detach' makes of a tensor that depends on the input"):
            measured(Between(hook=hook), engine="vjp")
    for hook in (lambda module, args, out: out * out.norm().item(), doubled_outside):
        with pytest.raises(tgp.ProbeError, match="takes numbers that depend on the input out of torch"):
            measured(Between(hook=hook))


def test_cuts_that_would_cancel_are_read_again():
    with pytest.raises(tgp.ProbeError, match="'detach' makes"):
        measured(Between(lambda h: h * (h.detach() / h.detach())), engine="vjp")


class OwnDerivative(torch.autograd.Function):
    """h², written in place by an op without a derivative, beside a number taken out of torch."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        assert h.detach().sum().item() < 1e9
        squared = h.detach().clone()
        square_in_place(squared)
        return squared

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def test_an_op_in_place_without_a_derivative():
    def squared(h):
        h = h.clone()
        square_in_place(h)
        return h

    def doubled(h):
        h = h.clone()
        torch.ops.cuts.double_(h)
        return h

    for function in (squared, doubled):
        for engine in ("auto", "functorch", "vjp"):
            with pytest.raises(tgp.ProbeError, match="writes its result into its argument 'x'"):
                measured(Between(function), engine=engine)
    assert measured(Between(OwnDerivative.apply)).engine == "vjp"  # the way out that the message names
    assert right(Between(OwnDerivative.apply))


def new_memory(h):
    other = torch.empty_like(h)
    other.data = h * h
    return other


def in_a_thread(h):
    found = [h]
    thread = Thread(target=lambda: found.insert(0, h * h))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore:.*nested tensors")
def test_ways_round_the_refusal():
    with pytest.raises(tgp.ProbeError, match=r"assigns to \.data of a tensor"):
        measured(Between(new_memory))
    with pytest.raises(tgp.ProbeError, match="threads of its own"):  # the thread alone hears of it
        measured(Between(in_a_thread))
    with ThreadPoolExecutor(1) as pool:
        for how in (in_a_thread, lambda h: h + pool.submit(torch.sin, h).result()):
            with pytest.raises(tgp.ProbeError, match=r"threads of its own(.|\n)*Measure it with engine='vjp'"):
                measured(Between(how), engine="functorch")
            assert right(Between(how), "vjp")

        def written(h):
            kept = torch.zeros(h.shape, dtype=h.dtype)
            pool.submit(kept.copy_, h.detach()).result()
            return h.sin() + kept

        for how in (written, lambda h: h + pool.submit(lambda: 2 * h.detach()).result()):
            with pytest.raises(tgp.ProbeError, match="threads of its own"):
                measured(Between(how), engine="functorch")
        logged = []
        for log in (lambda h: h.shape, lambda h: h.detach().mean().item(), lambda h: h.data.sum()):
            noted = Between(lambda h, log=log: (pool.submit(lambda: logged.append(log(h))).result(), h.sin())[1])
            assert right(noted, "functorch")
        assert logged
    copied = Between(lambda h: h + torch.nested.nested_tensor(list(h)).to_padded_tensor(0.0))
    with pytest.raises(tgp.ProbeError, match="takes a constant made of a tensor that depends"):
        measured(copied, engine="vjp")
    with ThreadPoolExecutor(1) as pool, pytest.raises(tgp.ProbeError, match="threads of its own"):
        measured(Between(lambda h: pool.submit(torch.sin, h).result()))


def conjugated(h):
    return torch.view_as_real(nn.functional.silu(torch.view_as_complex(h.view(-1, 3, 2)) * (1 + 2j))).flatten(1)


SPARSE = torch.eye(6).double().to_sparse()
WITHOUT_A_REFUSAL = {
    "a complex silu": conjugated,
    "deepcopy": lambda h: h + __import__("copy").deepcopy(h * h),
    "cond": lambda h: torch.cond(torch.tensor(True), torch.sin, torch.cos, (h,)),
    "requires_grad_": lambda h: h + (h * h).requires_grad_(False),
    "lstsq": lambda h: torch.linalg.lstsq(h.view(-1, 2, 3).mT @ h.view(-1, 2, 3) + torch.eye(3), h.view(-1, 3, 2))[
        0
    ].flatten(1),
}


@pytest.mark.parametrize("name", WITHOUT_A_REFUSAL)
def test_the_dual_pass_follows(name):
    assert right(Between(WITHOUT_A_REFUSAL[name]), "fused")


def test_reverse_mode_follows_sparse_constants_and_a_vmap_of_the_models_own():
    for function in (lambda h: torch.sparse.mm(SPARSE, h.T.contiguous()).T, torch.func.vmap(lambda h: h.sin() * h[0])):
        assert right(Between(function), "vjp")
    assert right(Between(torch.func.vmap(torch.sin)), "functorch")
    with pytest.raises(tgp.ProbeError, match="'silu' has no derivative in torch's forward mode"):
        measured(Between(conjugated), engine="functorch")


class StraightThrough(torch.autograd.Function):
    """Round, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, h):
        return h.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_a_surrogate_gradient_is_measured_where_reverse_mode_is_asked_for():
    model = Between(lambda h: h + StraightThrough.apply(h))
    assert right(model)  # the function that runs
    surrogate = torch.einsum("oh,hi,kbi->bok", model.b.weight, 2 * model.a.weight, V)
    found = measured(model, directions=V, engine="vjp").singular_values
    assert torch.allclose(found, torch.linalg.svdvals(surrogate.detach()), atol=1e-10)


COUPLED = {
    "place": lambda x: x * torch.arange(1.0, len(x) + 1)[:, None],
    "pairs": lambda x: (x.view(-1, 2, 6)[:, 0] * x.view(-1, 2, 6)[:, 1]).repeat_interleave(2, 0),
    "the largest": lambda x: x / x.abs().max(),
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("largest", range(3))
def test_whichever_sample_the_others_depend_on(name, largest):
    model, x = Between(), X.clone()
    x[largest] *= 100
    model.forward = COUPLED[name]
    with pytest.raises(tgp.ProbeError, match="couples the samples"):
        tgp.measure(model, x, layers="")


def test_a_graph_is_one_sample():
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3).double()

        def forward(self, x):
            h = self.linear(x[0])
            return torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])[None]

    found = tgp.measure(Graph(), X[None], layers="", estimator=tgp.Subspace(k=3), normalize=False)[""]
    assert found.num_features == 12
    assert found.engine == "fused"


class Own(torch.Tensor):
    """A subclass of the user's."""


@pytest.mark.parametrize("engine", ["auto", "functorch", "vjp"])
def test_the_input_itself_made_a_constant_is_refused(engine):
    model = Between()
    model.forward = lambda x: torch.Tensor._make_subclass(Own, x).sin() + x
    with pytest.raises(tgp.ProbeError, match="the tangent was lost: 'sin' takes a constant"):
        measured(model, directions=V, engine=engine)
