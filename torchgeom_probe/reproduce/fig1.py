"""Figure 1: one hidden layer of sigmoid units learns a sinusoid boundary in the plane; √det g before, during and after.

The input space is the plane itself, so the metric is known in closed form from the weights.  Beside the measured √det g
stands ``tgp.analytic.shallow``'s, and the command checks that they agree over the whole grid.  The Ricci scalar is the
closed form's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from torchgeom_probe.analytic import shallow
from torchgeom_probe.plotting.planes import Map, Scale, plot_grid
from torchgeom_probe.plotting.style import Figure
from torchgeom_probe.reproduce.results import Results, frames, quirks
from torchgeom_probe.reproduce.settings import Settings
from torchgeom_probe.reproduce.training import Trained, Training, View, accuracy, train
from torchgeom_probe.shapes import Float, Int, Tensor
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.slice import Plane

TITLE = "a sinusoid boundary (and XOR) learnt by one hidden layer of sigmoid units"

LAYER = "sigmoid"
WIDTHS = (5, 25, 200, 250)

#: Relative, of √det g in float32 over the whole grid.
TOLERANCE = 1e-5

QUIRKS = quirks("""
the authors' formula for the Ricci scalar is -3/(n³ det² g) times a sum over triples
-> the maps show -1/4 of the general expression, a third of theirs: the two ΓΓ terms of the Riemann tensor carry the
wrong sign in their code (tgp.analytic.shallow.scalar_curvature says how that was checked); the pattern and sign are
the same for one hidden layer

the text has 400 points uniform in [-1, 1]² and the grid reaches to ±1.5
-> kept: the outer ring of every map is extrapolation

all weights and biases start as N(0, 1) numbers, and the readout is divided by √width
-> kept: it is the scaling under which the widths compare

SGD in batches of 50 with momentum 0.9, lr 0.1, for 10 000 epochs in the text; the script at hand stops after 30
-> the text's 10 000 epochs, embedded and --preset paper alike

