"""TopK against the dense float64 SVD, and against a naive twin that builds the same Krylov space densely."""

import copy
import math

import oracle
import problems
import pytest
import torch
from annotations import shapes_unchecked
from torch import nn
from unseen import Notes

import torchgeom_probe as tgp
from torchgeom_probe.errors import EngineRefusal, ProbeError
from torchgeom_probe.estimators.topk import paper_pool

LN10 = math.log(10)


def _measured(model, x, layer="", **options):
    settings = {name: options.pop(name) for name in ("normalize", "engine", "memory_budget") if name in options}
    settings.setdefault("normalize", False)
    return tgp.measure(model, x, layers=[layer], estimator=tgp.TopK(**options), **settings)[layer]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("k", [1, 6, 10])
@pytest.mark.parametrize("kind", problems.KINDS)
def test_every_value_is_within_tol_and_the_bound_covers_the_error(kind, k, dtype):
    model, layer, x = problems.problem(kind, n=160, d=300, dtype=dtype, batch=2)
    true = oracle.singular_values(model, [layer], x)[layer][:, :k]
    g = _measured(model, x, layer, k=k, method="krylov")
    assert (g.converged == 1).all()
    total = (g.log_volume - true.log().sum(1)).abs()
    assert (total <= g.error_bound).all(), (total, g.error_bound)
    assert (g.error_bound <= 0.02).all()
    eps = torch.finfo(dtype).eps
    assert (g.singular_values <= true * (1 + 32 * eps) + 32 * eps * true[:, :1]).all()  # Ritz values are lower bounds
    assert (g.rank == k).all()
    assert g.std_error is None
    assert torch.equal(g.log_volume, g.log_pseudo_volume)


@pytest.mark.parametrize("kind", ["geometric", "harmonic", "gaussian"])
def test_naive_twin_the_same_krylov_space_built_densely(kind):
    """The values of q rounds are those of the space span{V, gV, …, g^(q−1) V}, in plain float64 dense algebra."""
    model, _, x = problems.problem(kind, n=100, d=150, dtype=torch.float64)
    rounds, block, k = 4, 4, 6
    g = _measured(model, x, k=k, block=block, seed=3, method="krylov", tol=1e-14, max_products=2 * block * rounds)
    assert g.num_products.tolist() == [2 * block * rounds]
    jacobian = model.weight.detach()
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(150, block, generator=generator, dtype=torch.float64)).Q
    space = basis
    for _ in range(rounds - 1):
        basis = torch.linalg.qr(jacobian.T @ (jacobian @ basis)).Q
        space = torch.linalg.qr(torch.cat([space, basis], dim=1)).Q
        basis = space[:, -block:]
    image = torch.linalg.qr(jacobian @ space).Q
    twin = torch.linalg.svdvals(jacobian.T @ image)[:k]
    torch.testing.assert_close(g.singular_values[0], twin, rtol=1e-9, atol=1e-12)


def test_more_work_never_lowers_a_value():
    model, _, x = problems.problem("gaussian", n=100, d=150)
    volumes = [
        _measured(model, x, k=5, method="krylov", tol=1e-9, max_products=p).log_volume.item() for p in (16, 32, 64, 128)
    ]
    assert volumes == sorted(volumes)
    assert volumes[0] < volumes[-1] - 1e-3


def test_what_did_not_converge_says_so_in_its_bound():
    model, _, x = problems.problem("gaussian", n=160, d=300)
    true = oracle.singular_values(model, [""], x)[""][:, :10].log().sum()
    bounds = []
    for products in range(20, 161, 8):
        g = _measured(model, x, k=10, method="krylov", max_products=products, tol=1e-8)
        assert g.num_products.item() <= products
        assert g.converged.item() == 0
        assert (true - g.log_volume).item() <= g.error_bound.item() < math.inf
        bounds.append(g.error_bound.item())
    assert bounds[-1] < 1e-2 < bounds[0]


def test_no_convergence_at_the_dense_price_forms_the_jacobian():
    model = problems.linear(torch.linspace(1, 0.99, 200), 200, 260)
    g = _measured(model, torch.zeros(2, 260), k=4, tol=1e-7)
    true = torch.linalg.svdvals(model.weight.detach().double())[:4]
    assert "dense" in g.estimand
    assert (g.num_products >= 200).all()
    torch.testing.assert_close(g.singular_values[0], true, rtol=1e-6, atol=0)
    assert ((g.log_volume - true.log().sum()).abs() <= g.error_bound).all()


