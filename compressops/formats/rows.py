"""Some rows of a packed weight, decoded without the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from compressops.formats.bits import sign_extend
from compressops.formats.coding import Decoder, Huffman, Raw, code_dtype, is_coded, unpack_bits
from compressops.formats.groupwise import Int
from compressops.formats.layout import Dense, Layout
from compressops.formats.number import Number
from compressops.formats.packed import PackedTensor
from compressops.formats.ternary import Ternary

# Entries whose rows are decoded together, and no more: the allocator keeps larger pieces of memory
# when they are given back.
_AT_ONCE = 1 << 16
# Symbols of coded rows that are decoded at once, for each call costs as much as decoding a chunk.
_SYMBOLS_AT_ONCE = 1 << 20


def has_rows(packed: PackedTensor) -> bool:
    """Whether `unpack_rows` takes this weight: a matrix, every entry stored, of floats or of
    integers, whose rows are whole bytes where they are not coded."""
    number, dense = packed.number, isinstance(packed.layout, Dense) and len(packed.shape) == 2
    if not dense or not isinstance(packed.coding, Huffman | Raw):
        return False
    coded = isinstance(number, Int | Ternary) and is_coded(packed.parts)
    return number.is_float or coded or rows_refusal(packed.layout, number, packed.shape) is None


def rows_refusal(layout: Layout, number: Number, shape: tuple[int, ...]) -> str | None:
    """What rows of integers need to be read alone, and is not there; ``None``: nothing."""
    if not isinstance(layout, Dense) or len(shape) != 2:
        return f"a matrix with every entry stored, got {layout}"
    if not isinstance(number, Int | Ternary):
        return f"Int or Ternary, got {number}"
    if shape[1] * number.bits % 8:
        return f"rows of whole bytes, got {shape[1]} codes of {number.bits} bits"
    return None


def integer_rows(
    codes: Tensor,
    params: dict[str, Tensor],
    number: Number,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: Tensor,
) -> Tensor:
    """``[n, C]`` of a weight that has no `rows_refusal`, from its part ``codes`` and its
    parameters; rows are int64 ``[n]``."""
    count, columns = shape
    data = codes.view(count, columns * number.bits // 8).index_select(0, rows)
    found = _codes(data.flatten(), len(data) * columns, number.bits)
    own = _params_of(params, count, rows)
    return number.dequantize(found.view(len(data), columns), own, dtype)


def _params_of(params: dict[str, Tensor], count: int, rows: Tensor) -> dict[str, Tensor]:
    # One for all, or a row each.
    return {k: p.index_select(0, rows) if p.shape[0] == count else p for k, p in params.items()}


def row_blocks(
    packed: PackedTensor, multiple: int, decoder: Decoder, out: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """The codes of a weight's rows, ``[n, C]``, to be read alone: a multiple of so many rows at a
    time where they can be decoded so (the last block has the rest), and else all at once, then in
    ``out`` if that is given. Codes of whole bytes are the weight's own. A multiple of 0 asks for
    all at once."""
    rows, columns = packed.shape[0], math.prod(packed.shape[1:])
    step = max(1, _AT_ONCE // max(1, multiple * columns)) * multiple
    # Raw, by choice or because coding was not worth it.
    raw = isinstance(packed.layout, Dense) and not is_coded(packed.parts)
    bits = packed.number.bits
    if raw and bits == 8:
        yield slice(0, rows), packed.parts["codes"].view(torch.int8).view(rows, columns)
        return
    if not raw or not multiple or step >= rows or multiple * bits % 8 or bits > 8:
        yield slice(0, rows), packed.dense_codes(decoder, out).flatten(1)
        return
    size = columns * bits
    for first in range(0, rows, step):
        last = min(first + step, rows)
        data = packed.parts["codes"][first * size // 8 : -(-last * size // 8)]
        found = _codes(data, (last - first) * columns, bits)
        yield slice(first, last), found.view(last - first, columns)


def _codes(data: Tensor, count: int, bits: int) -> Tensor:
    return sign_extend(unpack_bits(data, count, bits), bits)


def unpack_rows(packed: PackedTensor, rows: Tensor, decoder: Decoder | None = None) -> Tensor:
    """``packed.unpack()[rows]``, bit for bit: of coded planes only the chunks that hold these rows
    are decoded.

    Args:
        packed: a weight that `has_rows` takes, ``[R, C]``.
        rows: int64 ``[n]`` on its device, each from 0 to R − 1.
        decoder: kernels instead of the references.

    Returns:
        ``[n, C]`` in the weight's dtype.

    Raises:
        ValueError: the chunks are corrupt.
    """
    decoder, bits = decoder or Decoder(), packed.number.bits
    (count, columns), parts = packed.shape, packed.parts
    if not packed.number.is_float:
        if not is_coded(parts):
            how = packed.params, packed.number, packed.shape, packed.dtype
            return integer_rows(parts["codes"], *how, rows)
        codes = sign_extend(_rows_of_plane(packed, "codes", rows, decoder), bits)
        own = _params_of(packed.params, count, rows)
        return packed.number.dequantize(codes, own, packed.dtype)
    if "codes" in parts:
        codes = parts["codes"].view(code_dtype(bits)).view(count, columns)[rows].flatten()
    else:
        planes = [
            _rows_of_plane(packed, f"codes_{i}", rows, decoder).flatten() for i in range(bits // 8)
        ]
        codes = torch.empty(len(rows) * columns, dtype=code_dtype(bits), device=rows.device)
        decoder.merge(codes, planes, True)
    return packed.number.dequantize(codes.view(len(rows), columns), packed.params, packed.dtype)


def _rows_of_plane(packed: PackedTensor, name: str, rows: Tensor, decoder: Decoder) -> Tensor:
    """uint8 ``[n, C]``; of a coded plane some chunks at a time, because together they are many
    times the rows."""
    columns, parts = packed.shape[1], packed.parts
    if f"{name}_lengths" not in parts:
        return parts[name].view(packed.shape)[rows]
    found = torch.empty((len(rows), columns), dtype=torch.uint8, device=rows.device)
    if not found.numel():
        return found
    size, count = packed.coding.chunk_size, math.prod(packed.shape)
    ordered, places = rows.sort()
    begins = ordered * columns
    first, last = begins // size, (begins + columns - 1) // size
    # How many chunks the rows up to each need. One that rows of two parts share is decoded twice.
    needed = (last - torch.maximum(first - 1, F.pad(last[:-1], (1, 0), value=-1))).cumsum(0)
    part = (needed - 1) * size // _SYMBOLS_AT_ONCE
    counts = part.unique_consecutive(return_counts=True)[1].tolist()
    ends = [0, *itertools.accumulate(parts[f"{name}_sizes"].tolist())]
    table = parts[f"{name}_lengths"]
    lengths = unpack_bits(table, 2 * table.numel(), 4)
    for where, begin, low, high in zip(
        *(x.split(counts) for x in (places, begins, first, last)), strict=True
    ):
        spans = zip(low.tolist(), high.tolist(), strict=True)
        chunks = sorted({chunk for a, b in spans for chunk in range(a, b + 1)})
        stream = torch.cat([parts[name][ends[chunk] : ends[chunk + 1]] for chunk in chunks])
        offsets = [0, *itertools.accumulate(ends[chunk + 1] - ends[chunk] for chunk in chunks)]
        # Only the last chunk of all may be shorter, and it stays the last.
        symbols = len(chunks) * size - max(0, (chunks[-1] + 1) * size - count)
        offsets = torch.tensor(offsets, device=rows.device)
        decoded = decoder.symbols(stream, offsets, lengths, symbols, size)
        # A row's chunks stand side by side among those that were decoded, as all between them are.
        place = torch.searchsorted(torch.tensor(chunks, device=rows.device), low)
        found[where] = decoded.unfold(0, columns, 1)[begin - (low - place) * size]
    return found
