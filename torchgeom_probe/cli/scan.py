"""``torchgeom-probe scan``: the line or the plane between photographs through a network; nothing is trained."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchgeom_probe.cli.models import add_layers, add_model, is_trained, model_of, probe_options
from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.files import write_json
from torchgeom_probe.plotting.files import save
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.scan import scan
from torchgeom_probe.slices.slice import Line, Plane

if TYPE_CHECKING:
    from PIL import Image

# ImageNet's, which torchvision's weights are trained with.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# More names do not fit under a map, and more outlines hide it.
_DRAWN_CLASSES = 6
_CONTROL = (
    "One slice illustrates, and has no control here: nothing tells what training did from what the architecture alone "
    "does.  The test, over many pairs of images:  torchgeom-probe boundary"
)
_UNTRAINED = "These weights are untrained: what correlates here does so without any training."


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser(
        "scan",
        help="the line or plane between two or three photographs through a network: maps of every stage (needs 'all')",
        description="No training.  Stopped or killed, the same command goes on where it was.",
    )
    add_model(parser)
    parser.add_argument(
        "--images", nargs="+", required=True, metavar="PATH", help="two image files: a line; three: a plane"
    )
    add_layers(parser)
    parser.add_argument("--grid", type=int, help="points of the line (default 64), or along a side of the plane (24)")
    parser.add_argument(
        "--size", type=int, default=224, help="pixels a side, for models that timm does not know (default 224)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="points a chunk (default 16)")
    parser.add_argument("--out", type=Path, default=Path("torchgeom_runs/scan"), metavar="DIR")
    parser.set_defaults(run=run, resumes=True)


def run(arguments: argparse.Namespace) -> None:
    """Scan the line between two photographs, or the plane through three, and write maps of every layer with statistics.

    The volumes are exact on the slice (its own tangents).  Under ``--out``: ``scan.safetensors``
    (:meth:`SliceScan.load` reads it), ``line`` or ``plane`` as ``.png`` and ``.pdf``, ``magnification.json``.  A model
    without a preprocessing of its own gets the middle square, at ``--size`` pixels a side, normalised as for
    torchvision's weights.
    """
    optional("matplotlib", extra="figures")
    model, loaded = model_of(arguments)
    photographs = _read(arguments.images)
    pictures = [_middle(photograph, arguments.size) for photograph in photographs]
    samples = (_normalised(pictures) if loaded is None else loaded.batch(photographs)).to(arguments.device)
    a, b, *rest = samples
    on = Plane(a, b, rest[0], steps=arguments.grid or 24) if rest else Line(a, b, steps=arguments.grid or 64)
    model, out = model.eval(), arguments.out
    path = out / "scan.safetensors"
    found = scan(model, on, batch_size=arguments.batch_size, path=path, **probe_options(arguments))

    described = None if loaded is None else loaded.descriptions
    names = None if described is None else [words.split(",")[0] for words in described]
    with torch.no_grad():
        own = model(samples).argmax(1).tolist()
    for letter, image, label in zip("abc", arguments.images, own, strict=False):
        print(f"{letter}: {Path(image).name}, predicted {names[label] if names else f'class {label}'}")
    statistics, note = _statistics(found), _CONTROL if is_trained(arguments) else _UNTRAINED
    print(note)
    drawn, names = _few_classes(found, own, names)
    title = "The plane of {}, {} and {}" if rest else "From {} to {}"
    options: dict[str, Any] = {"images": pictures, "class_names": names, "log_entropy": True}
    figure = plot(drawn, title=title.format(*(Path(image).stem for image in arguments.images)), **options)
    written = [save(figure, out / f"{type(on).__name__.lower()}{ending}") for ending in (".png", ".pdf")]
    record = {"images": [Path(p).name for p in arguments.images], "magnification": statistics, "note": note}
    written += [path, write_json(out / "magnification.json", record)]
    print(f"Wrote {', '.join(map(str, written))}.")


def _statistics(found: SliceScan) -> dict[str, str]:
    """The sentence of every layer, said as it is found."""
    statistics = {}
    for layer in found.report:
        try:
            statistics[layer] = str(found.magnification(layer))
            print(f"{statistics[layer]}.")
        except ProbeError as error:  # a constant entropy, a layer without finite volumes: said, and the others go on
            statistics[layer] = str(error)
            print(statistics[layer])
    return statistics


def _read(paths: Sequence[str | os.PathLike[str]]) -> list[Image.Image]:
    if len(paths) not in (2, 3):
        raise ProbeError(
            f"a line goes through two photographs and a plane through three; got {len(paths)}.\n"
            "Write:  --images a.jpg b.jpg c.jpg"
        )
    read_images = optional("torchgeom_probe.integrations.timm", extra="timm").read_images
    found = [read_images(path) for path in paths]
    for path, one in zip(paths, found, strict=True):
        if len(one) != 1:
            seen = f"{path} is a directory of {len(one)} images."
            raise ProbeError(f"{seen}\nName the files:  --images a.jpg b.jpg c.jpg")
    return [one[0] for one in found]


def _middle(image: Image.Image, size: int) -> Tensor:
    """The middle square of a photograph, [3, size, size] in [0, 1]."""
    side = min(image.size)
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), resample=3)  # bicubic
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255


def _normalised(pictures: Sequence[Tensor]) -> Tensor:
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _DEVIATION))
    return torch.stack([(picture - mean) / deviation for picture in pictures])


def _few_classes(found: SliceScan, own: Sequence[int], names: list[str] | None) -> tuple[SliceScan, list[str] | None]:
    """A scan of many predicted classes as one of few to draw: the photographs' own, the commonest, and "other"."""
    present, counts = found.predictions.unique(return_counts=True)
    if len(present) <= _DRAWN_CLASSES:
        return found, names
    common = present[counts.argsort(descending=True, stable=True)].tolist()
    kept = list(dict.fromkeys([*own, *common]))[: _DRAWN_CLASSES - 1]
    drawn = torch.full_like(found.predictions, len(kept))
    for index, label in enumerate(kept):
        drawn[found.predictions == label] = index
    words = [names[label] if names and label >= 0 else f"class {label}" for label in kept]
    return replace(found, predictions=drawn), [*words, "other"]
