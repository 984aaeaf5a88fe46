"""How large a compressed model is, before it is converted: ideal and stored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressops import plan as plans
from compressops.compress.parametrizations import record
from compressops.formats import pools
from compressops.formats.packed import PackedTensor
from compressops.model_state import join
from compressops.nn import PackedModule
from compressops.registry import is_layer


@dataclass(frozen=True)
class Sizes:
    """Size of a model.

    Attributes:
        density: kept weights over all, of the layers' weights (without biases and norms).
        bits: bits of a code, mean over the weights, or the entries of their factors.
        ideal_rate: 32 · n / Σ nₗ · densityₗ · bitsₗ over the layers' weights, the accounting of
            papers: no indices, scales or tables.
        stored_bytes: of all parameters and buffers as in the file, the weights packed as recorded.
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
    weights = kept = coded = code_bits = ideal_bits = dense_bits = 0
    stored = whole = 0
    plain, codings = other_tensors(model), []
    for name, module in _unique_weights(model).items():
        weight = module.weight.detach()
        done = record(module)
        count, dense = weight.numel(), weight.element_size() * 8
        weights += count
        for size, alive, bits in entries(module):
            kept += alive
            coded += size
            code_bits += size * bits
            ideal_bits += alive * bits
        dense_bits += count * dense
        if done is None:
            plain[join(name, "weight")] = weight
        else:
            whole += count * dense // 8
            codings.append(done.coding)
            stored += packed(module).nbytes
    whole += sum(tensor.nbytes for tensor in plain.values())
    stored += pools.stored_nbytes(plain, pools.build(plain, pools.common_coding(codings)))
    return Sizes(
        density=kept / max(1, weights),
        bits=code_bits / max(1, coded),
        ideal_rate=dense_bits / max(1, ideal_bits),
        stored_bytes=stored,
        stored_rate=whole / max(1, stored),
    )


def entries(module: nn.Module) -> list[tuple[int, int, int]]:
    """Entries of a layer's weight, those of them that are kept, and the bits of each; or those of
    its factors, one by one."""
    done = record(module)
    parts = done.factors if done is not None and done.factors else ((module, done),)
    return [
        (
            part.weight.numel(),
            part.weight.numel() if of is None or of.mask is None else int(of.mask.sum()),
            part.weight.element_size() * 8 if of is None else of.number.bits,
        )
        for part, of in parts
    ]


def packed(module: nn.Module) -> PackedTensor:
    """``module``'s weight as its record says, and as `convert` packs it."""
    done = record(module)
    if done is None:
        raise ValueError(f"{type(module).__name__}: nothing was done to its weight")
    return plans.pack(module, plans.plan(module, done, plans.Choice()))


def _counted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights the sizes are about, those that stay as they are included.

    Packed weights, and those that a hook computes, count by the tensors that they are made of.
    """
    return {
        name: m
        for name, m in model.named_modules()
        if is_layer(m) and not isinstance(m, PackedModule) and "weight" not in vars(m)
    }


def _unique_weights(model: nn.Module) -> dict[str, nn.Module]:
    first: dict[tuple[int, ...], tuple[str, nn.Module]] = {}
    for name, module in _counted(model).items():
        first.setdefault(_originals(module), (name, module))
    return dict(first.values())


def _originals(module: nn.Module) -> tuple[int, ...]:
    if parametrize.is_parametrized(module, "weight"):
        # Other parametrizations than ours (weight_norm) may have several.
        own = module.parametrizations["weight"]
        return tuple(id(p) for p in own.parameters(recurse=False))
    return (id(module.weight),)


def other_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of the state that are not a layer's weight, each once, under
    their names in it."""
    layers = _counted(model).values()
    seen = {part for module in layers for part in _originals(module)}
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if ".parametrizations." in f".{name}.":
            continue
        tensors = module._parameters | {
            key: tensor
            for key, tensor in module._buffers.items()
            if key not in module._non_persistent_buffers_set
        }
        for key, tensor in tensors.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[join(name, key)] = tensor.detach()
    # A parametrized tensor other than a weight is stored dense.
    owned = set(map(id, layers))
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module) and not getattr(module, "is_factor", False):
            for key in module.parametrizations:
                if key != "weight" or id(module) not in owned:
                    found[join(name, key)] = getattr(module, key).detach()
    return found
