"""The recordings of one live probe: when one is made, when it is used, and when it is let go."""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torchgeom_probe.errors import first_line
from torchgeom_probe.jacobian.replay.program import Program, captured, programs_of
from torchgeom_probe.jacobian.replay.recorder import Ran, Recorder, Refused
from torchgeom_probe.jacobian.replay.seal import Seal, readable
from torchgeom_probe.linalg.gram import Factor
from torchgeom_probe.model.inputs import Inputs
from torchgeom_probe.model.isolation import Kept, measured_state
from torchgeom_probe.shapes import Tensor

#: Recordings that a probe keeps, the newest.
_KEPT = 4

#: What a pass gives: the layers' factors, and at which samples their values are finite.
Found = tuple[dict[str, Factor], dict[str, Tensor]]


class NotReplayedError(Exception):
    """A measurement needs the model after all; it is made again, eagerly."""


@dataclass(eq=False)
class Recording:
    """One pass that can run again.

    Attributes:
        exact, program: the calls as they were made, and the faster ones that run.
        seal: when it is valid.
        factors: entry → its factor, without numbers.
        seen: the entries of ``finite``, in the order of the outputs.
        runs: how often it ran.
        trusted: the number of the last report that an eager pass agreed with.
    """

    exact: Program
    program: Program
    seal: Seal
    factors: dict[str, Factor]
    seen: list[str]
    trusted: int
    runs: int = 0

    @property
    def audit_is_due(self) -> bool:
        """Whether the next run is one of the 1st, 2nd, 4th, 8th, …."""
        return (self.runs + 1) & self.runs == 0

    def found(self, program: Program, tensors: Sequence[Tensor]) -> Found:
        """What one of the programs gives on these inputs."""
        with torch.inference_mode():
            outputs = program.run(*tensors)
        outputs = [output.clone() for output in outputs]  # tensors of inference mode are nothing to hand out
        factors = {
            entry: replace(like, **_named(like, matrix))
            for (entry, like), matrix in zip(self.factors.items(), outputs, strict=False)
        }
        return factors, dict(zip(self.seen, outputs[len(factors) :], strict=True))


@dataclass
class _Passes:
    """Eager passes of one shape, one after the other, over a model that was as it is."""

    state: Any
    count: int = 0
    refused: bool = False


