"""``torchgeom-probe evaluate``: a page of what there is to say, and of the rest why it is left out."""

import json
import re
import runpy

import numpy as np
import pytest
import torch
from PIL import Image

from torchgeom_probe.cli.main import main

_FILE = """
import torch
from torch import nn

torch.manual_seed(0)
images = torch.rand(80, 3, 12, 12)
tokens = torch.randint(0, 20, (12, 5))

def pictures():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(800, 5))

def text():
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 3))
"""


@pytest.fixture
def page(tmp_path):
    """Run the verb; returns the page and its record."""
    (tmp_path / "nets.py").write_text(_FILE)

    def run(*argv, factory="pictures"):
        argv = [str(a) for a in argv]
        model = argv if "--model" in argv else ["--model", f"{tmp_path / 'nets.py'}:{factory}", *argv]
        assert main(["evaluate", *model, "--out", str(tmp_path / "out"), "--few", "2"]) == 0
        text = (tmp_path / "out" / "page.md").read_text()
        for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
            assert (tmp_path / "out" / picture).stat().st_size > 500, picture
        return text, json.loads((tmp_path / "out" / "page.json").read_text())

    return run


def test_every_section_of_a_classifier_of_pictures(page, tmp_path):
    text, record = page("--data", f"{tmp_path / 'nets.py'}:images", "--layers", "0", "1", "--pairs", "20")
    (sections,) = record.values()
    left_out = {title for title, found in sections.items() if "left out" in found}
    assert left_out == {"Extremes"}, sections  # a tensor has no files to show
    assert text.count("By chance") + text.count("by chance") >= 3
    assert set(sections["Invariances"]["1"]) == {"shift", "zoom", "flip", "contrast", "brightness", "blur"}
    # A shift of white noise is white noise: the network feels it as it feels a random direction, to a tenth.
    assert abs(sections["Invariances"]["0"]["shift"]) < 0.5
    assert sections["Directions"]["direction_error"]["0"] < 5e-2  # less than three degrees
    images = runpy.run_path(str(tmp_path / "nets.py"))
    jacobian = torch.func.jacrev(lambda z: images["pictures"]()[:1](z[None])[0])(images["images"][0])
    sigma = torch.linalg.svdvals(jacobian.reshape(800, -1)) / 800**0.5
    measured = sections["Spectra"]["0"]["singular_values"]  # a convolution has the same at every sample
    short = sigma[:10].log() - torch.tensor(measured).log()
    assert short.min() > -1e-4
    assert short.sum() <= 0.3  # where TopK stops


def test_a_text_model_has_a_page_without_pictures_of_it(page, tmp_path):
    arguments = "--data", f"{tmp_path / 'nets.py'}:tokens", "--source", "0", "--layers", "2"
    text, record = page(*arguments, factory="text")
    (sections,) = record.values()
    assert "left out" not in sections["Volumes"]
    assert "left out" not in sections["Volume and margin"]
    assert {"Invariances", "Extremes", "Decision boundaries"} <= {t for t, s in sections.items() if "left out" in s}
    assert text.count("Left out: ") >= 3


@pytest.mark.slow
def test_two_networks_side_by_side_and_names_with_markup(page, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i}_<b>*x*.png")
    other = tmp_path / "other.pth"
    torch.save(pytest.importorskip("timm").create_model("test_resnet").state_dict(), other)
    model = "timm:test_resnet"
    arguments = "--model", model, "--against", other, "--images", folder, "--group", r"^(\d)"
    text, record = page(*arguments, "--layers", "layer3")
    assert list(record) == [model, f"{model} (other.pth)"]
    assert record[model]["Volumes"] != record[f"{model} (other.pth)"]["Volumes"]
    assert "left out" not in record[model]["Extremes"]
    assert "<b>" not in text
    assert "\\*x\\*" in text
    assert "![volumes](first/volumes.png)" in text
    assert "![volumes](against/volumes.png)" in text
