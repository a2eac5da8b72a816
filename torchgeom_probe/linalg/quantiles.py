"""Quantiles of numbers of which some are −inf, or nan."""

from __future__ import annotations

import math

from torchgeom_probe.shapes import Tensor


def finite(values: Tensor) -> Tensor:
    """The finite numbers, as float64 on the host; they may be none."""
    return (host := values.detach().double().cpu())[host.isfinite()]


def known(values: Tensor) -> Tensor:
    """The same, with −inf, which is what the log-volume of a singular layer is; nan is not known."""
    return (host := values.detach().double().cpu())[~host.isnan()]


def quantiles(values: Tensor) -> tuple[float, float, float]:
    """10, 50 and 90 %, nan of none; where −inf is among them, values that are there: between it and others lies none.

    >>> import torch
    >>> quantiles(known(torch.tensor([1.0, -math.inf, -math.inf, math.nan])))
    (-inf, -inf, -inf)
    >>> quantiles(finite(torch.tensor([1.0, 2.0, math.nan])))[1]
    1.5
    """
    if not len(values):
        return math.nan, math.nan, math.nan
    how = "linear" if values.isfinite().all() else "lower"
    low, median, high = (values.quantile(part, interpolation=how).item() for part in (0.1, 0.5, 0.9))
    return low, median, high
