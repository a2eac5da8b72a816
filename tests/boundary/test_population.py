"""The population test: closed forms, what must change nothing, what is refused, and digits."""

import copy
import dataclasses
import math
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import scipy
import torch
from annotations import shapes_unchecked
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.boundary import design, inference, population
from torchgeom_probe.boundary.paired import Estimate
from torchgeom_probe.boundary.pairs import Pairs
from torchgeom_probe.slices.resume import Parts


class Graph(nn.Module):
    """Φ(x) = (x, tanh(w·x)), whose speed along v is √(|v|² + tanh'(w·x)² (w·v)²); class 1 where w·x > 0."""

    def __init__(self, w, affine=False):
        super().__init__()
        self.w, self.layer = w, nn.Identity()
        self.phi = (lambda z: 3 * z) if affine else torch.tanh

    def forward(self, x):
        z = x @ self.w[:, None]
        self.layer(torch.cat([x, self.phi(z)], 1))
        return torch.cat([-z, z], 1)


def net(classes=7, dtype=torch.float64):
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 11), nn.Tanh(), nn.Linear(11, classes)).to(dtype)


def study(model, x, **options):
    return tgp.boundary_study(model, x, **{"pairs": 24, "layers": ["1", "3"], "progress": False} | options)


def numbers(effect):
    """Everything of an effect that random directions have no part in."""
    return [
        value
        for tested in (effect.own, effect.volume, effect.margin_slope)
        for value in (tested.estimate, *tested.estimate.interval, tested.p_value)
    ]


@pytest.fixture
def x():
    return 2 * torch.randn(300, 5, dtype=torch.float64)


def log_speed(z, slope):
    return 0.5 * math.log(1 + ((1 - math.tanh(z) ** 2) * slope) ** 2)


@pytest.mark.parametrize("contrast", ["mirror", "peak"])
def test_a_layer_whose_profile_is_known(contrast):
    x = torch.zeros(60, 2, dtype=torch.float64)
    # w·x along the lines: from -1 to 3, or from 1 to -3, through 0 at t = 1/4 (those through 1/2 are left out)
    x[:, 1] = torch.tensor([-1.0, 3.0, 1.0, -3.0]).double().repeat(15)
    w = torch.tensor([0.5, 1.0], dtype=torch.float64)
    found = tgp.boundary_study(
        Graph(w), x, layers="layer", contrast=contrast, offsets=(-0.2, 0.1), pairs=20, progress=False
    )["layer"]

    def at(t, turned=False):
        return log_speed(4 * t - 1, 1.0)

    middle = (at(0.45) + at(0.05)) / 2, (at(0.95) + at(0.55)) / 2
    peak = at(0.25) - middle[0] - at(0.75) + middle[1]
    assert float(found.estimate) == pytest.approx(at(0.25) - at(0.75) if contrast == "mirror" else peak, abs=2e-3)
    # A line is walked either way: what is at +s of one is at -s of the other.
    for offset, value in found.profile.items():
        ends = sorted(at(0.25 + sign * offset) - at(0.25) for sign in (-1, 1))
        assert ends[0] - 1e-3 <= value <= ends[1] + 1e-3, offset
    assert set(found.profile) == {-0.2, 0.0, 0.1}
    assert found.volume.estimate > 0
    assert found.dimensions == 2


@pytest.mark.parametrize("contrast", ["mirror", "peak", "same_class"])
def test_an_affine_layer_has_no_effect(contrast):
    x = torch.randn(200, 3, dtype=torch.float64)
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = tgp.boundary_study(Graph(w, affine=True), x, layers="layer", contrast=contrast, pairs=30, progress=False)
    effect = found["layer"]
    assert (float(effect.estimate), effect.p_value) == (0.0, 1.0)
    assert effect.margin_slope.p_value == 1.0
    assert all(abs(value) < 1e-9 for value in effect.profile.values())


