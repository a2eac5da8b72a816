"""How ``--model``, ``--checkpoint`` and ``--estimator`` are read."""

import argparse

import pytest

import torchgeom_probe as tgp
from torchgeom_probe.cli.main import main
from torchgeom_probe.cli.models import estimator_of, is_trained, study_options


def test_a_tag_names_weights_that_are_fetched_or_given(tmp_path, monkeypatch, capsys):
    import timm
    import torch
    from PIL import Image

    asked, create = [], timm.create_model

    def no_network(name, pretrained=False, **options):
        asked.append(pretrained)
        if pretrained:
            raise FileNotFoundError("An error happened while trying to locate the file on the Hub\nmore")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", no_network)
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in (("a.png", (40, 30)), ("b.JPG", (9, 50))):
        Image.new("RGB", size, "red").save(folder / name)
    (folder / "labels.csv").write_text("no image")
    command = ["measure", "--images", str(folder), "-k", "2", "--layers", "layer4", "--model"]
    assert main([*command, "timm:test_resnet.r160_in1k"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("torchgeom-probe: the weights of timm:test_resnet.r160_in1k could not be fetched: FileNot")
    assert "--checkpoint model.pth" in said
    assert "--model timm:test_resnet\n" in said

    assert main([*command, "timm:test_resnet"]) == 0
    printed = capsys.readouterr().out
    assert "2 samples in" in printed
    assert "The weights are random" in printed
    torch.save(create("test_resnet").state_dict(), tmp_path / "model.pth")
    assert main([*command, "timm:test_resnet.r160_in1k", "--checkpoint", str(tmp_path / "model.pth")]) == 0
    assert "weights are random" not in capsys.readouterr().out
    assert main(["layers", "--model", "timm:test_resnet.r160_in1k"]) == 0
    assert asked == [True, False, False, False]


@pytest.mark.parametrize(
    ("estimator", "k", "expected"),
    [
        ("subspace", None, tgp.Subspace(seed=5)),
        ("subspace", 3, tgp.Subspace(k=3, seed=5)),
        ("subspace:k=3,seed=1", None, tgp.Subspace(k=3, seed=1)),
        ("topk", 4, tgp.TopK(k=4, seed=5)),
        ("topk:10", None, tgp.TopK(k=10, seed=5)),
        ("exact", 3, tgp.Exact()),
        ("trace", None, tgp.Trace(seed=5)),
    ],
)
def test_estimators_are_read_from_their_names(estimator, k, expected):
    assert estimator_of(argparse.Namespace(estimator=estimator, k=k, seed=5)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("volume", "estimator='volume' is unknown; there are auto, directions, exact, "),
        ("topk:rank=3", "TopK has no argument 'rank'"),
        ("exact:3", "Exact takes no argument"),
    ],
)
def test_an_estimator_that_is_none_is_refused(text, said, model_file, capsys):
    assert main(["measure", "--model", f"{model_file}:make", "--estimator", text]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("timm:resnet18", {}, False),
        ("timm:resnet18.a1_in1k", {}, True),
        ("timm:resnet18", {"pretrained": True}, True),
        ("timm:resnet18", {"checkpoint": "weights.pt"}, True),
        ("efficientnet-lite0", {}, True),
        ("net.py:make", {}, False),
    ],
)
def test_trained_weights_are_known_from_the_command(model, options, expected):
    given = {"model": model, "pretrained": False, "checkpoint": None, **options}
    assert is_trained(argparse.Namespace(**given)) is expected


def test_crops_of_one_photograph_are_one_group(tmp_path):
    pytest.importorskip("timm")
    from PIL import Image

    for name in ("12_a.png", "12_b.png", "7_a.png", "odd.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    arguments = argparse.Namespace(images=[str(tmp_path)], group=r"^(\d+)_", pairs=10, share=True, seed=1)
    options = study_options(arguments)
    assert options == {"groups": ["12", "12", "7", "image 3"], "pairs": 10, "share": True, "seed": 1}
    arguments.group = r"^(\d+)_|^(od+)"
    assert study_options(arguments)["groups"] == ["12", "12", "7", "odd"]
    for pattern, match in (
        (r"^photo", "is in no image's name: 12_a.png, 12_b.png, 7_a.png"),
        ("(", "regular expression"),
    ):
        arguments.group = pattern
        with pytest.raises(tgp.ProbeError, match=match):
            study_options(arguments)
    arguments.group = None
    assert study_options(arguments)["groups"] is None
