"""``torchgeom-probe scan``: the line or the plane between photographs through a network; nothing is trained."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.files import write_json
from torchgeom_probe.model.layers import LayerSpec
from torchgeom_probe.plotting.files import save
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.scan import scan
from torchgeom_probe.slices.slice import Line, Plane

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
    """Scan the line between two photographs, or the plane through three, and write maps of every layer with statistics.

    The volumes are exact on the slice (its own tangents).  Under ``out``: ``scan.safetensors``
    (:meth:`SliceScan.load` reads it), ``line`` or ``plane`` as ``.png`` and ``.pdf``, ``magnification.json``.  Called
    again after a kill it goes on where it was.

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
        ProbeError: other than two or three images; what :func:`~torchgeom_probe.scan` refuses; a missing optional
            package.

    """
    optional("matplotlib", extra="figures")
    photographs = _read(images)
    pictures = [_middle(photograph, size) for photograph in photographs]
    samples = (_normalised(pictures) if loaded is None else loaded.batch(photographs)).to(device)
    a, b, *rest = samples
    on = Plane(a, b, rest[0], steps=grid or 24) if rest else Line(a, b, steps=grid or 64)
    kind = type(on).__name__.lower()
    model = model.eval().to(device)
    found = scan(model, on, layers=layers, batch_size=batch_size, path=out / "scan.safetensors")

    names = _class_names(loaded)
    with torch.no_grad():
        own = model(samples).argmax(1).tolist()
    for letter, path, label in zip("abc", images, own, strict=False):
        say(f"{letter}: {Path(path).name}, predicted {names[label] if names else f'class {label}'}")
    statistics = {}
    for layer in found.report:
        try:
            statistics[layer] = str(found.magnification(layer))
            say(f"On this {kind}, {statistics[layer]}.")
        except ProbeError as error:  # a constant entropy, a layer without finite volumes: said, and the others go on
            statistics[layer] = str(error)
            say(statistics[layer])
    note = (
        "These correlations have no control: nothing here tells what training did from what the architecture alone "
        "does.  Scan the same photographs with the untrained network into another --out and compare."
        if trained
        else "These weights are untrained: what correlates here does so without any training."
    )
    say(note)
    drawn, names = _few_classes(found, own, names)
    stems = [Path(path).stem for path in images]
    title = "From {} to {}" if len(stems) == 2 else "The plane of {}, {} and {}"
    options: dict[str, Any] = {"images": pictures, "class_names": names, "unit": "log10", "log_entropy": True}
    figure = plot(drawn, title=title.format(*stems), **options)
    written = [save(figure, out / f"{kind}{ending}") for ending in (".png", ".pdf")]
    record = {"images": [Path(p).name for p in images], "magnification": statistics, "note": note}
    written += [out / "scan.safetensors", write_json(out / "magnification.json", record)]
    say(f"Wrote {', '.join(map(str, written))}.")
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
    return dataclasses.replace(found, predictions=drawn), [*words, "other"]


def _class_names(loaded: PretrainedModel | None) -> list[str] | None:
    """Short words for the classes: ImageNet's first name of each."""
    if loaded is None or loaded.descriptions is None:
        return None
    return [words.split(",")[0] for words in loaded.descriptions]
