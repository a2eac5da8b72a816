"""What an estimator is, what it costs, and the last step that most share: a factor becomes a LayerGeometry."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.gram import Factor
from torchgeom_probe.linalg.volume import log_volume, rank_tolerance
from torchgeom_probe.model.inputs import Inputs
from torchgeom_probe.report import LayerGeometry

#: Below this share of the largest a singular value taken from a float64 Gram matrix is rounding.
GRAM_RESOLUTION = 1e-7


@dataclass(frozen=True)
class ProductCount:
    """The products that an estimator needs of one layer, per sample, and why these.

    Attributes:
        pushes, pulls: Jv by the dual pass and Jᵀu by reverse mode; of an iteration as many as a spectrum that decays
            asks for.
        most: products at which it stops at the latest; equal to the sum where the number is fixed.
        shared: whether the pushes are those of one pass for all layers.
        at_once: tangent rows that one sample takes at once, what is kept beside them included: samples are chunked by
            it.
        why: the choice between forward and reverse mode, and between all directions and some, in words.
    """

    pushes: int
    pulls: int
    most: int
    shared: bool
    at_once: int
    why: str


def dense_count(num_features: int, num_inputs: int, *, at_once: int, why: str) -> ProductCount:
    """All of J: by rows or by columns, whichever are fewer."""
    by_rows = num_features <= num_inputs
    count = min(num_features, num_inputs)
    how = (
        f"{num_features} rows of J by reverse mode, d = {num_inputs} is more"
        if by_rows
        else f"{num_inputs} columns of J by forward mode, n = {num_features} is more"
    )
    return ProductCount(0 if by_rows else count, count if by_rows else 0, count, False, at_once, f"{why}: {how}")


class Estimator(ABC):
    """A frozen dataclass that names an estimand and computes it from the Jacobians of all layers at once.

    A new one is a file in this folder: it is found by its class's name (``estimator="topk:10"``) in every verb and on
    the command line, and what it puts into ``extras`` shows in every table and chart.  Its result's ``quantity`` is the
    name that they have for its value.

    Attributes:
        argument: the field that is meant by ``name:value``.
    """

    argument: ClassVar[str | None] = None

    @abstractmethod
    def cost(self, plan: Plan, *, engine: str = "auto") -> dict[str, ProductCount]:
        """The products that each entry needs of one sample.

        Raises:
            ProbeError: what cannot be estimated at these sizes.
        """

    @abstractmethod
    def estimate(
        self, jacobians: Jacobians, *, start: Mapping[str, LayerGeometry] | None = None
    ) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk.

        ``start``: an earlier result at the same samples, from which an estimator may start, or not.
        """

    def settled(self, inputs: Inputs) -> Estimator:
        """The estimator that a probe keeps from its first batch on, all samples of it: this one."""
        return self


def estimator_of(estimator: Estimator | str | None) -> Estimator:
    """The estimator that a user means: one, its name, or the default of every verb, :class:`Auto`."""
    if estimator is None:
        return named("auto")
    if isinstance(estimator, str):
        return named(estimator)
    if not isinstance(estimator, Estimator):
        made = f"  estimator={estimator.__name__}()" if isinstance(estimator, type) else ""
        raise ProbeError(
            f"estimator={estimator!r} is no estimator.\n"
            f"Write, for instance, estimator=Subspace(k=8), 'exact' or 'topk:10'.{made}"
        )
    return estimator


