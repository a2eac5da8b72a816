"""Estimators: small frozen dataclasses, one file for each quantity that goes by the name of a volume element."""

from torchgeom_probe.estimators.base import Estimator
from torchgeom_probe.estimators.exact import Exact
from torchgeom_probe.estimators.logdet import LogDet
from torchgeom_probe.estimators.subspace import Subspace
from torchgeom_probe.estimators.topk import TopK
from torchgeom_probe.estimators.trace import Trace

__all__ = ["Estimator", "Exact", "LogDet", "Subspace", "TopK", "Trace"]
