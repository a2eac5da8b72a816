"""torch's own tables of ops and modules with sample inputs, and every form in which an op can be called."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from dual.oracle import ALL, is_smooth
from torch.utils._pytree import tree_leaves

_scripted = torch._C.ScriptFunction.__call__, torch._C.ScriptMethod.__call__
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's test tools warn about themselves
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
# Their import forbids the whole process to set flags, and times every scripted function: other tests are not to see it.
setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)
torch._C.ScriptFunction.__call__, torch._C.ScriptMethod.__call__ = _scripted

__all__ = ["module_db", "op_db"]

FIRST, OTHERS = slice(0, 1), slice(1, None)


def forms_of(op: Any) -> dict[str, Callable[..., Any]]:
    """Form → callable, for an op and its aliases: the function, the method, the operator, and those in place."""
    found: dict[Any, str] = {}
    for owner in (op, *op.aliases):
        for kind in ("op", "method_variant", "operator_variant", "inplace_variant", "inplace_operator_variant"):
            form = getattr(owner, kind, None)
            if form is not None:
                found.setdefault(form, f"{owner.name} {kind}")
    return {name: form for form, name in found.items()}


def samples_of(op: Any, most: int) -> list[Any]:
    """At most so many of its sample inputs in double precision, from all over the list."""
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", torch.float64, requires_grad=False))
    return samples[:: max(1, -(-len(samples) // most))]


def calls_of(op: Any, most: int, *, layouts: bool) -> Iterator[tuple[str, Any, Any, dict[str, Any], slice]]:
    """(what it is, function, args, kwargs, which of its tensors are dual) for an op's every form.

    Without ``layouts`` the samples take turns in being contiguous or not; with it each is tried both ways.
    """
    samples = samples_of(op, most)
    for name, form in forms_of(op).items():
        in_place = "inplace" in name
        # an op that takes symmetric or triangular matrices is a function of those alone
        function = form if in_place else functools.partial(op.gradcheck_wrapper, form)
        for n, sample in enumerate(samples):
            takes = name.endswith(" op") or isinstance(sample.input, torch.Tensor)
            if not takes or (in_place and sample.broadcasts_input):
                continue
            for strided in (False, True) if layouts else (bool(n % 2),):
                if strided and "as_strided" in op.name:
                    continue  # it reads the memory between
                given = sample.noncontiguous() if strided else sample
                args, kwargs = (given.input, *given.args), given.kwargs
                several = sum(map(is_smooth, tree_leaves((args, kwargs)))) > 1
                for which in (ALL,) if not several else (ALL, FIRST) if in_place else (ALL, FIRST, OTHERS):
                    yield f"{name}, sample {n}{', strided' * strided}", function, args, kwargs, which


def refused_file() -> Path:
    """The list of what a dual pass refuses of the tables of this minor version of torch, or of the newest before."""
    here = Path(__file__).parent
    installed = tuple(int(part) for part in torch.__version__.split(".")[:2])
    versions = {tuple(map(int, p.stem.split("_")[-2:])): p for p in here.glob("refused_by_torch_*.json")}
    return versions[max((v for v in versions if v <= installed), default=min(versions))]


def refused() -> dict[str, dict[str, str]]:
    """``{"ops": {name: reason}, "modules": {name: reason}}``."""
    return json.loads(refused_file().read_text())
