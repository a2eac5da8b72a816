"""A model's arguments for B samples, and those among them that the metric lives on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Union

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten_with_path, tree_unflatten

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor

#: Arguments by name or place, one or several.
Wrt = Union[str, int, Sequence[Union[str, int]]]  # noqa: UP007


@dataclass(frozen=True, eq=False)
class Inputs:
    """A model's arguments for B samples, flat.

    Attributes:
        leaves, spec: the positional and keyword arguments as a pytree: dicts, lists and tuples are looked into.
        names: of every leaf, as the model's forward names it.
        size: B.
        wrt: places of the leaves that the metric lives on; none where a ``source`` is measured from.
        per_sample: places of the leaves whose first axis is the samples; the others go whole with every chunk.
        listed: whether a list or array beside them has something for each sample, which cannot be cut with them.
        start, total: where these samples stand among those of the measurement.
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec
    names: tuple[str, ...]
    size: int
    wrt: tuple[int, ...]
    per_sample: frozenset[int]
    listed: bool = False
    start: int = 0
    total: int = 0

    @staticmethod
    def of(x: Any, model: nn.Module, *, wrt: Wrt | None = None, from_source: bool = False) -> Inputs:
        """Read what the user passes: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

        Raises:
            ProbeError: no tensor, no sample, no floating tensor or several and no word which, a sparse or nested one,
                arguments that the model does not take, another device than the model's.
        """
        args, kwargs = arguments_of(x)
        paths, spec = tree_flatten_with_path((args, kwargs))
        parameters = parameter_names(model)
        leaves, names = tuple(leaf for _, leaf in paths), tuple(_name(path, parameters) for path, _ in paths)
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if not tensors:
            raise ProbeError(
                "x holds no tensor.\n"
                "Pass a batch [B, ...] of inputs:  probe.measure(x); arrays become tensors by torch.as_tensor(x)"
            )
        if not isinstance(x, Tensor):
            _refuse_other_arguments(model, args, kwargs)
        refuse_unless_dense(leaves[i] for i in tensors)
        _refuse_other_device(model, [leaves[i] for i in tensors])
        places = tensors[:1] if from_source else _places(leaves, names, tensors, wrt, model)
        if any(leaves[i].ndim == 0 or leaves[i].shape[0] == 0 for i in places):
            shapes = [tuple(leaves[i].shape) for i in tensors]
            raise ProbeError(
                f"x has shape {shapes[0] if len(shapes) == 1 else shapes}: no sample to measure at.\n"
                "Pass a batch [B, ...]."
            )
        size = leaves[places[0]].shape[0]
        if any(leaves[i].shape[0] != size for i in places):
            listed = ", ".join(f"{names[i]} {list(leaves[i].shape)}" for i in places)
            raise ProbeError(
                f"the arguments of wrt= have different numbers of samples, so they are no one space: {listed}.\n"
                f"Name those alone that have one row a sample:  wrt={names[places[0]]!r}"
            )
        cut = frozenset(i for i in tensors if leaves[i].ndim and leaves[i].shape[0] == size)
        return Inputs(
            leaves,
            spec,
            names,
            size,
            wrt=() if from_source else tuple(places),
            per_sample=cut,
            listed=size > 1 and _listed([path for i, (path, _) in enumerate(paths) if i not in cut], leaves, size),
            total=size,
        )

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return next(leaf.device for leaf in self.leaves if isinstance(leaf, Tensor))

    @property
    def point(self) -> Tensor | None:
        """The samples as points of the space of the metric, [B, ...]; several arguments side by side, [B, d]."""
        if not self.wrt:
            return None
        if len(self.wrt) == 1:
            return self.leaves[self.wrt[0]].detach()
        return torch.cat([self.leaves[i].detach().reshape(self.size, -1) for i in self.wrt], dim=1)

    def cut_at(self, places: frozenset[int]) -> Inputs:
        """The same, known to be cut with the samples at these leaves alone."""
        return replace(self, per_sample=places)

    def chunk(self, start: int, stop: int) -> Inputs:
        """Samples ``start … stop``."""
        stop = min(stop, self.size)
        return replace(self._cut(lambda leaf: leaf[start:stop], stop - start), start=self.start + start)

    def at(self, samples: list[int]) -> Inputs:
        """These samples."""
        index = torch.tensor(samples, device=self.device)
        return self._cut(lambda leaf: leaf[index], len(samples))

    def repeated(self, size: int) -> Inputs:
        """A batch of another size: the first samples, over again where there are too few."""
        return self._cut(lambda leaf: torch.cat([leaf] * -(-size // self.size))[:size], size)

    def with_copies_of_the_first(self) -> Inputs:
        """The same batch with every sample replaced by the first one."""
        return self._cut(lambda leaf: leaf[:1].expand_as(leaf).clone(), self.size)

    def _cut(self, cut: Callable[[Tensor], Tensor], size: int) -> Inputs:
        leaves = tuple(cut(leaf) if i in self.per_sample else leaf for i, leaf in enumerate(self.leaves))
        return replace(self, leaves=leaves, size=size)

    def run(self, model: nn.Module, point: Tensor | None = None) -> Any:
        """Call the model, with ``point`` in the place of the samples' own."""
        args, kwargs = self.arguments(point)
        return model(*args, **kwargs)

    def arguments(self, point: Tensor | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments, with ``point`` in the place of the samples' own.

        The rest are copies: a model may write to its input, and the user's tensors are not ours to change.
        """
        given = self.wrt if point is not None else ()
        leaves = [leaf if i in given else copied(leaf) for i, leaf in enumerate(self.leaves)]
        if point is not None and len(self.wrt) == 1:
            leaves[self.wrt[0]] = point
        elif point is not None:
            offset = 0
            for i in self.wrt:
                shape = self.leaves[i].shape[1:]
                part = point[:, offset : offset + shape.numel()].reshape(point.shape[0], *shape)
                leaves[i] = part.to(self.leaves[i].dtype)
                offset += shape.numel()
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs

    def key(self) -> Any:
        """What a plan depends on: everything but the numbers, and the number of samples but for one."""
        described = tuple(
            (tuple(v.shape[1:]), v.shape[:1] == (1,), v.shape[:1] == (self.size,), v.dtype, v.device)
            if isinstance(v, Tensor)
            else repr(v)
            for v in self.leaves
        )
        return str(self.spec), described

    def shapes(self) -> str:
        """The shapes of the tensors, in words."""
        shapes = [tuple(leaf.shape) for leaf in self.leaves if isinstance(leaf, Tensor)]
        return str(shapes[0] if len(shapes) == 1 else shapes)


def _listed(paths: Sequence[Sequence[Any]], leaves: Sequence[Any], size: int) -> bool:
    """Whether any list among the arguments has as many items as there are samples, or any array as many rows."""
    items: dict[str, set[int]] = {}
    for path in paths:
        for depth, key in enumerate(path[2:], start=2):  # after "positional", "keyword" and which of them
            if hasattr(key, "idx"):
                items.setdefault(str(path[:depth]), set()).add(key.idx)
    return any(len(each) == size for each in items.values()) or any(
        isinstance(leaf, np.ndarray) and leaf.shape[:1] == (size,) for leaf in leaves
    )


def copied(leaf: Any) -> Any:
    """A tensor or array as another that may be written to; what is neither as it is."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def refuse_unless_dense(tensors: Iterable[Tensor]) -> None:
    """Refuse nested tensors and those that are not strided."""
    for tensor in tensors:
        if tensor.is_nested:
            raise ProbeError(
                "x holds a nested tensor: its samples have different shapes, so different spaces.\n"
                "Measure one at a time:  [tgp.measure(model, sample[None]) for sample in x.unbind()]"
                "  or pad them:  torch.nested.to_padded_tensor(x, 0.0)"
            )
        if tensor.layout != torch.strided:
            raise ProbeError(
                f"x holds a tensor of layout {tensor.layout}; a measurement takes dense ones.\n"
                "Convert it:  x.to_dense()  (a graph's adjacency too: the product with a sparse one has no forward "
                "derivative in torch)"
            )


def _refuse_other_arguments(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a forward written in C, or one that hides its signature
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        what = f"the keyword arguments {', '.join(kwargs)}" if kwargs else f"{len(args)} positional arguments"
        first = repr(next(iter(kwargs))) if kwargs else "0"
        raise ProbeError(
            f"x stands for {what} of {type(model).__name__}.forward{signature}, which does not take them: {error}.\n"
            f"Of a batch of samples and labels pass the samples alone:  x[{first}]"
        ) from error


def arguments_of(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that x stands for."""
    if isinstance(x, Tensor):
        return (x,), {}
    if isinstance(x, (tuple, list)):
        return tuple(x), {}
    if isinstance(x, Mapping):
        return (), dict(x)
    raise ProbeError(
        f"x is a {type(x).__name__}.\n"
        "Pass a batch as a tensor [B, ...], a tuple of the model's positional arguments, or a dict of its keyword "
        "arguments."
    )


def parameter_names(model: nn.Module) -> list[str]:
    """The names of the arguments of a model's forward, in their order."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a forward written in C, or one that hides its signature
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _name(path: Sequence[Any], parameters: Sequence[str]) -> str:
    """``x``, ``batch.pixels``, ``features.0``: the argument's name, then the keys within it."""
    keys = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path]
    positional, place, *inner = keys
    if positional == 0:
        place = parameters[place] if place < len(parameters) else place
    return ".".join(map(str, (place, *inner)))


def _places(
    leaves: Sequence[Any], names: Sequence[str], tensors: Sequence[int], wrt: Wrt | None, model: nn.Module
) -> list[int]:
    """The leaves that the metric lives on."""
    floating = [i for i in tensors if leaves[i].is_floating_point()]
    if wrt is not None:
        wanted = [wrt] if isinstance(wrt, (str, int)) else list(wrt)
        if not wanted:
            raise ProbeError(f"wrt={wrt!r} names no argument.\nName one, or leave it out:  wrt={names[tensors[0]]!r}")
        return list(dict.fromkeys(_place(one, leaves, names, floating, model) for one in wanted))
    if len(floating) == 1:
        return floating
    embedding = next(
        (n for n, m in model.named_modules() if n and isinstance(m, (nn.Embedding, nn.EmbeddingBag))), None
    )
    by_source = "" if embedding is None else f"GeometryProbe(model, ..., source={embedding!r})"
    if floating:
        listed = ", ".join(f"{names[i]} {list(leaves[i].shape)}" for i in floating)
        first = names[floating[0]]
        raise ProbeError(
            f"x holds {len(floating)} floating tensors, so it is not clear which one the metric is pulled back to: "
            f"{listed}.\n"
            f"Name one, or several:  GeometryProbe(model, ..., wrt={first!r})"
            + (f"; or a module whose output is meant:  {by_source}" if by_source else "")
        )
    types = ", ".join(sorted({str(leaves[i].dtype) for i in tensors}))
    if any(leaves[i].is_complex() for i in tensors):
        raise ProbeError(
            f"x is complex ({types}): the metric lives on real numbers.\n"
            "Pass real and imaginary parts:  torch.view_as_real(x), to a Module that calls  "
            "model(torch.view_as_complex(x))"
        )
    tokens = f"For token ids, pull back to the embeddings:  {by_source}\n" if by_source else ""
    if all(leaves[i].ndim == 1 for i in tensors) and not by_source:
        tokens = "If these are labels, none are needed: pass the samples  [B, ...]\n"
    raise ProbeError(
        f"x is of integer type ({types}): no derivative with respect to it exists.\n"
        f"{tokens}For pixels, convert them:  x.float() / 255"
    )


def _place(
    wanted: str | int, leaves: Sequence[Any], names: Sequence[str], floating: Sequence[int], model: nn.Module
) -> int:
    parameters = parameter_names(model)
    name = parameters[wanted] if isinstance(wanted, int) and 0 <= wanted < len(parameters) else str(wanted)
    found = [i for i in floating if names[i] == name] or [i for i in floating if names[i].split(".")[0] == name]
    found = found or [i for i in floating if names[i].split(".")[-1] == name]
    if len(found) != 1:
        listed = ", ".join(repr(names[i]) for i in floating) or "none"
        what = f"names {len(found)} floating tensors of x" if found else "names no floating tensor of x"
        raise ProbeError(
            f"wrt={wanted!r} {what}; the floating ones are {listed}.\n"
            + (f"Write, for instance, wrt={names[floating[0]]!r}" if floating else "Pass floating inputs:  x.float()")
        )
    return found[0]


def _refuse_other_device(model: nn.Module, tensors: Sequence[Tensor]) -> None:
    first = next(model.parameters(), None)
    if first is not None and first.device.type != "meta" and all(t.device == first.device for t in tensors):
        return
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return  # accelerate moves weights and inputs to where they meet
    devices = {p.device for p in model.parameters()}
    real = sorted({str(device) for device in devices if device.type != "meta"})
    if devices and not real:
        raise ProbeError(
            "the model's parameters are on 'meta': they have shapes and no values.\n"
            "Give them values first:  model.to_empty(device='cpu'), then model.load_state_dict(...)"
        )
    other = next((t for t in tensors if real and str(t.device) not in real), None)
    if other is not None:
        raise ProbeError(f"x is on {other.device}, the model on {', '.join(real)}.\nMove it:  x.to({real[0]!r})")
