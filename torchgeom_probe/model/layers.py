"""From what a user writes for ``layers=`` to the modules that get a hook."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, cast

from torch import nn

from torchgeom_probe.errors import ProbeError
from torchgeom_probe.model.hooked import Transform
from torchgeom_probe.model.stages import stage_layers

OneSpec = Union[str, nn.Module, type[nn.Module], Callable[[str, nn.Module], bool]]  # noqa: UP007
LayerSpec = Union[OneSpec, Sequence[OneSpec]]  # noqa: UP007


def resolve(model: nn.Module, layers: LayerSpec) -> dict[str, nn.Module]:
    """Return name → module for what ``layers`` names, in the order of the model's own ``named_modules``.

    A name (``""`` is the model itself); a glob, in which ``*`` stays within one level and ``**`` crosses dots; a
    module; a module type; a callable ``(name, module) -> bool``; ``"auto"``, the stages; or a sequence of any of these.

    Raises:
        ProbeError: nothing was asked for, or something that the model does not have (with the close names).

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 5)))
    >>> list(resolve(model, "*")), list(resolve(model, "**.1")), list(resolve(model, nn.Linear))
    (['0', '1'], ['1', '1.1'], ['0', '1.1'])
    """
    names = _names(model)
    wanted: set[str] = set()
    for spec in _flat(layers):
        wanted.update(_matches(model, names, spec))
    if not wanted:
        raise ProbeError(
            "layers=[] asks for no layer at all.\nName some, or take the model's stages:  layers='auto'\n"
            f"The model has {_listed([n for n in names if n])}."
        )
    found: dict[str, nn.Module] = {}
    for name, module in names.items():
        if name in wanted and all(module is not other for other in found.values()):
            found[name] = module
    return found


def named(model: nn.Module, layers: LayerSpec) -> frozenset[str]:
    """Those of ``resolve(model, layers)`` that somebody asked for, and not ``"auto"`` alone.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    >>> named(model, "auto"), named(model, ["auto", ""])
    (frozenset(), frozenset({''}))
    """
    specs = [spec for spec in _flat(layers) if not (isinstance(spec, str) and spec == "auto")]
    return frozenset(resolve(model, specs)) if specs else frozenset()


def close_names(name: str, names: Sequence[str]) -> list[str]:
    """Return up to five names that look like the one given, or share its last component."""
    tail = name.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    near += [n for n in names if tail and n.rsplit(".", 1)[-1] == tail]
    return list(dict.fromkeys(near))[:5]


def _names(model: nn.Module) -> dict[str, nn.Module]:
    names: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # torch.compile puts a wrapper around a submodule: its hooks belong on the module inside, under the plain name.
        inner = getattr(module, "_orig_mod", None)
        names.setdefault(_plain(name), inner if isinstance(inner, nn.Module) else module)
    return names


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _flat(layers: LayerSpec) -> list[OneSpec]:
    if isinstance(layers, Sequence) and not isinstance(layers, (str, nn.Module)):
        return [spec for item in layers for spec in _flat(item)]
    return [layers]


def _matches(model: nn.Module, names: dict[str, nn.Module], spec: OneSpec) -> list[str]:
    if isinstance(spec, str):
        return _by_name(model, names, spec)
    if isinstance(spec, nn.Module):
        found = [name for name, module in names.items() if module is spec or getattr(spec, "_orig_mod", None) is module]
        if not found:
            raise ProbeError(
                f"the module {type(spec).__name__} given in layers= is no part of this model (a copy of one of its "
                "modules?).\n"
                f"Name it instead: {_listed([n for n in names if n])}."
            )
        return found[:1]
    if isinstance(spec, type) and issubclass(spec, nn.Module):
        found = [name for name, module in names.items() if isinstance(module, spec)]
        if not found:
            kinds = sorted({type(m).__name__ for m in names.values()})
            raise ProbeError(f"the model has no module of type {spec.__name__}.\nIts types are {_listed(kinds)}.")
        return found
    if callable(spec):
        accepts = cast("Callable[[str, nn.Module], bool]", spec)
        found = [name for name, module in names.items() if accepts(name, module)]
        if not found:
            raise ProbeError(
                f"the callable given in layers= accepted none of the model's {len(names)} modules.\n"
                "It is called as  callable(name, module)  and returns True for the layers to measure."
            )
        return found
    raise ProbeError(
        f"layers= got {spec!r} of type {type(spec).__name__}.\n"
        "Write names, globs, modules, module types, a callable (name, module) -> bool, or 'auto'."
    )


def _by_name(model: nn.Module, names: dict[str, nn.Module], spec: str) -> list[str]:
    if spec == "auto":
        return [_plain(name) for name in stage_layers(model)]
    for candidate in (spec, _plain(spec), spec.removeprefix("module.")):
        if candidate in names:
            return [candidate]
    if "*" in spec or "?" in spec:
        pattern = re.escape(spec).replace(r"\*\*\.", "(?:.+\\.)?").replace(r"\*\*", ".*")
        pattern = pattern.replace(r"\*", r"[^.]*").replace(r"\?", r"[^.]")
        found = [name for name in names if name and re.fullmatch(pattern, name)]
        if found:
            return found
        raise ProbeError(
            f"no layer matches {spec!r}; '*' stays within one level, '**' crosses dots.\n"
            f"The model has {_listed([n for n in names if n])}."
        )
    near = close_names(spec, [n for n in names if n])
    hint = (
        f"Did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"The model has {_listed([n for n in names if n])}."
    )
    raise ProbeError(f"the model has no layer {spec!r}.\n{hint}")


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(n) for n in names[:most])
    return f"{shown}, … ({len(names)} in all)" if len(names) > most else shown or "no submodules: use layers=''"


def resolved_source(model: nn.Module, source: str | nn.Module | None) -> dict[str, Any]:
    """The fields ``source_name`` and ``source`` of a HookedModel; none where the metric lives on the model's input."""
    if source is None:
        return {}
    found = resolve(model, source)
    if len(found) != 1:
        raise ProbeError(
            f"source={source!r} names {len(found)} modules ({', '.join(map(repr, list(found)[:5]))}); it takes one.\n"
            f"Write, for instance, source={next(iter(found))!r}"
        )
    name, module = next(iter(found.items()))
    return {"source_name": name, "source": module}


def resolved_transforms(
    model: nn.Module, layers: Mapping[str, nn.Module], transform: Transform | Mapping[str, Transform] | None
) -> dict[str, Callable[[Any], Any]]:
    """Layer → what maps its output; ``"*"`` where one is for all."""
    if transform is None:
        return {}
    if not isinstance(transform, Mapping):
        return {"*": transform}
    found: dict[str, Transform] = {}
    for key, function in transform.items():
        names = [name for name in resolve(model, key) if name in layers]
        if not names:
            near = close_names(key, list(layers))
            raise ProbeError(
                f"transform= has the key {key!r}, which is none of the layers measured "
                f"({', '.join(map(repr, list(layers)[:8]))}).\n"
                f"Write one of them as the key{': ' + repr(near[0]) if near else ''}, or add {key!r} to layers=."
            )
        found.update(dict.fromkeys(names, function))
    return found
