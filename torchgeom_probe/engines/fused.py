"""Engine ``"fused"``: one dual forward pass for all layers; hooks reduce the tangents on the spot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchgeom_probe.dual import DualTensor, LostTensor
from torchgeom_probe.engines.task import Batch, Task, features, no_tangent
from torchgeom_probe.shapes import Tensor

#: (entry, blocks [k, B, n_i] of the layer's tangents): called inside the forward pass; the blocks may be overwritten after it returns.
Sink = Callable[[str, list[Tensor]], None]


def push(task: Task, batch: Batch, directions: Tensor, sink: Sink) -> None:
    """Push k directions [k, B, *space] through the model, and hand each layer's tangents to the sink as it fires."""

    def on_output(entry: str, layer: str, output: Any) -> None:
        leaves = task.leaves(layer, output)
        lost = next((leaf for leaf in leaves if isinstance(leaf, LostTensor)), None)
        if lost is not None:
            raise no_tangent(entry, task, f"it was cut off by {lost.reason}")
        if leaves and not any(isinstance(leaf, DualTensor) for leaf in leaves):
            raise no_tangent(entry, task, "it does not depend on it")
        blocks = []
        for leaf, flat in zip(leaves, features(leaves, layer=layer, batch=batch.size), strict=True):
            if isinstance(leaf, DualTensor):
                blocks.append(leaf.tangents.reshape(directions.shape[0], *flat.shape))
            else:  # a constant beside the features (a positional table): its derivative IS zero
                blocks.append(flat.new_zeros(directions.shape[0], *flat.shape))
        sink(entry, blocks)

    def dual(value: Tensor) -> DualTensor:
        return DualTensor(torch.cat([value[None], directions.to(value.dtype)]))

    def on_source(output: Any) -> Any:
        return dual(task.source_value(output))

    with task.hooked(on_output, on_source):
        batch.run(task.model, None if batch.point is None else dual(batch.point))
