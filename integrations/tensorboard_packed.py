"""What TensorBoard's Geometry tab reads: a report, its samples, a map or a study, each packed into one tensor summary.

A record is a string tensor: JSON (``arrays``: name → [dtype, shape], and what is no array), then one string an array,
each compressed by itself, so that a reader unpacks what it shows.  ``tensorboard_tab/reading.py`` reads it.

Legend of axes: L layers, B samples, r singular values, S numbers, C channels, P offsets.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from torchgeom_probe.boundary.paired import Estimate
from torchgeom_probe.boundary.study import BoundaryStudy
from torchgeom_probe.errors import optional
from torchgeom_probe.files import finite_or_null
from torchgeom_probe.monitor.samples import ProbeSamples
from torchgeom_probe.report import GeometryReport, LayerGeometry
from torchgeom_probe.shapes import Float, Tensor
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.slice import Plane

#: What is no array, as JSON holds it, and the arrays by name.
Record = tuple[dict[str, Any], dict[str, np.ndarray]]

_SIDE = 64  # pixels of a thumbnail, at most
_THUMBNAILS = 256  # samples; more than these have none
_EXTREMES = 3  # so many of the most, and of the least, magnified samples are shown with their top direction


def summary(kind: str, tag: str, record: Record) -> Any:
    """Return a record as TensorBoard's Summary, under ``geometry/<kind>`` or, of several, ``geometry/<kind>/<tag>``."""
    pb = optional("tensorboard.compat.proto.summary_pb2", extra="tensorboard")
    tensors = optional("tensorboard.compat.proto.tensor_pb2", extra="tensorboard")
    types = optional("tensorboard.compat.proto.types_pb2", extra="tensorboard")
    told, arrays = record
    head = {"arrays": {name: [a.dtype.str, a.shape] for name, a in arrays.items()}, "tag": tag, **told}
    strings = [json.dumps(finite_or_null(head), allow_nan=False).encode(), *(a.tobytes() for a in arrays.values())]
    tensor = tensors.TensorProto(dtype=types.DT_STRING, string_val=[zlib.compress(s, 6) for s in strings])
    tensor.tensor_shape.dim.add().size = len(strings)
    metadata = pb.SummaryMetadata(data_class=pb.DATA_CLASS_TENSOR)
    metadata.plugin_data.plugin_name, metadata.plugin_data.content = "geometry", kind.encode()
    named = f"geometry/{kind}/{tag}" if tag else f"geometry/{kind}"
    return pb.Summary(value=[pb.Summary.Value(tag=named, metadata=metadata, tensor=tensor)])


def packed_report(
    report: GeometryReport, statistics: Mapping[str, Mapping[str, float]], samples: ProbeSamples | None = None
) -> Record:
    """Pack all layers of a report: their ``statistics`` [L, S], and of each sample what has one number a sample.

    ``sigma`` [L, B, r] holds natural logarithms, in float16; nan where a layer has fewer.  With ``samples`` also their
    ``predictions`` and ``margin`` [B], and of images the leading directions of the extreme ones.
    """
    layers = list(report.values())
    numbers = list(dict.fromkeys(key for found in statistics.values() for key in found))
    arrays = {"statistics": np.array([[found.get(key, math.nan) for key in numbers] for found in statistics.values()])}
    of_each: dict[str, list[Tensor | None]] = {}
    for key, tensor in report.tensors().items():
        place, name = key.replace("extras/", "").split("/")
        if tensor.ndim == 1:
            of_each.setdefault(name, [None] * len(layers))[int(place)] = tensor
    arrays |= {name: _stacked(tensors) for name, tensors in of_each.items()}
    if not np.isneginf(arrays["value"]).any():
        arrays.pop("log_pseudo_volume", None)  # it would be the volume again
    arrays = {name: _float32(array) for name, array in arrays.items()}
    sigma = [layer.singular_values.detach().double().log() for layer in layers]
    arrays["sigma"] = _stacked(sigma).astype("<f2")
    if samples is not None:
        decided = samples.decisions
        if decided:
            arrays["predictions"] = decided["predictions"].numpy().astype("<i4")
            arrays["margin"] = decided["margin"].numpy().astype("<f4")
        arrays |= _extreme_directions(layers, samples.x)
    return {"layers": [_told(layer) for layer in layers], "numbers": numbers}, arrays


def packed_identity(samples: ProbeSamples) -> Record:
    """Pack what the samples are: indices, labels and, of images, thumbnails uint8 [B, h, w, C]."""
    images = thumbnails(samples.x)
    arrays = {} if images is None or len(images) > _THUMBNAILS else {"thumbnails": images.numpy()}
    return {"indices": samples.indices, "labels": samples.labels}, arrays


