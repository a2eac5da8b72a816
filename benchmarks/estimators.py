"""Every estimator on one layer: how many products, how many seconds, and how far from the exact value."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

import torchgeom_probe as tgp
from benchmarks.timing import Settings, seconds
from torchgeom_probe.jacobian.vjp import Pullback
from torchgeom_probe.linalg.directions import orthonormal_frame
from torchgeom_probe.linalg.gram import inner_products

TITLE = "What each estimator costs, and how far off it is"
NOTE = """\
One small convolutional GELU network at initialisation, its features pooled to n numbers. "products": Jv and Jᵀu a
sample (for the curvatures, directional derivatives). "error": the largest against the exact value of that row's
estimand, in float64. "claimed": the estimator's own bound (≤) or standard error (±). "budget": memory given, over the
Jacobian's size."""


@dataclass(frozen=True)
class Row:
    """One line: an estimator at a model, and what it should have found."""

    label: str
    products: str
    seconds: float
    error: float
    claimed: str
    unit: str

    def __str__(self) -> str:
        cells = (self.label, self.products, f"{self.seconds:.3g}", f"{self.error:.1e} {self.unit}", self.claimed)
        return f"| {' | '.join(cells)} |"


def network(features: int, stride: int) -> nn.Sequential:
    """Three convolutions with GELU, averaged over the image."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 7, stride, 3), nn.GELU(), nn.Conv2d(16, 32, 3, stride, 1), nn.GELU()),
        *(nn.Conv2d(32, features, 3, stride, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ).eval()


def dense(model: nn.Module, x: Tensor) -> Tensor:
    """[B, n, d], one sample after the other."""
    rows = torch.func.jacrev(lambda z: model(z[None])[0], chunk_size=64)
    return torch.stack([rows(sample).flatten(1) for sample in x]).detach()


def elementary(eigenvalues: Tensor, k: int) -> Tensor:
    """Log of e_k(λ) by its recursion over the eigenvalues, each divided by their mean so that nothing overflows."""
    scale = eigenvalues.mean()
    polynomial = torch.zeros(k + 1, dtype=torch.float64)
    polynomial[0] = 1
    for value in eigenvalues / scale:
        polynomial[1:] = polynomial[1:] + value * polynomial[:-1]
    return polynomial[k].log() + k * scale.log()


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    side, features = (8, 24) if settings.quick else (32, 512)
    model = network(features, 2).to(settings.device)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)).to(settings.device)
    yield f"Features n = {features}, inputs d = {3 * side * side}:"
    yield ""
    yield from _head()
    yield from map(str, _on_features(model, x, settings))
    side, features = (16, 24) if settings.quick else (224, 512)
    model = network(features, 4).to(settings.device)
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1)).to(settings.device)
    yield ""
    yield f"Features n = {features}, inputs d = {3 * side * side}:"
    yield ""
    yield from _head()
    yield from map(str, _on_large_images(model, x, settings))
    yield ""
    yield "Curvature and closed forms, float64:"
    yield ""
    yield from _head()
    yield from map(str, _curvatures(settings))


def _head() -> Iterator[str]:
    yield "| estimator | products | seconds | error | claimed |"
    yield "|---|---|---|---|---|"


def _timed(run: Callable[[], tgp.GeometryReport], settings: Settings, turns: int) -> tuple[tgp.LayerGeometry, float]:
    """Measure once and then ``turns`` times more; the smallest time counts."""
    reports: list[tgp.GeometryReport] = []
    best = min(seconds(lambda: reports.append(run()), settings.device) for _ in range(1 + turns))
    (g,) = reports[-1].values()
    return g, best / len(g.value)


def _row(label: str, g: tgp.LayerGeometry, spent: float, error: Tensor, *, products: int | None = None) -> Row:
    claimed = "nothing but rounding"
    if g.error_bound is not None:
        claimed = f"≤ {g.error_bound.max().item():.1e}"
    elif g.std_error is not None:
        claimed = f"± {g.std_error.max().item():.1e}"
    if "num_products" in g.extras:
        counts = sorted(set(g.num_products.tolist()))
        made = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    else:
        made = str(products)
    return Row(label, made, spent, error.abs().max().item(), claimed, "nats")


def _on_features(model: nn.Module, x: Tensor, settings: Settings) -> Iterator[Row]:
    n, d = model(x[:1]).shape[1], x[0].numel()
    layer, turns = "7", settings.turns
    jacobian = dense(network(n, 2).double().to(settings.device), x.double())
    sigma = torch.linalg.svdvals(jacobian)
    whole = n * d * 4

    def measured(
        estimator: tgp.Estimator, start: tgp.GeometryReport | None = None, budget: int | None = None, times: int = turns
    ) -> tuple[tgp.LayerGeometry, float]:
        probe = tgp.GeometryProbe(model, layers=[layer], estimator=estimator, normalize=False, memory_budget=budget)
        return _timed(lambda: probe.measure(x, start=start), settings, times)

    exact = sigma.log().sum(1)
    g, spent = measured(tgp.Exact(), times=max(1, turns // 3))
    yield _row("`Exact()`, √det JJᵀ", g, spent, g.log_volume - exact, products=n)
    with _counted() as made:
        g, spent = measured(tgp.Exact(), budget=whole // 2, times=0)
    streamed = sum(made) // len(x)
    yield _row("`Exact()`, budget 0.5", g, spent, g.log_volume - exact, products=streamed)

    k = 8
    g, spent = measured(tgp.Subspace(k=k))
    frame = orthonormal_frame(k, d, seed=0).to(jacobian)
    volume = torch.linalg.svdvals(jacobian @ frame.T).log().sum(1)
    yield _row(f"`Subspace(k={k})`, its own frame", g, spent, g.frame_volume - volume, products=k)
    g, spent = measured(tgp.Subspace(k=k, frames=16))
    mean = torch.stack([(elementary(s.square(), k) - _log_choose(d, k)) / 2 for s in sigma])
    yield _row(f"`Subspace(k={k}, frames=16)`, ½ log(e_k/C(d, k))", g, spent, g.frame_volume - mean, products=16 * k)

    top = min(10, n)
    true = sigma[:, :top].log().sum(1)
    g, spent = measured(tgp.TopK(k=top, method="krylov"))
    yield _row(f"`TopK(k={top})`, cold", g, spent, g.log_volume - true)
    before = tgp.measure(model, x, layers=[layer], estimator=tgp.TopK(k=top, method="krylov"), normalize=False)
    with torch.no_grad():  # a training step's worth: what follows is of the changed network
        for parameter in model.parameters():
            parameter.add_(1e-3 * parameter.abs().mean() * torch.randn_like(parameter))
    moved = torch.linalg.svdvals(dense(_double(model), x.double()))
    g, spent = measured(tgp.TopK(k=top, method="krylov"), start=before)
    yield _row(f"`TopK(k={top})`, warm after a change of 1e-3", g, spent, g.log_volume - moved[:, :top].log().sum(1))
    g, spent = measured(tgp.TopK(k=1, method="krylov"))
    yield _row("`TopK(k=1)`, σ_1: the local Lipschitz constant", g, spent, g.log_volume - moved[:, 0].log())

    for eps in (1e-1, 1e-2, 1e-4):
        estimator = tgp.LogDet(eps=eps, relative=True)
        g, spent = measured(estimator)
        floor = eps * moved[:, :1].square()
        log_det = (moved.square() + floor).log().sum(1) + (d - n) * floor[:, 0].log()
        how = "exact" if "exact" in g.estimand else "Lanczos"
        yield _row(f"`LogDet(eps={eps:g}, relative=True)`: {how}", g, spent, g.half_log_det - log_det / 2)

    energy = moved.square().sum(1)
    for method in ("hutchinson", "hutch++"):
        g, spent = measured(tgp.Trace(method=method, probes=16))
        assert g.trace is not None
        assert g.trace_std_error is not None
        claimed = (g.trace_std_error / g.trace).max().item()
        error = ((g.trace - energy) / energy).abs().max().item()
        products = str(int(g.num_products.max()))
        yield Row(f'`Trace("{method}", probes=16)`', products, spent, error, f"± {claimed:.1e}", "relative")


def _on_large_images(model: nn.Module, x: Tensor, settings: Settings) -> Iterator[Row]:
    n, d = model(x[:1]).shape[1], x[0].numel()
    rows = dense(model, x)[0]
    gram = inner_products(rows[:, None], rows[:, None])[0]
    exact = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().log().sum()
    del rows
    # Besides the rows a budget has to hold a pass over the model; below one pass nothing can be streamed.
    room = 8 << 20
    for share in (2.0, 0.25):
        probe = tgp.GeometryProbe(
            *(model,), layers=["7"], estimator=tgp.Exact(), normalize=False, memory_budget=int(share * n * d * 4) + room
        )
        with _counted() as made:
            g, spent = _timed(lambda probe=probe: probe.measure(x), settings, 0)  # type: ignore[misc]
        yield _row(f"`Exact()`, budget {share:g}", g, spent, g.log_volume - exact, products=sum(made))


@contextlib.contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the rows of the Jacobian that reverse mode makes in the body."""
    made: list[int] = []
    rows = Pullback.rows

    def counting(self: Pullback, entry: str, start: int, stop: int) -> Tensor:
        made.append((stop - start) * len(self.point))
        return rows(self, entry, start, stop)

    with mock.patch.object(Pullback, "rows", counting):
        yield made


