"""Other libraries at the same task: the Jacobian of the features with respect to the input, by its products."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import torchgeom_probe as tgp
from benchmarks.limit import made
from benchmarks.timing import Settings, smallest
from torchgeom_probe.linalg.directions import orthonormal_frame
from torchgeom_probe.model.isolation import measuring

TITLE = "Against other libraries"
NOTE = """\
`curvlinops` has matrix-free Jacobians by a model's parameters, so the input is made one. One sample, the pooled
features of the last stage; the last column is our time, planning included, over its. The results agree, or the run
stops.

- "k directions": `JacobianLinearOperator @ V` and a QR, against `Subspace(8)`. "trace": `hutchinson_squared_fro(Jᵀ,
  16)` against `Trace("hutchinson", probes=16)`. "top singular values": 4, to 1e-3, `scipy.sparse.linalg.svds` on its
  operator, against `TopK(k=4)`.

`nngeometry` 0.4 leaves such an input out of its layers, without a word; `backpack-for-pytorch` and `laplace-torch` are
about parameters and were not run."""

MODELS = ("resnet18", "vit_tiny_patch16_224", "efficientnet_b0")
QUICK = ("test_resnet",)
_K, _PROBES, _TOP = 8, 16, 4


class Constant(nn.Module):
    """A model whose one parameter is its input."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.model = model
        self.x = nn.Parameter(x.clone())

    def forward(self, _: Any) -> Tensor:
        """Run the model on the parameter, whatever the argument."""
        return self.model(self.x)


def operator(model: nn.Module, x: Tensor) -> Any:
    """J of one sample's output with respect to the input, [n, d], as a linear operator of curvlinops."""
    from curvlinops import JacobianLinearOperator

    wrapped = Constant(model, x)
    data = [(torch.zeros(1, 1, device=x.device), torch.zeros(1, device=x.device))]
    return JacobianLinearOperator(wrapped, [wrapped.x], data, check_deterministic=False)


def theirs(model: nn.Module, x: Tensor, frame: Tensor) -> dict[str, Callable[[], float]]:
    """Estimand → curvlinops' value of it; J is not divided by √n."""
    from curvlinops import hutchinson_squared_fro
    from scipy.sparse.linalg import svds

    def directions() -> float:
        triangle = torch.linalg.qr((operator(model, x) @ frame.flatten(1).T).double(), mode="r").R
        return triangle.diagonal().abs().log().sum().item()

    def trace() -> float:
        # Given J itself it would take J.T, which curvlinops' Jacobian does not have.
        return float(hutchinson_squared_fro(operator(model, x).adjoint(), _PROBES, distribution="rademacher"))

    def top() -> float:
        values = svds(operator(model, x).to_scipy(), _TOP, tol=1e-3, return_singular_vectors=False, rng=0)
        return float(torch.as_tensor(values.copy()).log().sum())

    def set_up(run: Callable[[], float]) -> Callable[[], float]:
        def inside() -> float:
            with measuring(model):
                return run()

        return inside

    runs = {"k directions": directions, "trace": trace, "top singular values": top}
    return {estimand: set_up(run) for estimand, run in runs.items()}


def ours(model: nn.Module, x: Tensor, frame: Tensor) -> dict[str, Callable[[], float]]:
    """The same by the library."""

    def value(estimator: Any, field: str = "log_volume", **arguments: Any) -> float:
        probe = tgp.GeometryProbe(model, layers="", estimator=estimator, normalize=False)
        return getattr(probe.measure(x, progress=False, **arguments)[""], field).item()

    return {
        "k directions": lambda: value(tgp.Subspace(_K), directions=frame[:, None]),
        "trace": lambda: value(tgp.Trace("hutchinson", probes=_PROBES), "trace"),
        "top singular values": lambda: value(tgp.TopK(k=_TOP, tol=1e-3)),
    }


#: how far the two results may lie apart: the logs of float32 singular values, and those of σ to a relative 1e-3 (four
#: of them)
_APART = {"k directions": 1e-3, "top singular values": 4e-3}


def row(estimand: str, left: Callable[[], float], right: Callable[[], float], settings: Settings) -> str:
    """Compare the results, then time both; the cells of a row."""
    first, second = left(), right()
    if estimand not in _APART:
        print(f"({estimand}: curvlinops {first:.4g}, torchgeom_probe {second:.4g})", file=sys.stderr)
    elif not abs(first - second) < _APART[estimand]:
        raise RuntimeError(f"{estimand}: curvlinops finds {first:.6f}, torchgeom_probe {second:.6f}")
    turns = max(1, settings.turns // 2)
    best = smallest({"theirs": left, "ours": right}, settings.device, turns)
    return f"{best['theirs']:.3f} | {best['ours']:.3f} | {best['ours'] / best['theirs']:.2f}"


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    yield "| model | input | estimand | curvlinops [s] | torchgeom_probe [s] | torchgeom_probe ÷ curvlinops |"
    yield "|---|---|---|---|---|---|"
    if importlib.util.find_spec("curvlinops") is None:
        yield "| – | – | – | not installed: python -m pip install 'torchgeom_probe[bench]' | – | – |"
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")  # of the other library
        for name in QUICK if settings.quick else MODELS:
            model, size = made(name, settings.device)
            model.reset_classifier(0)  # type: ignore[operator]  # timm's
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(1, 3, size, size, generator=generator).to(settings.device)
            frame = orthonormal_frame(_K, x.numel(), seed=0).to(x).view(_K, *x.shape[1:])
            left, right = theirs(model, x, frame), ours(model, x, frame)
            for estimand in left:
                cells = row(estimand, left[estimand], right[estimand], settings)
                yield f"| {name} | {size} | {estimand} | {cells} |"
