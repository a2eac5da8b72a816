"""The fused rules: op → what it does to a whole buffer ``[1 + k, *shape]`` at once.  Importing this fills the table.

One file a theme; ``registry.py`` says what a rule is.
"""

from torchgeom_probe.dual.rules import arithmetic as arithmetic
from torchgeom_probe.dual.rules import attention as attention
from torchgeom_probe.dual.rules import convolution as convolution
from torchgeom_probe.dual.rules import copies as copies
from torchgeom_probe.dual.rules import elementwise as elementwise
from torchgeom_probe.dual.rules import indexing as indexing
from torchgeom_probe.dual.rules import normalisation as normalisation
from torchgeom_probe.dual.rules import pooling as pooling
from torchgeom_probe.dual.rules import products as products
from torchgeom_probe.dual.rules import reductions as reductions
from torchgeom_probe.dual.rules import refusals as refusals
from torchgeom_probe.dual.rules import resampling as resampling
from torchgeom_probe.dual.rules import special as special
from torchgeom_probe.dual.rules import views as views
