"""The scan of a model over a slice of input space.

slice → points, tangents → per chunk of points: geometry of every layer, the model's decision → SliceScan.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from torchgeom_probe.errors import ProbeError, refuse_unknown
from torchgeom_probe.estimators import Auto
from torchgeom_probe.model.predictions import Readout, decided
from torchgeom_probe.probe import GeometryProbe, ProbeOptions, probe_of
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.result import SliceScan, packed
from torchgeom_probe.slices.resume import Parts, by_chunks, in_words, probe_settings, refuse_other, state_digest
from torchgeom_probe.slices.slice import Line, Plane

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Points a chunk: what a kill can cost, and one file of a scan that is stored.
_CHUNK = 128
_TANGENTS = "the slice's own tangents"


def scan(
    model_or_probe: nn.Module | GeometryProbe,
    slice: Line | Plane,
    *,
    readout: Readout | None = None,
    batch_size: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **options: Unpack[ProbeOptions],
) -> SliceScan:
    """Measure every layer's geometry, and the model's decision, at every point of a slice.

    Without ``estimator=`` the directions are the slice's own tangents T (``slice.tangents()``): log √det(TᵀgT), which
    is exact, the length or area that the layer gives to a unit of the slice's coordinates.  Any other estimator
    measures what it measures at a single sample, at every point.

    A scan runs in the process that calls it and waits for no other: under ``torchrun`` call it on rank 0 alone.

    Args:
        model_or_probe: any module, run in eval mode and left exactly as it was; or a probe, whose estimator (where it
            was given one), layers and other options are then the scan's.
        slice: a :class:`~torchgeom_probe.Line` or :class:`~torchgeom_probe.Plane`; its points are moved to the model's
            device.
        readout: maps the model's output to logits [B, C], C ≥ 2 (for a self-supervised model: its linear classifier);
            None where the model's output is the logits.
        batch_size: points a chunk; None: 128, or what an interrupted scan to ``path`` had.  Within a chunk the probe
            keeps to its memory budget.
        path: where the scan is saved when it is done.  Each chunk is stored beside it, in ``<path>.parts``, as soon as
            it is measured; called again after an interruption, the scan goes on where it was and ends with the same
            bytes.  A file there that is the finished scan of this very model and slice is loaded; one of another scan
            is refused, never overwritten.
        progress: show a progress bar; None: only on a terminal.
        options: the probe's (:class:`~torchgeom_probe.GeometryProbe`): layers, estimator, normalize, engine, ….

    Raises:
        ProbeError: an output that is no logits (with the ``readout`` to write), a ``path`` that holds another scan, and
            whatever the probe refuses.

    Cost: per point one forward pass for the decision and, with the slice's tangents, one dual pass of 1 + k rows for
    all layers together.

    >>> import torch
    >>> model = torch.nn.Linear(2, 3)
    >>> line = Line(torch.zeros(2), torch.tensor([0.0, 1.0]), steps=5)
    >>> found = scan(model, line, layers=[""], normalize=False, progress=False)
    >>> length = model.weight[:, 1].norm()  # |W (b - a)|
    >>> assert torch.allclose(found.log_volume[""].exp(), length.double())
    """
    if not isinstance(slice, (Line, Plane)):
        raise ProbeError(f"a {type(slice).__name__} is no slice.\nWrite:  scan(model, Line(x[0], x[1]), layers=...)")
    if batch_size is not None and batch_size < 1:
        raise ProbeError(f"batch_size={batch_size} must be at least 1: points a chunk.\nLeave it out for {_CHUNK}.")
    refuse_unknown(options, scan, *ProbeOptions.__annotations__)
    probe = probe_of(model_or_probe, options, replay=path is None)
    along = options.get("estimator") is None and probe.estimator == Auto()
    settings = {**probe_settings(probe), "readout": in_words(readout)}
    if along:
        settings["estimator"] = _TANGENTS
    if path is None:
        settings["batch_size"] = batch_size or _CHUNK
        return _scanned(probe, slice, readout, settings, None, progress)
    target = Path(path)
    finished = SliceScan.load(target) if target.exists() else None
    stored = finished.settings if finished is not None else Parts.stored_settings(target) or {}
    settings |= {"model": state_digest(probe.model), "slice": slice.digest}
    # Other chunks would round differently: an interrupted scan goes on with its own.
    settings["batch_size"] = batch_size or stored.get("batch_size", _CHUNK)
    if finished is not None:
        refuse_other(stored, settings, where=target)
    found = finished or _scanned(probe, slice, readout, settings, Parts(target, settings), progress)
    if finished is None:
        found.save(target)
    Parts.remove(target)
    return found


def _scanned(
    probe: GeometryProbe,
    slice: Line | Plane,
    readout: Readout | None,
    settings: Mapping[str, Any],
    parts: Parts | None,
    progress: bool | None,
) -> SliceScan:
    """Measure chunk after chunk of the points, but for those that are stored."""
    device = next((t.device for t in (*probe.model.parameters(), *probe.model.buffers())), slice.a.device)
    points, tangents = slice.points().detach().to(device), slice.tangents().detach().to(device)

    def decide(x: Tensor) -> dict[str, Tensor]:
        return decided(probe.model, x, readout=readout, batch=len(x), mode=probe.mode)

    def measure(x: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        along = tangents[:, None].expand(-1, *x.shape) if settings["estimator"] == _TANGENTS else None
        return packed(probe.measure(x, directions=along, progress=False), decide(x))

    decide(points[:1])  # what a readout gets wrong is said before the first minute is spent
    chunks, shown = enumerate(points.split(settings["batch_size"])), {"desc": "scan", "unit": "point"}
    found = by_chunks(chunks, measure, parts, kind="part of a SliceScan", progress=progress, **shown)
    return SliceScan.joined(slice, settings, [contents for _, contents in found])
