"""Scans that are interrupted or killed end with the same bytes; another scan is never continued nor overwritten."""

import os
import subprocess
import sys
import textwrap
from queue import SimpleQueue

import pytest
import torch
from scans import mlp, plane, same
from torch import nn

from torchgeom_probe import GeometryProbe, ProbeError
from torchgeom_probe.slices.scan import scan


class Interrupted(nn.Module):
    """Fails at the given forward pass, once."""

    def __init__(self, inner, fail_at=0):
        super().__init__()
        self.inner, self.fail_at, self.calls = inner, fail_at, SimpleQueue()  # which no measurement puts back

    def forward(self, x):
        self.calls.put(1)
        if self.calls.qsize() == self.fail_at:
            raise KeyboardInterrupt
        return self.inner(x)


def test_an_interrupted_scan_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    inner, surface = mlp(torch.float32), plane(steps=8, dtype=torch.float32)
    whole = tmp_path / "whole.safetensors"
    straight = scan(Interrupted(inner), surface, layers=["inner.1"], batch_size=10, path=whole, progress=False)
    target = tmp_path / "resumed.safetensors"
    with pytest.raises(KeyboardInterrupt):
        scan(Interrupted(inner, fail_at=9), surface, layers=["inner.1"], batch_size=10, path=target, progress=False)
    done = len(list((tmp_path / "resumed.safetensors.parts").glob("0*")))
    assert 0 < done < 7
    assert not target.exists()

    measured = []
    plain = GeometryProbe.measure
    monkeypatch.setattr(GeometryProbe, "measure", lambda self, x, **k: measured.append(len(x)) or plain(self, x, **k))
    resumed = scan(
        Interrupted(inner), surface, layers=["inner.1"], path=target, progress=False
    )  # batch_size is remembered
    assert len(measured) == 7 - done
    same(straight, resumed)
    assert target.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resumed.safetensors", "whole.safetensors"]

    measured.clear()
    (tmp_path / "resumed.safetensors.parts").mkdir()  # as a kill between the last two steps leaves it
    same(scan(Interrupted(inner), surface, layers=["inner.1"], path=target, progress=False), resumed)
    assert measured == []  # finished: loaded
    assert not (tmp_path / "resumed.safetensors.parts").exists()


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
    with pytest.raises(ProbeError, match="its precision differ"):
        scan(model, surface, layers=["1"], precision="bf16", path=target, progress=False)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(ProbeError, match="its model differ"):
        scan(model, surface, layers=["1"], path=target, progress=False)
    assert target.read_bytes() == before

    other = tmp_path / "parts.safetensors"
    with pytest.raises(KeyboardInterrupt):
        scan(Interrupted(model, fail_at=9), surface, layers=["inner.1"], batch_size=4, path=other, progress=False)
    with pytest.raises(ProbeError, match=r"parts.safetensors.parts holds another scan: its slice differ"):
        scan(Interrupted(model), plane(), layers=["inner.1"], path=other, progress=False)


SCRIPT = textwrap.dedent(
    """
    import glob, os, sys, torch
    from torch import nn
    from torchgeom_probe.slices.scan import scan
    from torchgeom_probe.slices.slice import Plane
    torch.set_num_threads(1)
    target, mode = sys.argv[1:3]
    torch.manual_seed(0)
    class Model(nn.Sequential):
        def forward(self, x):
            # by what is on the disk: a counter of the model's own would be put back
            if mode == "killed" and len(glob.glob(target + ".parts/0*")) == 3:
                os.kill(os.getpid(), 9)
            return super().forward(x)
    model = Model(nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 3))
    plane = Plane(*torch.randn(3, 5), steps=8)
    found = scan(model, plane, layers=["1"], batch_size=9, path=target, progress=False)
    assert found.log_volume["1"].shape == (8, 8)
    """
)


def _run(target, mode):
    command = [sys.executable, "-c", SCRIPT, str(target), mode]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_killed_and_started_again_the_bytes_are_the_same(tmp_path):
    whole, killed = (tmp_path / f"{name}.safetensors" for name in ("whole", "killed"))
    first, second = _run(whole, "whole"), _run(killed, "killed")
    assert (first.wait(120), second.wait(120)) == (0, -9)
    assert not killed.exists()
    assert list((tmp_path / "killed.safetensors.parts").glob("0*"))
    assert _run(killed, "whole").wait(120) == 0
    assert whole.read_bytes() == killed.read_bytes()
    assert not list(tmp_path.glob("*.parts"))
