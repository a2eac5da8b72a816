"""``torchgeom-probe scan``: the line or the plane between photographs through a network, from files to maps; nothing is trained."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.model.layers import LayerSpec
from torchgeom_probe.shapes import Float, Tensor
from torchgeom_probe.slices.scan import Line, Plane, SliceScan, scan

if TYPE_CHECKING:
    from PIL import Image

    from torchgeom_probe.integrations.timm import PretrainedModel

# ImageNet's, which torchvision's weights are trained with.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# More names do not fit under a map, and more outlines hide it.
_DRAWN_CLASSES = 6


def scan_photographs(
    model: nn.Module,
    images: Sequence[str | os.PathLike[str]],
    *,
    loaded: PretrainedModel | None = None,
    trained: bool = True,
    layers: LayerSpec = "auto",
    grid: int | None = None,
    batch_size: int = 16,
    size: int = 224,
    device: str = "cpu",
    out: Path = Path("torchgeom_runs/scan"),
    say: Callable[[str], None] = print,
) -> SliceScan:
    """Scan the line between two photographs, or the plane through three, and write maps of every layer with the statistics.

    The volumes are exact on the slice (its own tangents).  Under ``out``: ``scan.safetensors`` (:meth:`SliceScan.load` reads
    it), ``line`` or ``plane`` as ``.png`` and ``.pdf``, ``magnification.json``.  Called again after a kill it goes on where it was.

    Args:
        model: the network; its output is logits.
        images: two or three image files.
        loaded: the model's own preprocessing; None: the middle square, at ``size`` pixels a side, normalised as for
            torchvision's weights.
        trained: whether the weights are trained ones; only said.
        layers: which; "auto": the stages.
        grid: points of the line (64), or along a side of the plane (24).
        batch_size: points a chunk.
        size: of the input of a model without a preprocessing of its own.
        device: where.
        out: the directory.
        say: prints a line.

    Raises:
        ProbeError: other than two or three images; what :func:`~torchgeom_probe.scan` refuses; a missing optional package.

    """
    figures = optional("torchgeom_probe.plotting.figures", extra="figures")
    optional("matplotlib", extra="figures")
    photographs = _read(images)
    pictures = [_middle(photograph, size) for photograph in photographs]
    samples = (_normalised(pictures) if loaded is None else loaded.batch(photographs)).to(device)
    model = model.eval().to(device)
    if len(samples) == 2:
        on: Line | Plane = Line(samples[0], samples[1], steps=grid or 64)
    else:
        on = Plane(samples[0], samples[1], samples[2], steps=grid or 24)
    kind = type(on).__name__.lower()
    found = scan(model, on, layers=layers, batch_size=batch_size, path=out / "scan.safetensors")

    names = _class_names(loaded)
    own = _classes(model, samples)
    for letter, path, label in zip("abc", images, own, strict=False):
        say(f"{letter}: {Path(path).name}, predicted {names[label] if names else f'class {label}'}")
    statistics = {}
    for layer in found.report:
        try:
            statistic = found.magnification(layer)
        except (
            ProbeError
        ) as error:  # a constant entropy, a layer without finite volumes: said, and the others go on
            statistics[layer] = str(error)
            say(str(error))
            continue
        statistics[layer] = str(statistic)
        say(f"On this {kind}, {statistic}.")
    note = (
        "These correlations have no control: nothing here tells what training did from what the architecture alone does.  Scan the "
        "same photographs with the untrained network into another --out and compare."
        if trained
        else "These weights are untrained: what correlates here does so without any training."
    )
    say(note)
    shown, names = _few_classes(found, own, names)
    options: dict[str, Any] = {"images": pictures, "class_names": names, "unit": "log10"}
    if isinstance(on, Plane):
        options["log_entropy"] = True
    drawn = shown.plot(title=_title(images), **options)
    written = [figures.save(drawn, out / f"{kind}{ending}") for ending in (".png", ".pdf")]
    record = {"images": [Path(p).name for p in images], "magnification": statistics, "note": note}
    (out / "magnification.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    say(f"Wrote {', '.join(map(str, written))}, {out / 'scan.safetensors'} and {out / 'magnification.json'}.")
    return found


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
            raise ProbeError(
                f"{path} is a directory of {len(one)} images.\nName the files:  --images a.jpg b.jpg c.jpg"
            )
    return [one[0] for one in found]


def _middle(image: Image.Image, size: int) -> Float[Tensor, "3 size size"]:
    """The middle square of a photograph, in [0, 1]."""
    side = min(image.size)
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), resample=3)  # bicubic
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255


def _normalised(pictures: Sequence[Tensor]) -> Float[Tensor, "samples 3 height width"]:
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _DEVIATION))
    return torch.stack([(picture - mean) / deviation for picture in pictures])


@torch.no_grad()
def _classes(model: nn.Module, samples: Tensor) -> list[int]:
    return model(samples).argmax(1).tolist()


def _few_classes(
    found: SliceScan, own: Sequence[int], names: list[str] | None
) -> tuple[SliceScan, list[str] | None]:
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
    return dataclasses.replace(found, predictions=drawn), [*words, "other"]


def _class_names(loaded: PretrainedModel | None) -> list[str] | None:
    """Short words for the classes: ImageNet's first name of each."""
    if loaded is None or loaded.descriptions is None:
        return None
    return [words.split(",")[0] for words in loaded.descriptions]


def _title(images: Sequence[str | os.PathLike[str]]) -> str:
    stems = [Path(path).stem for path in images]
    return (
        f"From {stems[0]} to {stems[1]}"
        if len(stems) == 2
        else f"The plane of {stems[0]}, {stems[1]} and {stems[2]}"
    )
