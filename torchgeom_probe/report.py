"""What a measurement returns: the numbers of each layer, and all layers as one table.

Legend of axes: B samples, r singular values.
"""

from __future__ import annotations

import csv
import html
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.files import encoded, read, write_atomically, write_json
from torchgeom_probe.linalg.directions import HasDirections
from torchgeom_probe.linalg.quantiles import finite, known, quantiles
from torchgeom_probe.linalg.spectrum import SpectralDensity
from torchgeom_probe.shapes import Float, Int, Tensor

if TYPE_CHECKING:
    from pandas import DataFrame
else:  # pandas is optional: its types are for the type checker alone
    DataFrame = Any


@dataclass(frozen=True, eq=False, repr=False)
class LayerGeometry(HasDirections):
    """The local geometry of one layer's feature map Φ around each of B samples.

    With J = ∂Φ/∂x at a sample (divided by √n when ``normalized``, as in the paper), g = JᵀJ, all on the model's device:

    Attributes:
        name: the layer's name; ``name#1``, ``name#2`` … for the later calls of a module that is called repeatedly.
        estimand: in words, what ``value`` is: log √det g, log √det VᵀgV, ….
        engine: which engine ran: ``"fused"``, ``"functorch"`` or ``"vjp"``.
        value: [B], what was estimated, in ``unit``.  Of a log-volume: ``-inf`` where the volume is zero (``rank`` says
            why), ``nan`` only where the Jacobian itself is not finite (a diverged model).
        singular_values: [B, r], descending, of the Jacobian restricted to the directions (r = min(k, n)); of an
            estimator that finds fewer, those.
        num_features: n, the layer's features per sample.
        num_inputs: d, the numbers per sample of the space that is pulled back to.
        num_directions: k, the tangent directions used.
        normalized: whether J was divided by √n.
        quantity: what ``value`` is, in a word, which is its attribute, column and chart: ``"log_volume"`` (log √det g,
            or the effective volume), ``"frame_volume"`` (log √det VᵀgV), ``"scale"``, ``"half_log_det"``, ….
        unit: of ``value``: ``"nat"``, a natural logarithm, or another.
        rank: [B], how many singular values exceed ``rank_tolerance`` · σ_max; -1 where J is not finite; None: not seen.
        log_pseudo_volume: [B], log of the product of those; 0 at rank 0 (an empty product); None without a rank.
        rank_tolerance: the threshold of ``rank``, relative to the largest singular value.
        std_error: [B] standard error of a stochastic ``value``, in its unit, or None.
        error_bound: [B] bound on the error of ``value``, in its unit, or None.
        extras: name → [B, ...], what else was found: ``scale`` (½ log(tr g/d)), ``effective_dimension``, ``interval``
            [B, 2] (95 %), ``num_products`` (Jv and Jᵀu formed for each sample), ….  Each is an attribute, too.
        spectrum: the spectral density of g, or None; see :meth:`GeometryReport.density`.
        right_singular_vectors: [B, q, d], for ``directions()`` and ``measure(x, start=report)``, or None.
        sketch: [B, b, s], of what J makes of b random directions, for ``measure(x, start=report)``, or None.
        input_shape: of one sample of the space that is pulled back to.
    """

    name: str
    estimand: str
    engine: str
    value: Float[Tensor, " batch"]
    singular_values: Float[Tensor, "batch r"]
    num_features: int
    num_inputs: int
    num_directions: int
    normalized: bool
    quantity: str = "value"
    unit: str = "nat"
    rank: Int[Tensor, " batch"] | None = None
    log_pseudo_volume: Float[Tensor, " batch"] | None = None
    rank_tolerance: float | None = None
    std_error: Float[Tensor, " batch"] | None = None
    error_bound: Float[Tensor, " batch"] | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    spectrum: SpectralDensity | None = None
    right_singular_vectors: Float[Tensor, "batch q d"] | None = None
    sketch: Float[Tensor, "batch b s"] | None = None
    input_shape: tuple[int, ...] = ()

    directions = HasDirections.directions  # said again: the reference lists what is a class's own

    def __getattr__(self, name: str) -> Tensor:
        extras = self.__dict__.get("extras", {})
        if name in extras:
            return extras[name]
        if name == self.__dict__.get("quantity"):
            return self.value
        known = f"; its extras are {list(extras)}" if extras else ""
        estimand = self.__dict__.get("estimand", "nothing yet")
        raise AttributeError(f"{name!r} was not measured: the estimand is {estimand!r}{known}")

    def __repr__(self) -> str:
        low, median, high = quantiles(known(self.value))
        spread = f"{median:.4g} ({low:.4g} … {high:.4g}) {self.unit}".rstrip()
        return f"LayerGeometry({self.name!r}: {self.estimand}; {len(self.value)} samples, median {spread})"

    @property
    def heading(self) -> str:
        """``quantity`` as people write it: of columns and axes."""
        words = {"log_volume": "log-volume", "frame_volume": "log frame volume"}
        return words.get(self.quantity, self.quantity.replace("_", " "))

    @property
    def log_volume(self) -> Float[Tensor, " batch"]:
        """[B], NATURAL log of the volume element that ``estimand`` names: ``value``.

        Of a frame of k < d directions it is that of the map restricted to the frame, ``frame_volume``: read it as such.

        Raises:
            ProbeError: what was measured is no volume: a scale, a log det with a floor.
        """
        if self.quantity not in ("log_volume", "frame_volume"):
            raise ProbeError(
                f"layer {self.name!r} was measured as {self.estimand!r}, which is no log-volume.\n"
                f"Read report[{self.name!r}].{self.quantity}, or measure with estimator=Exact() or TopK()"
            )
        return self.value

    @property
    def frame_volume(self) -> Float[Tensor, " batch"]:
        """[B], :attr:`log_volume` by the name that it has on the estimator's frame V: log √det VᵀgV, in nats."""
        return self.log_volume

    @property
    def log10_volume(self) -> Float[Tensor, " batch"]:
        """[B], :attr:`log_volume` to base 10, as in the paper's figures."""
        return self.log_volume / math.log(10.0)

    @property
    def lipschitz_bounds(self) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Lower and upper bound [B] of σ_1 of J, the layer's local Lipschitz constant (of J/√n when normalised).

        From ``Exact`` they coincide; of ``TopK`` a Ritz value is the lower one, and ``error_bound`` gives the upper.

        Raises:
            ProbeError: an estimator that does not bound σ_1.
        """
        if self.singular_values.shape[1] and (
            self.error_bound is not None or (self.spectrum is not None and self.spectrum.exact)
        ):
            largest = self.singular_values[:, 0]
            return largest, largest if self.error_bound is None else largest * self.error_bound.exp()
        raise ProbeError(
            f"layer {self.name!r} was measured as {self.estimand!r}, which does not bound σ_1.\n"
            "Measure with estimator=TopK(k=1)"
        )

    def statistics(self) -> dict[str, float]:
        """Numbers over the samples, by name: what every table, log and chart shows.

        Of the finite values the ``mean``, ``p10``, ``median`` and ``p90``; ``sigma_max`` of any sample, the median
        ``rank``, and how many values are ``nonfinite``.  Then, of whatever else has a number a sample
        (``log_pseudo_volume``, ``std_error``, ``error_bound``, the extras), the median of the finite ones.  ``nan``
        stands where there is none.  Copies to the host: not for the hot path.
        """
        value, sigma = finite(self.value), finite(self.singular_values)
        p10, median, p90 = quantiles(value)
        others = {name: getattr(self, name) for name in ("log_pseudo_volume", "std_error", "error_bound")}
        others.update(self.extras)
        return {
            "mean": value.mean().item(),
            "p10": p10,
            "median": median,
            "p90": p90,
            "sigma_max": sigma.max().item() if len(sigma) else math.nan,
            "rank": math.nan if self.rank is None else self.rank.detach().double().median().item(),
            "nonfinite": float(len(self.value) - len(value)),
            **{
                name: quantiles(finite(other))[1]
                for name, other in others.items()
                if other is not None and other.ndim == 1
            },
        }

    def samples(self, start: int, stop: int) -> LayerGeometry:
        """The same at samples ``start … stop`` alone; without the spectrum."""
        cut = {name: tensor[start:stop] for name, tensor in self._tensors().items()}
        return replace(self, spectrum=None, **_as_fields(cut))

    def defined_where(self, finite: Tensor | None) -> LayerGeometry:
        """The same with every number nan, and the rank -1, at samples where ``finite`` [B] is false; None: nowhere."""
        if finite is None:
            return self

        def kept(name: str, tensor: Tensor) -> Tensor:
            undefined = -1 if name == "rank" else torch.nan
            if not tensor.is_floating_point() and name != "rank":
                return tensor
            return torch.where(finite.reshape(-1, *[1] * (tensor.ndim - 1)), tensor, undefined)

        return replace(self, **_as_fields({name: kept(name, tensor) for name, tensor in self._tensors().items()}))

    @staticmethod
    def joined(parts: Sequence[LayerGeometry]) -> LayerGeometry:
        """One layer's parts, measured at one batch of samples after the other, as one."""
        if len(parts) == 1:
            return parts[0]
        several = [part._tensors() for part in parts]
        densities = [part.spectrum for part in parts if part.spectrum is not None]
        return replace(
            parts[0],
            engine="+".join(dict.fromkeys(part.engine for part in parts)),
            spectrum=SpectralDensity.joined(densities) if len(densities) == len(parts) else None,
            **_as_fields({name: torch.cat([tensors[name] for tensors in several]) for name in several[0]}),
        )

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor with a sample axis, by name; extras as ``extras/name``."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        found = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        return found | {f"extras/{name}": extra for name, extra in self.extras.items()}

    def _constants(self) -> dict[str, Any]:
        own = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {n: v for n, v in own if v is None or isinstance(v, (str, bool, int, float, tuple))}


