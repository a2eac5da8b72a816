"""The figures by their names.

A figure is a function of its :class:`~torchgeom_probe.reproduce.results.Results`, in which it trains, tests and draws;
``barlow_twins.fig6`` is one to begin with.  Trainings live in ``<out>/trainings/<name>`` and are shared by the figures
that ask for the same one (fig3 and fig4; fig5 and fig6); a figure's own files, ``results.json`` and the pictures, live
in ``<out>/<figN>``.  What the paper's own code does, and what is done here, stands in ``quirks.md``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.files import write_atomically
from torchgeom_probe.reproduce import barlow_twins, digits, points, regimes, resnet
from torchgeom_probe.reproduce.results import Results, table
from torchgeom_probe.reproduce.settings import Say, Settings

#: Name → what makes it, and what it shows; ``all`` is all of them.
FIGURES = {
    "fig1": (points.fig1, "a sinusoid boundary (and XOR) learnt by one hidden layer of sigmoid units"),
    "fig2": (digits.fig2, "handwritten digits learnt by one hidden layer of sigmoid units"),
    "fig3": (resnet.fig3, "a ResNet-34 learns images: the plane of three of them, over epochs"),
    "fig4": (resnet.fig4, "a trained ResNet-34: all four blocks on the plane of three images"),
    "fig5": (barlow_twins.fig5, "Barlow Twins, no labels: the lines between images of different classes"),
    "fig6": (barlow_twins.fig6, "Barlow Twins, no labels: the plane of three images"),
    "regimes": (regimes.regimes, "lazy and rich training, by how far the metric moves (not in the paper)"),
}


def reproduce(names: Sequence[str], settings: Settings, *, say: Say = print) -> None:
    """Make figures by their names; ``"all"`` is all of them, in their order.

    Raises:
        ProbeError: an unknown name, before anything is begun; whatever a figure refuses.

    >>> try:
    ...     reproduce(["fig9"], Settings())
    ... except ProbeError as error:
    ...     assert "fig1" in str(error)
    """
    unknown = [name for name in names if name not in (*FIGURES, "all")]
    if unknown or not names:
        raise ProbeError(
            f"there is no figure {', '.join(map(repr, unknown)) or 'named'}.\n"
            f"Write one or more of {' '.join(FIGURES)}, or all:  torchgeom-probe reproduce fig1"
        )
    chosen = list(dict.fromkeys(f for name in names for f in (FIGURES if name == "all" else [name])))
    said: set[str] = set()

    def once(line: str) -> None:
        if line not in said:  # figures that share a training have sentences in common
            said.add(line)
            say(line)

    for name in chosen:
        start, (run, title) = time.perf_counter(), FIGURES[name]
        say(f"{'' if name == chosen[0] else chr(10)}{name}: {title}")
        results = Results(name, title, settings, say=once)
        run(results)
        results.finish()
        seconds = time.perf_counter() - start
        say(f"{name} took {f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.1f} min'}.")
    studies = table(settings.out)
    if studies:
        write_atomically(settings.out / "studies.md", f"{studies}\n".encode())
        say(f"\nNear decision boundaries, trained minus untrained:\n{studies}")