def packed_map(scan: SliceScan) -> Record:
    """Pack a scan: ``value`` [L, *slice], ``range`` [L, 2] of it, ``predictions``, ``entropy``, and its samples."""
    value = np.stack([field.detach().double().cpu().numpy() for field in scan.value.values()])
    finite = [field[np.isfinite(field)] for field in value]
    spans = np.array([[f.min(), f.max()] if f.size else [math.nan, math.nan] for f in finite])
    arrays = {
        "value": _float32(value),
        "range": _float32(spans),
        "predictions": scan.predictions.numpy().astype("<i4"),
        "entropy": scan.entropy.numpy().astype("<f4"),
        "corners": scan.slice.corners.numpy().astype("<f4"),
    }
    images = thumbnails(torch.stack([sample.detach() for sample in scan.slice.samples]))
    if images is not None:
        arrays["thumbnails"] = images.numpy()
    extent = scan.slice.extent if isinstance(scan.slice, Plane) else (0.0, 1.0)
    return {"layers": [_told(layer) for layer in scan.report.values()], "extent": list(extent)}, arrays


def packed_study(study: BoundaryStudy) -> Record:
    """Pack the profiles of a study: of each layer ``offsets`` [P], and ``trained`` and ``initial`` [3, P].

    The three rows are the mean and the two ends of its 95 % interval, in nats.
    """

    def rows(profile: Mapping[float, Estimate] | None) -> list[list[float]] | None:
        if profile is None:
            return None
        intervals = [estimate.interval or (math.nan, math.nan) for estimate in profile.values()]
        return [[float(e) for e in profile.values()], *([each[side] for each in intervals] for side in (0, 1))]

    layers = [
        {
            "name": name,
            "estimand": effect.estimand,
            "sentence": str(effect),
            "offsets": list(effect.profile),
            "trained": rows(effect.profile),
            "initial": rows(effect.initial_profile),
        }
        for name, effect in study.items()
    ]
    return {"layers": layers}, {}


def thumbnails(x: Any) -> Tensor | None:
    """Return the samples as pictures, uint8 [B, h, w, C] of at most 64 pixels a side; None where they are no images.

    An image is [C, H, W] with 1 or 3 channels and at least 4 pixels a side.  Each channel spans its range in the batch.
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 4:
        return None
    small = _small(x.detach().double().cpu().nan_to_num(), _SIDE)
    low, high = (edge(small, dim=(0, 2, 3), keepdim=True) for edge in (torch.amin, torch.amax))
    return ((small - low) / (high - low).clamp(min=1e-12) * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def _small(x: Float[Tensor, "batch channels height width"], side: int) -> Tensor:
    size = [max(1, round(n * min(1, side / max(x.shape[2:])))) for n in x.shape[2:]]
    return torch.nn.functional.interpolate(x, size=size, mode="area")


def _extreme_directions(layers: list[LayerGeometry], x: Any) -> dict[str, np.ndarray]:
    """Of the most and the least magnified images the leading direction, the mean of its channels, of either sign."""
    vectors = [layer.right_singular_vectors for layer in layers]
    if thumbnails(x) is None or any(v is None or not v.shape[1] or v.shape[2] != x[0].numel() for v in vectors):
        return {}
    chosen, drawn = [], []
    for layer, own in zip(layers, vectors, strict=True):
        assert own is not None
        order = layer.value.detach().cpu().nan_to_num(-math.inf).argsort()
        chosen.append(torch.cat([order[-_EXTREMES:].flip(0), order[:_EXTREMES]]))
        leading = own[chosen[-1].to(own.device), 0].detach().cpu().double().reshape(-1, *x.shape[1:])
        small = _small(leading.mean(1, keepdim=True), _SIDE // 2)[:, 0]
        drawn.append((small / small.abs().amax((1, 2), keepdim=True).clamp(min=1e-30) * 127).round())
    return {
        "extremes": torch.stack(chosen).numpy().astype("<i4"),
        "directions": torch.stack(drawn).numpy().astype("i1"),
    }


def _stacked(parts: Iterable[Tensor | None]) -> np.ndarray:
    """One layer's tensor after the other, filled with nan where a layer has none or fewer columns."""
    own = [None if part is None else part.detach().double().cpu().numpy() for part in parts]
    shapes = [a.shape for a in own if a is not None]
    whole = np.full((len(own), *np.max(shapes, axis=0)), math.nan)
    for place, array in zip(whole, own, strict=True):
        if array is not None:
            place[tuple(slice(n) for n in array.shape)] = array
    return whole


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is inf, and counts as not finite
        return array.astype("<f4")


def _told(layer: LayerGeometry) -> dict[str, Any]:
    names = ("name", "estimand", "quantity", "heading", "unit", "engine", "normalized")
    sizes = {"n": layer.num_features, "d": layer.num_inputs, "k": layer.num_directions}
    return {name: getattr(layer, name) for name in names} | sizes
