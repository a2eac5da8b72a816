"""One measurement over several processes that hold the same weights (DDP): samples shared out, results on rank 0.

No collective: a rank that reaches a measurement leaves its part in the process group's key-value store and goes on;
rank 0 collects the parts, and measures itself what does not come.  So one that only some ranks reach ends.

DDP keeps the parameters equal, and not the buffers: after a step each rank's batch normalisation has seen its own
batch, until the next forward pass brings rank 0's.  So every rank measures with rank 0's buffers, as they will be in
the checkpoint.

Legend of axes: B samples.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import count, pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.wrappers import unwrapped
from torchgeom_probe.shapes import Tensor

Part = TypeVar("Part")

# How long rank 0 waits for a rank that has always come before it measures that rank's samples itself.
PATIENCE_SECONDS = 20.0

# Ranks make their monitors in the same order, so the n-th one here is the n-th one there.
_serial = count()


class Ranks:
    """The processes that train copies of one model, and how they share the samples of a probe.

    Args:
        group: the process group; None for the default one.
        samples: a fingerprint of the probe's samples; parts of other samples are not taken for theirs.

    Attributes:
        rank: this process's place in the group; rank 0 collects and writes.
        size: how many processes there are.
    """

    def __init__(self, group: Any = None, *, samples: str = "") -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._store = dist.PrefixStore(
            f"torchgeom_probe/{getattr(group, 'group_name', '')}/{next(_serial)}/{samples}",
            dist.distributed_c10d._get_default_store(),
        )
        self._absent: set[int] = set()
        self._handed_out = ""
        self._visits: Counter[int] = Counter()

    @staticmethod
    def of(model: nn.Module, distributed: bool | None, *, samples: str = "") -> Ranks | None:
        """Return the ranks that train this model: those of its DDP wrapper where ``distributed`` is None.

        Raises:
            ProbeError: ``distributed=True`` without a process group.
        """
        wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
        if distributed is False or (distributed is None and not wrapped):
            return None
        if not (dist.is_available() and dist.is_initialized()):
            raise ProbeError(
                "distributed=True shares the probe's samples over the ranks, and there is no process group.\n"
                "Write  torch.distributed.init_process_group('gloo')  first, or leave distributed= out."
            )
        return Ranks(model.process_group if wrapped else None, samples=samples)

    def measured(self, model: nn.Module, x: Any, step: int, measure: Callable[[Any], Part]) -> list[Part] | None:
        """Measure this rank's samples of ``x``; on rank 0 return the results of all ranks in order, elsewhere None.

        Args:
            model: what is measured; its buffers are rank 0's for the time of the measurement.
            x: the same on every rank: a tensor [B, ...], or a tuple or dict of them.
            step: names the measurement, so that parts of different steps are not mixed.
            measure: what to do with a part of ``x``; its result is pickled on its way to rank 0.
        """
        size = next(leaf.shape[0] for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.dim())
        visit = self._visits[step]
        self._visits = Counter({step: visit + 1})
        key = f"{step}/{visit}"
        bounds = [size * rank // self.size for rank in range(self.size + 1)]
        parts = [_samples(x, size, *pair) for pair in pairwise(bounds)]
        buffers = {name: b for name, b in unwrapped(model).named_buffers() if b.is_floating_point()}
        if self.rank:
            if parts[self.rank] is not None:
                self._leave(key, parts[self.rank], step, buffers, measure)
            return None
        if buffers:
            self._hand_out(f"{key}/buffers", buffers)
        results = [] if parts[0] is None else [measure(parts[0])]
        for rank, part in enumerate(parts[1:], start=1):
            if part is not None:
                packed = self._awaited(f"{key}/{rank}", rank, step)
                if packed is not None:
                    self._store.delete_key(f"{key}/{rank}")
                results.append(_unpacked(packed) if packed else measure(part))
        return results

    def _hand_out(self, key: str, buffers: Mapping[str, Tensor]) -> None:
        if self._handed_out:
            self._store.delete_key(self._handed_out)
        self._handed_out = key
        self._store.set(key, _packed({name: b.detach().cpu() for name, b in buffers.items()}))  # type: ignore[arg-type]

    def _leave(self, key: str, x: Any, step: int, buffers: Mapping[str, Tensor], measure: Callable[[Any], Any]) -> None:
        theirs: Mapping[str, Tensor] = {}
        if buffers:
            packed = self._awaited(f"{key}/buffers", 0, step)
            if packed is None:
                return
            theirs = _unpacked(packed)
        try:
            with _borrowed(buffers, theirs):
                result = measure(x)
        except Exception:
            self._store.set(f"{key}/{self.rank}", "")  # rank 0 need not wait; it meets the same error by itself
            raise
        self._store.set(f"{key}/{self.rank}", _packed(result))  # type: ignore[arg-type]  # bytes go too

    def _awaited(self, key: str, rank: int, step: int) -> bytes | None:
        deadline = time.monotonic() + (0.0 if rank in self._absent else PATIENCE_SECONDS)
        pause = 0.0005
        # Asked, not waited for: a blocking wait would hold the store's one connection.
        while not self._store.check([key]):
            if time.monotonic() >= deadline:
                self._missed(rank, step)
                return None
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        self._absent.discard(rank)
        return self._store.get(key)

    def _missed(self, rank: int, step: int) -> None:
        if rank in self._absent:
            return
        self._absent.add(rank)
        rest = "measured nothing" if self.rank else "measured that part itself"
        warnings.warn(
            f"torchgeom_probe: rank {rank} left no part of the probe at step {step} within {PATIENCE_SECONDS:g} s: it "
            f"did not reach it, or has other probe samples.  Rank {self.rank} {rest}, and waits for it no longer "
            "until it is there again.\nCall the monitor on every rank, with the same x_probe.",
            RuntimeWarning,
            stacklevel=2,
        )


@contextlib.contextmanager
def _borrowed(buffers: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[None]:
    own = {name: buffer.clone() for name, buffer in buffers.items()}
    try:
        _set(buffers, theirs)
        yield
    finally:
        _set(buffers, own)


def _set(buffers: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.data.copy_(values[name])  # .data: no version counter moves under a backward pass


def _samples(x: Any, size: int, start: int, stop: int) -> Any:
    """Samples ``start … stop`` of every tensor that has the batch axis, or None where that is none."""
    if start == stop:
        return None
    return tree_map_only(Tensor, lambda t: t[start:stop] if t.dim() and t.shape[0] == size else t, x)


def _packed(contents: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> Any:
    # What torch.distributed's own gather_object trusts: these bytes come from the ranks of this very run.
    return torch.load(io.BytesIO(packed), weights_only=False)
