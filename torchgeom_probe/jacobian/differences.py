"""Central differences of what the layers put out: an oracle that knows nothing of derivatives.

Only differences tell a derivative that torch itself has wrong: forward and reverse mode then agree with each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.jacobian.functorch import starting_point
from torchgeom_probe.model.hooked import HookedModel
from torchgeom_probe.model.inputs import Inputs
from torchgeom_probe.model.isolation import same_random_numbers
from torchgeom_probe.shapes import Tensor

#: Steps, as shares of the input's size, of which the best counts: too long a one crosses kinks, too short a one rounds.
_STEPS = {torch.float64: (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)}
_COARSE = (1e-1, 1e-2, 1e-3, 1e-4)
#: Disagreement that kinks and the rounding of the differences explain.
_TOLERANCE = {torch.float64: 3e-3, torch.float32: 5e-2}
#: And the kinks of which a pass in float32 rounds to the other side: 5e-3 in a U-Net++.
_FLIPPED = {torch.float64: 0.0, torch.float32: 2e-2}


def difference_errors(
    hooked: HookedModel, inputs: Inputs, v: Tensor, pushed: Mapping[str, Tensor]
) -> tuple[dict[str, float], float]:
    """Entry → |D − Jv| relative to the larger, D the central difference along v [B, *space]; and what is tolerated.

    Run in float64 if the model can be, whatever its own type; else in its own.
    """
    point = starting_point(hooked, inputs)
    wide: dict[str, Any] | None = {
        name: t.double() if t.is_floating_point() else t
        for name, t in [*hooked.model.named_parameters(), *hooked.model.named_buffers()]
    }
    widened = replace(inputs, leaves=tuple(_double(leaf) for leaf in inputs.leaves))
    try:
        base = _features(hooked, widened, point.double(), wide)
    except ProbeError:
        raise
    except Exception:  # a type written down somewhere inside
        wide, widened = None, inputs
        base = _features(hooked, inputs, point, None)
    dtype = torch.float64 if wide is not None else point.dtype
    point, v = point.to(dtype), v.to(dtype)
    size = point.norm() / v.norm() if point.any() else 1 / v.norm()
    errors = dict.fromkeys(pushed, torch.inf)
    pushed_dtype = next(iter(pushed.values())).dtype
    tolerance = max(_TOLERANCE.get(dtype, 0.3), _FLIPPED.get(pushed_dtype, 0.0), 30 * torch.finfo(pushed_dtype).eps)
    for step in _STEPS.get(dtype, _COARSE):
        h = step * size
        ahead, behind = (_features(hooked, widened, point + sign * h * v, wide) for sign in (1, -1))
        for entry, jv in pushed.items():
            slope, jv = (ahead[entry] - behind[entry]).double() / (2 * h), jv.double()
            noise = 10 * torch.finfo(ahead[entry].dtype).eps * base[entry].double().norm() / h
            larger = torch.maximum(slope.norm(), jv.norm())
            if noise > tolerance * larger and errors[entry] < torch.inf:
                continue  # a step so short that rounding could hide what the longer ones have shown
            apart = ((slope - jv).norm() - noise).clamp_min(0) / larger
            error = 0.0 if not apart.isfinite() and slope.isfinite().all() and not jv.any() else apart.item()
            errors[entry] = min(errors[entry], error)
    return errors, tolerance


def _features(hooked: HookedModel, inputs: Inputs, z: Tensor, weights: dict[str, Any] | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def on_output(entry: str, layer: str, output: Any) -> None:
        flats = hooked.features(layer, hooked.leaves(layer, output), inputs.size, output)
        found[entry] = torch.cat([flat.detach() for flat in flats], dim=1).clone()

    with same_random_numbers(z.device), hooked.attached(on_output, lambda output: z), contextlib.ExitStack() as stack:
        args, kwargs = inputs.arguments(z if inputs.wrt else None)
        if weights is None:
            hooked.model(*args, **kwargs)
        else:
            stack.enter_context(torch.autocast(z.device.type, enabled=False))
            torch.func.functional_call(hooked.model, weights, args, kwargs)
    return found


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
