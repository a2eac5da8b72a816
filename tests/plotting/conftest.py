"""Two scans of one plane and two of one line, of networks of four classes on inputs that are 5×5 pictures."""

import pytest
import torch
from torch import nn

from torchgeom_probe.slices.scan import scan
from torchgeom_probe.slices.slice import Line, Plane

pytest.importorskip("matplotlib")


def net():
    return nn.Sequential(nn.Linear(25, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


@pytest.fixture
def planes():
    plane = Plane(*torch.randn(3, 25), steps=11)
    return [scan(net(), plane, layers=["1", "3"], progress=False) for _ in range(2)]


@pytest.fixture
def lines():
    a = 3 * torch.randn(25)
    line = Line(a, -a, steps=31)  # two classes at least: the network is all but odd
    return [scan(net(), line, layers=["1", "3"], progress=False) for _ in range(2)]