def test_dense_where_it_is_cheaper_and_equal_to_exact():
    model, x = nn.Sequential(nn.Linear(7, 11), nn.Tanh()), torch.randn(5, 7)
    g = _measured(model, x, "1", k=7)
    exact = tgp.measure(model, x, layers=["1"], estimator=tgp.Exact(), normalize=False)["1"]
    assert "dense" in g.estimand
    torch.testing.assert_close(g.log_volume, exact.log_volume)
    assert g.num_products.tolist() == [7] * 5


@pytest.mark.parametrize("last", [1e-3, 1e-5])
def test_small_values_are_no_rounding(last):
    """A tolerance on the rank that is wide enough for what rounding feigns would take these for zero."""
    sigma = [*torch.logspace(0, math.log10(last), 8).tolist(), *[last / 10] * 40]
    g = _measured(problems.linear(sigma, 300, 300), torch.zeros(2, 300), k=8, method="krylov")
    assert g.rank.tolist() == [8, 8]
    true = torch.tensor(sigma[:8], dtype=torch.float64).log().sum()
    assert bool(((g.value - true).abs() <= g.error_bound).all())


@pytest.mark.parametrize(
    ("sigma", "k", "rank"),
    [
        ([2.0] * 40, 10, 10),  # an isometry: every space is invariant
        ([3.0] * 4 + [1.0] * 30, 6, 6),  # as many copies as the block holds
        ([3.0, 2.0, 1.0], 5, 3),
        ([1.0] * 6, 6, 6),
        ([5.0], 4, 1),
    ],
    ids=["isometry", "clusters", "rank 3", "rank k", "rank 1"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_degenerate_spectra(sigma, k, rank, dtype):
    model = problems.linear(sigma, 60, 90, dtype=dtype)
    g = _measured(model, torch.zeros(2, 90, dtype=dtype), k=k, method="krylov")
    expected = torch.tensor((sigma + [0.0] * k)[:k], dtype=torch.float64)
    torch.testing.assert_close(g.singular_values, expected.expand(2, -1), rtol=1e-5, atol=1e-5)
    assert g.rank.tolist() == [rank, rank]
    assert g.log_volume.isneginf().all() == (rank < k)
    torch.testing.assert_close(g.log_pseudo_volume, expected[:rank].log().sum().expand(2), rtol=0, atol=1e-4)
    assert g.error_bound.isfinite().all()


@pytest.mark.parametrize("method", ["krylov", "dense"])
def test_zero_jacobian_is_rank_zero(method):
    model = nn.Linear(90, 60)
    model.weight.data.zero_()
    g = _measured(model, torch.randn(2, 90), k=3, method=method)
    assert g.rank.tolist() == [0, 0]
    assert g.log_volume.isneginf().all()
    assert g.log_pseudo_volume.tolist() == [0, 0]
    assert g.error_bound.tolist() == [0, 0]


def test_dead_channels_leave_the_others_alone():
    model, layer, x = problems.problem("resnet", batch=2)
    model[1][0].one[1].weight.data[1:].zero_()
    model[1][0].one[1].bias.data[1:].zero_()
    true = oracle.singular_values(model, [layer], x)[layer][:, :8]
    g = _measured(model, x, layer, k=8, method="krylov")
    assert ((g.log_volume - true.log().sum(1)).abs() <= g.error_bound).all()


def test_a_diverged_sample_does_not_take_its_neighbours_with_it():
    model, layer, x = problems.problem("mlp", n=60, d=90, batch=3)
    alone = _measured(model, x[:1], layer, k=4, method="krylov")
    x[1] = torch.nan
    for method in ("krylov", "dense"):
        g = _measured(model, x, layer, k=4, method=method)
        assert g.log_volume.isnan().tolist() == [False, True, False]
        assert g.rank.tolist() == [4, -1, 4]
        torch.testing.assert_close(g.log_volume[:1], alone.log_volume, rtol=0, atol=1e-3)


def test_a_sample_stops_by_itself_whatever_its_neighbours_need():
    model, layer, x = problems.problem("mlp", n=120, d=150, batch=4)
    x = x * torch.tensor([0.1, 1.0, 3.0, 10.0])[:, None]
    together = _measured(model, x, layer, k=6, method="krylov")
    apart = [_measured(model, sample[None], layer, k=6, method="krylov") for sample in x]
    assert together.num_products.tolist() == [g.num_products.item() for g in apart]
    assert len(set(together.num_products.tolist())) > 1
    torch.testing.assert_close(together.log_volume, torch.cat([g.log_volume for g in apart]), rtol=0, atol=1e-4)


def test_several_layers_each_in_a_space_of_its_own():
    model, _, x = problems.problem("resnet", batch=2)
    layers = ["1", "2", "4"]
    report = tgp.measure(model, x, layers=layers, estimator=tgp.TopK(k=5, method="krylov"), normalize=True)
    assert list(report) == layers
    for layer, sigma in oracle.singular_values(model, layers, x).items():
        g = report[layer]
        true = (sigma[:, :5] / math.sqrt(g.num_features)).log().sum(1)
        assert ((g.log_volume - true).abs() <= g.error_bound).all()
        assert (g.engine, g.normalized, g.num_directions) == ("fused", True, 5)


@pytest.mark.parametrize("engine", ["fused", "functorch", "vjp"])
def test_engines_agree(engine):
    model, layer, x = problems.problem("mlp", n=50, d=70, batch=2, dtype=torch.float64)
    true = oracle.singular_values(model, [layer], x)[layer][:, :4].log().sum(1)
    g = _measured(model, x, layer, k=4, method="krylov", engine=engine, tol=1e-8)
    assert g.engine == engine
    torch.testing.assert_close(g.log_volume, true, rtol=0, atol=1e-6)


def test_chunks_of_samples_give_the_same():
    model, layer, x = problems.problem("mlp", n=60, d=90, batch=5)
    options = {"k": 4, "method": "krylov"}
    whole = _measured(model, x, layer, **options)
    chunked = _measured(model, x, layer, memory_budget=300_000, **options)
    torch.testing.assert_close(chunked.log_volume, whole.log_volume, rtol=0, atol=1e-4)
    assert chunked.num_products.tolist() == whole.num_products.tolist()
    assert chunked.right_singular_vectors.shape == whole.right_singular_vectors.shape


def test_a_module_called_twice_has_two_entries():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(40, 40)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    model, x = Twice(), torch.randn(2, 40)
    topk = tgp.measure(model, x, layers=["layer"], estimator=tgp.TopK(k=3, method="krylov", tol=1e-6))
    exact = tgp.measure(model, x, layers=["layer"], estimator=tgp.Exact())
    for entry in ("layer", "layer#1"):
        expected = exact[entry].singular_values[:, :3]
        torch.testing.assert_close(topk[entry].singular_values, expected, rtol=1e-5, atol=0)


def test_warm_start_follows_a_small_change_of_the_weights():
    model, layer, x = problems.problem("resnet", batch=3)
    probe = tgp.GeometryProbe(model, layers=[layer], estimator=tgp.TopK(k=10, method="krylov"))
    cold = probe.measure(x)
    same = probe.measure(x, start=cold)[layer]
    assert same.num_products.tolist() == [16] * 3
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-3 * p.abs().mean() * torch.randn_like(p))
    warm, again = probe.measure(x, start=cold)[layer], probe.measure(x)[layer]
    assert (warm.num_products <= again.num_products).all()  # a change that looks like few directions starts cold
    assert warm.num_products.double().mean() < again.num_products.double().mean()
    true = oracle.singular_values(model, [layer], x)[layer][:, :10] / math.sqrt(warm.num_features)
    assert ((warm.log_volume - true.log().sum(1)).abs() <= warm.error_bound).all()
    assert (warm.error_bound <= 0.02).all()


def test_warm_start_recovers_from_vectors_that_are_all_wrong():
    model, layer, x = problems.problem("mlp", n=100, d=150, batch=2)
    probe = tgp.GeometryProbe(model, layers=[layer], estimator=tgp.TopK(k=8, method="krylov"))
    cold = probe.measure(x)
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.normal_(std=0.1)
    moved = tgp.GeometryProbe(other, layers=[layer], estimator=tgp.TopK(k=8, method="krylov")).measure(x, start=cold)[
        layer
    ]
    true = oracle.singular_values(other, [layer], x)[layer][:, :8] / math.sqrt(moved.num_features)
    assert ((moved.log_volume - true.log().sum(1)).abs() <= moved.error_bound).all()


def test_warm_start_in_chunks_and_where_the_jacobian_was_dense():
    model, layer, x = problems.problem("mlp", n=60, d=90, batch=5)
    probe = tgp.GeometryProbe(model, layers=[layer], estimator=tgp.TopK(k=8, method="krylov"), memory_budget=300_000)
    assert (probe.measure(x, start=probe.measure(x))[layer].num_products <= 24).all()
    dense = tgp.GeometryProbe(model, layers=[layer], estimator=tgp.TopK(k=4))
    assert torch.equal(dense.measure(x, start=dense.measure(x))[layer].log_volume, dense.measure(x)[layer].log_volume)


def test_paper_conventions():
    output = torch.randn(2, 64, 32, 32)
    windows = {64: (16, 8), 128: (8, 8), 256: (8, 4), 512: (4, 4)}
    for channels, side in ((64, 32), (128, 16), (256, 8), (512, 4)):
        output = torch.randn(2, channels, side, side)
        expected = nn.functional.avg_pool2d(output, windows[channels])
        assert torch.equal(paper_pool(output), expected)
        assert paper_pool(output).flatten(1).shape == (2, 512)
    model, layer, x = problems.problem("mlp", n=100, d=150)
    usual = _measured(model, x, layer, k=5, normalize=True)
    assert usual.normalized
    torch.testing.assert_close(usual.log10_volume, usual.singular_values.log10().sum(1))


def test_small_values_are_not_dropped_as_the_official_code_drops_them():
    model = problems.linear([1.0, 1e-9], 30, 40, dtype=torch.float64)
    g = _measured(model, torch.zeros(1, 40, dtype=torch.float64), k=2, method="dense")
    assert abs(g.log10_volume.item() - -9.0) < 1e-6  # theirs: 0, the value below −8 counted as if it were 1


def test_csv_and_json_hold_the_bound_and_the_products_but_no_vectors(tmp_path):
    model, layer, x = problems.problem("mlp", n=60, d=90)
    report = tgp.measure(model, x, layers=[layer], estimator=tgp.TopK(k=3, method="krylov"))
    header = report.to_csv(tmp_path / "a.csv").read_text().splitlines()[0]
    assert "error_bound" in header
    assert "num_products" in header
    assert "right_singular_vectors" not in report.to_json(tmp_path / "a.json").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "at least one singular value"),
        ({"block": 3}, "fewer than 4 vectors"),
        ({"tol": 0.0}, "a positive number"),
        ({"max_products": 0}, "at least one product"),
        ({"method": "svd"}, "is unknown"),
    ],
)
def test_refused_arguments(options, message):
    with shapes_unchecked(), pytest.raises(ProbeError, match=message):
        tgp.TopK(**options)


