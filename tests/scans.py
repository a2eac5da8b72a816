"""A small network, a line and a plane to scan it over, and when two scans are the same."""

import torch
from torch import nn

from torchgeom_probe.slices.slice import Line, Plane


def mlp(dtype=torch.float64, classes=5):
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 13), nn.GELU(), nn.Linear(13, classes)).to(dtype)


def line(steps=17, dtype=torch.float64):
    return Line(torch.randn(7, dtype=dtype), torch.randn(7, dtype=dtype), steps=steps)


def plane(steps=6, dtype=torch.float64, **options):
    return Plane(*torch.randn(3, 7, dtype=dtype), steps=steps, **options)


def same(one, other):
    assert list(one.report) == list(other.report)
    for name in one.report:
        assert torch.equal(one.log_volume[name], other.log_volume[name])
        assert torch.equal(one.report[name].singular_values, other.report[name].singular_values)
        assert (one.report[name].estimand, one.report[name].rank_tolerance) == (
            other.report[name].estimand,
            other.report[name].rank_tolerance,
        )
    for key in ("predictions", "entropy", "margin", "confidence"):
        assert torch.equal(getattr(one, key), getattr(other, key))
