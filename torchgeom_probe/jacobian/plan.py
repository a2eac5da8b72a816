"""Plan once, run many: which entries fire, how large everything is, and what fits into memory at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from torchgeom_probe.errors import LayerRefusal, ProbeError
from torchgeom_probe.jacobian.cuts import Cuts, harmless
from torchgeom_probe.jacobian.layout import Layout
from torchgeom_probe.jacobian.memory import LiveBytes, free_memory
from torchgeom_probe.model.hooked import HookedModel, Outputs
from torchgeom_probe.model.inputs import Inputs
from torchgeom_probe.model.isolation import drew_random_numbers, same_random_numbers
from torchgeom_probe.model.layers import close_names
from torchgeom_probe.model.sharded import agreed, comes_and_goes
from torchgeom_probe.shapes import Tensor

#: Samples of a first run, at most: more would tell nothing new.
_MANY_SAMPLES = 64
#: Samples whose plain outputs are kept, for a pass to be compared with.
_COMPARED = 3
#: The share of the free memory that a measurement may take where no budget is given.
SHARE_OF_FREE_MEMORY = 0.5
#: A rule holds its input, its output and at most one temporary: twice the peak of a plain forward pass over the same
#: rows.
_ROWS_OVER_PLAIN = 2.0
#: Bytes of a chunk on a CPU: of more nothing is faster per row, and memory that the allocator must ask the system for
#: and give back, tensor after tensor, can double the time.
_EASY_BYTES = 256 << 20
#: What a saved pass may grow to by being copied, in rows or in bytes: from there on a backward pass is as fast per row
#: as it gets.
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
        reference: entry → plain outputs [≤ 3, n] of the first samples, for a pass to be compared with.
        random: whether the forward pass draws random numbers.
        layout: what suits the convolutions; None where a pass must lay the tensors as the model does: because it
            writes in place to memory that it has viewed in another shape, or draws numbers (``randn_like`` fills them
            in the order of memory).
        per_sample: the arguments (places among the inputs' leaves) that are cut with the samples.
        whole: whether the model takes its own number of samples alone, so that no chunks can be made.
        coupled: entries in which one sample's output depends on the others.
        harmless: whether all that the pass cuts off from its derivative is looked at alone (:func:`cuts.harmless`).
        on_cpu: where the samples are.
    """

    features: dict[str, int]
    space: tuple[int, ...]
    dtype: torch.dtype
    row_bytes: int
    graph_bytes: int
    budget: int
    reference: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    random: bool = False
    layout: Layout | None = None
    per_sample: frozenset[int] = frozenset()
    whole: bool = False
    coupled: tuple[str, ...] = ()
    harmless: bool = False
    on_cpu: bool = False

    @property
    def num_inputs(self) -> int:
        """d, the numbers per sample of the space that the metric is pulled back to."""
        return prod(self.space)

    def samples_at_once(self, num_directions: int, batch: int) -> int:
        """How many samples to take at once with all their k directions (at least 1): as many as fit, at ease."""
        if self.whole:
            return batch
        most = self._rows() // (1 + num_directions)
        if self.on_cpu:
            most = min(most, max(1, _EASY_BYTES // max(1, self.bytes_of(1, num_directions))))
        chunks = -(-batch // max(1, most))
        return -(-batch // chunks)  # as equal as can be: a recorded pass has one shape

    def directions_at_once(self, num_directions: int, samples: int) -> int:
        """How many directions fit at once for that many samples (at least 1)."""
        return max(1, min(num_directions, self._rows() // samples - 1))

    def copies(self, at_once: int, samples: int, device: torch.device) -> int:
        """How often reverse mode saves its pass, so that as many cotangents are pulled together; at least once."""
        if self.random or self.whole:  # copies would draw other numbers
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

        An entry whose tangents do not fit comes alone, and is streamed (``linalg.gram``).

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
                f"the Jacobian of layer {entry!r} at one sample is {count} x {length} numbers, {whole / 2**30:.2f} "
                f"GiB, and the memory budget is {self.budget / 2**30:.2f} GiB, too little for two of its rows.\n"
                f"Raise it:  GeometryProbe(model, ..., memory_budget={whole * 2}); pool the features:  transform=...; "
                "or take fewer directions:  estimator=Subspace(k=8)"
            )


def make_plan(hooked: HookedModel, inputs: Inputs, *, memory_budget: int | None) -> Plan:
    """Run the model plainly on the user's own samples, hooked, and read off what a measurement needs to know.

    A second run, on another number of samples, tells which axis and which arguments are the samples'.

    Raises:
        LayerRefusal: layers that never fire, or whose output has no samples axis or no floating numbers.
        ProbeError: a source that does not run, or more than once.
    """
    with same_random_numbers(inputs.device):
        before = _random_state()
        try:
            with Cuts(hooked.model, inputs) as cuts:
                own, found, live = _first_run(hooked, inputs)
        except ProbeError:
            raise
        except Exception as error:
            raise _models_own(hooked.model, inputs, error) from error
        _refuse_silent(hooked, found)
        _refuse_nested(hooked, own, found)
        space = _space(hooked, own, found)
        # Random outputs are never the same, and a fake tensor has no values to compare.
        fake = isinstance(space, FakeTensor)
        draws = not fake and (drew_random_numbers() or not all(map(torch.equal, before, _random_state())))
        compare = not (fake or draws)
        per_sample, whole, coupled = _samples(
            hooked, *(_apart(hooked, own, found) if compare else (own, found)), compare
        )
        # Sharded weights come and go by cuts of FSDP's own, into memory that is not there in between.
        logs = cuts.seen and not (fake or draws or comes_and_goes(hooked.model)) and harmless(hooked, own)
    return Plan(
        features={entry: values.shape[1] for entry, values in found.features.items()},
        space=tuple(space.shape[1:]),
        dtype=space.dtype,
        row_bytes=live.peak // own.size,
        graph_bytes=live.total // own.size,
        reference={} if fake or (draws and own.size < inputs.size) else found.features,
        random=draws,
        layout=None if live.wrote_through_views or draws else Layout.of(hooked.model),
        per_sample=per_sample,
        whole=whole,
        coupled=coupled,
        harmless=logs,
        on_cpu=space.device.type == "cpu",
        budget=agreed(hooked.model, memory_budget or int(SHARE_OF_FREE_MEMORY * free_memory(space.device))),
    )


def _models_own(model: nn.Module, inputs: Inputs, error: Exception) -> ProbeError:
    """The error for a plain pass that fails: it is the model's own."""
    weights = {p.dtype for p in model.parameters() if p.is_floating_point()}
    given = [v for v in inputs.leaves if isinstance(v, Tensor) and v.is_floating_point() and v.dtype not in weights]
    if weights and given:
        wanted = ", ".join(sorted(map(str, weights)))
        to = wanted.split(", ")[0]
        advice = f"x is {given[0].dtype}, the model's parameters are {wanted}.\nConvert it:  x.to({to})\n"
    else:
        advice = ""
    return ProbeError(
        f"{advice}the model's own forward pass fails on x of shape {inputs.shapes()}: {type(error).__name__}: {error}\n"
        "Run it by hand:  model.eval(); model(x).  A sample alone needs its axis, too:  x[:1] in place of x[0]"
    )


def coupled_samples(entry: str) -> ProbeError:
    """The error for a layer whose output at one sample depends on the other samples."""
    return ProbeError(
        f"layer {entry!r} couples the samples: what it puts out at one of them, or how wide, changes with the others, "
        "or with its place among them, so no sample has a metric of its own.\n"
        "Put the samples first (nn.LSTM and attention: batch_first=True); normalise by running statistics, in eval "
        "mode; a set that is one sample (the nodes of a graph) goes into a Module that takes it as x[None]; a table "
        "with rows for the samples goes in as an argument beside x; where samples are padded to the longest of the "
        "batch, measure one at a time."
    )


def _refuse_nested(hooked: HookedModel, own: Inputs, found: Outputs) -> None:
    """Refuse an encoder whose padded positions come out otherwise without gradients than with them."""
    nested = [
        name
        for name, module in hooked.model.named_modules()
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False)
    ]
    if not nested or isinstance(next(iter(found.features.values())), FakeTensor):
        return
    try:
        torch.backends.mha.set_fastpath_enabled(True)
        with warnings.catch_warnings(), torch._C.DisableTorchFunction():  # a mode would keep torch from it
            warnings.simplefilter("ignore")  # torch calls nested tensors a prototype
            as_run: dict[str, Tensor] = hooked.outputs(own, keep=_COMPARED).features
    except Exception:  # a nested tensor has no features to flatten
        as_run = {}
    finally:
        torch.backends.mha.set_fastpath_enabled(False)
    different = next((e for e, values in found.features.items() if not _same(values, as_run.get(e))), None)
    if different is not None:
        raise ProbeError(
            f"nn.TransformerEncoder {nested[0]!r} is two functions: without gradients torch packs what the padding "
            "mask leaves into a nested tensor and puts out 0 elsewhere, with gradients it does not; layer "
            f"{different!r} sees the difference.\n"
            f"Say which one you mean:  model.get_submodule({nested[0]!r}).use_nested_tensor = False  is the second."
        )


def _first_run(hooked: HookedModel, inputs: Inputs) -> tuple[Inputs, Outputs, LiveBytes]:
    """Run the user's own samples, or the first of very many."""

    def run(own: Inputs) -> tuple[Inputs, Outputs, LiveBytes]:
        with LiveBytes([*hooked.model.parameters(), *own.leaves]) as live:
            return own, hooked.outputs(own, keep=_COMPARED, aside=live.paused), live

    if inputs.size <= _MANY_SAMPLES or inputs.listed:
        return run(inputs)
    try:
        return run(inputs.chunk(0, _MANY_SAMPLES))
    except ProbeError:
        raise
    except Exception:  # a model that takes its own number of samples alone
        return run(inputs)


def _space(hooked: HookedModel, own: Inputs, found: Outputs) -> Tensor:
    """The samples as points of the space that the metric lives on."""
    if own.point is not None:
        return own.point
    if not found.sources:
        raise ProbeError(
            f"source={hooked.source_name!r} did not run in the forward pass.\n"
            "Name a module that does; torchgeom-probe layers lists them."
        )
    if len(found.sources) > 1:
        raise ProbeError(
            f"source={hooked.source_name!r} runs more than once in a forward pass, so it does not name one space.\n"
            "Name a module that runs once."
        )
    if found.sources[0].ndim == 0 or found.sources[0].shape[0] != own.size:
        raise ProbeError(
            f"source={hooked.source_name!r} puts out shape {tuple(found.sources[0].shape)}, whose first axis is not "
            f"the batch of {own.size}.\n"
            "Name a module whose output has the samples first, or pass what it puts out as the model's input "
            "(transformers: inputs_embeds=)."
        )
    return found.sources[0]


def _apart(hooked: HookedModel, own: Inputs, found: Outputs) -> tuple[Inputs, Outputs]:
    """The samples and what they give; moved apart where all are alike, which hides that they depend on each other."""
    point = own.point
    if point is None or own.size == 1 or not torch.equal(point, point[:1].expand_as(point)):
        return own, found
    by = torch.linspace(0, 0.1, own.size, dtype=point.dtype, device=point.device)
    leaves = list(own.leaves)
    for i in own.wrt:
        step = by.to(leaves[i].dtype).view(-1, *[1] * (leaves[i].ndim - 1))
        leaves[i] = leaves[i].detach() * (1 + step) + step
    moved = replace(own, leaves=tuple(leaves))
    try:
        return moved, hooked.outputs(moved, keep=_COMPARED)
    except Exception:
        return own, found


def _samples(
    hooked: HookedModel, own: Inputs, found: Outputs, compare: bool
) -> tuple[frozenset[int], bool, tuple[str, ...]]:
    """Which arguments are cut with the samples; whether no part can be run; which entries couple the samples.

    A sample among copies of itself must give what it gives in the batch.  Where it does not, an argument that happens
    to be as long as the batch may have been cut (a table, say), or the samples depend on each other, or on their
    places.
    """
    count = 2 if own.size > 2 else 3

    def apart(inputs: Inputs) -> list[str] | None:
        if inputs.listed:
            return None
        different: list[str] = []
        for sample in range(min(own.size, 2) if compare else 1):  # two: whichever sample matters, one run is without it
            try:
                other = hooked.outputs(inputs.at([sample] * count), keep=_COMPARED).features
            except LayerRefusal:
                raise
            except Exception:
                return None
            if compare:
                alone = {e: values[[sample] * count] for e, values in found.features.items()}
                different += [e for e, values in alone.items() if not _same(values, other.get(e))]
        return different

    fixed = frozenset(own.wrt or sorted(own.per_sample)[:1])
    doubtful = sorted(own.per_sample - fixed)
    # The likeliest first: all of them are cut, one is not, none is.
    candidates = [own.per_sample, *(own.per_sample - {i} for i in doubtful), *([fixed] if len(doubtful) > 1 else [])]
    refusal: LayerRefusal | None = None
    first: list[str] | None = None
    for candidate in candidates:
        try:
            different = apart(replace(own, per_sample=candidate))
        except LayerRefusal as error:
            refusal = refusal or error
            continue
        if different == []:
            return candidate, False, ()
        first = different if candidate == own.per_sample else first
    # One sample that is a set (the nodes of a graph), which its Module takes as x[None]: none of it can be repeated.
    one_set = own.size == 1 and refusal is not None and refusal.layers.keys() == hooked.layers.keys()
    if first is None and refusal is not None and not one_set:
        raise refusal
    if first is None and (not compare or own.size == 1):  # no part of the batch can be run
        return own.per_sample, True, ()
    try:
        copies = hooked.outputs(own.with_copies_of_the_first(), keep=_COMPARED).features
    except Exception:
        copies = {}
    if first is not None:  # what puts out the same for other samples depends on none of them
        different = [e for e in dict.fromkeys(first) if not _same(found.features[e], copies.get(e))]
    else:
        different = [e for e, values in found.features.items() if copies and not _same(values[:1], copies.get(e))]
    return own.per_sample, first is None, tuple(different)


def _same(values: Tensor, other: Tensor | None) -> bool:
    if other is None or other.shape[1:] != values.shape[1:]:
        return False
    rows = min(len(values), len(other))
    # Another number of samples is rounded in another order, and nan is everyone's own.
    eps = torch.finfo(values.dtype).eps
    allowed = max(1e-3, 16 * eps) if eps > 1e-12 else 1e-6
    scale = values[:rows].abs().nan_to_num(posinf=0.0).amax().clamp_min(torch.finfo(values.dtype).tiny)
    return not bool(((values[:rows] - other[:rows]).abs() > allowed * scale).any())


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _refuse_silent(hooked: HookedModel, found: Outputs) -> None:
    silent = [name for name in hooked.layers if name not in found.features]
    if silent:
        near = close_names(silent[0], [n for n, _ in hooked.model.named_modules() if n and n not in silent])
        raise LayerRefusal(
            f"layer{'s' if len(silent) > 1 else ''} {', '.join(map(repr, silent))} never fired in the forward pass.\n"
            "Likely: the model reaches past the module (activation checkpointing: "
            "model.set_grad_checkpointing(False); a traced or fx model: hook its leaves), or does not use it in this "
            "mode.\n"
            f"Close names: {', '.join(map(repr, near)) or 'none'}",
            dict.fromkeys(silent, "never ran"),
        )
