"""What the drawings share: colours, units, classes, pictures of samples, and which scans can be drawn together.

Log-volumes are drawn in viridis and entropies in magma, which are perceptually uniform; unit and normalisation stand in
every figure.  A figure is a ``matplotlib.figure.Figure`` of its own: pyplot is not imported, and no global setting is
read or changed.  matplotlib is imported on the first call; without it: ProbeError with the pip line.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.report import GeometryReport, LayerGeometry
from torchgeom_probe.shapes import Tensor
from torchgeom_probe.slices.result import SliceScan

#: Imports matplotlib, or a module of it, when it is first needed.
mpl = functools.partial(optional, extra="figures")

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is optional: its types are for the type checker alone
    Figure = Any

#: Samples as pictures; "auto" takes them from the slice where they look like pictures; None draws none.
Images = Sequence[Tensor | np.ndarray] | Literal["auto"] | None

BLUE = "#31688e"
SMALL, NORMAL, LARGE = 8.0, 9.5, 12.0
#: The width of a figure in inches at which these letters can be read on a page of the size of a README.
PAGE = 7.2


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; width and height in inches."""
    mpl("matplotlib")
    figure = mpl("matplotlib.figure").Figure(figsize=(width, height), layout="compressed", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)
    return figure


def finish(figure: Any, title: str | None, note: str | None) -> None:
    """Put the title above and the note, in small letters, below."""
    if title is not None:  # with empty lines, which keep it off the edge and the column titles
        lines = "\n\n".join(textwrap.wrap(title, int(9 * figure.get_figwidth())))
        figure.suptitle(f"\n{lines}\n", fontsize=LARGE, linespacing=0.6)
    if note is not None:
        width = int(17 * figure.get_figwidth())
        note = "\n".join(part for line in note.splitlines() for part in textwrap.wrap(line, width))
        figure.supxlabel(note, fontsize=SMALL - 0.5, color="#555555")


def note(report: GeometryReport, layers: Sequence[str]) -> str:
    """Say what the volumes of these layers are: every estimand and normalisation among them, once."""
    slices = "length or area that the layer gives to a unit of the slice (log √det of its metric on the slice)"
    plain, notes = {"log √det VᵀgV, V the given directions": slices}, dict[str, None]()
    for layer in (report[name] for name in layers):
        divided = "; features divided by √(their number)" if layer.normalized else ""
        notes[plain.get(layer.estimand, layer.estimand) + divided] = None
    return "volume: " + " | ".join(notes)


def titled(layer: str) -> str:
    """A layer's name for a panel: "layer 1" of a bare "1"; "model" of the model's own output."""
    return layer if "layer" in layer or "." in layer else f"layer {layer}" if layer else "model"


def factor(unit: str, of: str = "nat") -> float:
    """What a number measured in ``of`` is multiplied by to be drawn in ``unit``; other units than nats stay."""
    if unit not in ("nat", "log10"):
        raise ProbeError(f"unit={unit!r} is unknown.\nWrite unit='nat' (natural log, the default) or unit='log10'.")
    return 1 / math.log(10) if unit == "log10" and of == "nat" else 1.0


def in_unit(layer: LayerGeometry, unit: str) -> np.ndarray:
    """Return a layer's value [B], a log-volume in the unit ``"nat"`` or ``"log10"``."""
    return factor(unit, layer.unit) * layer.value.detach().double().cpu().numpy()


def chosen_layers(layers: Sequence[str] | str | None, known: Sequence[str]) -> list[str]:
    """Return the layers to draw: those named, in their order; None: all."""
    chosen = list(known) if layers is None else [layers] if isinstance(layers, str) else list(layers)
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        missing = ", ".join(map(repr, unknown)) or "none"
        raise ProbeError(f"layers={chosen}: {missing} to draw.\nThere are the layers {list(known)}.")
    return chosen


