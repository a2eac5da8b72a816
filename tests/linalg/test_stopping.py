"""The constants of the bounds: over many spectra, seeds, tolerances and budgets no bound may be below the error."""

import math

import problems
import pytest
import torch

from torchgeom_probe.linalg.krylov import _Space, leading, random_block
from torchgeom_probe.linalg.operator import MatrixOperator
from torchgeom_probe.linalg.stopping import Before, Verdict, _least_part, sketched

N, D, SEEDS = 256, 512, 40


def _network(model, x):
    jacobian = torch.func.jacrev(lambda z: model(z[None])[0].flatten())(x)
    return jacobian.flatten(1).detach()


def _matrix(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    i = torch.arange(1, N + 1, dtype=torch.float64)
    torch.manual_seed(seed)
    if kind == "gaussian":
        return torch.randn(N, D, generator=generator, dtype=torch.float64) / math.sqrt(D)
    if kind == "mlp":
        return _network(problems.mlp((D, N, N, N)).double(), torch.randn(D, dtype=torch.float64))
    if kind == "resnet":
        model = problems.resnet((4, 8, 8, 8)).double()
        return _network(model, torch.randn(3, 16, 16, dtype=torch.float64))
    noise = torch.rand(N, generator=generator, dtype=torch.float64)
    sigma = (
        {
            "geometric": 10 ** (-i / 4),
            "harmonic": 1 / i,
            "slow": i**-0.3,
            "steps": 10 ** (-((i - 1) // 3) / 6),
            "pairs": 1 / (1 + (i - 1) // 2),
            "edge": 1 - 0.6 * (i / N) ** 0.667,
            "logarithmic": 1 / (1 + 0.1 * i.log()),
            "two far": torch.where(i <= 2, 5.0, 1 / (1 + 0.01 * i)),
            "flat top": torch.where(i <= 10, 1 - 0.03 * noise, 0.97 * (1 - 0.5 * noise)),
            "nine alike": torch.where(i <= 9, 1.0, 0.3 * (1 - i / 2 / N)),
            "thirty nearly alike": torch.where(i <= 30, 1.0, 0.1) * (1 - 1e-2 * i / N),
            "groups of eight": 0.9 ** ((i - 1) // 8) * (1 + 1e-2 * noise),
            "gap": torch.where(i <= 8, 1.0, 0.05 * (1 - i / 2 / N)),
        }[kind]
        .sort(descending=True)
        .values
    )
    return (problems.orthonormal(N, N, generator) * sigma) @ problems.orthonormal(D, N, generator).T


KINDS = [
    *("geometric", "harmonic", "gaussian", "slow", "steps", "pairs", "gap", "mlp", "resnet"),
    *("edge", "logarithmic", "two far", "flat top", "nine alike", "thirty nearly alike", "groups of eight"),
]


def _found(matrices, k, tolerance, budget, before=None):
    operator, generator = MatrixOperator(matrices), torch.Generator().manual_seed(5)
    options = {"k": k, "block": 4, "tolerance": tolerance, "max_products": budget, "generator": generator}
    found = leading(operator, random_block(operator, 4, generator), before=before, **options)
    error = torch.linalg.svdvals(matrices)[:, :k].log().sum(1) - found.values.log().sum(1)
    assert found.bound.isfinite().all()
    assert (error <= found.bound + 1e-12).all(), (error - found.bound).max()
    assert (error[found.converged] <= tolerance).all()
    assert (found.bound[found.converged] <= tolerance).all()
    if budget >= 4 * N:
        assert found.converged.all()
    return found


def _before(found):
    return Before(found.values, found.bound, found.vectors, found.products.double(), found.sketch)


@pytest.mark.parametrize(
    "kind", ["flat top", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gaussian", "edge", "mlp"))]
)
def test_one_new_direction_is_found_after_a_warm_start(kind):
    """A change that the old vectors do not feel at all: only random directions, pushed before and after, know of it."""
    matrices = torch.stack([_matrix(kind, seed) for seed in range(200, 205)])
    cold = _found(matrices, 10, 0.1, 4 * N)
    left, sigma, right = torch.linalg.svd(matrices, full_matrices=False)
    for number, size in ((40, 1.0), (41, 2.0), (200, 4.0)):  # of a small value, whose vectors are none of the old ones
        change = left[:, :, number, None] * right[:, None, number] * (size * sigma[:, 9, None, None])
        warm = _found(matrices + change, 10, 0.1, 4 * N, _before(cold))
        again = _found(matrices + change, 10, 0.1, 4 * N)
        assert torch.equal(warm.products, again.products), "judged by the products that a cold start begins with"
    same = _found(matrices, 10, 0.1, 4 * N, _before(cold))
    assert (same.products == 16).all()


def test_a_value_that_the_start_hardly_knows_of_is_not_above_what_may_be_missed():
    """The fifth singular vector is as far from the start as in one case of a thousand; the sixth takes its place."""
    sigma = torch.cat([torch.tensor([9.0, 8.0, 7.0, 6.0, 1.08]), torch.linspace(1, 0.9, N - 5)]).double()
    rows = torch.randn(4, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows[:, 4] = 0.0
    rows = torch.linalg.qr(rows.T).Q.T
    rows[0] *= (1 - _least_part(4, D)) ** 0.5
    rows[0, 4] = _least_part(4, D) ** 0.5
    space = _Space(MatrixOperator(torch.eye(N, D).double()[None] * sigma[:, None]), rows[None], [0], torch.Generator())
    verdict = Verdict(k=5, block=4, tolerance=0.02, eps=1e-16, like=space.matrix, inputs=D)
    above = []
    for step in range(1, 30):
        space.half_step()
        verdict._steps = step
        if step % 2 and step > 3:
            missed = verdict._missed_values(space.values, space.weights, 5).item()
            above.append((missed, (sigma[4] / space.values[0, 4]).log().item()))
    assert all(error <= missed for missed, error in above), above
    assert above[2][1] > 0.2 * above[2][0], "and not by far"
    assert above[-1][0] < 0.05


def test_progress_is_no_bound_where_a_value_is_missing():
    """Found among 11520 runs: σ_11 stood in the place of σ_10, whose part in the start is small, and rose no more."""
    _found(_matrix("mlp", 5030)[None], 10, 0.02, 4 * N)


def test_a_sketch_has_the_length_of_what_it_is_made_of():
    generator = torch.Generator().manual_seed(0)
    for length in (3, 64, 65, 4099):
        rows = torch.randn(200, 4, length, generator=generator, dtype=torch.float64)
        rows[:, 0, 1:] = 0.0  # one number alone
        ratio = sketched(rows).square().sum(2) / rows.square().sum(2)
        torch.testing.assert_close(ratio[:, 0], torch.ones(200).double())
        assert abs(ratio.mean() - 1) < 0.05
        assert ratio.std() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_bound_is_below_the_error(kind):
    """11520 runs in all: 16 spectra, 40 seeds, three k, three tolerances and three budgets."""
    matrices = torch.stack([_matrix(kind, seed) for seed in range(SEEDS)])
    for k in (1, 3, 10):
        for tolerance, budget in ((1e-3, 4 * N), (0.02, 4 * N), (0.1, 4 * N), (1e-3, 24), (1e-3, 48), (1e-3, 96)):
            _found(matrices, k, tolerance, budget)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nor_after_a_warm_start(kind):
    """16 spectra, 40 seeds, five sizes of a change and five settings: 16000 runs."""
    matrices = torch.stack([_matrix(kind, seed) for seed in range(SEEDS)])
    change = torch.randn(matrices.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    change = change * matrices.square().mean((1, 2), keepdim=True).sqrt()
    for tolerance in (1e-3, 0.1):
        cold = _found(matrices, 10, tolerance, 4 * N)
        before = _before(cold)
        for size in (0, 1e-4, 1e-3, 1e-2, 0.1):
            for budget in (4 * N, 48, 96) if tolerance == 1e-3 else (4 * N, 48):
                warm = _found(matrices + size * change, 10, tolerance, budget, before)
            if size < 1e-3:
                fewer = warm.products.double().mean() < cold.products.double().mean()
                assert fewer or cold.products.max() <= 48  # of so few there are none to save


@pytest.mark.parametrize("spike", [30.0, 1e6])
@pytest.mark.parametrize("most", [4, 12, 400])
def test_one_value_far_above_the_others_is_not_bounded_by_a_mean_of_the_start(spike, most):
    """A start with a small part along it, and there are such, has seen next to nothing of it."""
    outside, d, sigma = 0, 90, torch.tensor([spike] + [0.9**i for i in range(50)], dtype=torch.float64)
    for seed in range(200):
        turned = problems.orthonormal(d, 51, torch.Generator().manual_seed(1000 + seed)).T
        jacobian, generator = MatrixOperator((sigma[:, None] * turned)[None]), torch.Generator().manual_seed(seed)
        options = {"block": 4, "tolerance": 1e-2, "max_products": most, "generator": generator}
        found = leading(jacobian, random_block(jacobian, 4, generator), k=1, **options)
        error = (sigma.max().log() - found.values[0, 0].log()).item()
        assert error >= -1e-9
        assert found.bound >= 0
        outside += error > found.bound.item() + 1e-9
    assert outside <= (most == 4)  # of 200: one start in a thousand knows less of it than is counted on


#: a few values close together, of which the start may know one hardly, above others
CLUSTERS = {
    "nine": torch.cat([torch.linspace(1, 0.95, 9), torch.linspace(0.7, 0.1, 40)]),
    "thirteen": torch.cat([torch.linspace(1, 0.9, 13), torch.linspace(0.5, 0.1, 40)]),
    "twenty": torch.cat([torch.linspace(1, 0.9, 20), torch.full((40,), 0.2)]),
    "thirty": torch.cat([torch.linspace(1, 0.8, 30), torch.full((30,), 0.1)]),
}


@pytest.mark.parametrize("k", [1, 3, 5, 10])
@pytest.mark.parametrize("name", CLUSTERS)
def test_a_value_in_whose_place_the_next_one_rests_is_not_taken_for_found(name, k):
    sigma, d = CLUSTERS[name].double(), 90
    turned = [problems.orthonormal(d, len(sigma), torch.Generator().manual_seed(10_000 + i)).T for i in range(60)]
    jacobian, total, outside = MatrixOperator(sigma[:, None] * torch.stack(turned)), sigma[:k].log().sum(), 0
    for seed, tolerance, most in ((0, 1e-3, 400), (1, 0.1, 400), (2, 1e-3, 48)):
        generator = torch.Generator().manual_seed(seed)
        options = {"block": 4, "tolerance": tolerance, "max_products": most, "generator": generator}
        found = leading(jacobian, random_block(jacobian, 4, generator), k=k, **options)
        error = total - found.values.log().sum(1)
        assert (error <= 1.2 * found.bound + 1e-9).all(), (error / found.bound).max()
        outside += int((error > found.bound + 1e-9).sum())
    assert outside <= 1  # of 180: the start is unlucky in one case of a thousand
