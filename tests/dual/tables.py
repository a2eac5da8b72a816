"""torch's own tables of ops and modules with sample inputs, and every form in which an op can be called."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from dual.judge import ALL, FIRST, OTHERS, Verdict, is_smooth
from torch.utils._pytree import tree_leaves

_scripted = torch._C.ScriptFunction.__call__, torch._C.ScriptMethod.__call__
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's test tools warn about themselves
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
# Their import forbids the whole process to set flags, and times every scripted function: other tests are not to see it.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
torch._C.ScriptFunction.__call__, torch._C.ScriptMethod.__call__ = _scripted

__all__ = ["module_db", "op_db"]


LARGE = 1 << 16


def forms_of(op: Any) -> dict[str, Callable[..., Any]]:
    """Form → callable, for an op and its aliases: the function, the method, the operator, and those in place."""
    found: dict[Any, str] = {}
    for owner in (op, *op.aliases):
        for kind in ("op", "method_variant", "operator_variant", "inplace_variant", "inplace_operator_variant"):
            form = getattr(owner, kind, None)
            if form is not None:
                found.setdefault(form, f"{owner.name} {kind}")
    return {name: form for form, name in found.items()}


def numbers_in(sample: Any) -> int:
    """How many numbers its tensors hold."""
    return sum(
        x.numel() for x in tree_leaves((sample.input, sample.args, sample.kwargs)) if isinstance(x, torch.Tensor)
    )


def samples_of(op: Any, most: int, dtype: torch.dtype) -> list[Any]:
    """At most so many of its sample inputs, without the largest: the first ones of a shuffled list, always the same.

    Not every n-th, which would miss what a sample list repeats with that period.
    """
    torch.manual_seed(0)
    samples = [s for s in op.sample_inputs("cpu", dtype, requires_grad=False) if numbers_in(s) < LARGE]
    return random.Random(0).sample(samples, len(samples))[:most]


def _determined(op: Any, form: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
    # An op on symmetric or triangular matrices is a function of those alone; of eigenvectors only some part is unique.
    return sample.output_process_fn_grad(op.gradcheck_wrapper(form, *args, **kwargs))


def calls_of(
    op: Any, most: int, *, layouts: bool, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[str, Any, Any, dict[str, Any], slice]]:
    """(what it is, function, args, kwargs, which of its tensors are dual) for an op's every form.

    Without ``layouts`` the samples take turns in being contiguous or not; with it each is tried both ways.
    """
    samples = samples_of(op, most, dtype)
    for name, form in forms_of(op).items():
        in_place = "inplace" in name
        for n, sample in enumerate(samples):
            takes = name.endswith(" op") or isinstance(sample.input, torch.Tensor)
            if not takes or (in_place and sample.broadcasts_input):
                continue
            for strided in (False, True) if layouts else (bool(n % 2),):
                if strided and "as_strided" in op.name:
                    continue  # it reads the memory between
                given = sample.noncontiguous() if strided else sample
                args, kwargs = (given.input, *given.args), given.kwargs
                function = form if in_place else functools.partial(_determined, op, form, sample)
                several = sum(map(is_smooth, tree_leaves((args, kwargs)))) > 1
                for which in (ALL,) if not several else (ALL, FIRST) if in_place else (ALL, FIRST, OTHERS):
                    yield f"{name}, sample {n}{', strided' * strided}", function, args, kwargs, which


@contextlib.contextmanager
def as_in_a_measurement() -> Iterator[None]:
    """No gradients and no fused attention kernel, of which torch has no forward derivative."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def refused_file() -> Path:
    """What a dual pass refuses of the tables of this minor version of torch, or of the newest before."""
    installed = tuple(int(part) for part in torch.__version__.split(".")[:2])
    files = {tuple(map(int, p.stem.split("_")[-2:])): p for p in Path(__file__).parent.glob("refused_by_torch_*.json")}
    return files[max((version for version in files if version <= installed), default=min(files))]


def reasons(verdicts: list[tuple[str, Verdict]]) -> list[str]:
    """Why some of the calls are refused, each reason once, without what torch says of the shapes."""
    return sorted({v.what.partition(" (")[0] for _, v in verdicts if v.kind == "refused"})


def passes(kind: str, name: str, verdicts: list[tuple[str, Verdict]], *, all_of_it: bool) -> None:
    """Assert that nothing is wrong or crashed, and that what is refused is on the list, with its reasons."""
    faults = [f"{call}: {v.kind}: {v.what}" for call, v in verdicts if v.kind in ("wrong", "crashed")]
    assert not faults, "\n".join(faults[:20])
    seen, known = reasons(verdicts), json.loads(refused_file().read_text())[kind].get(name, [])
    new = [reason for reason in seen if reason not in known]
    assert not new, f"mend it, or run tests/dual/refused.py and say why in the commit: {new}"
    assert not all_of_it or seen == known, f"no longer refused, run tests/dual/refused.py: {known}"