@dataclass(frozen=True, eq=False)
class Scans:
    """Scans of one slice, and how they are drawn.

    Args:
        scans: what is drawn, in its order.
        names: of the scans.
        layers: which, in which order; None: all.
        images: the samples as pictures [H, W], [1, H, W], [3, H, W] or [H, W, 3]; "auto" takes them from the slice
            where they look like pictures; None draws none.
        class_names: the name of each class index.
        unit: of the log-volumes: ``"nat"`` or ``"log10"``.
        relative: draw each log-volume minus its median over the slice, so that its pattern shows even where training
            has moved its level by more than the pattern's range.
        log_entropy: on planes, the log of the entropy: a confident network's spans many orders.
        decided: on planes, also maps of the predictions and of the entropy.
        title: above the figure.

    Raises:
        ProbeError: no scans, scans of different slices, or a number of names other than that of scans.
    """

    scans: Sequence[SliceScan]
    names: Sequence[str] | None = None
    layers: Sequence[str] | None = None
    images: Images = "auto"
    class_names: Sequence[str] | None = None
    unit: Literal["nat", "log10"] = "nat"
    relative: bool = False
    log_entropy: bool = False
    decided: bool = True
    title: str | None = None

    def __post_init__(self) -> None:
        if not self.scans or not all(isinstance(scan, SliceScan) for scan in self.scans):
            held = ", ".join(dict.fromkeys(type(scan).__name__ for scan in self.scans)) or "nothing"
            raise ProbeError(f"no list of scans: it holds {held}.\nScan first:  tgp.plot([tgp.scan(model, plane)])")
        if len({scan.slice.digest for scan in self.scans}) > 1:
            raise ProbeError(
                "the scans are of different slices, so they cannot be drawn point by point.\n"
                "Scan both networks over one slice:  before = scan(net0, plane, ...); after = scan(net, plane, ...)"
            )
        if self.names is not None and len(self.names) != len(self.scans):
            raise ProbeError(f"{len(self.names)} names for {len(self.scans)} scans: give one each, or None.")

    @property
    def shown(self) -> list[str]:
        """The layers to draw, which every scan has."""
        last = self.scans[-1].report
        return chosen_layers(self.layers, [name for name in last if all(name in scan.report for scan in self.scans)])

    def values(self, layer: str) -> list[np.ndarray]:
        """What was measured of a layer over the slice of every scan; log-volumes in ``unit``."""
        found = [in_unit(scan.report[layer], self.unit).reshape(scan.slice.shape) for scan in self.scans]
        return [v - np.median(v[np.isfinite(v)]) if self.relative and np.isfinite(v).any() else v for v in found]

    def label(self, layer: str) -> str:
        """What stands on the scale of :meth:`values`."""
        geometry, log10 = self.scans[-1].report[layer], self.unit == "log10"
        name, unit = ("log₁₀ √det g" if log10 else "log √det g"), ("" if log10 else " [nat]")
        if geometry.quantity != "log_volume":
            name = geometry.heading if geometry.unit == "nat" else geometry.estimand
            unit = f" [{self.unit if geometry.unit == 'nat' else geometry.unit}]"
        return f"{name}{' − median' if self.relative else ''}{unit}"


def class_colours(present: Sequence[int]) -> dict[str, Any]:
    """Return the colour map and the norm that give each of these classes, ascending, its colour.

    It is the same in every figure: one of matplotlib's ``tab20``, the light ones first; white for what is not finite.
    """
    colours, known = mpl("matplotlib.colors"), mpl("matplotlib").colormaps["tab20"].colors
    known = known[1::2] + known[::2]
    palette = colours.ListedColormap(["white" if label < 0 else known[label % len(known)] for label in present])
    edges = [*(label - 0.5 for label in present), present[-1] + 0.5]
    return {"cmap": palette, "norm": colours.BoundaryNorm(edges, len(present))}


def class_name(label: int, names: Sequence[str] | None) -> str:
    """Return a class's name; its number where it has none."""
    if label < 0:
        return "not finite"
    return str(label) if names is None or label >= len(names) else str(names[label])


def pictures(scan: SliceScan, images: Images) -> list[np.ndarray]:
    """Return the samples of a slice as pictures [H, W] or [H, W, 3] in [0, 1]; none where there are none to show."""
    samples: Sequence[Any] = scan.slice.samples
    if images is None:
        return []
    if isinstance(images, str):
        if images != "auto":
            raise ProbeError(f"images={images!r}: give the samples as pictures, images='auto' or images=None (none).")
        images = samples if all(is_picture(sample.shape) for sample in samples) else []
    elif len(images) != len(samples) or not all(is_picture(image.shape) for image in images):
        raise ProbeError(
            f"images has the shapes {[tuple(image.shape) for image in images]}; a {type(scan.slice).__name__} has "
            f"{len(samples)} samples, each drawn as [H, W], [1, H, W], [3, H, W] or [H, W, 3].\n"
            "Shape them so:  images=[sample.reshape(8, 8) for sample in plane.samples]"
        )
    return [picture(image) for image in images]


def is_picture(shape: Sequence[int]) -> bool:
    """Whether a sample of this shape can be shown."""
    coloured = len(shape) == 3 and (shape[0] in (1, 3) or shape[2] == 3)
    return (coloured or len(shape) == 2) and sorted(shape)[-2] >= 4


def picture(image: Any, *, spread: bool = True) -> np.ndarray:
    """A sample as a picture [H, W] or [H, W, 3] in [0, 1]: ``spread`` over it, or there already."""
    pixels = torch.as_tensor(image).detach().double().cpu().numpy()
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
        pixels = pixels[0] if pixels.shape[0] == 1 else np.moveaxis(pixels, 0, -1)
    span = np.ptp(pixels) if spread else 1.0
    return (pixels - pixels.min() * spread) / span if span > 0 else np.zeros_like(pixels)


def show_picture(axes: Any, picture: np.ndarray, name: str, *, size: float, pad: float = 2.0) -> None:
    """Draw a picture without ticks, with its name above in letters of this size."""
    axes.imshow(picture, cmap="gray" if picture.ndim == 2 else None, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(name, fontsize=size, pad=pad, parse_math=False)
