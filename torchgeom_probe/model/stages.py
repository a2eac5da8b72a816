"""The stages of a model: what ``layers="auto"`` takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.wrappers import unwrapped

# Stages that timm 1.0.31 declares under names that the model does not have: class -> declared -> real.
# A name that is gone from here too is left out; `block.0` for `stages.0` and the like are found without this
# table.
_DECLARED_WRONGLY: dict[str, dict[str, str]] = {
    "HighResolutionNet": {"stem": "act2", "stage1": "layer1"},
    "MobileNetV5": {"bn1": "conv_stem"},
    "MobileNetV5Encoder": {"bn1": "conv_stem"},
}

#: A part with a list of blocks in it is a trunk from this share of the weights on: large embeddings stand beside it, in
#: BERT.
_TRUNK_OF_BLOCKS = 0.25

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
    them: the outermost modules with parts of their own, below a lone trunk (``features.denseblock1`` …) or a
    list of blocks (``encoder.layer.0`` …), without the classification head; the pooling layers of a plain
    convolutional stack (VGG, AlexNet), since a stage ends there; in a plain stack without pooling (an MLP)
    what follows each layer with parameters, before the next one: its activation.

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


def _located(name: str, declared: Sequence[str], model: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
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
    while _is_never_called(module):
        children = list(module.named_children())
        if not children:
            return None
        name, module = f"{name}.{children[-1][0]}", children[-1][1]
    return name


def _structural_stages(model: nn.Module, prefix: str = "") -> list[str]:
    if prefix and _declared_stages(model):
        return [f"{prefix}{name}" for name in stage_layers(model)]
    children = [(n, c) for n, c in model.named_children() if not _NOT_FEATURES.fullmatch(n)]
    blocks = [(n, c) for n, c in children if any(True for _ in c.children()) and any(True for _ in c.parameters())]
    if not blocks:
        return _plain_stack(model, prefix)
    total = sum(_weight(block) for _, block in blocks)
    stages: list[str] = []
    for name, block in blocks:
        share = _weight(block) / max(total, 1)
        holds_blocks = not name.isdigit() and any(map(_is_list_of_blocks, block.children()))  # and is none itself
        is_trunk = share > 0.9 or (share > _TRUNK_OF_BLOCKS and holds_blocks)
        # Hooks see a scripted module as a whole at most, so the part that holds it is the stage.
        scripted = any(isinstance(m, torch.jit.ScriptModule) for m in (block, *block.children()))
        if _is_never_called(block) or (not scripted and (is_trunk or _declared_stages(block))):
            stages += _structural_stages(block, f"{prefix}{name}.")
        else:
            stages.append(f"{prefix}{name}")
    return stages


def _is_never_called(module: nn.Module) -> bool:
    """Whether it has no forward: a ModuleList, whose hooks never fire."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is nn.Module.forward


def _is_list_of_blocks(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 2


def _weight(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not nn.parameter.is_lazy(p))


def _plain_stack(model: nn.Module, prefix: str) -> list[str]:
    children = dict(model.named_children())
    pools = [n for n, c in children.items() if "Pool" in type(c).__name__]
    weighted = [n for n, c in children.items() if any(True for _ in c.parameters())]
    if isinstance(model, nn.Sequential) and len(pools) < 2:
        weighted = _activations(list(children.items()), weighted)
    return [f"{prefix}{n}" for n in (pools if len(pools) > 1 else weighted)] or [prefix.rstrip(".")]


def _activations(children: list[tuple[str, nn.Module]], weighted: list[str]) -> list[str]:
    """Of each layer with parameters, the last module before the next one that still computes something of it."""
    found = []
    last: str | None = None
    for name, module in children:
        if name in weighted and "Norm" not in type(module).__name__:  # it belongs to the layer before it
            found += [last] if last is not None else []
            last = name
        elif last is not None and not isinstance(module, (nn.Dropout, nn.Flatten, nn.Unflatten, nn.Identity)):
            last = name
    return [*found, *([last] if last is not None else [])]
