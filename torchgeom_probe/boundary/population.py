"""The population test: does a layer magnify near decision boundaries, over many lines between held-out samples.

x → pairs and their crossings → points of every line → per chunk of pairs: the fields of the network, trained and
untrained → per layer a BoundaryEffect.

Legend of axes: N pairs (lines), P points of a line, C of them in the contrast.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from torchgeom_probe.boundary.design import CONTRASTS, LEAST_PAIRS, Design, designed
from torchgeom_probe.boundary.inference import LayerFields, effect_of
from torchgeom_probe.boundary.speed import along_lines, with_random
from torchgeom_probe.boundary.study import BoundaryStudy
from torchgeom_probe.errors import ProbeError, first_line, refuse_unknown
from torchgeom_probe.estimators import Estimator, Exact, Subspace
from torchgeom_probe.estimators.auto import Auto
from torchgeom_probe.files import digest
from torchgeom_probe.model.hooked import HookedModel
from torchgeom_probe.model.isolation import measuring
from torchgeom_probe.model.predictions import Readout
from torchgeom_probe.probe import GeometryProbe, ProbeOptions, probe_of
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.resume import (
    Contents,
    Parts,
    by_chunks,
    in_words,
    probe_settings,
    refuse_other,
    state_digest,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Pairs a chunk: what a kill can cost.
_CHUNK = 32
#: Random directions a point, for ½ log tr g.
_RANDOM = 4
#: Input sizes at which the whole volume is measured unasked.
_SMALL = 64
#: Of the line, to either side: within it switches of ReLU units are counted.
_STEP = 0.01


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
    distributed: bool = False,
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
    Of layers that end in a ReLU the same contrast of the local complexity stands beside it, a rival account: the share
    of its units that switch within ± 0.01 of the line.

    With ``initial`` the effect is the difference of differences, trained minus untrained at the same points.  Without
    it nothing is claimed (``supported`` is None): untrained networks often have a contrast at trained boundaries.

    The interval and the p-value are those of :func:`paired_effect`, with the samples (or ``groups``) as units or the
    regions that the lines connect, whichever interval is the wider: lines between the same two regions see the same
    field.  Regions are the predicted classes, or of fewer than five classes six clusters of the samples (k-means); then
    a change of the field from class to class is regressed out, too.

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
        distributed: share the pairs over the ranks of the default process group; all of them call this, with the same
            weights and samples (one collective at the end), and get the study.
        progress: show a progress bar; None: only on a terminal.
        options: the probe's (:class:`~torchgeom_probe.GeometryProbe`): layers, estimator, normalize, ….

    Raises:
        ProbeError: an output that is no logits (regression, masks: with the ``readout`` to write), one predicted class,
            fewer than 10 usable pairs or 5 groups, an ``initial`` of other layers, groups of another length, samples
            that are not finite, a ``path`` that holds another study, ranks that differ, and whatever the probe refuses.

    Source: Zavatone-Veth et al., arXiv:2301.11375, for the hypothesis; the test is this package's own.  How often it
    rejects a true null, and what it finds: benchmarks/README.md.

    Cost: 2 rows a point (itself, the line), 6 at those of the contrast (four random directions), and about 12 points a
    pair and network: 32 rows for all layers together; ~20 plain rows a pair for the crossing.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3, bias=False))
    >>> study = boundary_study(model, torch.randn(200, 2), layers=["1"], pairs=20)
    >>> assert study["1"].supported is None and "initial=" in str(study["1"])
    """
    refuse_unknown(options, boundary_study, *ProbeOptions.__annotations__)
    probe = probe_of(model_or_probe, options, replay=path is None)
    probe = copy.copy(probe)  # its estimator changes from point to point
    named = options.get("estimator") is not None or not isinstance(probe.estimator, Auto)
    untrained = initial.model if isinstance(initial, GeometryProbe) else initial
    groups_B = _refuse_unusable(probe, x, untrained, groups, contrast, pairs, offsets)
    volume = probe.estimator if named else Exact() if x[0].numel() <= _SMALL else None
    if contrast == "same_class" and volume is None:
        volume = Subspace()
    settings = {
        **probe_settings(probe),
        **{"estimator": None if volume is None else repr(volume), "readout": in_words(readout)},
        **{"pairs": pairs, "contrast": contrast, "offsets": list(offsets), "share": share, "seed": seed},
        **{"model": state_digest(probe.model), "samples": digest(x, groups_B)},
        "initial": None if untrained is None else state_digest(untrained),
    }
    target = None if path is None else Path(path)
    if target is not None and target.exists():
        finished = BoundaryStudy.load(target)
        refuse_other(finished.settings, settings, where=target, what="boundary_study")
        Parts.remove(target)
        return finished
    device = next((t.device for t in (*probe.model.parameters(), *probe.model.buffers())), x.device)
    begun = target is not None and Parts.stored_settings(target) is not None
    parts = None if target is None else Parts(target, settings, what="boundary_study")
    rank, size = _place_among_ranks(distributed)
    bar = False if rank else progress
    where = x.detach().to(device)
    try:
        design = designed(probe.model, where, groups_B, readout, settings, parts=parts, progress=bar)
    except ProbeError:  # the mended call is another study, and may have the same path
        if target is not None and not begun:
            Parts.remove(target)
        raise
    parts = parts and parts.named(digest(design.pairs.ends, design.pairs.t))
    stored = dict(_chunks(probe, untrained, design, volume, parts, rank=rank, size=size, progress=bar, seed=seed))
    fields = _joined(_gathered(stored, settings, size))
    effects = {name: effect_of(name, found, design, contrast, offsets) for name, found in fields.items()}
    study = BoundaryStudy(effects, settings=settings)
    if target is not None and not rank:
        study.save(target)
        Parts.remove(target)
    return study