def test_refused_measurements():
    x = torch.randn(2, 20)
    with pytest.raises(ProbeError, match=r"has 8 singular values.\nWrite TopK\(k=8\)"):
        _measured(nn.Linear(20, 8), x, k=10)
    probe = tgp.GeometryProbe(nn.Linear(20, 8), layers="", estimator=tgp.TopK(k=2))
    other = tgp.GeometryProbe(nn.Sequential(nn.Linear(20, 8)), layers="0", estimator=tgp.TopK(k=2))
    with pytest.raises(ProbeError, match="start= has no layer ''"):
        probe.measure(x, start=other.measure(x))
    subspace = tgp.measure(nn.Linear(20, 8), x, layers="", estimator=tgp.Subspace(k=2))
    cold = probe.measure(x)[""].log_volume
    assert torch.equal(probe.measure(x, start=subspace)[""].log_volume, cold), "nothing to start from: cold"
    krylov = tgp.GeometryProbe(nn.Linear(20, 8), layers="", estimator=tgp.TopK(k=2, method="krylov"))
    with pytest.raises(ProbeError, match="the same samples in the same order"):
        krylov.measure(x, start=krylov.measure(x[:1]))
    exact = tgp.GeometryProbe(nn.Linear(20, 8), layers="", estimator=tgp.Exact())
    assert torch.equal(exact.measure(x, start=subspace)[""].value, exact.measure(x)[""].value), "declined"
    for odd in ((2, 48, 8, 8), (2, 64, 3, 3), (2, 64)):
        with shapes_unchecked(), pytest.raises(ProbeError, match=r"C divides 512(.|\n)*adaptive_avg_pool2d"):
            paper_pool(torch.randn(*odd))


