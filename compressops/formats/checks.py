"""Checks of what goes into a packed tensor, and of what a file says it is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compressops.formats.number import FLOAT_DTYPES
from compressops.formats.registry import check_choice, check_int, shown

MAX_DIMENSIONS = 16
MAX_DIMENSION = 2**40
# What a tensor may decode to: 16M entries whatever it was stored in, and 4096 more per byte. (An
# index of gaps, Huffman coded, reaches 2040 entries a byte where nothing but zeros is left.)
FREE_ENTRIES = 1 << 24
ENTRIES_PER_BYTE = 4096
# So many products of a low-rank weight count as one entry; they take about as long.
PRODUCTS_PER_ENTRY = 64
SPEC_KEYS = {"shape", "dtype", "layout", "number", "coding", "meta", "parts"}


def check_spec(spec: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a packed tensor's spec, if it has the right keys of the right types.

    Raises:
        ValueError: which names the key and its value.
    """
    if not isinstance(spec, dict) or set(spec) != SPEC_KEYS:
        got = sorted(spec) if isinstance(spec, dict) else spec
        raise ValueError(f"a packed tensor's spec has {sorted(SPEC_KEYS)}, got {shown(got)}")
    shape = spec["shape"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"shape must be a list of at most {MAX_DIMENSIONS}, got {shown(shape)}")
    for size in shape:
        check_int("shape", f"each of {shown(shape)}", size, 0, MAX_DIMENSION)
    # Zeros left out: torch multiplies strides, which must not overflow for an empty tensor either.
    if math.prod(max(1, size) for size in shape) > 2**62:
        raise ValueError(f"shape {shape} is too large")
    for key in ("meta", "parts"):
        if not isinstance(spec[key], dict):
            raise ValueError(f"{key} must be an object, got {shown(spec[key])}")
    dtype = check_choice("spec", "dtype", spec["dtype"], tuple(FLOAT_DTYPES))
    return tuple(shape), FLOAT_DTYPES[dtype]


def entries_limit(nbytes: int) -> int:
    """Entries that ``nbytes`` bytes may decode to."""
    return FREE_ENTRIES + ENTRIES_PER_BYTE * nbytes


def check_entries(
    shape: tuple[int, ...], entries: int, rank: int, nbytes: int, max_entries: int | None
) -> None:
    """Raise a ``ValueError`` if a weight of ``nbytes`` bytes is out of proportion to them: its
    ``entries`` in memory, or the work of ``rank`` products for each of them."""
    limit = entries_limit(nbytes)
    work = decoding_work(entries, rank)
    if work > limit and entries > (max_entries or 0):
        takes = "entries in memory" if work == entries else "entries' worth of work"
        raise ValueError(
            f"a weight {list(shape)} takes {work} {takes}, more than the "
            f"{max(limit, max_entries or 0)} allowed for {nbytes} stored bytes; "
            f"max_entries raises the limit"
        )


def decoding_work(entries: int, rank: int) -> int:
    """What decoding takes, counted in entries."""
    return entries * max(1, -(-rank // PRODUCTS_PER_ENTRY))


def check_factors(meta: dict[str, Any], names: tuple[str, ...]) -> None:
    """Raise a ``ValueError`` unless ``meta`` describes the factors ``names``, none low-rank."""
    if not set(names) <= set(meta) <= {*names, "kept"}:
        raise ValueError(f"LowRank has meta {' and '.join(names)}, got {shown(sorted(meta))}")
    for name in names:
        factor = meta[name]
        inner = factor.get("layout") if isinstance(factor, dict) else None
        if isinstance(inner, dict) and inner.get("type") == "LowRank":
            raise ValueError(f"factor {name} is low-rank itself")


def check_mask(weight: Tensor, mask: Tensor) -> None:
    """Raise a ``ValueError`` unless ``mask`` is bool, of the weight's shape, and true wherever
    the weight is not 0."""
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"mask must be bool {list(weight.shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    if bad := int((~mask & (weight != 0)).sum()):
        raise ValueError(f"{bad} entries of the weight are not 0 where the mask prunes them")


def bits_of(x: Tensor) -> Tensor:
    """The bit patterns of floats, as integers of their size."""
    x = x.contiguous()
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def check_same_bits(weight: Tensor, values: Tensor, what: object) -> None:
    """Raise a ``ValueError`` unless ``values`` are those of ``weight`` bit for bit."""
    different = bits_of(weight) != bits_of(values)
    if count := int(different.sum()):
        first = tuple(different.nonzero()[0].tolist())
        raise ValueError(
            f"weight {list(weight.shape)} is not on the grid of {what}: {count} of "
            f"{weight.numel()} values would change, the first at {list(first)} from "
            f"{weight[first].item()!r} to {values[first].item()!r}; lossy=True allows it"
        )


def subset(parts: dict[str, Any], factor: str) -> dict[str, Any]:
    """The parts of one factor, under their own names."""
    return {n[len(factor) + 1 :]: p for n, p in parts.items() if n.startswith(factor + "_")}


def parts_of_blob(
    blob: Tensor,
    sizes: dict[str, int],
    expected: dict[str, tuple[torch.dtype, tuple[int, ...] | None]],
) -> dict[str, Tensor]:
    """The parts that stand in a blob one after the other, of these ``sizes`` in bytes, and of the
    ``expected`` dtypes and shapes (None: a vector).

    Raises:
        ValueError: a size that does not fit its dtype or shape.
    """
    parts = {}
    chunks = blob.split(list(sizes.values()))
    for (name, (dtype, shape)), chunk in zip(expected.items(), chunks, strict=True):
        if chunk.numel() % dtype.itemsize:
            raise ValueError(f"part {name!r}: {chunk.numel()} bytes are no whole {dtype}")
        # In place, so that no weight is in memory twice, wherever it is aligned.
        in_place = chunk.numel() and chunk.is_cpu and not chunk.data_ptr() % dtype.itemsize
        if in_place:
            # A storage of its own: torch.save refuses one that tensors of two dtypes share, and
            # writes all of it for each part.
            part = torch.frombuffer(chunk.detach().numpy(), dtype=dtype)
        else:
            part = chunk.clone().view(dtype)
        if shape is not None and part.numel() != math.prod(shape):
            raise ValueError(f"part {name!r}: {part.numel()} values are no {list(shape)}")
        parts[name] = part if shape is None else part.view(shape)
    return parts


def all_finite(values: Tensor) -> bool:
    """Whether none of them is NaN or infinite; `torch.isfinite` takes three times their memory."""
    if not values.numel():
        return True
    # Extremes are NaN where any value is.
    return all(math.isfinite(extreme) for extreme in values.aminmax())
