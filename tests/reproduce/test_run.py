"""The figures from their names and from their command."""

import json

import matplotlib.image
import pytest

from torchgeom_probe.cli.main import main
from torchgeom_probe.reproduce.results import quirks
from torchgeom_probe.reproduce.run import FIGURES, reproduce
from torchgeom_probe.reproduce.settings import Settings
from torchgeom_probe.reproduce.training import Trained

pytest.importorskip("timm")
pytest.importorskip("lightly")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")


@pytest.mark.parametrize("figure", [f for f in FIGURES if f != "regimes"])  # which is not the paper's
def test_each_quirk_has_a_decision(figure):
    assert len(quirks(figure)) >= 5
    for quirk in quirks(figure):
        assert set(quirk) == {"quirk", "decision"}
        assert all(len(text) > 10 for text in quirk.values())


@pytest.mark.slow
def test_both_figures_from_the_command_line(tmp_path, capsys):
    arguments = ["fig1", "fig2", "--quick", "--epochs", "3", "--gallery", str(tmp_path / "gallery")]
    assert main(["reproduce", *arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for phrase in (
        "ok    √det g measured in float32 against the closed form",
        "sinusoid_25, plane: sigmoid, on this one slice",
        "xor_25, plane: sigmoid, on this one slice",
        "sinusoid_25: sigmoid: ",
        "over 3 networks",
        "digits: test accuracy",
        "| digits, sigmoid |",
    ):
        assert phrase in printed
    for name, pictures in (("fig1", ["volumes", "xor_25"]), ("fig2", ["line", "plane"])):
        stored = json.loads((tmp_path / name / "results.json").read_text())
        assert stored["quirks"]
        for test in (*stored["slices"], *stored["studies"]):
            assert test["sentence"] in printed
            assert test["initial"] is not None
        for picture in pictures:
            assert matplotlib.image.imread(tmp_path / name / f"{picture}.png")[..., :3].std() > 0.05
    assert json.loads((tmp_path / "fig1" / "results.json").read_text())["checks"]["closed_form"]["ok"]
    assert {p.name for p in (tmp_path / "gallery").iterdir()} == {
        *("fig1_volumes.png", "fig1_sinusoid_25_profile.png"),
        *("fig2_line.png", "fig2_plane.png", "fig2_digits_profile.png"),
    }


@pytest.mark.slow
def test_the_four_figures_in_quick_form(tmp_path, monkeypatch):
    said, epochs, one_epoch = [], [], Trained._one_epoch
    monkeypatch.setattr(Trained, "_one_epoch", lambda of: (epochs.append(of.name), one_epoch(of))[1])
    settings = Settings(quick=True, out=tmp_path, gallery=tmp_path / "gallery")
    reproduce(["fig3", "fig4", "fig5", "fig6"], settings, say=said.append)
    for figure, slices, studies in (("fig3", 2, 8), ("fig4", 9, 8), ("fig5", 8, 4), ("fig6", 4, 4)):
        results = json.loads((tmp_path / figure / "results.json").read_text())
        assert len(results["slices"]) == slices
        assert len(results["studies"]) == studies or results["refused"]
        assert len(results["quirks"]) >= 8
    # fig3 and fig4 are of the same trainings, and so are fig5 and fig6.
    assert sorted(epochs) == ["photos_barlow", "photos_gelu", "photos_relu"]
    assert sum(line.startswith("photos_gelu: layer1: ") for line in said) <= 1  # and said once
    pictures = {p.name for p in tmp_path.glob("fig*/*.p*")}
    assert {"plane_gelu.png", "blocks.pdf", "line_motorcycle_cat.png", "plane.png"} <= pictures
    sizes = [p.stat().st_size for p in (tmp_path / "gallery").glob("*.png")]
    assert len(sizes) in (4, 5)  # with fig4's profile, if one epoch was enough for two classes
    assert max(sizes) < 150_000
