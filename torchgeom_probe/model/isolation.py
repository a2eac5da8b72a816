"""Zero footprint: the context that every measurement runs in, which leaves model and process exactly as they were.

Two halves.  Process: gradient mode, autocast, the attention backends (no fused attention kernel has a forward
derivative), compiled code, TF32 and the random generators are set for the measurement and put back.  Model: train/eval
flags, buffers, and every attribute of every module are put back, whatever the forward pass does to them.
"""

from __future__ import annotations

import collections
import contextlib
import random
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.shapes import Tensor

Mode = Literal["eval", "as_is"]

_CONTAINERS = (dict, list, set, collections.deque)
#: What a measurement sets is global to the process: two of them in threads would put back each other's settings.
_ONE_AT_A_TIME = threading.RLock()
#: How far state is followed that hangs on a module's attributes, through containers and plain objects.
_DEPTH = 3
#: Packages whose objects are none of a model's own state, and may be at work in another thread.
FRAMEWORKS = {*sys.stdlib_module_names, "torch", "torchvision", "lightning", "pytorch_lightning", "tqdm", "tensorboard"}
_MANY = 1000


@contextlib.contextmanager
def measuring(model: nn.Module, *, mode: Mode = "eval") -> Iterator[None]:
    """Run the body as a measurement: every trace of it in ``model`` and in the process is undone, also when it raises.

    ``mode="eval"`` measures in eval mode whatever mode the model is in; ``"as_is"`` keeps each module's own mode, and
    refuses batch normalisation by batch statistics, which couples the samples: then no sample has a metric of its own.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
    >>> with measuring(model):
    ...     assert not model[1].training
    >>> model[1].training
    True
    """
    if mode not in ("eval", "as_is"):
        raise ProbeError(f"mode={mode!r} is unknown. Write mode='eval' (the default) or mode='as_is'.")
    _refuse_uninitialised(model)
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        stack.enter_context(_model_restored(model))
        if mode == "eval":
            for module in model.modules():
                # Not .eval(): an override of it may merge weights (LoRA), which does not come back bit for bit.
                module.training = False
        _refuse_batch_statistics(model)
        stack.enter_context(_generators_restored())
        stack.enter_context(_process_set())
        yield


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


def same_random_numbers(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Give the body the random numbers that every pass of a measurement gets: what it draws is put back after it."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" and torch.cuda.is_initialized() else [])


def _refuse_uninitialised(model: nn.Module) -> None:
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if torch.nn.parameter.is_lazy(parameter):
            raise ProbeError(
                f"{name!r} is a lazy parameter that has no shape yet, and a measurement must not be what gives it "
                "one.\n"
                "Run the model once before you probe it:  model(x)"
            )


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            if module.training and module.running_mean is not None:
                way_out = "Measure in eval mode, the default:  GeometryProbe(model, ..., mode='eval')"
            else:
                way_out = "Keep running statistics:  nn.BatchNorm2d(channels, track_running_stats=True)"
            raise ProbeError(
                f"batch normalisation {name!r} normalises with the statistics of the batch (train mode): it couples "
                "the "
                f"samples, so no sample has a metric of its own.\n{way_out}"
            )


@contextlib.contextmanager
def _model_restored(model: nn.Module) -> Iterator[None]:
    state: list[tuple[Any, Any]] = []
    seen: set[int] = set()
    for module in model.modules():
        _keep(vars(module), state, seen, _DEPTH)
    buffers = [(b, b.clone()) for b in model.buffers()]
    versions = [(name, p, _version(p)) for name, p in model.named_parameters()]
    try:
        yield
    finally:
        for holder, content in state:
            _put_back(holder, content)
        with torch.no_grad():
            for buffer, value in buffers:
                # Through .data: it bumps no version counter, so a backward pass that the user has still to make is
                # untouched.
                if buffer.is_inference():
                    with torch.inference_mode():
                        buffer.data.copy_(value)
                else:
                    buffer.data.copy_(value)
        written = [name for name, p, version in versions if _version(p) != version]
        if written:
            raise ProbeError(
                f"the model's forward pass writes to its own parameters in place ({', '.join(written[:3])}), also in "
                "eval "
                "mode, so it cannot be measured without being changed.\n"
                "Do that in the training step instead, or behind  if self.training:"
            )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _keep(holder: Any, state: list[tuple[Any, Any]], seen: set[int], depth: int) -> None:
    """Note what a container holds, and what the containers and plain objects in it hold."""
    if id(holder) in seen:
        return
    seen.add(id(holder))
    state.append((holder, holder.copy()))
    if depth == 0 or len(holder) > _MANY:
        return
    for value in list(holder.values() if isinstance(holder, dict) else holder):
        if isinstance(value, _CONTAINERS):
            _keep(value, state, seen, depth - 1)
        elif _is_plain_object(value):
            _keep(vars(value), state, seen, depth - 1)


def _is_plain_object(value: Any) -> bool:
    # Modules are visited on their own; functions and types hold nothing of a forward pass; and what belongs to a
    # framework (a trainer, a queue, a logger) may be at work in another thread.
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType))
        and type(value).__module__.split(".")[0] not in FRAMEWORKS
    )


def _put_back(holder: Any, content: Any) -> None:
    if not (holder or content) or _same(holder, content):
        return
    holder.clear()
    if isinstance(holder, (dict, set)):
        holder.update(content)
    else:
        holder.extend(content)


def _same(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(a is b and now[a] is before[b] for a, b in zip(now, before, strict=True))
    if isinstance(now, set):
        return {id(v) for v in now} == {id(v) for v in before}
    return all(a is b for a, b in zip(now, before, strict=True))


@contextlib.contextmanager
def _generators_restored() -> Iterator[None]:
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def _process_set() -> Iterator[None]:
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Each is torch speaking of its own decompositions, or of gradients that a measurement does not want.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        warnings.filterwarnings(
            "ignore", message=".*performance drop because we have not yet implemented the batching rule.*"
        )
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True.*")
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        for device_type in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        if (
            "torch._dynamo" in sys.modules
        ):  # nothing can be compiled before it is imported, and its import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_full_float32())
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    # TF32 (the default of cuDNN's convolutions) leaves 3 digits of a tangent: less than a small singular value needs.
    if not torch.cuda.is_initialized():
        yield
        return
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