def _place_among_ranks(distributed: bool) -> tuple[int, int]:
    if distributed and not (dist.is_available() and dist.is_initialized()):
        raise ProbeError(
            "distributed=True shares the pairs over the ranks, and there is no process group.\n"
            "Write  torch.distributed.init_process_group('gloo')  first, or leave distributed= out."
        )
    return (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)


def _gathered(stored: dict[int, Contents], settings: dict[str, Any], size: int) -> dict[int, Contents]:
    """The chunks of all ranks, which must have studied the same."""
    if size == 1:
        return stored
    ranks: list[Any] = [None] * size
    dist.all_gather_object(ranks, (settings, stored))
    different = [rank for rank, (theirs, _) in enumerate(ranks) if theirs != ranks[0][0]]
    if different:
        raise ProbeError(
            f"ranks {different} studied another model or other samples than rank 0, so their parts make no whole.\n"
            "Give all ranks rank 0's weights, buffers and x, or study on rank 0 alone: leave distributed= out."
        )
    return {index: contents for _, theirs in ranks for index, contents in theirs.items()}


def _chunks(
    probe: GeometryProbe,
    initial: nn.Module | None,
    design: Design,
    volume: Estimator | None,
    parts: Parts | None,
    *,
    rank: int,
    size: int,
    progress: bool | None,
    seed: int,
) -> Iterator[tuple[int, Contents]]:
    """Measure every layer at all points, chunk by chunk of this rank, or read what is stored of it."""
    directions, networks = with_random(design.along, _RANDOM, seed=seed), {"trained": probe}

    def measure(some: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, words = dict[str, Tensor](), dict[str, tuple[Any, ...]]()
        for network in ("trained", "initial"):
            if network not in networks and initial is not None:  # after a pass: "auto" has left out what it will
                networks[network] = _like(probe, initial, replay=parts is None)
            if network not in networks:
                continue
            for layer, quantity, field, *kind in _fields(networks[network], design, some, directions[:, some], volume):
                tensors[f"{network} {quantity} {layer}"] = field
                words[layer] = (layer, *kind)
        return tensors, {"layers": list(words.values())}

    mine = list(enumerate(torch.arange(len(design.points)).split(_CHUNK)))[rank::size]
    shown: dict[str, Any] = {"desc": "boundary study", "unit": "pair", "progress": progress}
    return by_chunks(mine, measure, parts, kind="part of a BoundaryStudy", **shown)


def _joined(stored: dict[int, Contents]) -> dict[str, LayerFields]:
    chunks = [stored[i] for i in sorted(stored)]
    layers = {name: LayerFields(volume=words, dimensions=dims) for name, words, dims in chunks[0][1]["layers"]}
    for key in chunks[0][0]:
        network, quantity, layer = key.split(" ", 2)
        getattr(layers[layer], network)[quantity] = torch.cat([tensors[key] for tensors, _ in chunks])
    for fields in layers.values():
        both = [of["switches"] for of in (fields.trained, fields.initial) if "switches" in of]
        if any(field.isnan().any() for field in both) or not any(field.any() for field in both):  # no ReLU
            fields.trained.pop("switches", None)
            fields.initial.pop("switches", None)
    return layers


def _fields(
    probe: GeometryProbe, design: Design, some: Tensor, directions: Tensor, volume: Estimator | None
) -> Iterator[tuple[str, str, Tensor, str | None, int | None]]:
    """Layer, quantity, [N, P], and the volume's words and dimensions; volume and switches at the C points alone."""
    points, count = design.points[some], len(design.weights)
    kinds = dict[str, tuple[str, int]]()
    if volume is not None:
        probe.estimator = volume
        for layer, found in probe.measure(points[:, :count].flatten(0, 1), progress=False).items():
            kinds[layer] = found.estimand, min(found.num_directions, found.num_features)
            yield layer, "volume", found.value.reshape(-1, count), *kinds[layer]
    for layer, fields in along_lines(probe, points, directions, count).items():
        kind = kinds.get(layer, (None, None))
        for quantity, field in fields.items():
            yield layer, quantity, field, *kind
    for layer, switches in _switches(probe, points, count).items():
        yield layer, "switches", switches, *kinds.get(layer, (None, None))


def _switches(probe: GeometryProbe, points: Tensor, count: int) -> dict[str, Tensor]:
    """Layer → [N, C], the share of its units that switch on or off along the line, per line; nan where one is < 0."""
    layers = {name: probe.model.get_submodule(name) for name in probe.layers}
    hooked = HookedModel(probe.model, layers, transforms=probe.transforms)
    step, found = _STEP * (points[:, count + 1] - points[:, count]), dict[str, list[Tensor]]()
    with measuring(probe.model, mode=probe.mode):
        for place in points[:, :count].unbind(1):
            inputs = hooked.inputs(torch.cat([place - step, place + step]), probe.wrt)
            for layer, units in hooked.outputs(inputs).features.items():
                before, after = (units > 0).chunk(2)
                switched = (before != after).double().mean(1) / (2 * _STEP)
                found.setdefault(layer, []).append(switched if (units >= 0).all() else switched * torch.nan)
    return {layer: torch.stack(places, 1) for layer, places in found.items()}


def _like(probe: GeometryProbe, initial: nn.Module, *, replay: bool) -> GeometryProbe:
    """The untrained network, probed as the trained one is."""
    names = ("normalize", "engine", "wrt", "memory_budget", "mode", "precision")
    same: dict[str, Any] = {name: getattr(probe, name) for name in names}
    same |= {"layers": probe.layers, "transform": dict(probe.transforms) or None, "replay": replay}
    try:
        return GeometryProbe(initial, **same)
    except ProbeError as error:
        raise ProbeError(
            f"initial= has other layers than the model, of which {probe.layers} are studied: {first_line(error)}\n"
            "Give the same network as it was before training:  initial = copy.deepcopy(model)"
        ) from error


def _refuse_unusable(
    probe: GeometryProbe, x: Tensor, initial: Any, groups: Any, contrast: str, pairs: int, offsets: Sequence[float]
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
    if initial is not None and not isinstance(initial, nn.Module):
        raise ProbeError(
            f"initial={initial!r} is no network.\n"
            "Give a copy from before training:  initial = copy.deepcopy(model); of a trained one with new weights:  "
            "for m in initial.modules(): getattr(m, 'reset_parameters', lambda: None)()"
        )
    if contrast not in CONTRASTS:
        raise ProbeError(f"contrast={contrast!r} is unknown.\nWrite one of {', '.join(map(repr, CONTRASTS))}.")
    if pairs < LEAST_PAIRS:
        raise ProbeError(f"pairs={pairs}: the test needs at least {LEAST_PAIRS}.\nWrite pairs=200")
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
            f"groups has {len(names)} entries for {len(x)} samples.\n"
            "Give one for each sample:  groups=photo_of_each_crop"
        )
    known = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([known[name] for name in names])
