"""How large a compressed model is, before it is converted: ideal and stored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressops import plan as plans
from compressops.compress.parametrizations import record
from compressops.formats.packed import PackedTensor
from compressops.nn import PackedModule
from compressops.registry import is_layer


@dataclass(frozen=True)
class Sizes:
    """Size of a model.

    Attributes:
        density: kept weights over all, of the layers' weights (without biases and norms).
        bits: bits of a weight's code, mean over the weights.
        ideal_rate: 32 · n / Σ nₗ · densityₗ · bitsₗ over the layers' weights, the accounting of
            papers: no indices, scales or tables.
        stored_bytes: of all parameters and buffers, the weights packed as recorded.
        stored_rate: bytes of all parameters and buffers uncompressed, over ``stored_bytes``.
    """

    density: float
    bits: float
    ideal_rate: float
    stored_bytes: int
    stored_rate: float


def sizes(model: nn.Module) -> Sizes:
    """Pack every layer of ``model`` and add up; the model stays as it is.

    A weight that several layers share counts once, as in the file.
    """
    weights = kept = code_bits = ideal_bits = dense_bits = 0
    stored = whole = 0
    for module in _unique_weights(model):
        weight = module.weight.detach()
        done = record(module)
        count, dense = weight.numel(), weight.element_size() * 8
        alive = count if done is None or done.mask is None else int(done.mask.sum())
        bits = dense if done is None else done.number.bits
        weights += count
        kept += alive
        code_bits += count * bits
        ideal_bits += alive * bits
        dense_bits += count * dense
        whole += count * dense // 8
        stored += count * dense // 8 if done is None else packed(module).nbytes
    for tensor in other_tensors(model):
        stored += tensor.numel() * tensor.element_size()
        whole += tensor.numel() * tensor.element_size()
    return Sizes(
        density=kept / max(1, weights),
        bits=code_bits / max(1, weights),
        ideal_rate=dense_bits / max(1, ideal_bits),
        stored_bytes=stored,
        stored_rate=whole / max(1, stored),
    )


def packed(module: nn.Module) -> PackedTensor:
    """``module``'s weight as its record says, and as `convert` packs it."""
    done = record(module)
    if done is None:
        raise ValueError(f"{type(module).__name__}: nothing was done to its weight")
    return plans.pack(module, plans.plan(module, done, plans.Choice()))


def _counted(model: nn.Module) -> list[nn.Module]:
    """The layers whose weights the sizes are about, those that stay as they are included.

    Packed weights, and those that a hook computes, count by the tensors that they are made of.
    """
    return [
        m
        for m in model.modules()
        if is_layer(m) and not isinstance(m, PackedModule) and "weight" not in vars(m)
    ]


def _unique_weights(model: nn.Module) -> list[nn.Module]:
    first: dict[tuple[int, ...], nn.Module] = {}
    for module in _counted(model):
        first.setdefault(_originals(module), module)
    return list(first.values())


def _originals(module: nn.Module) -> tuple[int, ...]:
    if parametrize.is_parametrized(module, "weight"):
        # Other parametrizations than ours (weight_norm) may have several.
        own = module.parametrizations["weight"]
        return tuple(id(p) for p in own.parameters(recurse=False))
    return (id(module.weight),)


def other_tensors(model: nn.Module) -> list:
    """All parameters and buffers of the state that are not a layer's weight, each once."""
    layers = set(map(id, _counted(model)))
    seen = {part for module in _counted(model) for part in _originals(module)}
    found = []

    def add(tensor: Tensor | None) -> None:
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            found.append(tensor)

    for name, module in model.named_modules():
        if ".parametrizations." in f".{name}.":
            continue
        for tensor in module._parameters.values():
            add(tensor)
        for key, tensor in module._buffers.items():
            if key not in module._non_persistent_buffers_set:
                add(tensor)
    # A parametrized tensor other than a weight is stored dense.
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                if name != "weight" or id(module) not in layers:
                    found.append(getattr(module, name).detach())
    return found