def test_turning_the_lines_changes_nothing(x, monkeypatch):
    model = net()
    expected = study(model, x)
    drawn = design.crossing_pairs

    def turned(*args, **options):
        pairs = drawn(*args, **options)
        ends = {name: getattr(pairs, name).flip(1) for name in ("ends", "classes", "units", "regions")}
        return dataclasses.replace(pairs, **ends, t=1 - pairs.t)

    monkeypatch.setattr(design, "crossing_pairs", turned)
    found = study(model, x)
    for layer, effect in found.items():
        assert numbers(effect) == pytest.approx(numbers(expected[layer]), abs=1e-9)
        assert list(effect.profile.values()) == pytest.approx(list(expected[layer].profile.values())[::-1], abs=1e-9)


def test_rotating_the_input_and_relabelling_the_classes_changes_nothing(x):
    model = net()
    expected = study(model, x)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    other, order = copy.deepcopy(model), torch.randperm(7)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight @ rotation.T)
        other[4].weight.copy_(model[4].weight[order])
        other[4].bias.copy_(model[4].bias[order])
    found = study(other, x @ rotation.T)
    for layer, effect in found.items():
        assert numbers(effect) == pytest.approx(numbers(expected[layer]), abs=1e-8)


def test_a_network_against_itself_has_no_effect_and_against_another_the_difference(x):
    model, initial = net(), net()
    alone = study(model, x)
    assert study(model, x, initial=copy.deepcopy(model))["3"].estimate == 0
    found = study(model, x, initial=initial)["3"]
    assert float(found.own.estimate) == pytest.approx(float(alone["3"].estimate))
    assert float(found.estimate) == pytest.approx(float(found.own.estimate - found.initial.estimate))
    assert alone["3"].supported is None
    assert "not tested: give the untrained network as initial=" in str(alone["3"])
    assert found.supported is (found.p_value < 0.05 and found.estimate > 0)
    assert "trained minus untrained" in str(found)
    assert "speed |Jv| along the line (no volume)" in str(found)
    assert found.initial_profile.keys() == found.profile.keys()


def test_pairs_are_disjoint_unless_they_share_and_keep_out_of_groups(x):
    classes = torch.randint(3, (101,))
    groups = torch.arange(101) // 4
    options = {"reach": 0.0, "apart": 0.0, "readout": None, "seed": 0}

    class Labels(nn.Module):
        def forward(self, rows):
            return nn.functional.one_hot(rows[:, 0].round().long().clamp(0, 2), 3).double()

    rows = classes[:, None].double().expand(-1, 2)
    alone = design.crossing_pairs(Labels(), rows, classes, groups, count=1000, share=False, **options)
    assert len(alone.ends.unique()) == alone.ends.numel() > 80  # of 101, all but those that met no other class
    shared = design.crossing_pairs(Labels(), rows, classes, groups, count=150, share=True, **options)
    assert len(shared.ends) == len(shared.ends.sort(1).values.unique(dim=0)) == 150
    for pairs in (alone, shared):
        assert (pairs.classes[:, 0] != pairs.classes[:, 1]).all()
        assert (pairs.units[:, 0] != pairs.units[:, 1]).all()
        assert torch.equal(pairs.units, groups[pairs.ends])


def test_a_tie_that_the_batch_decides_is_left_out_and_counted():
    x, model = torch.randn(40, 2), nn.Linear(2, 2)
    classes = model(x).argmax(1)
    one = classes.clone()
    one[3] = 1 - one[3]  # as it was predicted in another batch
    options = {"count": 100, "share": True, "reach": 0.05, "apart": 0.0, "readout": None, "seed": 0}
    pairs = design.crossing_pairs(model, x, one, torch.arange(40), **options)
    assert 3 not in pairs.ends
    assert pairs.dropped["a tie of two logits, which the size of the batch decides"] > 0
    assert len(pairs.ends) == 100


