"""A study as one figure: the curves, bands and titles are the study's numbers, in either unit."""

import math

import numpy as np
import pytest
import torch
from annotations import shapes_unchecked
from torch import nn

import torchgeom_probe as tgp


@pytest.fixture(scope="module")
def study():
    torch.manual_seed(0)

    def net():
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 11), nn.Tanh(), nn.Linear(11, 7))

    x = 2 * torch.randn(150, 5)
    options = {"layers": ["1", "3"], "initial": net(), "pairs": 20, "estimator": "subspace:1", "progress": False}
    return tgp.boundary_study(net(), x, offsets=(-0.3, -0.1, 0.2), **options)


@pytest.mark.parametrize("unit", ["nat", "log10"])
def test_curves_and_bands_are_the_profiles(study, unit):
    figure = tgp.plot(study, unit=unit, title="A study")
    scale = 1 if unit == "nat" else 1 / math.log(10)
    for axes, (name, effect) in zip(figure.axes, study.items(), strict=True):
        untrained, trained = (line for line in axes.lines if line.get_marker() == "o")
        bands = [band.get_paths()[0].vertices[:, 1] for band in axes.collections]
        profiles = (effect.initial_profile, effect.profile)
        for line, band, profile in zip((untrained, trained), bands, profiles, strict=True):
            assert np.allclose(line.get_xdata(), sorted(profile))
            assert np.allclose(line.get_ydata(), scale * np.array(list(profile.values())))
            ends = [scale * end for value in profile.values() for end in value.interval]
            assert (band.min(), band.max()) == pytest.approx((min(ends), max(ends)))
        assert (untrained.get_label(), trained.get_label()) == ("untrained", "trained")
        assert axes.get_title().startswith(f"layer {name}\n{scale * float(effect.estimate):+.2f}"[:11])
        assert f"] {unit}, p" in axes.get_title()
    assert f"[{unit}]" in figure.axes[0].get_ylabel()
    assert figure.get_suptitle().strip() == "A study"
    assert "signed distance from the boundary" in figure.get_supxlabel()


def test_some_layers_alone_and_one_network_alone(study):
    assert [axes.get_title().split("\n")[0] for axes in tgp.plot(study, layers="3").axes] == ["layer 3"]
    bare = tgp.BoundaryStudy(
        {"1": tgp.BoundaryEffect.of(study["1"].record() | {"initial": None, "initial_profile": None})}, settings={}
    )
    (axes,) = tgp.plot(bare).axes
    assert [line.get_label() for line in axes.lines if line.get_marker() == "o"] == ["the network"]
    with pytest.raises(tgp.ProbeError, match="There are the layers"):
        tgp.plot(study, layers=["7"])
    with shapes_unchecked(), pytest.raises(tgp.ProbeError, match="unit='bit' is unknown"):
        tgp.plot(study, unit="bit")
