"""Scans: values against a float64 Jacobian and its SVD, decisions against plain Python; no other process waited
for."""

import math
import os
import socket
import subprocess
import sys
import textwrap

import oracle
import pytest
import torch
from annotations import shapes_unchecked
from scans import line, mlp, plane, same
from torch import nn
from unseen import Notes

from torchgeom_probe import Exact, GeometryProbe, ProbeError
from torchgeom_probe.slices.scan import scan


@pytest.mark.parametrize("make", [line, plane])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_log_volume_is_the_area_element_of_the_slice(make, batch_size):
    model, along = mlp(), make()
    found = scan(model, along, layers=["1", "3"], batch_size=batch_size, normalize=False, progress=False)
    x = along.points()
    expected = oracle.singular_values(model, ["1", "3"], x, directions=along.tangents()[:, None].expand(-1, *x.shape))
    for layer, sigma in expected.items():
        assert found.log_volume[layer].shape == along.shape
        error = found.log_volume[layer] - sigma.log().sum(1).reshape(along.shape)
        assert error.abs().max() < 1e-10
        assert (found.report[layer].num_directions, found.report[layer].normalized) == (len(along.tangents()), False)


def test_any_estimator_can_be_scanned():
    model, along = mlp(), line(steps=5)
    found = scan(model, along, layers=["3"], estimator=Exact(), progress=False)
    expected = oracle.singular_values(model, ["3"], along.points())["3"] / math.sqrt(13)
    assert (found.log_volume["3"] - expected.log().sum(1)).abs().max() < 1e-10
    assert found.report["3"].num_directions == 7


def test_an_isometry_has_the_slices_own_measure():
    rotation = nn.Linear(7, 7, bias=False).double()
    rotation.weight.data = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    surface = plane()
    found = scan(rotation, surface, layers=[""], normalize=False, progress=False)
    assert (found.log_volume[""] - surface.log_measure).abs().max() < 1e-12


def test_predictions_entropy_margin_and_confidence():
    model, surface = mlp(), plane()
    found = scan(model, surface, layers=["1"], progress=False)
    with torch.no_grad():
        logits = model(surface.points())
    for i, z in enumerate(logits.tolist()):
        total = sum(math.exp(v) for v in z)
        p = [math.exp(v) / total for v in z]
        z.sort()
        at = (i // 6, i % 6)
        assert found.predictions[at] == p.index(max(p))
        assert found.entropy[at].item() == pytest.approx(-sum(v * math.log(v) for v in p))
        assert found.margin[at].item() == pytest.approx(z[-1] - z[-2])
        assert found.confidence[at].item() == pytest.approx(max(p))


def test_entropy_does_not_underflow_in_float32():
    model = nn.Linear(7, 2).float()
    model.weight.data *= 300
    found = scan(model, line(dtype=torch.float32), layers=[""], progress=False)
    assert found.confidence.max() == 1  # rounded: the entropy still tells the points apart
    assert (found.entropy > 0).all()
    assert found.entropy.unique().numel() == 17


def test_logits_that_are_not_finite_have_no_class():
    class Diverged(nn.Module):
        def forward(self, x):
            return torch.where(x[:, :1] > x[:, :1].mean(), torch.nan, x)

    found = scan(Diverged(), line(), layers=[""], readout=lambda z: z, progress=False)
    bad = found.predictions == -1
    assert 0 < bad.sum() < 17
    assert torch.equal(found.entropy.isnan(), bad)
    assert torch.equal(found.margin.isnan(), bad)


def test_a_readout_module_is_run_in_eval_mode_and_left_in_its_own():
    backbone, classifier = (nn.Linear(7, 11).double(), nn.Sequential(nn.Dropout(0.9), nn.Linear(11, 3).double()))
    along = line()
    found = scan(backbone, along, layers=[""], readout=classifier, progress=False)
    with torch.no_grad():
        expected = classifier[1](backbone(along.points())).argmax(1)
    assert torch.equal(found.predictions, expected)
    assert classifier[0].training


def test_the_scan_leaves_no_trace():
    model = nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).double()
    along = line()
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    scan(model, along, layers=["1"], progress=False)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda z: {"logits": z}, r"the model gives a dict for 1 samples.*\n.*readout=lambda output"),
        (lambda z: z[:, :1], r"one number a sample, shape \(1, 1\).*\n.*torch.cat"),
        (lambda z: z[..., None], r"a tensor of shape \(1, 7, 1\) for 1 samples"),
    ],
)
def test_an_output_that_is_no_logits_is_refused_before_anything_is_measured(head, message, monkeypatch):
    class Model(nn.Module):
        def forward(self, x):
            return head(x)

    monkeypatch.setattr(GeometryProbe, "measure", lambda *a, **k: pytest.fail("measured first"))
    with pytest.raises(ProbeError, match=message):
        scan(Model(), line(), layers=[""], progress=False)


