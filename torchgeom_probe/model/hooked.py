"""A model with the modules to hook: which layers, from which source, and what counts as a layer's features."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from torchgeom_probe.dual import DualTensor
from torchgeom_probe.errors import LayerRefusal, ProbeError
from torchgeom_probe.model.inputs import Inputs, Wrt
from torchgeom_probe.model.isolation import plain_run
from torchgeom_probe.shapes import Tensor

Transform = Callable[[Any], Any]
#: (entry, layer, output): what a layer's hook calls, inside the forward pass.
OnOutput = Callable[[str, str, Any], None]


@dataclass(frozen=True, eq=False)
class Outputs:
    """What one plain run gave: entry → features [B, n] in the order of firing, and every output of the source."""

    features: dict[str, Tensor]
    sources: list[Tensor]


@dataclass(frozen=True, eq=False)
class HookedModel:
    """A model with the modules to hook; resolved once, run many times.

    Attributes:
        model: the user's own module.
        layers: name → module.
        source_name, source: the inner module whose output is the space that the metric is pulled back to, or None: the
            model's input.
        transforms: layer (``"*"``: all) → what maps its output before it is flattened.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    source_name: str | None = None
    source: nn.Module | None = None
    transforms: Mapping[str, Transform] = field(default_factory=dict)

    def inputs(self, x: Any, wrt: Wrt | None = None) -> Inputs:
        """Read what the user passes as ``x``; see :meth:`Inputs.of`."""
        return Inputs.of(x, self.model, wrt=wrt, from_source=self.source is not None)

    def without(self, layers: set[str]) -> HookedModel:
        """The same with fewer layers."""
        return replace(self, layers={name: m for name, m in self.layers.items() if name not in layers})

    def leaves(self, layer: str, output: Any) -> list[Tensor]:
        """The floating tensors of a layer's output (complex ones as pairs), after its transform.

        Of nn.LSTM, nn.GRU and nn.RNN that is the output sequence, the samples first: the last states are a part of it.
        """
        transform = self.transforms.get(layer, self.transforms.get("*"))
        module = self.layers.get(layer)
        if transform is not None:
            output = transform(output)
        elif isinstance(module, nn.RNNBase) and isinstance(output, tuple) and isinstance(output[0], Tensor):
            output = output[0] if module.batch_first or output[0].ndim < 3 else output[0].transpose(0, 1)
        tensors = [_plain(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        return [leaf for leaf in real if leaf.is_floating_point()]

    def features(self, layer: str, leaves: list[Tensor], batch: int, output: Any) -> list[Tensor]:
        """Flatten a layer's output per sample, [B, n_i] each, after checking that its first axis is the samples.

        Raises:
            LayerRefusal: no floating tensor, or one without the samples first.
        """
        if not leaves:
            raise LayerRefusal(
                f"layer {layer!r} puts out no floating tensor (tuples, lists and dicts are looked into), so it has no "
                "features to "
                "differentiate.\n"
                "Pick another layer, or make one of its output:  transform=lambda out: out.last_hidden_state",
                {layer: "puts out no floating tensor"},
            )
        odd = [leaf for leaf in leaves if leaf.ndim == 0 or leaf.shape[0] != batch]
        if odd:
            shape = tuple(odd[0].shape)
            if not isinstance(output, Tensor):
                shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
                key = _key_of_samples(output, batch)
                taken = f"transform={{{layer!r}: lambda out: out[{key!r}]}}"
                way_out = f"Its floating tensors have shapes {shapes}; take one:  {taken}"
            else:
                way_out = (
                    f"Say where the samples are:  transform={{{layer!r}: lambda out: out.transpose(0, 1)}}  "
                    "(or out.unflatten(0, (B, -1)) for windows of one sample that follow each other)"
                )
            raise LayerRefusal(
                f"layer {layer!r} puts out a tensor of shape {shape}, whose first axis is not the batch of {batch} "
                f"samples.\n{way_out}",
                {layer: f"its output {list(shape)} has no axis of samples first"},
            )
        if not any(leaf.numel() for leaf in leaves):
            empty = list(leaves[0].shape)
            raise LayerRefusal(
                f"layer {layer!r} puts out no feature: its shape is {empty}, so there is nothing to differentiate.\n"
                "Pick another layer.",
                {layer: f"its output {empty} is empty"},
            )
        return [leaf.flatten(1) if leaf.ndim > 1 else leaf.unsqueeze(1) for leaf in leaves]

    def outputs(
        self,
        inputs: Inputs,
        *,
        keep: int | None = None,
        of: Callable[[Tensor], Tensor] = torch.detach,
        aside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Outputs:
        """Run the model plainly, hooked: the one way in which anything here looks at what a model puts out.

        ``keep``: of the first samples alone.  ``of``: what of the features [B, n] is kept.  ``aside``: the context in
            which it is copied, for who counts the model's own bytes.

        Raises:
            LayerRefusal: as :meth:`features`, of all layers at once.
            ProbeError: the source's output is no space.
        """
        features: dict[str, Tensor] = {}
        sources: list[Tensor] = []
        refusals: list[tuple[str, dict[str, str]]] = []

        def on_output(entry: str, layer: str, output: Any) -> None:
            try:
                flats = self.features(layer, self.leaves(layer, output), inputs.size, output)
            except LayerRefusal as refusal:
                refusals.append((str(refusal), refusal.layers))  # not itself: its traceback holds the layer's output
                return
            with aside(), torch._C.DisableTorchFunction():  # a copy: the next layer may write over it
                features[entry] = torch.cat([of(flat)[:keep] for flat in flats], dim=1)

        def on_source(output: Any) -> None:
            with aside(), torch._C.DisableTorchFunction():
                sources.append(self.source_value(output).detach().clone())

        with plain_run(lambda: [*features.values(), *sources]), self.attached(on_output, on_source):
            inputs.run(self.model)
        if refusals:
            raise LayerRefusal(refusals[0][0], {name: why for _, layers in refusals for name, why in layers.items()})
        return Outputs(features, sources)

    @contextlib.contextmanager
    def attached(self, on_output: OnOutput, on_source: Callable[[Any], Any] | None = None) -> Iterator[None]:
        """Attach the hooks for the length of the body: ``on_output(entry, layer, output)``, and the source's.

        An entry is the layer's name, ``name#1`` … for its later calls.  The hooks come after those that the user
        attached, so they see what the user's hooks make of the output.
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
                handles.append(self.source.register_forward_hook(lambda module, args, output: on_source(output)))
            handles += [module.register_forward_hook(layer_hook(name)) for name, module in self.layers.items()]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def source_value(self, output: Any) -> Tensor:
        """Return the source's output, which must be one floating tensor."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            what = (
                f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            )
            raise ProbeError(
                f"the output of source={self.source_name!r} is {what}; the metric is pulled back to one floating "
                "tensor.\n"
                "Name a module whose output is one, such as the model's nn.Embedding."
            )
        return output

    def no_tangent(self, entry: str, why: str) -> ProbeError:
        """Return the error for a layer whose output carries no derivative, because something on the way cut it off."""
        return ProbeError(self._lost(entry, why))

    def independent(self, entry: str) -> LayerRefusal:
        """Return the error for a layer whose output does not depend on where the metric lives."""
        return LayerRefusal(
            self._lost(entry, "it does not depend on it, or is constant between its jumps (rounded, quantised)"),
            {entry.split("#")[0]: "does not depend on the input"},
        )

    def _lost(self, entry: str, why: str) -> str:
        start = f"the output of source={self.source_name!r}" if self.source is not None else "the input"
        return (
            f"the tangent was lost: the output of layer {entry!r} carries no derivative with respect to {start}: "
            f"{why}.\n"
            "Measure a layer before that point, or take the cut out of the forward pass; a missing tangent is never "
            "read as zero."
        )


def _key_of_samples(output: Any, batch: int) -> Any:
    """Under which key or place an output has a tensor whose first axis is the samples; the first where none has."""
    items = list(
        output.items()
        if isinstance(output, Mapping)
        else enumerate(output)
        if isinstance(output, (tuple, list))
        else ()
    )
    fitting = [k for k, v in items if isinstance(v, Tensor) and v.is_floating_point() and v.shape[:1] == (batch,)]
    return next(iter(fitting or [k for k, _ in items]), 0)


def _plain(tensor: Tensor) -> Tensor:
    """A tensor of a class of the user's own as a tensor."""
    own = type(tensor) is not Tensor and not isinstance(tensor, (nn.Parameter, DualTensor))
    return tensor.as_subclass(Tensor) if own else tensor
