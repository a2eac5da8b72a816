"""Plan once, run many: which entries fire, how large everything is, and what fits into memory at once."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.hooked import Batch, Task, features
from torchgeom_probe.model.isolation import same_random_numbers
from torchgeom_probe.model.layers import close_names
from torchgeom_probe.shapes import Tensor

#: The share of the free memory that a measurement may take where no budget is given.
SHARE_OF_FREE_MEMORY = 0.5
#: A rule holds its input, its output and at most one temporary: twice the peak of a plain forward pass over the same rows.
_ROWS_OVER_PLAIN = 2.0
#: What a saved pass may grow to by being copied, in rows or in bytes: from there on a backward pass is as fast per row as it gets.
_COPIED_ROWS = 32
_COPIED_BYTES = {"cpu": 64 << 20}
#: No more than that however many rows it is: speed is not worth any price.
_MOST_COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What one plain forward pass over a sample or two tells about a model and a shape of input.

    Attributes:
        features: entry → n, in the order of firing.
        space: shape per sample of what the metric is pulled back to.
        dtype: of that tensor, and so of the tangents.
        row_bytes: peak bytes of live activations per sample of a plain forward pass.
        graph_bytes: bytes per sample of all that a plain forward pass makes, which is the most that reverse mode saves.
        budget: bytes that a measurement may use.
        reference: entry → plain outputs [≤ 3, n] of the first samples, until a pass was compared with them.
        frames: random directions that were drawn for this space.
        random: whether the forward pass draws random numbers.
        writes_through_views: whether it writes in place to memory that it has viewed in another shape: what such a write reaches
            depends on how the tensors lie in memory, so a pass must lay them as the model does.
    """

    features: dict[str, int]
    space: tuple[int, ...]
    dtype: torch.dtype
    row_bytes: int
    graph_bytes: int
    budget: int
    reference: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    frames: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)
    random: bool = False
    writes_through_views: bool = False

    @property
    def num_inputs(self) -> int:
        """d, the numbers per sample of the space that the metric is pulled back to."""
        return prod(self.space)

    def samples_at_once(self, num_directions: int, batch: int) -> int:
        """How many samples fit with all their k directions (at least 1)."""
        return max(1, min(batch, self._rows() // (1 + num_directions)))

    def directions_at_once(self, num_directions: int, samples: int) -> int:
        """How many directions fit at once for that many samples (at least 1)."""
        return max(1, min(num_directions, self._rows() // samples - 1))

    def copies(self, at_once: int, samples: int, device: torch.device) -> int:
        """How often reverse mode saves its pass, so that as many cotangents are pulled back together (at least once)."""
        if self.random:  # copies would draw other numbers
            return 1
        each = max(1, self.graph_bytes)
        rows = max(_COPIED_ROWS, _COPIED_BYTES.get(device.type, _MOST_COPIED_BYTES) // each)
        most = min(self.budget // 4, _MOST_COPIED_BYTES) // each
        return max(1, min(at_once, min(rows, most) // samples))

    def bytes_of(self, samples: int, num_directions: int) -> int:
        """Peak bytes of a dual pass over so many samples and directions, estimated from that of a plain pass."""
        return int(_ROWS_OVER_PLAIN * self.row_bytes * samples * (1 + num_directions))

    def _rows(self) -> int:
        return int(self.budget / (_ROWS_OVER_PLAIN * max(self.row_bytes, 1)))

    @property
    def itemsize(self) -> int:
        """Bytes of one number of the tangents."""
        return torch.empty(0, dtype=self.dtype).element_size()

    def layer_groups(self, num_directions: int, samples: int = 1) -> Iterator[list[str]]:
        """Split the entries so that their kept tangents fit: all directions are needed at once for their cross terms.

        An entry whose tangents do not fit comes alone, and is streamed (``linalg.stream``).

        Raises:
            ProbeError: not even two directions of an entry fit.
        """
        group: list[str] = []
        used = 0
        for entry, n in self.features.items():
            self.refuse_too_long(entry, n, num_directions)
            need = num_directions * n * self.itemsize * samples
            if group and used + need > self.budget:
                yield group
                group, used = [], 0
            group.append(entry)
            used += need
        if group:
            yield group

    def refuse_too_long(self, entry: str, length: int, count: int) -> None:
        """Raise where the budget has no room for even two rows of a Jacobian of ``count`` rows of this length."""
        if 2 * length * self.itemsize > self.budget:
            whole = count * length * self.itemsize
            raise ProbeError(
                f"the Jacobian of layer {entry!r} at one sample is {count} x {length} numbers, {whole / 2**30:.2f} GiB, "
                f"and the memory budget is {self.budget / 2**30:.2f} GiB, too little for two of its rows.\n"
                f"Raise it:  GeometryProbe(model, ..., memory_budget={whole * 2}); "
                "pool the features:  transform=...; or take fewer directions:  estimator=Subspace(k=8)"
            )


def make_plan(task: Task, batch: Batch, *, memory_budget: int | None) -> Plan:
    """Run the model plainly on two samples and on three, hooked, and read off what a measurement needs to know.

    Raises:
        ProbeError: a layer that never fires, an output that has no samples axis or no floating numbers.
    """
    few = batch.chunk(0, 2)
    sizes: dict[str, int] = {}
    reference: dict[str, Tensor] = {}
    spaces: list[Tensor] = [] if few.point is None else [few.point]

    def on_output(entry: str, layer: str, output: Any) -> None:
        flats = features(task.leaves(layer, output), layer=layer, batch=few.size)
        sizes[entry] = sum(flat.shape[1] for flat in flats)

    def on_source(output: Any) -> None:
        value = task.source_value(output)
        if spaces:
            raise ProbeError(
                f"source={task.source_name!r} runs more than once in a forward pass, so it does not name one space.\n"
                "Name a module that runs once."
            )
        if value.shape[0] != few.size:
            raise ProbeError(
                f"source={task.source_name!r} puts out shape {tuple(value.shape)}, whose first axis is not the batch of {few.size}.\n"
                "Name a module whose output has the samples first."
            )
        spaces.append(value)

    def on_output_of_three(entry: str, layer: str, output: Any) -> None:
        # Of another size, so that an axis which happens to be as long as the batch is not taken for it.
        flats = features(task.leaves(layer, output), layer=layer, batch=3)
        reference[entry] = torch.cat([flat.detach().clone() for flat in flats], dim=1)[: batch.size]

    with same_random_numbers(batch.device):
        before = _random_state()
        with _LiveBytes(tree_leaves((list(task.model.parameters()), few.args, dict(few.kwargs)))) as live:
            with task.hooked(on_output, on_source):
                few.run(task.model)
        _refuse_silent(task, sizes, spaces)
        with task.hooked(on_output_of_three):
            batch.repeated(3).run(task.model)
        # Random outputs are never the same, and a fake tensor has no values to compare.
        fake = isinstance(spaces[0], FakeTensor)
        draws = not fake and not all(map(torch.equal, before, _random_state()))
        if fake or draws:
            reference.clear()
    return Plan(
        features=sizes,
        space=tuple(spaces[0].shape[1:]),
        dtype=spaces[0].dtype,
        row_bytes=live.peak // few.size,
        graph_bytes=live.total // few.size,
        reference=reference,
        random=draws,
        writes_through_views=live.wrote_through_views,
        budget=memory_budget
        if memory_budget is not None
        else int(SHARE_OF_FREE_MEMORY * free_memory(spaces[0].device)),
    )


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _refuse_silent(task: Task, fired: dict[str, int], spaces: Sequence[Tensor]) -> None:
    silent = [name for name in task.layers if name not in fired]
    if not spaces:
        raise ProbeError(
            f"source={task.source_name!r} did not run in the forward pass.\nName a module that does; torchgeom-probe layers lists them."
        )
    if silent:
        near = close_names(silent[0], [n for n, _ in task.model.named_modules() if n and n not in silent])
        raise ProbeError(
            f"layer{'s' if len(silent) > 1 else ''} {', '.join(map(repr, silent))} never fired in the forward pass.\n"
            "Likely: the model reaches past the module (activation checkpointing: model.set_grad_checkpointing(False); a traced or fx "
            f"model: hook its leaves), or does not use it in this mode.\nClose names: {', '.join(map(repr, near)) or 'none'}"
        )


#: What a reshape ends with where it copied: in another layout it would not have.
_HALF_VIEWS = {torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default}


class _LiveBytes(TorchDispatchMode):
    """Follows the bytes of the storages that ops make, until the tensors die: now, at the peak, and in all."""

    def __init__(self, known: Sequence[Any]) -> None:
        super().__init__()
        self.live = self.peak = self.total = 0
        self.wrote_through_views = False
        self._viewed: set[int] = set()
        self._alive: dict[int, int] = {}
        self._known = {t.untyped_storage()._cdata for t in known if isinstance(t, Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func._schema.is_mutable
            and args
            and isinstance(args[0], Tensor)
            and args[0].layout == torch.strided
        ):
            self.wrote_through_views |= args[0].untyped_storage()._cdata in self._viewed
        out = func(*args, **(kwargs or {}))
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
