"""What a figure found and shows: numbers, sentences, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torchgeom_probe.boundary.magnification import Magnification
from torchgeom_probe.boundary.statistics import Estimate
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.files import write_atomically, write_json
from torchgeom_probe.plotting.files import animated, save, small_png
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.plotting.style import Figure
from torchgeom_probe.reproduce.settings import Say, Settings
from torchgeom_probe.reproduce.training import Trained, View
from torchgeom_probe.slices.result import SliceScan

_GALLERY_BYTES = 150_000
_SETTINGS = ("preset", "quick", "seed", "device", "epochs")
_STATISTICS = ("rho", "p_value", "num_points", "num_dropped", "effective_points")


def quirks(text: str) -> tuple[dict[str, str], ...]:
    """Read what the paper's own code does, each with what was decided here: paragraphs of ``quirk -> decision``.

    >>> quirks('''
    ... entropy in base 10
    ... -> nats
    ... ''')
    ({'quirk': 'entropy in base 10', 'decision': 'nats'},)
    """
    pairs = (" ".join(paragraph.split()).split(" -> ") for paragraph in text.strip().split("\n\n"))
    return tuple({"quirk": quirk, "decision": decision} for quirk, decision in pairs)


def drawn(view: View, scans: Mapping[str, SliceScan], **options: Any) -> Figure:
    """Draw scans of one view by their names, in the form that all figures share; ``options`` are the drawing's own.

    Training moves the level of log √det g by more than its pattern's range: each log-volume is shown about its median.
    """
    style: dict[str, Any] = {"names": list(scans), "class_names": view.class_names, "images": view.images}
    style |= {"unit": "log10", "relative": True, "log_entropy": True}
    return plot(list(scans.values()), **style | options)


def frames(view: View, scans: Mapping[str, SliceScan], *, title: str, **options: Any) -> Iterator[Figure]:
    """Draw each scan by itself, on the scales of all; its name goes where the title has ``{}``, else beside the map."""
    for name, scan in scans.items():
        names = None if "{}" in title else [name]
        options |= {"names": names, "title": title.format(name), "like": list(scans.values())}
        yield drawn(view, {name: scan}, **options)


class Results:
    """What a figure found: said while it is found, and written to ``results.json`` at the end.

    Args:
        figure: its name, of the folder too.
        title: what it shows, in words.
        settings: the command line's.
        quirks: of the paper's own code, as :func:`quirks` reads them.
        say: prints a line.
    """

    def __init__(
        self, figure: str, title: str, settings: Settings, *, quirks: Sequence[Mapping[str, str]] = (), say: Say = print
    ) -> None:
        self.figure, self.settings, self.say = figure, settings, say
        self.folder = settings.out / figure
        self.numbers: dict[str, Any] = {
            "figure": figure,
            "title": title,
            "settings": {name: getattr(settings, name) for name in _SETTINGS},
            "quirks": quirks,
            "trainings": {},
            "magnification": [],
            "checks": {},
        }

    def training(self, trained: Trained) -> None:
        """Store a training's description and the numbers of its snapshots."""
        self.numbers["trainings"][trained.name] = {**trained.training.described, "history": trained.history}

    def check(self, name: str, *, value: float, bound: float, what: str) -> bool:
        """Store and say whether a number is at most its bound; a figure whose check fails ends with a failure."""
        ok = value <= bound
        self.numbers["checks"][name] = {"value": value, "bound": bound, "ok": ok, "what": what}
        self.say(f"{'ok  ' if ok else 'FAIL'}  {what}: {value:.2g} (at most {bound:g})")
        return ok

    def test(
        self, trained: Trained, view: View, *, layers: Sequence[str] | None = None, label: str | None = None
    ) -> None:
        """Test the hypothesis on layers of the last scan, None: all, the untrained network's log-volume as the control.

        ``label`` is what the sentences call the network; None: the training's name.
        """
        epoch = trained.epochs[-1]
        after, before = trained.scan(view, epoch), trained.scan(view, 0)
        for layer in list(after.report) if layers is None else layers:
            found = after.magnification(layer, initial=before, seed=self.settings.seed)
            self.record(found, network=label or trained.name, view=view.name, epoch=epoch)

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
        failing = [test for test in tests if not test["supported"]]
        places = [f"{test['network']}, {test['view']}, {test['layer']}" for test in failing]
        supported = len(tests) - len(failing)
        self.numbers["hypothesis"] = {
            "tests": len(tests),
            "supported": supported,
            "not_supported": [
                {"where": place, "because": test["sentence"]} for place, test in zip(places, failing, strict=True)
            ],
        }
        if tests:
            where = f"; not in: {'; '.join(places)}." if places else "."
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

    return {
        "layer": found.name,
        "supported": found.supported,
        "sentence": str(found),
        **{name: getattr(found, name) for name in _STATISTICS},
        "decile_gap": estimate(found.decile_gap),
        "peak_to_boundary": estimate(found.peak_to_boundary),
        **({} if found.initial is None else {"initial": _in_numbers(found.initial)}),
    }
