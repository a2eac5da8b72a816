"""The paper's experiments, one file a figure, over the public API alone; ``torchgeom-probe reproduce fig1``.

Nothing is imported here: a figure is loaded by its name when it is asked for.
"""
