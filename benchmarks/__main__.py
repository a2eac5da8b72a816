"""``python -m benchmarks``: questions about cost, answered by measurement, on the page beside this file."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import gpu, zoo
from benchmarks.page import PAGE, figure, finished, written
from benchmarks.timing import Settings, circumstances
from torchgeom_probe.plotting.files import save

#: The tables, in the order of the page.  Each is a module with TITLE, NOTE and ``table(settings)``, which yields
#: lines; METHOD, where it has one, says how it measures in place of the smallest time; RESUMES, if true, that it takes
#: rows from ``settings.finished``.
TABLES = (
    "replay",
    "limit",
    "memory",
    "stages",
    "scaling",
    "libraries",
    "estimators",
    "frames",
    "topk",
    "watch",
    "logdet",
    "directions",
    "overhead",
    "tab",
    "loss",
    "regularised",
    "slices",
    "boundary",
    "studies",
    "dataset",
    "duplicates",
)


def measured(name: str, settings: Settings, *, page: Path | None, resume: bool) -> None:
    """Run one table, printing it as it grows; on the page it takes the place of the old one at its end.

    One that resumes is there line by line.
    """
    module: ModuleType = importlib.import_module(f"benchmarks.{name}")
    under = circumstances(settings, getattr(module, "METHOD", None))
    resumes = getattr(module, "RESUMES", False)
    if page is not None and resume and resumes:
        settings = replace(settings, finished=finished(page, name, under))
    print(f"\n## {module.TITLE}\n", flush=True)
    head = [f"## {module.TITLE}", "", module.NOTE.strip(), "", under, ""]
    lines, left = list[str](), list[str]()
    for line in module.table(settings):
        print(line, flush=True)
        lines.append(line)
        same = settings.finished[:1] == tuple(lines[:1])  # the same columns
        left = [row for row in settings.finished[2:] if same and not row.startswith((*_keys(lines), "| **"))]
        if page is not None and resumes:
            written(page, name, "\n".join([*head, *lines, *left]))
    if page is not None:
        written(page, name, "\n".join([*head, *lines, *left]))
    if page is not None and name == "replay":  # the page's figure
        save(figure([*lines, *left]), page.parent / "gallery" / "replay.png")


def _keys(lines: list[str]) -> tuple[str, ...]:
    """What a row is about: its first three cells."""
    return tuple("|".join(line.split("|")[:4]) + "|" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="miniatures, in seconds; prints and writes nothing")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="these tables alone")
    parser.add_argument(
        "--families", nargs="*", default=(), help="the models of the table 'limit'; not written without --resume"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows that the page has under the same circumstances, measure the others, one by one",
    )
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument(
        "--turns", default=6, type=int, help="how often each is timed; the smallest time counts (default 6)"
    )
    parser.add_argument(
        "--threads", default=1, type=int, help="of torch; more than one are timed by the wall (default 1)"
    )
    parser.add_argument(
        "--gpu-check",
        metavar="FOLDER",
        type=Path,
        help="what only a GPU can tell, in nine minutes: a file a step into FOLDER, and the section of the page",
    )
    parser.add_argument(
        "--zoo",
        metavar="FOLDER",
        type=Path,
        help="models of other libraries against differences: a line a model into FOLDER, and the section of the page; "
        "--resume goes on",
    )
    parser.add_argument("--models", default="*", metavar="GLOB", help="of the zoo: 'timm *', '* Bert*' (default: all)")
    arguments = parser.parse_args()
    if not all(map(importlib.util.find_spec, ("timm", "matplotlib"))):
        parser.exit(
            1, "the benchmarks need timm and matplotlib:  python -m pip install 'torchgeom_probe[timm,figures]'\n"
        )
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    if arguments.gpu_check is not None:
        section = gpu.check(arguments.gpu_check, quick=arguments.quick)
        print(section)
        if torch.cuda.is_available() and not arguments.quick:
            written(PAGE, "gpu", section)
        return
    torch.set_num_threads(arguments.threads)
    if arguments.zoo is not None:
        section = zoo.run(arguments.zoo, only=arguments.models, resume=arguments.resume, quick=arguments.quick)
        print(section)
        if not arguments.quick:
            written(PAGE, "zoo", section)
        return
    settings = Settings(
        quick=arguments.quick,
        device=arguments.device,
        turns=2 if arguments.quick else arguments.turns,
        families=tuple(arguments.families),
    )
    writes = not settings.quick and (arguments.resume or not settings.families)
    for name in arguments.only:
        measured(name, settings, page=PAGE if writes else None, resume=arguments.resume)


if __name__ == "__main__":
    main()
