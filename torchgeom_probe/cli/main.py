"""The command line: finds the verbs, parses, dispatches.

A verb is one file of this folder with two functions, and nothing else names it.  ``add(verbs)`` adds its parser;
``run(arguments)``, which that parser sets, does the work in a few lines over the public API, and returns None or the
exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from torchgeom_probe import __version__, cli
from torchgeom_probe.errors import ProbeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``torchgeom-probe``; returns the exit status.

    0: done; 1: refused, or a check that is not ok; 2: an argument that argparse does not know; 130: Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    if argv is None:  # the process is ours
        _keep_freed_memory()
    try:
        with contextlib.ExitStack() as stack:
            if arguments.quiet:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))  # progress bars and warnings
            return arguments.run(arguments) or 0
    except ProbeError as error:
        print(f"torchgeom-probe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        out = getattr(arguments, "out", None)
        kept = f"; what was computed so far is under {out}" if out else ""
        if getattr(arguments, "resumes", False):
            kept += ", and the same command goes on from there"
        print(f"\ntorchgeom-probe: stopped{kept}", file=sys.stderr)
        return 130
    except OSError as error:
        advice = "Give another directory with --out, or make room on this one."
        print(f"torchgeom-probe: {error}\n{advice}", file=sys.stderr)
        return 1


def _keep_freed_memory() -> None:
    """Have glibc keep what tensors free: else a pass on a CPU asks the system for the same memory op after op."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchgeom-probe", description="How much each layer of a PyTorch model magnifies its input space."
    )
    parser.add_argument("--version", action="version", version=f"torchgeom-probe {__version__}")
    if find_spec("shtab") is not None:
        import shtab  # optional: most never ask for it

        shtab.add_argument_to(parser, "--print-completion", help="of commands and options, for your shell to source")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for found in pkgutil.iter_modules(cli.__path__):
        module = importlib.import_module(f"{cli.__name__}.{found.name}")
        if hasattr(module, "add"):
            module.add(verbs)
    for verb in verbs.choices.values():
        verb.add_argument("--quiet", action="store_true", help="print errors alone; the files and the exit status tell")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
