"""``torchgeom-probe layers``."""

from torchgeom_probe.cli.main import main


def test_layers_lists_names_and_marks_stages(model_file, capsys):
    assert main(["layers", "--model", f"{model_file}:make"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["*", "body.1", "Tanh", "0"] for line in lines)
    assert [line.split()[1] for line in lines if line.startswith("*")] == ["body.1"]
    assert main(["layers", "--model", "timm:resnet10t", "--match", "layer?"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("*")] == [
        f"layer{i}" for i in range(1, 5)
    ]
