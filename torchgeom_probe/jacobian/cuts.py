"""Where a forward pass cuts numbers off from their derivative, and whether what comes of them reaches a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from torchgeom_probe.dual.followed import COPIES, inside_a_custom_function, storage_of
from torchgeom_probe.dual.ops import (
    CONSTANT,
    DETACHES,
    ESCAPES,
    METADATA,
    as_called,
    body_of,
    meaning_of,
    reads_bits,
    smooth,
)
from torchgeom_probe.model.hooked import HookedModel
from torchgeom_probe.model.inputs import Inputs
from torchgeom_probe.model.isolation import frozen, keep_numbers
from torchgeom_probe.model.writes import other_memory
from torchgeom_probe.shapes import Tensor


class Cuts(TorchFunctionMode):
    """Sees the cuts of the passes in its body: ``detach``, ``.item()``, ``no_grad``; refuses new memory for ``.data``.

    Args:
        model, inputs: what runs; what is cut off from its own weights, or copied of the inputs, is of no interest.
        move: whether what is cut off is given other numbers; the body must run under ``torch.enable_grad``.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, *, move: bool = False) -> None:
        super().__init__()
        self.seen = False
        self._move = move
        self._moved = 0
        self._own = [*model.named_parameters(), *model.named_buffers()]
        given = [*(t for _, t in self._own), *inputs.leaves]
        plain = [t for t in given if type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided]
        self._still = {t.untyped_storage()._cdata for t in plain}
        self._open: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, known = as_called(func, kwargs), meaning_of(func)
        if func == _SET_DATA:
            self._refuse_other_memory(*args)
        if func == _GET_DATA and type(args[0]) is nn.Parameter:
            keep_numbers(args[0])
        body = body_of(func)
        if body is not None and func not in self._open:  # it may cut, too
            self._open.append(func)
            try:
                with self:
                    return body(*args, **kwargs)
            finally:
                self._open.pop()
        self.seen |= func is torch._C._set_grad_enabled and not args[0]
        cut = known in DETACHES or known in ESCAPES or func in COPIES or reads_bits(func, args, kwargs)
        if self._move and not torch.is_grad_enabled() and known not in METADATA | CONSTANT:
            cut |= not inside_a_custom_function()
        if cut and any(map(self._moves, tree_leaves((args, kwargs)))):
            self.seen = True
            self._moved += 1
            by = 1e-3 * (1 + self._moved % 7) * self._move  # another one for each, or they could cancel
            args, kwargs = tree_map(lambda a: a * (1 + by) + by if by and self._moves(a) else a, (args, kwargs))
        return func(*args, **kwargs)

    def _moves(self, value: Any) -> bool:
        if type(value) not in (Tensor, nn.Parameter) or not smooth(value):
            return False
        storage = storage_of(value)
        return storage is not None and storage._cdata not in self._still

    def _refuse_other_memory(self, tensor: Tensor, value: Tensor) -> None:
        # No version counter tells of it, and of a DualTensor assigned in C++ only a dead pointer would be left.
        if tensor.untyped_storage()._cdata != value.untyped_storage()._cdata:
            raise other_memory(next((name for name, own in self._own if own is tensor), None))


_SET_DATA, _GET_DATA = torch.Tensor.data.__set__, torch.Tensor.data.__get__  # type: ignore[attr-defined]


def harmless(hooked: HookedModel, inputs: Inputs) -> bool:
    """Whether nothing that is cut off comes back: when it is given other numbers, no layer puts out another bit.

    That is what logging does (``acts.append(out.detach())``, ``out.norm().item()``), and no straight-through estimator.
    """

    def sums(*, move: bool) -> dict[str, Tensor]:
        with torch.enable_grad(), frozen(hooked.model), Cuts(hooked.model, inputs, move=move):
            return hooked.outputs(inputs, of=lambda flat: flat.detach().double().sum(1, keepdim=True)).features

    try:
        here, there = sums(move=False), sums(move=True)
    except Exception:
        return False
    return all(torch.equal(here[e].nan_to_num(), there[e].nan_to_num()) for e in here)
