"""Python blocks of README and guide run as they stand, each in a directory of its own; commands name what exists."""

import re
import shlex
from pathlib import Path

import pytest
from blocks import run_block

from torchgeom_probe.cli.main import _parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = {
    f"{page.stem} {number}": block
    for page in [ROOT / "README.md", *sorted((ROOT / "torchgeom_probe" / "guide").glob("*.md"))]
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    )
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_python_block(block, tmp_path):
    code, printed, errors = run_block(block, tmp_path)
    assert code == 0, errors
    assert printed


def test_there_are_blocks():
    assert len([name for name in BLOCKS if name.startswith("README")]) >= 4
    assert {name.split()[0] for name in BLOCKS} >= {"README", "boundary", "choosing", "reading", "tokens"}


@pytest.mark.parametrize("line", re.findall(r"^torchgeom-probe .*?(?=  +#|$)", README, flags=re.MULTILINE))
def test_command_line_is_understood(line):
    arguments = _parser().parse_args(shlex.split(line)[1:])
    assert callable(arguments.run)


def test_the_figures_that_it_shows_are_there():
    shown = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert shown
    for path in shown:
        assert (Path(__file__).parent.parent / path).stat().st_size > 10_000
