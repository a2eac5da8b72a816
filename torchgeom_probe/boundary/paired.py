"""The mean of a difference over pairs that share samples: an interval and a p-value that know it.

Two pairs with a sample, a photograph or a class in common are not independent, and a t-test over pairs takes them to
be: with 50 samples in 400 pairs it rejects a true null in more than half of the cases.

Legend of axes: N pairs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import scipy  # its submodules are loaded when they are first used: importing this costs little

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor


class Estimate(float):
    """A number with its 95 % interval: a float with ``.interval``, (low, high) or None where none can be had.

    As text it has the digits that its interval lets it have: two of half the interval's width.

    >>> gap = Estimate(3.1, (2.2, 4.0))
    >>> gap > 3, gap.interval
    (True, (2.2, 4.0))
    >>> print(gap, "and", Estimate(0.0891, (0.0487, 0.1294)))
    +3.10 [2.20, 4.00] and +0.089 [0.049, 0.129]
    """

    interval: tuple[float, float] | None

    def __new__(cls, value: float, interval: tuple[float, float] | None = None) -> Estimate:
        """Join the number with its interval."""
        estimate = super().__new__(cls, value)
        estimate.interval = interval
        return estimate

    def __getnewargs__(self) -> tuple[float, tuple[float, float] | None]:  # type: ignore[override]
        return float(self), self.interval

    def __repr__(self) -> str:
        return f"Estimate({float(self)!r}, {self.interval!r})"

    def __str__(self) -> str:
        low, high = self.interval or (math.nan, math.nan)
        if not 0 < high - low < math.inf:
            return f"{float(self):+.2g}"
        digits = max(0, 1 - math.floor(math.log10((high - low) / 2)))
        return f"{float(self):+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


class Tested(NamedTuple):
    """A mean with its 95 % interval, and the two-sided p-value of its being zero."""

    estimate: Estimate
    p_value: float


def paired_effect(differences: Any, units: Any) -> Tested:
    """The mean of one difference a pair, with the dyadic-robust variance.

    Var = 1/N² · Σ e_p e_q over all pairs p, q of pairs that have a unit in common (p = q among them), e = d − mean(d).
    It is not taken below that of independent pairs, is widened by m/(m − 1), and Student's t has m − 1 degrees of
    freedom, m the smaller of the numbers of pairs and of units: for pairs that share nothing this is the t-test.

    Args:
        differences: [N], a tensor or an array, finite.
        units: [N, 2], the two units of each pair, as numbers or names: samples, or what groups them (photographs).

    Raises:
        ProbeError: other shapes, fewer than two pairs or units, a difference that is not finite.

    Source: Aronow, Samii, Assenova, "Cluster-robust variance estimation for dyadic data", Political Analysis 23 (2015).

    Cost: N + the number of units; N² numbers are never formed.

    >>> d = [1.0, 2.0, 3.0, 4.0]
    >>> found = paired_effect(d, [[0, 1], [2, 3], [4, 5], [6, 7]])
    >>> assert abs(found.p_value - scipy.stats.ttest_1samp(d, 0).pvalue) < 1e-12
    """
    values = np.asarray(differences.detach().cpu() if isinstance(differences, Tensor) else differences, np.float64)
    names = np.asarray(units.detach().cpu() if isinstance(units, Tensor) else units)
    count = values.size
    if values.ndim != 1 or names.shape != (count, 2):
        raise ProbeError(
            f"differences have shape {values.shape} and units {names.shape}; they must be [N] and [N, 2], a row a pair."
            "\nFor samples i and j of each pair:  paired_effect(d, torch.stack([i, j], 1))"
        )
    if not np.isfinite(values).all():
        raise ProbeError(
            f"{(~np.isfinite(values)).sum()} of {count} differences are not finite.\n"
            "Keep the others:  keep = d.isfinite(); paired_effect(d[keep], units[keep])"
        )
    known, index = np.unique(names, return_inverse=True)
    independent = min(count, len(known))
    if independent < 2:
        raise ProbeError(f"{count} pairs of {len(known)} units have no spread to speak of.\nGive more pairs.")
    mean = float(values.mean())
    error = math.sqrt(_variance(values - mean, index.reshape(count, 2)) * independent / (independent - 1))
    return student(mean, error, independent - 1)


def student(mean: float, error: float, freedom: float) -> Tested:
    """Student's interval and p-value of a mean with this standard error."""
    margin = float(scipy.stats.t.ppf(0.975, freedom)) * error
    if error == 0:
        return Tested(Estimate(mean, (mean, mean)), float(mean == 0))
    return Tested(
        Estimate(mean, (mean - margin, mean + margin)), 2 * float(scipy.stats.t.sf(abs(mean) / error, freedom))
    )


def _variance(residuals: np.ndarray, index_N2: np.ndarray) -> float:
    """1/N² · Σ e_p e_q over pairs of pairs with a common unit; at least that of independent pairs."""
    ends = np.sort(index_N2, axis=1)
    two = ends[:, 0] != ends[:, 1]
    of_unit = np.bincount(ends[:, 0], residuals, ends.max() + 1)
    of_unit += np.bincount(ends[two, 1], residuals[two], ends.max() + 1)
    # Pairs with BOTH units in common stand under each of them: once too often.
    _, same = np.unique(ends[two], axis=0, return_inverse=True)
    sums = of_unit @ of_unit - np.square(np.bincount(same.ravel(), residuals[two])).sum()
    return float(max(sums, residuals @ residuals) / len(residuals) ** 2)