@dataclass(eq=False)
class Replays:
    """The recordings of one live probe.

    Attributes:
        kept: the state of the model that the probe's measurements keep.
        report: the number of the report that is being made.
        alone: whether it is made without the model, whose code may then not run.
        why_not: why the last pass that could have been recorded was not.
    """

    kept: Kept
    report: int = 0
    alone: bool = False
    why_not: str | None = None
    _recordings: dict[Any, Recording] = field(default_factory=dict)
    _passes: dict[Any, _Passes] = field(default_factory=dict)
    _sealed: set[int] = field(default_factory=set)
    _broken: int = 0
    _ended: bool = False

    def __reduce__(self) -> Any:
        """A copy of a probe records its own."""
        return Replays, (self.kept,)

    def next_report(self) -> bool:
        """Begin the next report; whether anything is recorded."""
        self.report += 1
        self._sealed.clear()
        return bool(self._recordings)

    def pushed(
        self, inputs: Inputs, directions: Tensor, eager: Callable[[Inputs, Tensor], Found], plan: tuple[Any, ...]
    ) -> tuple[Found, bool]:
        """What a pass gives, and whether a recording gave it; ``plan``: what of the plan a pass depends on.

        Raises:
            NotReplayedError: the report is to be made without the model, and cannot.
        """
        key = _key(inputs, directions, plan)
        recording = self._recordings.get(key)
        if recording is not None and not self._holds(recording):
            self._recordings = {k: r for k, r in self._recordings.items() if r.seal is not recording.seal}
            self._broken += 1
            recording = None
        if self.alone and (recording is None or recording.audit_is_due):
            raise NotReplayedError
        if recording is None:
            return self._eagerly(key, inputs, directions, eager), False
        tensors = _tensors(inputs, directions)
        if recording.audit_is_due:
            return self._audited(recording, tensors, eager(inputs, directions))
        recording.runs += 1
        return recording.found(recording.program, tensors), True

    def _holds(self, recording: Recording) -> bool:
        if id(recording.seal) in self._sealed:
            return True
        if recording.seal.state is not self.kept.state or not recording.seal.holds():
            return False
        self._sealed.add(id(recording.seal))
        return True

    def _eagerly(self, key: Any, inputs: Inputs, directions: Tensor, eager: Callable[[Inputs, Tensor], Found]) -> Found:
        passes = self._passes.get(key)
        if passes is None or passes.state is not self.kept.state:
            refused = passes is not None and passes.refused
            passes = self._passes[key] = _Passes(self.kept.state, refused=refused)
        passes.count += 1
        watched = (
            sys.getprofile() is not None or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
        )
        # What changes from time to time is recorded seldom: after a break at the second pass, then the fourth …
        if key is None or watched or self._ended or passes.refused or passes.count < 2**self._broken:
            return eager(inputs, directions)
        tensors = [t.detach() for t in (*inputs.leaves, directions) if isinstance(t, Tensor)]
        recorded = replace(inputs, leaves=tuple(_given(inputs.leaves, tensors)))
        ran, recorder = Ran(), Recorder(tensors, readable(measured_state()))
        try:
            with _uncollected(), ran.noted(), recorder:
                found = eager(recorded, tensors[-1])
        except Exception as error:  # recording may be to blame: it holds tensors that the pass makes
            self.why_not, passes.refused = f"cannot be recorded: {first_line(error)}", True
            return eager(inputs, directions)
        try:
            self._recordings[key] = self._recording(found, recorder, ran)
        except Refused as reason:
            self.why_not, passes.refused = str(reason), True
        while len(self._recordings) > _KEPT:
            del self._recordings[next(iter(self._recordings))]
        return found

    def _recording(self, found: Found, recorder: Recorder, ran: Ran) -> Recording:
        """What a recorded pass needs to run again.

        Raises:
            Refused: it cannot be told for certain.
        """
        factors, finite = found
        if recorder.refused:
            raise Refused(recorder.refused)
        matrices = [factor.gram if factor.triangle is None else factor.triangle for factor in factors.values()]
        outputs = [recorder.node_of(matrix) for matrix in (*matrices, *finite.values()) if matrix is not None]
        seal = Seal(measured_state(), ran)
        if not seal.holds():
            raise Refused("changes what it depends on in every pass")
        programs = programs_of(recorder, outputs)
        empty = {e: replace(factor, gram=None) if factor.triangle is None else factor for e, factor in factors.items()}
        return Recording(*programs, seal, empty, list(finite), self.report)

    def _audited(self, recording: Recording, tensors: list[Tensor], eager: Found) -> tuple[Found, bool]:
        """Compare a run with an eager pass."""
        found = recording.found(recording.program, tensors)
        if not _agree(found, eager) and recording.program is not recording.exact:
            # A ReLU at zero tells rounding from rounding: then the calls that the pass itself makes.
            recording.program = recording.exact
            found = recording.found(recording.program, tensors)
        recording.runs += 1
        if _agree(found, eager):
            recording.trusted = self.report
            if recording.runs == 1:
                with torch.inference_mode():
                    recording.program = captured(recording.program, tensors)
            return found, True
        self._ended = True
        self._recordings.clear()
        since = f"reports {recording.trusted + 1} to {self.report - 1} of this probe, counted from 1, may be"
        warnings.warn(
            "a replayed pass differs from an eager one: the model depends on something that was not seen.  "
            + (f"The {since} of the model as it was before; " if self.report - 1 > recording.trusted else "")
            + "this probe replays no more.\nMeasure them again, and please report the model; "
            "GeometryProbe(model, ..., replay=False)  never replays.",
            stacklevel=2,
        )
        return eager, False


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Let no garbage be collected in the body: a callback of ``gc`` would be taken for code of the pass."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _named(like: Factor, matrix: Tensor) -> dict[str, Any]:
    return {"gram" if like.triangle is None else "triangle": matrix}


def _key(inputs: Inputs, directions: Tensor, plan: tuple[Any, ...]) -> Any:
    """What a recording takes as given of its inputs; None where that cannot be told."""
    described: list[Any] = []
    for leaf in (*inputs.leaves, directions):
        if isinstance(leaf, Tensor):
            if type(leaf) not in (Tensor, torch.nn.Parameter) or leaf.is_conj() or leaf.is_neg():
                return None
            described.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            described.append((type(leaf), repr(leaf)))  # not itself: -0.0 equals 0.0
        else:
            return None
    return plan, str(inputs.spec), tuple(described), inputs.per_sample, inputs.wrt, inputs.size == inputs.total


def _tensors(inputs: Inputs, directions: Tensor) -> list[Tensor]:
    return [t.detach() if t.requires_grad else t for t in (*inputs.leaves, directions) if isinstance(t, Tensor)]


def _given(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> Iterator[Any]:
    """The leaves with tensors of their own, each another one, in the places of those that they have."""
    fresh = iter(tensors)
    return (next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def _agree(found: Found, eager: Found) -> bool:
    for ours, theirs in zip(found[0].values(), eager[0].values(), strict=True):
        a = ours.gram if ours.triangle is None else ours.triangle
        b = theirs.gram if theirs.triangle is None else theirs.triangle
        assert a is not None
        assert b is not None
        narrow = ours.dtype is None or torch.finfo(ours.dtype).eps > 1e-12
        scale = b.abs().nan_to_num(posinf=0.0).amax() if b.numel() else 0.0
        if not torch.allclose(a, b, rtol=0.0, atol=float((1e-4 if narrow else 1e-9) * scale), equal_nan=True):
            return False
    return all(torch.equal(values, eager[1][entry]) for entry, values in found[1].items())
