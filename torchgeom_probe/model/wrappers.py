"""Models behind wrappers: the user's own module inside, and those that cannot be hooked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.sharded import groups, is_dtensor, parts


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's own module behind ``torch.compile`` (``_orig_mod``) and (Distributed)DataParallel (``module``).

    >>> layer = nn.Linear(2, 3)
    >>> unwrapped(nn.DataParallel(layer)) is layer
    True
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def refuse_unhookable(model: nn.Module) -> None:
    """Raise for a model whose hooks do not fire, or whose ops need every rank at once."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ProbeError(
            "the model is a ScriptModule: hooks do not fire inside it.\nProbe the nn.Module that it was made from."
        )
    wrapped = next((n for n, m in model.named_modules() if type(m).__name__ == "FullyShardedDataParallel"), None)
    fsdp = {id(p) for module in parts(model) for p in module.parameters() if not _in_parallel(module, p)}
    parallel = next((n for n, p in model.named_parameters() if is_dtensor(p) and id(p) not in fsdp), None)
    sharded = None
    if parallel is not None:
        sharded = f"parameter {parallel!r} is a DTensor of tensor parallelism"
    elif wrapped is not None:
        sharded = f"{repr(wrapped) if wrapped else 'the model'} is a FullyShardedDataParallel"
    if sharded is not None:
        raise ProbeError(
            f"{sharded}: its ops need every rank at once.\n"
            "Gather the model first (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
            "full_state_dict=True) into a plain copy, and probe that; or shard it by fully_shard (FSDP2)."
        )


def _in_parallel(module: Any, parameter: nn.Parameter) -> bool:
    """Whether FSDP shards what tensor parallelism had sharded before."""
    return any(p.sharded_param is parameter and p.is_dtensor for group in groups(module) for p in group.fsdp_params)
