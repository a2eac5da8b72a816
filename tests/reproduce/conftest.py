"""The images that several files test with."""

import pytest

from torchgeom_probe.reproduce import resnet
from torchgeom_probe.reproduce.settings import Settings


@pytest.fixture(scope="module")
def images():
    return resnet.load_images(Settings(quick=True))