float64 throughout
-> float32 for the network and the measurement, float64 for the closed form: their agreement is checked and printed
""")

_NOTE = "lines: the network's own decision boundary; g = JᵀJ / n, per unit of the input plane (x to the right, y up)"


@dataclass(frozen=True, eq=False)
class Points:
    """A two-class task in the plane: inputs [N, 2], labels [N], and its name and those of the classes."""

    inputs: Float[Tensor, "samples 2"]
    labels: Int[Tensor, " samples"]
    name: str
    class_names: tuple[str, str]


def sinusoid(count: int = 400, *, seed: int = 0) -> Points:
    """``count`` points uniform in [-1, 1]², class 1 above y = 0.6 sin(7x - 1).

    >>> points = sinusoid(seed=3)
    >>> x, y = points.inputs.unbind(1)
    >>> assert points.inputs.abs().max() <= 1 and torch.equal(points.labels == 1, y > 0.6 * torch.sin(7 * x - 1))
    """
    inputs = 2 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) - 1
    labels = (inputs[:, 1] > 0.6 * torch.sin(7 * inputs[:, 0] - 1)).long()
    return Points(inputs, labels, "sinusoid", ("below", "above"))


def noisy_xor(count: int = 400, *, variance: float = 0.15, seed: int = 0) -> Points:
    """``count`` points of four Gaussians at (±1, ±1), class 1 where the signs of the centre differ.

    >>> points = noisy_xor(4000)
    >>> above = points.inputs[points.labels == 1]
    >>> assert abs(points.inputs.var(0).mean() - 1.15) < 0.05 and (above.prod(1) < 0).float().mean() > 0.98
    """
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])[torch.arange(count) % 4]
    inputs = corners + variance**0.5 * torch.randn(count, 2, generator=generator)
    return Points(inputs, (corners.prod(1) < 0).long(), "xor", ("one sign", "two signs"))


class PaperNetwork(nn.Module):
    """The paper's shallow network: W₂ φ(W₁ x + b₁) / √n + b₂ / √n, every weight and bias N(0, 1) at the start.

    Its modules have the names of :func:`torchgeom_probe.reproduce.fig2.network`'s.

    >>> assert PaperNetwork(2, 7, 3)(torch.zeros(5, 2)).shape == (5, 3)
    """

    def __init__(self, num_inputs: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.sigmoid = nn.Linear(num_inputs, width), nn.Sigmoid()
        self.readout = nn.Linear(width, num_classes)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch classes"]:
        """Return the logits [B, C]."""
        return self.readout(self.sigmoid(self.hidden(x))) / self.hidden.out_features**0.5


def the_plane(half: float, steps: int) -> Plane:
    """[-half, half]² itself, as a slice: both coordinates are the input's own, so √det g is the metric's.

    >>> plane = the_plane(1.5, 40)
    >>> assert torch.allclose(plane.points(), plane.grid().float()) and abs(plane.log_measure) < 1e-12
    """
    a, b, c = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    return Plane(a, b, c, steps=steps, extent=(-half, half), coordinates="barycentric")


def closed_form(model: nn.Module, found: SliceScan) -> tuple[Tensor, Tensor]:
    """Return log √det g and the Ricci scalar [H, W] of the hidden layer from its weights, in float64.

    The Ricci scalar is that of the metric divided by n, as the measured √det g is.
    """
    layer = _layer(model, found)
    volume, curvature = shallow.log_volume(*layer), shallow.scalar_curvature(*layer)
    return volume.reshape(found.slice.shape), curvature.reshape(found.slice.shape)


def disagreement(model: nn.Module, found: SliceScan) -> tuple[float, float, int]:
    """Compare a float32 scan with the closed form in float64, at every point.

    Returns the largest |measured / closed form - 1| of √det g where the scan found g regular; the largest σ_min / σ_max
    of the closed form's J, in units of the scan's rank tolerance, where it found g singular (√det g = 0), 0 without
    such points; and their number.
    """
    measured, (exact, _) = found.log_volume[LAYER].double(), closed_form(model, found)
    regular = measured.isfinite()
    apart = (measured - exact)[regular].expm1().abs()
    squares = torch.linalg.eigvalsh(shallow.metric(*_layer(model, found)))
    ratio = (squares[:, 0].clamp(min=0) / squares[:, 1]).sqrt().reshape(found.slice.shape)[~regular]
    tolerance = ratio / found.report[LAYER].rank_tolerance
    return max(apart.tolist(), default=0.0), max(tolerance.tolist(), default=0.0), int((~regular).sum())


def _layer(model: nn.Module, found: SliceScan) -> tuple[Tensor, Tensor, Tensor]:
    """Points, weights and biases of the hidden layer, in float64."""
    hidden = model.get_submodule("hidden")
    weights, bias = (hidden.get_parameter(name).detach().cpu().double() for name in ("weight", "bias"))
    return found.slice.points().double(), weights, bias


def run(results: Results) -> None:
    """Train every width on the sinusoid, and the widest on XOR; scan, test, check and draw."""
    settings, steps = results.settings, 20 if results.settings.quick else 40
    widths = WIDTHS[:2] if settings.quick else WIDTHS
    tasks = [(sinusoid(seed=settings.seed), width) for width in widths]
    tasks.append((noisy_xor(seed=settings.seed), widths[-1]))
    found: dict[str, tuple[Trained, View]] = {}
    for points, width in tasks:
        plane = the_plane(1.5, steps)
        options = {"layers": [LAYER], "batch_size": 256}
        view = View("plane", plane, options, class_names=points.class_names, images=None)
        trained = train(_training(points, width, settings), settings, views=[view], say=results.say)
        results.training(trained)
        name = f"{points.name}, {width} sigmoid units"
        results.test(trained, view, label=name)
        results.say(f"{name}: accuracy {trained.history[-1]['accuracy']:.3f} on its {len(points.labels)} points")
        found[name] = trained, view
        results.picture(trained.name, _maps(trained, view, title=name))
    _check(results, list(found.values()), steps)
    results.picture("volumes", _overview(found), gallery=True)
    name = f"sinusoid, {widths[-1]} sigmoid units"
    trained, view = found[name]
    shown = frames(view, trained.scans(view), title=f"{name}, {{}}", relative=False, log_entropy=False)
    results.animation("training", shown)


def _training(points: Points, width: int, settings: Settings) -> Training:
    inputs, labels = points.inputs.to(settings.device), points.labels.to(settings.device)
    epochs = settings.epochs or (200 if settings.quick else 10_000)
    parts = 2 if settings.quick else 10
    return Training(
        f"{points.name}_{width}",
        model=lambda: PaperNetwork(2, width, 2),
        loss=lambda model, batch: nn.functional.cross_entropy(model(inputs[batch]), labels[batch]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
        num_samples=len(labels),
        batch_size=50,
        epochs=epochs,
        snapshots=[epochs * i // parts for i in range(1, parts)],
        evaluate=lambda model: {"accuracy": accuracy(model, inputs, labels)},
        describe=dict(data=points.name, width=width, activation="sigmoid", learning_rate=0.1, momentum=0.9),
    )


def _check(results: Results, found: list[tuple[Trained, View]], steps: int) -> None:
    """Compare every map with the closed form."""
    compared = [
        disagreement(trained.model(epoch), trained.scan(view, epoch))
        for trained, view in found
        for epoch in trained.epochs
    ]
    apart, ratios, counts = zip(*compared, strict=True)
    results.check(
        "closed_form",
        value=max(apart),
        bound=TOLERANCE,
        what="√det g measured in float32 against the closed form in float64, largest relative difference over "
        f"{len(compared)} maps of {steps}×{steps} points",
    )
    results.check(
        "singular",
        value=max(ratios),
        bound=2.0,
        what="σ_min/σ_max of the closed form over float32's rank tolerance, "
        f"at the {sum(counts)} points measured as singular",
    )


def _volume(found: SliceScan, scale: Scale) -> Map:
    return Map(found, found.report[LAYER].log10_volume.reshape(found.slice.shape), scale)


def _maps(trained: Trained, view: View, *, title: str) -> Figure:
    """Rows: start, half-way, end; columns: prediction, entropy, measured and closed-form √det g, Ricci scalar."""
    volume, curvature = Scale("log₁₀ √det g"), Scale("Ricci scalar R", "signed")
    classes, entropy = Scale("class", "classes"), Scale("entropy [nat]", "magma")
    rows = []
    for epoch in trained.three:
        found = trained.scan(view, epoch)
        exact, ricci = closed_form(trained.model(epoch), found)
        rows.append(
            [
                Map(found, None, classes),
                Map(found, found.entropy, entropy),
                _volume(found, volume),
                Map(found, exact / math.log(10), volume),
                Map(found, ricci, curvature),
            ]
        )
    return plot_grid(
        rows,
        row_names=[f"epoch {epoch}" for epoch in trained.three],
        column_names=["prediction", "entropy", "√det g, measured", "√det g, closed form", "Ricci scalar"],
        class_names=view.class_names,
        corners=False,
        title=title,
        note=_NOTE,
    )


def _overview(found: dict[str, tuple[Trained, View]]) -> Figure:
    """Rows: tasks and widths; columns: start, half-way, end; a scale a row: √det g grows with the width's weights."""
    rows = []
    for trained, view in found.values():
        scale, scans = Scale("log₁₀ √det g"), trained.scans(view, trained.three)
        rows.append([_volume(scan, scale) for scan in scans.values()])
    return plot_grid(
        rows,
        row_names=[name.replace(", ", "\n").replace(" sigmoid", "") for name in found],
        column_names=list(scans),
        corners=False,
        title="√det g of one hidden layer of sigmoid units",
        note=_NOTE,
        panel=2.0,
    )
