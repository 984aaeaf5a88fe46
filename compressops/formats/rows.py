"""Some rows of a packed weight, decoded without the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressops.formats.coding import Decoder, Huffman, Raw, code_dtype, unpack_bits
from compressops.formats.layout import Dense
from compressops.formats.packed import PackedTensor


def has_rows(packed: PackedTensor) -> bool:
    """Whether `unpack_rows` takes this weight: a matrix of floats, every entry stored."""
    dense = isinstance(packed.layout, Dense) and len(packed.shape) == 2
    return dense and packed.number.is_float and isinstance(packed.coding, Huffman | Raw)


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
    if "codes" in parts:
        codes = parts["codes"].view(code_dtype(bits)).view(count, columns)[rows].flatten()
    else:
        planes = [
            _rows_of_plane(packed, f"codes_{i}", rows, decoder).flatten() for i in range(bits // 8)
        ]
        codes = torch.empty(len(rows) * columns, dtype=code_dtype(bits), device=rows.device)
        decoder.merge(codes, planes, True)
    return packed.number.dequantize(codes.view(-1, columns), packed.params, packed.dtype)


def _rows_of_plane(packed: PackedTensor, name: str, rows: Tensor, decoder: Decoder) -> Tensor:
    """uint8 ``[n, C]``."""
    columns, parts = packed.shape[1], packed.parts
    if f"{name}_lengths" not in parts:
        return parts[name].view(packed.shape)[rows]
    size, count = packed.coding.chunk_size, math.prod(packed.shape)
    first, last = rows * columns // size, ((rows + 1) * columns - 1) // size
    sizes = parts[f"{name}_sizes"].to(torch.int64)
    is_wanted = torch.zeros(sizes.numel() + 1, dtype=torch.int64, device=rows.device)
    ones = torch.ones_like(rows)
    is_wanted.index_add_(0, first, ones).index_add_(0, last + 1, -ones)
    chunks = is_wanted.cumsum(0)[:-1].nonzero().flatten()
    if not columns or not len(chunks):
        return torch.empty((len(rows), columns), dtype=torch.uint8, device=rows.device)
    ends = sizes.cumsum(0)
    pieces = [
        parts[name][end - length : end]
        for end, length in zip(ends[chunks].tolist(), sizes[chunks].tolist(), strict=True)
    ]
    offsets = torch.nn.functional.pad(sizes[chunks].cumsum(0), (1, 0))
    # Only the last chunk of all may be shorter, and it stays the last.
    symbols = len(chunks) * size - max(0, (int(chunks[-1]) + 1) * size - count)
    table = parts[f"{name}_lengths"]
    lengths = unpack_bits(table, 2 * table.numel(), 4)
    decoded = decoder.symbols(torch.cat(pieces), offsets, lengths, symbols, size)
    # A row's chunks stand side by side among those that were decoded, as all between them are.
    starts = (
        rows * columns
        - (chunks - torch.arange(len(chunks)).to(chunks))[torch.searchsorted(chunks, first)] * size
    )
    return decoded[starts[:, None] + torch.arange(columns, device=rows.device)]
