"""torchgeom_probe: how much each layer of a PyTorch model magnifies its input space.

Attach a :class:`GeometryProbe` to the layers of a model that you already have; one dual forward pass gives log √det g, g = JᵀJ, per
layer and sample.
"""

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators import Estimator, Exact, Subspace, TopK
from torchgeom_probe.probe import CheckReport, GeometryProbe, measure
from torchgeom_probe.report import CSVWriter, GeometryReport, LayerGeometry, Writer

__version__ = "0.1.0"

__all__ = [
    "CSVWriter",
    "CheckReport",
    "Estimator",
    "Exact",
    "GeometryProbe",
    "GeometryReport",
    "LayerGeometry",
    "ProbeError",
    "Subspace",
    "TopK",
    "Writer",
    "measure",
]
