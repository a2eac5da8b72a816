"""Figure 1: one hidden layer of sigmoid units learns a sinusoid boundary in the plane; √det g before, during and after.

The input space is the plane itself, so the metric is known in closed form from the weights: the command checks that
the measured √det g agrees with ``tgp.analytic.shallow``'s over the whole grid.  The Ricci scalar is the closed form's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchgeom_probe.analytic import shallow
from torchgeom_probe.boundary.design import Design
from torchgeom_probe.boundary.inference import LayerFields, effect_of
from torchgeom_probe.boundary.pairs import crossing_pairs
from torchgeom_probe.boundary.study import BoundaryStudy
from torchgeom_probe.estimators import Exact
from torchgeom_probe.model.predictions import predicted
from torchgeom_probe.plotting.planes import Row, plot_grid
from torchgeom_probe.probe import measure
from torchgeom_probe.reproduce.results import Results
from torchgeom_probe.reproduce.settings import Settings
from torchgeom_probe.reproduce.training import Trained, Training, View, supervised
from torchgeom_probe.shapes import Float, Int, Tensor
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.slice import Plane

LAYER = "sigmoid"
WIDTHS = (5, 25, 200, 250)

#: Relative, of √det g in float32 over the whole grid.
TOLERANCE = 1e-5

#: Along the boundary's normals, in units of the plane.
_APART, _OFFSETS = 0.2, tuple(i / 20 for i in range(-8, 9) if i)

_NOTE = "g = JᵀJ / n, per unit of the input plane (x to the right, y up)"


def sinusoid(count: int = 400, *, seed: int = 0) -> tuple[Float[Tensor, "samples 2"], Int[Tensor, " samples"]]:
    """Points uniform in [-1, 1]², and their classes: 1 above y = 0.6 sin(7x - 1).

    >>> points, labels = sinusoid(seed=3)
    >>> x, y = points.unbind(1)
    >>> assert points.abs().max() <= 1 and torch.equal(labels == 1, y > 0.6 * torch.sin(7 * x - 1))
    """
    inputs = 2 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) - 1
    return inputs, (inputs[:, 1] > 0.6 * torch.sin(7 * inputs[:, 0] - 1)).long()


def noisy_xor(count: int = 400, *, seed: int = 0) -> tuple[Float[Tensor, "samples 2"], Int[Tensor, " samples"]]:
    """Points of four Gaussians at (±1, ±1), of variance 0.15, and their classes: 1 where the centre's signs differ.

    >>> points, labels = noisy_xor(4000)
    >>> assert abs(points.var(0).mean() - 1.15) < 0.05 and (points[labels == 1].prod(1) < 0).float().mean() > 0.98
    """
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])[torch.arange(count) % 4]
    inputs = corners + 0.15**0.5 * torch.randn(count, 2, generator=generator)
    return inputs, (corners.prod(1) < 0).long()


#: Name → what makes its points, and the names of its classes.
TASKS = {"sinusoid": (sinusoid, ("below", "above")), "xor": (noisy_xor, ("one sign", "two signs"))}


class PaperNetwork(nn.Module):
    """The paper's shallow network: W₂ φ(W₁ x + b₁) / √n + b₂ / √n, every weight and bias N(0, 1) at the start.

    >>> assert PaperNetwork(12, 7, 3)(torch.zeros(5, 1, 3, 4)).shape == (5, 3)
    """

    def __init__(self, num_inputs: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.sigmoid = nn.Linear(num_inputs, width), nn.Sigmoid()
        self.readout = nn.Linear(width, num_classes)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Float[Tensor, " batch *input"]) -> Float[Tensor, "batch classes"]:
        """Return the logits [B, C]."""
        return self.readout(self.sigmoid(self.hidden(x.flatten(1)))) / self.hidden.out_features**0.5


def the_plane(steps: int) -> Plane:
    """[-1.5, 1.5]² itself, as a slice: both coordinates are the input's own, so √det g is the metric's.

    >>> plane = the_plane(40)
    >>> assert torch.allclose(plane.points(), plane.grid().float()) and abs(plane.log_measure) < 1e-12
    """
    a, b, c = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    return Plane(a, b, c, steps=steps, extent=(-1.5, 1.5), coordinates="barycentric")


def ricci(model: nn.Module, found: SliceScan) -> Float[Tensor, " *slice"]:
    """Return the Ricci scalar [H, W] of the hidden layer's metric divided by n, as the measured √det g is, in float64.

    From its weights, in closed form.
    """
    return shallow.scalar_curvature(*_layer(model, found)).reshape(found.slice.shape)


def disagreement(model: nn.Module, found: SliceScan) -> tuple[float, float, int]:
    """Compare a float32 scan with the closed form in float64, at every point.

    Returns the largest |measured / closed form - 1| of √det g where the scan found g regular; the largest σ_min / σ_max
    of the closed form's J, in units of the scan's rank tolerance, where it found g singular (√det g = 0), 0 without
    such points; and their number.
    """
    layer, measured = _layer(model, found), found.log_volume[LAYER].double().flatten()
    regular = measured.isfinite()
    apart = (measured - shallow.log_volume(*layer))[regular].expm1().abs()
    smallest, largest = torch.linalg.eigvalsh(shallow.metric(*layer))[~regular].clamp(min=0).sqrt().unbind(1)
    ratio = smallest / largest / found.report[LAYER].rank_tolerance
    return max(apart.tolist(), default=0.0), max(ratio.tolist(), default=0.0), len(ratio)


def _layer(model: nn.Module, found: SliceScan) -> tuple[Tensor, Tensor, Tensor]:
    """Points, weights and biases of the hidden layer, in float64."""
    hidden = model.get_submodule("hidden")
    weights, bias = (hidden.get_parameter(name).detach().cpu().double() for name in ("weight", "bias"))
    return found.slice.points().double(), weights, bias


def fig1(results: Results) -> None:
    """Train every width on the sinusoid, and the widest on XOR; scan, study, check and draw."""
    settings = results.settings
    widths = WIDTHS[:2] if settings.quick else WIDTHS
    plane, found = the_plane(20 if settings.quick else 40), []
    for task, width in [*(("sinusoid", width) for width in widths), ("xor", widths[-1])]:
        view = View("plane", plane, {"layers": [LAYER], "batch_size": 256}, class_names=TASKS[task][1])
        studied = (task, width) == ("sinusoid", widths[-1])
        seeds = (3 if settings.quick else 8) if studied else None
        networks = results.train(_training(task, width, settings), [view], seeds=seeds)
        results.describe(networks[0], view)
        _draw_maps(results, networks[0], view)
        found.append((networks[0], view))
        if studied:
            pairs = [(of.model(of.epochs[-1]), of.model(0)) for of in networks]
            studies = [along_normals(*networks, seed=seed) for seed, networks in enumerate(pairs)]
            results.found(networks[0].name, studies, gallery=True)
    _check(results, found)
    _draw_overview(results, found)


def along_normals(model: nn.Module, initial: nn.Module, *, seed: int = 0) -> BoundaryStudy:
    """Study log √det g of the hidden layer along the normals of the sinusoid's learnt boundary, on the data's support.

    Held-out points of the two classes are joined; where such a line crosses the boundary stands a normal, the gradient
    of the margin.  What is tested: the boundary above its neighbours at ± 0.2 along the normal, half-way to the next
    branch of the sinusoid, trained minus untrained at the same points.
    """
    x, device = sinusoid(400, seed=10_000 + seed)[0], next(model.parameters()).device
    decided, alone = predicted(model, x.to(device), None), torch.arange(len(x))
    pairs = crossing_pairs(model, x.to(device), decided["predictions"], alone, count=200, seed=seed)
    crossings = pairs.points(x, pairs.t[:, None])[:, 0].to(device).requires_grad_()
    logits = model(crossings)
    (normals,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), crossings)
    normals = normals / normals.norm(dim=1, keepdim=True)
    steps = torch.tensor([0.0, -_APART, _APART, *_OFFSETS], device=device)
    along = (crossings[:, None] + steps[:, None] * normals[:, None]).detach()
    points = torch.cat([along[:, :3], x[pairs.ends].to(device), along[:, 3:]], 1)
    within, weights = (points.abs() <= 1).all(2).cpu(), torch.tensor([1.0, -0.5, -0.5], dtype=torch.float64)
    design = Design(pairs, points, normals, weights, within, decided["margin"][pairs.ends])
    fields = [measure(m, points.flatten(0, 1), layers=[LAYER], estimator=Exact())[LAYER] for m in (model, initial)]
    after, before = ({"speed": field.log_volume.reshape(points.shape[:2])} for field in fields)
    found = effect_of(LAYER, LayerFields(after, before), design, "peak", _OFFSETS)
    words = f"log √det g, at the boundary above its neighbours at ± {_APART} along its normal"
    distance = "along its normal, towards the class above it"
    return BoundaryStudy({LAYER: replace(found, estimand=words, profiled="log √det g", distance=distance)}, settings={})


def _training(task: str, width: int, settings: Settings) -> Training:
    data, parts = TASKS[task][0](seed=settings.seed), 2 if settings.quick else 10
    epochs = settings.epochs or (200 if settings.quick else 10_000)
    return supervised(
        f"{task}_{width}",
        settings,
        data,
        measured={"accuracy": data},
        model=lambda: PaperNetwork(2, width, 2),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
        batch_size=50,
        epochs=epochs,
        snapshots=[epochs * i // parts for i in range(1, parts)],
        describe=dict(data=task, width=width, activation="sigmoid", learning_rate=0.1, momentum=0.9),
    )


def _check(results: Results, found: list[tuple[Trained, View]]) -> None:
    """Compare every map with the closed form."""
    compared = [disagreement(of.model(epoch), of.scan(view, epoch)) for of, view in found for epoch in of.epochs]
    apart, ratios, counts = zip(*compared, strict=True)
    maps = f"{len(compared)} maps of {'×'.join(map(str, found[0][1].slice.shape))} points"
    what = "√det g measured in float32 against the closed form in float64, largest relative difference over"
    results.check("closed_form", value=max(apart), bound=TOLERANCE, what=f"{what} {maps}")
    where = f"at the {sum(counts)} points measured as singular"
    what = f"σ_min/σ_max of the closed form over float32's rank tolerance, {where}"
    results.check("singular", value=max(ratios), bound=2.0, what=what)


def _named(trained: Trained, form: str) -> str:
    return form.format(**trained.training.describe)


def _draw_maps(results: Results, trained: Trained, view: View) -> None:
    """Columns: start, half-way, end; rows: prediction, entropy, √det g, Ricci scalar."""
    named = trained.scans(view, trained.three)
    scans = list(named.values())
    curvature = [ricci(trained.model(epoch), scan) for epoch, scan in zip(trained.three, scans, strict=True)]
    rows = [
        Row("prediction", scans),
        Row("entropy", scans, [scan.entropy for scan in scans], "entropy [nat]", "magma"),
        Row("√det g", scans, [scan.log_volume[LAYER] for scan in scans], "log √det g [nat]"),
        Row("Ricci scalar", scans, curvature, "Ricci scalar R", "signed"),
    ]
    options: dict[str, Any] = {
        "column_names": list(named),
        "class_names": view.class_names,
        "corners": False,
        "note": _NOTE,
    }
    title = _named(trained, "{data}, {width} sigmoid units")
    results.picture(trained.name, plot_grid(rows, title=title, **options))


def _draw_overview(results: Results, found: list[tuple[Trained, View]]) -> None:
    """Rows: tasks and widths; columns: start, half-way, end; a scale a row: √det g grows with the width's weights."""
    rows = []
    for trained, view in found:
        named = trained.scans(view, trained.three)
        volumes = [scan.log_volume[LAYER] for scan in named.values()]
        rows.append(Row(_named(trained, "{data}\n{width} units"), list(named.values()), volumes, "log √det g [nat]"))
    figure = plot_grid(
        rows,
        column_names=list(named),
        corners=False,
        title="√det g of one hidden layer of sigmoid units",
        note=_NOTE,
        panel=2.0,
    )
    results.picture("volumes", figure, gallery=True)
