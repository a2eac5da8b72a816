"""The directions of input space that a layer feels most, or least: right singular vectors of J, and how sure they are.

Legend of axes: B samples, q vectors, D inputs, N features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators.base import (
    Estimator,
    ProductCount,
    counted,
    dense_count,
    from_singular_values,
    refuse_more_than_there_are,
)
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.layer import LayerJacobian, layer_jacobians
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.krylov import SPARE, leading, random_block
from torchgeom_probe.linalg.operator import Operator
from torchgeom_probe.linalg.volume import rank_tolerance
from torchgeom_probe.report import LayerGeometry
from torchgeom_probe.shapes import Float, Tensor

#: Up to so many rows or columns J is formed: the iteration would take about as many products.
_DENSE = 256
#: The rounding of a deep network's J in units of eps · σ_1 (as in linalg/volume.py).
_ROUNDING = 16
#: Values closer than so many roundings have no vectors of their own, but a space together.
_TOGETHER = 64
_BLOCK = 4


@dataclass(frozen=True)
class Directions(Estimator):
    """The k unit directions that a layer stretches most; or with ``smallest`` least: eigendistortions.

    Definition: the right singular vectors v_i of J with the k largest (smallest) σ_i, the eigenvectors of g = JᵀJ, as
    ``report[layer].directions()``, [k, B, *x.shape[1:]]; ``singular_values`` has their σ_i, in the same order, and
    ``value`` is Σ log σ_i, in nats.  ``direction_error`` [B, k] bounds the sine of the angle between v_i and the true
    vector; where values coincide to rounding, between v_i and the space of the true vectors of those values.  It
    holds the residual JᵀJv − σ²v and the rounding of the products (16 eps · σ_1), each over the gap (Davis and Kahan,
    Wedin); 1 says nothing.

    Source: of the smallest and the largest as distortions to look at, Berardino, Ballé, Laparra, Simoncelli,
    "Eigen-distortions of hierarchical representations", 2017.

    Cost: block Krylov and 2 (k + 3) products more; where J has at most 256 rows or columns, and for the smallest, all
    of J.

    Args:
        k: how many.
        smallest: those that are felt least, smallest first; only where n ≥ d: else J has a kernel.
        tol: of the iteration, in nats on Σ log σ; the angles are about its root.
        max_products: per sample and layer, at which the iteration stops.  Where it has not converged by then, since the
            values lie so close together, ``direction_error`` is 1.
        seed: of the first block.

    Raises:
        ProbeError: k < 1, or more than J has; ``smallest`` where n < d.

    >>> import torch, torchgeom_probe as tgp
    >>> stretch = torch.nn.Linear(3, 3, bias=False)
    >>> _ = stretch.weight.data.copy_(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    >>> most = tgp.measure(stretch, torch.zeros(5, 3), layers="", estimator=tgp.Directions(k=2))[""]
    >>> most.directions()[:, 0].round().tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """

    k: int = 4
    smallest: bool = False
    tol: float = 1e-5
    max_products: int = 500
    seed: int = 0
    argument: ClassVar[str] = "k"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ProbeError(f"Directions(k={self.k}): at least one direction is needed.\nWrite Directions(k=4)")
        if self.max_products < 1:
            raise ProbeError(
                f"Directions(max_products={self.max_products}): at least one product is needed.\n"
                "Leave it out, or write max_products=500"
            )

    def cost(self, plan: Plan, *, engine: str = "auto") -> dict[str, ProductCount]:
        """All of J where it is small or the smallest are asked for; else Jv and Jᵀu in turn."""
        d, found = plan.num_inputs, {}
        for entry, n in plan.features.items():
            if self.smallest and n < d:
                raise ProbeError(
                    f"Directions(smallest=True): layer {entry!r} has n = {n} features and d = {d} inputs, so it does "
                    f"not feel {d - n} directions at all, and none of them is the least.\n"
                    f"Measure a layer with n ≥ d; or the largest:  estimator=Directions(k={self.k})"
                )
        refuse_more_than_there_are("Directions", self.k, plan.features, d)
        for entry, n in plan.features.items():
            if self._dense(n, d):
                plan.refuse_too_long(entry, max(n, d), min(n, d))
                found[entry] = dense_count(n, d, at_once=d, why="the vectors are those of all of J")
            else:
                half, most = 4 * self.k + 16, self._most_products(n, d) + 2 * (self.k + 1 + SPARE)
                found[entry] = ProductCount(half, half, most, False, 8 * _BLOCK + 4 * self.k, "block Krylov")
        return found

    def estimate(
        self, jacobians: Jacobians, *, start: Mapping[str, LayerGeometry] | None = None
    ) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk; an earlier result is of no use to it."""
        with layer_jacobians(jacobians, estimator=f"Directions(k={self.k})", at_once=_BLOCK) as maps:
            return {entry: self._layer(jacobians, jacobian) for entry, jacobian in maps.items()}

    def _dense(self, n: int, d: int) -> bool:
        return self.smallest or min(n, d) <= max(_DENSE, 2 * self.k)

    def _most_products(self, n: int, d: int) -> int:
        return max(min(2 * min(n, d), self.max_products), 2 * self.k + 2 * _BLOCK)

    def _layer(self, jacobians: Jacobians, jacobian: LayerJacobian) -> LayerGeometry:
        n, d = jacobian.num_features, jacobian.num_inputs
        if self._dense(n, d):
            values, vectors, error = _of_all(jacobian, self.k, smallest=self.smallest)
        else:
            most = self._most_products(n, d)
            values, vectors, error = _of_products(jacobian, self.k, tol=self.tol, most=most, seed=self.seed)
        return from_singular_values(
            jacobians,
            jacobian.entry,
            values,
            estimand=f"Σ log σ_i over the {self.k} {'smallest' if self.smallest else 'largest'} singular values of J",
            engine=jacobian.engine,
            num_directions=self.k,
            tolerance=rank_tolerance(jacobian.dtype),
            extras={"direction_error": error, "num_products": counted(values, jacobian.products)},
            right_singular_vectors=vectors,
        )


def _of_all(jacobian: Operator, k: int, *, smallest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values [B, k], vectors [B, k, D] and errors [B, k] from J itself."""
    n, d = jacobian.num_features, jacobian.num_inputs
    eye = torch.eye(min(n, d), dtype=torch.float64, device=jacobian.device).expand(jacobian.batch, -1, -1)
    matrix = jacobian.pull(eye) if n <= d else jacobian.push(eye).mT
    finite = matrix.isfinite().all(-1).all(-1)[:, None]
    _, values, vectors = torch.linalg.svd(torch.nan_to_num(matrix), full_matrices=False)
    # Beyond the last value: the kernel, where n < d; nothing, else.
    below = torch.zeros_like(values[:, :1]) if n < d else values.new_full((len(values), 1), -torch.inf)
    errors = angles(values, values.new_zeros(values.shape), jacobian.eps, below=below[:, 0])
    if smallest:
        values, vectors, errors = values.flip(1), vectors.flip(1), errors.flip(1)
    kept = [torch.where(finite, t[:, :k], torch.nan) for t in (values, errors)]
    return kept[0], torch.where(finite[:, :, None], vectors[:, :k], torch.nan), kept[1]


def _of_products(jacobian: Operator, k: int, *, tol: float, most: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same from Jv and Jᵀu: one value more than asked, whose place the last gap needs."""
    generator = torch.Generator().manual_seed(seed)
    options = {"block": _BLOCK, "tolerance": tol, "max_products": most, "generator": generator}
    found = leading(jacobian, random_block(jacobian, _BLOCK, generator), k=k + 1, **options)  # type: ignore[arg-type]
    # Within what was found, the best there are: the singular vectors of J V.
    image = jacobian.push(found.vectors)
    finite = image.isfinite().all(-1).all(-1)[:, None]
    left, values, rotation = torch.linalg.svd(torch.nan_to_num(image).mT, full_matrices=False)
    vectors = rotation @ torch.nan_to_num(found.vectors)
    residuals = (jacobian.pull(left.mT) * values[:, :, None] - values[:, :, None].square() * vectors).norm(dim=2)
    # What was not found lies below the k + 1st value, but for its own residual.
    last = (values[:, k].square() + residuals[:, k]).sqrt()
    errors = angles(values[:, :k], residuals[:, :k], jacobian.eps, below=last)
    known = finite & found.converged[:, None]  # otherwise values may have been missed, and an angle says nothing
    return (
        torch.where(finite, values[:, :k], torch.nan),
        torch.where(finite[:, :, None], vectors[:, :k], torch.nan),
        torch.where(known, errors, 1.0),
    )


def angles(
    values: Float[Tensor, "B q"], residuals: Float[Tensor, "B q"], eps: float, *, below: Float[Tensor, " B"]
) -> Float[Tensor, "B q"]:
    """Bound the sine of each vector's angle with the true one, or with the space of those of the same value.

    ``values`` descend; ``residuals`` are |JᵀJv − σ²v|; ``below`` is the next value, or -inf where there is none.

    >>> values, below = torch.tensor([[3.0, 1.0, 1.0]]).double(), torch.zeros(1).double()
    >>> angles(values, torch.zeros_like(values), 1e-7, below=below).lt(2e-5).tolist()
    [[True, True, True]]
    """
    rounding = _ROUNDING * eps * values[:, :1]
    ends = torch.cat([values.new_full((len(values), 1), torch.inf), values, below[:, None]], dim=1)
    apart = ends[:, :-1] - ends[:, 1:] > _TOGETHER * rounding  # [B, q + 1]: a gap above each value, and below the last
    count = values.shape[1]
    above, under = ends[:, :-2].clone(), ends[:, 2:].clone()
    for i in range(1, count):
        above[:, i] = torch.where(apart[:, i], ends[:, i], above[:, i - 1])
    for i in range(count - 2, -1, -1):
        under[:, i] = torch.where(apart[:, i + 1], ends[:, i + 2], under[:, i + 1])
    lowest = under.clamp_min(0)
    gap = torch.minimum(above - values, torch.where(under == -torch.inf, torch.inf, values - under))
    squares = torch.minimum(above.square() - values.square(), values.square() - lowest.square())
    squares = torch.where(under == -torch.inf, above.square() - values.square(), squares)
    spread = math.sqrt(count) if count > 1 else 1.0  # of a space of several, each has a share
    bound = residuals / squares.clamp_min(1e-300) + math.sqrt(2) * rounding / gap.clamp_min(1e-300)
    return (spread * bound).clamp_max(1.0)
