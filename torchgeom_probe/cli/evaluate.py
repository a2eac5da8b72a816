"""``torchgeom-probe evaluate``: what images alone, without labels, tell of a network's geometry, as one page.

A section a question, each over the public verbs.  What a model does not allow (no logits, no pictures) is left out of
the page with the reason.
"""

from __future__ import annotations

import argparse
import copy
import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchgeom_probe.boundary.paired import Estimate, paired_effect
from torchgeom_probe.boundary.population import boundary_study
from torchgeom_probe.cli.models import (
    add_probe,
    add_study,
    estimator_of,
    groups_of,
    image_files_of,
    input_of,
    model_of,
    probe_options,
    study_options,
    untrained_of,
)
from torchgeom_probe.errors import ProbeError, optional
from torchgeom_probe.estimators import Along, Directions, Estimator, TopK
from torchgeom_probe.files import write_atomically, write_json
from torchgeom_probe.model.predictions import predicted
from torchgeom_probe.plotting.directions import plot_directions
from torchgeom_probe.plotting.files import save
from torchgeom_probe.plotting.plot import plot
from torchgeom_probe.plotting.style import is_picture
from torchgeom_probe.probe import measure
from torchgeom_probe.report import GeometryReport
from torchgeom_probe.shapes import Tensor

#: Pixels on a side of the pictures of the page; how many of a kind.
_PIXELS, _EXTREMES = 160, 5
#: To which the logarithms of a spectrum are known, in sum: a flat one takes a thousand products to 0.02.
_NATS = 0.3


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    parser = verbs.add_parser(
        "evaluate",
        help="one page on a trained network from images without labels (needs the extra 'figures')",
        description="Spectra, volumes, boundaries, invariances and the directions that stages feel, as page.md, its "
        "pictures and page.json.  Give images that the network was not trained on.",
    )
    add_probe(parser)
    parser.add_argument("--estimator", metavar="NAME", help="of the volumes (default: auto)")
    parser.add_argument("-k", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--against", metavar="SPEC|FILE", help="another model, or a checkpoint, side by side")
    add_study(parser, pairs=100)
    parser.add_argument("--few", type=int, default=8, help="images for what is dear: spectra (default 8)")
    parser.add_argument("--out", type=Path, default=Path("torchgeom_runs/evaluate"), metavar="DIR")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the page and say where it is."""
    optional("matplotlib", extra="figures")
    several = [(arguments, arguments.out)]
    if arguments.against is not None:
        several = [(arguments, arguments.out / "first"), (_other(arguments), arguments.out / "against")]
    networks = [_Network.of(own, out) for own, out in several]
    record: dict[str, dict[str, Any]] = {}
    lines = ["# " + " against ".join(_text(network.name) for network in networks), ""]
    lines += [f"{len(networks[0].x)} samples, no labels. Logarithms are natural; J is divided by √n.", ""]
    for place, (title, section) in enumerate(_SECTIONS.items(), start=1):
        print(f"{place} of {len(_SECTIONS)}: {title} …", flush=True)
        lines += [f"## {title}", ""]
        for network in networks:
            lines += [f"### {_text(network.name)}", ""] if len(networks) > 1 else []
            try:
                written, found = section(network)
            except ProbeError as error:
                written, found = [f"Left out: {_text(str(error).splitlines()[0])}"], {"left out": str(error)}
            lines += [line.replace("](", f"]({network.out.relative_to(arguments.out)}/") for line in written] + [""]
            record.setdefault(network.name, {})[title] = found
        page = write_atomically(arguments.out / "page.md", "\n".join(lines).encode())  # what is known, if it is stopped
        data = write_json(arguments.out / "page.json", record)
    print(f"Wrote {page} and {data}.")


def _other(arguments: argparse.Namespace) -> argparse.Namespace:
    other = copy.copy(arguments)
    if Path(arguments.against).is_file():
        other.checkpoint = Path(arguments.against)
    else:
        other.model, other.pretrained, other.checkpoint = arguments.against, False, None
    return other


@dataclass
class _Network:
    """One network and its samples."""

    name: str
    arguments: argparse.Namespace
    model: nn.Module
    x: Tensor
    files: Sequence[Path]
    groups: Sequence[str]
    out: Path
    options: dict[str, Any]
    _report: list[GeometryReport] = field(default_factory=list)

    @staticmethod
    def of(arguments: argparse.Namespace, out: Path) -> _Network:
        model, loaded = model_of(arguments)
        x, files = input_of(arguments, model, loaded), image_files_of(arguments)
        groups = groups_of(arguments) or list(map(str, range(len(x))))
        name = arguments.model + (f" ({arguments.checkpoint.name})" if arguments.checkpoint else "")
        return _Network(name, arguments, model, x, files, groups, out, probe_options(arguments))

    @property
    def report(self) -> GeometryReport:
        """Of all samples, measured once."""
        if not self._report:
            self._report.append(self.measured(self.x, estimator_of(self.arguments)))
        return self._report[0]

    def measured(self, x: Tensor, estimator: Estimator) -> GeometryReport:
        """Of some samples, by an estimator of one section."""
        return measure(self.model, x, estimator=estimator, **self.options)

    def mean(self, values: Tensor) -> Estimate | None:
        """The mean over samples, its interval over groups; None of too few."""
        keep = values.isfinite().cpu()
        own = [group for group, kept in zip(self.groups, keep.tolist(), strict=True) if kept]
        if len(set(own)) < 2:
            return None
        return paired_effect(values.cpu()[keep], [[group, group] for group in own]).estimate

    def picture(self, figure: Any, name: str) -> str:
        """Save a figure; returns the line that shows it."""
        return f"![{name}]({save(figure, self.out / f'{name}.png').name})"


_Written = tuple[list[str], Mapping[str, Any]]


def _volumes(network: _Network) -> _Written:
    report = network.report
    rows, record = [], {}
    for name, layer in report.items():
        extras = {n: e.double().median().item() for n, e in layer.extras.items() if e.ndim == 1}
        found = {"features": layer.num_features, layer.heading: layer.value.median().item(), **extras}
        record[name] = found
        rows.append([name or "(model)", *found.values()])
    head = ["stage", *next(iter(record.values()))]
    drawn = network.picture(plot(report, title="Volumes"), "volumes")
    text = (
        "Each dot is a sample: how much a stage magnifies around it. `scale` is the log of the mean stretch of a "
        "random direction, `effective dimension` how many directions share it. There is no value by chance: compare "
        "stages, or the same network untrained (`--against`)."
    )
    return [*_table(head, rows), "", drawn, "", text], record


def _spectra(network: _Network) -> _Written:
    x = network.x[: network.arguments.few]
    report = network.measured(x, TopK(k=min(10, x[0].numel()), tol=_NATS))
    rows, record = [], {}
    for name, layer in report.items():
        sigma = layer.singular_values.double().median(0).values
        found = {"σ_1": sigma[0].item(), f"σ_{len(sigma)}": sigma[-1].item(), "ratio": (sigma[0] / sigma[-1]).item()}
        record[name] = {"singular_values": sigma, **found}
        rows.append([name or "(model)", *found.values()])
    text = (
        f"Medians over {len(x)} samples of the largest singular values of J, their logarithms to {_NATS} in "
        "sum: how much the directions that a stage "
        "feels most are stretched, and how unequal they are. A ratio near 1 is a flat top: no direction stands out."
    )
    return [*_table(["stage", "σ_1", f"σ_{len(sigma)}", "ratio"], rows), "", text], record


def _margins(network: _Network) -> _Written:
    margin = predicted(network.model, network.x, None)["margin"]
    rows, record = [], {}
    for name, layer in network.report.items():
        value = layer.value.double().cpu()
        keep = value.isfinite() & margin.isfinite()
        v, m = value[keep] - value[keep].mean(), margin[keep] - margin[keep].mean()
        slope = (v * m).sum() / m.square().sum()
        influence = torch.full_like(value, math.nan)
        influence[keep] = slope + (v - slope * m) * m / m.square().mean()
        estimate = network.mean(influence)
        correlation = torch.corrcoef(torch.stack([v, m]))[0, 1].item()
        record[name] = {"slope": estimate, "correlation": correlation}
        rows.append([name or "(model)", "–" if estimate is None else str(estimate), correlation])
    text = (
        "Slope of the value (nats) on the network's own margin, the largest logit minus the second: negative where "
        "less certain samples are magnified more. By chance: 0 within the 95 % interval, which is over "
        f"{len(set(network.groups))} groups."
    )
    return [*_table(["stage", "slope [95 %]", "correlation"], rows), "", text], record


def _boundaries(network: _Network) -> _Written:
    study = boundary_study(
        network.model,
        network.x,
        initial=untrained_of(network.arguments),
        path=network.out / "study.json",
        **study_options(network.arguments),
        **network.options,
    )
    drawn = network.picture(plot(study, title="Near the decision boundaries"), "boundaries")
    text = (
        "Log-volume against the distance from the boundary between two samples that the network tells apart; the "
        "untrained network at the same points says what chance shows. Each sentence names its test."
    )
    effects = {name: effect.record() for name, effect in study.items()}
    return [drawn, "", text, "", *(f"- {_text(str(effect))}" for effect in study.values())], effects


def _invariances(network: _Network) -> _Written:
    x, few = network.x, {"random": torch.randn(network.x.shape, generator=torch.Generator().manual_seed(0))}
    moved = {**few, **{name: change(x) - x for name, change in _changes(x).items()}}
    lengths: dict[str, dict[str, Tensor]] = {}
    for change, v in moved.items():
        flat = v.to(x).flatten(1)
        unit = (flat / flat.norm(dim=1, keepdim=True)).reshape(x.shape)
        report = network.measured(x, Along(unit[None]))
        lengths[change] = {name: layer.value.double().cpu() for name, layer in report.items()}
    rows, record = [], {}
    for name, random in lengths["random"].items():
        estimates = {c: network.mean(own[name] - random) for c, own in lengths.items() if c != "random"}
        record[name] = estimates
        rows.append([name or "(model)", *("–" if e is None else str(e) for e in estimates.values())])
    text = (
        "Log of how much a stage stretches the first step of a change of the image, minus the same of a random "
        "direction of equal length (nats, 95 % over groups). Negative: the stage feels the change less than noise, as "
        "one that has become invariant to it does. By chance: 0; but images are smooth and noise is not, which the "
        "untrained network shows by itself."
    )
    return [*_table(["stage", *(c for c in moved if c != "random")], rows), "", text], record


def _changes(x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Small changes of images [B, C, H, W]: the first steps of what augmentation does."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ProbeError(f"samples of shape {list(x.shape[1:])} are no images, of which there are augmentations.")
    functional = optional("torchvision.transforms.v2.functional", extra="figures")
    height, width = x.shape[-2:]
    return {
        "shift": lambda z: torch.roll(z, 1, -1),
        "zoom": lambda z: functional.resize(z[..., 1 : height - 1, 1 : width - 1], [height, width], antialias=True),
        "flip": lambda z: z + 0.02 * (z.flip(-1) - z),
        "contrast": lambda z: z + 0.02 * (z - z.mean((-2, -1), keepdim=True)),
        "brightness": lambda z: z + 0.02,
        "blur": lambda z: functional.gaussian_blur(z, [5, 5], [1.0, 1.0]),
    }


def _directions(network: _Network) -> _Written:
    if not is_picture(network.x.shape[1:]):
        raise ProbeError(f"samples of shape {list(network.x.shape[1:])} are no pictures to draw directions beside.")
    last = list(network.report.values())[-1].value
    place = int(last.nan_to_num(nan=-math.inf).argmax())
    x = network.x[place : place + 1]
    report = network.measured(x, Directions(k=4))
    error = {name: layer.direction_error.max().item() for name, layer in report.items()}
    drawn = network.picture(plot_directions(report, x, title="The directions felt most"), "directions")
    text = (
        f"Of sample {place}, which the last stage magnifies most: the unit directions that each stage stretches most. "
        "Noise would look like noise; a structure is what the stage is sensitive to."
    )
    if open_ := [_text(name or "(model)") for name, sine in error.items() if not sine < 1]:
        text += f" Of {', '.join(open_)} none stands out so far that {Directions.max_products} products tell which."
    return [drawn, "", text], {"sample": place, "direction_error": error}


def _extremes(network: _Network) -> _Written:
    if not network.files:
        raise ProbeError("there are no image files to show")
    images = optional("torchgeom_probe.integrations.timm", extra="timm")
    name, layer = list(network.report.items())[-1]
    order = [i for i in layer.value.argsort(descending=True).tolist() if layer.value[i].isfinite()]
    lines, record = [], {}
    for title, places in (("most", order[:_EXTREMES]), ("least", order[::-1][:_EXTREMES])):
        shown = []
        for place in places:
            picture = images.open_image(network.files[place])
            picture.thumbnail((_PIXELS, _PIXELS))
            path = network.out / f"{title}_{place}.png"
            picture.save(path)
            shown.append(f"![sample {place}]({path.name})")
        names = ", ".join(_text(network.files[place].name) for place in places)
        lines += [f"**Magnified {title}** by {_text(name or 'the model')}: {names}", "", " ".join(shown), ""]
        record[title] = {str(network.files[place]): layer.value[place].item() for place in places}
    return [*lines, "By chance the two rows would look alike."], record


_SECTIONS: dict[str, Callable[[_Network], _Written]] = {
    "Volumes": _volumes,
    "Spectra": _spectra,
    "Volume and margin": _margins,
    "Decision boundaries": _boundaries,
    "Invariances": _invariances,
    "Directions": _directions,
    "Extremes": _extremes,
}


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [
        [f"{c:.3g}" if isinstance(c, float) and not isinstance(c, Estimate) else str(c) for c in row] for row in rows
    ]
    lines = [list(head), ["---"] * len(head), *cells]
    return [f"| {' | '.join(_text(cell) for cell in line)} |" for line in lines]


def _text(text: str) -> str:
    """As text in Markdown, whatever is in it."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(text.replace("\n", " "), quote=False))
