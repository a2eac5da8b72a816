"""torchgeom_probe: how much each layer of a PyTorch model magnifies its input space.

Attach a :class:`GeometryProbe` to the layers of a model that you already have; one dual forward pass gives log √det g,
g = JᵀJ, per layer and sample.
"""

from torchgeom_probe import analytic
from torchgeom_probe.boundary.effect import BoundaryEffect
from torchgeom_probe.boundary.paired import paired_effect
from torchgeom_probe.boundary.points import BoundaryPoints, boundary_points
from torchgeom_probe.boundary.population import boundary_study
from torchgeom_probe.boundary.study import BoundaryStudy, compare_networks
from torchgeom_probe.check import CheckReport
from torchgeom_probe.curvature.scalar import scalar_curvature
from torchgeom_probe.dataset.cost import DatasetCost
from torchgeom_probe.dataset.stream import measure_dataset
from torchgeom_probe.dataset.table import DatasetTable
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators import Along, Directions, Estimator, Exact, LogDet, Subspace, TopK, Trace
from torchgeom_probe.loss.pushforward import pushforward
from torchgeom_probe.loss.step import penalty
from torchgeom_probe.monitor.drift import Drift
from torchgeom_probe.monitor.monitor import Monitor
from torchgeom_probe.monitor.schedules import Budget, Every, LogSpaced, Schedule
from torchgeom_probe.monitor.writers import CSVWriter, JSONWriter, Writer
from torchgeom_probe.plotting.directions import plot_directions
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.probe import GeometryProbe, measure
from torchgeom_probe.report import GeometryReport, LayerGeometry
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.scan import scan
from torchgeom_probe.slices.slice import Line, Plane

__version__ = "0.1.0"

__all__ = [
    "Along",
    "BoundaryEffect",
    "BoundaryPoints",
    "BoundaryStudy",
    "Budget",
    "CSVWriter",
    "CheckReport",
    "DatasetCost",
    "DatasetTable",
    "Directions",
    "Drift",
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
    "boundary_study",
    "compare_networks",
    "measure",
    "measure_dataset",
    "paired_effect",
    "penalty",
    "plot",
    "plot_directions",
    "pushforward",
    "scalar_curvature",
    "scan",
]
