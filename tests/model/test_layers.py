"""From layers= to modules."""

import models
import pytest
import timm
from torch import nn

from torchgeom_probe.model.layers import close_names, resolve
from torchgeom_probe.model.stages import stage_layers

MODEL = nn.Sequential()
MODEL.add_module("stem", nn.Linear(2, 3))
MODEL.add_module("layer1", nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 7))))
MODEL.add_module("layer2", nn.Sequential(nn.Linear(7, 11), nn.Sequential(nn.ReLU(), nn.Linear(11, 13))))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", [""]),
        ("layer1.1", ["layer1.1"]),
        ("layer*", ["layer1", "layer2"]),
        ("layer*.1.1", ["layer1.1.1", "layer2.1.1"]),
        ("layer*.1", ["layer1.1", "layer2.1"]),
        ("**.1", ["layer1.1", "layer1.1.1", "layer2.1", "layer2.1.1"]),
        ("layer1.**", ["layer1.0", "layer1.1", "layer1.1.0", "layer1.1.1"]),
        ("layer?", ["layer1", "layer2"]),
        ("auto", ["layer1", "layer2"]),
        (nn.ReLU, ["layer1.1.0", "layer2.1.0"]),
        (MODEL.layer2, ["layer2"]),
        (
            lambda name, module: isinstance(module, nn.Linear) and module.out_features > 6,
            ["layer1.1.1", "layer2.0", "layer2.1.1"],
        ),
        (["layer2", MODEL.stem, "layer1*"], ["stem", "layer1", "layer2"]),
        (["layer1", "layer1", MODEL.layer1], ["layer1"]),
        ("module.layer1", ["layer1"]),
        ("_orig_mod.layer1", ["layer1"]),
    ],
    ids=lambda v: str(v)[:20] if not callable(v) else "callable",
)
def test_resolve(spec, expected):
    found = resolve(MODEL, spec)
    assert list(found) == expected
    assert all(MODEL.get_submodule(name) is module for name, module in found.items())


def test_a_module_under_two_names_is_hooked_once():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert list(resolve(model, ["a", "b"])) == ["a"]
    assert list(resolve(model, "b")) == ["b"]


def test_stages_of_timm_models_of_wrapped_ones_and_of_a_lone_layer():
    assert stage_layers(timm.create_model("resnet10t")) == ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert stage_layers(models.vit()) == [f"blocks.{i}" for i in range(3)]
    assert stage_layers(nn.Sequential(MODEL)) == ["0.layer1", "0.layer2"]
    assert stage_layers(nn.Linear(2, 3)) == [""]
    assert stage_layers(nn.ReLU()) == [""]


def test_close_names():
    assert close_names("layer22", ["stem", "layer2", "layer1"])[0] == "layer2"
    assert close_names("net.attn", ["stem", "blocks.0.attn"]) == ["blocks.0.attn"]
    assert close_names("zzz", ["stem"]) == []
