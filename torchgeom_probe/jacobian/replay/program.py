"""A recording as one flat function: straight calls of ATen, each value let go after its last use."""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchgeom_probe.jacobian.replay.recorder import Made, Recorder
from torchgeom_probe.shapes import Tensor

aten = torch.ops.aten
_ALIASES = (aten.detach.default, aten.alias.default, aten.lift_fresh.default)


@dataclass(frozen=True, eq=False)
class Program:
    """What a pass computes, as a function of its inputs.

    Attributes:
        run: the calls; takes the inputs, returns the outputs.
        calls: how many there are.
    """

    run: Callable[..., list[Tensor]]
    calls: int


def programs_of(recorder: Recorder, outputs: list[fx.Node]) -> tuple[Program, Program]:
    """A recording as a function: of the same calls in the same order, so of the same bits; and of faster ones."""
    graph = recorder.graph
    graph.output(outputs)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not _is_mutable(node):
            graph.erase_node(node)
    exact = _emitted(graph, recorder.constants)
    _weights_together(graph, {node for node in graph.nodes if recorder.is_written(node)})
    for node in list(graph.nodes):
        if node.op == "call_function":
            _by_onednn(node)
    return exact, _emitted(graph, recorder.constants)


def captured(program: Program, inputs: Sequence[Tensor]) -> Program:
    """On a GPU the same calls as one CUDA graph, which launches them all at once; elsewhere the program itself.

    The graph reads the weights from where they lie, and its inputs from copies of its own.
    """
    if not inputs or not all(tensor.is_cuda for tensor in inputs):
        return program
    own = [tensor.clone() for tensor in inputs]
    graph = torch.cuda.CUDAGraph()
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose and allocate in a first run
            program.run(*own)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            outputs = program.run(*own)
    except RuntimeError:  # something in it waits for the device
        return program

    def run(*tensors: Tensor) -> list[Tensor]:
        for place, tensor in zip(own, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        return outputs

    return Program(run, program.calls)


def _is_mutable(node: fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _emitted(graph: fx.Graph, constants: Mapping[str, Tensor]) -> Program:
    nodes = list(graph.nodes)
    last = {argument: i for i, node in enumerate(nodes) for argument in node.all_input_nodes}
    names: dict[fx.Node, str] = {}
    outside: dict[str, Any] = {}
    functions: dict[Any, str] = {}
    lines: list[str] = []
    calls = 0

    def written(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, (list, tuple)):
            inside = ",".join(map(written, value))
            return f"[{inside}]" if isinstance(value, list) else f"({inside},)" if value else "()"
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        outside[f"c{len(outside)}"] = value
        return f"c{len(outside) - 1}"

    for i, node in enumerate(nodes):
        names[node] = f"v{i}"
        if node.op == "get_attr":
            outside[names[node]] = constants[node.target]
        elif node.op == "output":
            lines.append(f" return {written(node.args[0])}")
        elif node.op == "call_function":
            if node.target is operator.getitem:
                lines.append(f" {names[node]}={names[node.args[0]]}[{node.args[1]}]")
            else:
                calls += 1
                function = functions.setdefault(node.target, f"f{len(functions)}")
                outside[function] = getattr(node.target, "_op", node.target)
                arguments = [*map(written, node.args), *(f"{key}={written(v)}" for key, v in node.kwargs.items())]
                lines.append(f" {names[node]}={function}({','.join(arguments)})")
            gone = {names[a] for a in node.all_input_nodes if last[a] == i and a.op == "call_function"}
            gone |= set() if node.users else {names[node]}
            if gone:
                lines.append(f" del {','.join(sorted(gone))}")
    inputs = ",".join(names[node] for node in nodes if node.op == "placeholder")
    exec(compile("\n".join([f"def run({inputs}):", *lines]), "<replay>", "exec"), outside)
    return Program(outside["run"], calls)


# ------------------------------------------------------------------------------------------- passes over the calls


def _by_onednn(node: Any) -> None:
    """Call oneDNN itself, where a race of the two says that it is the faster: torch may ask im2col and MKL instead."""
    arguments = [a.meta.get("made") for a in node.all_input_nodes]
    if not arguments or any(m is None or m.dtype != torch.float32 or m.device.type != "cpu" for m in arguments):
        return
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return
    call: tuple[Any, tuple[Any, ...]]
    if node.target is aten.convolution.default and not node.args[6] and all(arguments[0].shape):
        x, weight, bias, stride, padding, dilation, _, _, groups = node.args
        call = aten.mkldnn_convolution.default, (x, weight, bias, padding, stride, dilation, groups)
    elif node.target is aten.mm.default and node.args[1].target is aten.t.default and all(arguments[0].shape):
        weight = node.args[1].args[0]
        if not _contiguous(weight.meta["made"]):
            return
        call = torch.ops.mkldnn._linear_pointwise.default, (node.args[0], weight, None, "none", [], "")
    else:
        return
    if _race(_Call.of(node.target, node.args), _Call.of(*call)):
        node.target, node.args = call


def _contiguous(made: Made) -> bool:
    return made.stride == torch.empty(made.shape, device="meta").stride()


@dataclass(frozen=True)
class _Call:
    """An op and its arguments, tensors by how they lie."""

    op: Any
    arguments: tuple[Any, ...]

    @staticmethod
    def of(op: Any, args: Sequence[Any]) -> _Call:
        lying = (a.meta["made"] if isinstance(a, fx.Node) else a for a in args)
        return _Call(op, tuple(tuple(a) if isinstance(a, list) else a for a in lying))

    def ready(self) -> Callable[[], Any]:
        """The call with tensors that lie so."""
        arguments = [
            a.like() if isinstance(a, Made) else list(a) if isinstance(a, tuple) else a for a in self.arguments
        ]
        return functools.partial(self.op, *arguments)


@functools.lru_cache(maxsize=4096)
def _race(call: _Call, other: _Call) -> bool:
    """Whether the other one is faster; asked once for each shape in the life of a process."""
    # On one thread other jobs on the machine count for little in the time of the process.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.inference_mode():
        runs, best = (call.ready(), other.ready()), [math.inf, math.inf]
        for _ in range(_TURNS):
            for i, run in enumerate(runs):
                start = clock()
                run()
                best[i] = min(best[i], clock() - start)
    return best[1] < 0.95 * best[0]


_TURNS = 6
#: op of one tensor after another → of many together; what tells that an op of theirs is the same.
_TOGETHER = {
    aten.add.Tensor: aten._foreach_add.Scalar,
    aten.rsqrt.default: aten._foreach_rsqrt.default,
    aten.mul.Tensor: aten._foreach_mul.List,
    aten.sub.Tensor: aten._foreach_sub.List,
}


def _weights_together(graph: fx.Graph, written: set[fx.Node]) -> None:
    """Fold all batch norms at once: small ops on weights alone, which come first, many in one call."""
    level: dict[fx.Node, int] = {}
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            level[node] = 0
        if node.target not in _TOGETHER or node.kwargs or node in written:
            continue
        tensors = node.all_input_nodes
        one_scalar = node.target is aten.add.Tensor and len(tensors) == 1 and isinstance(node.args[1], float)
        form = one_scalar or node.target is aten.rsqrt.default or len(tensors) == 2
        form = form and (one_scalar or node.target is not aten.add.Tensor)
        if not form or any(a not in level or a.meta["made"].shape.numel() > 1 << 14 for a in tensors):
            continue
        if len({a.meta["made"].shape for a in tensors} | {node.meta["made"].shape}) > 1:
            continue
        level[node] = 1 + max(level[a] for a in tensors)
        groups.setdefault((level[node], node.target, node.args[1:] if one_scalar else None), []).append(node)
    first = next(node for node in graph.nodes if node.op == "call_function")
    for constant in [node for node in level if node.op == "get_attr"]:
        first.prepend(constant)
    for (_, target, scalar), nodes in sorted(groups.items(), key=lambda item: item[0][0]):
        with graph.inserting_before(first):
            columns = zip(*(node.args[: len(node.all_input_nodes)] for node in nodes), strict=True)
            together = graph.call_function(_TOGETHER[target], (*map(list, columns), *(scalar or ())))
            for i, node in enumerate(nodes):
                one = graph.call_function(operator.getitem, (together, i))
                one.meta = node.meta
                node.replace_all_uses_with(one)
        for node in nodes:
            graph.erase_node(node)