def _as_fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    extras = {n.removeprefix("extras/"): v for n, v in tensors.items() if n.startswith("extras/")}
    return {**{name: value for name, value in tensors.items() if "/" not in name}, "extras": extras}


#: What a saved report may leave out: as large as the Jacobians themselves, or of no use without what is.
_LARGE = ("right_singular_vectors", "sketch")


class GeometryReport(Mapping[str, LayerGeometry]):
    """Layer name → :class:`LayerGeometry`, in the order in which the layers fired.

    Attributes:
        left_out: layers that ``layers="auto"`` did not measure → why.
        seconds: wall time of the measurement; None of a part, and of what was read from a file: no file holds it.

    >>> import torch, torchgeom_probe as tgp
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh())
    >>> report = tgp.measure(model, torch.randn(5, 2), layers=["0", "1"], estimator=tgp.Exact())
    >>> list(report), tuple(report["1"].log_volume.shape)
    (['0', '1'], (5,))
    """

    seconds: float | None = None

    def __init__(self, layers: Mapping[str, LayerGeometry], *, left_out: Mapping[str, str] | None = None) -> None:
        self._layers = dict(layers)
        self.left_out = dict(left_out or {})

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

    @staticmethod
    def joined(parts: Sequence[GeometryReport]) -> GeometryReport:
        """Reports on one batch of samples after the other, as one."""
        layers = {name: LayerGeometry.joined([part[name] for part in parts]) for name in parts[0]}
        return GeometryReport(layers, left_out=parts[0].left_out)

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
        """A table for people: per layer n, d, k, the value's median and spread, rank, σ_max and the extras."""
        rows = self._cells()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        rows.insert(1, ["-" * w for w in widths])
        padded = [
            [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in rows
        ]
        return "\n".join(["  ".join(cells) for cells in padded] + self._legend())

    def _repr_html_(self) -> str:
        head, *rows = [[html.escape(cell) for cell in row] for row in self._cells()]
        table = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        legend = "<br>".join(map(html.escape, self._legend()))
        return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{table}</table><small>{legend}</small>"

    def _cells(self) -> list[list[str]]:
        unit, heading = next(((layer.unit, layer.heading) for layer in self.values()), ("nat", "log-volume"))
        names = list(dict.fromkeys(n for g in self.values() for n, extra in g.extras.items() if extra.ndim == 1))
        if any(
            layer.rank is not None and layer.value.isneginf().any() for layer in self.values()
        ):  # what is left of a volume that is zero
            names.insert(0, "log_pseudo_volume")
        log10 = ["log10"] if unit == "nat" else []
        value = f"{heading} [{unit}]" if unit else heading
        rows = [["layer", "n", "d", "k", value, "p10 … p90", *log10, "rank", "σ_max", *names, "not finite"]]
        for name, layer in self.items():
            s, (low, median, high) = layer.statistics(), quantiles(known(layer.value))
            sizes = map(str, (layer.num_features, layer.num_inputs, layer.num_directions))
            rows.append(
                [
                    name or "(model)",
                    *sizes,
                    f"{median:.3f}",
                    f"{low:.2f} … {high:.2f}",
                    *[f"{median / math.log(10):.3f}" for _ in log10],
                    "–" if layer.rank is None else f"{s['rank']:g}",
                    *[_short(s.get(key, math.nan)) for key in ("sigma_max", *names)],
                    f"{s['nonfinite']:g} of {layer.value.numel()}",
                ]
            )
        return rows

    def _legend(self) -> list[str]:
        groups: dict[str, list[str]] = {}
        for name, layer in self.items():
            scaling = "J divided by √n" if layer.normalized else "J not divided by √n"
            key = f"{layer.estimand}; {scaling}; engine {layer.engine}"
            groups.setdefault(key, []).append(name or "(model)")
        lines = [f"{', '.join(members)}: {group}" for group, members in groups.items()]
        if self.left_out:
            lines.append("left out: " + "; ".join(f"{n or '(model)'} ({why})" for n, why in self.left_out.items()))
        return lines

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write one row per layer and sample (logarithms in nats); returns the path."""
        text = io.StringIO(newline="")
        rows = self._rows()
        writer = csv.DictWriter(text, fieldnames=dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)
        return write_atomically(path, text.getvalue().encode())

    def to_pandas(self) -> DataFrame:
        """A DataFrame with one row per layer and sample, the columns those of :meth:`to_csv`; needs pandas."""
        return optional("pandas", extra="pandas").DataFrame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        constants = ("unit", "num_features", "num_inputs", "num_directions", "normalized", "engine", "estimand")
        rows = []
        for layer in self.values():
            sigma = layer.singular_values
            columns: dict[str, Tensor | None] = {layer.quantity: layer.value}
            if layer.rank is not None:
                columns |= {"log_pseudo_volume": layer.log_pseudo_volume, "rank": layer.rank}
            if sigma.shape[1]:
                columns |= {"sigma_max": sigma[:, 0], "sigma_min": sigma[:, -1]}
            columns |= {name: getattr(layer, name) for name in ("std_error", "error_bound")}
            for name, extra in layer.extras.items():
                several = {f"{name}_{i}": e for i, e in enumerate(extra.flatten(1).T)} if extra.ndim > 1 else {}
                columns |= several or {name: extra}
            lists = {name: column.tolist() for name, column in columns.items() if column is not None}
            fixed = {name: getattr(layer, name) for name in constants}
            for sample in range(len(layer.value)):
                own = {name: values[sample] for name, values in lists.items()}
                rows.append({"layer": layer.name, "sample": sample, **own, **fixed})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, singular values included; of each layer ``nonfinite`` counts what has no finite value."""
        layers = []
        for layer in self.values():
            tensors = {n.removeprefix("extras/"): t for n, t in layer._tensors().items() if n not in (*_LARGE, "value")}
            count = int((~layer.value.isfinite()).sum())
            layers.append({**layer._constants(), layer.quantity: layer.value, **tensors, "nonfinite": count})
        return {"units": "natural log", "left_out": self.left_out, "layers": layers}

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write :meth:`to_dict`, numbers that are not finite as null; returns the path."""
        return write_json(path, self.to_dict())

    def tensors(self, *, large: bool = False) -> dict[str, Tensor]:
        """Every tensor by name, for a file of any format; with ``large`` spectra and singular vectors too."""
        found: dict[str, Tensor] = {}
        for i, layer in enumerate(self.values()):
            found |= {f"{i}/{name}": t for name, t in layer._tensors().items() if large or name not in _LARGE}
            if large and layer.spectrum is not None:
                found |= {f"{i}/spectrum/{part}": getattr(layer.spectrum, part) for part in ("nodes", "weights")}
        return found

    def metadata(self) -> dict[str, Any]:
        """What is no tensor, as JSON can hold it."""
        exact = [None if layer.spectrum is None else layer.spectrum.exact for layer in self.values()]
        layers = [layer._constants() for layer in self.values()]
        extras = [list(layer.extras) for layer in self.values()]  # their order: a file of tensors keeps none
        return {"left_out": self.left_out, "layers": layers, "extras": extras, "spectrum_is_exact": exact}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> GeometryReport:
        """Make a report of what :meth:`tensors` and :meth:`metadata` gave."""
        layers = {}
        for i, constants in enumerate(metadata["layers"]):
            own = {n.removeprefix(f"{i}/"): t for n, t in tensors.items() if n.startswith(f"{i}/")}
            spectrum = None
            if "spectrum/nodes" in own:
                nodes, weights = own.pop("spectrum/nodes"), own.pop("spectrum/weights")
                exact = metadata["spectrum_is_exact"][i]
                spectrum = SpectralDensity(nodes, weights, constants["num_inputs"], exact)
            known = {**constants, "spectrum": spectrum, **_as_fields(own)}
            extras = {name: known["extras"][name] for name in metadata["extras"][i]}
            known |= {"input_shape": tuple(constants["input_shape"]), "extras": extras}
            layers[constants["name"]] = LayerGeometry(**known)
        return GeometryReport(layers, left_out=metadata["left_out"])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to one safetensors file, its metadata as JSON in the header; returns the path.

        >>> import tempfile, torch, torchgeom_probe as tgp
        >>> report = tgp.measure(torch.nn.Linear(2, 3), torch.zeros(4, 2), layers="")
        >>> again = GeometryReport.load(report.save(tempfile.mkdtemp() + "/report.safetensors"))
        >>> assert torch.equal(again[""].log_volume, report[""].log_volume)
        """
        return write_atomically(path, encoded(self.tensors(large=True), self.metadata(), kind="GeometryReport"))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> GeometryReport:
        """Read what :meth:`save` wrote, onto the CPU.

        Raises:
            ProbeError: no such file, or one that is no report.
        """
        return GeometryReport.of(*read(path, kind="GeometryReport"))


def _short(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"
