"""What the settings refuse."""

import pytest

import torchgeom_probe as tgp
from torchgeom_probe.reproduce.settings import Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "pocket"}, "preset='pocket' is unknown"),
        ({"seeds": 2}, r"--seeds 2: a study is of one network, or compares 3 or more"),
        ({"epochs": 0}, "--epochs 0 trains nothing"),
        ({"device": "cuda:99"}, r"--device cuda:99 is not to be had here.*\nWrite --device cpu"),
    ],
)
def test_settings_refuse(options, message):
    with pytest.raises(tgp.ProbeError, match=message):
        Settings(**options)
