"""The pictures that a monitor draws from time to time: slices at its layers, or what a function makes of the model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.monitor.writers import Writer
from torchgeom_probe.probe import GeometryProbe
from torchgeom_probe.slices.scan import scan
from torchgeom_probe.slices.slice import Line, Plane

#: What a map is made from: a slice, or a function of the model that returns a result or a figure.
MapOf = Line | Plane | Callable[[nn.Module], Any]


def refuse_no_maps(maps: Mapping[str, MapOf], writers: Sequence[Writer]) -> None:
    """Refuse what no map can be made from, and maps that no writer draws.

    Raises:
        ProbeError: so.
    """
    for tag, made_from in maps.items():
        if not isinstance(made_from, Line | Plane) and not callable(made_from):
            raise ProbeError(
                f"maps={{{tag!r}: ...}} takes a slice, or a function of the model that returns a result or a figure; "
                f"got a {type(made_from).__name__}.\n"
                f"Write:  maps={{{tag!r}: tgp.Plane(x[0], x[1], x[2])}}"
            )
    if maps and not any(writer.draws for writer in writers):
        raise ProbeError("maps= are drawn, and no writer here draws.\nWrite:  writer='runs/experiment_1'")


def write_map(
    tag: str, made_from: MapOf, writers: Sequence[Writer], step: int, probe: GeometryProbe, model: nn.Module
) -> None:
    """Scan a slice along its own tangents, or call the function on the model, and have it drawn; close a figure."""
    if isinstance(made_from, Line | Plane):
        result: Any = scan(probe.like(layers=probe.layers, estimator=None), made_from, progress=False)
    else:
        result = made_from(model)
    try:
        for writer in writers:
            if writer.draws:
                writer.write_map(tag, result, step)
    finally:
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is not None and isinstance(result, pyplot.Figure):
            pyplot.close(result)
