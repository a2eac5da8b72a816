"""Runs a block of Python as a command would, in a process that need not import torch anew."""

import multiprocessing
import os
import runpy
import sys

# Forked for every block from one process that has imported what they all import, and nothing of the tests.
_FRESH = multiprocessing.get_context("forkserver")
_FRESH.set_forkserver_preload(["torchgeom_probe", "timm"])


def _run(file, folder):
    os.chdir(folder)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        stream.flush()
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    runpy.run_path(file, run_name="__main__")


def run_block(block, folder, timeout=300):
    """Return exit code, output and errors of a block run in ``folder``."""
    file = folder / "block.py"
    file.write_text(block, encoding="utf-8")
    process = _FRESH.Process(target=_run, args=(str(file), str(folder)))
    process.start()
    process.join(timeout)
    code = process.exitcode
    if code is None:
        process.kill()
    return code, *((folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
