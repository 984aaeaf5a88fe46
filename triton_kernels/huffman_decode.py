"""huffman_decode in Triton: a program decodes a block of chunks side by side, symbol by symbol.

The code's table is built by PyTorch on the stream's device. Stream format and semantics:
:func:`compressops.ops.huffman_decode`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import require

OP = "huffman_decode"
MAX_LENGTH = 12
TABLE_SIZE: tl.constexpr = tl.constexpr(1 << MAX_LENGTH)
# A table entry is symbol | length << 8, or this, of length 1, where no code begins like the window.
INVALID: tl.constexpr = tl.constexpr(1 << 12)
NO_CODE = 1 << 8 | 1 << 12

CHUNK_ERRORS = {
    1: "offsets do not rise within the stream",
    2: "the codes run past the chunk's end",
    3: "a bit pattern that is no code",
    4: "whole bytes are left over after the last symbol",
    5: "padding bits are not 0",
}


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
    symbols = tl.where(good, tl.minimum(num_symbols - chunk * chunk_size, chunk_size), 0)
    target = output + chunk * chunk_size
    bit = begin * 8
    seen = tl.zeros([BLOCK], tl.int32)
    eight = tl.arange(0, 8)
    # 8 bytes hold 4 codes of 12 bits wherever in the first byte they begin.
    for start in range(0, tl.minimum(chunk_size, num_symbols), 4):
        byte = (bit >> 3)[:, None] + eight[None, :]
        here = tl.load(stream + byte, mask=good[:, None] & (byte < end[:, None]), other=0)
        window = tl.sum(here.to(tl.int64) << (8 * eight)[None, :].to(tl.int64), 1) >> (bit & 7)
        for step in tl.static_range(4):
            wanted = start + step < symbols
            entry = tl.load(table + (window & (TABLE_SIZE - 1)), mask=wanted, other=0).to(tl.int32)
            tl.store(target + start + step, (entry & 255).to(tl.uint8), mask=wanted)
            seen |= entry
            length = (entry >> 8) & 15
            window = window >> length
            bit += length
    left = end * 8 - bit
    padded = good & (left > 0) & (left < 8)
    last = tl.load(stream + (bit >> 3), mask=padded, other=0).to(tl.int64) >> (bit & 7)
    error = tl.where(padded & (last != 0), 5, 0)
    error = tl.where(left >= 8, 4, error)
    error = tl.where(left < 0, 2, error)
    error = tl.where((seen & INVALID) != 0, 3, error)
    error = tl.where(good, error, 1)
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
    longest = int(wide.max()) if wide.numel() else 0
    require(longest <= MAX_LENGTH, OP, "lengths", "code lengths of at most 12 bits", longest)
    present = wide > 0
    kraft = int((present * (1 << (MAX_LENGTH - wide))).sum())
    lone = int(present.sum()) == 1 and longest == 1
    nothing = num_symbols == 0 and not present.any()
    complete = kraft == 1 << MAX_LENGTH or lone or nothing
    require(complete, OP, "lengths", "a complete prefix code (Kraft sum of 4096/4096)", kraft)
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

    Reads lengths, ends of offsets and the verdict on the stream back from the device, so it
    synchronises and cannot be captured in a CUDA graph.

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
    for name, tensor, dtype in (
        ("stream", stream, torch.uint8),
        ("offsets", offsets, torch.int64),
        ("lengths", lengths, torch.uint8),
    ):
        vector = tensor.dim() == 1 and tensor.is_contiguous() and tensor.dtype == dtype
        here = tensor.device == stream.device
        require(
            vector and here, OP, name, f"a contiguous {dtype} vector on {stream.device}", tensor
        )
    require(lengths.numel() <= 256, OP, "lengths", "at most 256 long", lengths.numel())
    require(chunk_size > 0, OP, "chunk_size", "positive", chunk_size)
    bits = 8 * stream.numel()
    possible = f"between 0 and the {bits} bits of stream"
    require(0 <= num_symbols <= bits, OP, "num_symbols", possible, num_symbols)
    chunks = -(-num_symbols // chunk_size)
    entries = f"of {chunks + 1} entries (one a chunk, and the end)"
    require(offsets.numel() == chunks + 1, OP, "offsets", entries, offsets.numel())
    ends = [int(offsets[0]), int(offsets[-1])]
    span = f"from 0 to the stream's {stream.numel()} bytes"
    require(ends == [0, stream.numel()], OP, "offsets", span, ends)
    table = build_table(lengths, num_symbols)
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
        error = int(errors[chunk])
        what = f"chunk {chunk}: {CHUNK_ERRORS[error]}"
        if error == 1:
            require(False, OP, "offsets", "non-decreasing", what)
        require(False, OP, "stream", "a sound Huffman stream", what)
    return output
