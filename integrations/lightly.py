"""lightly modules: backbone and projector as one network to probe, batches of views, expansion along augmentations.

Needs no lightly itself: any module with a ``backbone`` and a ``projection_head`` will do.

Legend of axes: B samples, D augmentation directions: one less than the views of one shape.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.stages import stage_layers
from torchgeom_probe.model.wrappers import unwrapped
from torchgeom_probe.probe import ProbeOptions, probe_of
from torchgeom_probe.report import GeometryReport, LayerGeometry
from torchgeom_probe.shapes import Bool, Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

# What lightly's own examples call the trained branch: Barlow Twins, SimCLR, BYOL, VICReg, MoCo …; then DINO.
_BRANCHES = (("backbone", "projection_head"), ("student_backbone", "student_head"))


def views(batch: Any) -> list[Tensor]:
    """Return the views of a batch as lightly's loaders give it, ``(views, targets, file names)``.

    Also a plain ``(views, targets)``, a bare list of views, and a single tensor: then one view.  A view is a floating
    tensor [B, ...].

    Raises:
        ProbeError: no view in the batch.

    >>> first, second = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    >>> [view is found for view, found in zip([first, second], views([[first, second], torch.arange(5), ("a",)]))]
    [True, True]
    """
    found: Any = batch
    if isinstance(found, Sequence) and not isinstance(found, str) and found:
        nested = isinstance(found[0], Sequence) and not isinstance(found[0], str)
        labelled = len(found) > 1 and isinstance(found[0], Tensor) and not _is_view(found[1])
        found = found[0] if nested or labelled else found
    found = [found] if isinstance(found, Tensor) else found
    if isinstance(found, Sequence) and found and all(_is_view(view) for view in found):
        return list(found)
    raise ProbeError(
        f"there are no views in this batch, a {type(batch).__name__}: a view is a floating tensor [B, ...].\n"
        "Pass the batch of a lightly loader, (views, targets, names), or a list of views:  [x0, x1]"
    )


def encoder(module: nn.Module) -> nn.Module:
    """Return the trained branch of a module as one network: x → backbone → flatten → projection head.

    The parts are the module's own, under their own names (``backbone``, ``projection_head``; for DINO
    ``student_backbone``, ``student_head``), so layer names are those of the module.  Momentum branches, prediction
    heads and prototypes are left out; without a projection head it is the backbone alone.  What it computes, z =
    head(flatten(backbone(x))), is what lightly's examples have in ``forward``.

    Raises:
        ProbeError: the module has neither ``backbone`` nor ``student_backbone``.

    >>> module = nn.Module()
    >>> module.backbone, module.projection_head = nn.Conv2d(3, 2, 4), nn.Linear(2, 5)
    >>> encoder(module)(torch.randn(7, 3, 4, 4)).shape
    torch.Size([7, 5])
    """
    (backbone, *heads) = _branch(module).items()
    flat = [("flatten", nn.Flatten())] if heads else []
    return nn.Sequential(OrderedDict([backbone, *flat, *heads]))


def embedding_layers(module: nn.Module) -> list[str]:
    """Return the layers to probe: the backbone's stages, its output, and the end of every projector layer.

    A projector layer is a ``Linear`` with what follows it (normalisation, activation) up to the next one. The names
    hold for :func:`encoder` and for the module itself.

    Raises:
        ProbeError: the module has neither ``backbone`` nor ``student_backbone``.

    >>> module = nn.Module()
    >>> module.backbone = nn.Sequential(nn.Conv2d(3, 2, 4), nn.ReLU(), nn.Conv2d(2, 5, 1))
    >>> module.projection_head = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> embedding_layers(module)
    ['backbone.1', 'backbone.2', 'backbone', 'projection_head.1', 'projection_head.2']
    """
    (backbone_name, backbone), *heads = _branch(module).items()
    names = [f"{backbone_name}.{name}" for name in stage_layers(backbone) if name]
    names.append(backbone_name)
    for head_name, head in heads:
        names += [f"{head_name}.{name}".rstrip(".") for name in _block_ends(head)]
    return names


class TwoViewProbe:
    """Probe a module that learns from two views of its images, at its own batches: Barlow Twins, SimCLR, BYOL ….

    Args:
        module: with ``backbone`` and ``projection_head``, or ``student_backbone`` and ``student_head``: the
            LightningModule or plain module of lightly's examples.  Its batch normalisation, dropout and gradients are
            left as they are.
        options: of the probe, as :class:`~torchgeom_probe.GeometryProbe` has them; ``layers`` are those of
            :func:`embedding_layers` by default.

    Raises:
        ProbeError: no backbone; layers that the module does not have; a batch without views.

    Cost: of :meth:`measure` one dual pass over (1 + k)·B samples, of :meth:`augmentation` over 4·D·B.

    >>> module = nn.Module()
    >>> module.backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Tanh())
    >>> module.projection_head = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5))
    >>> x = torch.randn(9, 3, 2, 2)
    >>> batch = [[x, x + 0.1 * torch.randn(9, 3, 2, 2)], torch.zeros(9), [""] * 9]
    >>> with TwoViewProbe(module) as probe:
    ...     report, augmentation = probe.measure(batch), probe.augmentation(batch)
    >>> list(report) == list(augmentation) == ["backbone.2", "backbone", "projection_head.1", "projection_head.2"]
    True
    >>> assert abs(augmentation["backbone"].statistics()["median"]) < 1  # noise added is noise: no difference
    """

    def __init__(self, module: nn.Module, **options: Unpack[ProbeOptions]) -> None:
        options.setdefault("layers", embedding_layers(module))
        self._probe = probe_of(encoder(module), options)
        options.pop("estimator", None)  # the directions to the other views are one
        self._directional = probe_of(encoder(module), options)

    @property
    def layers(self) -> list[str]:
        """The names of the layers that are measured."""
        return self._probe.layers

    def measure(self, batch: Any, *, view: int = 0) -> GeometryReport:
        """Measure every layer at one view of a batch, as :meth:`GeometryProbe.measure` does.

        Raises:
            ProbeError: no such view.
        """
        found = views(batch)
        if not 0 <= view < len(found):
            raise ProbeError(f"view={view}: this batch has {len(found)} views, numbered from 0.")
        return self._probe.measure(found[view], progress=False)

    def augmentation(self, batch: Any, *, seed: int = 0) -> GeometryReport:
        """Measure the expansion from the first view towards each other one, against as many random directions.

        log ‖Jv‖ in nats, for unit directions v and with J = ∂Φ/∂x at the first view.  The report has for each sample
            along    its mean over v = (view - first view) / ‖view - first view‖, one for each other view;
            random   its mean over as many v that are uniform on the sphere, where ‖Jv‖² is tr(JᵀJ)/d on average;
            value    along - random: negative where augmentations are squeezed more than noise is, and nan where a view
                     equals the first.

        Joint-embedding losses ask for invariance to augmentation, so training should squeeze these directions more than
        others.  The directions are chords, taken at the first view: the crop's shift is in them as a difference of
        pixels.  Views of another shape than the first (DINO's local crops) are left out.

        Args:
            batch: with two views or more.
            seed: of the random directions, drawn on the CPU by a generator of their own.

        Raises:
            ProbeError: a batch with no second view of the first one's shape.
        """
        first, *others = views(batch)
        others = [view for view in others if view.shape == first.shape]
        if not others:
            raise ProbeError(
                f"expansion along augmentations needs a second view of the shape {tuple(first.shape)}, and the batch "
                "has none.\n"
                "Use a transform with two views:  lightly.transforms.BYOLTransform()"
            )
        generator = torch.Generator().manual_seed(seed)
        chords = torch.stack([view.double() - first.double() for view in others])
        noise = torch.randn(chords.shape, generator=generator, dtype=torch.float64).to(chords.device)
        still = chords.flatten(2).norm(dim=2) == 0
        # A view that equals the first has no direction; noise keeps its place, and its result is dropped.
        chords = torch.where(still.view(*still.shape, *[1] * (first.dim() - 1)), noise, chords)
        directions = functional.normalize(torch.stack([chords, noise]).flatten(3), dim=3)
        report = self._directional.measure(
            first.repeat(2 * len(others), *[1] * (first.dim() - 1)),
            directions=directions.to(first.dtype).view(1, -1, *first.shape[1:]),
            progress=False,
        )
        layers = {name: _expansion(layer, still) for name, layer in report.items()}
        return GeometryReport(layers, left_out=report.left_out)

    def close(self) -> None:
        """Let go of the module; measuring afterwards raises."""
        self._probe.close()
        self._directional.close()

    def __enter__(self) -> TwoViewProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# What a reader of a Barlow Twins script looks for.
BarlowTwinsProbe = TwoViewProbe


def _branch(module: nn.Module) -> dict[str, nn.Module]:
    inner = unwrapped(module)
    for names in _BRANCHES:
        found = {name: getattr(inner, name, None) for name in names}
        if isinstance(found[names[0]], nn.Module):
            return {name: unwrapped(part) for name, part in found.items() if isinstance(part, nn.Module)}
    children = ", ".join(repr(name) for name, _ in inner.named_children()) or "no submodule"
    raise ProbeError(
        f"{type(inner).__name__} has no backbone: it has {children}.\n"
        "Call the parts backbone and projection_head (for DINO student_backbone and student_head), or probe the "
        "network itself:  tgp.GeometryProbe(model, ...)"
    )


def _block_ends(head: nn.Module) -> list[str]:
    linear = [name for name, part in head.named_modules() if isinstance(part, nn.Linear)]
    inside = tuple(f"{name}." for name in linear)
    leaves = [
        name
        for name, part in head.named_modules()
        if name in linear or (not any(True for _ in part.children()) and not name.startswith(inside))
    ]
    if not linear:
        return [""]
    return [leaf for leaf, after in zip(leaves, [*leaves[1:], linear[0]], strict=True) if after in linear]


def _is_view(thing: Any) -> bool:
    return isinstance(thing, Tensor) and thing.is_floating_point() and thing.dim() > 1


def _expansion(layer: LayerGeometry, still: Bool[Tensor, "directions batch"]) -> LayerGeometry:
    """Of log ‖Jv‖ at 2·D·B samples, first along the views and then along noise, the difference at the B."""
    along, random = layer.value.unflatten(0, (2, *still.shape))
    along, random = along.masked_fill(still.to(along.device), math.nan).mean(0), random.mean(0)
    return replace(
        layer,
        estimand="log ‖Jv‖ towards the other views minus log ‖Jv‖ in random directions",
        quantity="expansion",
        unit="log ratio",
        value=along - random,
        singular_values=layer.singular_values.new_zeros(len(along), 0),
        rank=None,
        log_pseudo_volume=None,
        rank_tolerance=None,
        extras={"along": along, "random": random},
    )
