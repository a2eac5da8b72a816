"""What a figure found and shows: numbers, sentences, pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

from torchgeom_probe.boundary.effect import BoundaryEffect, in_words
from torchgeom_probe.boundary.population import boundary_study
from torchgeom_probe.boundary.study import LEAST_NETWORKS, BoundaryStudy, compare_networks
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.files import write_atomically, write_json
from torchgeom_probe.plotting.files import save, small_png
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.plotting.style import Figure
from torchgeom_probe.reproduce.settings import Say, Settings
from torchgeom_probe.reproduce.training import Trained, Training, View, train
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.result import SliceScan

_GALLERY_BYTES = 150_000


def quirks(figure: str) -> list[dict[str, str]]:
    """Read what the paper's own code does for a figure, each with what was decided here, from ``quirks.md``.

    >>> quirks("fig2")[4]["quirk"]
    'entropies are in base 10, volumes in log10'
    """
    page = resources.files("torchgeom_probe.reproduce").joinpath("quirks.md").read_text(encoding="utf-8")
    found = []
    for heading, _, table in (section.partition("\n\n") for section in page.split("\n## ")[1:]):
        if figure in heading.split(", "):
            rows = (row.strip("| ").split(" | ") for row in table.strip().splitlines()[2:])
            found += [{"quirk": quirk, "decision": decision} for quirk, decision in rows]
    return found


def drawn(view: View, scans: Mapping[str, SliceScan], **options: Any) -> Figure:
    """Draw scans of one view by their names, in the form that all figures share; ``options`` are the drawing's own.

    Training moves the level of log √det g by more than its pattern's range: each log-volume is shown about its median.
    """
    style: dict[str, Any] = {"relative": True, "log_entropy": True}
    return plot(list(scans.values()), **style | {"names": list(scans), "class_names": view.class_names} | options)


class Results:
    """What a figure found: said while it is found, and written to ``results.json`` at the end.

    Its files go to ``folder``; None: ``<out>/<figure>``.
    """

    def __init__(
        self, figure: str, title: str, settings: Settings, *, folder: Path | None = None, say: Say = print
    ) -> None:
        self.figure, self.settings, self.say = figure, settings, say
        self.folder = folder or settings.out / figure
        chosen = {name: getattr(settings, name) for name in ("preset", "quick", "seed", "seeds", "device", "epochs")}
        self.numbers: dict[str, Any] = {
            **{"figure": figure, "title": title, "settings": chosen, "quirks": quirks(figure)},
            **{"trainings": {}, "studies": [], "refused": [], "slices": [], "checks": {}},
        }

    def train(
        self, training: Training, views: Sequence[View], *, seeds: int | None = None, **options: Any
    ) -> list[Trained]:
        """Train a network; of a study so many ``seeds``, or ``--seeds``: the first is the figure's own, and scanned."""
        own = self.settings
        networks = [train(training, own, views=views, say=self.say, **options)]
        count = 1 if seeds is None else own.seeds or seeds
        for seed in range(own.seed + 1, own.seed + count):
            other = replace(training, name=f"{training.name}_seed{seed}")
            networks.append(train(other, replace(own, seed=seed), say=self.say))
        for trained in networks:
            self.numbers["trainings"][trained.name] = {**training.described, "history": trained.history}
            before, *_, after = trained.history
            for name in (name for name in after if name.endswith("accuracy")):
                what = f"{trained.name}: {name.replace('_', ' ')}"
                self.say(f"{what} {after[name]:.3f} ({before[name]:.3f} before training)")
        return networks

    def check(self, name: str, *, value: float, bound: float, what: str) -> bool:
        """Store and say whether a number is at most its bound; a figure whose check fails ends with a failure."""
        ok = value <= bound
        self.numbers["checks"][name] = {"value": value, "bound": bound, "ok": ok, "what": what}
        self.say(f"{'ok  ' if ok else 'FAIL'}  {what}: {value:.2g} (at most {bound:g})")
        return ok

    def describe(self, trained: Trained, view: View, *, layers: Sequence[str] | None = None) -> None:
        """Say of layers of the last scan, None: all, how their volume goes with the entropy, before training beside."""
        epoch = trained.epochs[-1]
        after, before = trained.scan(view, epoch), trained.scan(view, 0)
        for layer in list(after.report) if layers is None else layers:
            place = {"network": trained.name, "view": view.name, "epoch": epoch, "name": layer}
            try:
                found = after.magnification(layer, initial=before)
                place |= asdict(found) | {"sentence": str(found)}
            except ProbeError as error:  # a constant entropy, a singular metric
                place["sentence"] = str(error)
            self.say(f"{trained.name}, {view.name}: {place['sentence']}")
            self.numbers["slices"].append(place)

    def study(self, networks: Sequence[Trained], x: Tensor, *, gallery: bool = False, **options: Any) -> None:
        """Test the hypothesis at held-out samples: each network against itself before training, then all of them."""
        quick: dict[str, Any] = {"pairs": 20, "offsets": (-0.2, 0.2), "share": True} if self.settings.quick else {}
        options = quick | options
        studies = []
        try:
            for seed, of in enumerate(networks):  # each with pairs of its own
                model, before, path = of.model(of.epochs[-1]), of.model(0), of.folder / "study.json"
                options |= {"readout": of.readout(of.epochs[-1]), "seed": seed, "path": path}
                studies.append(boundary_study(model, x.to(self.settings.device), initial=before, **options))
        except ProbeError as error:  # after an epoch all may be predicted as one class
            self.say(f"{of.name}: no study of its boundaries: {error}")
            self.numbers["refused"].append({"network": of.name, "because": str(error)})
            return
        self.found(networks[0].name, studies, gallery=gallery)

    def found(self, name: str, studies: Sequence[BoundaryStudy], *, gallery: bool = False) -> None:
        """Store and say what studies of networks of one kind found, of three or more the networks as units; draw it."""
        study = compare_networks(studies) if len(studies) >= LEAST_NETWORKS else studies[0]
        for effect in study.values():
            self.say(f"{name}: {effect}.")
            words = {"network": name, "sentence": str(effect), "supported": effect.supported, "cells": cells(effect)}
            self.numbers["studies"].append(words | effect.record())
        self.picture(f"{name}_profile", plot(study, title=f"Near the boundary: {name}"), gallery=gallery)

    def picture(self, name: str, figure: Figure, *, gallery: bool = False) -> None:
        """Write ``name.png`` and ``name.pdf``; with ``gallery`` also the small PNG, where one was asked for."""
        # The layout is found once, not anew for every file.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for ending in (".png", ".pdf"):
            save(figure, self.folder / f"{name}{ending}")
        if gallery and self.settings.gallery is not None:
            small = small_png(figure, _GALLERY_BYTES)
            write_atomically(self.settings.gallery / f"{self.figure}_{name}.png", small)

    def finish(self) -> None:
        """Write ``results.json``; a check that failed is raised."""
        path = write_json(self.folder / "results.json", self.numbers)
        self.say(f"Wrote {path} and the pictures beside it.")
        failed = [name for name, check in self.numbers["checks"].items() if not check["ok"]]
        if failed:
            raise ProbeError(
                f"{self.figure}: the check of {', '.join(failed)} failed; the numbers are in {path}.\n"
                "Likely a defect of this package or of this machine's arithmetic: please report it with that file."
            )


def cells(effect: BoundaryEffect) -> list[str]:
    """One row of the table: layer, effect, p, volume, untrained alone, networks, verdict."""
    others = ["–" if tested is None else str(tested.estimate) for tested in (effect.volume, effect.initial)]
    counts = f"{effect.num_units if effect.units == 'networks' else 1} ({effect.num_pairs} pairs)"
    return [effect.name, str(effect.estimate), in_words(effect.p_value), *others, counts, effect.verdict]


def table(out: Path) -> str:
    """The studies of every figure under ``out`` as one Markdown table, each network once; "" where there are none."""
    head = ["network, layer", "effect [nat]", "p", "of the volume", "untrained alone", "networks", "verdict"]
    rows: dict[str, list[str]] = {}
    for path in sorted(out.glob("fig*/results.json")):
        for study in json.loads(path.read_text(encoding="utf-8")).get("studies", []):
            layer, *others = study["cells"]
            rows[f"{study['network']}, {layer}"] = others
    lines = [head, ["---"] * len(head), *([name, *row] for name, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""
