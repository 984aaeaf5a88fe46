"""Which layers of a model a stage works on: globs over module names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from compressops.registry import is_layer, why_not


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer whose weight can be compressed, by name, in the model's order.

    These are the layers that `convert` has a module for: what it does not know, no file can
    store compressed.
    """
    return {name: m for name, m in model.named_modules() if is_layer(m) and why_not(m) is None}


def select(
    model: nn.Module, layers: str | Iterable[str] = "*", exclude: str | Iterable[str] = ()
) -> dict[str, nn.Module]:
    """The weight layers whose name matches a glob of ``layers`` and none of ``exclude``.

    Raises:
        ValueError: a glob of either list matches no layer, nothing is left, a layer is named that
            cannot be compressed, or of layers that share a weight only some are chosen.
    """
    candidates = weight_layers(model)
    others = {n: m for n, m in model.named_modules() if is_layer(m) and n not in candidates}
    chosen = match("layers", layers, candidates, others)
    chosen -= match("exclude", exclude, [*candidates, *others])
    if not chosen:
        raise ValueError(
            f"layers={layers!r} with exclude={exclude!r} leaves no layer; "
            f"the model's layers are {', '.join(candidates) or 'none'}"
        )
    found = {name: module for name, module in candidates.items() if name in chosen}
    for name, module in found.items():
        foreign = _foreign(module)
        if foreign is not None:
            raise ValueError(
                f"layer {name!r}: its weight is computed by {foreign} already; make it plain with "
                f"parametrize.remove_parametrizations(layer, 'weight'), or exclude it"
            )
    _check_ties(model, found)
    return found


def tied_groups(layers: Mapping[str, nn.Module]) -> list[list[nn.Module]]:
    """The layers, those together that share a weight, which is one weight to every stage."""
    groups: dict[int, list[nn.Module]] = {}
    for module in layers.values():
        groups.setdefault(id(original(module)), []).append(module)
    return list(groups.values())


def original(module: nn.Module) -> nn.Parameter:
    """The parameter that ``module.weight`` is, or is computed from by our parametrizations."""
    if parametrize.is_parametrized(module, "weight"):
        return module.parametrizations["weight"].original
    return module.weight


def match(
    argument: str,
    globs: str | Iterable[str],
    candidates: Iterable[str],
    refused: Mapping[str, nn.Module] | None = None,
) -> set[str]:
    """The names that match any of ``globs``; a glob that matches none is an error.

    So is one without wildcards that names one of ``refused``, which wildcards pass over.
    """
    candidates, refused = list(candidates), refused or {}
    found: set[str] = set()
    for glob in (globs,) if isinstance(globs, str) else globs:
        hits = {name for name in candidates if fnmatchcase(name, glob)}
        not_for_us = [name for name in refused if fnmatchcase(name, glob)]
        if not_for_us and (glob in refused or not hits):
            name = not_for_us[0]
            raise ValueError(
                f"{argument}: {glob!r}: layer {name!r} cannot be compressed: "
                f"{why_not(refused[name])}"
            )
        if not hits:
            raise ValueError(
                f"{argument}: {glob!r} matches no layer; "
                f"the model's layers are {', '.join(candidates) or 'none'}"
            )
        found |= hits
    return found


def _foreign(module: nn.Module) -> str | None:
    """The parametrization of the weight that is none of ours, e.g. weight_norm."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    for part in module.parametrizations["weight"]:
        if not getattr(part, "is_compression", False):
            return type(part).__name__.lstrip("_")
    return None


def _check_ties(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """A weight that is also another module's must stay what it is, or change for both."""
    shared = {id(original(module)): name for name, module in chosen.items()}
    ours = {id(module) for module in chosen.values()}
    for name, module in model.named_modules():
        inside = f".{name}".split(".parametrizations.")[0].removeprefix(".")
        if id(module) in ours or (inside != name and id(model.get_submodule(inside)) in ours):
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in shared:
                raise ValueError(
                    f"layer {shared[id(parameter)]!r} shares its weight with {inside!r} "
                    f"({key if inside == name else 'weight'}), which is not selected: select both "
                    f"or neither"
                )