def test_a_model_without_a_reverse_derivative_is_refused_with_the_way_out():
    class ForwardOnly(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return 2 * x

    with pytest.raises(ProbeError, match=r"no_grad|estimator=Subspace"):
        _measured(nn.Sequential(ForwardOnly()), torch.randn(2, 60), "0", k=3, method="krylov")
    assert issubclass(EngineRefusal, ProbeError)


def _copies(number):
    """Equal values in groups, each group 0.6 of the one before."""
    return torch.repeat_interleave(0.6 ** torch.arange(60 // number, dtype=torch.float64), number)


#: Spectra on which a Krylov space from four random vectors alone goes wrong, or might.
AWKWARD = {
    "pairs": _copies(2),
    "groups of five": _copies(5),
    "groups of eight": _copies(8),
    "twelve copies": torch.tensor([1.0] * 12 + [0.1] * 40),
    "nine copies, then nearly": torch.tensor([1.0] * 9 + [0.999] * 50),
    "one part in a thousand": 1 - 1e-3 * torch.arange(60) / 60,
    "one part in 1e8": 1 - 1e-8 * torch.arange(60, dtype=torch.float64) / 60,
    "six decades": 10 ** (-torch.arange(60, dtype=torch.float64) / 10),
    "thirty decades": 10 ** (-torch.arange(60, dtype=torch.float64) / 2),
    "a spike": torch.tensor([1e6] + [0.9**i for i in range(50)]),
    "three spikes": torch.tensor([1e4] * 3 + [1 / i for i in range(1, 50)]),
    "rank one": torch.tensor([3.0]),
    "rank eleven": torch.ones(11),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("name", AWKWARD)
def test_no_silent_wrong_number_on_awkward_spectra(name, k, dtype):
    model = problems.linear(AWKWARD[name].double(), 70, 90, dtype=dtype, seed=1)
    true = torch.linalg.svdvals(model.weight.detach().double())[:k]
    for options in ({"method": "krylov"}, {"method": "krylov", "max_products": 64}, {}):
        g = _measured(model, torch.zeros(1, 90, dtype=dtype), k=k, **options)
        counted = true > g.rank_tolerance * true[0]
        near = ((true / true[0]).clamp_min(1e-300) / g.rank_tolerance).log().abs().min() < 1.5
        if not near:  # at the threshold itself rounding decides
            assert g.rank.item() == counted.sum().item() or math.isinf(g.error_bound.item())
        if g.rank.item() == counted.sum().item():
            expected = true[counted].log().sum()
            assert (g.log_pseudo_volume - expected).abs() <= g.error_bound + 1e-9, options


@pytest.mark.parametrize("seed", range(5))
def test_patches_that_do_not_overlap_have_every_value_many_times(seed):
    """The stem of a vision transformer: J is one small matrix for each of 16 patches, so σ_1 comes 16 times."""
    torch.manual_seed(seed)
    model, x = nn.Conv2d(3, 20, 4, stride=4, bias=False), torch.randn(2, 3, 16, 16)
    top = torch.linalg.svdvals(model.weight.detach().double().flatten(1))[0]
    report = tgp.measure(model, x, layers="", estimator=tgp.TopK(k=10, method="krylov"), normalize=False)
    g = report[""]
    assert (g.singular_values.log10() - top.log10()).abs().max() < 1e-3
    assert ((g.log_volume - 10 * top.log()).abs() <= g.error_bound).all()
    assert g.error_bound.isfinite().all()
    few = _measured(model, x, k=10, method="krylov", max_products=48)
    assert ((few.log_volume - 10 * top.log()).abs() <= few.error_bound).all()


class _OfItsSample(nn.Module):
    """A Jacobian whose spectrum is steep or flat, as the sample's first number says."""

    def __init__(self, *, noise=0.0):
        super().__init__()
        self.steep = problems.linear(problems.spectrum("geometric", 60), 60, 80, dtype=torch.float64)
        self.flat = problems.linear(problems.spectrum("harmonic", 60) ** 0.3, 60, 80, dtype=torch.float64)
        self.drop = nn.Dropout(noise)

    def forward(self, x):
        return self.drop(torch.where(x[:, :1] > 0, self.steep(x), self.flat(x)))


def test_a_sample_that_is_done_costs_no_more_pushes():
    model, sizes = _OfItsSample(), Notes()
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    x = torch.tensor([[1.0], [-1.0], [1.0]], dtype=torch.float64).expand(3, 80).contiguous()
    together = _measured(model, x, k=3, method="krylov", seed=2)
    first, flat, third = together.num_products.tolist()
    assert first == third < flat
    rows = sizes.read()
    alone = rows[max(i for i, count in enumerate(rows) if count in (3, 12)) + 1 :]
    assert sorted(alone)[-2:] == [1, 4]  # the flat one alone; its saved pass holds it for each of a block
    assert len(alone) >= 3
    for i in range(3):
        alone = _measured(model, x[i : i + 1], k=3, method="krylov", seed=2)
        assert alone.num_products.item() == together.num_products[i].item()
        torch.testing.assert_close(alone.singular_values[0], together.singular_values[i], rtol=1e-9, atol=0)
        torch.testing.assert_close(alone.error_bound[0], together.error_bound[i], rtol=1e-3, atol=1e-9)


def test_where_random_numbers_are_drawn_every_sample_stays():
    """Fewer samples would draw other numbers: it would be another function."""
    model, sizes = _OfItsSample(noise=0.5).train(), Notes()
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 80).contiguous()
    probe = tgp.GeometryProbe(
        model, layers=[""], mode="as_is", normalize=False, estimator=tgp.TopK(k=3, method="krylov")
    )
    found = probe.measure(x)[""]
    assert len(set(found.num_products.tolist())) == 2
    assert set(sizes.read()[2:]) == {2}


def test_what_is_measured_again_is_the_same_to_the_bit_and_its_time_is_the_reports_own(tmp_path):
    model, layer, x = problems.problem("mlp", n=60, d=90, batch=3)
    probe = tgp.GeometryProbe(model, layers=[layer], estimator=tgp.TopK(k=3, method="krylov"))
    first, second = (probe.measure(x) for _ in range(2))
    assert first.save(tmp_path / "a").read_bytes() == second.save(tmp_path / "b").read_bytes()
    assert 0 < first.seconds != second.seconds
    assert tgp.GeometryReport.load(tmp_path / "a").seconds is None


def test_a_layer_narrower_than_a_block_beside_a_wide_one():
    model, x = nn.Sequential(nn.Linear(90, 60), nn.Tanh(), nn.Linear(60, 3)), torch.randn(2, 90)
    report = tgp.measure(model, x, layers=["1", "2"], estimator=tgp.TopK(k=3, method="krylov"))
    exact = tgp.measure(model, x, layers=["1", "2"], estimator=tgp.Exact())
    for layer, g in report.items():
        true = exact[layer].singular_values[:, :3].log().sum(1)
        assert ((g.log_volume - true).abs() <= g.error_bound).all()
        assert (g.error_bound <= 0.02).all()


def test_a_diverged_sample_does_not_make_the_others_dense():
    model, x = problems.linear(problems.spectrum("geometric", 120), 120, 200), torch.zeros(2, 200)
    x[1] = torch.nan
    bent = nn.Sequential(model, nn.Tanh())  # of a linear layer J is finite anywhere
    g = tgp.measure(bent, x, layers="", estimator=tgp.TopK(k=2), normalize=False)[""]
    assert "dense" not in g.estimand
    assert g.converged[0] == 1


def test_of_a_jacobian_that_is_streamed_in_float64_the_rounding_is_no_rank():
    model = problems.linear([1.0, 0.5, 1e-10], 60, 4000, dtype=torch.float64)
    x = torch.zeros(1, 4000, dtype=torch.float64)
    estimator = tgp.TopK(k=3, method="dense")
    whole = tgp.measure(model, x, layers="", estimator=estimator)[""]
    assert whole.rank.tolist() == [3]
    streamed = tgp.measure(model, x, layers="", estimator=estimator, memory_budget=20 * 4000 * 8)[""]
    assert streamed.rank.tolist() == [2]
    assert streamed.error_bound.item() < 1e-6


def test_what_the_dense_jacobian_gave_is_no_bound_on_the_vectors_of_the_iteration():
    sigma = torch.cat([torch.linspace(1, 0.96, 10), torch.linspace(0.9599, 0.95, 190)]).double()
    model, x = problems.linear(sigma, 200, 260, dtype=torch.float64), torch.zeros(1, 260, dtype=torch.float64)
    first = tgp.measure(model, x, layers="", estimator=tgp.TopK(k=10, tol=1e-7))
    assert "dense" in first[""].estimand
    assert first[""].cold_products.item() == 0
    krylov = tgp.GeometryProbe(model, layers="", estimator=tgp.TopK(k=10, tol=0.01, method="krylov"))
    again = krylov.measure(x, start=first)[""]
    true = sigma[:10].log().sum() - 5 * math.log(200)
    assert -1e-9 <= (true - again.log_volume).item() <= again.error_bound.item()
