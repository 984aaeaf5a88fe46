"""Which layers of a model a stage works on: globs over module names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from compressops.compress.parametrizations import Factors, find
from compressops.registry import is_layer, why_not


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer whose weight can be compressed, by name, in the model's order.

    These are the layers that `convert` has a module for: what it does not know, no file can
    store compressed. In the place of a factorized layer stand its factors, ``"layer.u"`` and so on.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if getattr(module, "is_factor", False):
            found[factor_name(name)] = module
        elif is_layer(module) and why_not(module) is None and not factorized(module):
            found[name] = module
    return found


def factorized(module: nn.Module) -> bool:
    """Whether the layer's weight is computed from factors, which take its place in every stage."""
    return find(module, Factors) is not None


def factor_name(name: str) -> str:
    """``"layer.u"`` of the factor ``"layer.parametrizations.weight.0.u"``."""
    owner, _, factor = name.rpartition("parametrizations.weight.0.")
    return owner + factor


def _owner(name: str, module: nn.Module) -> str:
    """The name that a glob may call a layer by: of a factor, its layer's."""
    return name.rpartition(".")[0] if getattr(module, "is_factor", False) else name


def select(
    model: nn.Module, layers: str | Iterable[str] = "*", exclude: str | Iterable[str] = ()
) -> dict[str, nn.Module]:
    """The weight layers whose name matches a glob of ``layers`` and none of ``exclude``; a
    factor's name or that of its layer.

    Raises:
        ValueError: a glob of either list matches no layer, nothing is left, a layer is named that
            cannot be compressed, or of layers that share a weight only some are chosen.
    """
    candidates = weight_layers(model)
    others = {
        n: m
        for n, m in model.named_modules()
        if is_layer(m) and n not in candidates and not factorized(m)
    }
    owners = {n: _owner(n, m) for n, m in candidates.items()}
    chosen = match("layers", layers, candidates, others, owners)
    chosen -= match("exclude", exclude, [*candidates, *others], owners=owners)
    if not chosen:
        raise ValueError(
            f"layers={layers!r} with exclude={exclude!r} leaves no layer; "
            f"the model's layers are {', '.join(candidates) or 'none'}"
        )
    found = {name: module for name, module in candidates.items() if name in chosen}
    for name, module in found.items():
        check_plain(name, module)
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
    owners: Mapping[str, str] | None = None,
) -> set[str]:
    """The names that match any of ``globs``; a glob that matches none is an error.

    So is one without wildcards that names one of ``refused``, which wildcards pass over.
    ``owners`` are second names.
    """
    candidates, refused, owners = list(candidates), refused or {}, owners or {}
    found: set[str] = set()
    for glob in (globs,) if isinstance(globs, str) else globs:
        hits = {
            name
            for name in candidates
            if fnmatchcase(name, glob) or fnmatchcase(owners.get(name, name), glob)
        }
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


def check_plain(name: str, module: nn.Module) -> None:
    """Refuse a weight with a parametrization that is none of ours, e.g. weight_norm."""
    if not parametrize.is_parametrized(module, "weight"):
        return
    for part in module.parametrizations["weight"]:
        if not getattr(part, "is_compression", False):
            raise ValueError(
                f"layer {name!r}: its weight is computed by {type(part).__name__.lstrip('_')} "
                f"already; make it plain with parametrize.remove_parametrizations(layer, "
                f"'weight'), or exclude it"
            )


def _check_ties(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """A weight that is also another module's must stay what it is, or change for both."""
    shared = {id(original(module)): name for name, module in chosen.items()}
    ours = {id(module) for module in chosen.values()}
    for name, module in model.named_modules():
        # The last one: a factor is part of a parametrization, and has some itself.
        before, inner, _ = f".{name}".rpartition(".parametrizations.")
        inside = before.removeprefix(".") if inner else name
        if id(module) in ours or (inside != name and id(model.get_submodule(inside)) in ours):
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in shared:
                raise ValueError(
                    f"layer {shared[id(parameter)]!r} shares its weight with {inside!r} "
                    f"({key if inside == name else 'weight'}), which is not selected: select both "
                    f"or neither"
                )
