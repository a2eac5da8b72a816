"""Estimators: small frozen dataclasses, one file for each quantity that goes by the name of a volume element."""

from torchgeom_probe.estimators.along import Along
from torchgeom_probe.estimators.auto import Auto
from torchgeom_probe.estimators.base import Estimator, named
from torchgeom_probe.estimators.directions import Directions
from torchgeom_probe.estimators.exact import Exact
from torchgeom_probe.estimators.logdet import LogDet
from torchgeom_probe.estimators.subspace import Subspace
from torchgeom_probe.estimators.topk import TopK
from torchgeom_probe.estimators.trace import Trace

__all__ = ["Along", "Auto", "Directions", "Estimator", "Exact", "LogDet", "Subspace", "TopK", "Trace", "named"]
