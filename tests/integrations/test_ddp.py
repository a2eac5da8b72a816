"""Two real processes under torchrun with gloo: shared samples, one writer, no hang, the same weights."""

from __future__ import annotations

import copy
import csv
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import torchgeom_probe as tgp
from torchgeom_probe.distributed import Ranks

WORKER = """
import sys, time, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
import torchgeom_probe as tgp
from torchgeom_probe import distributed as ranks
from torchgeom_probe.integrations.tensorboard import TensorBoardWriter

out = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
found = {}
X = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 13), nn.BatchNorm1d(13), nn.Tanh(), nn.Dropout(0.2), nn.Linear(13, 3))

def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(10 + rank)      # another batch on every rank
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=generator)).square().mean().backward()
        optimizer.step()

def monitor(model, x=X, **options):
    made = tgp.Monitor(model, x, **{"layers": ["0", "2"], "every": 2, "on_error": "raise"} | options)
    made.sizes, measure = [], made._probe.measure
    def counted(x, **keywords):
        made.sizes.append(len(torch.utils._pytree.tree_leaves(x)[0]))
        return measure(x, **keywords)
    made._probe.measure = counted
    return made

def volumes(made, layer="2"):
    return [(step, report[layer].log_volume) for step, report in made.history]

def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

# the same training without and with a monitor
model = DDP(network()); optimizer = optimizer_of(model); torch.manual_seed(rank); train(model, optimizer, 5)
found["without"] = {k: v.clone() for k, v in model.module.state_dict().items()}
model = DDP(network()); optimizer = optimizer_of(model)
writers = [TensorBoardWriter(f"{out}/events"), tgp.CSVWriter(f"{out}/geometry.csv")]
made = monitor(model, writer=writers).follow(optimizer)
torch.manual_seed(rank); train(model, optimizer, 5); made.close()
found["with"] = {k: v.clone() for k, v in model.module.state_dict().items()}
found["sizes"], found["volumes"], found["state"] = made.sizes, volumes(made), made.state_dict()
alone = tgp.measure(model.module, X, layers=["0", "2"])
made = monitor(model); made.probe_now()
found["gathered"] = [(r["2"].log_volume, r["0"].rank, r["2"].singular_values) for _, r in made.history]
found["alone"] = (alone["2"].log_volume, alone["0"].rank, alone["2"].singular_values)

# a slice map: rank 0 draws, and waits for nobody
plane = tgp.Plane(X[0], X[1], X[2], steps=4)
maps = {"plane": plane, "own": lambda m: tgp.plot(tgp.scan(m, plane, layers=["2"]))}
made = monitor(model, writer=TensorBoardWriter(f"{out}/maps"), maps=maps)
made.probe_now(); made.close()
found["maps"] = made.failures

# only some ranks reach a probe
ranks.PATIENCE_SECONDS = 0.5
made = monitor(model)
began = time.monotonic()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    if rank == 0:
        made.probe_now(); made.probe_now()
found["only 0"] = (list(made.sizes), volumes(made), [str(w.message) for w in caught], time.monotonic() - began)
dist.barrier()
if rank == 1:
    made.probe_now()
dist.barrier()
made.step(at=2); dist.barrier(); made.step(at=4)
found["then both"] = (list(made.sizes), volumes(made))
made = monitor(model)
began = time.monotonic()
if rank == 1:
    assert made.probe_now() is None
found["only 1"] = (list(made.sizes), volumes(made), time.monotonic() - began)

# other samples on the other rank are not taken for these
made = monitor(model, X + rank)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    made.probe_now()
found["other samples"] = volumes(made)

# a rank whose measurement raises: rank 0 measures that part
ranks.PATIENCE_SECONDS = 30.0
made = monitor(model, on_error="warn")
if rank == 1:
    def broken(x, **keywords):
        raise ValueError("broken on rank 1")
    made._probe.measure = broken
began = time.monotonic()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    made.probe_now()
found["raises on 1"] = (made.failures, list(made.sizes), volumes(made), time.monotonic() - began)

# a schedule that goes by the clock; fewer samples than ranks; each for itself; a bare model; a dict
made = monitor(model, every=None, max_overhead=0.5); made.probe_now(); made.step()
found["budget"] = (list(made.sizes), len(made.history))
made = monitor(model, X[:1]); made.probe_now(); found["one sample"] = (list(made.sizes), volumes(made))
made = monitor(model, distributed=False); made.probe_now(); found["each"] = (list(made.sizes), volumes(made))
made = monitor(model.module); made.probe_now(); found["bare"] = (list(made.sizes), volumes(made))
made = monitor(model.module, {"input": X}, distributed=True); made.probe_now()
found["dict"] = (list(made.sizes), volumes(made))

# Lightning, with samples of its own choosing: every rank sees another batch
import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from torchgeom_probe.integrations.lightning import GeometryCallback
warnings.simplefilter("ignore")

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, index):
        return self(batch).square().mean()
    def configure_optimizers(self):
        return optimizer_of(self)

for how in ("lightning without", "lightning"):
    callback = GeometryCallback(layers=["net.2"], every=2, samples=4, on_error="raise")
    trainer = pl.Trainer(max_steps=5, devices=2, strategy="ddp", accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        callbacks=[] if how == "lightning without" else [callback],
        logger=False if how == "lightning without" else TensorBoardLogger(out, version=0))
    module = Module()
    torch.manual_seed(rank)
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(40, 5, generator=torch.Generator().manual_seed(5)), 4))
    found[how] = {k: v.clone() for k, v in module.state_dict().items()}
found["lightning probed"] = (volumes(callback, "net.2"), callback.monitor.x_probe, callback.monitor.failures)

torch.save(found, f"{out}/rank{rank}.pt")
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes found, and where they wrote."""
    pytest.importorskip("pytorch_lightning")
    out = tmp_path_factory.mktemp("ddp")
    (out / "worker.py").write_text(textwrap.dedent(WORKER), encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *(str(out / "worker.py"), str(out)),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)], out


