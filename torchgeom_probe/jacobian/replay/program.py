"""A recording as one flat function: straight calls of ATen, each value let go after its last use."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchgeom_probe.jacobian.replay.recorder import Recorder
from torchgeom_probe.shapes import Tensor

aten = torch.ops.aten
_ALIASES = (aten.detach.default, aten.alias.default, aten.lift_fresh.default)


@dataclass(frozen=True, eq=False)
class Program:
    """What a pass computes, as a function of its inputs.

    Attributes:
        run: the calls; takes the inputs, returns the outputs.
        graph, constants: what it was written from.
        calls: how many there are.
        rounds_otherwise: whether some are another library's, which rounds in another order.
    """

    run: Callable[..., list[Tensor]]
    graph: fx.Graph
    constants: Mapping[str, Tensor]
    calls: int
    rounds_otherwise: bool = False


def program_of(recorder: Recorder, outputs: list[fx.Node]) -> Program:
    """The function of a recording: the same calls in the same order, so the same bits."""
    graph = recorder.graph
    graph.output(outputs)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not _is_mutable(node):
            graph.erase_node(node)
    return _emitted(graph, recorder.constants)


def _is_mutable(node: fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _emitted(graph: fx.Graph, constants: Mapping[str, Tensor], rounds_otherwise: bool = False) -> Program:
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
    return Program(outside["run"], graph, constants, calls, rounds_otherwise)


def faster(program: Program, inputs: list[Tensor]) -> Program:
    return program