def _curvatures(settings: Settings) -> Iterator[Row]:
    width, samples = (50, 4) if settings.quick else (1000, 64)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def row(label: str, run: Callable[[], Tensor], reference: Tensor, unit: str, products: str = "0") -> Row:
        value, spent = run(), min(seconds(run, settings.device) for _ in range(settings.turns))
        error = (value - reference).abs()
        error = error / reference.abs() if unit == "relative" else error
        return Row(label, products, spent / samples, error.max().item(), "nothing but rounding", unit)

    shallow = tgp.analytic.shallow
    for d in (2, 3, 8):
        W, b, x = drawn(width, d), drawn(width), drawn(samples, d)
        layer = nn.Linear(d, width, dtype=torch.float64)
        layer.weight.data.copy_(W)
        layer.bias.data.copy_(b)
        net = nn.Sequential(layer, nn.Sigmoid())
        closed = functools.partial(shallow.scalar_curvature, x, W, b, activation="sigmoid")
        # The closed form divides the features by √n, which multiplies the curvature by n.
        gauss = functools.partial(tgp.scalar_curvature, net, x)
        derivatives = f"{d} + {d * (d + 1) // 2}"
        name = f"d = {d}, n = {width}"
        yield row(f"`scalar_curvature`, {name}, from the closed form", gauss, closed() / width, "relative", derivatives)
        yield row(
            f"`analytic.shallow.scalar_curvature`, {name}, from the Gauss equation", closed, gauss() * width, "relative"
        )
        volume = functools.partial(shallow.log_volume, x, W, b, activation="sigmoid")
        exact = tgp.measure(net, x, layers=["1"], estimator=tgp.Exact())["1"].log_volume
        yield row(f"`analytic.shallow.log_volume`, {name}, from `Exact()`", volume, exact, "nats")


def _double(model: nn.Module) -> nn.Module:
    copy = network(model[4].out_channels, 2).double()  # type: ignore[index]
    copy.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return copy.to(next(model.parameters()).device)


def _log_choose(d: int, k: int) -> float:
    return math.lgamma(d + 1) - math.lgamma(k + 1) - math.lgamma(d - k + 1)
