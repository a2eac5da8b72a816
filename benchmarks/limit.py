"""The dual pass, and what one can write without it, against the limit: a plain forward pass over as many rows."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Settings, smallest
from torchgeom_probe import GeometryProbe, Subspace
from torchgeom_probe.jacobian import fused
from torchgeom_probe.jacobian.layout import Layout
from torchgeom_probe.model.hooked import HookedModel
from torchgeom_probe.model.isolation import measuring
from torchgeom_probe.model.stages import stage_layers

TITLE = "The dual pass against the limit"
NOTE = """\
Times over the limit's: a plain forward pass without gradients over (1 + k)·B samples, as many rows as the dual pass
moves over B samples and k directions.

- "dual pass": hooked at the output. "measure": `GeometryProbe.measure(x)`, up to five stages, planned before the clock.
- "vmap(jvp)", "loop of jvp": `torch.func.jvp` over the directions. "jacfwd": per sample, of u ↦ model(x + Vᵀu), then
  `slogdet`. "jacrev": per sample, of the 10 outputs. All of the output alone.

The results agree to 1e-9 in float64, or the run stops. A dash: torch cannot run it on this model."""

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
RESUMES = True
QUICK = ("test_resnet", "test_vit")
SHAPES = [(8, 2), (2, 16), (1, 64)]


def dual_pass(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    hooked, found = HookedModel(model, {"": model}), []
    fused.push(hooked, hooked.inputs(x), v, lambda _, blocks: found.append(blocks[0]), layout=Layout.of(model))
    return found[0]


def vmapped_jvp(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    return torch.func.vmap(lambda t: torch.func.jvp(model, (x,), (t,))[1], randomness="same")(v)


def loop_of_jvp(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    return torch.stack([torch.func.jvp(model, (x,), (t,))[1] for t in v])


def jacfwd_slogdet(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    def one(point: Tensor, directions: Tensor) -> Tensor:
        def along(u: Tensor) -> Tensor:
            return model((point + torch.tensordot(u, directions, 1))[None])[0]

        return torch.func.jacfwd(along, randomness="same")(point.new_zeros(len(directions)))

    return half_slogdet(torch.func.vmap(one, in_dims=(0, 1), randomness="same")(x, v))


def jacrev_slogdet(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    jacobian = torch.func.vmap(torch.func.jacrev(lambda point: model(point[None])[0]), randomness="same")(x)
    return half_slogdet(jacobian.flatten(2) @ v.flatten(2).permute(1, 2, 0))


def half_slogdet(pushed_BNK: Tensor) -> Tensor:
    """Return ½ log det of the smaller Gram matrix, [B]: the log-volume, whichever side is smaller."""
    wide = pushed_BNK.shape[1] < pushed_BNK.shape[2]
    gram = pushed_BNK @ pushed_BNK.mT if wide else pushed_BNK.mT @ pushed_BNK
    return torch.linalg.slogdet(gram).logabsdet / 2


Contender = Callable[[nn.Module, Tensor, Tensor], Tensor]

#: heading → the arguments of GeometryProbe, beside the layers and the estimator; what is timed is ``measure(x)``
PROBES: dict[str, dict[str, Any]] = {"measure": {}}
#: heading → how the tangents of the output are computed, or its log-volume
CONTENDERS: dict[str, Contender] = {
    "dual pass": dual_pass,
    "vmap(jvp)": vmapped_jvp,
    "loop of jvp": loop_of_jvp,
    "jacfwd": jacfwd_slogdet,
    "jacrev": jacrev_slogdet,
}
COLUMNS = ("dual pass", *PROBES, *(name for name in CONTENDERS if name != "dual pass"))
_STAGES = 5


def stages(model: nn.Module) -> list[str]:
    """At most five of the model's stages, evenly spread, the last one among them."""
    names = stage_layers(model)
    count = min(_STAGES, len(names))
    return [names[(i + 1) * len(names) // count - 1] for i in range(count)]


def ratios(model: nn.Module, size: int, batch: int, k: int, settings: Settings) -> tuple[float, dict[str, float]]:
    """Measure the limit in seconds, and each contender's time over it; nan for what cannot run the model."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator).to(settings.device)
    v = torch.randn(k, *x.shape, generator=generator).to(settings.device)
    rows = torch.cat([x[None], v]).flatten(0, 1)

    def plain() -> Tensor:
        with torch.no_grad():
            return model(rows)

    runs: dict[str, Callable[[], Any]] = {"limit": plain}
    for name, push in CONTENDERS.items():
        if push is dual_pass or _runs(push, model, x[:1], v[:1, :1]):
            runs[name] = functools.partial(push, model, x, v)
    with contextlib.ExitStack() as stack:
        for name, options in PROBES.items():
            probe = GeometryProbe(model, layers=stages(model), estimator=Subspace(k), **options)
            runs[name] = functools.partial(stack.enter_context(probe).measure, x, progress=False)
            runs[name]()  # what is planned, drawn or compiled once is not timed
        best = smallest(
            runs,
            settings.device,
            settings.turns,
            slow_turns=max(1, settings.turns // 3),
            quick_ones=("limit", "dual pass", *PROBES),
            inside={name: functools.partial(measuring, model) for name in CONTENDERS},
        )
    return best["limit"], {name: best.get(name, math.nan) / best["limit"] for name in COLUMNS}


def _runs(push: Contender, model: nn.Module, x: Tensor, v: Tensor) -> bool:
    try:
        with measuring(model):
            push(model, x, v)
    except RuntimeError as error:
        print(f"({push.__name__}: {str(error).splitlines()[0]})", file=sys.stderr)
        return False
    return True


def check(model: nn.Module, size: int, device: torch.device) -> None:
    """Compare the contenders' results in float64: a fast pass that is wrong is worth nothing."""
    exact = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64).to(device)
    v = torch.randn(2, *x.shape, generator=generator, dtype=torch.float64).to(device)
    with measuring(exact):
        fused, reference = dual_pass(exact, x, v), vmapped_jvp(exact, x, v)
    _refuse_difference("vmap(jvp)", fused, reference)
    volume = half_slogdet(fused.permute(1, 2, 0))
    for name, push in (("jacfwd", jacfwd_slogdet), ("jacrev", jacrev_slogdet)):
        if _runs(push, exact, x[:1], v[:, :1]):
            with measuring(exact):
                _refuse_difference(name, volume, push(exact, x, v))


def _refuse_difference(name: str, fused: Tensor, reference: Tensor) -> None:
    error = ((fused - reference).norm() / reference.norm()).item()
    if not error < 1e-9:
        raise RuntimeError(f"the dual pass differs from {name} by {error:.1e}, relative, in float64")


def made(name: str, device: torch.device) -> tuple[nn.Module, int]:
    """Make a timm model without a parameter that is zero throughout, and the size of its input."""
    import timm

    size, arguments = FAMILIES.get(name, (64, {"img_size": 64} if "vit" in name else {}))
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10, **arguments).eval().to(device)
    for parameter in model.parameters():
        if not parameter.any():  # it would make the comparison of results vacuous
            nn.init.normal_(parameter, std=0.02)
    return model, size


def table(settings: Settings) -> Iterator[str]:
    """Yield the table line by line."""
    header = f"| model | input | B, k | limit [s] | {' | '.join(COLUMNS)} |"
    yield header
    yield "|---|---|---|---|" + "---|" * len(COLUMNS)
    known = settings.finished if header in settings.finished else ()
    for name in QUICK if settings.quick else settings.families or tuple(FAMILIES):
        rows = {}
        model, size = made(name, settings.device)
        for batch, k in [(2, 3)] if settings.quick else SHAPES:
            rows[batch, k] = f"| {name} | {size} | {batch}, {k} |"
        old = {row: line for row in rows.values() for line in known if line.startswith(row)}
        if len(old) < len(rows):
            check(model, size, settings.device)
        for (batch, k), row in rows.items():
            if row in old:
                yield old[row]
                continue
            limit, times = ratios(model, size, batch, k, settings)
            cells = " | ".join("–" if math.isnan(times[c]) else f"{times[c]:.2f}" for c in COLUMNS)
            yield f"{row} {limit:.3f} | {cells} |"
