"""The verb: one forward of the model with k tangents beside it, all of it, or the output alone, under autograd."""

from __future__ import annotations

import contextlib
import math
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map, tree_unflatten

from torchgeom_probe.dual import DualTensor, dual_pass
from torchgeom_probe.errors import ProbeError
from torchgeom_probe.loss.step import Probes, PushedLayer, Step
from torchgeom_probe.model.hooked import HookedModel, Transform
from torchgeom_probe.model.inputs import Inputs, Wrt
from torchgeom_probe.model.layers import LayerSpec, close_names, resolve, resolved_source, resolved_transforms
from torchgeom_probe.model.state import State
from torchgeom_probe.model.wrappers import refuse_unhookable, unwrapped
from torchgeom_probe.shapes import Tensor

#: device → the seed of the process and the generator of the probes made from it: a training's own random numbers, those
#: of dropout and of the order of its batches, stay as they are without a penalty.
_GENERATORS: dict[torch.device, tuple[int, torch.Generator]] = {}


def pushforward(
    model: nn.Module,
    x: Any,
    *,
    layers: LayerSpec = "",
    k: int = 1,
    probes: Probes = "signs",
    directions: Tensor | Sequence[Tensor] | None = None,
    track: Literal["all", "primal"] = "all",
    generator: torch.Generator | None = None,
    normalize: bool = True,
    transform: Transform | Mapping[str, Transform] | None = None,
    source: str | nn.Module | None = None,
    wrt: Wrt | None = None,
) -> Step:
    """Run the model once, in its own mode, with k tangents beside the samples; the result is for a loss.

    One forward of (1 + k)·B rows gives the model's own output and per layer Jv, both differentiable by an ordinary
    backward: no double backward.  Buffers and random numbers end up as after ``model(x)``.  Batch normalisation in
    train mode: the batch's statistics are constants along x, and none along the parameters.  What ``detach()`` or
    ``no_grad()`` cut in the model carries no gradient to parameters before it, and its derivative along x goes on.

    Args:
        model: any ``nn.Module``, also behind DistributedDataParallel (which is called itself) or torch.compile (whose
            eager code runs); names are the module's own.
        x: [B, ...], or a tuple or dict of the model's arguments, as for ``measure``.
        layers: whose tangents are kept, as for ``measure``; by default the model's output.
        k: how many directions are drawn for every sample.
        probes: ``"signs"`` (±1), ``"gaussian"``, or ``"frame"`` (orthonormal, Haar distributed).
        directions: the caller's own instead: [k, B, *x.shape[1:]] or, for one, x's shape; a tuple of these, one for
            each of several inputs.
        track: ``"primal"``: the output keeps its graph and the tangents have none: the memory of a plain step, at the
            price of one more forward.
        generator: of the probes; by default one of its own, seeded with the process's seed.
        normalize: divide J by √n, as ``measure`` does.
        transform: maps a layer's output before it is flattened.
        source: a module whose output is the space of the directions.
        wrt: which of several floating inputs is; several of them are one space.

    Raises:
        ProbeError: gradients are disabled, k < 1, a frame of k > d, directions of another shape, a layer that never
            fired or was written to afterwards, an op without a differentiable rule or in a custom function, activation
            checkpointing.

    Cost: (1 + k) forwards and backwards, and the slopes of what is not linear; benchmarks/loss.py.

    >>> import torch
    >>> model, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(5, 3)
    >>> step = pushforward(model, x, layers=["1", "2"], k=2)
    >>> loss = step.output.square().mean() + 0.01 * step["1"].trace.mean()
    >>> loss.backward()
    >>> step["1"].tangents.shape, model[0].weight.grad is not None
    (torch.Size([2, 5, 8]), True)
    """
    if track not in ("all", "primal"):
        raise ProbeError(f"track={track!r} is unknown.\nWrite track='all' (the default) or track='primal'.")
    if not torch.is_grad_enabled():
        raise ProbeError(
            "gradients are disabled here, and a loss needs them.\nLeave the torch.no_grad() or torch.inference_mode(), "
            "or measure:  tgp.measure(model, x)"
        )
    if not isinstance(model, nn.Module):
        raise ProbeError(f"model is a {type(model).__name__}, not an nn.Module.\nWrap a function in one.")
    if isinstance(model, nn.DataParallel):
        raise ProbeError("nn.DataParallel runs its replicas in threads.\nWrap the model in DistributedDataParallel.")
    own = unwrapped(model)
    refuse_unhookable(own)
    chosen = resolve(own, layers)
    hooked = HookedModel(
        own, chosen, **resolved_source(own, source), transforms=resolved_transforms(own, chosen, transform)
    )
    given = _several(directions)
    every = wrt is None and given is not None and len(given) > 1
    inputs = hooked.inputs(x, _floating(x) if every else wrt)
    draw = _Draw(k, probes, given, generator)
    if track == "primal":
        with torch.no_grad(), _put_back(own):
            pushed = _Pushing(hooked, inputs, draw, normalize).run(own, graph=False)
        args, kwargs = tree_unflatten(list(inputs.leaves), inputs.spec)
        return Step(model(*args, **kwargs), pushed.layers)
    return _Pushing(hooked, inputs, draw, normalize).run(model, graph=True)