def test_the_trained_weights_are_bit_identical_with_and_without(ranks):
    (zero, one), _ = ranks
    for found in (zero, one):
        for kind, other in (("without", "with"), ("lightning without", "lightning")):
            for key, value in found[kind].items():
                assert torch.equal(value, found[other][key]), (kind, key)
    weights = [key for key in zero["with"] if "running" not in key]
    assert all(torch.equal(zero["with"][key], one["with"][key]) for key in weights)


def test_the_samples_are_shared_and_the_results_gathered_on_rank_0(ranks):
    (zero, one), _ = ranks
    assert zero["sizes"] == [3, 3, 3]
    assert one["sizes"] == [4, 4, 4]
    assert [step for step, _ in zero["volumes"]] == [0, 2, 4]
    assert one["volumes"] == []
    assert one["gathered"] == []
    for gathered, alone in zip(zero["gathered"][0], zero["alone"], strict=True):
        torch.testing.assert_close(gathered, alone, rtol=1e-5, atol=1e-5)
    # Each rank's batch normalisation has seen batches of its own: the result is rank 0's model throughout.
    assert not torch.equal(zero["with"]["1.running_mean"], one["with"]["1.running_mean"])
    assert zero["state"]["step"] == one["state"]["step"] == 5
    assert zero["state"]["x_probe"] == one["state"]["x_probe"]


