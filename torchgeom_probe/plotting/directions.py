"""The directions that layers feel most, or least, as pictures beside the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.plotting import style
from torchgeom_probe.plotting.style import NORMAL, SMALL, Figure
from torchgeom_probe.report import GeometryReport
from torchgeom_probe.shapes import Float, Tensor


def plot_directions(
    report: GeometryReport,
    x: Float[Tensor, "batch ..."],
    *,
    k: int | None = None,
    sample: int = 0,
    layers: Sequence[str] | str | None = None,
    title: str | None = None,
) -> Figure:
    """Draw one sample and, a row a layer, its directions as pictures: grey is zero, each on a scale of its own.

    Args:
        report: of ``measure(model, x, estimator=Directions(k))``, or of ``TopK``.
        x: the samples that were measured, [B, H, W], [B, 1, H, W] or [B, 3, H, W].
        k: how many; None: all that there are.
        sample: which sample.
        layers: which layers; None: all.
        title: above the figure.

    Raises:
        ProbeError: a report without directions, samples that are no pictures, other samples than the report's.

    >>> import torch, torchgeom_probe as tgp
    >>> model, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 9)), torch.randn(2, 3, 4, 4)
    >>> report = tgp.measure(model, x, layers=["1"], estimator=tgp.Directions(k=2))
    >>> len(plot_directions(report, x).axes)
    3
    """
    names = style.chosen_layers(layers, list(report))
    if not style.is_picture(x.shape[1:]) or not -len(x) <= sample < len(x):
        raise ProbeError(
            f"x has shape {tuple(x.shape)}: sample {sample} of it is no picture [H, W], [1, H, W] or [3, H, W].\n"
            "Draw samples that are:  plot_directions(report, x.reshape(-1, 3, 32, 32))"
        )
    found = {name: report[name].directions(k)[:, sample] for name in names}
    if any(v.shape[1:] != x.shape[1:] for v in found.values()) or any(len(report[n].value) != len(x) for n in names):
        raise ProbeError(f"the report is of other samples than x, {tuple(x.shape)}.\nPass the x that was measured.")
    columns = 1 + max(map(len, found.values()))
    figure = style.new_figure(1.25 * columns, 1.45 * len(names) + 0.5)
    panels = figure.subplots(len(names), columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    style.show_picture(panels[0, 0], style.picture(x[sample]), "input", size=NORMAL)
    for row, (name, vectors) in zip(panels, found.items(), strict=True):
        row[0].annotate(name or "model", (0.5, -0.08), xycoords="axes fraction", ha="center", va="top", fontsize=NORMAL)
        layer = report[name]
        error = layer.extras.get("direction_error", torch.zeros_like(layer.singular_values))
        for axes, vector, value, off in zip(
            row[1:], vectors, layer.singular_values[sample], error[sample], strict=False
        ):
            largest = vector.abs().max().clamp_min(1e-300)
            centred = 0.5 + vector.double().cpu() / (2 * largest.double().cpu())
            pixels = style.picture(centred, spread=False)
            style.show_picture(axes, pixels, f"σ {'=' if off < 1 else '≥'} {float(value):.3g}", size=SMALL)
    style.finish(figure, title, "directions of unit length; grey: 0; σ: how much it is stretched; ≥: not converged")
    return figure
