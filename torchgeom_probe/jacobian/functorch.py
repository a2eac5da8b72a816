"""Engine ``"functorch"``: ``torch.func.vmap`` over ``torch.func.jvp`` of the whole model.

Slower than the dual pass and it holds the tangents of all layers until the pass ends, but it leans on torch alone.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from torchgeom_probe.dual.followed import Followed, has_tangent
from torchgeom_probe.dual.ops import as_called
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.jacobian.fused import START, Seer, Sink
from torchgeom_probe.model.hooked import HookedModel
from torchgeom_probe.model.inputs import Inputs
from torchgeom_probe.model.isolation import same_random_numbers
from torchgeom_probe.shapes import Tensor


def push(hooked: HookedModel, inputs: Inputs, directions: Tensor, sink: Sink, *, see: Seer) -> None:
    """Push k directions [k, B, *space] through the model, then hand each layer's tangents to the sink."""
    point = starting_point(hooked, inputs)

    def captured(z: Tensor) -> dict[str, list[Tensor]]:
        # RETURNED, not stashed: outside the transform a stashed tensor is a dead wrapper.
        outputs: dict[str, list[Tensor]] = {}

        def on_output(entry: str, layer: str, output: Any) -> None:
            flats = hooked.features(layer, hooked.leaves(layer, output), inputs.size, output)
            if not any(map(has_tangent, flats)):
                raise hooked.no_tangent(entry, "it does not depend on it")
            outputs[entry] = [flat.clone() for flat in flats]  # the next layer may write over it

        # Copies made inside the transform, or a forward pass that writes to a buffer could not be transformed.
        copies = {name: buffer.clone() for name, buffer in hooked.model.named_buffers()}
        with hooked.attached(on_output, lambda output: z), Followed(z, reverse=False):
            args, kwargs = inputs.arguments(z if inputs.wrt else None)
            torch.func.functional_call(hooked.model, copies, args, kwargs)
        return outputs

    def pushed(direction: Tensor) -> Any:
        return torch.func.jvp(captured, (point,), (direction,))

    see(START, [point])
    values, tangents = torch.func.vmap(pushed, randomness="same")(directions.to(point.dtype))
    for entry, blocks in tangents.items():
        see(entry, [value[0] for value in values[entry]])
        sink(entry, blocks)


def refuse_threads(hooked: HookedModel, inputs: Inputs) -> None:
    """Run the model plainly, and refuse one that computes in other threads: torch's transforms are a thread's own.

    Tangents would end there without a word.
    """
    own, used = threading.get_ident(), list[bool]()

    class Noting(Tensor):
        """Knows whether another thread made it; what is made there to be logged is never taken here."""

        elsewhere = False

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = as_called(func, kwargs)
            if threading.get_ident() == own:
                used.append(any(map(made_elsewhere, tree_leaves((args, kwargs)))))
                return super().__torch_function__(func, types, args, kwargs)
            name = getattr(func, "__name__", "")
            writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs
            used.append(writes)  # into what may be no tensor of this kind
            out = super().__torch_function__(func, types, args, kwargs)
            for leaf in tree_leaves(out):
                if isinstance(leaf, Noting):
                    leaf.elsewhere = True
            return out

    def made_elsewhere(leaf: Any) -> bool:
        return isinstance(leaf, Noting) and leaf.elsewhere

    def on_output(entry: str, layer: str, output: Any) -> None:
        used.append(any(map(made_elsewhere, tree_leaves(output))))

    # An op that takes no such tensor is one that the transforms, or the pass itself, will speak of.
    with contextlib.suppress(Exception), torch.no_grad(), same_random_numbers(inputs.device):
        z = starting_point(hooked, inputs).as_subclass(Noting)
        with hooked.attached(on_output, lambda output: z):
            args, kwargs = inputs.arguments(z if inputs.wrt else None)
            hooked.model(*args, **kwargs)
    if any(used):
        raise ProbeError(
            "the model computes in threads of its own, in which the tangents of the engine 'functorch' are lost.\n"
            "Measure it with engine='vjp'"
        )


def starting_point(hooked: HookedModel, inputs: Inputs) -> Tensor:
    """Return the tensor that the metric is pulled back to: the samples' own, or the source's output on them."""
    point = inputs.point
    return hooked.without(set(hooked.layers)).outputs(inputs).sources[0] if point is None else point.clone()
