"""The samples of a monitor: what can be probed at, and the fingerprint that a resumed run is compared by."""

from __future__ import annotations

from typing import Any

from torch.utils._pytree import tree_leaves

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.files import digest
from torchgeom_probe.model.inputs import refuse_unless_dense
from torchgeom_probe.shapes import Tensor


def refuse_no_samples(x_probe: Any) -> None:
    """Refuse what holds no samples with numbers to probe at."""
    tensors = [leaf for leaf in tree_leaves(x_probe) if isinstance(leaf, Tensor)]
    refuse_unless_dense(tensors)
    write = "tgp.Monitor(model, torch.stack([dataset[i][0] for i in range(16)]), ...)"
    if not tensors or any(tensor.dim() == 0 or tensor.shape[0] == 0 for tensor in tensors):
        shapes = ", ".join(f"a tensor of shape {list(t.shape)}" for t in tensors)
        raise ProbeError(
            f"x_probe is the batch of samples to probe at, a tensor [B, ...] with B of 1 or more; "
            f"got {shapes or f'a {type(x_probe).__name__}'}.\nWrite:  {write}"
        )
    if any(tensor.is_meta for tensor in tensors):
        raise ProbeError(
            f"x_probe is on the device 'meta': it has a shape and no numbers.\nPass samples of your data:  {write}"
        )


def fingerprint(x_probe: Any) -> str:
    """Types, shapes and a digest of the numbers."""
    tensors = [leaf for leaf in tree_leaves(x_probe) if isinstance(leaf, Tensor)]
    shapes = [f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors]
    return f"{'+'.join(shapes)}:{digest(*tensors)}"
