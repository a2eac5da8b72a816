"""One eager pass, written down: the ATen calls that it made, and the code that ran to make them."""

from __future__ import annotations

import contextlib
import operator
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from torchgeom_probe.dual import DualTensor
from torchgeom_probe.jacobian.memory import DispatchMode
from torchgeom_probe.shapes import Tensor

#: What these ops do is known, here and in the passes over the program.
_NAMESPACES = ("aten", "prims")
_REFUSED_TAGS = {
    torch.Tag.nondeterministic_seeded: "draws random numbers",
    torch.Tag.data_dependent_output: "reads a number out of a tensor",
    torch.Tag.dynamic_output_shape: "has a shape that depends on numbers",
}


class Refused(Exception):
    """Why a pass is not replayed: what it depends on cannot be told for certain."""


class Made(NamedTuple):
    """How a tensor of the pass lay."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def like(self) -> Tensor:
        """Another that lies so, of ordinary numbers."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).fill_(0.5)


class Recorder(DispatchMode):
    """Writes every ATen call of its body into one flat program, in the order in which they ran.

    Args:
        inputs: the tensors that another run has in other places.
        state: id → tensor, everything that may be read from where it lies: weights, buffers.

    Attributes:
        graph: the calls.
        refused: why this is no program that could run again; None: it could.
        constants: name → tensor, what is read besides the inputs.
    """

    def __init__(self, inputs: Sequence[Tensor], state: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.refused: str | None = None
        self.constants: dict[str, Tensor] = {}
        self._state = state
        self._nodes: Any = WeakIdKeyDictionary()  # holds no tensor of the pass
        #: the storages of inputs and constants, which nothing may write to; and those that something is written to
        self._outside: set[int] = set()
        self._written: set[int] = set()
        #: nodes whose memory is written to at some time
        self._storage: dict[fx.Node, int] = {}
        for i, tensor in enumerate(inputs):
            self._made(tensor, self.graph.placeholder(f"input_{i}"))
            self._outside.add(_storage(tensor))

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DualTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if self.refused is None:
            profile = sys.getprofile()
            try:
                sys.setprofile(None)
                self._write(op, args, kwargs, out)
            except Refused as reason:
                self.refused = str(reason)
            finally:
                sys.setprofile(profile)
        return out

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that makes a tensor of the pass."""
        node = self._nodes.get(tensor)
        if node is None:
            raise Refused("puts out a tensor that no op of the pass made")
        return node

    def is_written(self, node: fx.Node) -> bool:
        """Whether something is written, at any time, to the memory of a node's result."""
        return self._storage.get(node) in self._written

    def _write(self, op: Any, args: Any, kwargs: Any, out: Any) -> None:
        _refuse(op, args)
        takes_any = op is torch.ops.aten.lift_fresh.default  # numbers of Python's, just made a tensor
        plain = tree_map(lambda a: self._argument(a, takes_any) if isinstance(a, Tensor) else a, (tuple(args), kwargs))
        for argument, value in _written(op, args, kwargs):
            if _storage(value) in self._outside:
                raise Refused(f"{op} writes to {argument}, which is not the pass's own")
            self._written.add(_storage(value))
        node = self.graph.create_node("call_function", op, *plain)
        if isinstance(out, Tensor):
            self._found(out, node)
        elif isinstance(out, (tuple, list)):
            for i, one in enumerate(out):
                if isinstance(one, Tensor):
                    self._found(one, self.graph.call_function(operator.getitem, (node, i)))
                elif one is not None:
                    raise Refused(f"{op} gives {type(one).__name__}, which is no tensor")
        elif out is not None:
            raise Refused(f"{op} gives {type(out).__name__}, which is no tensor")

    def _found(self, out: Tensor, node: fx.Node) -> None:
        if self._nodes.get(out) is None:  # what an op in place returns has its node
            self._made(out, node)

    def _made(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[tensor] = node
        self._storage[node] = _storage(tensor)
        node.meta["made"] = Made(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def _argument(self, tensor: Tensor, takes_any: bool) -> fx.Node:
        node = self._nodes.get(tensor)
        if node is None:
            if id(tensor) not in self._state and not takes_any:
                raise Refused(f"reads a tensor {list(tensor.shape)} that nothing leads to from the model")
            name = f"constant_{len(self.constants)}"
            self.constants[name] = tensor
            node = self.graph.get_attr(name)
            self._made(tensor, node)
            self._outside.add(_storage(tensor))
        return node


def _storage(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided:
        raise Refused(f"reads or makes a tensor of layout {tensor.layout}")
    return tensor.untyped_storage()._cdata


def _written(op: Any, args: Any, kwargs: Any) -> Iterator[tuple[str, Tensor]]:
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor):
                    yield argument.name, tensor


def _refuse(op: Any, args: Any) -> None:
    if op.namespace not in _NAMESPACES:
        raise Refused(f"calls {op}, whose code is not torch's")
    for tag, why in _REFUSED_TAGS.items():
        if tag not in op.tags:
            continue
        if op is torch.ops.aten.index.Tensor and not any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            continue  # by places: the shape is theirs
        raise Refused(f"calls {op}, which {why}")


class Ran:
    """What Python code ran inside of the body, and which functions of C it called itself.

    Attributes:
        codes: code → the globals that it ran with.
        callers: code → the codes that called it.
        builtins: code of the caller → the functions of C: (their module, name, type of what they are a method of).
    """

    def __init__(self) -> None:
        self.codes: dict[types.CodeType, dict[str, Any]] = {}
        self.callers: dict[types.CodeType, set[types.CodeType]] = {}
        self.builtins: dict[types.CodeType, set[tuple[str | None, str, type]]] = {}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note what runs in this thread; nobody else may be doing so."""
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _note(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call":
            self.codes.setdefault(frame.f_code, frame.f_globals)
            if frame.f_back is not None:
                self.callers.setdefault(frame.f_code, set()).add(frame.f_back.f_code)
        elif event == "c_call":
            owner = getattr(arg, "__self__", None)
            called = arg.__module__, arg.__name__, owner if isinstance(owner, type) else type(owner)
            self.builtins.setdefault(frame.f_code, set()).add(called)
