"""Pools: the small tensors of a model that are not packed, those of one dtype as one tensor of the
file. Each alone takes more bytes to describe than many of them hold."""

from __future__ import annotations

import itertools
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

NAMES = {dtype: f"__{name}__" for dtype, name in DTYPE_NAMES.items()}


def members(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Which of the plain ``tensors`` belong in which pool, by its name in the file: those of a
    dtype, in the order of their names, if there are at least two."""
    small = [name for name, tensor in tensors.items() if tensor.nbytes <= MAX_BYTES]
    small.sort(key=lambda name: (NAMES[tensors[name].dtype], name))
    groups = itertools.groupby(small, key=lambda name: NAMES[tensors[name].dtype])
    found = {pool: list(names) for pool, names in groups}
    return {pool: names for pool, names in found.items() if len(names) > 1}


def build(tensors: Iterable[Tensor], coding: Coding) -> Tensor | PackedTensor:
    """The pool of ``tensors`` (of one dtype, any shapes and devices), on the CPU.

    Returns:
        their entries one after the other, ``[total]``: packed with ``coding``, and floats as the
        shortest that holds all of them bit for bit, where that saves 5 %; else as they are.
    """
    flat = torch.cat([_flat(tensor) for tensor in tensors])
    if flat.dtype not in FLOAT_DTYPES.values():
        return flat
    packed = PackedTensor.pack(flat, Dense(), _shortest(flat), coding)
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
    return own + sum(build([tensors[n] for n in names], coding).nbytes for names in pools.values())


def common_coding(codings: Iterable[Coding]) -> Coding:
    """The coding of a model's plain tensors: the first of its packed weights' that is not raw."""
    return next((coding for coding in codings if coding != Raw()), Raw())


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()


def _shortest(flat: Tensor) -> Float:
    """What writes all entries bit for bit: what was rounded to 16 bits takes no more than those."""
    for name in ("bfloat16", "float16") if flat.dtype == torch.float32 else ():
        rounded = flat.to(FLOAT_DTYPES[name]).to(flat.dtype)
        if torch.equal(bits_of(rounded), bits_of(flat)):
            return Float(name)
    return Float(next(name for name, dtype in FLOAT_DTYPES.items() if dtype == flat.dtype))
