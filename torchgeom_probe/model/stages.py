"""The stages of a model: what ``layers="auto"`` takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.isolation import unwrapped

# Stages that timm 1.0.31 declares under names that the model does not have: class -> declared -> real.
# A name that is gone from here too is left out; `block.0` for `stages.0` and the like are found without this
# table.
_DECLARED_WRONGLY: dict[str, dict[str, str]] = {
    "HighResolutionNet": {"stem": "act2", "stage1": "layer1"},
    "MobileNetV5": {"bn1": "conv_stem"},
    "MobileNetV5Encoder": {"bn1": "conv_stem"},
}

# Children that come after the features, or beside them.
_NOT_FEATURES = re.compile(
    r"heads?|fc|classifier|classif|logits?|cls|aux\w*|output|avgpool|global_?pool|pool|dropout|drop|head_drop",
    re.IGNORECASE,
)


def stage_layers(model: nn.Module) -> list[str]:
    """Return the names of the model's stages, for ``layers=``, in the order of the model's ``named_modules``.

    For a timm model these are the modules that its ``feature_info`` declares, each checked against the model:
    where the declared name does not exist, or names a list that is never called, the module meant is found by
    its place (mvitv2, twins, gemma4_vit, hrnet, mobilenetv5, coat).  For any other model, torchvision's among
    them: the outermost modules with parts of their own, below a lone trunk (``features.denseblock1`` …,
        ``encoder.layers.…``),
    without the classification head; the pooling layers of a plain convolutional stack (VGG, AlexNet), since a
    stage ends there; every layer with parameters of a plain stack without pooling (an MLP).

    A compiled or DDP-wrapped model gives the names of the model inside, as ``layers=`` takes them.

    Raises:
        ProbeError: not an ``nn.Module``.

    Cost: none; the model is not run.  Needs no timm.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> model.layer1 = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> model.layer2 = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> model.head = nn.Linear(8, 2)
    >>> stage_layers(model)
    ['layer1', 'layer2']

    """
    if not isinstance(model, nn.Module):
        raise ProbeError(f"stage_layers takes a model, an nn.Module; got {type(model).__name__}.")
    model = unwrapped(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    order = {name: position for position, name in enumerate(modules)}
    declared = _declared_stages(model)
    found = [_located(name, declared, model, modules) for name in declared]
    stages = list(dict.fromkeys(name for name in found if name is not None))
    if not stages or len(stages) < min(2, len(declared)):
        stages = list(dict.fromkeys(_structural_stages(model)))
    return sorted(stages, key=order.__getitem__)


def _declared_stages(model: nn.Module) -> list[str]:
    info = getattr(model, "feature_info", None)
    module_name = getattr(info, "module_name", None)
    if module_name is not None:  # features_only=True: an object in place of the list
        names = module_name()
    elif isinstance(info, list | tuple):
        names = [stage.get("module") for stage in info if isinstance(stage, Mapping)]
    else:
        names = []
    return [name for name in names if isinstance(name, str) and name]


def _located(
    name: str, declared: Sequence[str], model: nn.Module, modules: Mapping[str, nn.Module]
) -> str | None:
    renamed = _DECLARED_WRONGLY.get(type(model).__name__, {})
    for candidate in (name, renamed.get(name), name.replace(".", "_")):
        if candidate in modules:
            return _last_called(str(candidate), modules[str(candidate)])
    root, _, index = name.rpartition(".")
    if not root or not index.isdigit():
        return None
    # `block.0 … block.3` where the model has `stages.0 … stages.3`: the heaviest list with these indices.
    indices = {d.rpartition(".")[2] for d in declared if d.rpartition(".")[0] == root}
    lists = [n for n, module in modules.items() if n and {c for c, _ in module.named_children()} >= indices]
    exact = [n for n in lists if len(list(modules[n].children())) == len(indices)]
    if not (exact or lists):
        return None
    heaviest = max(exact or lists, key=lambda n: _weight(modules[n]))
    return _last_called(f"{heaviest}.{index}", modules[f"{heaviest}.{index}"])


def _last_called(name: str, module: nn.Module) -> str | None:
    # A ModuleList has no forward, so no hook of it ever fires: its last part is the stage's output.
    while type(module).forward is nn.Module.forward:
        children = list(module.named_children())
        if not children:
            return None
        name, module = f"{name}.{children[-1][0]}", children[-1][1]
    return name


def _structural_stages(model: nn.Module, prefix: str = "") -> list[str]:
    if prefix and _declared_stages(model):
        return [f"{prefix}{name}" for name in stage_layers(model)]
    children = [(n, c) for n, c in model.named_children() if not _NOT_FEATURES.fullmatch(n)]
    blocks = [
        (n, c) for n, c in children if any(True for _ in c.children()) and any(True for _ in c.parameters())
    ]
    if not blocks:
        return _plain_stack(model, prefix)
    total = sum(_weight(block) for _, block in blocks)
    stages: list[str] = []
    for name, block in blocks:
        share = _weight(block) / max(total, 1)
        never_called = type(block).forward is nn.Module.forward
        if never_called or share > 0.9 or _declared_stages(block):
            stages += _structural_stages(block, f"{prefix}{name}.")
        else:
            stages.append(f"{prefix}{name}")
    return stages


def _weight(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not nn.parameter.is_lazy(p))


def _plain_stack(model: nn.Module, prefix: str) -> list[str]:
    children = dict(model.named_children())
    pools = [n for n, c in children.items() if "Pool" in type(c).__name__]
    weighted = [n for n, c in children.items() if any(True for _ in c.parameters())]
    return [f"{prefix}{n}" for n in (pools if len(pools) > 1 else weighted)] or [prefix.rstrip(".")]
