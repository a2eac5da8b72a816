"""The command line, ``torchgeom-probe``."""

from torchgeom_probe.cli.main import main

__all__ = ["main"]
