"""Ops that torch differentiates as another function than the one that runs: every engine against differences."""

import ast
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.dual.bodies import BODIES
from torchgeom_probe.dual.ops import LEFT_OUT


def points(rows, columns, seed=0):
    return torch.randn(3, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(seed=0):
    a = points(3, 3, seed)
    return a @ a.mT + 3 * torch.eye(3, dtype=torch.float64) + 0.1 * points(3, 3, seed + 1)  # of one triangle alone


SQUARE, WIDE, TALL = points(3, 3), points(2, 3), points(3, 2)
#: what is tried → (function, where): matrices that are neither symmetric nor triangular
CASES = {
    "eigvalsh": (torch.linalg.eigvalsh, SQUARE),
    "eigvalsh, upper": (lambda x: torch.linalg.eigvalsh(x, UPLO="U"), SQUARE),
    "eigh": (lambda x: torch.linalg.eigh(x).eigenvectors.abs(), SQUARE),
    "cholesky": (torch.linalg.cholesky, positive()),
    "cholesky, upper": (lambda x: torch.linalg.cholesky(x, upper=True), positive()),
    "cholesky_ex": (lambda x: torch.linalg.cholesky_ex(x).L, positive()),
    "cholesky_solve": (lambda x: torch.cholesky_solve(x.mT, x), positive()),
    "cholesky_solve, upper": (lambda x: torch.cholesky_solve(x.mT, x, upper=True), positive()),
    "cholesky_inverse": (torch.cholesky_inverse, positive()),
    "cholesky_inverse, upper": (lambda x: x.cholesky_inverse(upper=True), positive()),
    "cholesky_inverse of a factor": (lambda x: torch.cholesky_inverse(torch.linalg.cholesky(x)), positive()),
    "triangular_solve": (lambda x: torch.triangular_solve(x.mT, x)[0], positive()),
    "triangular_solve, options": (
        lambda x: x.triangular_solve(x.mT, upper=False, transpose=True, unitriangular=True).solution, positive(),
    ),
    "pinv": (lambda x: torch.linalg.pinv(x, rtol=0.5), SQUARE),
    "pinv, no truncation": (torch.linalg.pinv, WIDE),
    "pinv, hermitian": (lambda x: torch.linalg.pinv(x, hermitian=True), SQUARE),
    "pinverse": (lambda x: torch.pinverse(x, rcond=0.5), SQUARE),
    "null vector": (lambda x: torch.linalg.svd(x).Vh[:, -1].abs(), WIDE),
    "null vector of torch.svd": (lambda x: torch.svd(x, some=False).V[..., -1].abs(), WIDE),
    "left null vector": (lambda x: torch.linalg.svd(x).U[..., -1].abs(), TALL),
    "values": (lambda x: torch.linalg.svd(x).S, points(2, 5)),
    "projector": (lambda x: (lambda n: n.mT @ n)(torch.linalg.svd(x).Vh[:, 1:2]), WIDE),
    "by keyword": (lambda x: torch.linalg.pinv(input=x), WIDE),
    "two by keyword": (lambda x: torch.cholesky_solve(input=x.mT, input2=x), positive()),
    "weighted l1_loss": (
        lambda x: F.l1_loss(x, x.sin(), weight=torch.arange(9).view(3, 3).double().expand_as(x), reduction="none"),
        SQUARE,
    ),
    "l1_loss by x": (lambda x: F.l1_loss(x, x.sin(), weight=x.exp(), reduction="none"), SQUARE),
}  # fmt: skip


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["fused", "functorch", "vjp"])
@pytest.mark.parametrize("name", CASES)
def test_the_function_that_runs(name, engine):
    function, x = CASES[name]
    d, h = x[0].numel(), 1e-6
    steps = h * torch.eye(d, dtype=torch.float64).view(d, *x.shape[1:])
    differences = [(function(x + step) - function(x - step)).flatten(1) / (2 * h) for step in steps]
    expected = torch.linalg.svdvals(torch.stack(differences, 2))
    layer = tgp.measure(Called(function), x, layers="", estimator="exact", normalize=False, engine=engine)[""]
    found = layer.singular_values
    torch.testing.assert_close(found, expected[:, : found.shape[1]], rtol=1e-6, atol=1e-6 * expected.max().item())


