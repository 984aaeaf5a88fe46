"""How large a compressed model is, before it is converted: ideal and stored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from compressops.compress.parametrizations import record
from compressops.compress.select import weight_layers
from compressops.formats.packed import PackedTensor


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
    """Pack every layer of ``model`` and add up; the model stays as it is."""
    weights = kept = code_bits = ideal_bits = dense_bits = 0
    stored = whole = 0
    for module in weight_layers(model).values():
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
        stored += count * dense // 8 if done is None else pack(module).nbytes
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


def pack(module: nn.Module) -> PackedTensor:
    """``module``'s weight as its record says."""
    done = record(module)
    if done is None:
        raise ValueError(f"{type(module).__name__}: nothing was done to its weight")
    return PackedTensor.pack(
        module.weight.detach().cpu(),
        layout=done.layout,
        number=done.number,
        coding=done.coding,
        params=None if done.params is None else {k: v.cpu() for k, v in done.params.items()},
        mask=None if done.mask is None else done.mask.cpu(),
    )


def other_tensors(model: nn.Module) -> list:
    """All parameters and buffers of the state that are not a layer's weight."""
    layers = set(map(id, weight_layers(model).values()))
    found = []
    for name, module in model.named_modules():
        if ".parametrizations." in f".{name}.":
            continue
        for key, tensor in module._parameters.items():
            if tensor is not None and not (id(module) in layers and key == "weight"):
                found.append(tensor)
        for key, tensor in module._buffers.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                found.append(tensor)
    # A parametrized tensor other than a weight is stored dense.
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                if name != "weight" or id(module) not in layers:
                    found.append(getattr(module, name).detach())
    return found
