"""What a scan found: tested, said in short, saved, and loaded to the same bytes."""

import pytest
import safetensors.torch
import scipy
import torch
from scans import line, mlp, plane, same

from torchgeom_probe import ProbeError
from torchgeom_probe.files import encoded
from torchgeom_probe.slices.result import SliceScan
from torchgeom_probe.slices.scan import scan


def test_magnification_of_a_scan():
    surface = plane(steps=12)
    untrained, trained = mlp(), mlp()
    before = scan(untrained, surface, layers=["1"], progress=False)
    after = scan(trained, surface, layers=["1"], progress=False)
    found = after.magnification("1", initial=before)
    assert found.num_points == 144
    expected = scipy.stats.spearmanr(before.log_volume["1"].flatten(), after.entropy.flatten()).statistic
    assert found.initial.rho == pytest.approx(expected)
    assert str(found).startswith("1, on this one slice")
    with pytest.raises(ProbeError, match=r"layer 'fc' was not scanned.*\n.*\['1'\]"):
        after.magnification("fc")
    with pytest.raises(ProbeError, match="initial was scanned over another slice"):
        after.magnification("1", initial=scan(untrained, plane(steps=12), layers=["1"], progress=False))


def test_a_scan_says_in_short_what_it_is():
    found = scan(mlp(), plane(), layers=["1", "3"], progress=False)
    classes = found.predictions.unique().numel()
    text = repr(found)
    assert text.startswith("SliceScan(Plane(3 samples of shape (7,), steps=6, ")
    assert text.endswith(f"layers ['1', '3']; classes predicted: {classes})")
    assert len(text) < 200


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
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["again.safetensors", "new", "scan.safetensors", "third"]


def test_any_safetensors_reader_opens_the_file(tmp_path):
    found = scan(mlp(), plane(), layers=["1"], progress=False)
    tensors = safetensors.torch.load_file(found.save(tmp_path / "scan.safetensors"))
    assert torch.equal(tensors["0/value"].reshape(6, 6), found.log_volume["1"])
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
        with pytest.raises(ProbeError, match="is no saved SliceScan, or was cut short"):
            SliceScan.load(path)
    path.write_bytes(encoded({}, {"layers": []}, kind="GeometryReport"))
    with pytest.raises(ProbeError, match="holds a GeometryReport, not a SliceScan"):
        SliceScan.load(path)
    with pytest.raises(ProbeError, match="is no file"):
        SliceScan.load(tmp_path / "nothing")
