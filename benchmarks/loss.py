"""What the pushed tangents cost in a training step, and what gradients the ways to have them give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchgeom_probe as tgp
from benchmarks.timing import Settings, smallest

TITLE = "Geometry in a training loss"
NOTE = """\
A step (forward, loss, backward) with a penalty on ‖J‖² of one output layer ("one") or of all hooked layers ("all"), as
a multiple of the plain step; in eval mode, so that every method can run.

- "pushforward": ours. "Hoffman": k random output projections, a backward with `create_graph` for each layer and
  projection (arXiv:1908.02729). "jvp": `torch.func.jvp`, k times, then backward; "vmap": under one vmap. "double vjp":
  `torch.autograd.functional.jvp(create_graph=True)`, k times.
- "saved": bytes that autograd keeps between forward and backward, one layer, pushforward over Hoffman.

Second table: relative error of the penalty's parameter gradient in float64, against an exact one (every row of J by a
backward with `create_graph`, once), at the models' own initialisation. nan: it raised."""


class Block(nn.Module):
    """A residual block of a CIFAR ResNet."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.short = nn.Sequential() if width == out and stride == 1 else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W]."""
        return F.relu(self.body(x) + self.short(x))


class ViT(nn.Module):
    """Patches, encoder layers that normalise first, a head."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        options: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layers = [nn.TransformerEncoderLayer(width, 4, 2 * width, **options) for _ in range(depth)]
        self.patches, self.layers = nn.Conv2d(3, width, 4, 4), nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 10]."""
        return self.head(self.norm(self.layers(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def normed_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 10))


#: name → (model, shape of a batch, its hooked layers, the output last)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "MLP 784-512-512-10": (mlp, (128, 784), ["0", "1", "3", "4"]),
    "ResNet-8": (resnet, (32, 3, 32, 32), ["3", "4", "5", "8"]),
    "ViT, 3 layers of 64": (ViT, (32, 3, 32, 32), ["layers.0", "layers.1", "layers.2", "head"]),
}


