"""Pools: the small tensors of a model that are not packed, those of one dtype as one tensor of the
file. Each alone takes more bytes to describe than many of them hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from compressops.formats.checks import bits_of
from compressops.formats.coding import Coding, Raw
from compressops.formats.container import DTYPE_NAMES
from compressops.formats.layout import Dense
from compressops.formats.number import FLOAT_DTYPES, Float
from compressops.formats.packed import PackedTensor

# Of a tensor that is pooled. Larger ones stay tensors of their own, which any reader sees by name.
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


def members(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Which of the plain ``tensors`` belong in which pool, by its name in the file: those of a
    dtype, in the order of their names, if there are at least two. Of float32, those that a shorter
    float holds bit for bit go apart."""
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


def build(pool: str, tensors: Iterable[Tensor], coding: Coding) -> Tensor | PackedTensor:
    """The pool of ``tensors`` (of one dtype, any shapes and devices), on the CPU.

    Returns:
        their entries one after the other, ``[total]``: packed with ``coding`` (and in the shorter
        float of this pool) where that saves 5 %, else as they are.
    """
    flat = torch.cat([_flat(tensor) for tensor in tensors])
    number = NUMBERS.get(pool, _FLOATS.get(flat.dtype))
    if number is None:
        return flat
    packed = PackedTensor.pack(flat, Dense(), number, coding)
    return packed if packed.nbytes <= WORTH * flat.nbytes else flat


def split(pool: Tensor, shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The members of a pool, each with memory of its own."""
    parts = pool.split([math.prod(shape) for shape in shapes.values()])
    return {
        name: part.clone().view(shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def stored_nbytes(tensors: Mapping[str, Tensor], coding: Coding) -> int:
    """Bytes that the plain ``tensors`` of a model take in its file."""
    if any(tensor.is_meta for tensor in tensors.values()):
        # They have no values that could be coded.
        return sum(tensor.nbytes for tensor in tensors.values())
    pools = members(tensors)
    pooled = {name for names in pools.values() for name in names}
    own = sum(tensor.nbytes for name, tensor in tensors.items() if name not in pooled)
    built = (build(pool, [tensors[n] for n in names], coding) for pool, names in pools.items())
    return own + sum(pool.nbytes for pool in built)


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
