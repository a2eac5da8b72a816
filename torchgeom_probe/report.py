"""What a measurement returns, and where its numbers can be sent.

Legend of axes: B samples, r singular values, L layers.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.linalg.spectrum import SpectralDensity
from torchgeom_probe.shapes import Float, Int, Tensor


@dataclass(frozen=True, eq=False)
class LayerGeometry:
    """The local geometry of one layer's feature map Φ around each of B samples.

    With J = ∂Φ/∂x at a sample (divided by √n when ``normalized``, the paper's convention) and g = JᵀJ:

    Attributes:
        name: the layer's name; ``name#1``, ``name#2`` … for the later calls of a module that is called repeatedly.
        estimand: in words, what ``log_volume`` is: √det g, √det JJᵀ, √det VᵀgV, ….
        engine: which engine ran: ``"fused"``, ``"functorch"`` or ``"vjp"``.
        log_volume: [B], NATURAL log of the volume element named by ``estimand``; ``-inf`` where it is zero (``rank``
            says why), ``nan`` only where the Jacobian itself is not finite (a diverged model).
        singular_values: [B, r], descending, of the Jacobian restricted to the directions (r = min(k, n)).
        rank: [B], how many singular values exceed ``rank_tolerance`` · σ_max; -1 where the Jacobian is not finite.
        log_pseudo_volume: [B], natural log of the product of those; 0 at rank 0 (an empty product).
        num_features: n, the layer's features per sample.
        num_inputs: d, the numbers per sample of the space that is pulled back to.
        num_directions: k, the tangent directions used.
        normalized: whether J was divided by √n.
        rank_tolerance: the threshold of ``rank``, relative to the largest singular value.
        std_error: [B] standard error of a stochastic ``log_volume``, in nats, or None.
        error_bound: [B] bound on the error of ``log_volume``, in nats, or None.
        log_det: [B], log det(g + εI), or None.
        trace: [B], tr g, or None.
        num_products: [B], how many Jv and Jᵀu a matrix-free estimator formed for each sample, or None.
        trace_std_error: [B] standard error of ``trace``, or None.
        interval: [B, 2], 95 % confidence interval of ``log_volume``, or None.
        spectrum: the spectral density of g, or None; see :meth:`GeometryReport.density`; not exported.
        right_singular_vectors: [B, q, d], the leading ones, for ``measure(x, warm=...)``, or None; not exported.

    Tensors stay on the model's device.
    """

    name: str
    estimand: str
    engine: str
    log_volume: Float[Tensor, " batch"]
    singular_values: Float[Tensor, "batch r"]
    rank: Int[Tensor, " batch"]
    log_pseudo_volume: Float[Tensor, " batch"]
    num_features: int
    num_inputs: int
    num_directions: int
    normalized: bool
    rank_tolerance: float
    std_error: Float[Tensor, " batch"] | None = None
    error_bound: Float[Tensor, " batch"] | None = None
    log_det: Float[Tensor, " batch"] | None = None
    trace: Float[Tensor, " batch"] | None = None
    trace_std_error: Float[Tensor, " batch"] | None = None
    interval: Float[Tensor, "batch 2"] | None = None
    spectrum: SpectralDensity | None = field(default=None, repr=False, metadata={"export": False})
    num_products: Int[Tensor, " batch"] | None = None
    right_singular_vectors: Float[Tensor, "batch q d"] | None = field(
        default=None, repr=False, metadata={"export": False}
    )

    @property
    def log10_volume(self) -> Float[Tensor, " batch"]:
        """[B], the log-volume to base 10, as in the paper's figures."""
        return self.log_volume / math.log(10.0)

    @property
    def lipschitz_bounds(self) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Lower and upper bound [B] of σ_1 of J, the layer's local Lipschitz constant (of J/√n when normalised).

        From ``Exact`` they coincide; from ``TopK`` every Ritz value is a lower bound, and ``error_bound`` says how far off.

        Raises:
            ProbeError: an estimator that does not bound σ_1.
        """
        if self.singular_values.shape[1] and (
            self.error_bound is not None
            or self.num_directions == self.num_inputs == self.singular_values.shape[1]
            or (self.spectrum is not None and self.spectrum.exact)
        ):
            largest = self.singular_values[:, 0]
            return largest, largest if self.error_bound is None else largest * self.error_bound.exp()
        raise ProbeError(
            f"layer {self.name!r} was measured as {self.estimand!r}, which does not bound σ_1.\nMeasure with estimator=TopK(k=1)"
        )

    def statistics(self) -> dict[str, float]:
        """Numbers over the batch: percentiles (nats, finite values only), rank, σ_max, and how many were not finite.

        ``nan`` stands where no sample has a finite log-volume.  Copies to the host: not for the hot path.
        """
        volume = self.log_volume.detach().double().cpu()
        finite = volume[volume.isfinite()]
        percentiles = [math.nan] * 3
        if finite.numel():
            percentiles = torch.quantile(finite, torch.tensor([0.1, 0.5, 0.9], dtype=finite.dtype)).tolist()
        sigma = self.singular_values.detach().double().cpu()
        sigma = sigma[sigma.isfinite().all(-1)] if sigma.numel() else sigma
        return {
            "mean": finite.mean().item() if finite.numel() else math.nan,
            "p10": percentiles[0],
            "median": percentiles[1],
            "p90": percentiles[2],
            "sigma_max": sigma.max().item() if sigma.numel() else math.nan,
            "rank": self.rank.detach().double().median().item() if self.rank.numel() else math.nan,
            "nonfinite": float(volume.numel() - finite.numel()),
        }


class GeometryReport(Mapping[str, LayerGeometry]):
    """Layer name → :class:`LayerGeometry`, in the order in which the layers fired.

    >>> import torch, torchgeom_probe as tgp
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh())
    >>> report = tgp.measure(model, torch.randn(5, 2), layers=["0", "1"], estimator=tgp.Exact())
    >>> list(report), tuple(report["1"].log_volume.shape)
    (['0', '1'], (5,))
    """

    def __init__(self, layers: Mapping[str, LayerGeometry]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, name: str) -> LayerGeometry:
        try:
            return self._layers[name]
        except KeyError:
            raise KeyError(f"{name!r} was not measured; the report has {list(self._layers)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"GeometryReport({list(self._layers)})"

    def __str__(self) -> str:
        return self.summary()

    def density(self, layer: str) -> SpectralDensity:
        """The spectral density of g at one layer, where the estimator found it: ``LogDet`` or ``Exact``.

        Raises:
            ProbeError: another estimator, which knows no more than a part of the spectrum.
        """
        found = self[layer].spectrum
        if found is None:
            raise ProbeError(
                f"layer {layer!r} was measured as {self[layer].estimand!r}, which says nothing of the whole spectrum.\n"
                "Measure with estimator=LogDet(eps=...) or estimator=Exact()"
            )
        return found

    def summary(self) -> str:
        """A table for people: per layer n, k, the log-volume's median and spread in nats, rank and σ_max."""
        header = (
            "layer",
            "n",
            "d",
            "k",
            "log-volume [nat]",
            "p10 … p90",
            "log10",
            "rank",
            "σ_max",
            "not finite",
        )
        rows = [header]
        for name, layer in self.items():
            s = layer.statistics()
            rows.append(
                (
                    name or "(model)",
                    str(layer.num_features),
                    str(layer.num_inputs),
                    str(layer.num_directions),
                    f"{s['median']:.3f}",
                    f"{s['p10']:.2f} … {s['p90']:.2f}",
                    f"{s['median'] / math.log(10):.3f}",
                    f"{s['rank']:g}",
                    f"{s['sigma_max']:.3g}",
                    f"{s['nonfinite']:g} of {layer.log_volume.numel()}",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        for group, members in self._by_convention().items():
            lines.append(f"{', '.join(m or '(model)' for m in members)}: {group}")
        return "\n".join(lines)

    def _by_convention(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name, layer in self.items():
            scaling = "J divided by √n" if layer.normalized else "J not divided by √n"
            groups.setdefault(f"{layer.estimand}; {scaling}; engine {layer.engine}", []).append(name)
        return groups

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write one row per layer and sample (log-volumes in nats); returns the path."""
        fields = (
            "layer",
            "sample",
            "log_volume",
            "log10_volume",
            "log_pseudo_volume",
            "rank",
            "sigma_max",
            "sigma_min",
        )
        extras = [
            f
            for f in ("std_error", "error_bound", "log_det", "trace", "trace_std_error", "num_products")
            if any(getattr(g, f) is not None for g in self.values())
        ]
        constants = ("num_features", "num_inputs", "num_directions", "normalized", "engine", "estimand")
        target = _parent_made(path)
        with target.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow([*fields, *extras, *constants])
            for layer in self.values():
                sigma = layer.singular_values
                columns: list[Any] = [
                    layer.log_volume,
                    layer.log10_volume,
                    layer.log_pseudo_volume,
                    layer.rank,
                ]
                columns += [sigma[:, 0] if sigma.shape[1] else None, sigma[:, -1] if sigma.shape[1] else None]
                columns += [getattr(layer, f) for f in extras]
                lists = [[""] * len(layer.rank) if c is None else c.tolist() for c in columns]
                for sample, values in enumerate(zip(*lists, strict=True)):
                    rows.writerow([layer.name, sample, *values, *(getattr(layer, c) for c in constants)])
        return target

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write everything, singular values included; non-finite numbers become null, ``nonfinite`` counts them."""
        layers = []
        for layer in self.values():
            entry: dict[str, Any] = {}
            for name, spec in LayerGeometry.__dataclass_fields__.items():
                if not spec.metadata.get("export", True):
                    continue
                value = getattr(layer, name)
                entry[name] = _finite_or_null(value.tolist()) if isinstance(value, Tensor) else value
            entry["nonfinite"] = int((~layer.log_volume.isfinite()).sum())
            layers.append(entry)
        target = _parent_made(path)
        target.write_text(
            json.dumps({"units": "natural log", "layers": layers}, indent=1, allow_nan=False),
            encoding="utf-8",
        )
        return target


@runtime_checkable
class Writer(Protocol):
    """Where a :class:`~torchgeom_probe.Monitor` sends its reports: anything with these two methods."""

    def write(self, step: int, report: GeometryReport) -> None:
        """Record the report of one training step."""

    def close(self) -> None:
        """Flush and let go of the file."""


STATISTICS = ("mean", "p10", "median", "p90", "sigma_max", "rank", "nonfinite")


class JSONWriter:
    """A :class:`Writer` of one JSON object per step and line (JSON Lines), appended and on disk at once.

    ``{"step": …, "layers": {name: statistics}}`` with the numbers of :meth:`LayerGeometry.statistics` (nats; null where not finite).
    An existing file is continued as by :class:`CSVWriter`: steps at or after the first one written now are dropped.

    >>> import json, pathlib, tempfile, torch, torchgeom_probe as tgp
    >>> path = pathlib.Path(tempfile.mkdtemp(), "geometry.jsonl")
    >>> writer = tgp.JSONWriter(path)
    >>> writer.write(0, tgp.measure(torch.nn.Linear(2, 3), torch.zeros(4, 2), layers=[""], estimator=tgp.Exact()))
    >>> json.loads(path.read_text())["layers"][""]["rank"]
    2.0
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._begun = False

    def write(self, step: int, report: GeometryReport) -> None:
        """Append the statistics of every layer at this step; they are on disk when it returns."""
        if not self._begun:
            self._resume_at(step)
            self._begun = True
        layers = {
            name: {k: _finite_or_null(v) for k, v in g.statistics().items()} for name, g in report.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "layers": layers}, allow_nan=False) + "\n")

    def _resume_at(self, step: int) -> None:
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                entry = json.loads(line)
                kept += [line] if entry["step"] < step else []
            except (ValueError, TypeError, KeyError) as error:
                raise ProbeError(
                    f"{self.path} exists and is no geometry log: it has the line {line[:60]!r}.\n"
                    "Write to another file:  JSONWriter('geometry.jsonl')"
                ) from error
        beside = _parent_made(self.path).with_suffix(".partial")
        beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        beside.replace(self.path)

    def close(self) -> None:
        """Nothing is held open between writes; writing again continues the file."""


class CSVWriter:
    """A :class:`Writer` of one row per step and layer, appended and flushed at once: a killed run loses nothing.

    Columns: step, layer, then the statistics of :meth:`LayerGeometry.statistics` (nats).  An existing file is continued:
    rows of an earlier, interrupted run at or after the first step written now are dropped, so a resumed run has no doubles.

    >>> import pathlib, tempfile, torch, torchgeom_probe as tgp
    >>> path = pathlib.Path(tempfile.mkdtemp(), "geometry.csv")
    >>> writer = tgp.CSVWriter(path)
    >>> writer.write(0, tgp.measure(torch.nn.Linear(2, 3), torch.zeros(4, 2), layers=[""], estimator=tgp.Exact()))
    >>> path.read_text().splitlines()[0]
    'step,layer,mean,p10,median,p90,sigma_max,rank,nonfinite'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._begun = False

    def write(self, step: int, report: GeometryReport) -> None:
        """Append the statistics of every layer at this step; they are on disk when it returns."""
        if not self._begun:
            self._resume_at(step)
            self._begun = True
        with self.path.open("a", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            for name, layer in report.items():
                statistics = layer.statistics()
                rows.writerow([step, name, *(statistics[key] for key in STATISTICS)])

    def _resume_at(self, step: int) -> None:
        header = ["step", "layer", *STATISTICS]
        kept: list[list[str]] = []
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open(newline="", encoding="utf-8") as file:
                found = list(csv.reader(file))
            if found[0] != header:
                raise ProbeError(
                    f"{self.path} exists and is no geometry log: its first line is {found[0]}.\n"
                    "Write to another file:  CSVWriter('geometry.csv')"
                )
            kept = [row for row in found[1:] if len(row) == len(header) and int(row[0]) < step]
        # Written beside and moved into place: a process killed here leaves the earlier log whole.
        beside = _parent_made(self.path).with_suffix(".partial")
        with beside.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *kept])
        beside.replace(self.path)

    def close(self) -> None:
        """Nothing is held open between writes; writing again continues the file."""


def _parent_made(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _finite_or_null(values: Any) -> Any:
    if isinstance(values, list):
        return [_finite_or_null(v) for v in values]
    return values if not isinstance(values, float) or math.isfinite(values) else None
