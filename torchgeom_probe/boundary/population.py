"""The population test: do decision boundaries lie where a layer magnifies, over many lines between held-out samples?

x → pairs and their crossings → points of every line → per chunk of pairs: the fields of the network, trained and
untrained → per layer a BoundaryEffect.

Legend of axes: N pairs (lines), P points of a line, C of them in the contrast.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from torchgeom_probe.boundary.contrasts import CONTRASTS
from torchgeom_probe.boundary.effect import BoundaryEffect
from torchgeom_probe.boundary.paired import Tested, paired_effect
from torchgeom_probe.boundary.pairs import Pairs, crossing_pairs, predicted, same_class_points
from torchgeom_probe.boundary.speed import Speed, with_random
from torchgeom_probe.boundary.statistics import Estimate
from torchgeom_probe.boundary.study import BoundaryStudy
from torchgeom_probe.errors import ProbeError, first_line, refuse_unknown
from torchgeom_probe.estimators import Estimator, Exact, Subspace
from torchgeom_probe.files import decoded, digest, encoded
from torchgeom_probe.model.predictions import Readout
from torchgeom_probe.probe import GeometryProbe, ProbeOptions, probe_of
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.resume import Parts, in_words, refuse_other, state_digest

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Pairs a chunk: what a kill can cost.
_CHUNK = 32
#: Random directions a point, for ½ log tr g.
_RANDOM = 4
#: Input sizes at which the whole volume is measured unasked.
_SMALL = 64
_LEAST_PAIRS, _LEAST_UNITS = 10, 5
_PART = "part of a BoundaryStudy"
_PATH = "the path's speed |Jv| along the line (no volume)"


def boundary_study(
    model_or_probe: nn.Module | GeometryProbe,
    x: Tensor,
    *,
    initial: nn.Module | GeometryProbe | None = None,
    pairs: int = 200,
    contrast: Literal["mirror", "peak", "same_class"] = "mirror",
    groups: Sequence[Any] | Tensor | None = None,
    readout: Readout | None = None,
    offsets: Sequence[float] = (-0.4, -0.3, -0.2, -0.1, 0.1, 0.2, 0.3, 0.4),
    share: bool = False,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **options: Unpack[ProbeOptions],
) -> BoundaryStudy:
    """Test, over many pairs of held-out samples, whether each layer magnifies near the decision boundary between them.

    On the line from one sample to another that is predicted as another class, the class change nearest to the middle is
    bisected to t*.  What is compared, in nats:

    - ``"mirror"``: the crossing against the point 1 − t* of the same line;
    - ``"peak"``: how far the crossing rises above its neighbours at ± 0.2 of the line, against the same at 1 − t*;
    - ``"same_class"``: the crossing against a point of one class that is as far from its sample.

    By default of log |Jv|, v the line's direction: the speed of the path, which is exact, never singular and NOT a
    volume.  A volume's own contrast stands beside it for any ``estimator``, and unasked (``Exact``) where the input has
    at most 64 numbers; ``"same_class"``, which compares different lines, is of that volume (``Subspace`` on larger
    inputs).  ½ log tr g, from four random directions in the same pass, is the control: the stretch of all directions.

    With ``initial`` the effect is the difference of differences, trained minus untrained at the same points.  Without
    it nothing is claimed (``supported`` is None): untrained networks often have a contrast at trained boundaries.

    The interval and the p-value are those of :func:`paired_effect` with the samples (or ``groups``) as units, or, where
    five or more classes are predicted, with the classes, whichever interval is the wider: lines between the same two
    classes cross the same region.

    Args:
        model_or_probe: any classifier, run in eval mode and left as it was; or a probe, whose layers, estimator and
            other options are then the study's.
        x: [B, *input], held-out samples; no labels are needed.
        initial: the untrained network: ``copy.deepcopy(model)`` before the first step.
        pairs: how many, if there are so many.
        contrast: what the crossing is compared with.
        groups: [B], what each sample belongs to, where samples are not independent: crops of one photograph.
        readout: maps the model's output to logits [B, C]; None: the output is the logits.
        offsets: of the profile, in units of the line from the crossing.
        share: let a sample be in several pairs: more pairs of few samples.
        seed: of the pairs and of the random directions.
        path: where the study is saved, as JSON; interrupted, it goes on where it was, and done, it is loaded.
        progress: show a progress bar; None: only on a terminal.
        options: the probe's (:class:`~torchgeom_probe.GeometryProbe`): layers, estimator, normalize, ….

    Raises:
        ProbeError: an output that is no logits (regression, masks: with the ``readout`` to write), one predicted class,
            fewer than 10 usable pairs or 5 groups, an ``initial`` of other layers, groups of another length, samples
            that are not finite, a ``path`` that holds another study, and whatever the probe refuses.

    Source: Zavatone-Veth et al., arXiv:2301.11375, for the hypothesis; the test is this package's own.  How often it
    rejects a true null, and what it finds: benchmarks/README.md.

    Cost: 6 rows a point (itself, the line, four random directions) and about 12 points a pair and network, for all
    layers together; ~20 plain rows a pair for the crossing.

    >>> model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
    >>> study = boundary_study(model, torch.randn(100, 2), layers=["1"], pairs=20)
    >>> assert study["1"].supported is None and "initial=" in str(study["1"])
    """
    refuse_unknown(options, boundary_study, *ProbeOptions.__annotations__)
    probe = copy.copy(probe_of(model_or_probe, options))  # a copy: its estimator changes from point to point
    named = options.get("estimator") is not None or probe.estimator != Subspace()
    groups_B = _refuse_unusable(probe, x, groups, contrast, pairs, offsets)
    volume = probe.estimator if named else Exact() if x[0].numel() <= _SMALL else None
    if contrast == "same_class" and volume is None:
        volume = Subspace()
    untrained = initial.model if isinstance(initial, GeometryProbe) else initial
    settings = {
        "layers": sorted({*probe.layers, *probe.left_out}),
        "volume": None if volume is None else repr(volume),
        "readout": in_words(readout),
        "normalize": probe.normalize,
        "transform": in_words(probe.transforms),
        "engine": probe.engine,
        "pairs": pairs,
        "contrast": contrast,
        "offsets": list(offsets),
        "share": share,
        "seed": seed,
        "model": state_digest(probe.model),
        "initial": None if untrained is None else state_digest(untrained),
        "samples": digest(x, groups_B),
    }
    target = None if path is None else Path(path)
    if target is not None and target.exists():
        finished = BoundaryStudy.load(target)
        refuse_other(finished.settings, settings, where=target, what="boundary_study")
        return finished
    device = next((t.device for t in (*probe.model.parameters(), *probe.model.buffers())), x.device)
    design = _designed(probe.model, x.detach().to(device), groups_B, readout, settings)
    parts = None if target is None else Parts(target, settings, what="boundary_study")
    names, fields = _measured(probe, untrained, design, volume, parts, progress, seed)
    effects = {name: _effect(name, fields[name], design, contrast, offsets) for name in names}
    study = BoundaryStudy(effects, settings=settings)
    if target is not None and parts is not None:
        study.save(target)
        parts.remove()
    return study


@dataclass(frozen=True, eq=False)
class _Design:
    """What is measured where.

    Attributes:
        pairs: the lines.
        points: [N, P, *input]: the C of the contrast, the two ends, those of the profile.
        along: [N, *input], the lines' unit directions.
        weights: [C], of the contrast.
        within: [N, P], which points lie on their line.
        margins: [N, 2], of the two ends.
    """

    pairs: Pairs
    points: Tensor
    along: Tensor
    weights: Tensor
    within: Tensor
    margins: Tensor


def _designed(
    model: nn.Module, x: Tensor, groups: Tensor, readout: Readout | None, settings: Mapping[str, Any]
) -> _Design:
    contrast, seed = CONTRASTS[settings["contrast"]], settings["seed"]
    decided = predicted(model, x, readout)
    classes = decided["predictions"]
    if len(classes[classes >= 0].unique()) < 2:
        raise ProbeError(
            f"all {len(x)} samples are predicted as one class ({int(classes[0])}), so no boundary lies between them.\n"
            "Give held-out samples of several classes, and a trained model:  boundary_study(model, x)"
        )
    draw = {"count": settings["pairs"], "share": settings["share"], "seed": seed, "readout": readout}
    found = crossing_pairs(model, x, classes, groups, reach=contrast.reach, apart=contrast.apart, **draw)
    _refuse_few(len(found.t), len(found.units.unique()), found.dropped)
    places, weights = contrast.places(found.t)
    offsets = found.t[:, None] + torch.tensor(settings["offsets"], dtype=torch.float64)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(len(found.t), 2)
    t_NP = torch.cat([places, ends, offsets], 1)
    points = found.points(x, t_NP.clamp(0, 1))
    within = (t_NP >= 0) & (t_NP <= 1)
    if settings["contrast"] == "same_class":
        points[:, 1], within[:, 1] = same_class_points(model, x, classes, found, readout=readout, seed=seed)
    along = found.lines(x)[1]
    along = along / along.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))
    return _Design(found, points, along, weights, within, decided["margin"][found.ends])


def _measured(
    probe: GeometryProbe,
    initial: nn.Module | None,
    design: _Design,
    volume: Estimator | None,
    parts: Parts | None,
    progress: bool | None,
    seed: int,
) -> tuple[list[str], dict[str, dict[str, Tensor]]]:
    """Layer → field → [N, P], of both networks: what is stored of it, or what is measured now."""
    directions = with_random(design.along, _RANDOM, seed=seed)
    chunks: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
    untrained: GeometryProbe | None = None
    with tqdm(total=len(design.points), desc="study", unit="pair", disable=None if progress is None else not progress) as bar:
        for index, some in enumerate(torch.arange(len(design.points)).split(_CHUNK)):
            data = None if parts is None else parts.get(index)
            if data is None:
                lines = design.points[some], directions[:, some], len(design.weights), volume
                found = dict(_fields(probe, "trained", *lines))
                if initial is not None:
                    untrained = untrained or _like(probe, initial)  # after a pass: "auto" has left out what it will
                    found |= _fields(untrained, "initial", *lines)
                tensors = {str(i): field for i, field in enumerate(found.values())}
                data = encoded(tensors, {"fields": [list(key) for key in found]}, kind=_PART)
                if parts is not None:
                    parts.put(index, data)
            chunks.append(decoded(data, kind=_PART, origin=f"chunk {index}"))
            bar.update(len(some))
    keys = [tuple(key) for key in chunks[0][1]["fields"]]
    layers: dict[str, dict[str, Tensor]] = {}
    for i, (network, layer, quantity) in enumerate(keys):
        joined = torch.cat([tensors[str(i)] for tensors, _ in chunks])
        layers.setdefault(layer, {})[f"{network} {quantity}"] = joined
    return list(layers), layers


def _fields(
    probe: GeometryProbe, network: str, points: Tensor, directions: Tensor, count: int, volume: Estimator | None
) -> Iterator[tuple[tuple[str, str, str], Tensor]]:
    """(network, layer, quantity) → [N, P]; of the volume [N, C], at the points of the contrast alone."""
    shape = points.shape[:2]
    probe.estimator = Speed(directions[:, :, None].expand(-1, -1, shape[1], *points.shape[2:]).flatten(1, 2))
    for layer, found in probe.measure(points.flatten(0, 1), progress=False).items():
        yield (network, layer, "speed"), found.log_volume.reshape(shape)
        yield (network, layer, "trace"), found.extras["log_trace"].reshape(shape)
    if volume is not None:
        probe.estimator = volume
        for layer, found in probe.measure(points[:, :count].flatten(0, 1), progress=False).items():
            dimensions = min(found.num_directions, found.num_features)
            yield (network, layer, f"volume {dimensions} {found.estimand}"), found.log_volume.reshape(-1, count)


def _like(probe: GeometryProbe, initial: nn.Module) -> GeometryProbe:
    """The untrained network, probed as the trained one is."""
    names = ("normalize", "engine", "wrt", "memory_budget", "mode")
    try:
        same: dict[str, Any] = {name: getattr(probe, name) for name in names}
        return GeometryProbe(initial, layers=probe.layers, transform=dict(probe.transforms) or None, **same)
    except ProbeError as error:
        raise ProbeError(
            f"initial= has other layers than the model, of which {probe.layers} are studied: {first_line(error)}\n"
            "Give the same network as it was before training:  initial = copy.deepcopy(model)"
        ) from error


def _effect(
    name: str, fields: Mapping[str, Tensor], design: _Design, contrast: str, offsets: Sequence[float]
) -> BoundaryEffect:
    pairs, count = design.pairs, len(design.weights)
    inside = design.within[:, :count].all(1)
    by_name = {key.split(" ")[1]: key.split(" ", 1)[1] for key in fields}
    has_initial = any(key.startswith("initial") for key in fields)

    def contrasts(network: str, quantity: str) -> Tensor:
        return fields[f"{network} {by_name[quantity]}"][:, :count].double() @ design.weights

    def difference(quantity: str) -> Tensor:
        own = contrasts("trained", quantity)
        return own - contrasts("initial", quantity) if has_initial else own

    def tested(values: Tensor, where: Tensor) -> Tested:
        return _tested(values, pairs, where)[0]

    main = "volume" if contrast == "same_class" else "speed"
    effect = difference(main)
    kept = effect.isfinite() & inside
    dropped = pairs.dropped | {"no such point of one class": int((~inside).sum())}
    dropped |= {"log-volume not finite": int((inside & ~effect.isfinite()).sum())}
    dropped = {why: n for why, n in dropped.items() if n}
    _refuse_few(int(kept.sum()), len(pairs.units[kept].unique()), dropped, layer=name)
    (estimate, p_value), num_units, units = _tested(effect, pairs, kept)

    def of(quantity: str) -> Tested | None:
        if quantity not in by_name or contrast == "same_class":  # there the line's own quantities compare two lines
            return None
        values = difference(quantity)
        finite = values.isfinite() & kept
        return tested(values, finite) if finite.sum() >= _LEAST_PAIRS else None

    def profile(network: str) -> dict[float, Estimate]:
        speed = fields[f"{network} speed"].double()
        found = {0.0: Estimate(0.0, (0.0, 0.0))}
        for i, offset in enumerate(offsets, start=count + 2):
            values = speed[:, i] - speed[:, 0]
            there = values.isfinite() & design.within[:, i]
            if offset and there.sum() >= _LEAST_PAIRS:
                found[float(offset)] = tested(values, there).estimate
        return dict(sorted(found.items()))

    speed = fields["trained speed"].double() - (fields["initial speed"].double() if has_initial else 0.0)
    _, directions, estimand = by_name["volume"].split(" ", 2) if "volume" in by_name else (None, None, None)
    return BoundaryEffect(
        name=name,
        estimand=f"{_PATH if main == 'speed' else estimand}, {CONTRASTS[contrast].words}",
        contrast=contrast,
        estimate=estimate,
        p_value=p_value,
        own=tested(contrasts("trained", main), kept),
        initial=tested(contrasts("initial", main), kept) if has_initial else None,
        trace=of("trace"),
        volume=of("volume"),
        volume_estimand=estimand,
        dimensions=None if directions is None else int(directions),
        profile=profile("trained"),
        initial_profile=profile("initial") if has_initial else None,
        margin_slope=_slope(speed[:, count + 1] - speed[:, count], design, kept),
        num_pairs=int(kept.sum()),
        num_units=num_units,
        units=units,
        dropped=dropped,
    )


def _tested(values: Tensor, pairs: Pairs, where: Tensor) -> tuple[Tested, int, str]:
    """The mean by the units that give the wider interval, how many these are, and what."""
    kinds = {"samples or groups": pairs.units[where]}
    if len(pairs.classes[where].unique()) >= _LEAST_UNITS:
        kinds["predicted classes"] = pairs.classes[where]
    found = {kind: paired_effect(values[where], units) for kind, units in kinds.items()}

    def width(kind: str) -> float:
        low, high = found[kind].estimate.interval or (0.0, 0.0)
        return high - low

    widest = max(found, key=width)
    return found[widest], len(kinds[widest].unique()), widest


def _slope(rise: Tensor, design: _Design, kept: Tensor) -> Tested:
    """Regress the difference of a field between the two ends of a line on that of the margins, through the origin."""
    run = (design.margins[:, 1] - design.margins[:, 0]).double()
    kept = kept & rise.isfinite() & run.isfinite()
    mean = run[kept].square().mean().clamp_min(torch.finfo(torch.float64).tiny)
    slope = (run * rise)[kept].mean() / mean
    return _tested(slope + run * (rise - slope * run) / mean, design.pairs, kept)[0]  # each pair's part in the slope


def _refuse_few(pairs: int, units: int, dropped: Mapping[str, int], *, layer: str | None = None) -> None:
    if pairs >= _LEAST_PAIRS and units >= _LEAST_UNITS:
        return
    where = "" if layer is None else f"layer {layer!r}: "
    why = "; ".join(f"{reason}: {count}" for reason, count in dropped.items() if count) or "none was left out"
    raise ProbeError(
        f"{where}{pairs} usable pairs of {units} samples or groups; the test needs {_LEAST_PAIRS} of {_LEAST_UNITS} ({why}).\n"
        "Give more held-out samples, or let each be in several pairs:  boundary_study(model, x, share=True)"
    )


def _refuse_unusable(
    probe: GeometryProbe, x: Tensor, groups: Any, contrast: str, pairs: int, offsets: Sequence[float]
) -> Tensor:
    """Refuse what cannot be studied; return the groups as numbers [B], those of single samples where none are given."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        seen = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ProbeError(f"x must be a floating tensor [B, *input]; it is {seen}.\nFor single inputs:  torch.stack(xs)")
    odd = (~x.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if odd:
        raise ProbeError(
            f"{len(odd)} of {len(x)} samples are not finite (the first is number {odd[0]}).\n"
            "Keep the others:  x = x[x.flatten(1).isfinite().all(1)]"
        )
    if contrast not in CONTRASTS:
        raise ProbeError(f"contrast={contrast!r} is unknown.\nWrite one of {', '.join(map(repr, CONTRASTS))}.")
    if pairs < _LEAST_PAIRS:
        raise ProbeError(f"pairs={pairs}: the test needs at least {_LEAST_PAIRS}.\nWrite pairs=200")
    if not all(-1 < offset < 1 for offset in offsets):
        raise ProbeError(f"offsets={list(offsets)} are in units of the line, between -1 and 1.\nLeave them out.")
    if probe.source is not None:
        raise ProbeError(
            f"source={probe.source!r}: a line between samples lies in the model's input, not in that module's output.\n"
            "Study the part behind it as a model of its own:  boundary_study(head, features)"
        )
    if groups is None:
        return torch.arange(len(x))
    names = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(names) != len(x):
        raise ProbeError(
            f"groups has {len(names)} entries for {len(x)} samples.\nGive one for each sample:  groups=photo_of_each_crop"
        )
    known = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([known[name] for name in names])
