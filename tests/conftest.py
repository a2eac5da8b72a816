"""Settings that every test runs under."""

import importlib
import os
import random

import beartype._check.code.codemain
import pytest
import torch
from annotations import check_annotations

# Two processes run tests on two cores, and what they start has one thread too: threads that spin for a core that
# another holds made a notebook of 47 s take 230.
os.environ["OMP_NUM_THREADS"] = "1"

# beartype picks the item of a list that it looks at by a random number: not one of the process's own, which a probe
# must leave alone.
beartype._check.code.codemain.getrandbits = random.Random(0).getrandbits
# Before anything imports the package: from here on the types and shapes in its signatures are checked at every call.
# An int is a float, as it is to mypy.  Not in dual/: its rules are called for every op of every test, their shapes are
# the ops' own, and half of the suite's time would go there.
ROOMS = (
    "analytic boundary check cli curvature dataset distributed errors estimators files jacobian linalg loss model "
    "monitor plotting probe report reproduce shapes slices"
)
check_annotations([f"torchgeom_probe.{room}" for room in ROOMS.split()])

# The checks run in code of the tests or of no module: what a replay would not trust, and what a measurement would
# follow, jaxtyping's own stack of calls included.
importlib.import_module("torchgeom_probe.jacobian.replay.seal")._TRUSTED |= {"", "annotations"}
importlib.import_module("torchgeom_probe.model.kinds")._FRAMEWORKS |= {"", "annotations"}

# The models are small: threads that wait for each other on a busy machine cost more than they give.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """Each test draws its weights and inputs from the same seed, in whatever order the tests run."""
    torch.manual_seed(20260)


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
