"""Slices of input space through a few samples, and the scan of a model over them.

``slice → points, tangents → per point: log-volume of every layer, prediction, entropy, margin, confidence →
SliceScan``.

Legend of axes: B points of one chunk, P all points of the slice, k the slice's dimension (1 or 2), T = P on a
line, H × W = P on a plane.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from torchgeom_probe.boundary.magnification import Magnification, logits_of, magnification
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators import Estimator
from torchgeom_probe.jacobian.jacobians import EngineName
from torchgeom_probe.jacobian.plan import free_memory
from torchgeom_probe.model.hooked import Transform
from torchgeom_probe.model.isolation import measuring, unwrapped
from torchgeom_probe.model.layers import LayerSpec
from torchgeom_probe.probe import GeometryProbe
from torchgeom_probe.report import GeometryReport, LayerGeometry
from torchgeom_probe.shapes import Float, Int, Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is optional: its types are for the type checker alone
    Figure = Any

_DECISION = ("predictions", "entropy", "margin", "confidence")


@dataclass(frozen=True, eq=False)
class Line:
    """The straight segment from sample a to sample b.

    x(t) = (1 - t) a + t b at ``steps`` values of t from 0 to 1, both ends included.

    (The paper's own code takes t = i / steps and so never reaches b.)

    Shapes: a and b [*input], single samples without a batch axis, floating point.

    Raises:
        ProbeError: a and b that differ in shape, dtype or device, are equal, not finite or integers; fewer
            than 2 steps.

    >>> line = Line(torch.zeros(3), torch.tensor([2.0, 0.0, 0.0]), steps=5)
    >>> line.points().shape, line.points()[-1].tolist()
    (torch.Size([5, 3]), [2.0, 0.0, 0.0])
    >>> assert line.tangents().tolist() == [[2.0, 0.0, 0.0]] and line.log_measure == math.log(2)

    """

    a: Float[Tensor, " *input"]
    b: Float[Tensor, " *input"]
    steps: int = 64

    def __post_init__(self) -> None:
        _check_samples({"a": self.a, "b": self.b}, kind="Line")
        _check_steps(self.steps, kind="Line")
        if torch.equal(self.a, self.b):
            raise ProbeError(
                "Line: a and b are equal, so there is no line between them.\nTake two different samples:  "
                "Line(x[0], x[1])"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(T,)``: how the points lie."""
        return (self.steps,)

    @property
    def samples(self) -> tuple[Tensor, ...]:
        """The samples that span the slice: a, b."""
        return (self.a, self.b)

    @property
    def corners(self) -> Float[Tensor, " samples k"]:
        """The coordinates at which the samples lie: t = 0 and t = 1."""
        return torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    @property
    def log_measure(self) -> float:
        """Natural log of the length per unit of t, log |b - a|: what a map that keeps lengths has."""
        return _log_measure(self.tangents())

    def grid(self) -> Float[Tensor, " points k"]:
        """[T, 1]: the coordinate t of every point, float64."""
        return _ticks(0.0, 1.0, self.steps)[:, None]

    def points(self) -> Float[Tensor, " points *input"]:
        """[T, *input]: the points, in the samples' dtype and on their device."""
        t = self.grid().to(self.a).reshape(-1, *[1] * self.a.dim())
        return self.a * (1 - t) + self.b * t

    def tangents(self) -> Float[Tensor, " k *input"]:
        """[1, *input]: dx/dt = b - a, the same at every point."""
        return (self.b - self.a)[None]


@dataclass(frozen=True, eq=False)
class Plane:
    """The plane through the samples a, b and c, as a square grid in two coordinates (u, v).

    ``coordinates="equilateral"``, the paper's: the origin is the mean o of the three, ∂x/∂u = b - a ("right")
    and ∂x/∂v = 2√3 ((a + b) / 2 - o) ("up").  In these coordinates the samples are corners of an equilateral
    triangle of side 1, whatever their true distances: a at (-1/2, 1/(2√3)), b at (1/2, 1/(2√3)), c at (0,
    -1/√3), below the other two.

    ``coordinates="barycentric"``: x(u, v) = (1 - u - v) a + u b + v c, so a is
    at (0, 0), b at (1, 0) and c at (0, 1).

    ``extent`` is the range of both coordinates, its ends included.  Points are in row-major order over
    ``shape`` = (H, W): u runs along a row, v up the rows, the lowest v first (draw it with
    ``origin="lower"``).

    Shapes: a, b and c [*input], single samples without a batch axis, floating point.

    Raises:
        ProbeError: samples that differ in shape, dtype or device, lie on one line, are not finite or
            integers; fewer than 2 steps; an empty extent; other coordinates.

    Source: the equilateral coordinates are those of the code of arXiv:2301.11375.

    >>> a, b, c = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    >>> plane = Plane(a, b, c, steps=3)
    >>> plane.shape, plane.points().shape, plane.tangents().shape
    ((3, 3), torch.Size([9, 3]), torch.Size([2, 3]))
    >>> u, v = plane.corners[2]  # where c lies
    >>> right, up = plane.tangents()
    >>> origin = plane.points()[4]
    >>> assert torch.allclose(origin + u * right + v * up, c)

    """

    a: Float[Tensor, " *input"]
    b: Float[Tensor, " *input"]
    c: Float[Tensor, " *input"]
    steps: int = 40
    extent: tuple[float, float] = (-1.0, 1.0)
    coordinates: Literal["equilateral", "barycentric"] = "equilateral"

    def __post_init__(self) -> None:
        _check_samples({"a": self.a, "b": self.b, "c": self.c}, kind="Plane")
        _check_steps(self.steps, kind="Plane")
        if self.coordinates not in ("equilateral", "barycentric"):
            raise ProbeError(
                f"Plane: coordinates={self.coordinates!r} is unknown. Write coordinates='equilateral' (the "
                "default) or 'barycentric'."
            )
        if len(self.extent) != 2 or not -math.inf < self.extent[0] < self.extent[1] < math.inf:
            raise ProbeError(
                f"Plane: extent={self.extent} is no range (low, high) of the coordinates. Write extent=(-1, "
                "1), the default."
            )
        edges = (
            torch.stack([(self.b - self.a).flatten(), (self.c - self.a).flatten()]).detach().double().cpu()
        )
        widths = torch.linalg.svdvals(edges)
        size = max(float(s.detach().double().norm()) for s in self.samples)
        # Rounding alone takes three samples of one line this far off it.
        if len(widths) < 2 or float(widths[1]) <= 10 * torch.finfo(self.a.dtype).eps * size:
            raise ProbeError(
                "Plane: a, b and c lie on one line, so they span no plane.\n"
                "Take three samples in general position:  Plane(x[0], x[1], x[2]); or scan the line:  "
                "Line(a, b)"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(H, W)``: how the points lie; rows are v."""
        return (self.steps, self.steps)

    @property
    def samples(self) -> tuple[Tensor, ...]:
        """The samples that span the slice: a, b, c."""
        return (self.a, self.b, self.c)

    @property
    def corners(self) -> Float[Tensor, " samples k"]:
        """The coordinates (u, v) at which a, b and c lie."""
        if self.coordinates == "barycentric":
            return torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        inner, outer = 1 / (2 * math.sqrt(3)), 1 / math.sqrt(3)
        return torch.tensor([[-0.5, inner], [0.5, inner], [0.0, -outer]], dtype=torch.float64)

    @property
    def log_measure(self) -> float:
        """Natural log of the area per unit square of (u, v): the log-volume of a map that keeps areas."""
        return _log_measure(self.tangents())

    def grid(self) -> Float[Tensor, " points k"]:
        """[H·W, 2]: the coordinates (u, v) of every point, float64."""
        ticks = _ticks(float(self.extent[0]), float(self.extent[1]), self.steps)
        v, u = torch.meshgrid(ticks, ticks, indexing="ij")
        return torch.stack([u.flatten(), v.flatten()], dim=1)

    def points(self) -> Float[Tensor, " points *input"]:
        """[H·W, *input]: the points, in the samples' dtype and on their device."""
        u, v = self.grid().to(self.a).reshape(-1, 2, *[1] * self.a.dim()).unbind(1)
        origin = self.a if self.coordinates == "barycentric" else (self.a + self.b + self.c) / 3
        right, up = self.tangents()
        return origin + u * right + v * up

    def tangents(self) -> Float[Tensor, " k *input"]:
        """[2, *input]: ∂x/∂u and ∂x/∂v, the same at every point; not orthonormal in general."""
        right = self.b - self.a
        if self.coordinates == "barycentric":
            return torch.stack([right, self.c - self.a])
        # 2√3 ((a + b) / 2 - o), written so that it is a difference of samples.
        return torch.stack([right, (self.a + self.b - 2 * self.c) / math.sqrt(3)])


@dataclass(frozen=True, eq=False)
class SliceScan:
    """What a :func:`scan` found, on the CPU.

    Attributes:
        slice: the :class:`Line` or :class:`Plane`.
        report: layer → :class:`~torchgeom_probe.LayerGeometry` over the P points in row-major order: singular
            values, ranks, estimand, errors; ``report.to_csv(path)`` writes them.
        predictions: [T] or [H, W], the class of the largest logit; -1 where a logit is not finite.
        entropy: of the softmax, in nats, computed in float64 (so that it does not underflow to ties).
        margin: the largest logit minus the second largest.
        confidence: the largest probability.
        settings: what was scanned and how: digests of model and slice, layers, estimator, batch size.

    >>> import tempfile
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    >>> found = scan(model, Line(torch.zeros(2), torch.ones(2), steps=20), layers=["1"], progress=False)
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

    @property
    def log_volume(self) -> dict[str, Tensor]:
        """Layer → [T] or [H, W], NATURAL log.

        Of a scan along the slice's own tangents it is per unit of the slice's coordinates; minus
        ``slice.log_measure`` it is the true magnification, log of output length (area) per input length
        (area).
        """
        return {name: layer.log_volume.reshape(self.slice.shape) for name, layer in self.report.items()}

    def magnification(self, layer: str, *, initial: SliceScan | None = None, seed: int = 0) -> Magnification:
        """Test whether ``layer`` magnifies near the boundary, beside the scan ``initial`` before training.

        The statistics, their units and nulls: :func:`torchgeom_probe.magnification`.  Without the layer's
        name in the scan, or with another slice in ``initial``: ProbeError.
        """
        if initial is not None and not _same_slice(self.slice, initial.slice):
            raise ProbeError(
                "initial was scanned over another slice, so its points are not these points.\n"
                "Scan both networks over one slice:  initial = scan(untrained, trained_scan.slice, "
                "layers=...)"
            )
        return magnification(
            self._layer(layer),
            self.entropy,
            initial=None if initial is None else initial._layer(layer),
            predictions=self.predictions,
            name=layer or "the model",
            seed=seed,
        )

    def _layer(self, name: str) -> Tensor:
        if name not in self.report:
            raise ProbeError(
                f"layer {name!r} was not scanned.\nThis scan has the layers {list(self.report)}."
            )
        return self.log_volume[name]

    def plot(self, *, before: SliceScan | None = None, **options: Any) -> Figure:
        """Draw the scan with matplotlib, beside the untrained network's where ``before`` is given.

        Options and errors: :func:`torchgeom_probe.plotting.figures.plot_line` and
        :func:`~torchgeom_probe.plotting.figures.plot_plane`.
        """
        from torchgeom_probe.plotting import figures

        draw = figures.plot_line if isinstance(self.slice, Line) else figures.plot_plane
        return draw(self, None, **options) if before is None else draw(before, self, **options)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to one file, at once or not at all; returns the path.

        The file is in the safetensors format with JSON in its header: any safetensors reader opens it,
        nothing in it is executed on loading, and equal scans give equal bytes.
        """
        return _write(Path(path), self._encoded())

    def _encoded(self) -> bytes:
        tensors = {f"slice/{name}": s for name, s in zip("abc", self.slice.samples, strict=False)}
        tensors |= {key: getattr(self, key).flatten() for key in _DECISION}
        layers, layer_tensors = _split_layers(self.report)
        options = {"kind": type(self.slice).__name__, "steps": self.slice.steps}
        if isinstance(self.slice, Plane):
            options |= {"extent": list(self.slice.extent), "coordinates": self.slice.coordinates}
        return _encode(
            tensors | layer_tensors,
            {"format": "SliceScan 1", "slice": options, "layers": layers, "settings": dict(self.settings)},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SliceScan:
        """Read what :meth:`save` wrote, onto the CPU; ProbeError where it is no scan or cut short."""
        tensors, metadata = _read(Path(path))
        if metadata.get("format") != "SliceScan 1":
            raise ProbeError(
                f"{path} is no saved scan.\nWrite one with:  scan(model, plane, layers=...).save(path)"
            )
        options = dict(metadata["slice"])
        samples = [tensors[f"slice/{name}"] for name in "abc" if f"slice/{name}" in tensors]
        if options.pop("kind") == "Line":
            along: Line | Plane = Line(*samples, **options)  # type: ignore[arg-type]
        else:
            options["extent"] = tuple(options["extent"])
            along = Plane(*samples, **options)  # type: ignore[arg-type]
        report = _joined_layers(metadata["layers"], tensors)
        decision = {key: tensors[key].reshape(along.shape) for key in _DECISION}
        return cls(slice=along, report=report, settings=metadata["settings"], **decision)


def scan(
    model: nn.Module,
    slice: Line | Plane,
    *,
    layers: LayerSpec = "auto",
    estimator: Estimator | None = None,
    readout: Callable[[Any], Tensor] | None = None,
    normalize: bool = True,
    transform: Transform | Mapping[str, Transform] | None = None,
    engine: EngineName = "auto",
    source: str | nn.Module | None = None,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    path: str | os.PathLike[str] | None = None,
) -> SliceScan:
    """Measure every layer's log-volume, and the model's prediction, at every point of a slice.

    With ``estimator=None`` the directions are the slice's own tangents T (``slice.tangents()``): log
    √det(TᵀgT), which is exact, the length or area that the layer gives to a unit of the slice's coordinates.
    Any other estimator measures what it measures at a single sample, at every point.

    Under ``torch.distributed`` (``torchrun``) the chunks are shared out among the ranks, and every rank gets
    the whole scan.

    Args:
        model: any module; it is run in eval mode and left exactly as it was.
        slice: a :class:`Line` or :class:`Plane`; its points are moved to the model's device.
        layers: which, as for :class:`~torchgeom_probe.GeometryProbe`.
        estimator: ``Exact()``, ``Subspace(k=8)``, ``TopK(k=10)``, …; None for the slice's own tangents.
        readout: maps the model's output to logits [B, C], C ≥ 2 (for a self-supervised model: its linear
            classifier); None where the model's output is the logits.
        normalize: divide J by √n, as for the probe.
        transform: maps a layer's output before it is flattened, as for the probe.
        engine: as for the probe.
        source: as for the probe.
        memory_budget: bytes that one chunk's measurement may use, as for the probe.
        batch_size: points a chunk; None: sized from the free memory and the model's activations, at most 256.
        progress: show a progress bar (on rank 0); None: only on a terminal.
        path: where the scan is saved when it is done.  Each chunk is stored beside it, in ``<path>.parts``,
            as soon as it is measured; called again after an interruption, the scan goes on where it was and
            ends with the same bytes.  A file there that is the finished scan of this very model and slice is
            loaded; one of another scan is refused, never overwritten.

    Raises:
        ProbeError: an output that is no logits (with the ``readout`` to write), a ``path`` that holds another
            scan, and whatever the probe refuses.

    Cost: per point one forward pass for the prediction and, with the slice's tangents, one dual pass of 1 + k
    rows for all layers together.

    >>> model = torch.nn.Linear(2, 3)
    >>> line = Line(torch.zeros(2), torch.tensor([0.0, 1.0]), steps=5)
    >>> found = scan(model, line, layers=[""], normalize=False, progress=False)
    >>> length = model.weight[:, 1].norm()  # |W (b - a)|
    >>> assert torch.allclose(found.log_volume[""].exp(), length.double())

    """
    if not isinstance(slice, (Line, Plane)):
        raise ProbeError(
            f"a {type(slice).__name__} is no slice. Write:  scan(model, Line(x[0], x[1]), layers=...)"
        )
    if batch_size is not None and batch_size < 1:
        raise ProbeError(
            f"batch_size={batch_size} must be at least 1. Leave it out to have it sized from the free memory."
        )
    bare = unwrapped(model)
    device = next((p.device for p in [*bare.parameters(), *bare.buffers()]), slice.a.device)
    points, tangents = slice.points().detach().to(device), slice.tangents().detach().to(device)
    rank, ranks = _rank()
    target = None if path is None else Path(path)

    def decide(x: Tensor) -> dict[str, Tensor]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(measuring(bare))
            if isinstance(readout, nn.Module):
                stack.enter_context(measuring(readout))
            return _decisions(logits_of(bare(x), readout=readout, batch=len(x)))

    decide(points[:1])  # what the readout gets wrong is said before the first minute is spent
    probe = GeometryProbe(
        model,
        layers=layers,
        estimator=estimator,
        normalize=normalize,
        transform=transform,
        engine=engine,
        source=source,
        memory_budget=memory_budget,
    )
    settings: dict[str, Any] = {
        "layers": probe.layers,
        "estimator": "slice tangents" if estimator is None else repr(estimator),
        "readout": _in_words(readout),
        "normalize": normalize,
        "transform": _in_words(transform),
        "engine": engine,
        "source": _in_words(source),
    }
    if target is not None:
        settings |= {"model": _state_digest(bare), "slice": _slice_digest(slice)}
    settings["batch_size"] = _from_rank_0(
        batch_size or _stored_batch_size(target) or _batch_size(bare, points, tangents)
    )

    store = None
    if target is not None:
        finished = _finished(target, settings)
        if finished is not None:
            return finished
        store = _Parts(target, settings)
    size = settings["batch_size"]
    starts = range(0, len(points), size)
    chunks: dict[int, bytes] = {}
    with probe, tqdm(total=len(points), desc="scan", unit="point", disable=_no_bar(progress, rank)) as bar:
        for index, start in enumerate(starts):
            x = points[start : start + size]
            if index % ranks == rank:
                encoded = None if store is None else store.get(index)
                if encoded is None:
                    directions = tangents[:, None].expand(-1, *x.shape) if estimator is None else None
                    report = probe.measure(x, directions=directions, progress=False)
                    layer_constants, tensors = _split_layers(report)
                    encoded = _encode(tensors | decide(x), {"layers": layer_constants})
                    if store is not None:
                        store.put(index, encoded)
                chunks[index] = encoded
            bar.update(len(x))
    chunks = _gathered(chunks)
    result = _assembled(slice, settings, [_decode(chunks[i], "a chunk") for i in range(len(starts))])
    if target is not None and store is not None:
        if rank == 0:
            result.save(target)
            store.remove()
        _barrier()
    return result


def _decisions(logits: Tensor) -> dict[str, Tensor]:
    logits = logits.detach().cpu().double()
    finite = logits.isfinite().all(-1)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    top = logits.topk(2, dim=-1).values
    undefined = torch.full_like(top[:, 0], math.nan)
    return {
        "predictions": torch.where(finite, logits.argmax(-1), -1),
        "entropy": torch.where(finite, torch.special.entr(p).sum(-1), undefined),
        "margin": torch.where(finite, top[:, 0] - top[:, 1], undefined),
        "confidence": torch.where(finite, p.max(-1).values, undefined),
    }


# --- the size of a chunk ------------------------------------------------------------------------------------


def _batch_size(model: nn.Module, points: Tensor, tangents: Tensor) -> int:
    widest = points[0].numel() * points.element_size()

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal widest
        if isinstance(output, Tensor):
            widest = max(widest, output.numel() * output.element_size())

    with measuring(model):
        hooks = [module.register_forward_hook(record) for module in model.modules()]
        try:
            model(points[:1])
        finally:
            for hook in hooks:
                hook.remove()
    # Some eight buffers of the widest activation live at once: input and output, branches, an op's own
    # workspace.
    per_point = 8 * widest * (1 + len(tangents))
    fitting = int(free_memory(points.device) / 4 / per_point)
    # A power of two, so that a little memory more or less gives the same chunks.
    return min(256, 2 ** int(math.log2(max(1, fitting))))


# --- layers to tensors and back -----------------------------------------------------------------------------


def _no_bar(progress: bool | None, rank: int) -> bool | None:
    # None lets tqdm decide: no bar where the output is no terminal.
    return True if rank > 0 else None if progress is None else not progress


def _split_layers(report: GeometryReport) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    constants, tensors = [], {}
    for i, layer in enumerate(report.values()):
        entry = {}
        for field in dataclasses.fields(LayerGeometry):
            if not field.metadata.get("export", True):
                continue
            value = getattr(layer, field.name)
            if isinstance(value, Tensor):
                tensors[f"layer{i}/{field.name}"] = value.detach().cpu()
            else:
                entry[field.name] = value
        constants.append(entry)
    return constants, tensors


def _joined_layers(constants: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> GeometryReport:
    layers = {}
    for i, entry in enumerate(constants):
        prefix = f"layer{i}/"
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        layers[entry["name"]] = LayerGeometry(**{**entry, **own})
    return GeometryReport(layers)


def _assembled(
    slice: Line | Plane,
    settings: Mapping[str, Any],
    chunks: Sequence[tuple[dict[str, Tensor], dict[str, Any]]],
) -> SliceScan:
    tensors = {key: torch.cat([chunk[key] for chunk, _ in chunks]) for key in chunks[0][0]}
    constants = [dict(entry) for entry in chunks[0][1]["layers"]]
    for i, entry in enumerate(constants):
        engines = {metadata["layers"][i]["engine"]: None for _, metadata in chunks}
        entry["engine"] = "+".join(engines)
    decision = {key: tensors[key].reshape(slice.shape) for key in _DECISION}
    return SliceScan(slice=slice, report=_joined_layers(constants, tensors), settings=settings, **decision)


# --- files: the safetensors format, which is a length, a JSON header and the raw numbers --------------------
# Written here, in thirty lines, because the core needs no package but torch, numpy and tqdm; of numpy's own
# formats, npz has no bfloat16 and no header for JSON.  The tests read these files with the safetensors
# package.

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def _encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"torchgeom_probe": json.dumps(metadata, sort_keys=True)}}
    parts = []
    offset = 0
    # The widest numbers first, so that every tensor lies aligned.
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        data = _bytes(tensor)
        header[key] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _decode(data: bytes, origin: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        metadata = json.loads(header.pop("__metadata__")["torchgeom_probe"])
        tensors = {}
        for key, entry in header.items():
            low, high = (end + offset for offset in entry["data_offsets"])
            dtype = _DTYPES[entry["dtype"]]
            if high > len(data):
                raise ValueError("cut short")
            values = (
                torch.frombuffer(bytearray(data[low:high]), dtype=dtype)
                if high > low
                else torch.empty(0, dtype=dtype)
            )
            tensors[key] = values.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, UnicodeDecodeError, RuntimeError) as error:
        raise ProbeError(
            f"{origin} is no scan of torchgeom_probe, or was cut short ({error}).\n"
            "Delete it and scan again:  scan(model, plane, layers=..., path=path)"
        ) from error
    return tensors, metadata


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise ProbeError(f"{path} is no file.\nSave a scan first:  scan(model, plane, layers=...).save(path)")
    return _decode(path.read_bytes(), str(path))


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# --- going on after an interruption -------------------------------------------------------------------------


class _Parts:
    """The chunks that are done, one file each, in a folder that says of which scan they are."""

    def __init__(self, target: Path, settings: Mapping[str, Any]) -> None:
        self.folder = _parts_folder(target)
        if _rank()[0] == 0 and _stored_settings(target) is None:
            _write(self.folder / "settings.json", json.dumps(settings, sort_keys=True).encode())
        _barrier()
        _refuse_other(_stored_settings(target) or {}, settings, str(self.folder))

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.safetensors"

    def get(self, index: int) -> bytes | None:
        file = self._file(index)
        return file.read_bytes() if file.exists() else None

    def put(self, index: int, data: bytes) -> None:
        _write(self._file(index), data)

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def _parts_folder(target: Path) -> Path:
    return target.with_name(target.name + ".parts")


def _stored_settings(target: Path) -> dict[str, Any] | None:
    file = _parts_folder(target) / "settings.json"
    return json.loads(file.read_text()) if file.exists() else None


def _stored_batch_size(target: Path | None) -> int | None:
    """Return the chunk size of an earlier part of this scan: other chunks would round differently."""
    if target is None:
        return None
    if target.is_file():
        return _read(target)[1].get("settings", {}).get("batch_size")
    stored = _stored_settings(target)
    return None if stored is None else stored["batch_size"]


def _finished(target: Path, settings: Mapping[str, Any]) -> SliceScan | None:
    if not target.exists():
        return None
    found = SliceScan.load(target)
    _refuse_other(found.settings, settings, str(target))
    return found


def _refuse_other(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    different = [key for key in wanted if stored.get(key) != wanted[key]]
    if different:
        key = different[0]
        raise ProbeError(
            f"{where} holds another scan: its {', '.join(different)} differ"
            + ("" if key in ("model", "slice") else f" ({key}={stored.get(key)!r}, now {wanted[key]!r})")
            + ".\nScan to another path, or delete what is there:  scan(..., path='another.safetensors')"
        )


def _in_words(value: Any) -> Any:
    """Say what an argument is in a way that is the same in the next process: no memory addresses."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} {_state_digest(value)}"
    if isinstance(value, Mapping):
        return {str(key): _in_words(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [_in_words(entry) for entry in value]
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _state_digest(module: nn.Module) -> str:
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, tensor in sorted(
        [*module.named_parameters(), *module.named_buffers()], key=lambda item: item[0]
    ):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _slice_digest(slice: Line | Plane) -> str:
    options = (slice.extent, slice.coordinates) if isinstance(slice, Plane) else ()
    digest = hashlib.sha256(f"{type(slice).__name__} {slice.steps} {options}".encode())
    for sample in slice.samples:
        digest.update(f"{sample.dtype} {tuple(sample.shape)}".encode())
        digest.update(_bytes(sample))
    return digest.hexdigest()[:16]


def _same_slice(one: Line | Plane, other: Line | Plane) -> bool:
    return one is other or _slice_digest(one) == _slice_digest(other)


# --- several ranks ------------------------------------------------------------------------------------------


_alone: ContextVar[bool] = ContextVar("_alone", default=False)


@contextlib.contextmanager
def on_this_rank() -> Iterator[None]:
    """Within it a scan is this process's own: no other rank is waited for."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def _rank() -> tuple[int, int]:
    if _alone.get():
        return 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _from_rank_0(value: int) -> int:
    if _rank()[1] == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _gathered(chunks: dict[int, bytes]) -> dict[int, bytes]:
    if _rank()[1] == 1:
        return chunks
    shares: list[Any] = [None] * _rank()[1]
    torch.distributed.all_gather_object(shares, chunks)
    return {index: data for share in shares for index, data in share.items()}


def _barrier() -> None:
    if _rank()[1] > 1:
        torch.distributed.barrier()


# --- what a slice is made of --------------------------------------------------------------------------------


def _check_samples(samples: Mapping[str, Tensor], *, kind: str) -> None:
    call = f"{kind}({', '.join(samples)})"
    first = next(iter(samples.values()))
    for name, sample in samples.items():
        if not isinstance(sample, Tensor):
            raise ProbeError(
                f"{kind}: {name} is a {type(sample).__name__}, not a tensor.\nWrite:  torch.as_tensor({name})"
            )
        if not sample.is_floating_point():
            raise ProbeError(
                f"{kind}: {name} has dtype {sample.dtype}, and between integers there is no line.\n"
                f"Take the model's own floating-point input:  {call.replace(name, f'{name}.float()')}"
            )
        if sample.shape != first.shape or sample.dtype != first.dtype or sample.device != first.device:
            raise ProbeError(
                f"{kind}: the samples differ: "
                + ", ".join(f"{n} is {tuple(s.shape)} {s.dtype} on {s.device}" for n, s in samples.items())
                + ".\nEach is one input of the model, without a batch axis:  "
                + f"{kind}({', '.join(f'x[{i}]' for i in range(len(samples)))})"
            )
        if not bool(sample.isfinite().all()):
            raise ProbeError(
                f"{kind}: {name} holds numbers that are not finite.\nTake another sample, or:  "
                f"{name}.nan_to_num()"
            )


def _check_steps(steps: int, *, kind: str) -> None:
    if not isinstance(steps, int) or steps < 2:
        raise ProbeError(
            f"{kind}: steps={steps!r} must be a whole number of at least 2: both ends are points. Write "
            "steps=64."
        )


def _ticks(low: float, high: float, steps: int) -> Tensor:
    return torch.linspace(low, high, steps, dtype=torch.float64)


def _log_measure(tangents: Tensor) -> float:
    factor = torch.linalg.qr(tangents.detach().flatten(1).double().cpu().T, mode="r").R
    return float(factor.diagonal().abs().log().sum())
