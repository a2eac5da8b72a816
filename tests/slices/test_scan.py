"""Lines, planes and scans: geometry by hand, values against a float64 Jacobian and its SVD, and files that "
"survive a kill."""

import itertools
import math
import os
import socket
import subprocess
import sys
import textwrap

import oracle
import pytest
import torch
from torch import nn

from torchgeom_probe import Exact, ProbeError
from torchgeom_probe.slices import scan as slices
from torchgeom_probe.slices.scan import Line, Plane, SliceScan, scan


def mlp(dtype=torch.float64, classes=5):
    return nn.Sequential(
        nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 13), nn.GELU(), nn.Linear(13, classes)
    ).to(dtype)


def line(steps=17, dtype=torch.float64):
    return Line(torch.randn(7, dtype=dtype), torch.randn(7, dtype=dtype), steps=steps)


def plane(steps=6, dtype=torch.float64, **options):
    return Plane(*torch.randn(3, 7, dtype=dtype), steps=steps, **options)


def same(one, other):
    assert list(one.report) == list(other.report)
    for name in one.report:
        assert torch.equal(one.log_volume[name], other.log_volume[name])
        assert torch.equal(one.report[name].singular_values, other.report[name].singular_values)
        assert (one.report[name].estimand, one.report[name].rank_tolerance) == (
            other.report[name].estimand,
            other.report[name].rank_tolerance,
        )
    for key in ("predictions", "entropy", "margin", "confidence"):
        assert torch.equal(getattr(one, key), getattr(other, key))


# --- geometry -----------------------------------------------------------------------------------------------


def test_a_line_reaches_both_ends_exactly():
    a, b = torch.randn(2, 3, 5)
    points = Line(a, b, steps=11).points()
    assert points.shape == (11, 3, 5)
    assert torch.equal(points[0], a)
    assert torch.equal(points[-1], b)
    assert torch.allclose(points[5], (a + b) / 2, atol=1e-6)
    assert torch.equal(Line(a, b).tangents(), (b - a)[None])
    assert Line(a, b).shape == (64,)


