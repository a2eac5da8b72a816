"""A file with models of a user's own."""

import pytest

FACTORY = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(5, 7), nn.Tanh()), nn.Linear(7, 3)
    def forward(self, x):
        return self.head(self.body(x))
def make():
    return Net()
def broken():
    return 3
def cut():
    net = Net()
    net.body.register_forward_hook(lambda m, a, out: out * out.max().item())
    return net
"""


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(FACTORY)
    return path
