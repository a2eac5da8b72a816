"""Models that people write: state in odd places, in-place first ops, views, randomness.  Each is right, or refused by
name."""

import queue
import threading

import pytest
import torch
from torch import nn

import torchgeom_probe as tgp

ENGINES = ("auto", "fused", "functorch", "vjp")


class Wraps(nn.Module):
    """A linear layer and a function of its output."""

    def __init__(self, function, n=6):
        super().__init__()
        self.linear, self.function = nn.Linear(4, n).double(), function

    def forward(self, x):
        return self.function(self.linear(x))


def _difference_quotient(model, x, v, h=1e-6):
    with torch.no_grad():
        return (model(x + h * v) - model(x - h * v)).flatten(1) / (2 * h)


def _assert_right(model, x, *, engine="auto", k=2):
    """Singular values of JV against central differences of the plain model, which know nothing of derivatives."""
    v = torch.randn(k, *x.shape, dtype=x.dtype)
    g = tgp.measure(model, x, layers="", directions=v, normalize=False, engine=engine)[""]
    columns = torch.stack([_difference_quotient(model.eval(), x, direction) for direction in v], dim=2)
    expected = torch.linalg.svdvals(columns)
    assert (g.singular_values - expected).abs().max() <= 1e-6 * expected.max().clamp_min(1)
    return g


@pytest.mark.parametrize("engine", ENGINES)
def test_the_users_input_is_not_written_to(engine):
    relu = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 6)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    kept = x.clone()
    probe = tgp.GeometryProbe(relu, layers="1", estimator=tgp.Exact(), engine=engine)
    first, second = probe.measure(x), probe.measure(x)
    assert probe.check(x).engine
    assert torch.equal(x, kept)
    assert torch.equal(first["1"].singular_values, second["1"].singular_values)
    same = tgp.measure(relu, x[:1].expand(5, 4), layers="1", estimator=tgp.Exact(), engine=engine)["1"]
    assert (same.singular_values - same.singular_values[:1]).abs().max() < 1e-12


def test_integer_arguments_are_not_written_to():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 3)

        def forward(self, ids):
            return self.embed(ids.add_(1)).sin()

    ids = torch.ones(4, 2, dtype=torch.long)
    for engine in ENGINES:
        g = tgp.measure(Shifted(), ids, layers="", source="embed", estimator=tgp.Exact(), engine=engine)[""]
        assert torch.equal(ids, torch.ones(4, 2, dtype=torch.long))
        assert (g.value - g.value[0]).abs().max() < 1e-6


ROWS, COLUMNS = torch.tensor([0, 2]), torch.tensor([1, 1])


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), ROWS, 0, COLUMNS),
        (slice(None), ROWS, COLUMNS, ..., ROWS),
        (slice(None), ROWS, ..., COLUMNS),
        (torch.tensor(1), slice(None), ROWS),
        (slice(None), torch.tensor(0), slice(None), COLUMNS),
        (slice(None), ROWS, slice(None), COLUMNS),
        (slice(None), ROWS, COLUMNS),
        (slice(None), None, ROWS, slice(None), COLUMNS),
        (slice(None), [0, 2], 1),
        (..., ROWS, 1),
        (slice(None), torch.tensor([True, False, True])),
    ],
    ids=str,
)
def test_indexing_with_batches_as_long_as_the_rows(index):
    """B = 1 + k is where a misplaced axis of rows would pass for the samples."""
    from torchgeom_probe.dual import DualTensor

    buffer = torch.randn(3, 3, 3, 3, 3, dtype=torch.float64)
    got = DualTensor(buffer.clone())[index]
    assert torch.equal(got.buffer, torch.stack([row[index] for row in buffer]))
    written = DualTensor(buffer.clone())
    written[index] = got * 2
    expected = torch.stack([row.clone() for row in buffer])
    for row in expected:
        row[index] = row[index] * 2
    assert torch.equal(written.buffer, expected)


