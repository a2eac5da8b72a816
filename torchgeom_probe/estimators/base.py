"""What an estimator is, and the last step that all share: a factor becomes a LayerGeometry."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from torchgeom_probe.jacobian.jacobians import Linearization
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.gram import Factor
from torchgeom_probe.linalg.spectrum import SpectralDensity
from torchgeom_probe.linalg.volume import log_volume, rank_tolerance
from torchgeom_probe.report import LayerGeometry

#: Below this share of the largest a singular value taken from a float64 Gram matrix is rounding.
GRAM_RESOLUTION = 1e-7


@dataclass(frozen=True)
class Work:
    """The products that an estimator needs of one layer, per sample, and why these.

    Attributes:
        pushes, pulls: Jv by the dual pass and Jᵀu by reverse mode, as many as are expected.
        most: products at which it stops at the latest; equal to the sum where the number is fixed.
        shared: whether the pushes are those of one pass for all layers.
        why: the choice between forward and reverse mode, and between all directions and some, in words.
    """

    pushes: int
    pulls: int
    most: int
    shared: bool
    why: str


def dense_work(num_features: int, num_inputs: int, why: str) -> Work:
    """All of J: by rows or by columns, whichever are fewer."""
    by_rows = num_features <= num_inputs
    count = min(num_features, num_inputs)
    how = (
        f"{num_features} rows of J by reverse mode, d = {num_inputs} is more"
        if by_rows
        else f"{num_inputs} columns of J by forward mode, n = {num_features} is more"
    )
    return Work(0 if by_rows else count, count if by_rows else 0, count, False, f"{why}: {how}")


class Estimator(ABC):
    """A frozen dataclass that names an estimand and computes it from the Jacobians of all layers at once."""

    @abstractmethod
    def num_rows(self, plan: Plan) -> int:
        """How many tangent rows one sample needs at once: what samples are chunked by."""

    @abstractmethod
    def work(self, plan: Plan, *, engine: str = "auto") -> dict[str, Work]:
        """The products that each entry needs of one sample."""

    @abstractmethod
    def estimate(self, linear: Linearization, *, normalize: bool) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk."""


def geometry(
    entry: str,
    factor: Factor,
    *,
    estimand: str,
    engine: str,
    num_features: int,
    num_inputs: int,
    num_directions: int,
    full_rank: int,
    dtype: torch.dtype,
    normalize: bool,
) -> LayerGeometry:
    """Singular values, rank and log-volume of one layer from the factor of its tangents."""
    sigma = factor.singular_values()
    if normalize:
        sigma = sigma / math.sqrt(num_features)
    tolerance = rank_tolerance(factor.dtype or dtype)
    if factor.gram is not None:
        tolerance = max(tolerance, GRAM_RESOLUTION)  # float64 tangents that did not fit into memory together
    volume, rank, pseudo = log_volume(sigma, num_directions=full_rank, tolerance=tolerance)
    return LayerGeometry(
        name=entry,
        estimand=estimand,
        engine=engine,
        log_volume=volume,
        singular_values=sigma,
        rank=rank,
        log_pseudo_volume=pseudo,
        num_features=num_features,
        num_inputs=num_inputs,
        num_directions=num_directions,
        normalized=normalize,
        rank_tolerance=tolerance,
        spectrum=SpectralDensity.of_singular_values(sigma, num_inputs)
        if num_directions == num_inputs
        else None,
    )
