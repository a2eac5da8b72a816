"""A data set as units of work, each a fixed batch of indices; and of a batch what the model takes, label and file."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    default_collate,
)

from torchgeom_probe.errors import ProbeError, first_line
from torchgeom_probe.shapes import Tensor

#: Samples a unit where neither a loader nor the caller says.
BATCH = 64
#: What a loader's own setting is kept of.
_LOADING = ("num_workers", "timeout", "worker_init_fn", "multiprocessing_context")


@dataclass(frozen=True, eq=False)
class Unit:
    """Samples that go to the model together: their indices and their batch; index → why for those that failed."""

    number: int
    indices: list[int]
    batch: Any
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Units:
    """A data set cut into units; item u is unit u.  Random augmentations draw from a seed that is the unit's.

    Attributes:
        dataset: a map-style data set; or, where ``size`` is 0, an iterable whose every item is a batch.
        order: the indices that are measured, ascending.
        size: samples a unit.
        collate: from a list of samples to a batch.
        loading: what torch's DataLoader is given: workers, their timeout ….
    """

    dataset: Any
    order: Sequence[int] = ()
    size: int = 0
    collate: Callable[[list[Any]], Any] = default_collate
    loading: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(data: Any, *, batch_size: int | None, num_workers: int | None, collate_fn: Any) -> Units:
        """Read what the user passes: a DataLoader, a Dataset, a tensor of samples, or an iterable of batches.

        Raises:
            ProbeError: a sampler of one's own, whose order nobody can come back to; nothing to iterate.
        """
        loader = data if isinstance(data, DataLoader) else None
        dataset = data if loader is None else loader.dataset
        if batch_size is not None and batch_size < 1:
            raise ProbeError(f"batch_size={batch_size} must be at least 1: samples a unit.\nLeave it out for {BATCH}.")
        own = {} if loader is None else {name: getattr(loader, name) for name in _LOADING}
        loading = own if num_workers is None else {**own, "num_workers": num_workers}
        collate_fn = collate_fn or (default_collate if loader is None else loader.collate_fn)
        size = batch_size or (None if loader is None else loader.batch_size) or BATCH
        batches = isinstance(dataset, (IterableDataset, list, tuple)) or (
            loader is not None and not loader.batch_sampler
        )
        if not batches and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not _is_batch(dataset):
            order = range(len(dataset)) if loader is None else _order(loader, len(dataset))
            return Units(dataset, order, size, collate_fn, loading)
        if not isinstance(data, Iterable) or _is_batch(data):
            raise ProbeError(
                f"a {type(data).__name__} is no data set.\n"
                "Pass a DataLoader, a Dataset or an iterable of batches; of a single batch:  tgp.measure(model, x)"
            )
        if loader is None and isinstance(dataset, IterableDataset):
            data = DataLoader(dataset, size, collate_fn=collate_fn, **loading)
        return Units(data)

    def __len__(self) -> int:
        return -(-len(self.order) // self.size) if self.size else 0

    def __getitem__(self, number: int) -> Unit:
        return self.load(number, self.order[number * self.size : (number + 1) * self.size])

    def load(self, number: int, indices: Iterable[int]) -> Unit:
        """Load some samples of a unit; ``batch`` is the error where those that load do not go together."""
        samples: dict[int, Any] = {}
        failed: dict[int, str] = {}
        with _seeded(number):
            for index in map(int, indices):
                try:
                    samples[index] = self.dataset[index]
                except Exception as error:
                    failed[index] = first_line(error)
            try:
                batch = self.collate(list(samples.values())) if samples else None
            except Exception as error:
                batch = ProbeError(first_line(error))
        return Unit(number, list(samples), batch, failed)

    def loaded(self, wanted: Callable[[int], bool]) -> Iterator[Unit]:
        """The wanted units, in order; of an iterable all of them, as they come."""
        if self.size:
            todo = [number for number in range(len(self)) if wanted(number)]
            # A generator of its own: torch's would be drawn from for the seeds of the workers.
            options: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), **self.loading}
            yield from DataLoader(self, None, sampler=todo, collate_fn=_as_it_is, **options)  # type: ignore[arg-type]
            return
        with _seeded(0):
            batches = iter(self.dataset)
        start = 0
        for number, batch in enumerate(batches):
            leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)  # transformers' is a mapping
            size = next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)
            yield Unit(number, list(range(start, start + size)), batch)
            start += size

    def file(self, index: int) -> str | None:
        """The name of a sample's file, where the data set lists them as torchvision's do."""
        dataset: Any = self.dataset
        while isinstance(dataset, Subset):
            dataset, index = dataset.dataset, dataset.indices[index]
        listed = next(
            (v for v in (getattr(dataset, n, None) for n in ("samples", "imgs", "files")) if v is not None), ()
        )
        entry = listed[index] if isinstance(listed, (list, tuple)) and index < len(listed) else None
        entry = entry[0] if isinstance(entry, (list, tuple)) and entry else entry
        named = isinstance(entry, (str, os.PathLike))
        return os.fsencode(entry).decode("utf-8", "backslashreplace") if named else None  # type: ignore[arg-type]


def _is_batch(data: Any) -> bool:
    return isinstance(data, (str, bytes, Mapping))


def _as_it_is(unit: Unit) -> Unit:
    return unit


def _order(loader: DataLoader, length: int) -> Sequence[int]:
    """The indices that a loader draws, in the data set's own order, however it shuffles or shares them."""
    odd: Any = loader.batch_sampler
    if type(odd) is BatchSampler:
        odd = loader.sampler
        shuffled = isinstance(odd, RandomSampler) and not odd.replacement and odd.num_samples >= length
        if shuffled or isinstance(odd, (SequentialSampler, DistributedSampler)):
            return range(length)
        if isinstance(odd, SubsetRandomSampler):
            return sorted(map(int, odd.indices))
    raise ProbeError(
        f"the loader draws its samples by a {type(odd).__name__}: which come, and how often, is not known beforehand.\n"
        "Pass the data set, or a part:  measure_dataset(model, torch.utils.data.Subset(loader.dataset, indices))"
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of the body's own, the same in any process; the caller's generators are left as they were."""
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])


def input_of(batch: Any, named: Any, label: Any, parameters: Sequence[str]) -> Any:
    """What the model takes of a batch: what is ``named`` (places or keys), else the first entry that is no label.

    Of a dict, the entries that the model's forward takes by name; of several views of a sample, the first.

    Raises:
        ProbeError: nothing of the name; no entry that could be meant.
    """
    if isinstance(named, (list, tuple)):
        chosen = {name: entry_of(batch, name, "input") for name in named}
        return chosen if isinstance(batch, Mapping) else tuple(chosen.values())
    if named is not None:
        return entry_of(batch, named, "input")
    found = batch
    if isinstance(batch, Mapping):
        others = {key: v for key, v in batch.items() if key not in (label, "label", "labels")}
        floating = [v for v in others.values() if isinstance(v, Tensor) and v.is_floating_point()]
        found = {key: v for key, v in others.items() if key in parameters} or (floating[0] if floating else None)
    elif isinstance(batch, (list, tuple)):
        found = next((v for place, v in enumerate(batch) if place != label), None)
        found = found[0] if isinstance(found, (list, tuple)) and found else found  # views of the same samples
    if not isinstance(found, (Tensor, Mapping)):
        raise ProbeError(f"the model's input was not found in {_in_words(batch)}.\nName its place or key:  input=0")
    return found


def labels_of(batch: Any, label: Any) -> list[Any]:
    """One label a sample, numbers or words.

    Raises:
        ProbeError: the batch has none there.
    """
    found = entry_of(batch, label, "label")
    if isinstance(found, (Tensor, np.ndarray)) and found.ndim == 1:
        return found.tolist()
    if not isinstance(found, (list, tuple)):
        raise ProbeError(
            f"label={label!r} is {_in_words(found)}, not one label a sample.\nName another, or leave it out."
        )
    return list(found)


def names_in(batch: Any, label: Any, size: int) -> list[str] | None:
    """A list of one text a sample that is not the label, as lightly's loaders give file names."""
    entries = (
        batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, (list, tuple)) else ()
    )
    for key, entry in entries:
        named = isinstance(entry, (list, tuple)) and len(entry) == size and all(isinstance(n, str) for n in entry)
        if key != label and named:
            return list(entry)
    return None