def test_one_rank_writes(ranks):
    (zero, _), out = ranks
    events = EventAccumulator(str(out / "events")).Reload()
    medians = [(step, pytest.approx(volume.quantile(0.5).item())) for step, volume in zero["volumes"]]
    assert [(e.step, e.value) for e in events.Scalars("logvol/01_2")] == medians
    assert len(list((out / "events").glob("events*"))) == 1
    with (out / "geometry.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "0", "2", "2", "4", "4"]


def test_slice_maps_are_drawn_by_rank_0_alone(ranks):
    (zero, one), out = ranks
    assert zero["maps"] == one["maps"] == 0
    events = EventAccumulator(str(out / "maps")).Reload()
    assert [image.step for image in events.Images("own")] == [0]
    (plane,) = [tag for tag in events.Tags()["tensors"] if "plane" in tag]  # a scan's numbers, for the tab
    assert [tensor.step for tensor in events.Tensors(plane)] == [0]


def test_nothing_hangs_when_only_some_ranks_reach_a_probe(ranks):
    (zero, one), _ = ranks
    sizes, volumes, warned, seconds = zero["only 0"]
    assert sizes == [3, 4, 3, 4]  # its own samples, then those of the rank that did not come
    for _, volume in volumes:
        torch.testing.assert_close(volume, zero["alone"][0], rtol=1e-5, atol=1e-5)
    assert len(warned) == 1
    assert "rank 1 left no part of the probe at step 0 within 0.5 s" in warned[0]
    assert 0.5 < seconds < 5
    sizes, volumes = zero["then both"]
    assert [step for step, _ in volumes] == [0, 0, 2, 4]
    assert all(len(volume) == 7 for _, volume in volumes)
    assert one["then both"][1] == []
    assert one["only 1"][:2] == ([], [])  # without rank 0's buffers there is nothing to measure with
    assert one["only 1"][2] < 5


def test_a_part_that_is_wrong_or_failed_is_measured_by_rank_0(ranks):
    (zero, one), _ = ranks
    ((_, volume),) = zero["other samples"]
    torch.testing.assert_close(volume, zero["alone"][0], rtol=1e-5, atol=1e-5)
    failures, sizes, ((_, volume),), seconds = zero["raises on 1"]
    assert (failures, sizes) == (0, [3, 4])
    assert seconds < 10  # it was told, it did not wait
    torch.testing.assert_close(volume, zero["alone"][0], rtol=1e-5, atol=1e-5)
    assert one["raises on 1"][0] == 1


def test_other_ways_to_share(ranks):
    (zero, one), _ = ranks
    assert (zero["budget"], one["budget"]) == (([7], 1), ([], 0))
    assert zero["one sample"][0] == [] or zero["one sample"][0] == [1]
    assert len(zero["one sample"][1][0][1]) == 1
    for how in ("each", "bare"):
        assert zero[how][0] == one[how][0] == [7]
        assert len(zero[how][1][0][1]) == len(one[how][1][0][1]) == 7
    assert torch.equal(zero["each"][1][0][1], zero["bare"][1][0][1])
    assert (zero["dict"][0], one["dict"][0]) == ([3], [4])
    torch.testing.assert_close(zero["dict"][1][0][1], zero["alone"][0], rtol=1e-5, atol=1e-5)


def test_lightning_with_ddp(ranks):
    (zero, one), out = ranks
    volumes, x_probe, failures = zero["lightning probed"]
    assert failures == 0
    assert [step for step, _ in volumes] == [0, 2, 4, 5]
    assert all(len(volume) == 4 for _, volume in volumes)
    assert torch.equal(x_probe, one["lightning probed"][1])
    assert one["lightning probed"][0] == []
    (log_dir,) = {path.parent for path in out.glob("lightning_logs/**/events*")}
    events = EventAccumulator(str(log_dir)).Reload()
    assert [e.step for e in events.Scalars("logvol/00_net.2")] == [0, 2, 4, 5]


def test_sharing_needs_a_process_group():
    with pytest.raises(tgp.ProbeError, match=r"there is no process group.\nWrite  torch.distributed.init_proc"):
        tgp.Monitor(nn.Linear(2, 3), torch.zeros(2, 2), layers=[""], distributed=True)
    assert Ranks.of(nn.Linear(2, 3), None) is None


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_probe_of_a_ddp_model_has_its_ranks_so_that_one_of_them_writes(one_process):
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    for made in (model, tgp.GeometryProbe(model)):
        monitor = tgp.Monitor(made, torch.randn(2, 3))
        assert monitor._ranks is not None
        assert monitor.model is model
    assert tgp.Monitor(tgp.GeometryProbe(model.module), torch.randn(2, 3))._ranks is None


def test_a_group_of_one_and_parts_that_do_not_travel(one_process):
    model = nn.parallel.DistributedDataParallel(nn.Linear(5, 3))
    with tgp.Monitor(model, torch.randn(4, 5), layers=[""], estimator=tgp.Exact()) as monitor:
        report = monitor.probe_now()
    assert report is not None
    assert report[""].log_volume.shape == (4,)


@pytest.mark.filterwarnings(r"ignore:.*:DeprecationWarning")
def test_tensor_parallel_models_are_refused_by_name(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "model"))
    parallel = parallelize_module(nn.Sequential(nn.Linear(5, 3)), mesh["model"], {"0": ColwiseParallel()})
    both = fully_shard(copy.deepcopy(parallel), mesh=mesh["data"])
    for model in (parallel, both):
        with pytest.raises(
            tgp.ProbeError, match=r"'0.weight' is a DTensor of tensor parallelism(.|\n)*plain copy(.|\n)*fully_shard"
        ):
            tgp.GeometryProbe(model, layers=["0"])
    # the way out that the message names
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    gathered = nn.Sequential(nn.Linear(5, 3))
    gathered.load_state_dict(get_model_state_dict(parallel, options=StateDictOptions(full_state_dict=True)))
    sharded = fully_shard(copy.deepcopy(gathered), mesh=mesh["data"])
    x = torch.randn(4, 5)
    reports = [tgp.measure(m, x, layers=["0"], estimator=tgp.Exact()) for m in (sharded, gathered)]
    assert torch.equal(reports[0]["0"].log_volume, reports[1]["0"].log_volume)


@pytest.mark.filterwarnings(r"ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:.*:FutureWarning")
@pytest.mark.filterwarnings(r"ignore:.*FSDP.*:UserWarning")
def test_a_first_generation_fsdp_model_is_refused_by_name(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(nn.Sequential(nn.Linear(5, 3)), device_id=torch.device("cpu"))
    for made, what in ((model, "the model"), (nn.Sequential(model), "'0'")):
        with pytest.raises(tgp.ProbeError, match=f"{what} is a FullyShardedDataParallel(.|\n)*plain copy"):
            tgp.GeometryProbe(made, layers="auto")
