"""The figures by their names.

A figure is one file ``figN.py`` with a ``TITLE``, the ``QUIRKS`` of the paper's own code, and a function ``run``, which
reads like this::

    def run(results: Results) -> None:
        plane = View("plane", Plane(a, b, c), {"layers": ["layer4"]}, class_names=NAMES)
        trained = train(Training("photos", ...), results.settings, views=[plane], say=results.say)
        results.training(trained)
        results.test(trained, plane)
        results.picture("plane", drawn(plane, trained.scans(plane), title="The plane"), gallery=True)

Trainings live in ``<out>/trainings/<name>`` and are shared by the figures that ask for the same one (fig3 and fig4;
fig5 and fig6); a figure's own files, ``results.json`` and the pictures, live in ``<out>/<figN>``.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.reproduce.results import Results
from torchgeom_probe.reproduce.settings import Say, Settings

#: What ``all`` is.
FIGURES = ("fig1", "fig2", "fig3", "fig4", "fig5", "fig6")


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
    began = time.perf_counter()
    for name in chosen:
        figure = importlib.import_module(f"torchgeom_probe.reproduce.{name}")
        start = time.perf_counter()
        say(f"{'' if name == chosen[0] else chr(10)}{name}: {figure.TITLE}")
        results = Results(name, figure.TITLE, settings, quirks=figure.QUIRKS, say=say)
        figure.run(results)
        results.finish()
        say(f"{name} took {_duration(time.perf_counter() - start)}.")
    if len(chosen) > 1:
        say(f"\n{len(chosen)} figures in {_duration(time.perf_counter() - began)}, under {settings.out}.")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
