"""``torchgeom-probe reproduce``: what it refuses, and stopped."""

from torchgeom_probe.cli.main import main
from torchgeom_probe.reproduce import run


def test_what_the_command_refuses(tmp_path, capsys, monkeypatch):
    assert main(["reproduce", "fig1", "fig9", "--out", str(tmp_path / "o")]) == 1
    assert "there is no figure 'fig9'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()  # said before fig1 was begun

    import torchvision

    def refused(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "MNIST", refused)
    assert main(["reproduce", "fig2", "--preset", "paper", "--out", str(tmp_path)]) == 1
    assert "--data mnist5k" in capsys.readouterr().err


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "reproduce", interrupted)
    assert main(["reproduce", "fig1", "--out", str(tmp_path)]) == 130
    assert f"under {tmp_path}, and the same command goes on from there" in capsys.readouterr().err