class _Draw:
    """The directions at a value [B, ...]: drawn, or the caller's own, one after the other."""

    def __init__(self, k: int, probes: Probes, given: list[Tensor] | None, generator: torch.Generator | None) -> None:
        if given is None and (not isinstance(k, int) or k < 1):
            raise ProbeError(f"k={k!r} directions were asked for; at least one is needed.  pushforward(model, x, k=1)")
        if probes not in ("signs", "gaussian", "frame"):
            raise ProbeError(f"probes={probes!r} is unknown.\nWrite probes='signs', 'gaussian' or 'frame'.")
        self.k, self.given, self.generator = k, given, generator
        self.probes: Probes | None = probes if given is None else None

    def at(self, values: list[Tensor]) -> list[Tensor]:
        """[k, B, ...] for each of the values, which are one space."""
        if self.given is not None:
            if len(self.given) != len(values):
                raise ProbeError(f"{len(self.given)} directions= for {len(values)} inputs.\nGive one for each.")
            return [_fitting(v, x) for v, x in zip(self.given, values, strict=True)]
        like = values[0]
        sizes = [value[0].numel() for value in values]
        shape = (self.k, len(like), sum(sizes))
        rows = self._drawn(shape, like)
        parts = rows.split(sizes, dim=2)
        return [part.reshape(self.k, *x.shape).to(x.dtype) for part, x in zip(parts, values, strict=True)]

    def _drawn(self, shape: tuple[int, int, int], like: Tensor) -> Tensor:
        generator = self.generator or _generator(like.device)
        place: dict[str, Any] = {"generator": generator, "device": generator.device}
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.probes == "signs":
            return torch.randint(0, 2, shape, **place).to(like.device, dtype).mul_(2).sub_(1)
        if self.probes == "gaussian":
            return torch.randn(shape, dtype=dtype, **place).to(like.device)
        k, batch, d = shape
        if k > d:
            raise ProbeError(
                f"a frame of k={k} orthonormal directions does not fit into d={d} dimensions.\n"
                f"Take k={d} or fewer, or probes='signs'"
            )
        gaussian = torch.randn(batch, d, k, dtype=dtype, **place).to(like.device)
        orthonormal, triangle = torch.linalg.qr(gaussian)
        return (orthonormal * triangle.diagonal(dim1=1, dim2=2).sign()[:, None]).permute(2, 0, 1)