def test_the_equilateral_plane_is_the_papers():
    a, b, c = torch.randn(3, 2, 3, 5, dtype=torch.float64)
    surface = Plane(a, b, c, steps=9)
    origin = (a + b + c) / 3
    right, up = b - a, ((a + b) / 2 - origin) * 2 * math.sqrt(3)
    assert torch.allclose(surface.tangents(), torch.stack([right, up]))
    grid, points = surface.grid(), surface.points()
    assert points.shape == (81, 2, 3, 5)
    assert torch.allclose(points[40], origin)
    for (u, v), point in zip(grid.tolist(), points, strict=True):
        assert torch.allclose(point, origin + u * right + v * up)
    assert grid[0].tolist() == [-1, -1]
    assert grid[1].tolist() == [-0.75, -1]  # u runs along a row
    assert grid[9].tolist() == [-1, -0.75]
    # an equilateral triangle in the coordinates, whatever the samples' true distances
    assert torch.allclose(torch.pdist(surface.corners), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("coordinates", ["equilateral", "barycentric"])
def test_the_samples_lie_at_the_corners(coordinates):
    surface = plane(coordinates=coordinates)
    base = surface.a - torch.einsum("k,k...->...", surface.corners[0], surface.tangents())
    for corner, sample in zip(surface.corners, surface.samples, strict=True):
        assert torch.allclose(base + torch.einsum("k,k...->...", corner, surface.tangents()), sample)
    first = surface.points()[0]
    assert torch.allclose(first, base + torch.einsum("k,k...->...", surface.grid()[0], surface.tangents()))


def test_extent_bounds_both_coordinates():
    grid = plane(steps=5, extent=(0.0, 2.0), coordinates="barycentric").grid()
    assert grid.amin(0).tolist() == [0, 0]
    assert grid.amax(0).tolist() == [2, 2]


def test_log_measure_is_the_length_or_area_of_a_unit_of_the_coordinates():
    along, surface = line(), plane()
    assert along.log_measure == pytest.approx(math.log(torch.dist(along.a, along.b)))
    tangents = surface.tangents()
    assert surface.log_measure == pytest.approx(0.5 * math.log(torch.linalg.det(tangents @ tangents.T)))


X = torch.arange(5.0)
REFUSED = {
    "equal": (lambda: Line(X, X.clone()), "a and b are equal.*\n.*two different samples"),
    "collinear": (lambda: Plane(X, X + 1, X + 2.5), r"lie on one line.*\n.*Line\(a, b\)"),
    "collinear by rounding": (
        lambda: (lambda a, b: Plane(a, b, 0.3 * a + 0.7 * b))(*torch.randn(2, 3, 32, 32)),
        "lie on one line",
    ),
    "one pixel": (lambda: Plane(X[:1], X[1:2], X[3:4]), "lie on one line"),
    "integers": (lambda: Line(X.long(), X), r"a has dtype torch.int64.*\n.*a.float\(\)"),
    "shapes": (lambda: Plane(X, X + 1, X[:3]), r"the samples differ: .*c is \(3,\)"),
    "dtypes": (lambda: Line(X, X.double() + 1), "b is .* torch.float64"),
    "no tensor": (lambda: Line([1.0], X), r"a is a list, not a tensor.*\n.*torch.as_tensor\(a\)"),
    "not finite": (lambda: Line(X, X / 0), r"b holds numbers that are not finite.*\n.*nan_to_num"),
    "one step": (lambda: Line(X, X + 1, steps=1), "steps=1 must be a whole number of at least 2"),
    "extent": (lambda: Plane(X, X + 1, X**2, extent=(1.0, 1.0)), r"extent=\(1.0, 1.0\) is no range"),
    "coordinates": (lambda: Plane(X, X + 1, X**2, coordinates="polar"), "coordinates='polar' is unknown"),
    "no slice": (lambda: scan(mlp(), X), r"a Tensor is no slice.*Line\(x\[0\], x\[1\]\)"),
    "batch size": (lambda: scan(mlp(), line(), batch_size=0), "batch_size=0 must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ProbeError, match=message):
        make()


# --- the scan's numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [line, plane])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_log_volume_is_the_area_element_of_the_slice(make, batch_size):
    model, along = mlp(), make()
    found = scan(model, along, layers=["1", "3"], batch_size=batch_size, normalize=False, progress=False)
    x = along.points()
    expected = oracle.singular_values(
        model, ["1", "3"], x, directions=along.tangents()[:, None].expand(-1, *x.shape)
    )
    for layer, sigma in expected.items():
        assert found.log_volume[layer].shape == along.shape
        error = found.log_volume[layer] - sigma.log().sum(1).reshape(along.shape)
        assert error.abs().max() < 1e-10
        assert (found.report[layer].num_directions, found.report[layer].normalized) == (
            len(along.tangents()),
            False,
        )


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
    backbone, classifier = (
        nn.Linear(7, 11).double(),
        nn.Sequential(nn.Dropout(0.9), nn.Linear(11, 3).double()),
    )
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

    monkeypatch.setattr(slices.GeometryProbe, "measure", lambda *a, **k: pytest.fail("measured first"))
    with pytest.raises(ProbeError, match=message):
        scan(Model(), line(), layers=[""], progress=False)


def test_the_batch_is_sized_from_memory(monkeypatch):
    model, surface = mlp(), plane(steps=20)
    assert scan(model, surface, layers=["1"], progress=False).settings["batch_size"] == 256
    row = 13 * 8  # the widest activation, float64
    monkeypatch.setattr(slices, "free_memory", lambda device: 4 * 8 * row * 3 * 20)
    small = scan(model, surface, layers=["1"], progress=False)
    assert small.settings["batch_size"] == 16
    monkeypatch.setattr(slices, "free_memory", lambda device: 0)
    assert scan(model, line(), layers=["1"], progress=False).settings["batch_size"] == 1
    error = (
        small.log_volume["1"]
        - scan(model, surface, layers=["1"], progress=False, batch_size=400).log_volume["1"]
    )
    assert error.abs().max() < 1e-12


def test_progress_is_shown_only_when_asked_for(capsys):
    scan(mlp(), line(), layers=["1"], progress=False)
    assert capsys.readouterr().err == ""
    scan(mlp(), line(), layers=["1"])  # the captured output is no terminal
    assert capsys.readouterr().err == ""
    scan(mlp(), line(), layers=["1"], progress=True)
    assert "17/17" in capsys.readouterr().err


# --- magnification and plot delegate ------------------------------------------------------------------------


def test_magnification_of_a_scan():
    surface = plane(steps=12)
    untrained, trained = mlp(), mlp()
    before = scan(untrained, surface, layers=["1"], progress=False)
    after = scan(trained, surface, layers=["1"], progress=False)
    found = after.magnification("1", initial=before)
    assert found.num_points == 144
    assert found.initial.rho == pytest.approx(slices.magnification(before.log_volume["1"], after.entropy).rho)
    assert str(found).startswith("1 ")
    with pytest.raises(ProbeError, match=r"layer 'fc' was not scanned.*\n.*\['1'\]"):
        after.magnification("fc")
    with pytest.raises(ProbeError, match="initial was scanned over another slice"):
        after.magnification("1", initial=scan(untrained, plane(steps=12), layers=["1"], progress=False))


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [line, plane])
def test_a_saved_scan_comes_back_and_equal_scans_give_equal_bytes(make, tmp_path):
    model, along = mlp(), make(dtype=torch.float32)
    model.float()
    found = scan(model, along, layers=["1", "3"], progress=False)
    path = found.save(tmp_path / "new" / "scan.safetensors")
    loaded = SliceScan.load(path)
    same(found, loaded)
    assert type(loaded.slice) is type(along)
    assert torch.equal(loaded.slice.points(), along.points())
    assert loaded.settings == found.settings
    again = scan(model, along, layers=["1", "3"], progress=False).save(tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes() == loaded.save(tmp_path / "third").read_bytes()
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "again.safetensors",
        "new",
        "scan.safetensors",
        "third",
    ]


def test_any_safetensors_reader_opens_the_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    found = scan(mlp(), plane(), layers=["1"], progress=False)
    tensors = safetensors.load_file(found.save(tmp_path / "scan.safetensors"))
    assert torch.equal(tensors["layer0/log_volume"].reshape(6, 6), found.log_volume["1"])
    assert torch.equal(tensors["slice/c"], found.slice.c)


def test_a_bfloat16_slice_is_saved(tmp_path):
    along = line(dtype=torch.bfloat16)
    found = scan(mlp().float(), line(dtype=torch.float32), layers=["1"], progress=False)
    twin = SliceScan(**{**vars(found), "slice": along})
    assert torch.equal(SliceScan.load(twin.save(tmp_path / "x")).slice.b, along.b)


def test_a_file_that_is_no_scan_is_refused(tmp_path):
    path = scan(mlp(), line(), layers=["1"], progress=False).save(tmp_path / "scan")
    data = path.read_bytes()
    for broken in (data[:-9], data[:40], b"", b"PNG" * 100):
        path.write_bytes(broken)
        with pytest.raises(ProbeError, match="no scan of torchgeom_probe, or was cut short"):
            SliceScan.load(path)
    path.write_bytes(slices._encode({}, {"layers": []}))
    with pytest.raises(ProbeError, match="is no saved scan"):
        SliceScan.load(path)
    with pytest.raises(ProbeError, match="is no file"):
        SliceScan.load(tmp_path / "nothing")


class Interrupted(nn.Module):
    """Fails at the given forward pass, once."""

    def __init__(self, inner, fail_at=0):
        super().__init__()
        # Not a list: what a forward pass leaves in a module's containers is undone after a measurement.
        self.inner, self.fail_at, self.call = inner, fail_at, itertools.count(1)

    def forward(self, x):
        if next(self.call) == self.fail_at:
            raise KeyboardInterrupt
        return self.inner(x)


def test_an_interrupted_scan_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    inner, surface = mlp(torch.float32), plane(steps=8, dtype=torch.float32)
    whole = tmp_path / "whole.safetensors"
    straight = scan(
        Interrupted(inner), surface, layers=["inner.1"], batch_size=10, path=whole, progress=False
    )
    target = tmp_path / "resumed.safetensors"
    with pytest.raises(KeyboardInterrupt):
        scan(
            Interrupted(inner, fail_at=9),
            surface,
            layers=["inner.1"],
            batch_size=10,
            path=target,
            progress=False,
        )
    done = len(list((tmp_path / "resumed.safetensors.parts").glob("0*")))
    assert 0 < done < 7
    assert not target.exists()

    measured = []
    plain = slices.GeometryProbe.measure
    monkeypatch.setattr(
        slices.GeometryProbe, "measure", lambda self, x, **k: measured.append(len(x)) or plain(self, x, **k)
    )
    resumed = scan(
        Interrupted(inner), surface, layers=["inner.1"], path=target, progress=False
    )  # batch_size is remembered
    assert len(measured) == 7 - done
    same(straight, resumed)
    assert target.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resumed.safetensors", "whole.safetensors"]

    measured.clear()
    same(scan(Interrupted(inner), surface, layers=["inner.1"], path=target, progress=False), resumed)
    assert measured == []  # finished: loaded


def test_another_scan_is_never_overwritten_nor_continued(tmp_path):
    model, surface = mlp(), plane()
    target = tmp_path / "scan.safetensors"
    scan(model, surface, layers=["1"], path=target, progress=False)
    before = target.read_bytes()
    with pytest.raises(ProbeError, match=r"holds another scan: its slice differ.*\n.*another.safetensors"):
        scan(model, plane(), layers=["1"], path=target, progress=False)
    with pytest.raises(ProbeError, match=r"its layers differ \(layers=\['1'\], now \['3'\]\)"):
        scan(model, surface, layers=["3"], path=target, progress=False)
    with pytest.raises(ProbeError, match="its normalize differ"):
        scan(model, surface, layers=["1"], normalize=False, path=target, progress=False)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(ProbeError, match="its model differ"):
        scan(model, surface, layers=["1"], path=target, progress=False)
    assert target.read_bytes() == before

    other = tmp_path / "parts.safetensors"
    with pytest.raises(KeyboardInterrupt):
        scan(
            Interrupted(model, fail_at=9),
            surface,
            layers=["inner.1"],
            batch_size=4,
            path=other,
            progress=False,
        )
    with pytest.raises(ProbeError, match=r"parts.safetensors.parts holds another scan: its slice differ"):
        scan(Interrupted(model), plane(), layers=["inner.1"], path=other, progress=False)


SCRIPT = textwrap.dedent(
    """
    import os, sys, torch
    from torch import nn
    from torchgeom_probe.slices.scan import Plane, scan
    torch.set_num_threads(1)
    target, mode = sys.argv[1:3]
    if mode == "ranks":
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    class Model(nn.Sequential):
        calls = 0
        def forward(self, x):
            Model.calls += 1
            if mode == "killed" and Model.calls == 12:
                os.kill(os.getpid(), 9)
            return super().forward(x)
    model = Model(nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 3))
    plane = Plane(*torch.randn(3, 5), steps=8)
    found = scan(model, plane, layers=["1"], batch_size=9, path=target, progress=False)
    assert found.log_volume["1"].shape == (8, 8)
    if mode == "ranks":
        torch.distributed.destroy_process_group()
    """
)


def _run_together(*runs):
    """Start (target, mode, environment) runs at once; return their exit codes, and what they said."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(target), mode],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        for target, mode, environment in runs
    ]
    said = [process.communicate()[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.slow
def test_killed_and_started_again_and_on_two_ranks_the_bytes_are_the_same(tmp_path):
    whole, killed, shared = (tmp_path / f"{name}.safetensors" for name in ("whole", "killed", "shared"))
    codes, said = _run_together((whole, "whole", {}), (killed, "killed", {}))
    assert codes == [0, -9], said
    assert not killed.exists()
    assert list((tmp_path / "killed.safetensors.parts").glob("0*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    codes, said = _run_together(
        (killed, "whole", {}), *((shared, "ranks", {"RANK": str(rank), **address}) for rank in range(2))
    )
    assert codes == [0, 0, 0], said
    assert whole.read_bytes() == killed.read_bytes() == shared.read_bytes()
    assert not list(tmp_path.glob("*.parts"))
