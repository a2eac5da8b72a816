"""The fused rules: op → what it does to a whole buffer ``[1 + k, *shape]`` at once.  Importing this fills the table.

One file a theme; ``table.py`` says what a rule is.
"""

from torchgeom_probe.dual import (
    arithmetic,
    attention,
    convolution,
    elementwise,
    kinds,
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
    "kinds",
    "normalisation",
    "pooling",
    "products",
    "reductions",
    "views",
]
