"""Boundaries while they form: fixed pairs, crossings of now, the numbers of a study, charts."""

import copy
import math

import pytest
import torch
from annotations import shapes_unchecked
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.monitor.boundary import BoundaryWatch


def net(classes=6):
    return nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, classes))


class Scalars(tgp.Writer):
    def __init__(self):
        self.found, self.studies = [], []

    def write_study(self, study, step):
        self.studies.append((step, study))

    def write_scalar(self, tag, value, step):
        self.found.append((tag, value, step))


def test_curves_of_a_training():
    torch.manual_seed(0)
    model, x = net(), 2 * torch.randn(200, 2)
    labels = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long() + 2 * (x[:, 1] > 1).long()
    optimizer, writer = torch.optim.Adam(model.parameters(), lr=0.02), Scalars()
    alone = copy.deepcopy(model)
    other = torch.optim.Adam(alone.parameters(), lr=0.02)
    options = {"layers": ["1"], "every": 20, "writer": writer, "boundary": x[100:], "on_error": "raise"}
    with tgp.Monitor(model, x[:5], **options).follow(optimizer) as monitor:
        for network, steps in ((model, optimizer), (alone, other)):
            for _ in range(60):
                steps.zero_grad()
                nn.functional.cross_entropy(network(x[:100]), labels[:100]).backward()
                steps.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    charts = [(value, step) for tag, value, step in writer.found if tag == "boundary/00_1"]
    assert [step for _, step in charts] == [step for step, _ in monitor.boundary.history]
    assert charts[-1][1] == 60
    assert all(math.isfinite(value) for value, _ in charts)
    assert writer.studies == monitor.boundary.history
    last = writer.studies[-1][1]["1"]
    assert float(last.estimate) == charts[-1][0]
    assert list(last.profile) == [-0.2, -0.1, 0.0, 0.1, 0.2]
    assert last.supported is None  # a raw contrast: of one network it is no verdict


def test_the_number_is_the_contrast_of_the_path_at_its_crossing():
    torch.manual_seed(1)
    # of fewer than five predicted classes the study removes their trend, and is no plain mean
    model, x = net(24).double().requires_grad_(False), 2 * torch.randn(120, 2, dtype=torch.float64)
    assert len(model(x).argmax(1).unique()) >= 5
    watch, probe = BoundaryWatch(x), tgp.GeometryProbe(model, layers=["1"])
    study = watch.measured(probe, 0)
    effect = study["1"]
    layer, values = model[:2], []
    for i, j in watch._ends.tolist():
        found = tgp.boundary_points(model, x[i : i + 1], x[j : j + 1], near="middle")
        speeds = [
            torch.func.jvp(layer, ((x[i] + t * (x[j] - x[i]))[None],), ((x[j] - x[i])[None],))[1].norm().log()
            for t in (found.t.item(), 1 - found.t.item())
        ]
        values.append(float(speeds[0] - speeds[1]))
    assert float(effect.estimate) == pytest.approx(sum(values) / len(values), abs=1e-9)
    before = watch._ends.clone()
    state = tgp.Monitor(probe, x[:3], boundary=x).state_dict()
    assert state["boundary"]["pairs"] is None
    resumed, other = tgp.Monitor(probe, x[:3], boundary=x), tgp.Monitor(probe, x[:3], boundary=x + 1)
    for monitor in (resumed, other):
        monitor.load_state_dict({**state, "boundary": watch.state_dict()})
    assert torch.equal(resumed.boundary._ends, before)
    assert other.boundary._ends is None
    model[2].bias[0] += 0.5  # boundaries move, the pairs do not
    watch.measured(probe, 1)
    assert torch.equal(watch._ends, before)
    model[2].bias[0] += 1e6  # one class
    assert watch.measured(probe, 2) is None
    assert [step for step, _ in watch.history] == [0, 1]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.middle, self.act, self.head = nn.Linear(2, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
        self.constant = nn.Identity()

    def forward(self, x):
        self.constant(torch.zeros_like(x))
        return self.head(self.act(self.middle(self.act(self.into(x)))))


def test_a_layer_that_fires_twice_has_two_charts_and_one_that_is_constant_none():
    torch.manual_seed(2)
    model, x, writer = Twice().requires_grad_(False), 2 * torch.randn(90, 2), Scalars()
    monitor = tgp.Monitor(model, x[:4], layers=["act"], writer=writer, boundary=x, on_error="raise")
    monitor.probe_now()
    monitor.probe_now()  # nothing has changed: of two or three classes the same clusters, too
    (_, first), (_, second) = monitor.boundary.history
    assert {tag for tag, *_ in writer.found if tag.startswith("boundary/")} == {"boundary/00_act", "boundary/01_act_1"}
    assert [effect.record() for effect in first.values()] == [effect.record() for effect in second.values()]
    still = BoundaryWatch(x)
    flat = tgp.GeometryProbe(nn.Sequential(nn.Linear(2, 3), nn.Hardtanh(-1e-3, 1e-3), nn.Linear(3, 3)), layers=["1"])
    assert still.charts(still.measured(flat, 0)) == {}
    assert not still.history


def test_what_is_no_set_of_samples_is_refused():
    for wrong in (torch.zeros(30, 2, dtype=torch.long), torch.zeros(5, 2), [1.0], torch.full((30, 2), torch.nan)):
        with shapes_unchecked(), pytest.raises(tgp.ProbeError, match=r"boundary= takes 20 held-out.*\n.*x_held_out"):
            tgp.Monitor(net(), torch.randn(3, 2), boundary=wrong)
