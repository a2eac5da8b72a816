"""Engine ``"functorch"``: ``torch.func.vmap`` over ``torch.func.jvp`` of the whole model.

Slower than the dual pass and it holds the tangents of all layers until the pass ends, but it leans on torch alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from torchgeom_probe.jacobian.detached import refused_cuts
from torchgeom_probe.jacobian.fused import Sink
from torchgeom_probe.model.hooked import Batch, Task, features, no_tangent
from torchgeom_probe.shapes import Tensor


def push(task: Task, batch: Batch, directions: Tensor, sink: Sink) -> None:
    """Push k directions [k, B, *space] through the model, then hand each layer's tangents to the sink."""
    point = starting_point(task, batch)

    def captured(z: Tensor) -> dict[str, list[Tensor]]:
        # RETURNED, not stashed: outside the transform a stashed tensor is a dead wrapper.
        outputs: dict[str, list[Tensor]] = {}

        def on_output(entry: str, layer: str, output: Any) -> None:
            flats = features(task.leaves(layer, output), layer=layer, batch=batch.size)
            if all(forward_ad.unpack_dual(flat).tangent is None for flat in flats):
                raise no_tangent(entry, task, "it does not depend on it, or was cut off (detach, .data)")
            outputs[entry] = [flat.clone() for flat in flats]  # the next layer may write over it

        # Copies made inside the transform, or a forward pass that writes to a buffer could not be transformed.
        copies = {name: buffer.clone() for name, buffer in task.model.named_buffers()}
        with task.hooked(on_output, lambda output: z):
            args, kwargs = batch.arguments(None if batch.point is None else z)
            torch.func.functional_call(task.model, copies, args, kwargs)
        return outputs

    def pushed(direction: Tensor) -> dict[str, list[Tensor]]:
        return torch.func.jvp(captured, (point,), (direction,))[1]

    with refused_cuts(lambda t: forward_ad.unpack_dual(t).tangent is not None):
        tangents = torch.func.vmap(pushed, randomness="same")(directions.to(point.dtype))
    for entry, blocks in tangents.items():
        sink(entry, blocks)


def starting_point(task: Task, batch: Batch) -> Tensor:
    """Return the tensor that the metric is pulled back to: the batch's own, or the source's output on it."""
    if batch.point is not None:
        return batch.point.clone()
    outputs: list[Tensor] = []

    def on_source(output: Any) -> None:
        outputs.append(task.source_value(output).detach().clone())

    with Task(task.model, {}, task.source_name, task.source).hooked(lambda *_: None, on_source):
        batch.run(task.model)
    return outputs[0]
