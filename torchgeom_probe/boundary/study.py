"""The effects of all layers as one result, and several networks as one."""

from __future__ import annotations

import html
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from torchgeom_probe.boundary.effect import CONTRASTED, PROFILES, BoundaryEffect, in_words
from torchgeom_probe.boundary.paired import Tested, student
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.files import write_json

LEAST_NETWORKS = 3
#: Columns that some studies have, and what of an effect they show.
_COLUMNS = {
    "½ log tr g": "trace",
    "volume": "volume",
    "switches": "switches",
    "trained alone": "own",
    "untrained alone": "initial",
}


class BoundaryStudy(Mapping[str, BoundaryEffect]):
    """Layer → :class:`BoundaryEffect`, in the order in which the layers fired; ``str()`` is a table, and what is in it.

    Attributes:
        settings: what was studied and how, as JSON holds it.
    """

    def __init__(self, effects: Mapping[str, BoundaryEffect], *, settings: Mapping[str, Any]) -> None:
        self._effects = dict(effects)
        self.settings = dict(settings)

    def __getitem__(self, name: str) -> BoundaryEffect:
        try:
            return self._effects[name]
        except KeyError:
            raise KeyError(f"{name!r} was not studied; the study has {list(self._effects)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._effects)

    def __len__(self) -> int:
        return len(self._effects)

    def __repr__(self) -> str:
        counts = ", ".join(dict.fromkeys(f"{e.num_pairs} pairs, {e.num_units} {e.units}" for e in self.values()))
        return f"BoundaryStudy({list(self)}: {counts})"

    def __str__(self) -> str:
        rows = self._cells()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*lines, *self._legend()])

    def _repr_html_(self) -> str:
        head, *rows = [[html.escape(cell) for cell in row] for row in self._cells()]
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        notes = "<br>".join(map(html.escape, self._legend()))
        return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{body}</table><small>{notes}</small>"

    def _cells(self) -> list[list[str]]:
        head = ["layer", "effect [nat]", "p", *_COLUMNS, "pairs", "units", "verdict"]
        rows = []
        for name, e in self.items():
            tested = [getattr(e, column) if column != "own" or e.initial else None for column in _COLUMNS.values()]
            others = ["–" if found is None else str(found.estimate) for found in tested]
            if e.volume is not None:
                others[list(_COLUMNS).index("volume")] += f" ({in_words(e.volume.p_value)})"
            counts = (str(e.num_pairs), f"{e.num_units} {e.units}")
            rows.append([name or "(model)", str(e.estimate), in_words(e.p_value), *others, *counts, e.verdict])
        kept = [i for i, column in enumerate(head) if column not in _COLUMNS or any(row[i] != "–" for row in rows)]
        return [[row[i] for i in kept] for row in (head, *rows)]

    def _legend(self) -> list[str]:
        """What the columns are of: once, or where layers differ by layer."""
        said = dict[str, list[str]]()
        for name, e in self.items():
            lines = [f"effect: {e.compared}"]
            if e.volume is not None:
                lines.append(
                    f"volume: {e.volume_estimand}" + (f"; of {e.dimensions} dimensions" if e.dimensions else "")
                )
            if e.switches is not None:
                lines.append("switches: share of ReLU units that switch, per line")
            for line in [*lines, *e.notes]:
                said.setdefault(line, []).append(name or "(model)")
        whole = [len(names) == len(self) or line.startswith("switches") for line, names in said.items()]
        return [
            f"{line}." if everywhere else f"{', '.join(names)}: {line}."
            for (line, names), everywhere in zip(said.items(), whole, strict=True)
        ]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as JSON, for people, programs and :meth:`load`; returns the path."""
        effects = {name: effect.record() for name, effect in self.items()}
        return write_json(path, {"kind": "BoundaryStudy", "settings": self.settings, "effects": effects})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> BoundaryStudy:
        """Read what :meth:`save` wrote.

        Raises:
            ProbeError: no such file, or one that is no study.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            effects = {name: BoundaryEffect.of(record) for name, record in found["effects"].items()}
            return BoundaryStudy(effects, settings=found["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProbeError(
                f"{path} is no saved BoundaryStudy ({type(error).__name__}).\n"
                "Save one first:  tgp.boundary_study(model, x, ...).save('study.json')"
            ) from error


def compare_networks(studies: Sequence[BoundaryStudy]) -> BoundaryStudy:
    """Test over networks, the units in place of one network's pairs: does the effect show in training after training.

    Each network gives one number a layer, its study's estimate; mean, interval and p-value are Student's with S − 1
    degrees of freedom.  This is the strongest claim: that of one network is about the pairs of that network.  Study
    each with another ``seed``: of the same pairs they would have the pairs' accidents in common, which no spread shows.

    Args:
        studies: S ≥ 3, of the same layers and contrast: several seeds of one architecture, each with ``initial``.

    Raises:
        ProbeError: fewer than 3, or studies that differ in layers, contrast, volume, or in having an ``initial``.

    Cost: none to speak of.

    >>> import torch, torchgeom_probe as tgp
    >>> def network():
    ...     return torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3, bias=False))
    >>> _, x = torch.manual_seed(0), torch.randn(200, 2)
    >>> options = {"layers": ["1"], "estimator": "subspace:1", "pairs": 20, "offsets": ()}
    >>> studies = [tgp.boundary_study(network(), x, initial=network(), seed=i, **options) for i in range(3)]
    >>> found = compare_networks(studies)
    >>> assert found["1"].units == "networks" and found["1"].num_units == 3
    """
    studies = list(studies)
    if len(studies) < LEAST_NETWORKS or not all(isinstance(study, BoundaryStudy) for study in studies):
        raise ProbeError(
            f"networks as units need at least {LEAST_NETWORKS} studies; got {len(studies)}.\n"
            "Train the network with other seeds:  "
            "compare_networks([boundary_study(net, x, initial=net0, seed=i) for i, (net, net0) in enumerate(trained)])"
        )
    kinds = {
        (tuple(s), *((e.contrast, e.estimand, e.volume_estimand, e.dimensions, e.initial is None) for e in s.values()))
        for s in studies
    }
    if len(kinds) > 1:
        raise ProbeError(
            "the studies differ in their layers, their contrast, their volume, or in having an untrained network.\n"
            "Study every network in the same way:  boundary_study(net, x, layers=..., contrast=..., initial=...)"
        )
    effects = {name: _over_networks([study[name] for study in studies]) for name in studies[0]}
    return BoundaryStudy(effects, settings={"networks": [study.settings for study in studies]})


def _over_networks(effects: Sequence[BoundaryEffect]) -> BoundaryEffect:
    first = effects[0]
    changed: dict[str, Any] = {}
    for name in CONTRASTED:
        found = [getattr(effect, name) for effect in effects]
        changed[name] = None if None in found else _mean([tested.estimate for tested in found])
    for name in PROFILES:
        profiles = [getattr(effect, name) or {} for effect in effects]
        shared = [offset for offset in profiles[0] if all(offset in other for other in profiles)]
        means = {offset: _mean([other[offset] for other in profiles]).estimate for offset in shared}
        changed[name] = means if shared or getattr(first, name) is not None else None
    changed["estimate"], changed["p_value"] = _mean([effect.estimate for effect in effects])
    dropped = sum((Counter(effect.dropped) for effect in effects), Counter[str]())
    pairs = sum(effect.num_pairs for effect in effects)
    return replace(first, **changed, num_pairs=pairs, num_units=len(effects), units="networks", dropped=dict(dropped))


def _mean(values: Sequence[float]) -> Tested:
    """The mean over networks."""
    return student(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1)