def test_points_are_taken_in_chunks_and_a_chunk_keeps_to_the_memory_budget():
    model, surface = mlp(), plane(steps=20)
    plain = scan(model, surface, layers=["1"], progress=False)
    assert plain.settings["batch_size"] == 128
    rows = Notes()
    model[0].register_forward_hook(lambda module, args, output: rows.append(len(output)))
    small = scan(model, surface, layers=["1"], progress=False, batch_size=400, memory_budget=20_000)
    assert max(rows.read()[:-1]) < 400  # all but the decision's own pass
    assert small.settings["batch_size"] == 400
    assert (small.log_volume["1"] - plain.log_volume["1"]).abs().max() < 1e-12


def test_a_probe_that_is_already_made_scans_with_its_own_options():
    model, surface = mlp(), plane()
    with GeometryProbe(model, layers=["3"], normalize=False, estimator=Exact()) as probe:
        found = scan(probe, surface, progress=False)
        assert probe.measure(surface.points())["3"].num_directions == 7  # still open
    expected = scan(model, surface, layers=["3"], normalize=False, estimator=Exact(), progress=False)
    same(found, expected)
    assert found.report["3"].normalized is False
    with GeometryProbe(model, layers=["3"]) as probe:  # no estimator: the slice's own tangents
        same(scan(probe, surface, progress=False), scan(model, surface, layers=["3"], progress=False))
        with pytest.raises(ProbeError, match="layers"):
            scan(probe, surface, layers=["1"], progress=False)


def test_progress_is_shown_only_when_asked_for(capsys):
    scan(mlp(), line(), layers=["1"], progress=False)
    assert capsys.readouterr().err == ""
    scan(mlp(), line(), layers=["1"])  # the captured output is no terminal
    assert capsys.readouterr().err == ""
    scan(mlp(), line(), layers=["1"], progress=True)
    assert "17/17" in capsys.readouterr().err


def test_what_is_refused():
    with shapes_unchecked(), pytest.raises(ProbeError, match=r"a Tensor is no slice.*\n.*Line\(x\[0\], x\[1\]\)"):
        scan(mlp(), torch.arange(5.0))
    with pytest.raises(ProbeError, match="batch_size=0 must be at least 1"):
        scan(mlp(), line(), batch_size=0)
    with pytest.raises(ProbeError, match=r"'readuot' is no option of scan; .*estimator.*\nDid you mean readout="):
        scan(mlp(), line(), readuot=torch.nn.Identity())


# --- several processes: a scan is the work of the one that calls it -----------------------------------------


def test_a_scan_measures_every_point_itself_whatever_its_rank(monkeypatch):
    model, along = mlp(), line()
    alone = scan(model, along, layers=["1"], batch_size=5, progress=False)
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda *a, value=value: value)
    for name in ("broadcast_object_list", "all_gather_object", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda *a, name=name, **k: pytest.fail(f"waited in {name}"))
    same(scan(model, along, layers=["1"], batch_size=5, progress=False), alone)


RANKS = textwrap.dedent(
    """
    import os, sys, torch
    from torch import nn
    from torchgeom_probe.slices.scan import scan
    from torchgeom_probe.slices.slice import Plane
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, target = torch.distributed.get_rank(), sys.argv[1]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 3))
    plane = Plane(*torch.randn(3, 5), steps=8)
    if rank == 0:  # the other one never hears of it
        scan(model, plane, layers=["1"], batch_size=9, path=target, progress=False)
    torch.distributed.barrier()
    found = scan(model, plane, layers=["1"], batch_size=9, path=f"{target}.{rank}", progress=False)  # and on both
    torch.distributed.destroy_process_group()
    """
)


@pytest.mark.slow
def test_a_scan_on_rank_0_alone_ends_and_each_of_two_ranks_has_the_whole_one(tmp_path):
    target = tmp_path / "scan"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", RANKS, str(target)], env={**common, "RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    expected = target.read_bytes()
    assert [(tmp_path / f"scan.{rank}").read_bytes() for rank in range(2)] == [expected, expected]
