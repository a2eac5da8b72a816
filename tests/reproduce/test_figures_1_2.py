"""Figures 1 and 2 from their commands: the closed form beside the measurement, quirks, refusals."""

import json

import matplotlib.image
import pytest
import torch

import torchgeom_probe as tgp
from torchgeom_probe.cli.main import main
from torchgeom_probe.reproduce import fig1, fig2
from torchgeom_probe.reproduce import run as experiment
from torchgeom_probe.reproduce.run import Settings

pytest.importorskip("tensorboard")


@pytest.mark.parametrize("width", [5, 25, 250])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_float32_equals_the_closed_form_to_1e_minus_5_over_the_whole_grid(width, scale):
    torch.manual_seed(width)
    model = fig1.PaperNetwork(2, width, 2)
    with torch.no_grad():
        model.hidden.weight *= scale  # 8: as after 10 000 epochs, when most units are saturated
    found = tgp.scan(model, fig1.the_plane(1.5, 40), layers=[fig1.LAYER], progress=False)
    apart, ratio, count = fig1.disagreement(model, found)
    assert apart <= 1e-5
    assert ratio <= 2
    assert count < 160 if width == 5 else count == 0


def test_the_comparison_sees_a_wrong_measurement():
    model = fig1.PaperNetwork(2, 5, 2)
    plane = fig1.the_plane(1.5, 8)
    found = tgp.scan(model, plane, layers=[fig1.LAYER], progress=False)
    with torch.no_grad():
        model.hidden.weight[0, 0] *= 1.001
    assert fig1.disagreement(model, found)[0] > 1e-5


def test_the_curvature_of_the_maps_is_the_measured_metrics():
    model = fig1.PaperNetwork(2, 7, 2).double()
    plane = tgp.Plane(
        *torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double(), steps=4, coordinates="barycentric"
    )
    found = tgp.scan(model, plane, layers=[fig1.LAYER], progress=False)
    _, ricci = fig1.closed_form(model, found)
    measured = tgp.scalar_curvature(model, plane.points(), layer=fig1.LAYER)  # of J, not J / √n
    assert torch.allclose(ricci.flatten(), 7 * measured, rtol=1e-8)


@pytest.mark.parametrize("figure", [fig1, fig2])
def test_each_quirk_has_a_decision(figure):
    assert len(figure.QUIRKS) >= 5
    for quirk in figure.QUIRKS:
        assert set(quirk) == {"quirk", "decision"}
        assert all(len(text) > 10 for text in quirk.values())


def test_the_slices_of_fig2_reach_all_their_samples():
    data = fig2.load_digits(0)
    line, plane = fig2.views(data, grid=5)
    assert torch.equal(line.slice.points()[0], data.typical(7))
    assert torch.allclose(line.slice.points()[-1], data.typical(6))
    right, up = plane.slice.tangents()
    centre = (data.typical(7) + data.typical(6) + data.typical(1)) / 3
    for (u, v), sample in zip(plane.slice.corners.tolist(), plane.slice.samples, strict=True):
        assert torch.allclose(centre + u * right + v * up, sample, atol=1e-5)  # the origin is not left out
    assert data.train_images.max() == 16  # not rescaled


def test_the_papers_training_of_fig2():
    data = fig2.Digits(torch.zeros(30, 9), torch.arange(30) % 10, torch.zeros(10, 9), torch.arange(10))
    of = fig2.training(
        data,
        width=12,
        epochs=200,
        snapshots=(),
        settings=Settings(preset="paper"),
        name="mnist",
        dtype=torch.float64,
    )
    model = of.model()
    assert isinstance(of.optimizer(model.parameters()), torch.optim.Adam)
    assert next(model.parameters()).dtype == torch.float64
    assert isinstance(model, fig1.PaperNetwork)
    assert of.batch_size == 1000


@pytest.mark.slow
def test_both_figures_from_the_command_line(tmp_path, capsys):
    arguments = ["fig1", "fig2", "--quick", "--epochs", "3", "--gallery", str(tmp_path / "gallery")]
    assert main(["reproduce", *arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for phrase in (
        "ok    √det g measured in float32 against the closed form",
        "sinusoid, 25 sigmoid units, plane: sigmoid",
        "xor, 25 sigmoid units, plane: sigmoid",
        "the untrained network: ρ",
        "digits, line: sigmoid",
        "fig2: the hypothesis is supported in",
    ):
        assert phrase in printed
    for name, pictures in (("fig1", ["volumes", "xor_25"]), ("fig2", ["line", "plane"])):
        stored = json.loads((tmp_path / name / "results.json").read_text())
        assert stored["quirks"]
        for test in stored["magnification"]:
            assert test["sentence"] in printed
            assert test["initial"] is not None
        for picture in pictures:
            assert matplotlib.image.imread(tmp_path / name / f"{picture}.png")[..., :3].std() > 0.05
    assert json.loads((tmp_path / "fig1" / "results.json").read_text())["checks"]["closed_form"]["ok"]
    assert {p.name for p in (tmp_path / "gallery").iterdir()} == {
        "fig1_volumes.png",
        "fig2_line.png",
        "fig2_plane.png",
    }


def test_what_the_command_refuses(tmp_path, capsys, monkeypatch):
    assert main(["reproduce", "fig1", "fig9", "--out", str(tmp_path / "o")]) == 1
    assert "there is no figure 'fig9'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()  # said before fig1 was begun

    import torchvision

    def refused(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "MNIST", refused)
    assert main(["reproduce", "fig2", "--preset", "paper", "--out", str(tmp_path)]) == 1
    assert "reproduce fig2 --preset embedded" in capsys.readouterr().err


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "reproduce", interrupted)
    assert main(["reproduce", "fig1", "--out", str(tmp_path)]) == 130
    assert f"under {tmp_path}, and the same command goes on from there" in capsys.readouterr().err
