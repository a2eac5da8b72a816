"""``python -m benchmarks``: every question about cost, answered by measurement and written to the page beside this file."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.timing import Settings, circumstances

#: The tables, in the order of the page.  Each is a module with TITLE, NOTE and ``table(settings)``, which yields lines.
TABLES = ("limit", "slices")
PAGE = Path(__file__).parent / "README.md"


def written(page: Path, name: str, section: str) -> None:
    """Put a section between its markers on the page, at the end if the page has none yet."""
    begin, end = f"<!-- {name}: written by python -m benchmarks -->", f"<!-- end of {name} -->"
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    gap = "" if found else "\n"
    page.write_text(f"{before}{gap}{begin}\n\n{section}\n\n{end}{after}", encoding="utf-8")


def measured(module: ModuleType, settings: Settings) -> str:
    """Run one table, printing it as it grows, and return its section of the page."""
    print(f"\n## {module.TITLE}\n", flush=True)
    lines = []
    for line in module.table(settings):
        print(line, flush=True)
        lines.append(line)
    return "\n".join([f"## {module.TITLE}", "", module.NOTE.strip(), "", circumstances(settings), "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="miniatures, in seconds; prints and writes nothing"
    )
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="these tables alone")
    parser.add_argument(
        "--families", nargs="*", default=(), help="the models of the table 'limit'; not written"
    )
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument(
        "--turns", default=6, type=int, help="how often each is timed; the smallest time counts (default 6)"
    )
    arguments = parser.parse_args()
    if importlib.util.find_spec("timm") is None:
        parser.exit(1, "the benchmarks need timm's models:  python -m pip install 'torchgeom_probe[timm]'\n")
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    torch.set_num_threads(1)
    settings = Settings(
        quick=arguments.quick,
        device=arguments.device,
        turns=2 if arguments.quick else arguments.turns,
        families=tuple(arguments.families),
    )
    for name in arguments.only:
        section = measured(importlib.import_module(f"benchmarks.{name}"), settings)
        if not (settings.quick or settings.families):
            written(PAGE, name, section)


if __name__ == "__main__":
    main()
