"""Central differences of what the layers put out: an oracle that knows nothing of derivatives.

Only differences tell a derivative that torch itself has wrong: forward and reverse mode then agree with each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchgeom_probe.jacobian.functorch import starting_point
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.model.isolation import same_random_numbers
from torchgeom_probe.shapes import Tensor

#: Steps, as shares of the input's size, of which the best counts: too long a one crosses kinks, too short a one rounds.
_STEPS = {torch.float64: (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)}
_COARSE = (1e-1, 1e-2, 1e-3, 1e-4)
#: Disagreement that kinks and the rounding of the differences explain.
_TOLERANCE = {torch.float64: 3e-3, torch.float32: 5e-2}
#: What a narrower type of the model's own may round of Jv, over kinks too: that much is no other derivative.
_ROUNDED = 0.3


def in_float64(jacobians: Jacobians, v: Tensor, pushed: Mapping[str, Tensor]) -> tuple[Jacobians, dict[str, Tensor]]:
    """The same in float64, and Jv in it; in the model's own type, and ``pushed``, where it does not run in float64."""
    wide, found = _widened(jacobians), dict[str, Tensor]()
    try:
        _features(wide, starting_point(wide.hooked, wide.inputs))
        wide.push(v.double()[None], lambda entry, blocks: found.update({entry: torch.cat(blocks, dim=2)[0]}))
    except Exception:  # a type written down somewhere inside
        return jacobians, dict(pushed)
    return wide, found


def difference_errors(
    wide: Jacobians, v: Tensor, pushed: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> tuple[dict[str, float], float]:
    """Entry → |D − Jv| relative to the larger, D the central difference along v [B, *space]; and what is tolerated.

    Both in float64 if the model runs in it, whatever its own type (:func:`in_float64`): rounding then has no part in
    it.  ``pushed``: Jv in the model's own type, which must be near; ``found``: in that of ``wide``.
    """
    point = starting_point(wide.hooked, wide.inputs)
    base, v = _features(wide, point), v.to(point.dtype)
    size = point.norm() / v.norm() if point.any() else 1 / v.norm()
    errors, settled = dict.fromkeys(pushed, torch.inf), dict.fromkeys(pushed, torch.inf)
    spread, before = dict.fromkeys(pushed, torch.inf), dict[str, tuple[Tensor, Tensor]]()
    tolerance = max(_TOLERANCE.get(point.dtype, 0.3), 30 * torch.finfo(point.dtype).eps)
    for step in _STEPS.get(point.dtype, _COARSE):
        h = step * size
        ahead, behind = (_features(wide, point + sign * h * v) for sign in (1, -1))
        for entry, jv in found.items():
            slope, jv = (ahead[entry] - behind[entry]).double() / (2 * h), jv.double()
            noise = 10 * torch.finfo(ahead[entry].dtype).eps * base[entry].double().norm() / h
            larger = torch.maximum(slope.norm(), jv.norm())
            longer, its_noise = before.get(entry, (slope.new_full((), torch.inf), noise))
            before[entry] = slope, noise
            unsure = (slope - longer).norm() + its_noise
            if unsure < spread[entry] and point.dtype == torch.float64:  # in which there are steps enough
                spread[entry] = unsure.item()
                apart = torch.minimum((slope - jv).norm(), (longer - jv).norm()) - unsure
                settled[entry] = (apart.clamp_min(0) / larger.clamp_min(1e-300)).item()
            if noise > tolerance * larger and errors[entry] < torch.inf:
                continue  # a step so short that rounding could hide what the longer ones have shown
            apart = ((slope - jv).norm() - noise).clamp_min(0) / larger
            error = 0.0 if not apart.isfinite() and slope.isfinite().all() and not jv.any() else apart.item()
            errors[entry] = min(errors[entry], error)
    # Where no step is short enough for the kinks of a deep network and long enough for its rounding, what the steps
    # say differs from step to step, and by so much, where they differ least, it may differ from Jv.
    errors = {entry: min(error, settled[entry]) for entry, error in errors.items()}
    for entry, own in pushed.items():
        jv, noise = found[entry].double(), 10 * torch.finfo(own.dtype).eps * base[entry].double().norm() / size
        rounded = ((own.double() - jv).norm() - noise).clamp_min(0) / jv.norm().clamp_min(1e-300)
        if not rounded <= _ROUNDED:
            errors[entry] = rounded.item()
    return errors, tolerance


class _Wide(nn.Module):
    """A model that runs on float64 copies of its weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        own = [*model.named_parameters(), *model.named_buffers()]
        self._weights: dict[str, Any] = {name: _double(t) for name, t in own}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        device = next((t.device.type for t in self._weights.values()), "cpu")
        with torch.autocast(device, enabled=False):
            return torch.func.functional_call(self.model, self._weights, args, kwargs)


def _widened(jacobians: Jacobians) -> Jacobians:
    """The same in float64."""
    return Jacobians(
        replace(jacobians.hooked, model=_Wide(jacobians.hooked.model)),
        replace(jacobians.inputs, leaves=tuple(map(_double, jacobians.inputs.leaves))),
        replace(jacobians.plan, dtype=torch.float64, reference={}, layout=None),
        jacobians.engine,
    )


def _features(jacobians: Jacobians, z: Tensor) -> dict[str, Tensor]:
    hooked, inputs = jacobians.hooked, jacobians.inputs
    found: dict[str, Tensor] = {}

    def on_output(entry: str, layer: str, output: Any) -> None:
        flats = hooked.features(layer, hooked.leaves(layer, output), inputs.size, output)
        found[entry] = torch.cat([flat.detach() for flat in flats], dim=1).clone()

    with same_random_numbers(z.device), hooked.attached(on_output, lambda output: z):
        args, kwargs = inputs.arguments(z if inputs.wrt else None)
        hooked.model(*args, **kwargs)
    return found


def _double(leaf: Any) -> Any:
    return leaf.detach().double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