def entry_of(batch: Any, name: Any, argument: str) -> Any:
    """A batch's entry by its place or key."""
    try:
        return batch[name]
    except (KeyError, IndexError, TypeError) as error:
        raise ProbeError(
            f"{argument}={name!r} is not in {_in_words(batch)}.\nName a place or key that is:  {argument}=1"
        ) from error


def _in_words(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    entries = map(repr, batch) if isinstance(batch, Mapping) else (type(v).__name__ for v in batch or ())
    return f"a {type(batch).__name__}" + (
        f" of {', '.join(entries)}" if isinstance(batch, (Mapping, list, tuple)) else ""
    )


def by_length(x: Any, size: int) -> Iterator[tuple[list[int], Any]]:
    """Samples of one length together, without the padding at their ends that an ``attention_mask`` marks."""
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.bool().all()):
        yield list(range(size)), x
        return
    lengths = (mask.bool() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).clamp_min(1)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0].tolist()
        yield rows, {key: _cut(value, rows, mask, length) for key, value in x.items()}


def _cut(value: Any, rows: list[int], mask: Tensor, length: int) -> Any:
    if not isinstance(value, Tensor) or value.shape[:1] != mask.shape[:1]:
        return value
    return value[rows, :length] if value.shape[:2] == mask.shape else value[rows]