class _Pushing:
    """One pass: hooks keep each layer's tangents, and the model's root gives back its plain output."""

    def __init__(self, hooked: HookedModel, inputs: Inputs, draw: _Draw, normalize: bool) -> None:
        self._hooked, self._inputs, self._draw, self._normalize = hooked, inputs, draw, normalize
        self._num_inputs = 0
        self._layers: dict[str, PushedLayer] = {}
        self._seen: list[tuple[str, Tensor, int]] = []

    def run(self, model: nn.Module, *, graph: bool) -> Step:
        hooked, inputs = self._hooked, self._inputs
        leaves = list(inputs.leaves)
        left: list[tuple[dict[str, Any], str, Any]] = []
        try:
            with _process_set(), dual_pass(graph=graph, batch_statistics=True):
                for place, dual in zip(inputs.wrt, self._duals([leaves[i] for i in inputs.wrt]), strict=True):
                    leaves[place] = dual
                args, kwargs = tree_unflatten(leaves, inputs.spec)
                with hooked.attached(self._on_output, self._on_source):
                    # The last hook of all: what wraps the model (DDP) sees the plain output, with its graph.
                    root = hooked.model.register_forward_hook(lambda module, args, output: _plain(output))
                    try:
                        output = model(*args, **kwargs)
                    finally:
                        root.remove()
                        left += _left_on_modules(hooked.model)
        finally:
            for attributes, name, value in left:
                if isinstance(value, DualTensor):  # not one that was a plain tensor before it was written to
                    attributes[name] = cast(Tensor, value._buffer)[0]
        self._refuse_missing()
        return Step(output, self._layers)

    def _duals(self, values: list[Tensor]) -> list[DualTensor]:
        if not values:
            return []
        self._num_inputs = sum(value[0].numel() for value in values)
        pairs = zip(values, self._draw.at(values), strict=True)
        return [DualTensor(torch.cat([value[None], directions])) for value, directions in pairs]

    def _on_source(self, output: Any) -> DualTensor:
        return self._duals([self._hooked.source_value(output)])[0]

    def _on_output(self, entry: str, layer: str, output: Any) -> None:
        leaves = self._hooked.leaves(layer, output)
        if leaves and not any(isinstance(leaf, DualTensor) for leaf in leaves):
            raise self._hooked.independent(entry)
        flats = self._hooked.features(layer, leaves, self._inputs.size, output)
        rows = next(leaf for leaf in leaves if isinstance(leaf, DualTensor)).buffer.shape[0] - 1
        blocks = []
        for leaf, flat in zip(leaves, flats, strict=True):
            if isinstance(leaf, DualTensor):
                self._seen.append((entry, leaf.buffer, leaf.buffer._version))
                blocks.append(leaf.tangents.reshape(rows, *flat.shape))
            else:
                blocks.append(flat.new_zeros(rows, *flat.shape))
        raw = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
        scale = 1 / math.sqrt(raw.shape[2]) if self._normalize else 1.0
        self._layers[entry] = PushedLayer(raw, self._draw.probes, self._num_inputs, scale)

    def _refuse_missing(self) -> None:
        fired = {entry.split("#")[0] for entry in self._layers}
        silent = [name for name in self._hooked.layers if name not in fired]
        if silent:
            near = close_names(silent[0], [*fired]) if fired else []
            raise ProbeError(
                f"layer {silent[0]!r} never ran in this forward pass.\n"
                f"Name one that does: {', '.join(map(repr, near or fired))}"
            )
        written = next((entry for entry, buffer, version in self._seen if buffer._version != version), None)
        if written is not None:
            name = written.split("#")[0]
            raise ProbeError(
                f"the model writes in place to the output of layer {written!r} after it (a ReLU(inplace=True), a +=).\n"
                f"Take its tangents from a copy:  transform={{{name!r}: torch.clone}}, or the layer behind it"
            )


def _plain(output: Any) -> Any:
    return tree_map(lambda leaf: leaf.primal if isinstance(leaf, DualTensor) else leaf, output)


def _left_on_modules(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """What the forward pass has left on modules: a running mean, the last features."""
    return [
        (attributes, name, value)
        for module in model.modules()
        for attributes in (vars(module), module._buffers)
        for name, value in attributes.items()
        if isinstance(value, DualTensor) and len(value.buffer)  # builds it while the pass runs
    ]


@contextlib.contextmanager
def _process_set() -> Iterator[None]:
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    state = State(model, beside=[torch.default_generator, *cuda, np.random.mtrand._rand, random._inst])
    try:
        yield
    finally:
        state.put_back()


def _generator(device: torch.device) -> torch.Generator:
    seed = torch.initial_seed()
    if device not in _GENERATORS or _GENERATORS[device][0] != seed:
        _GENERATORS[device] = seed, torch.Generator(device).manual_seed(seed ^ 0x5EED)
    return _GENERATORS[device][1]


def _several(directions: Any) -> list[Tensor] | None:
    if directions is None:
        return None
    return list(directions) if isinstance(directions, (tuple, list)) else [directions]


def _floating(x: Any) -> list[int] | list[str]:
    """The places or names of the floating tensors among a model's arguments."""
    named = x.items() if isinstance(x, Mapping) else enumerate(x if isinstance(x, (tuple, list)) else (x,))
    return [name for name, leaf in named if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _fitting(directions: Tensor, value: Tensor) -> Tensor:
    if isinstance(directions, Tensor) and directions.is_floating_point():
        rows = directions[None] if directions.shape == value.shape else directions
        if rows.shape[1:] == value.shape and len(rows):
            return rows.to(value)
    seen = tuple(directions.shape) if isinstance(directions, Tensor) else type(directions).__name__
    raise ProbeError(
        f"directions= is {seen}; x has shape {tuple(value.shape)}.\n"
        "Give a floating tensor [k, *x.shape], for instance directions=torch.randn(4, *x.shape)"
    )
