"""layers="auto": the parts that a person would name, and no measurement that ends over a part with nothing to
measure."""

import warnings

import pytest
import torch
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.model.stages import stage_layers


def test_a_plain_stack_answers_with_its_activations():
    stack = nn.Sequential(
        nn.Linear(2, 3), nn.Tanh(), nn.Dropout(),
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    assert stage_layers(stack) == ["1", "3", "5", "7"]
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1))
    assert stage_layers(convolutions) == ["1", "4"]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(x).tanh()


class Encoder(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layer = nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, x):
        for layer in self.layer:
            x = layer(x)
        return x


class Bert(nn.Module):
    """Large embeddings beside a trunk of blocks."""

    def __init__(self, vocabulary, depth):
        super().__init__()
        self.embeddings = nn.Sequential(nn.Embedding(vocabulary, 8), nn.LayerNorm(8))
        self.encoder = Encoder(8, depth)

    def forward(self, ids):
        return self.encoder(self.embeddings(ids))


@pytest.mark.parametrize("vocabulary", [5, 30, 60])
def test_blocks_are_the_stages_however_large_the_embeddings(vocabulary):
    assert stage_layers(Bert(vocabulary, 4)) == ["embeddings", *(f"encoder.layer.{i}" for i in range(4))]


class Never(Block):
    pass


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 4))

    def forward(self, x):
        return self.inner(torch.ones(len(x), 1))


class NoBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        return self.inner(x).mean(0)


class Odd(nn.Module):
    """Parts that never run, do not depend on x, or have no axis of samples: each would end a measurement by itself."""

    def __init__(self):
        super().__init__()
        self.first, self.never, self.time, self.table, self.last = (Block(4), Never(4), Constant(), NoBatch(), Block(4))

    def forward(self, x):
        self.table(torch.ones(3, 4))
        return self.last(self.first(x) + self.time(x))


def test_what_has_nothing_to_measure_is_left_out_with_a_word():
    model, x = Odd(), torch.randn(5, 4)
    assert stage_layers(model) == ["first", "never", "time", "table", "last"]
    probe = tgp.GeometryProbe(model)
    with pytest.warns(UserWarning, match="layers='auto' leaves out"):
        report = probe.measure(x)
    assert list(report) == ["first", "last"] == probe.layers
    assert set(report.left_out) == {"never", "time", "table"}
    assert "never (never ran)" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert list(probe.measure(x)) == ["first", "last"]
        plain = tgp.measure(model, x, layers=["first", "last"])
    for name, g in plain.items():
        assert torch.equal(g.log_volume, report[name].log_volume)


@pytest.mark.parametrize(
    ("name", "message"),
    [("never", "never fired"), ("time", "does not depend on it"), ("table", "first axis is not the batch")],
)
def test_what_is_asked_for_by_name_is_refused_by_name(name, message):
    for layers in (["first", name], ["auto", name]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what "auto" leaves out beside it
            with pytest.raises(tgp.ProbeError, match=message):
                tgp.measure(Odd(), torch.randn(5, 4), layers=layers)


def test_auto_leaves_out_beside_what_is_named_and_falls_back_on_the_output():
    model, x = Odd(), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="leaves out"):
        assert list(tgp.measure(model, x, layers=["auto", ""])) == ["first", "last", ""]

    class Windows(nn.Module):
        """All stages put out the windows of all samples beside the samples."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Pairs(), Pairs()])
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            both = x.repeat(3, 1), x
            for block in self.blocks:
                both = block(*both)
            return self.head(both[1])

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, windows, x):
            return windows + 1, self.inner(x)

    model = Windows()
    assert stage_layers(model) == ["blocks.0", "blocks.1"]
    with pytest.warns(UserWarning, match="the model's own output takes their place"):
        report = tgp.measure(model, x)
    assert list(report) == [""]
    with pytest.raises(tgp.ProbeError, match=r"take one:  transform=\{'blocks.0': lambda out: out\[1\]\}"):
        tgp.measure(model, x, layers="blocks.0")
    assert list(tgp.measure(model, x, layers="blocks.0", transform={"blocks.0": lambda out: out[1]})) == ["blocks.0"]


def test_cost_and_check_leave_out_the_same():
    with pytest.warns(UserWarning, match="leaves out"):
        checked = tgp.GeometryProbe(Odd()).check(torch.randn(5, 4))
    assert checked.ok
    assert list(checked.adjoint_errors) == ["first", "last"]
    assert "does not depend on it" in tgp.GeometryProbe(Odd(), layers=["time"]).check(torch.randn(5, 4)).refusal
    with pytest.warns(UserWarning, match="leaves out"):
        assert "first" in tgp.GeometryProbe(Odd()).cost(torch.randn(5, 4)).products


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_scripted_part_is_left_out():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert stage_layers(nn.Sequential(nn.Linear(4, 4), nn.Sequential(scripted))) == ["1"]
    model = nn.Module()
    model.a, model.b = Block(4), scripted
    model.forward = lambda x: model.b(model.a(x))
    with pytest.warns(UserWarning, match=r"leaves out 'b' \(is scripted\)"):
        assert tgp.GeometryProbe(model).layers == ["a"]
