"""The dual pass, and what one can write without it, against the limit: a plain forward pass over as many rows."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.timing import Settings, smallest
from torchgeom_probe.dual import DualTensor
from torchgeom_probe.footprint import measuring

TITLE = "The dual pass against the limit"
NOTE = """The limit is a plain forward pass without gradients over (1 + k)·B samples: the dual pass over B samples and k directions moves
the same number of rows through the same layers. Every other column is a time over the limit's: 1.00 is as fast as that plain pass.
"dual pass" is what a measurement runs, without hooks; "vmap(jvp)" is `torch.func.vmap` of `torch.func.jvp` over the k directions, and
"loop of jvp" one `torch.func.jvp` for each direction. Before a model is timed the first two are compared in float64: a relative
difference of more than 1e-9 stops the run."""

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
QUICK = ("test_resnet", "test_vit")
SHAPES = [(8, 2), (2, 16), (1, 64)]


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


def ratios(
    model: nn.Module, size: int, batch: int, k: int, settings: Settings
) -> tuple[float, dict[str, float]]:
    """Measure the limit in seconds, and each contender's time over it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator).to(settings.device)
    v = torch.randn(k, *x.shape, generator=generator).to(settings.device)
    rows = torch.cat([x[None], v]).flatten(0, 1)

    def plain() -> Tensor:
        with torch.no_grad():
            return model(rows)

    def measured(push: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Tensor:
        with measuring(model):
            return push(model, x, v)

    runs = {"limit": plain, **{name: functools.partial(measured, push) for name, push in CONTENDERS.items()}}
    best = smallest(
        runs,
        settings.device,
        settings.turns,
        slow_turns=max(1, settings.turns // 3),
        quick_ones=("limit", "dual pass"),
    )
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


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    import timm

    yield f"| model | input | B, k | limit [s] | {' | '.join(CONTENDERS)} |"
    yield "|---|---|---|---|" + "---|" * len(CONTENDERS)
    for name in QUICK if settings.quick else settings.families or tuple(FAMILIES):
        size, arguments = FAMILIES.get(name, (64, {"img_size": 64} if "vit" in name else {}))
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=10, **arguments)
        model = model.eval().to(settings.device)
        for parameter in model.parameters():
            if not parameter.any():  # it would make the comparison of results vacuous
                nn.init.normal_(parameter, std=0.02)
        check(model, size, settings.device)
        for batch, k in [(2, 3)] if settings.quick else SHAPES:
            limit, times = ratios(model, size, batch, k, settings)
            cells = " | ".join(f"{times[c]:.2f}" for c in CONTENDERS)
            yield f"| {name} | {size} | {batch}, {k} | {limit:.3f} | {cells} |"
