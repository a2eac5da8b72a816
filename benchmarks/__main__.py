"""``python -m benchmarks``: the dual pass, and what one can write without it, against the limit.

The limit is a plain forward pass without gradients over (1 + k)·B samples: what the dual pass over B samples and k directions moves
through the model.  All are measured in one process, turn by turn, and compared as ratios of the smallest time of each.  On the CPU
the time is that of the process itself, on one thread, so that other jobs on the machine count for little.
"""

from __future__ import annotations

import argparse
import copy
import functools
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import torchgeom_probe
from torchgeom_probe.dual import DualTensor
from torchgeom_probe.footprint import measuring

#: family → (size of the input image, arguments of timm.create_model)
FAMILIES: dict[str, tuple[int, dict[str, int]]] = {
    "resnet18": (128, {}),
    "resnet34": (96, {}),
    "resnet50": (96, {}),
    "vit_tiny_patch16_224": (224, {}),
    "swin_tiny_patch4_window7_224": (112, {"img_size": 112}),
    "convnext_tiny": (96, {}),
    "densenet121": (96, {}),
    "efficientnet_b0": (128, {}),
    "regnety_008": (128, {}),
    "mixer_s16_224": (112, {"img_size": 112}),
    "mobilenetv3_small_100": (128, {}),
    "eca_nfnet_l0": (96, {}),
}
QUICK = ["test_resnet", "test_vit"]
SHAPES = [(8, 2), (2, 16), (1, 64)]
BEGIN, END = "<!-- table: written by python -m benchmarks -->", "<!-- end of table -->"
Pass = Callable[[], Tensor]


def dual_pass(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    out = model(DualTensor(torch.cat([x[None], v])))
    return out.tangents


def vmapped_jvp(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    return torch.func.vmap(lambda t: torch.func.jvp(model, (x,), (t,))[1], randomness="same")(v)


def loop_of_jvp(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    return torch.stack([torch.func.jvp(model, (x,), (t,))[1] for t in v])


#: heading → how the tangents of the output are computed
CONTENDERS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "dual pass": dual_pass,
    "vmap(jvp)": vmapped_jvp,
    "loop of jvp": loop_of_jvp,
}


def seconds(run: Pass, device: torch.device) -> float:
    """Time one run: of the process on the CPU, on the wall elsewhere."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.accelerator.synchronize()
    start = time.perf_counter()
    run()
    torch.accelerator.synchronize()
    return time.perf_counter() - start


def ratios(
    model: nn.Module, size: int, batch: int, k: int, device: torch.device, turns: int
) -> tuple[float, dict[str, float]]:
    """Measure the limit in seconds, and each contender's time over it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator).to(device)
    v = torch.randn(k, *x.shape, generator=generator).to(device)
    rows = torch.cat([x[None], v]).flatten(0, 1)
    best = dict.fromkeys(["limit", *CONTENDERS], float("inf"))

    def plain() -> Tensor:
        with torch.no_grad():
            return model(rows)

    for turn in range(turns):
        best["limit"] = min(best["limit"], seconds(plain, device))
        with measuring(model):
            for name, push in CONTENDERS.items():
                if name == "dual pass" or turn < max(
                    1, turns // 3
                ):  # the slow ones take their turn less often
                    best[name] = min(best[name], seconds(functools.partial(push, model, x, v), device))
    return best["limit"], {name: best[name] / best["limit"] for name in CONTENDERS}


def check(model: nn.Module, size: int, device: torch.device) -> None:
    """Compare the dual pass with vmap(jvp) in float64: a fast pass that is wrong is worth nothing."""
    exact = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, size, size, generator=generator, dtype=torch.float64).to(device)
    v = torch.randn(2, *x.shape, generator=generator, dtype=torch.float64).to(device)
    with measuring(exact):
        fused, reference = dual_pass(exact, x, v), vmapped_jvp(exact, x, v)
    error = ((fused - reference).norm() / reference.norm()).item()
    if not error < 1e-9:
        raise RuntimeError(f"the dual pass differs from vmap(jvp) by {error:.1e}, relative, in float64")


def measured(
    names: list[str], shapes: list[tuple[int, int]], device: torch.device, turns: int
) -> Iterator[str]:
    """Yield the table line by line."""
    import timm

    yield f"| model | input | B, k | limit [s] | {' | '.join(CONTENDERS)} |"
    yield "|---|---|---|---|" + "---|" * len(CONTENDERS)
    for name in names:
        size, arguments = FAMILIES.get(name, (64, {"img_size": 64} if "vit" in name else {}))
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=10, **arguments).eval().to(device)
        for parameter in model.parameters():
            if (
                not parameter.any()
            ):  # a layer that starts at zero would make the comparison of results vacuous
                nn.init.normal_(parameter, std=0.02)
        check(model, size, device)
        for batch, k in shapes:
            limit, times = ratios(model, size, batch, k, device, turns)
            cells = " | ".join(f"{times[c]:.2f}" for c in CONTENDERS)
            yield f"| {name} | {size} | {batch}, {k} | {limit:.3f} | {cells} |"


def circumstances(device: torch.device, turns: int) -> str:
    """Describe versions, hardware and method, in a sentence each."""
    cpu = platform.processor() or platform.machine()
    try:
        found = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
        ]
        cpu = found[0].split(":", 1)[1].strip() if found else cpu
    except OSError:
        pass
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu}, {torch.get_num_threads()} thread"
    )
    clock = "process time" if device.type == "cpu" else "wall time"
    return (
        f"torchgeom_probe {torchgeom_probe.__version__}, torch {torch.__version__}, Python {platform.python_version()}; {hardware}; "
        f"float32, eval mode; {clock}, smallest of {turns} turns (of {max(1, turns // 3)} for the slow ones)."
    )


def written(page: Path, table: str) -> None:
    """Put the table between the markers of the page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="two miniature models, one shape; prints and writes nothing"
    )
    parser.add_argument("--families", nargs="*", help=f"some of: {', '.join(FAMILIES)}")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument(
        "--turns", default=6, type=int, help="how often each is measured; the smallest time counts"
    )
    arguments = parser.parse_args()
    try:
        import timm  # noqa: F401
    except ModuleNotFoundError:
        parser.exit(
            1,
            "the benchmarks run on timm's models. Install them with:  python -m pip install 'torchgeom_probe[timm]'\n",
        )
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    torch.set_num_threads(1)
    names = QUICK if arguments.quick else arguments.families or list(FAMILIES)
    turns = 2 if arguments.quick else arguments.turns
    lines = []
    for line in measured(names, [(2, 3)] if arguments.quick else SHAPES, arguments.device, turns):
        print(line, flush=True)
        lines.append(line)
    note = circumstances(arguments.device, turns)
    print(f"\n{note}")
    if not arguments.quick and not arguments.families:
        written(Path(__file__).parent / "README.md", "\n".join([note, "", *lines]))


if __name__ == "__main__":
    main()
