"""huffman_decode in Triton: every symbol goes down the tree of the codes' prefixes on its own.

Where each node's bits are is found by PyTorch, level by level for all chunks at once, from sums of
ones over the stream's bytes. Stream format and semantics:
:func:`compressops.ops.huffman_decode`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .checks import require
from .huffman_tree import MAX_LENGTH, build_tree
from .merge_planes import merged

OP = "huffman_decode"
MAX_CHUNK_SIZE = 32768
HEADER_BYTES: tl.constexpr = tl.constexpr(5)
CODEC = 2
POLYNOMIAL = 0xEDB88320
# A chunk's CRC is made of those of its segments, each times a power of x for what follows it.
SEGMENTS = 1024

CHUNK_ERRORS = {
    1: "offsets do not rise within the stream",
    2: "it is shorter or longer than its symbols can be",
    3: "its codec is unknown",
    4: "its CRC-32 is not the one that it states",
    5: "its codes run past its end",
    6: "whole bytes are left over after the last code",
    7: "the bits after the last code are not 0",
    8: "it holds bits that are no code",
}


@triton.jit
def crc_kernel(
    stream,
    offsets,
    table,
    powers,
    crcs,
    SEGMENTS: tl.constexpr,
    SEGMENT_BYTES: tl.constexpr,
):
    """CRC-32 of a chunk without its first four bytes, to crcs [chunks]."""
    chunk = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + chunk) + 4
    end = tl.load(offsets + chunk + 1)
    behind = tl.arange(0, SEGMENTS)
    start = end - (behind.to(tl.int64) + 1) * SEGMENT_BYTES
    last = (start <= begin) & (start + SEGMENT_BYTES > begin)
    state = tl.where(last, -1, 0).to(tl.int32)
    for i in range(SEGMENT_BYTES):
        here = start + i >= begin
        byte = tl.load(stream + start + i, mask=here, other=0).to(tl.int32)
        step = tl.load(table + ((state ^ byte) & 255), mask=here, other=0)
        state = tl.where(here, ((state >> 8) & 0xFFFFFF) ^ step, state)
    power = tl.load(powers + behind)
    product = tl.zeros([SEGMENTS], tl.int32)
    for i in tl.static_range(32):
        product = tl.where((power >> (31 - i)) & 1 != 0, product ^ state, product)
        state = ((state >> 1) & 0x7FFFFFFF) ^ tl.where(state & 1 != 0, -306674912, 0)
    tl.store(crcs + chunk, ~tl.xor_sum(product, 0))


@triton.jit
def huffman_decode_kernel(
    stream,
    ones_before,
    starts,
    ranks,
    links,
    symbols,
    output,
    plane_0,
    plane_1,
    plane_2,
    plane_3,
    root,
    nodes,
    levels,
    num_symbols,
    chunk_size,
    PLANES: tl.constexpr,
    CODED: tl.constexpr,
    RAW: tl.constexpr,
    BEGUN: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decodes BLOCK symbols of a chunk to the bytes CODED of the codes that output [num_symbols]
    has, of PLANES bytes each; it reads those that are BEGUN. ones_before [B]: ones in the stream
    before a byte; starts, ranks [chunks, nodes]: the bit where a node begins, and the ones before
    it; links [nodes, 3]: 0 and an inner node's children, each a node or a symbol s as -1 - s; or
    the bits of a group's numbers, and where in symbols it begins. root: 0, or the lone symbol; the
    planes: `merged`'s."""
    chunk = tl.program_id(0).to(tl.int64)
    inside = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = chunk * chunk_size + inside
    wanted = (inside < chunk_size) & (target < num_symbols)
    place = inside.to(tl.int64)
    node = tl.zeros([BLOCK], tl.int32) + root
    for _ in range(levels):
        walks = wanted & (node >= 0)
        at = chunk * nodes + node
        width = tl.load(links + 3 * node, mask=walks, other=0)
        first = tl.load(links + 3 * node + 1, mask=walks, other=0)
        group = walks & (width > 0)
        bit = tl.load(starts + at, mask=walks, other=0) + place * tl.maximum(width, 1)
        byte = tl.load(stream + (bit >> 3), mask=walks, other=0).to(tl.int32)
        shift = (bit & 7).to(tl.int32)
        more = group & (shift + width > 8)
        byte |= tl.load(stream + (bit >> 3) + 1, mask=more, other=0).to(tl.int32) << 8
        number = (byte >> shift) & ((1 << width) - 1)
        below = byte & ((1 << shift) - 1)
        below = below - ((below >> 1) & 0x55)
        below = (below & 0x33) + ((below >> 2) & 0x33)
        below = (below + (below >> 4)) & 15
        ones = tl.load(ones_before + (bit >> 3), mask=walks, other=0) + below
        ones -= tl.load(ranks + at, mask=walks, other=0)
        taken = (byte >> shift) & 1
        place = tl.where(taken != 0, ones, place - ones)
        one_child = tl.load(links + 3 * node + 2, mask=walks, other=0)
        child = tl.where(taken != 0, one_child, first)
        symbol = tl.load(symbols + first + number, mask=group, other=0).to(tl.int32)
        node = tl.where(walks, tl.where(group, -1 - symbol, child), node)
    code = (-1 - node) << (8 * CODED)
    if BEGUN:
        code |= tl.load(output + target, mask=wanted, other=0).to(tl.int32)
    code = merged(
        code, plane_0, plane_1, plane_2, plane_3, target, wanted, PLANES, RAW=RAW, TURNED=TURNED
    )
    tl.store(output + target, code.to(output.dtype.element_ty), mask=wanted)


