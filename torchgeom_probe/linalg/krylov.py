"""The k leading singular values of J, with a bound on their error, from products Jv and Jᵀu alone: block Golub-Kahan.

**What grows.**  For every sample two sets of orthonormal vectors: V of inputs and U of features (columns in these
formulas, rows in the code), a block at a time, in half-steps:
    push   J F for the newest block F of V.  What lies outside of U joins U as G:  J V = U C,  C = Uᵀ J V.
    pull   Jᵀ G for the newest block G of U.  What lies outside of V is the next F:  Jᵀ U = V Cᵀ + F Tᵀ.
From a random start V is the block Krylov space of g = JᵀJ; from the singular vectors of an earlier measurement it grows
where those fail.  All that is known of J is one small matrix M: C after a push, [C T] after a pull.

**What is read off.**  The singular values S_i of M, M = P S Qᵀ.  Each is at most σ_i, and only rises as the spaces
grow.  The next half-step gives the residuals of their pairs, for only the newest block can miss anything: a pull those
of C's pairs, F Tᵀ times the last entries of P_i; a push those of [C T]'s, G times the new corner of C times the last
entries of Q_i.

**When it ends,** and how far off the values may be then: see :mod:`torchgeom_probe.linalg.stopping`.

Legend of axes: B samples, b the block, m the vectors so far, k the values wanted, D inputs, N features, X either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from torchgeom_probe.linalg.operator import Operator
from torchgeom_probe.linalg.orthonormal import orthonormal
from torchgeom_probe.linalg.stopping import Before, Verdict, sketched
from torchgeom_probe.shapes import Bool, Float, Int, Tensor

#: Vectors beyond the k wanted that a warm start keeps.
SPARE = 2


@dataclass(frozen=True, eq=False)
class Leading:
    """The k leading singular values of every sample, and how far off they may be.

    Attributes:
        values: [B, k] float64, descending; lower bounds of the true ones.
        bound: [B] on the sum of the errors of their logarithms, in nats.
        converged: [B], whether the bound is within the tolerance.
        products: [B], Jv and Jᵀu together.
        vectors: [B, q, D], right singular vectors, k and two spare ones; zero where there are no more.
        left: [B, q, N], the left ones.
        sketch: [B, b, s], J of the start in short, for a later warm start.
    """

    values: Float[Tensor, "B k"]
    bound: Float[Tensor, " B"]
    converged: Bool[Tensor, " B"]
    products: Int[Tensor, " B"]
    vectors: Float[Tensor, "B q D"]
    left: Float[Tensor, "B q N"]
    sketch: Float[Tensor, "B b s"]

    @staticmethod
    def empty(jacobian: Operator, k: int, sketch: Float[Tensor, "B b s"]) -> Leading:
        """Of every sample nothing."""
        count, device = jacobian.batch, jacobian.device
        values = torch.zeros(count, k, dtype=torch.float64, device=device)
        return Leading(
            values=values,
            bound=torch.full_like(values[:, 0], torch.inf),
            converged=torch.zeros(count, dtype=torch.bool, device=device),
            products=torch.zeros(count, dtype=torch.long, device=device),
            vectors=values.new_zeros(count, k + SPARE, jacobian.num_inputs),
            left=values.new_zeros(count, k + SPARE, jacobian.num_features),
            sketch=sketch,
        )


def leading(
    jacobian: Operator,
    start: Float[Tensor, "B b D"],
    *,
    k: int,
    block: int,
    tolerance: float,
    max_products: float,
    generator: torch.Generator,
    image: Float[Tensor, "B b N"] | None = None,
    before: Before | None = None,
) -> Leading:
    """Expand until every sample's bound is within the tolerance, or the next half-step would exceed ``max_products``.

    A sample's result is that of its own last half-step, whatever its neighbours need; from then on it costs nothing.
    At least k values are found, whatever ``max_products`` is.  Bias: downward, within ``bound``.

    Args:
        jacobian: J, by its products.
        start: the first block, orthonormal float64 rows; random.
        k: how many values.
        block: vectors a round, at least 4: with fewer a value may be missed.
        tolerance: in nats, on Σ log σ_i.
        max_products: per sample.
        generator: of the random directions that fill up a block.
        image: J of the start, where it is known.
        before: what was found of a J close by, from the same start; where the start's products or ``block`` more say
            that it is of no use, the sample starts anew.

    >>> from torchgeom_probe.linalg.operator import MatrixOperator
    >>> J = MatrixOperator(torch.diag(torch.arange(60.0, 0.0, -1.0).double())[None])
    >>> generator = torch.Generator().manual_seed(0)
    >>> options = {"block": 4, "tolerance": 1e-3, "max_products": 240, "generator": generator}
    >>> found = leading(J, random_block(J, 4, generator), k=2, **options)
    >>> error = torch.tensor([60.0, 59.0]).double().log().sum() - found.values.log().sum()
    >>> bool(found.converged), bool(0 <= error <= found.bound < 1e-3)
    (True, True)
    """
    image = jacobian.push(start) if image is None else image
    found = Leading.empty(jacobian, k, sketched(image))
    options: Any = {"k": k, "tolerance": tolerance, "max_products": max_products, "generator": generator}
    cold: list[int] = list(range(jacobian.batch))
    refused: list[int] = []
    if before is not None and before.sketch.shape == found.sketch.shape and k >= 2 * block:
        if max_products >= 2 * (before.vectors.shape[1] + block):
            cold, refused = _warm(jacobian, found, start, image, before, **options)
    if cold:
        options["max_products"] = max_products - (block if refused else 0)
        crowded, spent = _expanded(jacobian, found, start[cold], cold, image[cold], **options)
        larger = min(max(2 * block, k + 2), jacobian.num_features, jacobian.num_inputs)
        if crowded and spent + 4 * larger <= options["max_products"]:
            start = random_block(jacobian, larger, generator)[crowded]
            _expanded(jacobian, found, start, crowded, None, spent=spent, **options)
        found.products[refused] += block
    return found


def _warm(
    jacobian: Operator, found: Leading, start: Tensor, image: Tensor, before: Before, **options: Any
) -> tuple[list[int], list[int]]:
    """Expand the random start and the old vectors together where these are of use.

    Returns the other samples, and those among them for which old vectors were pushed in vain.
    """
    everyone, block = list(range(jacobian.batch)), start.shape[1]
    unseen, few = before.change(found.sketch)
    # Of a few new directions the old vectors know nothing, and a random block learns of them in a cold start's time.
    hopeful = (before.apart & (~few | (unseen + before.bound <= options["tolerance"]))).tolist()
    asked = [i for i in everyone if hopeful[i]]
    if not asked:
        return everyone, []
    old, rows = before.vectors[asked], start[asked]
    rows = torch.cat([rows, orthonormal(old[:, :block], rows, eps=1e-9)], 1)
    image = torch.cat([image[asked], jacobian.push(rows[:, block:], at=asked)], 1)
    helps = before.at(asked).helps(old[:, :block] @ rows.mT @ image).tolist()  # they lie in the span of the rows
    use = [i for i in range(len(asked)) if helps[i]]
    warm = [asked[i] for i in use]
    if warm:
        rows = torch.cat([rows[use], orthonormal(old[use, block:], rows[use], eps=1e-9)], 1)
        image = torch.cat([image[use], jacobian.push(rows[:, 2 * block :], at=warm)], 1)
        _expanded(jacobian, found, rows, warm, image, before=before.at(warm), unseen=unseen[warm], **options)
    return [i for i in everyone if i not in warm], [i for i in asked if i not in warm]


def random_block(jacobian: Operator, block: int, generator: torch.Generator) -> Float[Tensor, "B b D"]:
    """Orthonormal random rows to start from, the same at every sample (an expanded view)."""
    # A column each, two at least, or they were x itself where x is torch.randn of the same seed.
    columns = torch.randn(jacobian.num_inputs, max(2, block), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(columns[:, :block]).Q.T.to(jacobian.device).expand(jacobian.batch, -1, -1)


def _expanded(
    jacobian: Operator,
    found: Leading,
    start: Float[Tensor, "S b D"],
    at: list[int],
    image: Float[Tensor, "S b N"] | None,
    *,
    k: int,
    tolerance: float,
    max_products: float,
    generator: torch.Generator,
    spent: int = 0,
    before: Before | None = None,
    unseen: Float[Tensor, " S"] | None = None,
) -> tuple[list[int], int]:
    """Fill in what is found at some samples; return those that need a larger block, and the products so far.

    The host waits once a half-step, to know which samples are done.
    """
    space = _Space(jacobian, start, at, generator)
    block = start.shape[1] if before is None else min(4, start.shape[1])
    verdict = Verdict(
        k=k,
        block=block,
        tolerance=tolerance,
        eps=jacobian.eps,
        like=space.matrix,
        inputs=jacobian.num_inputs,
        before=before,
        unseen=unseen,
    )
    crowded: list[int] = []
    while True:
        space.half_step(image)
        image, spent = None, spent + start.shape[1]
        done = verdict.judge(
            space.values, *space.before, weights_Sc=space.weights, complete=space.complete, exhausted=space.exhausted
        )
        done = done | ~space.finite
        if spent + start.shape[1] > max_products and space.values.shape[1] >= min(k, space.full):
            done = torch.ones_like(done)
        ended = done.tolist()
        if any(ended):
            for i, sample in enumerate(space.at):
                if ended[i]:
                    values, vectors, left = space.best(i, k)
                    found.values[sample, : len(values)] = values
                    found.vectors[sample, : len(vectors)], found.left[sample, : len(left)] = vectors, left
                    found.bound[sample], found.converged[sample] = verdict.bound[i], verdict.met[i]
                    found.products[sample] = spent
                    if verdict.crowded[i]:
                        crowded.append(sample)
            if all(ended):
                return sorted(crowded), spent
            kept = [i for i, end in enumerate(ended) if not end]
            space.keep(kept)
            verdict.keep(kept)


class _Rows:
    """Orthonormal rows [S, m, X] that grow, in the precision of the products: float64 only where those are."""

    def __init__(self, like: Tensor, length: int, dtype: torch.dtype) -> None:
        self._all = torch.empty(len(like), 0, length, dtype=dtype, device=like.device)
        self.newest = torch.empty(len(like), 0, length, dtype=torch.float64, device=like.device)
        self.count = 0

    @property
    def rows(self) -> Tensor:
        """All of them, in the order in which they came."""
        return self._all[:, : self.count]

    def split(self, block_SbX: Tensor) -> tuple[Tensor, Tensor]:
        """What of a block lies along the rows, [S, b, m], and what lies outside of them.

        A product of the newest rows has its largest part along the newest rows on the other side; without it one round
        over all rows leaves no more than rounding.
        """
        newest = block_SbX @ self.newest.mT
        rest = (block_SbX - newest @ self.newest).to(self._all.dtype)
        along = rest @ self.rows.mT
        outside = (rest - along @ self.rows).double()
        return functional.pad(newest, (self.count - newest.shape[2], 0)) + along, outside

    def append(self, block_SbX: Tensor) -> None:
        """Take orthonormal rows in."""
        count = self.count + block_SbX.shape[1]
        if (
            count > self._all.shape[1]
        ):  # room for as many again: to copy all at each step would cost as much as to use them
            self._all = functional.pad(self._all, (0, 0, 0, 2 * count - self._all.shape[1]))
        self._all[:, self.count : count] = block_SbX
        self.newest, self.count = block_SbX, count

    def keep(self, samples: list[int]) -> None:
        """Let go of the other samples."""
        self._all, self.newest = self._all[samples], self.newest[samples]


class _Space:
    """The rows V and U of some samples, and the matrix M of J between them.

    Attributes:
        at: which of the operator's samples.
        right, left: V and U.
        matrix: M = U J Vᵀ, [S, |U|, |V|], known in full.
        full: the vectors that fill the whole space.
        complete: [S], whether a random block was mapped into the known range: there are no more singular values.
        finite: [S], whether what J gave was.
    """

    def __init__(
        self, jacobian: Operator, start: Float[Tensor, "S b D"], at: list[int], generator: torch.Generator
    ) -> None:
        self.jacobian, self.at, self._generator = jacobian, list(at), generator
        dtype = torch.float64 if jacobian.dtype == torch.float64 else torch.float32
        self.right, self.left = (_Rows(start, n, dtype) for n in (jacobian.num_inputs, jacobian.num_features))
        self.right.append(start)
        self._block = start.shape[1]
        self.matrix = start.new_zeros(len(start), 0, start.shape[1], dtype=torch.float64)
        self.full = min(jacobian.num_features, jacobian.num_inputs)
        self.complete = torch.zeros(len(start), dtype=torch.bool, device=start.device)
        self.finite = ~self.complete
        self._random = ~self.complete
        self._largest = start.new_zeros(len(start))
        self._pushes = True
        self._corner = self.matrix
        self._before: tuple[Tensor, Tensor] | None = None
        self._svd()

    @property
    def values(self) -> Tensor:
        """[S, r], the singular values of M."""
        return self._pairs[1]

    @property
    def weights(self) -> Tensor:
        """[S, r], the squared length of the first block's part along each right vector."""
        return self._pairs[2][:, :, : self._block].square().sum(2)

    @property
    def exhausted(self) -> bool:
        """Whether the last half-step was the product with a whole basis."""
        if self._pushes:
            return self.left.count >= self.jacobian.num_features
        return self.right.count >= self.jacobian.num_inputs

    def _svd(self) -> None:
        self._pairs = torch.linalg.svd(self.matrix, full_matrices=False)

    def half_step(self, image: Tensor | None = None) -> None:
        """Push the newest block of V, or pull that of U; ``image``: its product, where it is known."""
        source, target = (self.right, self.left) if self._pushes else (self.left, self.right)
        if image is None:
            product = self.jacobian.push if self._pushes else self.jacobian.pull
            image = product(source.newest, at=self.at)
        self.finite = self.finite & image.isfinite().all(-1).all(-1)
        image = torch.nan_to_num(image)
        eps = self.jacobian.eps
        self._largest = torch.maximum(self._largest, image.norm(dim=2).amax(1))
        along, outside = target.split(image)
        fresh = orthonormal(outside, None, eps=eps, noise=8 * eps * self._largest[:, None, None])
        P, S, Qh = self._pairs
        block = source.newest.shape[1]
        ends = (Qh.mT if self._pushes else P)[:, -block:]  # of the pairs before, along the source's newest block
        corner = fresh @ image.mT
        self._before = S, ends.mT @ corner.mT
        silent = fresh.square().sum(2) < 0.5
        if self._pushes:
            self.complete = self.complete | (self._random & silent.all(1))
            grown = functional.pad(corner, (self.matrix.shape[2] - block, 0))
            self.matrix = torch.cat([self.matrix, grown], 1)
        else:
            self._random = silent.all(1)
            # As the pull has it.  The first rows of U come of images shorter than σ_1, and are as much less exact: of a
            # J of rank one the push finds another u beside the first, and takes J of all V before for zero along it.
            self.matrix = torch.cat([self.matrix[:, :-block], along], 1)
            grown = functional.pad(corner.mT, (0, 0, self.matrix.shape[1] - block, 0))
            self.matrix = torch.cat([self.matrix, grown], 2)
            if bool(silent.any()):
                fresh = self._filled(fresh, silent)
        target.append(fresh)
        self._pushes = not self._pushes
        self._svd()

    def _filled(self, fresh_SbD: Tensor, empty_Sb: Tensor) -> Tensor:
        """Random rows in place of the empty ones: of a space that J maps into itself they know what lies beyond."""
        random = torch.randn(*fresh_SbD.shape[1:], generator=self._generator, dtype=torch.float64)
        random = random.to(fresh_SbD.device).expand_as(fresh_SbD)
        random = self.right.split(self.right.split(random)[1])[1]
        random = random - (random @ fresh_SbD.mT) @ fresh_SbD
        rows = orthonormal(torch.where(empty_Sb[:, :, None], random, 0.0), fresh_SbD, eps=1e-9)
        return fresh_SbD + rows.flip(1)  # rows that are zero come last, so that these fill them

    @property
    def before(self) -> tuple[Tensor, Tensor]:
        """The values before the last half-step, [S, r], and what it says of their pairs: residuals [S, r, b]."""
        assert self._before is not None
        return self._before

    def keep(self, samples: list[int]) -> None:
        """Let go of the other samples."""
        self.at = [self.at[i] for i in samples]
        self.right.keep(samples)
        self.left.keep(samples)
        for name in ("matrix", "complete", "finite", "_random", "_largest"):
            setattr(self, name, getattr(self, name)[samples])
        self._pairs = tuple(part[samples] for part in self._pairs)

    def best(self, i: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k leading values of the i-th sample, and right and left vectors of a few more."""
        P, S, Qh = (part[i] for part in self._pairs)
        kept = min(k + SPARE, len(S))
        vectors = (Qh[:kept].to(self.right.rows.dtype) @ self.right.rows[i]).double()
        left = (P.mT[:kept].to(self.left.rows.dtype) @ self.left.rows[i]).double()
        return torch.where(self.finite[i], S[:k], torch.nan), vectors, left
