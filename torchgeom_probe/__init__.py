"""torchgeom_probe: how much each layer of a PyTorch model magnifies its input space.

Attach a :class:`GeometryProbe` to the layers of a model that you already have; one dual forward pass gives log √det g, g = JᵀJ, per
layer and sample.
"""

from torchgeom_probe import analytic
from torchgeom_probe.boundary.magnification import (
    BoundaryPoints,
    Magnification,
    boundary_points,
    magnification,
)
from torchgeom_probe.check import CheckReport
from torchgeom_probe.curvature.scalar import scalar_curvature
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators import Along, Estimator, Exact, LogDet, Subspace, TopK, Trace
from torchgeom_probe.monitor.monitor import Budget, Every, LogSpaced, Monitor, Schedule
from torchgeom_probe.probe import GeometryProbe, measure
from torchgeom_probe.report import CSVWriter, GeometryReport, JSONWriter, LayerGeometry, Writer
from torchgeom_probe.slices.scan import Line, Plane, SliceScan, scan

__version__ = "0.1.0"

__all__ = [
    "Along",
    "BoundaryPoints",
    "Budget",
    "CSVWriter",
    "CheckReport",
    "Estimator",
    "Every",
    "Exact",
    "GeometryProbe",
    "GeometryReport",
    "JSONWriter",
    "LayerGeometry",
    "Line",
    "LogDet",
    "LogSpaced",
    "Magnification",
    "Monitor",
    "Plane",
    "ProbeError",
    "Schedule",
    "SliceScan",
    "Subspace",
    "TopK",
    "Trace",
    "Writer",
    "analytic",
    "boundary_points",
    "magnification",
    "measure",
    "scalar_curvature",
    "scan",
]
