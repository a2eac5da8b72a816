"""Engine ``"fused"``: one dual forward pass for all layers; hooks reduce the tangents on the spot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchgeom_probe.dual import DualTensor, dual_pass
from torchgeom_probe.dual.passes import current_pass
from torchgeom_probe.jacobian.layout import Layout
from torchgeom_probe.model.hooked import HookedModel
from torchgeom_probe.model.inputs import Inputs
from torchgeom_probe.model.sharded import before_weights_go
from torchgeom_probe.shapes import Tensor

#: (entry, blocks [k, B, n_i] of the layer's tangents): called inside the forward pass; the blocks may be overwritten
#: after it returns.
Sink = Callable[[str, list[Tensor]], None]
#: (entry, leaves [B, ...]): called with the layer's own values before its sink is.
Seer = Callable[[str, list[Tensor]], None]


#: What a seer calls the source's output; no layer has such a name.
START = "<input>"


def unseen(entry: str, leaves: list[Tensor]) -> None:
    """The seer of a pass whose values nobody asks about."""


def push(
    hooked: HookedModel,
    inputs: Inputs,
    directions: Tensor,
    sink: Sink,
    *,
    see: Seer = unseen,
    any_order: bool = False,
    layout: Layout | None = None,
    low: torch.dtype | None = None,
) -> None:
    """Push k directions [k, B, *space] through the model, and hand each layer's tangents to the sink as it fires.

    ``any_order``: the sink does not mind in which order the features come, so channels that lie last in memory need not
    be copied.  ``layout``: images may lie in memory as it says.  ``low``: the type that products take the tangents in.
    """

    def on_output(entry: str, layer: str, output: Any) -> None:
        leaves = hooked.leaves(layer, output)
        if leaves and not any(isinstance(leaf, DualTensor) for leaf in leaves):
            raise hooked.independent(entry)
        flats = hooked.features(layer, leaves, inputs.size, output)
        values = [leaf.primal if isinstance(leaf, DualTensor) else leaf for leaf in leaves]
        see(entry, values)
        sink(
            entry, [_tangents(leaf, flat, len(directions), any_order) for leaf, flat in zip(leaves, flats, strict=True)]
        )

    def on_source(output: Any) -> Any:
        value = hooked.source_value(output)
        see(START, [value])
        return _dual(value, directions, layout)

    with dual_pass(low=low), before_weights_go(hooked.model, _build_deferred), hooked.attached(on_output, on_source):
        point = inputs.point
        args, kwargs = inputs.arguments(None if point is None else _dual(point, directions, layout))
        hooked.model(*args, **kwargs)


def _build_deferred() -> None:
    for dual in list(current_pass().deferred or ()):
        dual.buffer  # noqa: B018


def _tangents(leaf: Tensor, flat: Tensor, count: int, any_order: bool) -> Tensor:
    """[k, B, n] of one leaf; of a constant beside the features (a positional table) the derivative IS zero."""
    if not isinstance(leaf, DualTensor):
        return flat.new_zeros(count, *flat.shape)
    tangents = leaf.tangents
    if any_order and tangents.ndim == 5 and leaf.is_contiguous(memory_format=torch.channels_last):
        tangents = tangents.permute(0, 1, 3, 4, 2)
    return tangents.reshape(count, *flat.shape)


def _dual(value: Tensor, directions: Tensor, layout: Layout | None) -> DualTensor:
    buffer = torch.cat([value[None], directions.to(value.dtype)])
    if value.ndim == 4 and (
        value.is_contiguous(memory_format=torch.channels_last)
        or (layout is not None and layout.suits(value) and layout.pays(value, buffer.shape[0] * len(value)))
    ):
        rows = buffer.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        buffer = rows.unflatten(0, (-1, value.shape[0]))
    return DualTensor(buffer)
