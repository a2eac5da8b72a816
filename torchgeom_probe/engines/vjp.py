"""Engine ``"vjp"``: reverse mode.  One saved primal pass, then batched pullbacks per layer; no graph of the graph for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from torchgeom_probe.engines.cuts import GradientsOff, refused_cuts
from torchgeom_probe.engines.functorch import starting_point
from torchgeom_probe.engines.fused import Sink
from torchgeom_probe.engines.task import Batch, Task, features, no_tangent
from torchgeom_probe.errors import EngineRefusal
from torchgeom_probe.footprint import frozen, same_random_numbers
from torchgeom_probe.shapes import Tensor


class Pullback:
    """The saved primal pass: ``features[entry]`` [B, n] with their graph back to ``point`` [B, *space]."""

    def __init__(self, point: Tensor, features: dict[str, Tensor]) -> None:
        self.point = point
        self.features = features

    def pull(self, entry: str, cotangents: Tensor, *, create_graph: bool = False) -> Tensor:
        """Jᵀu for cotangents [c, B, n] → [c, B, *space], every sample's own."""
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(
                self.features[entry],
                self.point,
                cotangents,
                retain_graph=True,
                is_grads_batched=True,
                create_graph=create_graph,
            )
        return gradient if create_graph else gradient.detach()

    def rows(self, entry: str, start: int, stop: int) -> Tensor:
        """Rows ``start … stop`` of the Jacobian, [stop − start, B, *space]."""
        y = self.features[entry]
        cotangents = torch.zeros(stop - start, *y.shape, dtype=y.dtype, device=y.device)
        place = torch.arange(stop - start, device=y.device)
        cotangents[place, :, place + start] = 1
        return self.pull(entry, cotangents)


@contextlib.contextmanager
def pullback(task: Task, batch: Batch) -> Iterator[Pullback]:
    """Make the primal pass, parameters held constant, and yield the pullback of every layer; the graph goes with the body."""
    point = starting_point(task, batch).requires_grad_()
    outputs: dict[str, Tensor] = {}

    def on_output(entry: str, layer: str, output: Any) -> None:
        flats = features(task.leaves(layer, output), layer=layer, batch=batch.size)
        whole = (
            flats[0].clone() if len(flats) == 1 else torch.cat(flats, dim=1)
        )  # a copy: the next layer may write over it
        if not whole.requires_grad:
            raise no_tangent(entry, task, "it does not depend on it, or runs under no_grad or inference_mode")
        outputs[entry] = whole

    # A fresh non-leaf: a model whose first op is in place must not write to a leaf that requires a gradient.
    with frozen(
        task.model
    ):  # until the last pullback: activation checkpointing runs the forward pass again in each
        # The random numbers of every pass are the same, as in forward mode.
        with (
            same_random_numbers(point.device),
            torch.enable_grad(),
            GradientsOff(),
            refused_cuts(lambda t: t.requires_grad),
        ):
            z = point.view_as(point).clone()
            with task.hooked(on_output, lambda output: z):
                batch.run(task.model, None if batch.point is None else z)
        yield Pullback(point, outputs)


def push(task: Task, batch: Batch, directions: Tensor, sink: Sink) -> None:
    """Push k directions by reverse mode alone: Jv as the derivative of u ↦ Jᵀu, which is linear; Jacobian rows if they are fewer."""
    with pullback(task, batch) as back:
        tangents_KBd = directions.to(back.point.dtype)
        for entry, y in back.features.items():
            if y.shape[1] <= tangents_KBd.shape[0]:
                rows_NBd = back.rows(entry, 0, y.shape[1]).flatten(2)
                sink(entry, [torch.einsum("nbd,kbd->kbn", rows_NBd, tangents_KBd.flatten(2))])
                continue
            u = torch.zeros_like(y).requires_grad_()
            with torch.enable_grad():
                try:
                    (gradient,) = torch.autograd.grad(y, back.point, u, create_graph=True)
                    (pushed,) = torch.autograd.grad(
                        gradient, u, tangents_KBd, retain_graph=True, is_grads_batched=True
                    )
                except RuntimeError as error:
                    raise EngineRefusal(
                        f"layer {entry!r} has an op with no second derivative, which reverse mode needs for a directional one "
                        f"({str(error).splitlines()[0]}).\nMeasure with engine='fused' or 'functorch', or, for few features, Exact()."
                    ) from error
            sink(entry, [pushed.detach()])
