"""Refused: a pass that writes to what a measurement cannot put back."""

from __future__ import annotations

from torch import nn

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor


def written_in_place(model: nn.Module, written: list[Tensor]) -> ProbeError:
    """What to say where these tensors, which have no copy, were written to; none of them: gradients were."""
    named = [name for name, p in model.named_parameters() if any(p is t for t in written)]
    if written and not named:
        return ProbeError(
            f"the forward pass writes in place to a tensor of {list(written[0].shape)} that is no buffer.\n"
            "Make it one:  self.register_buffer(name, tensor, persistent=False)"
        )
    what = f"its own parameters in place ({', '.join(named[:3])})" if named else "its gradients in place"
    return ProbeError(
        f"the model's forward pass writes to {what}, also in eval mode, so it cannot be measured without being "
        "changed.\n"
        "Do that in the training step instead, or behind  if self.training:"
    )


def other_memory(name: str | None) -> ProbeError:
    """What to say where ``.data`` of the model's own tensor of this name, or of another tensor, is assigned to."""
    if name is None:
        return ProbeError(
            "the model's forward pass assigns to .data of a tensor, also in eval mode.\nWrite  tensor.copy_(other)"
        )
    return ProbeError(
        f"the model's forward pass assigns to .data of its own tensor {name!r}, also in eval mode: an initialisation "
        "by the first batch, as of ActNorm?\n"
        "Run the model once before you probe it:  model(x); where every pass assigns, let it use the new value without "
        "storing it:  scale = self.scale.abs()"
    )
