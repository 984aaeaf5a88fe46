"""Which layers of a model a stage works on: globs over module names."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module with a ``weight`` of two or more dimensions, by name, in the model's order.

    These are the linear, convolution and embedding layers; norms (1-D weights) are left out.
    A parametrized weight counts.
    """
    found = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            weight = module.parametrizations["weight"].original
        else:
            weight = module._parameters.get("weight")
        if weight is not None and weight.dim() >= 2:
            found[name] = module
    return found


def select(
    model: nn.Module, layers: str | Iterable[str] = "*", exclude: str | Iterable[str] = ()
) -> dict[str, nn.Module]:
    """The weight layers whose name matches a glob of ``layers`` and none of ``exclude``.

    Raises:
        ValueError: a glob of either list matches no layer, or nothing is left.
    """
    candidates = weight_layers(model)
    chosen = match("layers", layers, candidates)
    chosen -= match("exclude", exclude, candidates)
    if not chosen:
        raise ValueError(
            f"layers={layers!r} with exclude={exclude!r} leaves no layer; "
            f"the model's layers are {', '.join(candidates) or 'none'}"
        )
    return {name: module for name, module in candidates.items() if name in chosen}


def match(argument: str, globs: str | Iterable[str], candidates: Iterable[str]) -> set[str]:
    """The names that match any of ``globs``; a glob that matches none is an error."""
    candidates = list(candidates)
    found: set[str] = set()
    for glob in (globs,) if isinstance(globs, str) else globs:
        hits = {name for name in candidates if fnmatchcase(name, glob)}
        if not hits:
            raise ValueError(
                f"{argument}: {glob!r} matches no layer; "
                f"the model's layers are {', '.join(candidates) or 'none'}"
            )
        found |= hits
    return found
