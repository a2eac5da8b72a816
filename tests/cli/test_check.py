"""``torchgeom-probe check``."""

from torchgeom_probe.cli.main import main


def test_check_says_ok_or_why_not(model_file, capsys):
    assert main(["check", "--model", f"{model_file}:make", "--layers", "**"]) == 0
    assert "OK: engine fused" in capsys.readouterr().out
    assert main(["check", "--model", f"{model_file}:cut", "--layers", "head"]) == 1
    assert "NOT OK" in capsys.readouterr().out


def test_quiet_leaves_the_exit_status_and_the_errors(model_file, capsys):
    for layers, status in (("**", 0), ("nothing", 1)):
        assert main(["check", "--model", f"{model_file}:make", "--layers", layers, "--quiet"]) == status
        printed = capsys.readouterr()
        assert printed.out == ""
        assert ("no layer 'nothing'" in printed.err) == bool(status)
        assert bool(printed.err) == bool(status)
