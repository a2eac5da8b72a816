"""Drift: against closed forms and dense metrics; what it refuses; a monitor charts it."""

import copy

import pytest
import torch
from oracle import jacobians
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.linalg.directions import orthonormal_frame


def network():
    return nn.Sequential(nn.Linear(5, 13), nn.Tanh(), nn.Linear(13, 11)).double()


def test_every_distance_is_that_of_dense_metrics():
    model, x = network(), torch.randn(4, 5, dtype=torch.float64)
    drift, before = tgp.Drift(model, x, layers=["0", "2"], k=3, seed=2), copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    found, frame = drift.measure(), orthonormal_frame(3, 5, seed=2)
    for layer in ("0", "2"):
        g0, g1 = (
            torch.stack([frame @ j.T @ j @ frame.T for j in jacobians(m, [layer], x)[layer]])
            / m.get_submodule(layer).out_features
            for m in (before, model)
        )
        logs = torch.linalg.eigvals(torch.linalg.inv(g0) @ g1).real.log()
        torch.testing.assert_close(found[layer].distance, logs.square().mean(1).sqrt())
        torch.testing.assert_close(found[layer].volume, logs.sum(1) / 2)
        torch.testing.assert_close(found[layer].shape, logs.std(1, correction=0))
        torch.testing.assert_close(found[layer].relative, (g1 - g0).flatten(1).norm(dim=1) / g0.flatten(1).norm(dim=1))


def test_a_scale_has_no_shape_and_another_network_is_a_ruler():
    model, x = network(), torch.randn(4, 5, dtype=torch.float64)
    drift = tgp.Drift(model, x, layers="2", k=3)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[2].weight.mul_(3)
    moved = drift.measure(twin)["2"]
    torch.testing.assert_close(moved.distance.exp(), torch.full((4,), 9.0, dtype=torch.float64))
    assert moved.shape.max() < 1e-6
    assert drift.measure()["2"].distance.max() < 1e-6
    assert drift.measure(network())["2"].distance.min() > 0.05


def test_a_resumed_run_goes_on_from_the_same_beginning():
    model, x = network(), torch.randn(4, 5, dtype=torch.float64)
    drift = tgp.Drift(model, x, layers="2", k=3)
    state = drift.state_dict()
    nn.init.normal_(model[2].weight)
    resumed = tgp.Drift(model, x, layers="2", k=3)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.measure()["2"].distance, drift.measure()["2"].distance)
    with pytest.raises(tgp.ProbeError, match="another x_probe"):
        tgp.Drift(model, x + 1, layers="2", k=3).load_state_dict(state)
    with pytest.raises(tgp.ProbeError, match="another seed"):
        tgp.Drift(model, x, layers="2", k=3, seed=1).load_state_dict(state)
    with pytest.raises(tgp.ProbeError, match="another set of layers"):
        tgp.Drift(model, x, layers="0", k=3).load_state_dict(state)
    with pytest.raises(tgp.ProbeError, match=r"lacks \['metrics'"):
        resumed.load_state_dict({"k": 3})


def test_what_has_no_distance_is_refused():
    model, x = network(), torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(tgp.ProbeError, match="n=11 features and k=12"):
        tgp.Drift(nn.Sequential(nn.Linear(20, 11)), torch.randn(2, 20), layers="0", k=12)
    with torch.no_grad():
        model[0].weight[:, 1:] = 0
    with pytest.raises(tgp.ProbeError, match=r"layer '2' is singular at 4 of 4 samples.*\n.*k=1"):
        tgp.Drift(model, x, layers="2", k=3)
    with pytest.raises(tgp.ProbeError, match="Leave out estimator="):
        tgp.Drift(model, x, layers="2", k=3, estimator="exact")
    deeper = nn.Sequential(nn.Linear(5, 13), nn.Tanh(), nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 7))
    drift = tgp.Drift(deeper, x.float(), layers=nn.Linear, k=3)
    with pytest.raises(tgp.ProbeError, match="the layers are now '0', '2'; g₀ is of '0', '2', '4'"):
        drift.measure(network().float())


class Numbers(tgp.Writer):
    def __init__(self, *, fails=False):
        self.found, self.fails = {}, fails

    def write_scalar(self, tag, value, step):
        if self.fails and tag.startswith("drift/"):
            raise OSError(28, "No space left on device")
        self.found[tag, step] = value


def moved(model, x, steps, **options):
    """A monitor over so many steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with tgp.Monitor(model, x, layers=["0", "2"], every=1, drift=True, **options) as monitor:
        monitor.probe_now()
        monitor.follow(optimizer)
        for _ in range(steps):
            model(x).square().sum().backward()
            optimizer.step()
    return monitor


def test_a_monitor_charts_it():
    writer = Numbers()
    monitor = moved(network(), torch.randn(4, 5, dtype=torch.float64), 1, writer=writer)
    distance = monitor.drift.measure()["2"].distance.median()
    assert distance > 0.01
    assert monitor.failures == 0
    assert writer.found["drift/01_2", 1] == pytest.approx(float(distance))
    assert writer.found["drift/01_2", 0] < 1e-6


def test_a_writer_that_fails_starves_no_other():
    healthy = Numbers()
    model, x = network(), torch.randn(4, 5, dtype=torch.float64)
    monitor = tgp.Monitor(model, x, layers=["0"], drift=True, writer=[Numbers(), healthy])
    monitor.probe_now()
    monitor.writers[0].fails = True
    with pytest.warns(RuntimeWarning, match="No space left"):
        monitor.probe_now()
    assert healthy.found["geometry/failures", 0] == 0
    assert "drift/00_0" in {tag for tag, _ in healthy.found}
    healthy.found.clear()
    monitor.probe_now()
    assert ("drift/00_0", 0) in healthy.found


def test_a_resumed_monitor_goes_on_from_the_same_beginning(tmp_path):
    model, x = network(), torch.randn(4, 5, dtype=torch.float64)
    first = moved(model, x, 2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    expected = first.drift.measure()["2"].distance
    resumed = tgp.Monitor(model, x, layers=["0", "2"], drift=True)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.state_dict()["drift"].keys() == first.state_dict()["drift"].keys()  # also before its first probe
    resumed.probe_now()
    assert resumed.failures == 0
    assert torch.equal(resumed.drift.measure()["2"].distance, expected)


def test_the_options_of_a_probe_hold_for_drift_and_maps():
    model, x = network(), torch.randn(4, 5, dtype=torch.float64)
    cut = {"2": lambda y: y[:, :6]}
    with tgp.GeometryProbe(model, layers="2", transform=cut, normalize=False, estimator=tgp.Exact()) as probe:
        monitor = tgp.Monitor(probe, x, drift=True, on_error="raise")
        monitor.probe_now()
        found = monitor.drift.state_dict()["metrics"]["2"]
        own = tgp.Drift(model, x, layers="2", transform=cut, normalize=False).state_dict()["metrics"]["2"]
        assert torch.equal(found, own)
        assert torch.equal(tgp.Drift(probe, x).state_dict()["metrics"]["2"], own)

        class Album(tgp.Writer):
            def write_map(self, tag, result, step):
                self.result = result

        album, line = Album(), tgp.Line(x[0], x[1], steps=3)
        tgp.Monitor(probe, x, writer=album, maps={"line": line}, on_error="raise").probe_now()
    wanted = tgp.scan(model, line, layers="2", transform=cut, normalize=False)  # along its own tangents
    assert torch.equal(album.result.log_volume["2"], wanted.log_volume["2"])
