"""Closed forms for one hidden layer: of given weights (``shallow``), of Gaussian ones (``infinite``).

Nothing in here differentiates a model, so it is also what the rest of the package is tested against.
"""

from __future__ import annotations

from torchgeom_probe.analytic import infinite, shallow

__all__ = ["infinite", "shallow"]