@pytest.mark.parametrize("engine", ["fused", "functorch", "vjp"])
def test_one_of_several_null_vectors_is_no_function(engine):
    """Any turn of them among themselves would do: what each says is nan, and what does not ask them is not."""
    x = points(2, 4)
    measured = {
        name: tgp.measure(Called(function), x, layers="", estimator="exact", engine=engine)[""].value
        for name, function in {
            "one": lambda x: torch.linalg.svd(x).Vh[:, -1],
            "values": lambda x: torch.linalg.svd(x).S,
            "others": lambda x: torch.linalg.svd(x).Vh[:, :2].abs(),
        }.items()
    }
    assert measured["one"].isnan().all()
    assert measured["values"].isfinite().all()
    assert not measured["others"].isnan().any()


def test_every_body_is_of_an_op_that_is_there():
    names = {getattr(op, "__name__", "") for op in BODIES}
    assert {"cholesky", "cholesky_inverse", "triangular_solve", "svd", "pinverse"} <= names


def test_no_other_function_of_torch_loses_an_argument_on_the_way():
    """Read in torch's own source: what each hands on to __torch_function__, against its parameters."""
    lost = {}
    for space in (torch.nn.functional, torch.functional, torch.nn.init, torch._tensor, torch._lobpcg, torch._lowrank):
        for function in ast.walk(ast.parse(inspect.getsource(space))):
            if not isinstance(function, ast.FunctionDef):
                continue
            given = function.args
            named = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)} - {"self", "cls"}
            for call in ast.walk(function):
                if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "handle_torch_function":
                    continue
                handed = [*call.args[2:], *(k.value for k in call.keywords)]
                missing = named - {n.id for value in handed for n in ast.walk(value) if isinstance(n, ast.Name)}
                if missing:
                    lost[function.name] = missing
    not_computed_with = ["__dlpack__", "dim_order", "_handle_torch_function_and_wrap_type_error_to_not_implemented"]
    lost = {name: arguments for name, arguments in lost.items() if name not in not_computed_with}
    assert lost == {function.__name__: {name} for function, name in LEFT_OUT.items()}


def test_complex_matrices_of_which_the_diagonal_is_read_as_real():
    x = points(3, 6)

    def function(x):
        z = torch.complex(x[..., :3], x[..., 3:])
        return torch.linalg.eigvalsh(z), torch.linalg.cholesky(z @ z.mH + z + z.mT + 9 * torch.eye(3)).abs()

    for part in (0, 1):
        steps = 1e-6 * torch.eye(18, dtype=torch.float64).view(18, 3, 6)
        differences = [(function(x + s)[part] - function(x - s)[part]).flatten(1) / 2e-6 for s in steps]
        expected = torch.linalg.svdvals(torch.stack(differences, 2))
        model = Called(lambda x, part=part: function(x)[part])
        found = tgp.measure(model, x, layers="", estimator="exact", normalize=False)[""].singular_values
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_gradients_of_what_is_right_in_its_first_derivative_alone_are_refused():
    model = nn.Sequential(nn.Linear(3, 3).double())
    for function in (lambda x: torch.linalg.svd(x).Vh[:, -1], lambda x: torch.linalg.pinv(x, rtol=0.5)):
        model.forward = lambda x, function=function: function(nn.Sequential.forward(model, x))
        with pytest.raises(tgp.ProbeError, match="has no gradient of its derivative here"):
            tgp.pushforward(model, points(2, 3) if "svd" in str(function.__code__.co_names) else SQUARE, k=1)


@pytest.mark.parametrize("engine", ["fused", "functorch", "vjp"])
def test_inside_of_transforms_of_the_models_own(engine):
    x = points(2, 3)
    for function in (
        lambda x: torch.func.vmap(torch.linalg.pinv)(x),
        lambda x: torch.func.vmap(torch.func.grad(lambda z: z.sin().sum()))(x),
    ):
        model = Called(function)
        steps = 1e-6 * torch.eye(6, dtype=torch.float64).view(6, 2, 3)
        differences = [(function(x + s) - function(x - s)).flatten(1) / 2e-6 for s in steps]
        expected = torch.linalg.svdvals(torch.stack(differences, 2))
        found = tgp.measure(model, x, layers="", estimator="exact", normalize=False, engine=engine)[""].singular_values
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
