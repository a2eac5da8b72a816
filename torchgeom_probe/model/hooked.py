"""What is measured, and on what: the resolved layers and source of a model, and a batch of its inputs."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor

Transform = Callable[[Any], Any]

#: Measured on 11 timm models and CIFAR ResNets: below the first, and from the second on, channels last are the faster layout.
_CACHED_WEIGHTS = 2_000_000
_WEIGHTS_A_PIXEL = 60


@dataclass(frozen=True, eq=False)
class Task:
    """A model with the modules to hook; resolved once, run many times."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    source_name: str | None = None
    source: nn.Module | None = None
    transforms: Mapping[str, Transform] = field(default_factory=dict)

    def convolves(self, images: Tensor) -> bool:
        """Whether these images [B, C, H, W] are for convolutions that run faster with the channels last: oneDNN's, on a CPU."""
        if images.device.type != "cpu" or images.dtype not in (torch.float32, torch.bfloat16):
            return False
        onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
        return onednn and self._has_convolutions

    def pays_for_its_weights(self, images: Tensor, rows: int) -> bool:
        """Whether so many rows of images are worth laying the weights anew in every pass, as channels last ask for.

        Kernels of one pixel lie the same either way, and what stays in the cache costs nothing.
        """
        wide = self._wide_weights
        return wide <= _CACHED_WEIGHTS or _WEIGHTS_A_PIXEL * rows * images.shape[-2:].numel() >= wide

    def weights_with_channels_last(self) -> dict[str, Tensor]:
        """Copies of the weights that many passes over such images would each lay anew, by name."""
        return {
            f"{name}.weight" if name else "weight": module.weight.detach().contiguous(
                memory_format=torch.channels_last
            )
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Conv2d)
            and type(module._parameters.get("weight")) is nn.Parameter
            and tuple(module.kernel_size) != (1, 1)
        }

    @functools.cached_property
    def _has_convolutions(self) -> bool:
        return any(isinstance(module, nn.Conv2d) for module in self.model.modules())

    @functools.cached_property
    def _wide_weights(self) -> int:
        # From the sizes: to read a weight may be to compute it (a parametrisation), and a layer of the user's own may have none.
        return sum(
            m.out_channels * (m.in_channels // m.groups) * math.prod(m.kernel_size)
            for m in self.model.modules()
            if isinstance(m, nn.Conv2d) and tuple(m.kernel_size) != (1, 1)
        )

    def leaves(self, layer: str, output: Any) -> list[Tensor]:
        """The floating tensors of a layer's output (complex ones as pairs), after its transform: its features."""
        transform = self.transforms.get(layer, self.transforms.get("*"))
        if transform is not None:
            output = transform(output)
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        return [leaf for leaf in real if leaf.is_floating_point()]

    @contextlib.contextmanager
    def hooked(
        self,
        on_output: Callable[[str, str, Any], None],
        on_source: Callable[[Any], Any] | None = None,
    ) -> Iterator[None]:
        """Attach the hooks for the length of the body: ``on_output(entry, layer, output)``, and the source's replacement.

        An entry is the layer's name, ``name#1`` … for its later calls.  The hooks come after those that the user attached, so they
        see what the user's hooks make of the output.
        """
        calls: Counter[str] = Counter()

        def layer_hook(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                count = calls[name]
                calls[name] += 1
                on_output(f"{name}#{count}" if count else name, name, output)

            return hook

        handles = []
        try:
            if self.source is not None and on_source is not None:
                # First, so that a layer hook on the source itself sees what replaces its output.
                handles.append(
                    self.source.register_forward_hook(lambda module, args, output: on_source(output))
                )
            handles += [
                module.register_forward_hook(layer_hook(name)) for name, module in self.layers.items()
            ]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def source_value(self, output: Any) -> Tensor:
        """Return the source's output, which must be one floating tensor."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise ProbeError(
                f"the output of source={self.source_name!r} is {_kind(output)}; the metric is pulled back to one floating tensor.\n"
                "Name a module whose output is one, such as the model's nn.Embedding."
            )
        return output


@dataclass(frozen=True, eq=False)
class Batch:
    """A model's arguments for B samples; ``point`` is the floating tensor among them that the metric lives on, or None."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    size: int
    point: Tensor | None

    @staticmethod
    def of(x: Any, task: Task) -> Batch:
        """Read what the user passes as ``x``: a tensor, a tuple of positional arguments, or a dict of keyword arguments."""
        args: tuple[Any, ...] = ()
        kwargs: Mapping[str, Any] = {}
        if isinstance(x, Tensor):
            args = (x,)
        elif isinstance(x, (tuple, list)):
            args = tuple(x)
        elif isinstance(x, Mapping):
            kwargs = dict(x)
        else:
            raise ProbeError(
                f"x is a {type(x).__name__}.\n"
                "Pass a batch as a tensor [B, ...], a tuple of the model's positional arguments, or a dict of its keyword arguments."
            )
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if not tensors:
            raise ProbeError("x holds no tensor.\nPass a batch [B, ...] of inputs:  probe.measure(x)")
        if any(t.ndim == 0 for t in tensors) or any(t.shape[0] == 0 for t in tensors):
            shapes = [tuple(t.shape) for t in tensors]
            raise ProbeError(
                f"x has shape {shapes[0] if len(shapes) == 1 else shapes}: no sample to measure at.\nPass a batch [B, ...]."
            )
        batch = Batch(args, kwargs, tensors[0].shape[0], None)
        batch._refuse_other_device(task.model, tensors)
        if task.source is not None:
            return batch
        floating = [t for t in tensors if t.is_floating_point()]
        if len(floating) != 1:
            embeddings = [
                n for n, m in task.model.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))
            ]
            line = f"GeometryProbe(model, ..., source={embeddings[0] if embeddings else 'embedding'!r})"
            if not floating:
                raise ProbeError(
                    f"x is of integer type ({', '.join(str(t.dtype) for t in tensors)}): no derivative with respect to it exists.\n"
                    f"For token ids, pull back to the embeddings:  {line}\nFor pixels, convert them:  x.float() / 255"
                )
            raise ProbeError(
                f"x holds {len(floating)} floating tensors, so it is not clear which one the metric is pulled back to.\n"
                f"Name a module inside the model whose output is meant:  {line}"
            )
        return Batch(args, kwargs, floating[0].shape[0], floating[0].detach())

    def _refuse_other_device(self, model: nn.Module, tensors: list[Tensor]) -> None:
        weight = next((p for p in model.parameters() if p.is_floating_point()), None)
        if weight is None:
            return
        for tensor in tensors:
            if tensor.device != weight.device:
                raise ProbeError(
                    f"x is on {tensor.device}, the model on {weight.device}.\nMove it:  x.to({str(weight.device)!r})"
                )
            if tensor.is_floating_point() and tensor.dtype != weight.dtype:
                raise ProbeError(
                    f"x is {tensor.dtype}, the model's parameters are {weight.dtype}.\nConvert it:  x.to({weight.dtype})"
                )

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return next(v.device for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor))

    def chunk(self, start: int, stop: int) -> Batch:
        """Samples ``start … stop`` of every argument that has the batch axis."""
        return self._of(slice(start, stop), min(stop, self.size) - start)

    def at(self, samples: list[int]) -> Batch:
        """These samples of every argument that has the batch axis."""
        return self._of(torch.tensor(samples, device=self.device), len(samples))

    def _of(self, samples: slice | Tensor, size: int) -> Batch:
        def cut(value: Any) -> Any:
            return (
                value[samples]
                if isinstance(value, Tensor) and value.ndim and value.shape[0] == self.size
                else value
            )

        point = None if self.point is None else self.point[samples]
        return Batch(
            tuple(point if v is not None and self._is_point(v) else cut(v) for v in self.args),
            {k: point if self._is_point(v) else cut(v) for k, v in self.kwargs.items()},
            size,
            point,
        )

    def _is_point(self, value: Any) -> bool:
        return self.point is not None and isinstance(value, Tensor) and value.is_floating_point()

    def run(self, model: nn.Module, point: Any = None) -> Any:
        """Call the model, with ``point`` in the place of the batch's own."""
        args, kwargs = self.arguments(point)
        return model(*args, **kwargs)

    def arguments(self, point: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments, with ``point`` in the place of the batch's own.

        The rest are copies: a model may write to its input, and the user's tensors are not ours to change.
        """

        def argument(value: Any) -> Any:
            if point is not None and self._is_point(value):
                return point
            return value.detach().clone() if isinstance(value, Tensor) else value

        return tuple(map(argument, self.args)), {k: argument(v) for k, v in self.kwargs.items()}

    def repeated(self, size: int) -> Batch:
        """A batch of another size: the first samples, over again where there are too few."""

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == self.size:
                return torch.cat([value] * -(-size // self.size))[:size]
            return value

        point = None if self.point is None else cut(self.point)
        return Batch(tuple(map(cut, self.args)), {k: cut(v) for k, v in self.kwargs.items()}, size, point)


def features(leaves: list[Tensor], *, layer: str, batch: int) -> list[Tensor]:
    """Flatten a layer's output per sample, [B, n_i] each, after checking that its first axis is the samples."""
    for leaf in leaves:
        if leaf.ndim == 0 or leaf.shape[0] != batch:
            raise ProbeError(
                f"layer {layer!r} puts out a tensor of shape {tuple(leaf.shape)}, whose first axis is not the batch of {batch} samples.\n"
                f"Say where the samples are:  transform={{{layer!r}: lambda out: out.transpose(0, 1)}}  (or out.unflatten(0, (B, -1)) "
                "for windows of one sample that follow each other)"
            )
    if not leaves:
        raise ProbeError(
            f"layer {layer!r} puts out no floating tensor (tuples, lists and dicts are looked into), so it has no features to "
            "differentiate.\nPick another layer, or make one of its output:  transform=lambda out: out.last_hidden_state"
        )
    return [leaf.flatten(1) if leaf.ndim > 1 else leaf.unsqueeze(1) for leaf in leaves]


def no_tangent(layer: str, task: Task, why: str) -> ProbeError:
    """Return the error for a layer whose output carries no derivative."""
    start = f"the output of source={task.source_name!r}" if task.source is not None else "the input"
    return ProbeError(
        f"the tangent was lost: the output of layer {layer!r} carries no derivative with respect to {start}: {why}.\n"
        "Measure a layer before that point, or take the cut out of the forward pass; a missing tangent is never read as zero."
    )


def _kind(thing: Any) -> str:
    return (
        f"{thing.dtype} {tuple(thing.shape)}"
        if isinstance(thing, torch.Tensor)
        else f"a {type(thing).__name__}"
    )
