"""What a model predicts: from its output to logits, and from logits to a class and how sure it is.

Legend of axes: B samples, C classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.inputs import arguments_of, copied
from torchgeom_probe.model.isolation import Mode, measuring
from torchgeom_probe.shapes import Float, Tensor

#: From a model's output to logits [B, C].
Readout = Callable[[Any], Tensor]

#: Numbers of input that a plain pass takes at once on a CPU: with more of them, what the allocator asks of the system
#: and gives back, tensor after tensor, doubles the time.  And samples, elsewhere.
_NUMBERS_AT_ONCE, _SAMPLES_AT_ONCE = 1 << 21, 64

#: The names of what :func:`decisions` returns.
DECISIONS = ("predictions", "entropy", "margin", "confidence")


def logits_of(output: Any, *, readout: Readout | None, batch: int) -> Float[Tensor, " batch classes"]:
    """Read the logits [B, C] out of a model's output, or say what to write where it has none.

    Raises:
        ProbeError: an output, or what ``readout`` makes of it, that is no [B, C] with C ≥ 2.

    >>> logits_of(torch.zeros(2, 3), readout=None, batch=2).shape
    torch.Size([2, 3])

    """
    logits = output if readout is None else readout(output)
    if isinstance(logits, Tensor) and logits.shape == (batch, 1):
        raise ProbeError(
            f"the model gives one number a sample, shape {tuple(logits.shape)}, where predictions need logits [B, C] "
            "of C ≥ 2 classes.\n"
            "For a binary logit write:  readout=lambda z: torch.cat([torch.zeros_like(z), z], -1)"
        )
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != batch:
        tensor = isinstance(logits, Tensor)
        seen = f"a tensor of shape {tuple(logits.shape)}" if tensor else f"a {type(logits).__name__}"
        raise ProbeError(
            f"{'the model' if readout is None else 'readout'} gives {seen} for {batch} samples, where predictions need "
            "logits [B, C].\n"
            "Say how to get them from the model's output:  readout=lambda output: classifier(output.flatten(1))"
        )
    return logits


def decisions(logits: Float[Tensor, " batch classes"]) -> dict[str, Tensor]:
    """Return the class of each sample and how sure it is, [B] each, on the CPU.

    ``predictions``: the class of the largest logit, -1 where a logit is not finite.  ``entropy``: of the softmax, in
    nats.  ``margin``: the largest logit minus the second largest.  ``confidence``: the largest probability.  The last
    three are float64, so that the entropy of a confident network does not underflow to ties, and nan where the class
    is -1.

    >>> found = decisions(torch.tensor([[0.0, 0.0], [1000.0, 0.0], [math.nan, 0.0]]))
    >>> found["predictions"].tolist(), found["margin"].tolist()[:2]
    ([0, 0, -1], [0.0, 1000.0])
    >>> assert abs(found["entropy"][0] - math.log(2)) < 1e-12

    """
    logits = logits.detach().cpu().double()
    finite = logits.isfinite().all(-1)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    top = logits.topk(2, dim=-1).values
    undefined = torch.full_like(top[:, 0], math.nan)
    return {
        "predictions": torch.where(finite, logits.argmax(-1), -1),
        "entropy": torch.where(finite, torch.special.entr(p).sum(-1), undefined),
        "margin": torch.where(finite, top[:, 0] - top[:, 1], undefined),
        "confidence": torch.where(finite, p.max(-1).values, undefined),
    }


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Samples [B, ...] in parts that a plain pass takes fastest.

    >>> [len(part) for part in pieces(torch.zeros(30, 3, 224, 224))]
    [13, 13, 4]

    """
    on_cpu = x.device.type == "cpu"
    return x.split(max(1, _NUMBERS_AT_ONCE // max(1, x.shape[1:].numel())) if on_cpu else _SAMPLES_AT_ONCE)


def predicted(model: nn.Module, x: Tensor, readout: Readout | None) -> dict[str, Tensor]:
    """What the model predicts of samples [B, *input], and how surely (:func:`decisions`)."""
    parts = [decided(model, some, readout=readout, batch=len(some)) for some in pieces(x)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def decided(model: nn.Module, x: Any, *, readout: Readout | None, batch: int, mode: Mode = "eval") -> dict[str, Tensor]:
    """Run the model plainly, leave it as it was, and return its :func:`decisions` at x."""
    args, kwargs = tree_map(copied, arguments_of(x))
    of_readout = measuring(readout) if isinstance(readout, nn.Module) else contextlib.nullcontext()
    with measuring(model, mode=mode), of_readout:
        return decisions(logits_of(model(*args, **kwargs), readout=readout, batch=batch))