@pytest.mark.parametrize(
    ("write", "plainly"),
    [
        (lambda h: h.data.mul_(3.0), lambda h: h * 3),
        (lambda h: h.detach()[:, :3].zero_(), lambda h: torch.cat([h[:, :3] * 0, h[:, 3:]], 1)),
        (lambda h: h.data[:, :3].copy_(h[:, 1:4].sin()), lambda h: torch.cat([h[:, 1:4].sin(), h[:, 3:]], 1)),
    ],
)
def test_writing_through_a_detached_alias(write, plainly):
    def function(h):
        h = h.clone()
        write(h)
        return h * 2

    x, options = torch.randn(3, 4).double(), {"layers": "", "estimator": tgp.Exact(), "normalize": False}
    model = Wraps(function)
    found = tgp.measure(model, x, **options)[""].singular_values
    model.function = lambda h: plainly(h) * 2
    assert torch.allclose(found, tgp.measure(model, x, **options)[""].singular_values)
    for engine in ("functorch", "vjp"):
        with pytest.raises(tgp.ProbeError, match="the tangent was lost"):
            tgp.measure(Wraps(function), x, engine=engine, layers="", estimator=tgp.Subspace(k=2))


@pytest.mark.parametrize(
    "function",
    [
        lambda h: (y := h.sin(), y.as_strided((h.shape[0], 2), (6, 1)).mul_(3.0))[0],
        lambda h: (y := h.sin(), torch.ops.aten.view.default(y, [-1]).mul_(3.0))[0],
        lambda h: (y := h.sin(), torch.ops.aten.select.int(y, 1, 0).mul_(3.0))[0],
        lambda h: (z := nn.functional.layer_norm(h.view(-1, 3, 2).transpose(1, 2), (3,)), z.flatten(1).relu_())[0],
        lambda h: (y := h.sin(), y[:, 1:].relu_())[0],
        lambda h: (y := h.sin(), y.view(-1, 2, 3).select(1, 0).mul_(h[:, :1]))[0],
    ],
)
def test_in_place_writes_through_views_are_right_or_left_to_another_engine(function):
    _assert_right(Wraps(function), torch.randn(3, 4, dtype=torch.float64))


def test_an_axis_as_long_as_the_batch_is_not_taken_for_it():
    class States(nn.LSTM):
        """The output sequence [B, T, 6] and the last states [2, B, 3]: with two samples either could be first."""

        def forward(self, x):
            out, states = super().forward(x)
            return {"out": out, "states": states[0]}

    lstm, x = States(4, 3, bidirectional=True, batch_first=True).double(), torch.randn(2, 5, 4).double()
    options = {"layers": "", "estimator": tgp.Subspace(k=2)}
    with pytest.raises(tgp.ProbeError, match=r"first axis is not the batch.*\n.*take one:  transform=.*out\['out'\]"):
        tgp.measure(lstm, x, **options)
    g = tgp.measure(lstm, x, **options, transform=lambda out: out["out"])[""]
    assert g.value.isfinite().all()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_recurrent_layer_answers_with_its_output_sequence(kind, batch_first):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = kind(4, 3, batch_first=batch_first).double()

        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            return self.cells(x)[0][:, -1] if batch_first else self.cells(x)[0][-1]

    model, x = Recurrent(), torch.randn(2, 5, 4).double()
    g = tgp.measure(model, x, layers="cells", estimator="exact", normalize=False)["cells"]
    assert g.num_features == 5 * 3

    def sequence(z):
        out = model.cells(z[None] if batch_first else z[:, None])[0]
        return out.flatten()

    for sample in range(2):
        sigma = torch.linalg.svdvals(torch.func.jacrev(sequence)(x[sample]).flatten(1))
        assert torch.allclose(g.singular_values[sample], sigma, atol=1e-10)


def test_complex_outputs_count_as_pairs_and_sgn_is_not_constant():
    x = torch.randn(3, 4, dtype=torch.float64)
    model = Wraps(lambda h: (h.sin(), torch.fft.fft(h)))
    g = tgp.measure(model, x, layers="", estimator=tgp.Exact())[""]
    assert g.num_features == 6 + 2 * 6
    _assert_right(Wraps(lambda h: (torch.sgn(torch.fft.fft(h)) * 2 + 1j).real), x)


def test_a_random_model_is_the_same_function_for_every_direction_and_engine():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 40).double()

        def forward(self, x):
            return torch.tanh(self.linear(x) + torch.randn(40, dtype=x.dtype))

    model, x = Noisy(), torch.randn(1, 4, dtype=torch.float64)
    torch.manual_seed(5)
    whole = tgp.measure(model, x, layers="", estimator=tgp.Exact())[""].value
    for options in ({"memory_budget": 6000}, {"memory_budget": 4000}, {"engine": "functorch"}, {"engine": "vjp"}):
        torch.manual_seed(5)
        again = tgp.measure(model, x, layers="", estimator=tgp.Exact(), **options)[""].value
        assert torch.allclose(whole, again, atol=1e-11)


