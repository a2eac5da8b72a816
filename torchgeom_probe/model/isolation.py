"""Zero footprint: the context that every measurement runs in, which leaves model and process exactly as they were.

Two halves.  Process: gradient mode, autocast, the attention backends (no fused attention kernel has a forward
derivative), compiled code, TF32 and the random generators are set for the measurement and put back.  Model: train/eval
flags, buffers, and all else that a forward pass may write to (``model/state.py``) are put back, before each pass of the
measurement too, so that every pass is one of the same function.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.leftovers import FOUND, taken_out
from torchgeom_probe.model.sharded import at_rest
from torchgeom_probe.model.state import State
from torchgeom_probe.shapes import Tensor

Mode = Literal["eval", "as_is"]

#: What a measurement sets is global to the process: two of them in threads would put back each other's settings.
_ONE_AT_A_TIME = threading.RLock()
#: The models that are being measured, the innermost last, as they were.
_MEASURED: list[State] = []


@dataclass
class Kept:
    """What one measurement of a model leaves for the next: where its state was found, and its modules.

    ``beside``: functions that a pass calls besides the model's own.  ``found``: what was found out about the model (its
    plans, by shape); emptied where it is another one since, or where nothing can tell.
    """

    beside: list[Any] = field(default_factory=list)
    state: State | None = None
    modules: list[nn.Module] = field(default_factory=list)
    found: dict[Any, Any] = field(default_factory=dict)

    def __reduce__(self) -> Any:
        """A copy finds its own."""
        return Kept, (self.beside,)


@contextlib.contextmanager
def measuring(model: nn.Module, *, mode: Mode = "eval", kept: Kept | None = None) -> Iterator[None]:
    """Run the body as a measurement: every trace of it in ``model`` and in the process is undone, also when it raises.

    ``mode="eval"`` measures in eval mode whatever mode the model is in; ``"as_is"`` keeps each module's own mode, and
    refuses batch normalisation by batch statistics, which couples the samples: then no sample has a metric of its own.
    ``kept``: handed to every measurement of the same model, saves it a walk through what is still where it was.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
    >>> with measuring(model):
    ...     assert not model[1].training
    >>> model[1].training
    True
    """
    if mode not in ("eval", "as_is"):
        raise ProbeError(f"mode={mode!r} is unknown. Write mode='eval' (the default) or mode='as_is'.")
    kept = Kept() if kept is None or kept.state in _MEASURED else kept
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    beside = [torch.default_generator, *cuda, np.random.mtrand._rand, random._inst, *FOUND.get(model, ())]
    beside += kept.beside
    with _ONE_AT_A_TIME, _process_set(), contextlib.ExitStack() as flags:
        at_rest(model)
        if mode == "eval":
            _in_eval_mode(kept.modules, flags)
        if kept.state is None or not kept.state.again(beside):
            flags.close()
            kept.found.clear()
            kept.state, kept.modules = None, list(model.modules())
            _refuse_uninitialised(model, kept.modules)
            if mode == "eval":
                _in_eval_mode(kept.modules, flags)
        if kept.state is None or mode != "eval":
            _refuse_batch_statistics(model, kept.modules)
        state = kept.state = kept.state or State(model, beside)
        _MEASURED.append(state)
        try:
            yield
        finally:
            _MEASURED.pop()
            kept.state = state if state.light else None
            state.put_back()


def _in_eval_mode(modules: list[nn.Module], flags: contextlib.ExitStack) -> None:
    training = [vars(module) for module in modules if module.training]
    flags.callback(lambda: [attributes.update(training=True) for attributes in training])
    for attributes in training:
        # Not .eval(): an override of it may merge weights (LoRA), which does not come back bit for bit.
        attributes["training"] = False


@contextlib.contextmanager
def from_the_start() -> Iterator[None]:
    """Run the body, a pass, with the model that is measured as it was when the measurement began."""
    if _MEASURED:
        _MEASURED[-1].start_again()
    try:
        yield
    finally:
        if _MEASURED:
            _MEASURED[-1].ran = True
            at_rest(_MEASURED[-1].model)


@contextlib.contextmanager
def plain_run(made: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
    """Run the body, a plain pass from the start; but for what ``made()`` returns after it, it leaves no tensor."""
    with taken_out(_MEASURED[-1] if _MEASURED else None, made), from_the_start():
        yield


def keep_numbers(parameter: nn.Parameter) -> None:
    """Keep the numbers of a parameter that is read through ``.data``: no version counter tells of a write there."""
    if _MEASURED and _MEASURED[-1].keep_numbers(parameter):
        FOUND.setdefault(_MEASURED[-1].model, []).append(parameter)


def drew_random_numbers() -> bool:
    """Whether the model that is being measured has drawn random numbers, from whatever generator, since its start."""
    return bool(_MEASURED) and _MEASURED[-1].drew_random_numbers()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Hold the parameters constant inside the body: reverse mode then saves nothing for their gradients."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Give the body what every pass of a measurement gets: the model as it was, and the same random numbers.

    What it draws is put back after it.
    """
    with (
        from_the_start(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" and torch.cuda.is_initialized() else []),
    ):
        yield


def _refuse_uninitialised(model: nn.Module, modules: list[nn.Module]) -> None:
    is_lazy: Any = nn.parameter.is_lazy
    if any(is_lazy(t) for module in modules for t in (*module._parameters.values(), *module._buffers.values())):
        name = next(n for n, t in [*model.named_parameters(), *model.named_buffers()] if is_lazy(t))
        raise ProbeError(
            f"{name!r} is a lazy parameter that has no shape yet, and a measurement must not be what gives it one.\n"
            "Run the model once before you probe it:  model(x)"
        )


def _refuse_batch_statistics(model: nn.Module, modules: list[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            name = next(name for name, m in model.named_modules() if m is module)
            if module.training and module.running_mean is not None:
                way_out = "Measure in eval mode, the default:  GeometryProbe(model, ..., mode='eval')"
            else:
                way_out = "Keep running statistics:  nn.BatchNorm2d(channels, track_running_stats=True)"
            raise ProbeError(
                f"batch normalisation {name!r} normalises with the statistics of the batch (train mode): it couples "
                f"the samples, so no sample has a metric of its own.\n{way_out}"
            )


@contextlib.contextmanager
def _process_set() -> Iterator[None]:
    fastpath, dtype = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    with _numbers_set(), contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Each is torch speaking of its own decompositions, or of gradients that a measurement does not want.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        warnings.filterwarnings(
            "ignore", message=".*performance drop because we have not yet implemented the batching rule.*"
        )
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True.*")
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        # Nothing can be compiled before it is imported, and its import takes seconds.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_own_parametrizations())
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _numbers_set() -> Iterator[None]:
    """What an op's own numbers depend on: no gradients, no autocast, no lower precision."""
    with torch.inference_mode(False), torch.no_grad(), _full_float32(), contextlib.ExitStack() as stack:
        for device_type in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def replaying(kept: Kept, *, mode: Mode) -> Iterator[None]:
    """Run the body, which runs none of the model's code, as in :func:`measuring`: so there is nothing to put back."""
    with _ONE_AT_A_TIME, _numbers_set(), contextlib.ExitStack() as flags:
        if mode == "eval":
            _in_eval_mode(kept.modules, flags)
        yield


def measured_state() -> State:
    """The state of the innermost model that is being measured, as it was when its measurement began."""
    _MEASURED[-1].start_again()
    return _MEASURED[-1]


@contextlib.contextmanager
def _own_parametrizations() -> Iterator[None]:
    # Inside of parametrize.cached() a measurement would leave weights there that have no gradient.
    module: Any = parametrize
    kept = module._cache_enabled, module._cache
    module._cache_enabled, module._cache = 0, {}
    try:
        yield
    finally:
        module._cache_enabled, module._cache = kept


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    # TF32 (the default of cuDNN's convolutions) leaves 3 digits of a tangent: less than a small singular value needs.
    if not hasattr(torch._C, "_get_fp32_precision_getter"):  # before torch 2.9
        convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        try:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
            yield
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
        return
    # The old switches raise where both kinds were used; a precision that a user never set is "none", or its parent's.
    precision, set_precision = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    backends = ("cuda", "mkldnn") if torch.cuda.is_initialized() else ("mkldnn",)
    kept = {(b, op): precision(b, op) for b in backends for op in ("matmul", "conv", "rnn")}
    lower = {key: value for key, value in kept.items() if value not in ("none", "ieee")}
    try:
        for key in lower:
            set_precision(*key, "ieee")
        yield
    finally:
        for key, value in lower.items():
            set_precision(*key, "none")
            if precision(*key) != value:
                set_precision(*key, value)
