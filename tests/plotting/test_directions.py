"""Directions as pictures, and the verb."""

import pytest
import torch
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.cli.main import main


def test_a_row_a_layer_and_what_cannot_be_drawn():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.Tanh()), torch.randn(2, 3, 4, 4)
    report = tgp.measure(model, x, layers=["1", "2"], estimator=tgp.Directions(k=3))
    figure = tgp.plot_directions(report, x, k=2, sample=1)
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == 1 + 2 * 2
    sigma = report["2"].singular_values[1]
    assert [axes.get_title() for axes in drawn[-2:]] == [f"σ = {float(s):.3g}" for s in sigma[:2]]
    pixels = torch.from_numpy(drawn[-1].images[0].get_array().data).permute(2, 0, 1)
    vector = report["2"].directions()[1, 1]
    torch.testing.assert_close(pixels, 0.5 + vector / (2 * vector.abs().max()))
    for picture, sample in ((x.flatten(1), 0), (x, 2)):
        with pytest.raises(tgp.ProbeError, match="is no picture"):
            tgp.plot_directions(report, picture, sample=sample)
    with pytest.raises(tgp.ProbeError, match="of other samples than x"):
        tgp.plot_directions(report, x[:1])


def test_the_verb(tmp_path, capsys):
    factory = tmp_path / "own.py"
    factory.write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(48, 60), nn.Tanh())\n"
    )
    command = ["directions", "--model", f"{factory}:make", "--input-shape", "3,4,4", "--layers", "2", "--batch", "2"]
    assert main([*command, "-k", "2", "--smallest", "--out", str(tmp_path / "out")]) == 0
    assert "2 smallest singular values" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    report = tgp.GeometryReport.load(tmp_path / "out" / "directions.safetensors")
    assert report["2"].directions().shape == (2, 2, 3, 4, 4)
