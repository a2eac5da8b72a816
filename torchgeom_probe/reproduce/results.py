"""What a figure found and shows: numbers, sentences, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from torchgeom_probe.boundary.magnification import Magnification
from torchgeom_probe.boundary.paired import Estimate
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.files import write_atomically, write_json
from torchgeom_probe.plotting.files import animated, save, small_png
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.plotting.style import Figure
from torchgeom_probe.reproduce.settings import Say, Settings
from torchgeom_probe.reproduce.training import Trained, Training, View, train
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
    style: dict[str, Any] = {"unit": "log10", "relative": True, "log_entropy": True}
    return plot(list(scans.values()), **style | {"names": list(scans), "class_names": view.class_names} | options)


def frames(view: View, scans: Mapping[str, SliceScan], **options: Any) -> Iterator[Figure]:
    """Draw each scan by itself, as :func:`drawn` does, on the scales of all."""
    for name, scan in scans.items():
        yield drawn(view, {name: scan}, like=list(scans.values()), **options)


class Results:
    """What a figure found: said while it is found, and written to ``results.json`` at the end.

    Args:
        figure: its name, of the folder too.
        title: what it shows, in words.
        settings: the command line's.
        say: prints a line.
    """

    def __init__(self, figure: str, title: str, settings: Settings, *, say: Say = print) -> None:
        self.figure, self.settings, self.say = figure, settings, say
        self.folder = settings.out / figure
        self.numbers: dict[str, Any] = {
            "figure": figure,
            "title": title,
            "settings": {name: getattr(settings, name) for name in ("preset", "quick", "seed", "device", "epochs")},
            "quirks": quirks(figure),
            "trainings": {},
            "magnification": [],
            "checks": {},
        }

    def train(self, training: Training, views: Sequence[View], **options: Any) -> Trained:
        """Train, or find it trained, scan the views (:func:`train`); store its numbers, and say those at its end."""
        trained = train(training, self.settings, views=views, say=self.say, **options)
        self.numbers["trainings"][trained.name] = {**training.described, "history": trained.history}
        before, *_, after = trained.history
        for name in (name for name in after if name.endswith("accuracy")):
            what = f"{trained.name}: {name.replace('_', ' ')}"
            self.say(f"{what} {after[name]:.3f} ({before[name]:.3f} before training)")
        return trained

    def check(self, name: str, *, value: float, bound: float, what: str) -> bool:
        """Store and say whether a number is at most its bound; a figure whose check fails ends with a failure."""
        ok = value <= bound
        self.numbers["checks"][name] = {"value": value, "bound": bound, "ok": ok, "what": what}
        self.say(f"{'ok  ' if ok else 'FAIL'}  {what}: {value:.2g} (at most {bound:g})")
        return ok

    def test(self, trained: Trained, view: View, *, layers: Sequence[str] | None = None) -> None:
        """Test the hypothesis on layers of the last scan, None: all, the untrained network's log-volume as control."""
        epoch = trained.epochs[-1]
        after, before = trained.scan(view, epoch), trained.scan(view, 0)
        for layer in list(after.report) if layers is None else layers:
            found = after.magnification(layer, initial=before, seed=self.settings.seed)
            self.record(found, network=trained.name, view=view.name, epoch=epoch)

    def record(self, found: Magnification, *, network: str, view: str, epoch: int) -> None:
        """Store one test, and say its sentence."""
        self.say(f"{network}, {view}: {found}")
        place = {"network": network, "view": view, "epoch": epoch}
        self.numbers["magnification"].append(place | _in_numbers(found))

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

    def animation(self, name: str, frames: Iterable[Figure]) -> None:
        """Write ``name.gif``, one frame a figure, the last one held."""
        write_atomically(self.folder / f"{name}.gif", animated(frames))

    def finish(self) -> None:
        """Say where the hypothesis holds and where it fails, and write ``results.json``."""
        tests = self.numbers["magnification"]
        failing = [
            {"where": f"{test['network']}, {test['view']}, {test['layer']}", "because": test["sentence"]}
            for test in tests
            if not test["supported"]
        ]
        supported = len(tests) - len(failing)
        self.numbers["hypothesis"] = {"tests": len(tests), "supported": supported, "not_supported": failing}
        if tests:
            where = f"; not in: {'; '.join(test['where'] for test in failing)}." if failing else "."
            self.say(f"{self.figure}: the hypothesis is supported in {supported} of {len(tests)} tests{where}")
        path = write_json(self.folder / "results.json", self.numbers)
        self.say(f"Wrote {path} and the pictures beside it.")
        failed = [name for name, check in self.numbers["checks"].items() if not check["ok"]]
        if failed:
            raise ProbeError(
                f"{self.figure}: the check of {', '.join(failed)} failed; the numbers are in {path}.\n"
                "Likely a defect of this package or of this machine's arithmetic: please report it with that file."
            )


def _in_numbers(found: Magnification) -> dict[str, Any]:
    def estimate(value: Estimate | None) -> dict[str, Any] | None:
        return None if value is None else {"value": float(value), "interval": value.interval}

    numbers = {"layer": found.name, "supported": found.supported, "sentence": str(found), **vars(found)}
    del numbers["name"]
    numbers |= {name: estimate(numbers[name]) for name in ("decile_gap", "peak_to_boundary")}
    return numbers | {"initial": None if found.initial is None else _in_numbers(found.initial)}
