"""The k largest singular values: the effective volume element of the paper's figures on images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.estimators.base import (
    Estimator,
    ProductCount,
    counted,
    dense_count,
    from_singular_values,
    refuse_more_than_there_are,
    resolution,
)
from torchgeom_probe.jacobian.jacobians import Jacobians
from torchgeom_probe.jacobian.layer import LayerJacobian, layer_jacobians, pushed_together
from torchgeom_probe.jacobian.plan import Plan
from torchgeom_probe.linalg.krylov import leading, random_block
from torchgeom_probe.linalg.stopping import Before
from torchgeom_probe.linalg.volume import rank_tolerance
from torchgeom_probe.report import LayerGeometry
from torchgeom_probe.shapes import Float, Tensor


@dataclass(frozen=True)
class TopK(Estimator):
    """Σ log σ_i over the k largest singular values of J: the effective volume element, without forming J.

    Definition: Σ_{i≤k} log σ_i(J), in nats (J/√n when normalised; ``log10_volume`` is the ψ_k of the paper): the volume
    magnification of the k-plane that is magnified most.  With k = min(n, d) it is the log-volume of :class:`Exact`.

    How: block Golub-Kahan with full reorthogonalisation, a Krylov space for each layer and sample.  Every Ritz value is
    a LOWER bound of its singular value, so a volume that has not converged is too small, never too large.  A sample
    stops, and costs nothing from then on, when ``error_bound`` [B] on the error of ``log_volume`` is within ``tol``
    (``converged`` = 1) or the next half-step would go beyond ``max_products`` (0).  The bound is finite at any moment:
    what the last steps gained says what may be ahead, and small residuals say it better.  It is no theorem:
    its constants were calibrated.  On spectra of tests/linalg/test_stopping.py with seeds that they were not fitted to,
    k = 1, 3, 10, tol = 1e-3, 0.02, 0.1 and budgets of 24, 48, 96 products, no bound was below the error in 10800 cold
    runs (all but "groups of eight") nor, at k = 10, in 3584 warm ones (of J unchanged, with noise, and with one new
    direction; but for that and "thirty nearly alike").

    Neither sees further copies of a multiple singular value, of which a block of b vectors meets b.  So where ``block``
    values agree to 1e-3 (or agree ten times better than with the next one), what hidden copies could add is part of the
    bound; where that is too much, the sample starts again from k + 2 vectors.  Nor do gains tell of a value whose
    vector has a small part in the start: what such a one could add, but for one start in a thousand, is counted too;
    and residuals count where those of eight values at least are small, and no value has gained more since.

    A push ends with its layer, a pull begins there; the first push is one for all layers.  From an earlier report
    (``start=``; a monitor hands its last one) the random start is pushed first, as then: how far its products have
    changed bounds the change of J.  Where that is nothing, the old singular vectors are pushed, and that is all.  Where
    it is that of a few new directions, of which the old vectors know nothing, or where these have lost much, or a cold
    start is cheap, the sample starts cold, at no more than ``block`` products lost; else all go on as one block.  No
    warm start is made for k < 2 · ``block``, nor where the k values are within a per cent of each other.

    Where the dense Jacobian is about as cheap (n or d below some 16 k), or no convergence comes at its price, J is
    formed and decomposed instead; ``estimand`` then says "dense".

    Bias: downward, within ``error_bound``; variance: none for a given ``seed`` (the start block, the same for all
    samples and layers).  Cost: ``num_products`` [B] products per sample and layer, half of them Jv and half Jᵀu: 50 to
    100 at k = 10, n = 512, d = 3072, against 512 for the whole Jacobian; at a ResNet's unpooled
    stages 80 (the last) to 180 (the first) for ``tol=0.1``; 16 at unchanged weights.

    The paper's conventions (Zavatone-Veth et al., arXiv:2301.11375): J/√n, log10, k = 10 or all 512, the stages of a
    ResNet average-pooled to 512 features.  :func:`paper_pool` is the pooling, for ``transform=``.  Their code sets
    every log10 σ below a threshold (−8 by default) to zero, which RAISES the sum; here nothing is dropped: a value that
    is zero to rounding makes the volume −inf, with ``rank`` < k and the product of the others in
    ``log_pseudo_volume``.

    Args:
        k: how many singular values.
        tol: in nats, on the sum of the k logarithms.
        block: vectors a round, at least 4 (with fewer the stopping rule misfires); by default 4, and 8 on an
            accelerator.
        seed: of the start block.
        max_products: per sample and layer; by default the price of the dense Jacobian, which is then formed.  With a
            number, what has not converged by then is reported with the bound that it has; k values are found in any
            case.  A monitor with ``max_overhead=`` sets it to what the run has earned.
        method: ``"auto"``, or ``"krylov"`` or ``"dense"`` to insist.

    Raises:
        ProbeError: k < 1 or k > min(n, d); block < 4; tol ≤ 0; an op without a forward or a reverse derivative.

    >>> import torch, torchgeom_probe as tgp
    >>> model = torch.nn.Linear(300, 250, bias=False)
    >>> probe = tgp.GeometryProbe(model, layers="", estimator=tgp.TopK(k=3, tol=1e-4), normalize=False)
    >>> effective = probe.measure(torch.randn(2, 300))[""]
    >>> sigma = torch.linalg.svdvals(model.weight.double())[:3]
    >>> bool((effective.log_volume - sigma.log().sum()).abs().max() <= effective.error_bound.max() < 3e-3)
    True
    """

    k: int = 10
    tol: float = 0.02
    block: int | None = None
    seed: int = 0
    max_products: int | None = None
    method: Literal["auto", "krylov", "dense"] = "auto"
    argument: ClassVar[str] = "k"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ProbeError(f"TopK(k={self.k}): at least one singular value is needed.\nWrite TopK(k=10)")
        if self.block is not None and self.block < 4:
            raise ProbeError(
                f"TopK(block={self.block}): with fewer than 4 vectors a round the stopping rule misses clustered "
                "singular values.\n"
                "Write block=4 or more, or leave it out."
            )
        if not self.tol > 0:
            raise ProbeError(
                f"TopK(tol={self.tol}): the tolerance, in nats on Σ log σ_i, is a positive number.\nWrite tol=0.02"
            )
        if self.max_products is not None and self.max_products < 1:
            raise ProbeError(
                f"TopK(max_products={self.max_products}): at least one product is needed.\n"
                "Leave it out, or write max_products=200"
            )
        if self.method not in ("auto", "krylov", "dense"):
            raise ProbeError(f"TopK(method={self.method!r}) is unknown.\nWrite 'auto', 'krylov' or 'dense'.")

    def cost(self, plan: Plan, *, engine: str = "auto") -> dict[str, ProductCount]:
        """Per layer: 4 k + 40 products where the spectrum decays, and the most that there can be; or the dense J.

        A pass ends at its layer: a product of an early one takes a part of the time that is said for it.
        """
        # A block, the graph that is saved for reverse mode, and the Krylov vectors.
        expected = min(8 * self.k + 16, plan.num_inputs)
        krylov_bytes = 3 * 8 * expected * (plan.num_inputs + max(plan.features.values()))
        rows = self._block("cpu") + 48 + int(krylov_bytes / max(plan.row_bytes, 1) / 2)
        found = {}
        refuse_more_than_there_are("TopK", self.k, plan.features, plan.num_inputs)
        for entry, n in plan.features.items():
            smaller = min(n, plan.num_inputs)
            if self._dense_at_once(smaller):
                why = "the whole J is about as cheap as an iteration"
                found[entry] = dense_count(n, plan.num_inputs, at_once=rows, why=why)
            else:
                block = min(self._block("cuda"), smaller)
                # In any case k values are found: of one push more than there are pulls.
                most = max(self._most_products(smaller, block), (2 * -(-self.k // block) - 1) * block)
                half = min(4 * self.k + 40, most) // 2
                after = f", then the dense J: {smaller} more" if self._may_go_dense else ""
                why = f"block Krylov, Jv and Jᵀu in turn, some {2 * half} products and at the most {most}{after}"
                found[entry] = ProductCount(half, half, most + (smaller if after else 0), False, rows, why)
        return found

    @property
    def _may_go_dense(self) -> bool:
        return self.method == "auto" and self.max_products is None

    def _dense_at_once(self, smaller: int) -> bool:
        return self.method == "dense" or (self.method == "auto" and smaller <= 2 * (8 * self.k + 16))

    def _most_products(self, smaller: int, block: int) -> int:
        if self.max_products is not None:
            return self.max_products
        return smaller if self.method == "auto" else 4 * smaller + 4 * block

    def estimate(
        self, jacobians: Jacobians, *, start: Mapping[str, LayerGeometry] | None = None
    ) -> dict[str, LayerGeometry]:
        """Measure every layer at the samples of one chunk; from what ``start`` found there, where it is of use."""
        block = self._block(jacobians.device.type)
        warm = {e: b for e, g in (start or {}).items() if (b := self._before(g, jacobians.device)) is not None}
        with layer_jacobians(jacobians, estimator=f"TopK(k={self.k})", at_once=block) as maps:
            expanded = [m for m in maps.values() if not self._dense_at_once(min(m.num_features, m.num_inputs))]
            random = random_block(next(iter(maps.values())), block, torch.Generator().manual_seed(self.seed))
            images = pushed_together(jacobians, maps, random) if len(expanded) > 1 else {}
            return {e: self._layer(jacobians, m, random, images.get(e), warm.get(e)) for e, m in maps.items()}

    def _before(self, earlier: LayerGeometry, device: torch.device) -> Before | None:
        """What an earlier result says, where it is one of these k values with their vectors."""
        parts = (earlier.error_bound, earlier.right_singular_vectors, earlier.extras.get("cold_products"))
        found = (earlier.singular_values, *parts, earlier.sketch)
        known = [part.to(device, torch.float64) for part in found if part is not None]
        if len(known) < len(found) or earlier.num_directions != self.k:
            return None
        values, bound, vectors, cold, sketch = known
        of_these_vectors = (values[:, -1] > 0) & (cold > 0)  # and not of the dense J, where the iteration did not end
        return Before(values, torch.where(of_these_vectors, bound, torch.inf), vectors, cold, sketch)

    def _layer(
        self, jacobians: Jacobians, jacobian: LayerJacobian, random: Tensor, image: Tensor | None, before: Before | None
    ) -> LayerGeometry:
        smaller = min(jacobian.num_features, jacobian.num_inputs)
        others: dict[str, Any] = {}
        if self._dense_at_once(smaller):
            how, (sigma, bound, tolerance) = "dense", self._dense(jacobian)
            products = cold = counted(bound, smaller)
        else:
            how, tolerance = "block Krylov", rank_tolerance(jacobian.dtype)
            block = min(random.shape[1], smaller)
            found = leading(
                jacobian,
                random[:, :block],
                k=self.k,
                block=block,
                tolerance=self.tol,
                max_products=self._most_products(smaller, block),
                generator=torch.Generator().manual_seed(self.seed + 1),
                image=None if image is None else image[:, :block],
                before=before,
            )
            sigma, bound, products = found.values, found.bound, found.products
            others = {"right_singular_vectors": found.vectors, "sketch": found.sketch}
            cold = products
            if before is not None:  # a cheap warm start must not make the next one look dear
                cold = torch.maximum(products, before.cold_products.long())
            ended = found.converged | sigma.isnan().any(1)
            if self._may_go_dense and not bool(ended.all()):
                how = "block Krylov, dense where that did not converge"
                exact, exact_bound, tolerance = self._dense(jacobian)
                sigma, bound = torch.where(ended[:, None], sigma, exact), torch.where(ended, bound, exact_bound)
                products, cold = torch.where(ended, products, jacobian.products), torch.where(ended, cold, 0)
        return from_singular_values(
            jacobians,
            jacobian.entry,
            sigma,
            estimand=f"Σ log σ_i over the {self.k} largest singular values of J (effective volume; {how})",
            engine=jacobian.engine,
            num_directions=self.k,
            tolerance=tolerance,
            error_bound=bound,
            extras={"num_products": products, "cold_products": cold, "converged": (bound <= self.tol).double()},
            **others,
        )

    def _dense(self, jacobian: LayerJacobian) -> tuple[Tensor, Tensor, float]:
        """The values of the dense J, their bound, and what of the largest is rounding."""
        factor = jacobian.dense()
        tolerance = resolution(jacobian.dtype, factor)
        values = factor.singular_values()[:, : self.k]
        # Rounding of the products, and of the Gram matrix that they are reduced to.
        relative = values[:, :1] / values.clamp_min(1e-300)
        rounding = 8 * jacobian.eps * relative + 1e-15 * relative.square()
        return values, torch.where(values > tolerance * values[:, :1], rounding, 0.0).sum(1), tolerance

    def _block(self, device: str) -> int:
        return self.block if self.block is not None else 4 if device == "cpu" else 8


def paper_pool(output: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels h w"]:
    """Average-pool a stage's output [B, C, H, W] to 512 features, as the paper does; for ``transform=``.

    [64, 32, 32] → [64, 2, 4], [128, 16, 16] → [128, 2, 2], [256, 8, 8] → [256, 1, 2], [512, 4, 4] → [512, 1,
    1]: the windows (16, 8), 8, (8, 4) and 4 of the authors' ``get_intermeidate_feature_maps``.

    Raises:
        ProbeError: not [B, C, H, W], or C does not divide 512, or H or W are too small.

    >>> paper_pool(torch.ones(3, 64, 32, 32)).shape
    torch.Size([3, 64, 2, 4])
    """
    channels = output.shape[1] if output.ndim == 4 else 0
    cells = 512 // channels if channels and 512 % channels == 0 else 0
    height = 2 ** (int(math.log2(cells or 1)) // 2)
    width = cells // height
    if not cells or output.shape[2] % height or output.shape[3] % width:
        raise ProbeError(
            "paper_pool makes 512 features of a stage's output [B, C, H, W]: C divides 512, and 512/C cells, square "
            f"or twice as wide as high, divide H and W; got {tuple(output.shape)}.\n"
            "Pool by hand:  transform=lambda out: torch.nn.functional.adaptive_avg_pool2d(out, (2, 2))"
        )
    return functional.avg_pool2d(output, (output.shape[2] // height, output.shape[3] // width))
