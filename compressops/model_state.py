"""What of a model goes into its file as packed weights, and what as plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressops.formats.packed import PackedTensor
from compressops.nn.attention import AttentionQuantizer
from compressops.nn.fused import Fused
from compressops.nn.winograd_conv import WinogradConv

_SHOWN = 5
_CONFIGURED = (WinogradConv, Fused, AttentionQuantizer)


def join(module: str, name: str) -> str:
    """``module.name``; the model itself has the name ``""``."""
    return f"{module}.{name}" if module else name


def packed_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules that hold packed weights, under each of their names."""
    named = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in named if hasattr(module, "packed_tensors")]


def configured_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules of whose configuration a file keeps a record: the packed ones, those that run
    another kernel on a float weight, those that stand for a fused activation, and those that round
    what attention multiplies."""
    named = model.named_modules(remove_duplicate=False)
    return [
        (name, module)
        for name, module in named
        if hasattr(module, "packed_tensors") or isinstance(module, _CONFIGURED)
    ]


def plain_state(model: nn.Module) -> dict[str, Any]:
    """The state dict, live, without what packed modules keep of their packed tensors."""
    owners = packed_modules(model)
    parts = {
        id(part)
        for _, module in owners
        for packed in module.packed_tensors().values()
        for part in packed.parts.values()
    }
    prefixes = tuple(join(name, "") for name, _ in configured_modules(model))
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if id(value) not in parts
        and not (name.endswith("_extra_state") and name.startswith(prefixes))
    }


def check_fit(name: str, stored: Tensor | PackedTensor, target: Tensor) -> None:
    """Raise a ``ValueError`` unless a tensor of a file has the shape and dtype of the model's."""
    if tuple(target.shape) != tuple(stored.shape) or target.dtype != stored.dtype:
        raise ValueError(
            f"{name} is {stored.dtype} {list(stored.shape)} in the file, "
            f"{target.dtype} {list(target.shape)} in the model"
        )


def load_plain_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy plain tensors of a file into ``model``, or put them there where it has none but shapes
    (on the meta device).

    Raises:
        ValueError: one is missing, unknown, of another shape or dtype, before anything is written;
            or a buffer that is in no state is on the meta device.
    """
    state = plain_state(model)
    for names, what in (
        (sorted(set(state) - set(tensors)), "the file lacks"),
        (sorted(set(tensors) - set(state)), "the model lacks"),
    ):
        if names:
            shown = ", ".join(names[:_SHOWN]) + (
                f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else ""
            )
            raise ValueError(f"{what} {shown}")
    for name, tensor in tensors.items():
        check_fit(name, tensor, state[name])
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in state:
            raise ValueError(
                f"buffer {name} of the model is on the meta device, and no file holds it: make the "
                "model with its parameters alone there (accelerate.init_empty_weights)"
            )
    # Tied ones are one again.
    made: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            target = state[name]
            if not target.is_meta:
                target.copy_(tensor)
                continue
            owner, _, key = name.rpartition(".")
            if isinstance(target, nn.Parameter):
                new = made.setdefault(id(target), nn.Parameter(tensor, target.requires_grad))
                model.get_submodule(owner)._parameters[key] = new
            else:
                model.get_submodule(owner)._buffers[key] = made.setdefault(id(target), tensor)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of layers by name, those of parametrized and packed layers too."""
    named = model.named_modules(remove_duplicate=False)
    weights = {join(name, "weight"): getattr(module, "weight", None) for name, module in named}
    return {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}


def check_all_packed(model: nn.Module) -> None:
    """Refuse a model with a layer that was compressed and not packed: what its file would hold
    of it, masks and originals, has no place in the float model that `load` fills.

    Raises:
        ValueError: which names the layers, the reasons that `convert` left them, and what to do.
    """
    left = {name: kind for name, module in model.named_modules() if (kind := _compressed(module))}
    if not left:
        return
    notes = getattr(model, "conversion_notes", {})
    reasons = [
        f"{name or '(the model)'!r} ({kind}): "
        + (notes[name].why if name in notes else "the model was not converted")
        for name, kind in left.items()
    ]
    more = f" and {len(reasons) - _SHOWN} more" if reasons[_SHOWN:] else ""
    first = next(iter(left))
    layer = f"model.get_submodule({first!r})" if first else "model"
    raise ValueError(
        f"{len(left)} compressed layer{'s are' if left.keys() - {first} else ' is'} not packed, "
        f"and a file of their masks and originals could not be loaded: "
        f"{'; '.join(reasons[:_SHOWN])}{more}. Save what compressops.convert(model) returns; "
        f"a layer that convert leaves has to be excluded from the recipe, or made plain: "
        f"torch.nn.utils.parametrize.remove_parametrizations({layer}, 'weight')"
    )


def _compressed(module: nn.Module) -> str:
    """The class of a layer that holds parametrizations of ours; ``""`` if it holds none."""
    if not parametrize.is_parametrized(module):
        return ""
    # Loading a file needs no recipes, and importing them takes the trainer along.
    from compressops.compress import record

    if any(record(module, name) is not None for name in module.parametrizations):
        return parametrize.type_before_parametrizations(module).__name__
    return ""