class Tapped(nn.Module):
    """A model that returns its output and those of some layers."""

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        super().__init__()
        self.model, self.taps = model, [model.get_submodule(name) for name in layers]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output first."""
        seen: dict[int, Tensor] = {}
        handles = [
            tap.register_forward_hook(lambda module, args, out, i=i: seen.__setitem__(i, out))
            for i, tap in enumerate(self.taps)
        ]
        try:
            output = self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        return output, *(seen[i] for i in range(len(self.taps)))


def _mean_square(tangents: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([t.flatten(1).square().sum(1).mean() for t in tangents]).sum()


def pushforward(model: nn.Module, x: Tensor, v: Tensor, layers: list[str]) -> tuple[Tensor, Tensor]:
    step = tgp.pushforward(model, x, layers=layers, directions=v, normalize=False)
    return step.output, tgp.penalty(step, dict.fromkeys(layers, 1.0))


def hoffman(model: nn.Module, x: Tensor, v: Tensor, layers: list[str]) -> tuple[Tensor, Tensor]:
    point = x.clone().requires_grad_()
    output, *features = Tapped(model, layers)(point)
    found = []
    for feature in features:
        for _ in v:
            u = torch.randn_like(feature)
            found.append(torch.autograd.grad(feature, point, u, create_graph=True, retain_graph=True)[0])
    return output, _mean_square(tuple(found)) / len(v)


def jvp(model: nn.Module, x: Tensor, v: Tensor, layers: list[str]) -> tuple[Tensor, Tensor]:
    pushed = [torch.func.jvp(Tapped(model, layers), (x,), (row,)) for row in v]
    return pushed[0][0][0], torch.stack([_mean_square(tangents[1:]) for _, tangents in pushed]).mean()


def vmapped(model: nn.Module, x: Tensor, v: Tensor, layers: list[str]) -> tuple[Tensor, Tensor]:
    tapped = Tapped(model, layers)
    values, tangents = torch.func.vmap(lambda row: torch.func.jvp(tapped, (x,), (row,)))(v)
    return values[0][0], _mean_square(tuple(t.flatten(0, 1) for t in tangents[1:]))


def double_vjp(model: nn.Module, x: Tensor, v: Tensor, layers: list[str]) -> tuple[Tensor, Tensor]:
    tapped = Tapped(model, layers)
    pushed = [torch.autograd.functional.jvp(tapped, x, row, create_graph=True) for row in v]
    return pushed[0][0][0], torch.stack([_mean_square(tangents[1:]) for _, tangents in pushed]).mean()


METHODS = {"pushforward": pushforward, "Hoffman": hoffman, "jvp": jvp, "vmap": vmapped, "double vjp": double_vjp}


def exact(model: nn.Module, x: Tensor, v: Tensor, layers: list[str]) -> tuple[Tensor, Tensor]:
    """The same penalty on the same directions, by every row of J."""
    point = x.clone().requires_grad_()
    output, *features = Tapped(model, layers)(point)
    total = torch.zeros((), dtype=x.dtype)
    for feature in features:
        flat = feature.flatten(1)
        rows = [
            torch.autograd.grad(flat[:, i].sum(), point, create_graph=True)[0].flatten(1) for i in range(flat.shape[1])
        ]
        pushed = torch.einsum("bnd,kbd->kbn", torch.stack(rows, 1), v.flatten(2))
        total = total + pushed.square().sum(2).mean()
    return output, total


def _math_kernel() -> Any:
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


def _step(method: Any, model: nn.Module, x: Tensor, y: Tensor, k: int, layers: list[str]) -> None:
    model.zero_grad()
    v = torch.randint(0, 2, (k, *x.shape), device=x.device).to(x.dtype) * 2 - 1
    output, penalty = method(model, x, v, layers)
    (F.cross_entropy(output, y) + 0.01 * penalty).backward()


def _saved(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes of the distinct memory that autograd keeps for a loss, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(seen.values())


def _costs(settings: Settings) -> Iterator[str]:
    columns = [f"{name}, {which}" for name in METHODS for which in ("one", "all")]
    yield f"| model | k | plain step, ms | {' | '.join(columns)} | saved |"
    yield "|---|---|---|" + "---|" * (len(columns) + 1)
    for name, (make, shape, layers) in MODELS.items():
        for k in (1, 4):
            torch.manual_seed(0)
            model, batch = make().to(settings.device).eval(), 4 if settings.quick else shape[0]
            x = torch.randn(batch, *shape[1:], device=settings.device)
            y = torch.randint(0, 10, (batch,), device=settings.device)
            runs: dict[str, Callable[[], Any]] = {}
            for method, run in METHODS.items():
                for which, names in (("one", layers[-1:]), ("all", layers)):
                    runs[f"{method}, {which}"] = lambda r=run, n=names: _step(r, model, x, y, k, n)  # noqa: B023

            def plain() -> None:
                model.zero_grad()  # noqa: B023
                F.cross_entropy(model(x), y).backward()  # noqa: B023

            inside = {key: _math_kernel for key in runs if not key.startswith("pushforward")}
            times = smallest({"plain": plain, **runs}, settings.device, settings.turns, inside=inside)
            v = torch.randn(k, *x.shape, device=x.device)
            with _math_kernel():
                theirs = _saved(lambda: hoffman(model, x, v, layers[-1:]), model)  # noqa: B023
            ours = _saved(lambda: pushforward(model, x, v, layers[-1:]), model)  # noqa: B023
            cells = [f"{times[key] / times['plain']:.2f}" for key in runs]
            yield f"| {name} | {k} | {times['plain'] * 1e3:.1f} | {' | '.join(cells)} | {ours / theirs:.2f} |"


def _errors() -> Iterator[str]:
    judged = [name for name in METHODS if name not in ("Hoffman", "vmap")]
    yield ""
    yield f"| model | {' | '.join(judged)} |"
    yield "|---|" + "---|" * len(judged)
    small: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
        "MLP with LayerNorm": (normed_mlp, (8, 20), ["3"]),
        "MLP with GELU": (lambda: nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 10)), (8, 20), ["2"]),
        "ResNet-8": (resnet, (4, 3, 8, 8), ["8"]),
        "ViT": (lambda: ViT(16, 2), (4, 3, 16, 16), ["head"]),
    }
    for name, (make, shape, layers) in small.items():
        torch.manual_seed(0)
        model, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
        v = torch.randn(2, *shape, dtype=torch.float64)
        cells = []
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            true = _gradient(exact, model, x, v, layers)
            for method in judged:
                try:
                    cells.append(
                        f"{float((_gradient(METHODS[method], model, x, v, layers) - true).norm() / true.norm()):.1e}"
                    )
                except RuntimeError:
                    cells.append("nan")
        yield f"| {name} | {' | '.join(cells)} |"


def _gradient(method: Any, model: nn.Module, x: Tensor, v: Tensor, layers: list[str]) -> Tensor:
    found = torch.autograd.grad(method(model, x, v, layers)[1], list(model.parameters()), allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(model.parameters(), found, strict=True)
        ]
    )


def table(settings: Settings) -> Iterator[str]:
    """Both tables, line by line."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield from _costs(settings)
        yield from _errors()
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