def test_state_in_plain_objects_and_nested_containers_is_put_back():
    class Box:
        pass

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.box, self.nested = nn.Linear(4, 3), Box(), {"a": {"b": []}}
            self.box.h = None

        def forward(self, x):
            y = self.linear(x)
            if self.box.h is not None:
                y = y + 0.9 * self.box.h.detach().mean(0)
            self.box.h = y
            self.nested["a"]["b"].append(y)
            return y

    model, x = Keeps(), torch.randn(5, 4)
    model(x)
    before, kept = model.box.h, list(model.nested["a"]["b"])
    tgp.measure(model, x, layers="linear", estimator=tgp.Exact())
    assert model.box.h is before
    assert model.nested["a"]["b"] == kept


def test_a_tensor_that_would_outlive_its_measurement_out_of_all_reach_is_refused_before_a_dual_pass():
    attic = queue.SimpleQueue()  # which nothing sees into

    class Hoards(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            y = self.linear(x)
            attic.put(y)
            return y

    x = torch.randn(5, 4)
    with pytest.raises(tgp.ProbeError, match=r"the forward pass leaves tensors(.|\n)*cannot be taken back"):
        tgp.measure(Hoards(), x, layers="linear", engine="fused")
    assert type(attic.get()) is torch.Tensor, "no dual pass was made"


def test_a_sum_in_bfloat16_inside_a_float32_model_has_the_rank_of_its_precision():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(5, 1), nn.Linear(1, 7).bfloat16()

        def forward(self, x):
            return self.up(self.down(x).bfloat16())

    g = tgp.measure(Half(), torch.randn(3, 5), layers="", estimator=tgp.Subspace(k=3))[""]
    assert g.rank.tolist() == [1, 1, 1]
    assert g.value.eq(-torch.inf).all()


def test_the_coarsest_of_several_outputs_sets_the_rank_tolerance():
    class Mixed(nn.Module):
        def forward(self, x):
            return x[:, :2] * 1e-2, x[:, 2:].bfloat16()

    report = tgp.measure(Mixed(), torch.randn(3, 4), layers="", estimator=tgp.Exact())[""]
    assert report.rank_tolerance == 4 * torch.finfo(torch.bfloat16).eps
    assert report.rank.tolist() == [2, 2, 2]  # 1e-2 of the largest is below what bfloat16 resolves


def test_threads_leave_the_process_as_it_was():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).train(), torch.randn(6, 4)
    before = (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled())

    def work():
        for _ in range(5):
            tgp.measure(model, x, layers="*", estimator=tgp.Subspace(k=2))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before
    assert model.training
    assert model[1].training


def test_a_default_device_is_not_taken_for_ours():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    expected = tgp.measure(model, x, layers="", estimator=tgp.Subspace(k=2))[""].value
    with torch.device("meta"):
        got = tgp.measure(model, x, layers="", estimator=tgp.Subspace(k=2))[""].value
    assert torch.equal(expected, got)


def test_anomaly_detection_left_on():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(5, 4)
    with torch.autograd.set_detect_anomaly(True):
        tgp.measure(model, x, layers="1", estimator=tgp.Exact(), engine="vjp")
        assert torch.is_anomaly_enabled()


def test_a_module_called_more_often_for_some_samples():
    class Adaptive(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = nn.Linear(4, 4)

        def forward(self, x):
            x = self.step(x)
            return self.step(x) if bool((x.sum() > 0).item()) else x

    model = Adaptive()
    with torch.no_grad():
        model.step.weight.copy_(torch.eye(4))
        model.step.bias.zero_()
    x = torch.stack([2 * torch.ones(4), -torch.ones(4)])  # together twice, the second alone once
    with pytest.raises(tgp.ProbeError, match="couples the samples"):
        tgp.measure(model, x, layers="step", estimator=tgp.Subspace(k=2), memory_budget=100)


@pytest.mark.parametrize("case", ["mlp", "cifar_resnet", "vit"])
def test_engines_agree_to_1e_12(case):
    import models

    factory, shape, layers = models.CASES[case]
    model, x = factory().double(), torch.randn(2, *shape, dtype=torch.float64)
    v = torch.randn(3, 2, *shape, dtype=torch.float64)
    reports = [tgp.measure(model, x, layers=layers, directions=v, engine=engine) for engine in ENGINES[1:]]
    for layer in layers:
        sigma = [report[layer].singular_values for report in reports]
        for other in sigma[1:]:
            assert torch.allclose(sigma[0], other, rtol=1e-12, atol=1e-12 * sigma[0].max().item())
