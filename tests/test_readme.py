"""README's Python blocks run as they stand, each in a directory of its own; its commands name what exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from torchgeom_probe.cli.main import _parser

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_block(number, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS[number]], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_there_are_blocks():
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("line", re.findall(r"^torchgeom-probe .*?(?=  +#|$)", README, flags=re.MULTILINE))
def test_command_line_is_understood(line):
    arguments = _parser().parse_args(shlex.split(line)[1:])
    assert callable(arguments.run)


def test_the_figures_that_it_shows_are_there():
    shown = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert shown
    for path in shown:
        assert (Path(__file__).parent.parent / path).stat().st_size > 10_000
