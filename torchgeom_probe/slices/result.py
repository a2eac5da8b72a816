"""What a scan of a slice found: the geometry of every layer and the model's decision at every point."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.files import encoded, read, write_atomically
from torchgeom_probe.model.predictions import DECISIONS
from torchgeom_probe.report import GeometryReport
from torchgeom_probe.shapes import Float, Int, Tensor
from torchgeom_probe.slices.magnification import Magnification, magnification
from torchgeom_probe.slices.slice import Line, Plane


@dataclass(frozen=True, eq=False, repr=False)
class SliceScan:
    """What a :func:`~torchgeom_probe.scan` found, on the CPU.

    Attributes:
        slice: the :class:`~torchgeom_probe.Line` or :class:`~torchgeom_probe.Plane`.
        report: layer → :class:`~torchgeom_probe.LayerGeometry` over the P points in row-major order: singular
            values, ranks, estimand, errors; ``report.to_csv(path)`` writes them.
        predictions: [T] or [H, W], the class of the largest logit; -1 where a logit is not finite.
        entropy: of the softmax, in nats, computed in float64 (so that it does not underflow to ties).
        margin: the largest logit minus the second largest.
        confidence: the largest probability.
        settings: what was scanned and how: layers, estimator and the probe's other options, points a chunk; where it
            was stored also digests of model and slice.

    >>> import tempfile, torchgeom_probe as tgp
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    >>> found = tgp.scan(model, Line(torch.zeros(2), torch.ones(2), steps=20), layers=["1"], progress=False)
    >>> path = found.save(tempfile.mkdtemp() + "/line.safetensors")
    >>> assert torch.equal(SliceScan.load(path).log_volume["1"], found.log_volume["1"])
    """

    slice: Line | Plane
    report: GeometryReport
    predictions: Int[Tensor, " *slice"]
    entropy: Float[Tensor, " *slice"]
    margin: Float[Tensor, " *slice"]
    confidence: Float[Tensor, " *slice"]
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        classes = len(self.predictions[self.predictions >= 0].unique())
        return f"SliceScan({self.slice}: layers {list(self.report)}; classes predicted: {classes})"

    @property
    def value(self) -> dict[str, Tensor]:
        """Layer → [T] or [H, W], what was estimated, in the layer's ``unit``."""
        return {name: layer.value.reshape(self.slice.shape) for name, layer in self.report.items()}

    @property
    def log_volume(self) -> dict[str, Tensor]:
        """Layer → [T] or [H, W], NATURAL log; ProbeError of an estimator whose value is none (see ``value``).

        Of a scan along the slice's own tangents it is per unit of the slice's coordinates; minus
        ``slice.log_measure`` it is the true magnification, log of output length (area) per input length
        (area).
        """
        return {name: layer.log_volume.reshape(self.slice.shape) for name, layer in self.report.items()}

    def magnification(self, layer: str, *, initial: SliceScan | None = None) -> Magnification:
        """Describe how ``layer``'s log-volume goes with the entropy here, beside the scan ``initial`` before training.

        An illustration: the test is :func:`torchgeom_probe.boundary_study`.

        Raises:
            ProbeError: a layer that was not scanned; an ``initial`` of another slice; fewer than 16 finite points; the
                same entropy everywhere.
        """
        if initial is not None and self.slice.digest != initial.slice.digest:
            raise ProbeError(
                "initial was scanned over another slice, so its points are not these points.\n"
                "Scan both networks over one slice:  initial = scan(untrained, trained_scan.slice, layers=...)"
            )
        before = None if initial is None else initial._volume_of(layer)
        name = layer or "the model"
        return magnification(self._volume_of(layer), self.entropy, self.predictions, initial=before, name=name)

    def _volume_of(self, layer: str) -> Tensor:
        if layer not in self.report:
            raise ProbeError(f"layer {layer!r} was not scanned.\nThis scan has the layers {list(self.report)}.")
        return self.report[layer].frame_volume.reshape(self.slice.shape)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to one safetensors file, at once or not at all; returns the path.

        Equal scans give equal bytes.
        """
        tensors, metadata = packed(self.report, {key: getattr(self, key) for key in DECISIONS})
        tensors |= {f"slice/{name}": sample for name, sample in zip("abc", self.slice.samples, strict=False)}
        along = {"kind": type(self.slice).__name__, **self.slice.options}
        metadata |= {"slice": along, "settings": dict(self.settings)}
        return write_atomically(path, encoded(tensors, metadata, kind="SliceScan"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SliceScan:
        """Read what :meth:`save` wrote, onto the CPU; ProbeError where it is no scan or cut short."""
        tensors, metadata = read(path, kind="SliceScan")
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in metadata["slice"].items()}
        samples = [tensors[f"slice/{name}"] for name in "abc" if f"slice/{name}" in tensors]
        kind: Any = Line if options.pop("kind") == "Line" else Plane
        return cls.joined(kind(*samples, **options), metadata["settings"], [(tensors, metadata)])

    @classmethod
    def joined(
        cls,
        slice: Line | Plane,
        settings: Mapping[str, Any],
        chunks: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]],
    ) -> SliceScan:
        """Put chunks of points together, each what :func:`packed` returned, in the order of the points."""
        report = GeometryReport.joined([GeometryReport.of(tensors, metadata["report"]) for tensors, metadata in chunks])
        decided = {key: torch.cat([tensors[key].flatten() for tensors, _ in chunks]) for key in DECISIONS}
        shaped = {key: values.reshape(slice.shape) for key, values in decided.items()}
        return cls(slice=slice, report=report, settings=settings, **shaped)


def packed(report: GeometryReport, decisions: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what was found at some points as tensors by name and metadata, for one file."""
    return report.tensors() | dict(decisions), {"report": report.metadata()}