def named(text: str) -> Estimator:
    """Return the estimator that a text names: ``"exact"``, ``"topk:10"``, ``"logdet:1e-6"``, ``"subspace:k=4,seed=1"``.

    Raises:
        ProbeError: no estimator of that name, or no such argument.

    >>> named("topk:3").k, named("subspace:k=4,frames=16").frames
    (3, 16)
    """
    name, _, rest = text.partition(":")
    known = estimators()
    if name.strip().lower() not in known:
        called = re.fullmatch(r"\s*(?:\w+\.)*(\w+)\(([^,]*|(?:\w+=[^,]*,?)*)\)\s*", text)  # as Python writes it
        meant = ":".join(filter(None, called.groups())).lower() if called else "topk:10"
        try:
            named(meant)
        except (ProbeError, TypeError):
            meant = "topk:10"
        raise ProbeError(
            f"estimator={text!r} is unknown; there are {', '.join(known)}.\nWrite, for instance, estimator={meant!r}"
        )
    kind = known[name.strip().lower()]
    values: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = part.partition("=")
        values[key if equals else kind.argument or key] = _literal(value if equals else key)
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    odd = [key for key in values if key not in names]
    if odd:
        raise ProbeError(
            f"estimator={text!r}: {kind.__name__} has no argument {odd[0]!r}; it has {', '.join(names) or 'none'}.\n"
            f"Write, for instance, estimator='{name}:{names[0]}=...'"
            if names
            else f"estimator={text!r}: {kind.__name__} takes no argument.\nWrite estimator={name!r}"
        )
    return kind(**values)


def estimators() -> dict[str, type[Estimator]]:
    """Name → class of every estimator in this folder that a text can make."""
    package = importlib.import_module("torchgeom_probe.estimators")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    found = {
        kind.__name__.lower(): kind
        for kind in Estimator.__subclasses__()
        if kind.__module__.startswith(package.__name__)
    }
    return {name: found[name] for name in sorted(found) if name != "along"}  # whose argument is a tensor


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def conventions(jacobians: Jacobians, entry: str, engine: str) -> dict[str, Any]:
    """The fields of a LayerGeometry that every estimator fills in the same way."""
    return {
        "name": entry,
        "engine": engine,
        "num_features": jacobians.plan.features[entry],
        "num_inputs": jacobians.plan.num_inputs,
        "input_shape": jacobians.plan.space,
        "normalized": jacobians.normalize,
    }


def from_singular_values(
    jacobians: Jacobians,
    entry: str,
    sigma: torch.Tensor,
    *,
    engine: str,
    num_directions: int,
    tolerance: float,
    full_rank: int | None = None,
    **others: Any,
) -> LayerGeometry:
    """The log-volume, the rank and what else a layer's result holds; of fewer than ``full_rank`` values it is −∞."""
    rank_wanted = num_directions if full_rank is None else full_rank
    volume, rank, pseudo = log_volume(sigma, num_directions=rank_wanted, tolerance=tolerance)
    return LayerGeometry(
        **conventions(jacobians, entry, engine),
        quantity="log_volume",
        value=volume,
        singular_values=sigma,
        rank=rank,
        log_pseudo_volume=pseudo,
        num_directions=num_directions,
        rank_tolerance=tolerance,
        **others,
    )


def resolution(dtype: torch.dtype, factor: Factor) -> float:
    """Below this share of the largest a singular value of the factor, of tangents of that dtype, is rounding."""
    own = rank_tolerance(factor.dtype or dtype)
    return own if factor.gram is None else max(own, GRAM_RESOLUTION)  # float64 tangents that did not fit into memory


def refuse_more_than_there_are(estimator: str, k: int, features: Mapping[str, int], d: int) -> None:
    """Refuse k singular values of layers of which one has an n x d Jacobian with fewer."""
    entry, n = min(features.items(), key=lambda item: item[1], default=("", d))
    if k > min(n, d):
        fewest = ", the fewest of these layers" if len(features) > 1 else ""
        raise ProbeError(
            f"{estimator}(k={k}): the Jacobian of layer {entry!r} is {n} x {d} and has {min(n, d)} singular values"
            f"{fewest}.\n"
            f"Write {estimator}(k={min(n, d)}) or fewer, or take them all:  estimator=Exact()"
        )


def counted(like: torch.Tensor, products: int) -> torch.Tensor:
    """[B], the same number of products for every sample."""
    return torch.full((len(like),), products, dtype=torch.long, device=like.device)
