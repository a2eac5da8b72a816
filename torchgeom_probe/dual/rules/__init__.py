"""The fused rules: op → what it does to a whole buffer ``[1 + k, *shape]`` at once.  Importing this fills the registry.

One file a theme; ``registry.py`` says what a rule is.
"""

from torchgeom_probe.dual import ops
from torchgeom_probe.dual.rules import (
    arithmetic,
    attention,
    convolution,
    elementwise,
    normalisation,
    pooling,
    products,
    reductions,
    views,
)

__all__ = [
    "arithmetic",
    "attention",
    "convolution",
    "elementwise",
    "normalisation",
    "ops",
    "pooling",
    "products",
    "reductions",
    "views",
]
