"""The paper's experiments, over the public API alone; ``torchgeom-probe reproduce fig1``."""
