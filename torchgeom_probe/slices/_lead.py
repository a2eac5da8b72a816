"""TEMPORARY: what the lead's branch brings to probe.py and report.py."""

import dataclasses
from typing import Any, TypedDict
import torch
from torchgeom_probe import probe as P
from torchgeom_probe.probe import GeometryProbe, _joined
from torchgeom_probe.report import GeometryReport, LayerGeometry

ProbeOptions = TypedDict(
    "ProbeOptions",
    {k: Any for k in "layers estimator normalize transform engine source wrt memory_budget mode".split()},
    total=False,
)


def probe_of(model_or_probe, options):
    if isinstance(model_or_probe, GeometryProbe):
        return model_or_probe
    probe = GeometryProbe(model_or_probe, **options)
    if options.get("estimator") is None:
        probe.chosen = None
    else:
        probe.chosen = probe.estimator
    probe.options = options
    return probe


GeometryProbe.model = property(lambda self: self._task.model)
GeometryProbe.chosen = None
GeometryProbe.options = {}


def _split(report):
    constants, tensors = [], {}
    for i, layer in enumerate(report.values()):
        entry = {}
        for field in dataclasses.fields(LayerGeometry):
            if not field.metadata.get("export", True):
                continue
            value = getattr(layer, field.name)
            if isinstance(value, torch.Tensor):
                tensors[f"{i}/{field.name}"] = value.detach().cpu()
            else:
                entry[field.name] = value
        constants.append(entry)
    return constants, tensors


def _of(tensors, metadata):
    layers = {}
    for i, entry in enumerate(metadata["layers"]):
        own = {k.removeprefix(f"{i}/"): v for k, v in tensors.items() if k.startswith(f"{i}/")}
        layers[entry["name"]] = LayerGeometry(**{**entry, **own})
    return GeometryReport(layers)


def _join(parts):
    out = {}
    for name in parts[0]:
        j = _joined([p[name] for p in parts])
        out[name] = dataclasses.replace(j, engine="+".join(dict.fromkeys(p[name].engine for p in parts)))
    return GeometryReport(out)


GeometryReport.tensors = lambda self: _split(self)[1]
GeometryReport.metadata = lambda self: {"layers": _split(self)[0]}
GeometryReport.of = staticmethod(_of)
GeometryReport.joined = staticmethod(_join)
