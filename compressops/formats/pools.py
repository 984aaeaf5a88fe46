"""Pools: the tensors of a model that no module packs. Small ones of one dtype are one tensor of the
file, because each alone takes more bytes to describe than many of them hold; a larger one is a pool
of its own where it is coded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from compressops.formats.checks import bits_of
from compressops.formats.coding import Coding, Raw
from compressops.formats.container import DTYPE_NAMES
from compressops.formats.layout import Dense
from compressops.formats.number import FLOAT_DTYPES, Float
from compressops.formats.packed import PackedTensor

# Of a tensor that is pooled with others.
MAX_BYTES = 1 << 16
# A pool is packed if that saves so much of it, as with a plane of wide codes.
WORTH = 0.95

_FLOATS = {dtype: Float(name) for name, dtype in FLOAT_DTYPES.items()}


def _name(dtype: torch.dtype, number: Float | None = None) -> str:
    """Of the pool of ``dtype``, stored as ``number`` if that is another float."""
    inner = DTYPE_NAMES[dtype]
    if number is not None:
        inner += f"_{DTYPE_NAMES[FLOAT_DTYPES[number.dtype]]}"
    return f"__{inner}__"


_SHORTER = (Float("bfloat16"), Float("float16"))
# The floats that pools are stored in, where it is not the one that they are of.
NUMBERS = {_name(torch.float32, number): number for number in _SHORTER}
# What no tensor of a model may be called.
RESERVED = {*map(_name, DTYPE_NAMES), *NUMBERS}


class Pool(NamedTuple):
    """A tensor of the file, ``[total]``, and the names of the tensors whose entries it has, one
    after the other."""

    tensor: Tensor | PackedTensor
    names: list[str]


def build(tensors: Mapping[str, Tensor], coding: Coding) -> dict[str, Pool]:
    """The pools of the plain ``tensors`` (of any shapes and devices), by their names in the file.
    What is in none is stored as it is.

    Small tensors of one dtype stand together, in the order of their names, if there are at least
    two; of float32, those that a shorter float holds bit for bit go apart. Such a pool is packed
    with ``coding`` where that saves 5 %. A larger tensor of floats that ``coding`` makes 5 %
    smaller is a pool of its own, under its own name. Tensors on the meta device have no values that
    could be coded: with any of them there are no pools.
    """
    if any(tensor.is_meta for tensor in tensors.values()):
        return {}
    pools = {
        pool: Pool(_packed(_together(tensors, names), NUMBERS.get(pool), coding), names)
        for pool, names in _members(tensors).items()
    }
    if coding != Raw():
        for name, tensor in tensors.items():
            if tensor.nbytes > MAX_BYTES:
                alone = _packed(_flat(tensor), None, coding)
                if isinstance(alone, PackedTensor):
                    pools[name] = Pool(alone, [name])
    return pools


def _members(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of the small ``tensors`` that stand together, by pool."""
    small = sorted(name for name, tensor in tensors.items() if tensor.nbytes <= MAX_BYTES)
    found: dict[str, list[str]] = {}
    for pool, number in NUMBERS.items():
        short = [name for name in small if _holds(number, tensors[name])]
        if len(short) > 1:
            found[pool] = short
            small = [name for name in small if name not in set(short)]
    for name in small:
        found.setdefault(_name(tensors[name].dtype), []).append(name)
    return {pool: names for pool, names in found.items() if len(names) > 1}


def _together(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    return torch.cat([_flat(tensors[name]) for name in names])


def _packed(flat: Tensor, number: Float | None, coding: Coding) -> Tensor | PackedTensor:
    """``flat``, packed in this float or its own where that saves 5 %."""
    number = number or _FLOATS.get(flat.dtype)
    if number is None:
        return flat
    packed = PackedTensor.pack(flat, Dense(), number, coding)
    return packed if packed.nbytes <= WORTH * flat.nbytes else flat


def split(pool: Tensor, shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The members of a pool; each of several has memory of its own."""
    if len(shapes) == 1:
        return {name: pool.view(shape) for name, shape in shapes.items()}
    parts = pool.split([math.prod(shape) for shape in shapes.values()])
    return {
        name: part.clone().view(shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def stored_nbytes(tensors: Mapping[str, Tensor], pools: Mapping[str, Pool]) -> int:
    """Bytes that a model's plain ``tensors`` take in a file, where some are in these ``pools``."""
    pooled = {name for pool in pools.values() for name in pool.names}
    own = sum(tensor.nbytes for name, tensor in tensors.items() if name not in pooled)
    return own + sum(pool.tensor.nbytes for pool in pools.values())


def common_coding(codings: Iterable[Coding]) -> Coding:
    """The coding of a model's plain tensors: the first of its packed weights' that is not raw."""
    return next((coding for coding in codings if coding != Raw()), Raw())


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()


def _holds(number: Float, tensor: Tensor) -> bool:
    """Whether every value of a float32 tensor is one of ``number``, bit for bit."""
    if tensor.dtype != torch.float32:
        return False
    flat = _flat(tensor)
    return torch.equal(bits_of(number.fake_quantize(flat, {})), bits_of(flat))
