"""The samples of a monitor: what can be probed at, what they are, and the fingerprint of a resumed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.utils._pytree import tree_leaves

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.files import digest
from torchgeom_probe.model.inputs import refuse_unless_dense
from torchgeom_probe.model.predictions import decided
from torchgeom_probe.probe import GeometryProbe
from torchgeom_probe.shapes import Tensor


@dataclass(frozen=True, eq=False)
class ProbeSamples:
    """What a probe was made at, for writers that show it.

    Attributes:
        probe: the probe, on the model as it is now.
        x: the samples, as the probe takes them.
        indices: where they stand in the user's data set, or None.
        labels: what the user calls them, a class or a name each, or None.
    """

    probe: GeometryProbe
    x: Any
    indices: Sequence[int] | None = None
    labels: Sequence[int | str] | None = None

    @cached_property
    def decisions(self) -> Mapping[str, Tensor]:
        """Each sample's predicted class, margin, … (``predictions.decisions``); empty where the output is no logits.

        Cost: one plain forward pass, when it is first asked for.
        """
        try:
            return decided(self.probe.model, self.x, readout=None, batch=size_of(self.x), mode=self.probe.mode)
        except ProbeError:
            return {}


def size_of(x_probe: Any) -> int:
    """How many samples there are."""
    return next(len(leaf) for leaf in tree_leaves(x_probe) if isinstance(leaf, Tensor) and leaf.dim())


def labels_of(labels: Any, x_probe: Any) -> list[int | str] | None:
    """Return one class or name a sample, as plain Python values.

    Raises:
        ProbeError: more or fewer labels than samples, or labels of another kind.
    """
    if labels is None:
        return None
    found = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    size = size_of(x_probe)
    if len(found) != size or not all(isinstance(label, int | str) for label in found):
        kinds = ", ".join(dict.fromkeys(type(label).__name__ for label in found))
        raise ProbeError(
            f"labels= takes one class (int) or name (str) for each of the {size} probe samples; got {len(found)} of "
            f"type {kinds or 'none'}.\nWrite:  tgp.Monitor(model, x[:16], labels=y[:16], ...)"
        )
    return found


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
