"""A new estimator is one file: found by its name in every verb, on the command line, in tables, files and charts."""

import pytest
import torch
from blocks import run_block

import torchgeom_probe as tgp
from torchgeom_probe.estimators import named

NUCLEAR = '''
"""The nuclear norm of J: how much a layer stretches, summed over orthogonal directions."""
from dataclasses import dataclass

import torch

from torchgeom_probe.estimators.base import Estimator, conventions, counted, dense_count
from torchgeom_probe.jacobian.layer import layer_jacobians
from torchgeom_probe.report import LayerGeometry


@dataclass(frozen=True)
class Nuclear(Estimator):
    """Σ σ_i(J)."""

    def cost(self, plan, *, engine="auto"):
        return {e: dense_count(n, plan.num_inputs, at_once=48, why="all of J") for e, n in plan.features.items()}

    def estimate(self, jacobians, *, start=None):
        with layer_jacobians(jacobians, estimator="Nuclear()", at_once=8) as maps:
            return {entry: self._layer(jacobians, jacobian) for entry, jacobian in maps.items()}

    def _layer(self, jacobians, jacobian):
        sigma = jacobian.dense().singular_values()
        total = sigma.sum(1)
        return LayerGeometry(
            **conventions(jacobians, jacobian.entry, jacobian.engine),
            estimand="Σ σ_i, the nuclear norm of J",
            unit="",
            value=total,
            singular_values=sigma,
            num_directions=jacobian.num_inputs,
            error_bound=8 * jacobian.eps * sigma.shape[1] * sigma[:, 0],
            extras={
                "stable_rank": sigma.square().sum(1) / sigma[:, 0].square(),
                "num_products": counted(total, jacobian.products),
            },
        )
'''
SCRIPT = """
import sys, warnings
from pathlib import Path
import torch, torchgeom_probe as tgp, torchgeom_probe.estimators as room
room.__path__.append(sys.argv[1])           # where its file would lie
out = Path(sys.argv[2])
model, x = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh()).double(), torch.randn(4, 5).double()
report = tgp.measure(model, x, layers=["0", "1"], estimator="nuclear", normalize=False)
expected = torch.linalg.matrix_norm(model[0].weight, ord="nuc")
assert torch.allclose(report["0"].value, expected) and (report["0"].error_bound < 1e-10).all()
assert (report["1"].stable_rank >= 1).all()
text = str(report)
assert "Σ σ_i, the nuclear norm of J" in text and "stable_rank" in text and "log-volume" not in text, text
header = report.to_csv(out / "a.csv").read_text().splitlines()[0]
assert "value" in header and "log_volume" not in header and "stable_rank" in header, header
again = tgp.GeometryReport.load(report.save(out / "a.safetensors"))
assert torch.equal(again["1"].stable_rank, report["1"].stable_rank) and again["1"].unit == ""
try:
    report["0"].log_volume
except tgp.ProbeError as error:
    assert "is no log-volume" in str(error)
else:
    raise SystemExit("a nuclear norm passed for a log-volume")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
options = {"layers": "1", "estimator": "nuclear", "every": 1, "on_error": "raise"}
with tgp.Monitor(model, x, writer=str(out / "runs"), **options).follow(optimizer):
    model(x).sum().backward(); optimizer.step()
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(str(out / "runs")); found.Reload()
tags = found.Tags()["scalars"]
assert any("stable_rank" in tag for tag in tags), tags
from torchgeom_probe.cli import main as cli
(out / "m.py").write_text("from torch import nn\\ndef make(): return nn.Sequential(nn.Linear(5, 7), nn.Tanh())\\n")
words = f"measure --model {out}/m.py:make --input-shape 5 --estimator nuclear --out {out}/cli"
code = cli.main(words.split())
assert not code
"""


def test_one_file_and_it_is_everywhere(tmp_path, tmp_path_factory):
    room = tmp_path / "room"
    room.mkdir()
    (room / "nuclear.py").write_text(NUCLEAR)
    block = (
        f"import sys, warnings; warnings.simplefilter('ignore'); sys.argv[1:] = {[str(room), str(tmp_path)]}\n{SCRIPT}"
    )
    returned, printed, errors = run_block(block, tmp_path_factory.mktemp("block"))
    assert returned == 0, errors
    assert "nuclear norm of J" in printed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("exact", tgp.Exact()),
        ("TopK:10", tgp.TopK(k=10)),
        ("topk:k=3,tol=1e-4,method=krylov", tgp.TopK(k=3, tol=1e-4, method="krylov")),
        ("subspace", tgp.Subspace()),
        ("subspace:4,frames=16", tgp.Subspace(k=4, frames=16)),
        ("logdet:1e-2", tgp.LogDet(eps=1e-2)),
        ("trace:8", tgp.Trace(probes=8)),
    ],
)
def test_names(text, expected):
    assert named(text) == expected
    model, x = torch.nn.Linear(40, 30), torch.randn(2, 40)
    by_name = tgp.measure(model, x, layers="", estimator=text)[""]
    assert torch.equal(by_name.value, tgp.measure(model, x, layers="", estimator=expected)[""].value)
