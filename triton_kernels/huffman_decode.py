"""huffman_decode in Triton: a program decodes a block of chunks side by side, symbol by symbol.

The code's table is built by PyTorch on the stream's device. Stream format and semantics:
:func:`compressops.ops.huffman_decode`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_LENGTH = 12
TABLE_SIZE: tl.constexpr = tl.constexpr(1 << MAX_LENGTH)
# A table entry is symbol | length << 8, or this where no code begins like the window.
NO_CODE = 0

CHUNK_ERRORS = {
    1: "offsets do not rise within the stream",
    2: "the codes run past the chunk's end",
    3: "a bit pattern that is no code",
    4: "whole bytes are left over after the last symbol",
    5: "padding bits are not 0",
}


@triton.jit
def load_bits(stream, byte, end, mask):
    """The 24 bits from ``byte`` on, zeros past ``end``."""
    bits = tl.load(stream + byte, mask=mask & (byte < end), other=0).to(tl.int32)
    bits |= tl.load(stream + byte + 1, mask=mask & (byte + 1 < end), other=0).to(tl.int32) << 8
    bits |= tl.load(stream + byte + 2, mask=mask & (byte + 2 < end), other=0).to(tl.int32) << 16
    return bits


@triton.jit
def huffman_decode_kernel(
    stream,
    offsets,
    table,
    output,
    errors,
    stream_bytes,
    chunks,
    num_symbols,
    chunk_size,
    BLOCK: tl.constexpr,
):
    """Decodes BLOCK chunks; errors [chunks] gets a key of CHUNK_ERRORS or 0 for each."""
    chunk = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = chunk < chunks
    begin = tl.load(offsets + chunk, mask=exists, other=0)
    end = tl.load(offsets + chunk + 1, mask=exists, other=0)
    good = exists & (begin >= 0) & (begin <= end) & (end <= stream_bytes)
    error = tl.where(good, 0, 1)
    symbols = tl.minimum(num_symbols - chunk * chunk_size, chunk_size)
    bit = begin * 8
    for i in range(0, tl.minimum(chunk_size, num_symbols)):
        wanted = good & (i < symbols)
        window = load_bits(stream, bit >> 3, end, wanted) >> (bit & 7).to(tl.int32)
        entry = tl.load(table + (window & (TABLE_SIZE - 1)), mask=wanted, other=0).to(tl.int32)
        length = entry >> 8
        error = tl.where(wanted & (length == 0), 3, error)
        overrun = wanted & (length > 0) & (bit + length > end * 8)
        error = tl.where(overrun, 2, error)
        good = good & (error == 0)
        wanted = wanted & good
        tl.store(output + chunk * chunk_size + i, (entry & 255).to(tl.uint8), mask=wanted)
        bit += tl.where(wanted, length, 0)
    left = end * 8 - bit
    error = tl.where(good & (left >= 8), 4, error)
    padded = good & (left > 0) & (left < 8)
    last = load_bits(stream, bit >> 3, end, padded) >> (bit & 7).to(tl.int32)
    error = tl.where(padded & (last != 0), 5, error)
    tl.store(errors + chunk, error.to(tl.int32), mask=exists)


def build_table(lengths: torch.Tensor, num_symbols: int) -> torch.Tensor:
    """All 2^12 windows: int16 ``[4096]``, symbol | length << 8; ``NO_CODE`` if none.

    Canonical codes, by length, then symbol, are consecutive when written with all 12 bits; so the
    window that a symbol ends before is a cumulative sum, and reversing the window's bits gives its
    place in the stream's order.

    Raises:
        ValueError: the lengths are no complete prefix code of at most 12 bits.
    """
    wide = lengths.cpu().long()
    present = wide > 0
    kraft = int((present * (1 << (MAX_LENGTH - wide.clamp(max=MAX_LENGTH)))).sum())
    lone = int(present.sum()) == 1 and int(wide.max()) == 1
    nothing = num_symbols == 0 and not present.any()
    if (wide > MAX_LENGTH).any():
        raise ValueError(
            "huffman_decode: argument 'lengths' must be at most 12 bits each, "
            f"got {int(wide.max())}"
        )
    if kraft != 1 << MAX_LENGTH and not lone and not nothing:
        raise ValueError(
            "huffman_decode: argument 'lengths' must be a complete prefix code "
            f"(Kraft sum of 4096/4096), got {kraft}"
        )
    order = torch.sort(torch.where(present, wide, MAX_LENGTH + 1), stable=True).indices
    order = order[: int(present.sum())]
    entries = (order | wide[order] << 8).repeat_interleave(1 << (MAX_LENGTH - wide[order]))
    table = torch.full((1 << MAX_LENGTH,), NO_CODE)
    table[: len(entries)] = entries
    window = torch.arange(1 << MAX_LENGTH)
    reversed_window = sum((window >> i & 1) << (MAX_LENGTH - 1 - i) for i in range(MAX_LENGTH))
    return table[reversed_window].to(torch.int16).to(lengths.device)


def huffman_decode(
    stream: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    num_symbols: int,
    chunk_size: int,
) -> torch.Tensor:
    """Decode the symbols of a chunked canonical Huffman stream.

    Reads the lengths and the verdict on the stream back from the device: two synchronisations.

    Args:
        stream: uint8 ``[B]``.
        offsets: int64 ``[chunks + 1]``.
        lengths: uint8 ``[S]``, S ≤ 256.
        num_symbols: how many symbols the stream holds.
        chunk_size: symbols in each chunk but the last.

    Returns:
        uint8 ``[num_symbols]``.

    Raises:
        ValueError: the lengths are no code, the offsets do not fit, or a chunk is corrupt.
    """
    table = build_table(lengths, num_symbols)
    chunks = -(-num_symbols // chunk_size)
    ends = offsets[[0, -1]].tolist()
    if ends != [0, stream.numel()]:
        raise ValueError(
            f"huffman_decode: argument 'offsets' must run from 0 to {stream.numel()}, got {ends}"
        )
    output = torch.empty(num_symbols, dtype=torch.uint8, device=stream.device)
    if num_symbols == 0:
        return output
    errors = torch.empty(chunks, dtype=torch.int32, device=stream.device)
    # A warp's worth: the lanes walk through chunks of their own, so more would only share a fate.
    block = 32
    with torch.cuda.device_of(stream):
        huffman_decode_kernel[(triton.cdiv(chunks, block),)](
            *(stream, offsets, table, output, errors),
            *(stream.numel(), chunks, num_symbols, chunk_size),
            BLOCK=block,
            num_warps=1,
        )
    bad = errors.nonzero()
    if bad.numel():
        chunk = int(bad[0])
        argument = "offsets" if int(errors[chunk]) == 1 else "stream"
        raise ValueError(
            f"huffman_decode: argument {argument!r} must be sound, "
            f"got chunk {chunk}: {CHUNK_ERRORS[int(errors[chunk])]}"
        )
    return output
