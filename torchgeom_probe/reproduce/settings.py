"""What the command line chooses for all figures: preset, seed, device, folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from torchgeom_probe.errors import ProbeError

Say = Callable[[str], None]
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Settings:
    """What the command line chooses; everything else is the figure's.

    Args:
        preset: ``"embedded"``: data that comes with the installed packages, in minutes on two cores;
            ``"paper"``: the paper's data and training.
        quick: a small version, for a test of the installation.
        seed: of the weights, the data's order and its noise.
        seeds: how many networks a study of decision boundaries is over; None: the figure's own number.
        device: where to train and to scan.
        data: the digits of fig2 and the demo, ``"digits"``, ``"mnist5k"`` or ``"mnist"``; None: the preset's.
        data_root: where the data of ``paper`` are, or go.
        out: the directory of trainings and figures.
        epochs: in place of the figure's own number.
        gallery: also write a small PNG of the main pictures here.

    Raises:
        ProbeError: an unknown preset; a device that torch does not have here; epochs below 1; 2 seeds.

    >>> Settings(quick=True).choose(embedded=200, paper=1000, quick=2)
    2
    """

    preset: str = "embedded"
    quick: bool = False
    seed: int = 0
    seeds: int | None = None
    device: str = "cpu"
    data: str | None = None
    data_root: Path = Path("data")
    out: Path = Path("torchgeom_runs/reproduce")
    epochs: int | None = None
    gallery: Path | None = None

    def __post_init__(self) -> None:
        if self.preset not in ("embedded", "paper"):
            raise ProbeError(f"preset={self.preset!r} is unknown. Write --preset embedded or --preset paper.")
        if self.epochs is not None and self.epochs < 1:
            raise ProbeError(f"--epochs {self.epochs} trains nothing. Write --epochs 1 or more.")
        if self.seeds is not None and (self.seeds < 1 or self.seeds == 2):
            raise ProbeError(
                f"--seeds {self.seeds}: a study is of one network, or compares 3 or more. Write --seeds 3."
            )
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ProbeError(
                f"--device {self.device} is not to be had here: {str(error).splitlines()[0]}\nWrite --device cpu."
            ) from error

    @property
    def papers(self) -> bool:
        """Whether data and training are the paper's, in full or in quick form."""
        return self.preset == "paper"

    def choose(self, *, embedded: Choice, paper: Choice, quick: Choice) -> Choice:
        """One of three, by ``quick`` (first) and ``preset``."""
        return quick if self.quick else paper if self.papers else embedded