def times_x(value: int) -> int:
    """A remainder of CRC-32 times x; its highest bit is the coefficient of x^0."""
    return value >> 1 ^ (POLYNOMIAL if value & 1 else 0)


def crc_product(a: int, b: int) -> int:
    product = 0
    for i in reversed(range(32)):
        product ^= a if b >> i & 1 else 0
        a = times_x(a)
    return product


@functools.cache
def crc_tables(segment_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a byte becomes when a byte follows it, ``[256]``, and x to the bits of 0, 1, 2 …
    segments, ``[SEGMENTS]``; int32."""
    after = list(range(256))
    for _ in range(8):
        after = [times_x(value) for value in after]
    segment = 1 << 31
    for _ in range(8 * segment_bytes):
        segment = times_x(segment)
    powers = [1 << 31]
    while len(powers) < SEGMENTS:
        powers.append(crc_product(powers[-1], segment))
    signed = [torch.tensor(t, dtype=torch.int64).to(torch.int32) for t in (after, powers)]
    return signed[0], signed[1]


def _find(bad: torch.Tensor, error: int, errors: torch.Tensor) -> None:
    """Note the error of chunks that have none yet."""
    errors[bad & (errors == 0)] = error


def _check_frames(stream, offsets, counts, chunk_size) -> torch.Tensor:
    """The errors of the chunks' sizes and headers: keys of CHUNK_ERRORS, or 0."""
    begin, end = offsets[:-1], offsets[1:]
    errors = torch.zeros(len(counts), dtype=torch.int64, device=stream.device)
    _find((begin < 0) | (begin > end) | (end > stream.numel()), 1, errors)
    # Where an offset lies, no difference and no address is made of it.
    start = torch.where(errors == 0, begin, 0)
    size = torch.where(errors == 0, end, 0) - start - HEADER_BYTES.value
    _find((size < (counts + 7) // 8) | (size > (counts * MAX_LENGTH + 7) // 8), 2, errors)
    if bool((errors != 0).any()):
        return errors
    _find(stream[start + 4] != CODEC, 3, errors)
    most = 1 + (chunk_size * MAX_LENGTH + 7) // 8
    segment_bytes = triton.next_power_of_2(triton.cdiv(most, SEGMENTS))
    table, powers = (t.to(stream.device) for t in crc_tables(segment_bytes))
    crcs = torch.empty(len(counts), dtype=torch.int32, device=stream.device)
    with torch.cuda.device_of(stream):
        crc_kernel[(len(counts),)](
            *(stream, offsets, table, powers, crcs),
            SEGMENTS=SEGMENTS,
            SEGMENT_BYTES=segment_bytes,
            num_warps=8,
        )
    stated = sum(stream[start + i].to(torch.int64) << (8 * i) for i in range(4))
    _find(stated != crcs.to(torch.int64) & 0xFFFFFFFF, 4, errors)
    return errors


class _Ranks:
    """How many ones there are in a stream before any of its bits."""

    def __init__(self, stream: torch.Tensor) -> None:
        in_byte = sum(stream >> i & 1 for i in range(8))
        self.stream = torch.nn.functional.pad(stream, (0, 1))
        self.before = torch.nn.functional.pad(in_byte.cumsum(0), (1, 0))

    def __call__(self, bit: torch.Tensor) -> torch.Tensor:
        byte, shift = bit >> 3, bit & 7
        below = self.stream[byte].to(torch.int64) & ((1 << shift) - 1)
        return self.before[byte] + sum(below >> i & 1 for i in range(8))


def _place_nodes(ranks, tree, counts, begin, end, errors):
    """Where each node begins, ``[chunks, nodes]``, and where all end, ``[chunks]``; in bits."""
    starts, at = [], 8 * (begin + HEADER_BYTES.value)
    below = counts[:, None]
    first = 0
    for size in tree.sizes:
        links = tree.links[first : first + size]
        group_bits = torch.tensor([link[0] for link in links], device=below.device)
        bits = below * group_bits.clamp(min=1)
        starts.append(at[:, None] + bits.cumsum(1) - bits)
        after = starts[-1] + bits
        at = after[:, -1]
        _find(at > 8 * end, 5, errors)
        limit = (8 * end)[:, None]
        ones = ranks(after.minimum(limit)) - ranks(starts[-1].minimum(limit))
        both = torch.stack([below - ones, ones], 2)[:, group_bits == 0].flatten(1)
        inner = [child >= 0 for link in links if not link[0] for child in link[1:]]
        below = both[:, torch.tensor(inner, dtype=torch.bool, device=both.device)]
        first += size
    return torch.cat(starts, 1), at


def decode_stream(
    op: str,
    stream: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    chunk_size: int,
    out: torch.Tensor,
    *,
    coded: int = 0,
    planes: Sequence[torch.Tensor | None] = (None,),
    begun: bool = False,
    turned: bool = False,
) -> None:
    """Decode ``out.numel()`` symbols to the bytes ``coded`` of ``out``, and put the planes that are
    there to the others. ``begun``: other bytes are in ``out`` already. ``turned``: rotate the codes
    right by one bit. Raises as :func:`huffman_decode_out`."""
    for name, tensor, dtype in (
        ("stream", stream, torch.uint8),
        ("offsets", offsets, torch.int64),
        ("lengths", lengths, torch.uint8),
    ):
        vector = tensor.dim() == 1 and tensor.is_contiguous() and tensor.dtype == dtype
        here = tensor.device == out.device
        require(vector and here, op, name, f"a contiguous {dtype} vector on {out.device}", tensor)
    require(lengths.numel() <= 256, op, "lengths", "at most 256 long", lengths.numel())
    sizes_allowed = f"from 1 to {MAX_CHUNK_SIZE}"
    require(1 <= chunk_size <= MAX_CHUNK_SIZE, op, "chunk_size", sizes_allowed, chunk_size)
    num_symbols = out.numel()
    chunks = -(-num_symbols // chunk_size)
    entries = f"of {chunks + 1} entries (one a chunk, and the end)"
    require(offsets.numel() == chunks + 1, op, "offsets", entries, offsets.numel())
    ends = [int(offsets[0]), int(offsets[-1])]
    span = f"from 0 to the stream's {stream.numel()} bytes"
    require(ends == [0, stream.numel()], op, "offsets", span, ends)
    tree = build_tree(op, lengths, num_symbols)
    if num_symbols == 0:
        return
    counts = torch.full((chunks,), chunk_size, dtype=torch.int64, device=stream.device)
    counts[-1] = num_symbols - (chunks - 1) * chunk_size
    errors = _check_frames(stream, offsets, counts, chunk_size)
    _raise_first(op, errors)
    ranks = _Ranks(stream)
    begin, end = offsets[:-1], offsets[1:]
    if tree.lone >= 0:
        starts = (8 * (begin + HEADER_BYTES.value))[:, None]
        used = starts[:, 0] + counts
    else:
        starts, used = _place_nodes(ranks, tree, counts, begin, end, errors)
    left = 8 * end - used
    _find(left < 0, 5, errors)
    _find(left >= 8, 6, errors)
    at = used.minimum(8 * end)
    _find(ranks(8 * end) != ranks(at), 7, errors)
    if tree.lone >= 0:
        _find(ranks(at) != ranks(starts[:, 0]), 8, errors)
    _raise_first(op, errors)
    block = min(1024, triton.next_power_of_2(chunk_size))
    with torch.cuda.device_of(stream):
        huffman_decode_kernel[(chunks, triton.cdiv(chunk_size, block))](
            *(stream, ranks.before, starts, ranks(starts)),
            torch.tensor(tree.links, dtype=torch.int32, device=stream.device),
            torch.tensor(tree.symbols, dtype=torch.uint8, device=stream.device),
            out,
            *(planes[p] if p < len(planes) and planes[p] is not None else stream for p in range(4)),
            *(-1 - tree.lone if tree.lone >= 0 else 0, len(tree.links), len(tree.sizes)),
            *(num_symbols, chunk_size),
            PLANES=len(planes),
            CODED=coded,
            RAW=sum(1 << p for p, plane in enumerate(planes) if plane is not None),
            BEGUN=begun,
            TURNED=turned,
            BLOCK=block,
            num_warps=4,
        )


def huffman_decode_out(
    stream: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    chunk_size: int,
    out: torch.Tensor,
) -> None:
    """Decode ``out.numel()`` symbols of a chunked Huffman stream into ``out``.

    Reads lengths, ends of offsets and the verdict on the stream back from the device, so it
    synchronises and cannot be captured in a CUDA graph.

    Args:
        stream: uint8 ``[B]``.
        offsets: int64 ``[chunks + 1]``.
        lengths: uint8 ``[S]``, S ≤ 256.
        chunk_size: symbols in each chunk but the last, 1 to 32768.
        out: uint8 ``[num_symbols]``.

    Raises:
        ValueError: the lengths are no code, the offsets do not fit, or a chunk is corrupt.
    """
    vector = out.dim() == 1 and out.is_contiguous() and out.dtype == torch.uint8
    require(vector, OP, "out", "a contiguous torch.uint8 vector", out)
    decode_stream(OP, stream, offsets, lengths, chunk_size, out)


def _raise_first(op: str, errors: torch.Tensor) -> None:
    bad = errors.nonzero()
    if not bad.numel():
        return
    chunk = int(bad[0])
    error = int(errors[chunk])
    what = f"chunk {chunk}: {CHUNK_ERRORS[error]}"
    if error == 1:
        require(False, op, "offsets", "non-decreasing", what)
    require(False, op, "stream", "a sound Huffman stream", what)


def huffman_decode(
    stream: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    num_symbols: int,
    chunk_size: int,
) -> torch.Tensor:
    """As :func:`huffman_decode_out`, into a new tensor: uint8 ``[num_symbols]``."""
    bits = 8 * stream.numel()
    possible = f"between 0 and the {bits} bits of stream"
    require(0 <= num_symbols <= bits, OP, "num_symbols", possible, num_symbols)
    out = torch.empty(num_symbols, dtype=torch.uint8, device=stream.device)
    huffman_decode_out(stream, offsets, lengths, chunk_size, out)
    return out
