"""The command line, ``torchgeom-probe``: one file a verb, found by itself."""
