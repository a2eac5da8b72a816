"""Engine ``"vjp"``: reverse mode.  One saved primal pass, then pullbacks; no graph of the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torchgeom_probe.dual.followed import Followed
from torchgeom_probe.dual.one_op import refuse_another_adjoint
from torchgeom_probe.errors import EngineRefusal, ProbeError, first_line
from torchgeom_probe.jacobian.functorch import starting_point
from torchgeom_probe.jacobian.fused import START, Seer, Sink, unseen
from torchgeom_probe.jacobian.layout import Layout, weights_with_channels_last
from torchgeom_probe.model.hooked import HookedModel
from torchgeom_probe.model.inputs import Inputs
from torchgeom_probe.model.isolation import frozen, same_random_numbers
from torchgeom_probe.shapes import Tensor


class Reached(BaseException):
    """Ends a pass at the last entry that is asked for.

    No Exception: neither the model's nor our own error handling may take it for a failure.
    """


def refused(error: Exception) -> EngineRefusal:
    """What reverse mode broke on, as its refusal."""
    return EngineRefusal(
        f"reverse mode failed ({first_line(error)}).\n"
        "Measure with forward mode:  GeometryProbe(model, ..., engine='fused')"
    )


def flat(directions: Tensor) -> Tensor:
    """[k, B, *space] → [k, B, d]; of a number a sample d is 1."""
    return directions.reshape(*directions.shape[:2], -1)


class Pullback:
    """The saved primal pass: ``features[entry]`` [c·B, n] with their graph back to ``point`` [c·B, *space].

    Each copy takes a cotangent of its own, so that a pull is one plain backward pass over c·B rows, as large as its
    convolutions and matrix products like them.  Batched gradients (``is_grads_batched``) save the copies, and then run
    most ops one cotangent at a time.
    """

    def __init__(self, point: Tensor, features: dict[str, Tensor], copies: int) -> None:
        self.point = point
        self.features = features
        self.copies = copies

    def pull(self, entry: str, cotangents: Tensor) -> Tensor:
        """Jᵀu for cotangents [k, B, n] → [k, B, *space], every sample's own."""
        y, k = self.features[entry], len(cotangents)
        pulled = []
        for part in cotangents.split(self.copies):
            rows = part.flatten(0, 1)
            if len(rows) < len(y):
                rows = torch.cat([rows, rows.new_zeros(len(y) - len(rows), rows.shape[1])])
            try:
                with torch.enable_grad():
                    (gradient,) = torch.autograd.grad(y, self.point, rows, retain_graph=True)
            except (ProbeError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever a backward of the model's own raises
                raise refused(error) from error
            pulled.append(gradient.detach().unflatten(0, (self.copies, -1)))
        return torch.cat(pulled)[:k]

    def rows(self, entry: str, start: int, stop: int) -> Tensor:
        """Rows ``start … stop`` of the Jacobian, [stop − start, B, *space]."""
        y = self.features[entry]
        count, samples = stop - start, len(y) // self.copies
        cotangents = torch.zeros(count, samples, y.shape[1], dtype=y.dtype, device=y.device)
        place = torch.arange(count, device=y.device)
        cotangents[place, :, place + start] = 1
        return self.pull(entry, cotangents)


@contextlib.contextmanager
def pullback(
    hooked: HookedModel,
    inputs: Inputs,
    *,
    see: Seer = unseen,
    copies: int = 1,
    layout: Layout | None = None,
    until: str | None = None,
) -> Iterator[Pullback]:
    """Make the primal pass, parameters held constant, and yield every layer's pullback; the graph ends with the body.

    ``layout``: images may lie in memory as it says.  ``until``: the pass ends with this entry.
    """
    point = starting_point(hooked, inputs)
    see(START, [point])
    point = torch.cat([point] * copies) if copies > 1 else point
    inputs = inputs.repeated(copies * inputs.size) if copies > 1 else inputs
    # Until the last pullback: activation checkpointing runs the forward pass again in each.
    with frozen(hooked.model):
        if layout is not None and layout.suits(point):
            last = point.contiguous(memory_format=torch.channels_last)
            try:
                weights = weights_with_channels_last(hooked.model)
                saved = _saved(hooked, inputs, last, copies, weights=weights, until=until)
            except RuntimeError:  # a model that calls .view on what a convolution made counts on its layout
                saved = _saved(hooked, inputs, point, copies, until=until)
        else:
            saved = _saved(hooked, inputs, point, copies, until=until)
        for entry, features in saved.features.items():
            see(entry, [features.detach()[: len(point) // copies]])
        yield saved


def _saved(
    hooked: HookedModel,
    inputs: Inputs,
    point: Tensor,
    copies: int,
    *,
    weights: dict[str, Tensor] | None = None,
    until: str | None = None,
) -> Pullback:
    point.requires_grad_()
    outputs: dict[str, Tensor] = {}

    def on_output(entry: str, layer: str, output: Any) -> None:
        flats = hooked.features(layer, hooked.leaves(layer, output), inputs.size, output)
        # A copy: the next layer may write over it.
        whole = flats[0].clone() if len(flats) == 1 else torch.cat(flats, dim=1)
        if not whole.requires_grad:
            raise hooked.no_tangent(entry, "it does not depend on it, or runs under no_grad or inference_mode")
        outputs[entry] = whole
        if entry == until:
            raise Reached

    # The random numbers of every pass are the same, as in forward mode.
    with (
        same_random_numbers(point.device),
        torch.enable_grad(),
        _without_gradient_hooks(hooked.model),
        contextlib.suppress(Reached),
        Followed(reverse=True),
    ):
        # A fresh non-leaf: a model whose first op is in place must not write to a leaf that requires a gradient.
        z = point.view_as(point).clone()
        with hooked.attached(on_output, lambda output: z):
            args, kwargs = inputs.arguments(z if inputs.wrt else None)
            if weights:
                torch.func.functional_call(hooked.model, weights, args, kwargs)
            else:
                hooked.model(*args, **kwargs)
    return Pullback(point, outputs, copies)


@contextlib.contextmanager
def _without_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """Forward passes in the body start none of the user's backward hooks: a measurement is no training.

    They would run at every product, and what they make of a gradient (guided backpropagation) is no derivative.
    """
    hooks = [torch.nn.modules.module._global_backward_hooks, torch.nn.modules.module._global_backward_pre_hooks]
    hooks += [held for m in model.modules() for held in (m._backward_hooks, m._backward_pre_hooks)]
    kept = [(held, held.copy()) for held in hooks if held]
    try:
        for held, _ in kept:
            held.clear()
        yield
    finally:
        for held, content in kept:
            held.update(content)


def push(hooked: HookedModel, inputs: Inputs, directions: Tensor, sink: Sink, *, see: Seer) -> None:
    """Push k directions: by rows of J where they are fewer, else as the derivative of u ↦ Jᵀu, which is linear."""
    with pullback(hooked, inputs, see=see) as back:
        tangents = directions.to(back.point.dtype)
        for entry, y in back.features.items():
            pushed = None
            if y.shape[1] > len(directions):
                try:
                    pushed = _by_second_derivative(back, entry, tangents)
                except (EngineRefusal, RuntimeError) as error:
                    if y.shape[1] > _MANY_ROWS:
                        raise EngineRefusal(
                            f"layer {entry!r} has an op whose backward cannot be differentiated ({first_line(error)}), "
                            f"and {y.shape[1]} features, too many to pull back one by one.\n"
                            "Pool them:  transform=lambda h: h.mean((2, 3)), or measure a layer before that op."
                        ) from error
            sink(entry, [_by_rows(back, entry, tangents) if pushed is None else pushed])


def _by_second_derivative(back: Pullback, entry: str, tangents: Tensor) -> Tensor:
    y = back.features[entry]
    u = torch.zeros_like(y).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(y, back.point, u, create_graph=True)
        (pushed,) = torch.autograd.grad(gradient, u, tangents, retain_graph=True, is_grads_batched=True)
    total = pushed.detach().sum(0)
    refuse_another_adjoint([total], [tangents.sum(0)], lambda us: [back.pull(entry, us[0][None])[0]])
    return pushed.detach()


def _by_rows(back: Pullback, entry: str, tangents: Tensor) -> Tensor:
    count = back.features[entry].shape[1]
    tangents = flat(tangents)
    parts = [
        torch.einsum("nbd,kbd->kbn", flat(back.rows(entry, i, min(i + _ROWS_AT_ONCE, count))), tangents)
        for i in range(0, count, _ROWS_AT_ONCE)
    ]
    return torch.cat(parts, dim=2)


#: Features that are pulled back one by one, where there is no other way; and how many rows of J are held at once.
_MANY_ROWS = 4096
_ROWS_AT_ONCE = 64
