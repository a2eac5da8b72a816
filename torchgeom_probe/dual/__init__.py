"""The dual forward pass: a tensor that carries its tangents, and the table of fused rules."""

from torchgeom_probe.dual import rules as rules  # fills the table
from torchgeom_probe.dual.passes import dual_pass, recording
from torchgeom_probe.dual.tensor import RULES, DualTensor

__all__ = ["RULES", "DualTensor", "dual_pass", "recording"]