def test_the_units_are_those_that_give_the_wider_interval(x):
    model = net()
    by_groups = study(model, x, groups=[f"photo {i // 50}" for i in range(300)])["1"]
    assert (by_groups.units, by_groups.num_units) in [("samples or groups", 6), ("predicted classes", 7)]
    two = study(net(classes=2), x)["1"]
    assert (two.units, two.num_units) in [("regions of the input", 6), ("samples or groups", 2 * two.num_pairs)]


def test_samples_are_clustered_where_few_classes_are_predicted():
    x = torch.randn(60, 4) + 20 * torch.arange(6).repeat(10)[:, None]  # six heaps
    classes = (torch.arange(60) % 6 >= 3).long()

    class Halves(nn.Module):
        def forward(self, rows):
            middle = rows.mean(1, keepdim=True) - 50
            return torch.cat([-middle, middle], 1)

    options = {"count": 25, "share": False, "reach": 0.0, "apart": 0.0, "readout": None, "seed": 0}
    pairs = design.crossing_pairs(Halves(), x, classes, torch.arange(60), **options)
    assert pairs.regions_are == "regions of the input"
    heaps = pairs.ends % 6
    assert all(len(pairs.regions[heaps == heap].unique()) == 1 for heap in range(6))  # no heap is cut


def test_it_goes_on_after_a_kill_and_loads_what_is_done(x, tmp_path, monkeypatch):
    model, path = net(), tmp_path / "study.json"
    options = {"pairs": 40, "path": path, "initial": net(), "estimator": "subspace:2"}
    expected = study(model, x, **options | {"path": None})
    put, chunks, alive = Parts.put, [], [2]

    def killed(self, index, data):
        if len(chunks) == alive[0]:
            raise KeyboardInterrupt
        chunks.append((self.prefix.partition("-")[0], index))
        put(self, index, data)

    monkeypatch.setattr(Parts, "put", killed)
    for alive[0] in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            study(model, x, **options)
        assert [prefix == "crossings" for prefix, _ in chunks] == [True, False][: alive[0]]
    alive[0] = -1
    found = study(model, x, **options)
    assert len(set(chunks)) == len(chunks) > 2  # none twice
    assert dict(found) == dict(expected)
    assert [p.name for p in tmp_path.iterdir()] == ["study.json"]
    monkeypatch.setattr(population, "_chunks", None)  # not measured again
    (tmp_path / "study.json.parts").mkdir()  # as a kill between the last two steps leaves it
    assert dict(study(model, x, **options)) == dict(expected)
    with pytest.raises(tgp.ProbeError, match=r"another boundary_study: its seed differ.*\n.*another.json"):
        study(model, x, **options | {"seed": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["study.json"]
    for other in ({"mode": "as_is"}, {"precision": "bf16"}):
        with pytest.raises(tgp.ProbeError, match=f"another boundary_study: its {next(iter(other))} differ"):
            study(model, x, **options | other)


def test_what_is_kept_is_of_the_same_pairs(x, tmp_path, monkeypatch):
    """A class that another device sees otherwise draws other pairs, to which no crossing that was kept belongs."""
    model, path = net(), tmp_path / "study.json"
    put = Parts.put

    def killed(self, index, data):
        put(self, index, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        study(model, x, path=path)
    monkeypatch.setattr(Parts, "put", put)
    decide = design.predicted

    def otherwise(*arguments):
        found = decide(*arguments)
        near = found["margin"].argsort()[:60]  # the other ones of their two classes
        found["predictions"][near] = model(x)[near].topk(2).indices[:, 1]
        return found

    monkeypatch.setattr(design, "predicted", otherwise)
    resumed, fresh = study(model, x, path=path), study(model, x)
    assert dict(resumed) == dict(fresh)


def test_a_refusal_deletes_what_it_made_alone(x, tmp_path, monkeypatch):
    path, put = tmp_path / "study.json", Parts.put

    def with_readout(readout):  # all of them are the same to the settings
        return study(net(), x, path=path, readout=lambda z: readout(z))

    with pytest.raises(IndexError):
        with_readout(lambda z: z[:, 99])
    with pytest.raises(tgp.ProbeError, match="one number a sample"):
        with_readout(lambda z: z[:, :1])
    assert not list(tmp_path.iterdir())

    def killed(self, index, data):
        put(self, index, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "put", killed)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        with_readout(lambda z: z)
    kept = sorted(p.name for p in path.with_name("study.json.parts").iterdir())
    torch.manual_seed(1)
    with pytest.raises(tgp.ProbeError, match="one number a sample"):
        with_readout(lambda z: z[:, :1])
    assert sorted(p.name for p in path.with_name("study.json.parts").iterdir()) == kept


def test_the_untrained_network_is_measured_as_the_trained_one_is(x):
    with tgp.GeometryProbe(net(), layers=["1"], mode="as_is", normalize=False, precision="bf16") as probe:
        like = population._like(probe, net(), replay=False)
    for name in ("layers", "mode", "normalize", "precision", "engine"):
        assert getattr(like, name) == getattr(probe, name), name


def test_a_study_is_saved_whole_and_says_it_in_a_table(x, tmp_path):
    found = study(net(), x, initial=net())
    again = tgp.BoundaryStudy.load(found.save(tmp_path / "study.json"))
    assert dict(again) == dict(found)
    assert again["1"].estimate.interval == found["1"].estimate.interval
    assert again["1"].profile[0.2].interval == found["1"].profile[0.2].interval
    assert again.settings == found.settings
    assert str(found).splitlines()[0].startswith("layer  effect [nat]")
    assert str(found["3"].estimate) in str(found)
    assert "switches" not in str(found)  # of ReLU alone
    assert f"effect: {found['3'].compared}." in str(found)
    assert "trained alone" in str(found).splitlines()[0]
    assert len(repr(found)) < 120
    assert "<table>" in found._repr_html_()
    with pytest.raises(KeyError, match="'5' was not studied"):
        found["5"]
    with pytest.raises(tgp.ProbeError, match=r"no saved BoundaryStudy.*\n.*\.save"):
        tgp.BoundaryStudy.load(tmp_path / "none.json")


def test_networks_as_units_are_a_t_test_over_their_estimates(x):
    studies = [study(net(), x, initial=net(), estimator="subspace:1") for _ in range(4)]
    found = tgp.compare_networks(studies)
    for layer, effect in found.items():
        values = [float(s[layer].estimate) for s in studies]
        expected = scipy.stats.ttest_1samp(values, 0)
        assert effect.p_value == pytest.approx(expected.pvalue)
        assert effect.estimate.interval == pytest.approx(tuple(expected.confidence_interval()))
        assert float(effect.profile[0.3]) == pytest.approx(sum(s[layer].profile[0.3] for s in studies) / 4)
        assert (effect.units, effect.num_units) == ("networks", 4)
        assert "over 4 networks" in str(effect)
    with pytest.raises(tgp.ProbeError, match=r"at least 3 studies; got 2"):
        tgp.compare_networks(studies[:2])
    with pytest.raises(tgp.ProbeError, match="differ in their layers, their contrast"):
        tgp.compare_networks([*studies, study(net(), x)])
    other = study(net(), x, initial=net(), estimator="subspace:2")  # one mean of two volumes would be of neither
    with pytest.raises(tgp.ProbeError, match="their volume"):
        tgp.compare_networks([*studies, other])


def test_digits_are_magnified_near_the_boundary():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 128), nn.Sigmoid(), nn.Linear(128, 10))
    initial, optimizer = copy.deepcopy(model), torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        for batch in torch.randperm(1000).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    found = study(model, images[1000:], layers=["1"], initial=initial, estimator="subspace:2", pairs=100)["1"]
    assert found.supported
    assert found.verdict == "larger near the boundary"
    assert found.volume.estimate > 0
    assert found.profile[0.4] < found.initial_profile[0.4] - 0.05
    assert found.num_pairs >= 60


REFUSED = [
    ({"groups": [1, 2]}, r"groups has 2 entries for 300 samples.*\n.*groups="),
    ({"groups": torch.arange(300) % 4}, r"of 4 samples or groups; the test needs 10 of 5"),
    ({"contrast": "edge"}, r"contrast='edge' is unknown.\nWrite one of 'mirror', 'peak', 'same_class'"),
    ({"pairs": 3}, r"pairs=3: the test needs at least 10"),
    ({"offsets": (2.0,)}, r"offsets=\[2.0\] are in units of the line"),
    ({"initial": nn.Sequential(nn.Linear(5, 3), nn.Tanh())}, r"initial= has other layers.*'3'.*\n.*copy.deepcopy"),
    ({"initial": "random"}, r"initial='random' is no network.*\n.*copy.deepcopy\(model\).*reset_parameters"),
    ({"source": "0"}, r"source='0': a line between samples lies in the model's input.*\n.*boundary_study\(head"),
    ({"pair": 5}, r"'pair' is no option of boundary_study.*\nDid you mean pairs="),
    ({"readout": lambda z: z[:, :1]}, r"one number a sample.*\n.*readout=lambda z"),
    ({"readout": lambda z: z[:, :, None]}, r"\[B, C\].*\n.*readout=lambda output"),
    ({"readout": lambda z: z * 0}, r"predicted as one class \(0\), so no boundary lies between.*\n.*several classes"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(list(options)) + m[:12] for options, m in REFUSED])
def test_refusals(x, options, message):
    with shapes_unchecked(), pytest.raises(tgp.ProbeError, match=message):
        study(net(), x, **options)


def test_samples_that_cannot_be_studied(x):
    odd = x.clone()
    odd[[7, 9], 2] = math.nan
    for samples, message in (
        (odd, r"2 of 300 samples are not finite \(the first is number 7\).*\n.*isfinite"),
        (x.long(), r"floating tensor \[B, \*input\]; it is torch.int64"),
        (x[:14], r"usable pairs of \d+ samples or groups; the test needs 10 of 5.*\n.*share=True"),
    ):
        with shapes_unchecked(), pytest.raises(tgp.ProbeError, match=message):
            study(net(), samples)


def test_a_dead_layer_is_refused_by_name_and_partly_dead_lines_are_counted(x):
    class Dead(nn.Module):
        def __init__(self, threshold):
            super().__init__()
            self.threshold, self.layer, self.head = threshold, nn.Identity(), nn.Linear(5, 7).double()

        def forward(self, x):
            self.layer((x - self.threshold).relu())
            return self.head(x)

    with pytest.raises(tgp.ProbeError, match=r"layer 'layer': 0 usable pairs.*log-volume not finite"):
        study(Dead(100.0), x, layers=["layer"])
    some = study(Dead(1.5), x, layers=["layer"], pairs=100)["layer"]
    assert some.dropped["log-volume not finite"] > 0
    assert math.isfinite(some.estimate)
    assert "pairs (log-volume not finite)" in str(some)


def test_the_margin_slope_is_a_regression_through_the_origin():
    count = 30
    ends, one = torch.arange(2 * count).reshape(count, 2), torch.zeros(count, 2, dtype=torch.long)
    pairs = Pairs(ends, ends, ends, torch.full((count,), 0.3), one, "predicted classes", {})
    margins, noise = torch.rand(count, 2).double(), 0.1 * torch.randn(count).double()
    run = margins[:, 1] - margins[:, 0]
    speed = torch.stack([torch.zeros(count), torch.zeros(count), margins[:, 0], margins[:, 1]], 1).double()
    speed[:, 3] = speed[:, 2] - 0.4 * run + noise
    points, weights = torch.zeros(count, 4, 1), torch.tensor([1.0, -1.0], dtype=torch.float64)
    laid_out = design.Design(pairs, points, points[:, 0], weights, torch.ones(count, 4, dtype=torch.bool), margins)
    found = inference.effect_of("layer", inference.LayerFields({"speed": speed}), laid_out, "mirror", ()).margin_slope
    slope = (run * (noise - 0.4 * run)).sum() / run.square().sum()
    residual = noise - 0.4 * run - slope * run
    error = (run * residual).norm() / run.square().sum() * (count / (count - 1)) ** 0.5
    margin = float(error) * scipy.stats.t.ppf(0.975, count - 1)
    assert float(found.estimate) == pytest.approx(float(slope))
    assert found.estimate.interval == pytest.approx((float(slope) - margin, float(slope) + margin))


def test_the_verdict_knows_too_few_from_none(x):
    effect = study(net(), x, initial=net())["1"]

    def verdict(value, half, p_value):
        estimate = Estimate(value, (value - half, value + half))
        return dataclasses.replace(effect, estimate=estimate, p_value=p_value, num_units=20).verdict

    assert verdict(0.3, 0.1, 0.01) == "larger near the boundary"
    assert verdict(-0.3, 0.1, 0.01) == "the opposite, smaller near the boundary"
    assert verdict(0.02, 0.05, 0.4) == "no difference found, and none above 0.07 nats"
    assert verdict(0.02, 0.2, 0.8) == f"too few to tell: ± 0.1 nats takes about 80 {effect.units}"


def test_of_two_classes_a_trend_between_them_is_no_effect_and_what_is_at_the_boundary_is():
    count = 200
    t, ends, one = torch.rand(count).double(), torch.arange(2 * count).reshape(count, 2), torch.zeros(count, 2).long()
    classes = torch.tensor([[0, 1], [1, 0]]).repeat(count // 2, 1)
    sign = (classes[:, 1] - classes[:, 0]).double()
    t = torch.where(sign > 0, 0.2 + 0.4 * t, 0.8 - 0.4 * t)  # nearer to class 0, on average
    pairs = Pairs(ends, classes, ends, t, one, "regions of the input", {})
    points, weights = torch.zeros(count, 4, 1), torch.tensor([1.0, -1.0], dtype=torch.float64)
    within = torch.ones(count, 4, dtype=torch.bool)
    laid_out = design.Design(pairs, points, points[:, 0], weights, within, torch.rand(count, 2))

    def found(at_boundary):
        places = torch.stack([t, 1 - t, torch.zeros(count), torch.ones(count)], 1)
        speed = 2.0 * sign[:, None] * places + 0.1 * torch.randn(count, 4)
        speed[:, 0] += at_boundary
        return inference.effect_of("layer", inference.LayerFields({"speed": speed}), laid_out, "mirror", ())

    null, planted = found(0.0), found(0.2)
    assert abs(null.estimate) < 4 * 0.1 * (2 / count) ** 0.5 * 1.5
    assert null.p_value > 0.01
    assert planted.estimate.interval[0] < 0.2 < planted.estimate.interval[1]
    assert planted.p_value < 1e-6
    same = dataclasses.replace(laid_out, pairs=dataclasses.replace(pairs, t=torch.where(sign > 0, 0.3, 0.7).double()))
    fields = inference.LayerFields({"speed": torch.randn(count, 4)})
    with pytest.raises(tgp.ProbeError, match=r"nearer to the same class on every line.*\n.*contrast='peak'"):
        inference.effect_of("layer", fields, same, "mirror", ())


def test_the_switches_of_relu_units_are_counted_along_the_line(x):
    class Units(nn.Module):
        """Units that switch at w·x = 0.3 and -0.3, a boundary at 0: near it a short step meets none of them."""

        def __init__(self, act):
            super().__init__()
            self.act = act

        def forward(self, x):
            z = x[:, :1]
            self.act(torch.cat([z, z + 0.1, z - 0.1, z - 0.4], 1))
            return torch.cat([-z, z, z * 0 - 9], 1)

    rows = torch.randn(400, 3).double()
    for act in (nn.ReLU(), nn.Tanh()):
        effect = tgp.boundary_study(Units(act), rows, layers=["act"], pairs=60, progress=False)["act"]
        assert (effect.switches is None) == isinstance(act, nn.Tanh)
    effect = tgp.boundary_study(Units(nn.ReLU()), rows, layers=["act"], pairs=60, progress=False)["act"]
    # At every crossing exactly one of the four units switches within ± 0.01 of the line (0.25 / 0.02 per line), and at
    # the mirrored point few do.
    assert 6 < effect.switches.estimate < 13
    assert "share of ReLU units that switch" in str(effect)
    assert f"{effect.switches.estimate}" in str(tgp.BoundaryStudy({"act": effect}, settings={}))


def test_units_that_are_on_in_a_whole_chunk_are_relu_units_all_the_same():
    class Units(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            z = x[:, :1]
            self.act(torch.cat([z, z + 5], 1))
            return torch.cat([-z, z], 1)

    rows = torch.randn(90, 3).double()
    rows[:, 0] = torch.tensor([-1.0, 3.0]).double().repeat(45)  # 0 at the crossing, 2 at the mirrored point
    found = tgp.boundary_study(Units(), rows, layers=["act"], contrast="peak", pairs=33, progress=False)["act"]
    # One of two units within ± 0.01 of the line, and none at the five other places.
    assert float(found.switches.estimate) == pytest.approx(0.5 / 0.02)


def test_a_layer_that_is_dead_at_the_samples_has_no_slope_and_a_result_all_the_same():
    count = 30
    ends, one = torch.arange(2 * count).reshape(count, 2), torch.zeros(count, 2, dtype=torch.long)
    pairs = Pairs(ends, ends, ends, torch.full((count,), 0.3), one, "predicted classes", {})
    speed = torch.randn(count, 4, dtype=torch.float64)
    speed[:, 2:] = -math.inf
    points, weights = torch.zeros(count, 4, 1), torch.tensor([1.0, -1.0], dtype=torch.float64)
    within, margins = torch.ones(count, 4, dtype=torch.bool), torch.rand(count, 2).double()
    laid_out = design.Design(pairs, points, points[:, 0], weights, within, margins)
    found = inference.effect_of("layer", inference.LayerFields({"speed": speed}), laid_out, "mirror", ())
    assert math.isnan(found.margin_slope.estimate)
    assert found.num_pairs == count
    assert "layer: not tested" in str(found)


RANKS = textwrap.dedent(
    """
    import os, sys, torch
    from torch import nn
    import torchgeom_probe as tgp
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, target = torch.distributed.get_rank(), sys.argv[1]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 7))
    x = 2 * torch.randn(300, 5)
    options = {"layers": ["1"], "pairs": 100, "progress": False}
    shared = tgp.boundary_study(model, x, distributed=True, path=target, **options)
    assert dict(shared) == dict(tgp.boundary_study(model, x, **options)), rank
    try:
        tgp.boundary_study(model, x + rank, distributed=True, **options)
    except tgp.ProbeError as error:
        assert "ranks [1] studied another model or other samples" in str(error)
    else:
        raise AssertionError("not refused")
    torch.distributed.destroy_process_group()
    """
)


@pytest.mark.slow
def test_two_ranks_share_the_pairs_and_both_have_the_study(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANKS, str(tmp_path / "study.json")]
    processes = [subprocess.Popen(command, env={**common, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_ranks_without_a_process_group_are_refused(x):
    with pytest.raises(tgp.ProbeError, match=r"there is no process group.*\n.*init_process_group"):
        study(net(), x, distributed=True)
