"""``tgp.plot``: every result as a figure, by its type."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torchgeom_probe.boundary.study import BoundaryStudy
from torchgeom_probe.dataset.table import DatasetTable
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.plotting.datasets import plot_table
from torchgeom_probe.plotting.layers import plot_report
from torchgeom_probe.plotting.lines import plot_lines
from torchgeom_probe.plotting.planes import plot_maps
from torchgeom_probe.plotting.profiles import plot_study
from torchgeom_probe.plotting.style import Figure, Scans
from torchgeom_probe.report import GeometryReport
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.slice import Line


@functools.singledispatch
def plot(result: Any, **options: Any) -> Figure:
    r"""Draw a result with matplotlib; ``figure.savefig("map.png")`` writes it.

    A :class:`~torchgeom_probe.SliceScan`, or a list of them over one slice (networks, epochs): on a line the log-volume
    of each layer against t, with entropy and classes; on a plane maps of predictions, entropy and the log-volume of
    each layer, of several scans a column each.  A :class:`~torchgeom_probe.GeometryReport`: per layer all samples,
    their median and 10 to 90 %.  A :class:`~torchgeom_probe.BoundaryStudy`: per layer log-volume against signed
    distance from the boundary.  A :class:`~torchgeom_probe.DatasetTable`: per layer the distribution (``by="label"``:
    of each class) and the value against the margin; the least and the most magnified samples (``pictures=dataset``, or
    the files it names).

    Args:
        result: what to draw.
        options: of every result ``layers`` (which, in which order; None: all), ``unit`` (``"nat"`` or ``"log10"``) and
            ``title``; of one scan ``before`` (the untrained network's scan, drawn beside it); of scans also ``names``,
            ``images``, ``class_names``, ``relative`` … (:class:`~torchgeom_probe.plotting.style.Scans`).

    Raises:
        ProbeError: a result that has no drawing, an unknown layer or unit, scans of different slices, images that are
            no pictures, no matplotlib.

    >>> import torch, torchgeom_probe as tgp
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> along = tgp.scan(model, Line(torch.zeros(2), torch.ones(2), steps=20), layers=["1"], progress=False)
    >>> figure = plot(along)
    >>> assert [axes.get_ylabel() for axes in figure.axes][:2] == ["layer 1\nlog √det g [nat]", "entropy [nat]"]
    >>> report = tgp.measure(model, torch.randn(9, 2), layers=["0", "1"], estimator=tgp.Exact())
    >>> assert plot(report, unit="log10").axes[0].get_xlabel() == "log-volume [log10]"
    """
    drawn = ", ".join(kind.__name__ for kind in plot.registry if kind not in (object, Sequence))
    raise ProbeError(
        f"a {type(result).__name__} has no drawing; plot() draws: {drawn}.\n"
        "Draw what scan() or measure() returned:  tgp.plot(tgp.scan(model, plane))"
    )


@plot.register
def _plot_scan(result: SliceScan, *, before: SliceScan | None = None, **options: Any) -> Figure:
    if before is None:
        return _plot_scans([result], **options)
    return _plot_scans([before, result], **{"names": ("before training", "after training")} | options)


@plot.register(Sequence)
def _plot_scans(result: Sequence[SliceScan], **options: Any) -> Figure:
    drawn = Scans(result, **options)
    return plot_lines(drawn) if isinstance(result[0].slice, Line) else plot_maps(drawn)


plot.register(GeometryReport, plot_report)
plot.register(BoundaryStudy, plot_study)
plot.register(DatasetTable, plot_table)
