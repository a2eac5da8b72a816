"""Bytes: what a forward pass makes and holds, and what a device has left."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchgeom_probe.shapes import Tensor

#: What a reshape ends with where it copied: in another layout it would not have.
_HALF_VIEWS = {torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default}

#: What writes to views of weights that come from other ranks, and to nothing of the model's.
_GATHERING = {"c10d", "fsdp", "_c10d_functional"}


class DispatchMode(TorchDispatchMode):
    """A dispatch mode for which torch does not import its compiler, which takes seconds, only to leave it alone."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class LiveBytes(DispatchMode):
    """Follows the bytes of the storages that ops make, until the tensors die: now, at the peak, and in all."""

    supports_higher_order_operators = True  # flex_attention and the like have no schema, and write to nothing

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Watching changes nothing: flex_attention, which compiles itself when it first runs, may do so below."""
        return True

    def __init__(self, known: Sequence[Any]) -> None:
        super().__init__()
        self.live = self.peak = self.total = 0
        self.wrote_through_views = False
        self._paused = False
        self._viewed: set[int] = set()
        self._alive: dict[int, int] = {}
        self._known = {t.untyped_storage()._cdata for t in known if isinstance(t, Tensor)}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing that the body makes."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.HigherOrderOperator):
            return func(*args, **(kwargs or {}))
        own = func._schema.is_mutable and func.namespace not in _GATHERING
        if own and args and isinstance(args[0], Tensor) and args[0].layout == torch.strided:
            self.wrote_through_views |= args[0].untyped_storage()._cdata in self._viewed
        out = func(*args, **(kwargs or {}))
        if self._paused:
            return out
        views = func.is_view or func in _HALF_VIEWS
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._follow(leaf)
                if views:
                    self._viewed.add(leaf.untyped_storage()._cdata)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        if key not in self._alive:
            self.live += storage.nbytes()
            self.total += storage.nbytes()
            self.peak = max(self.peak, self.live)
            self._alive[key] = 0
        self._alive[key] += 1
        weakref.finalize(tensor, self._released, key, storage.nbytes())

    def _released(self, key: int, nbytes: int) -> None:
        self._alive[key] -= 1
        if not self._alive[key]:
            del self._alive[key]
            self._viewed.discard(key)  # what takes its place is another tensor
            self.live -= nbytes


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; on a CPU within the limits of the control group, too."""
    if device.type == "cuda" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = _available_ram()
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):
            continue
    return max(free, 1 << 28)


def _available_ram() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 4 << 30
