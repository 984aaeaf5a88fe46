"""Canonical, length-limited Huffman codes: reference encoder and decoder, vectorised.

The stream is the one of ``docs/FORMAT.md``, "Huffman": codes of at most 12 bits, assigned as in
DEFLATE (RFC 1951, 3.2.2), written lowest bit first, in chunks that each start on a byte.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MAX_CODE_LENGTH = 12
MAX_SYMBOLS = 256

# Symbols encoded at a time: temporaries stay within ten megabytes, whatever the stream.
_ENCODE_BATCH = 1 << 16
# Symbols decoded at a time. The decoder works on every bit of a batch, and a batch of this size
# stays below the 32,768 elements from which PyTorch starts threads: on a busy machine, waiting for
# them at each of its many small steps took 80 times as long as the work.
_DECODE_BATCH = 1 << 12
# Doublings of the decoder's jump table: 2**6 symbols to a step of its Python loop.
_LEVELS = 6


def huffman_lengths(counts: Sequence[int] | Tensor, max_length: int = MAX_CODE_LENGTH) -> Tensor:
    """Optimal code lengths under a limit (package-merge; Larmore and Hirschberg 1990).

    Args:
        counts: how often each symbol occurs, ``[S]``, S ≤ 256.
        max_length: longest code allowed, 1 to 12.

    Returns:
        uint8 ``[S]``; 0 for a symbol that does not occur. A lone symbol gets length 1.

    Raises:
        ValueError: a negative count, or more symbols than ``2**max_length`` codes.
    """
    weights = np.asarray(counts, dtype=np.int64)
    if weights.ndim != 1 or weights.size > MAX_SYMBOLS:
        raise ValueError(f"counts must be a vector of at most 256, got shape {weights.shape}")
    if weights.size and weights.min() < 0:
        raise ValueError(f"counts must not be negative, got {weights.min()}")
    if not 1 <= max_length <= MAX_CODE_LENGTH:
        raise ValueError(f"max_length must be 1 to {MAX_CODE_LENGTH}, got {max_length}")
    lengths = np.zeros(weights.size, dtype=np.uint8)
    used = np.flatnonzero(weights)
    if used.size > 2**max_length:
        raise ValueError(f"{used.size} symbols do not fit codes of max_length {max_length}")
    if used.size <= 1:
        lengths[used] = 1
        return torch.from_numpy(lengths)
    order = used[np.argsort(weights[used], kind="stable")]
    leaves = weights[order]
    # Each level's items are the leaves and the previous level's pairs ("packages"), sorted. The
    # 2n − 2 cheapest of the last level are taken, and with each package the pair that it stands
    # for; a leaf's code is as long as the number of levels at which it is taken.
    is_leaf_by_level = []
    packages = leaves[:0]
    for _ in range(max_length):
        items = np.concatenate([leaves, packages])
        rank = np.argsort(items, kind="stable")
        is_leaf_by_level.append(rank < leaves.size)
        items = items[rank]
        pairs = items.size // 2
        packages = items[0 : 2 * pairs : 2] + items[1 : 2 * pairs : 2]
    taken = 2 * leaves.size - 2
    for is_leaf in reversed(is_leaf_by_level):
        taken_leaves = int(is_leaf[:taken].sum())
        lengths[order[:taken_leaves]] += 1
        taken = 2 * (taken - taken_leaves)
    return torch.from_numpy(lengths)


def check_lengths(lengths: Tensor) -> np.ndarray:
    """``lengths`` as a numpy vector, if they make a complete prefix code (or none at all).

    Raises:
        ValueError: not uint8 ``[≤ 256]``, a length above 12, or a Kraft sum that is not 1. A lone
            symbol must have length 1.
    """
    if lengths.dtype != torch.uint8 or lengths.dim() != 1 or lengths.numel() > MAX_SYMBOLS:
        raise ValueError(
            f"lengths must be a uint8 vector of at most {MAX_SYMBOLS}, "
            f"got {lengths.dtype} {list(lengths.shape)}"
        )
    array = lengths.cpu().numpy().astype(np.int64)
    if array.size and array.max() > MAX_CODE_LENGTH:
        raise ValueError(f"lengths must be at most {MAX_CODE_LENGTH}, got {array.max()}")
    used = array[array > 0]
    kraft = int((2 ** (MAX_CODE_LENGTH - used)).sum())
    complete = used[0] == 1 if used.size == 1 else kraft == 2**MAX_CODE_LENGTH
    if used.size and not complete:
        raise ValueError(
            f"lengths are no complete prefix code: the Kraft sum of {used.size} symbols is "
            f"{kraft}/{2**MAX_CODE_LENGTH}"
        )
    return array


def _bit_reversed(values: np.ndarray, width: np.ndarray | int) -> np.ndarray:
    """The lowest ``width`` bits of ``values``, reversed; width at most 12."""
    result = np.zeros_like(values)
    for bit in range(MAX_CODE_LENGTH):
        result = (result << 1) | ((values >> bit) & 1)
    return result >> (MAX_CODE_LENGTH - width)


def _decode_table(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Symbol (uint8) and code length (int32, 0 = no code) for each of the next 12 bits' values."""
    array = check_lengths(lengths)
    order = np.lexsort((np.arange(array.size), array))
    order = order[array[order] > 0]
    spans = 2 ** (MAX_CODE_LENGTH - array[order])
    # In canonical order the codes, first bit highest, fill the table from 0 on without gaps.
    symbols = np.zeros(2**MAX_CODE_LENGTH, dtype=np.uint8)
    steps = np.zeros(2**MAX_CODE_LENGTH, dtype=np.int32)
    symbols[: spans.sum()] = np.repeat(order, spans)
    steps[: spans.sum()] = np.repeat(array[order], spans)
    flip = _bit_reversed(np.arange(2**MAX_CODE_LENGTH), MAX_CODE_LENGTH)
    return (
        torch.from_numpy(symbols[flip]).to(lengths.device),
        torch.from_numpy(steps[flip]).to(lengths.device),
    )


def _codes(array: np.ndarray) -> np.ndarray:
    """Each symbol's canonical code, bit-reversed so that its first bit is its lowest."""
    order = np.lexsort((np.arange(array.size), array))
    order = order[array[order] > 0]
    spans = 2 ** (MAX_CODE_LENGTH - array[order])
    codes = np.zeros(array.size, dtype=np.int64)
    codes[order] = _bit_reversed(np.cumsum(spans) - spans, MAX_CODE_LENGTH)
    return codes


def huffman_encode(symbols: Tensor, lengths: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Encode ``symbols`` (uint8 ``[N]``) with the canonical code of ``lengths`` (uint8 ``[S]``).

    Returns:
        ``(stream, offsets)``: uint8 ``[B]`` and int64 ``[chunks + 1]``, on the CPU.

    Raises:
        ValueError: ``lengths`` are no prefix code, or a symbol has no code.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}")
    array = check_lengths(lengths)
    values = symbols.cpu().numpy()
    padded = np.zeros(MAX_SYMBOLS, dtype=np.int64)
    padded[: array.size] = array
    codes = np.zeros(MAX_SYMBOLS, dtype=np.int64)
    codes[: array.size] = _codes(array)
    if values.size and not (has_code := padded[values] > 0).all():
        raise ValueError(f"symbol {values[~has_code][0]} has no code: its length is 0")
    batch = max(1, _ENCODE_BATCH // chunk_size) * chunk_size
    streams, sizes = [np.zeros(0, np.uint8)], [np.zeros(1, np.int64)]
    for start in range(0, values.size, batch):
        part = values[start : start + batch]
        stream, chunk_bytes = _encode_batch(part, padded, codes, chunk_size)
        streams.append(stream)
        sizes.append(chunk_bytes)
    offsets = np.cumsum(np.concatenate(sizes))
    return torch.from_numpy(np.concatenate(streams)), torch.from_numpy(offsets)


def _encode_batch(
    values: np.ndarray, lengths: np.ndarray, codes: np.ndarray, chunk_size: int
) -> tuple[np.ndarray, np.ndarray]:
    count = values.size
    chunk_size = min(chunk_size, count)
    chunks = -(-count // chunk_size)
    widths = np.zeros(chunks * chunk_size, dtype=np.int64)
    widths[:count] = lengths[values]
    ends = np.cumsum(widths.reshape(chunks, chunk_size), axis=1)
    chunk_bytes = (ends[:, -1] + 7) // 8
    starts = np.cumsum(chunk_bytes) - chunk_bytes
    position = ((ends + starts[:, None] * 8).reshape(-1) - widths)[:count]
    # A code, shifted to its bit within the byte where it starts, reaches at most two bytes on.
    # Codes that start in the same byte are merged first, so that no index repeats below.
    byte = position >> 3
    shifted = codes[values] << (position & 7)
    first = np.flatnonzero(np.diff(byte, prepend=-1))
    merged = np.bitwise_or.reduceat(shifted, first)
    byte = byte[first]
    stream = np.zeros(int(chunk_bytes.sum()) + 2, dtype=np.uint8)
    for k in range(3):
        stream[byte + k] |= ((merged >> (8 * k)) & 255).astype(np.uint8)
    return stream[:-2], chunk_bytes


def huffman_decode_reference(
    stream: Tensor, offsets: Tensor, lengths: Tensor, num_symbols: int, chunk_size: int
) -> Tensor:
    """Decode a chunked Huffman stream with plain torch operations, on the stream's device.

    Args:
        stream: uint8 ``[B]``.
        offsets: int64 ``[chunks + 1]``, byte offset of each chunk in ``stream``, then B.
        lengths: uint8 ``[S]``, S ≤ 256, code length of each symbol, 0 = absent.
        num_symbols: N, the symbols in the stream.
        chunk_size: symbols in a chunk; the last chunk may hold fewer.

    Returns:
        uint8 ``[N]``.

    Raises:
        ValueError: the lengths are no complete prefix code, the offsets don't fit the stream, or
            a chunk does not end where its bytes end.
    """
    chunks = _check_offsets(stream, offsets, num_symbols, chunk_size)
    symbol_of, step_of = _decode_table(lengths)
    out = torch.empty(num_symbols, dtype=torch.uint8, device=stream.device)
    if not chunks:
        return out
    chunk_size = min(chunk_size, num_symbols)
    per_batch = max(1, _DECODE_BATCH // chunk_size)
    bounds = offsets[::per_batch].tolist()
    if chunks % per_batch:
        bounds.append(stream.numel())
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        first = i * per_batch
        counted = out[first * chunk_size : (first + per_batch) * chunk_size]
        edges = (offsets[first : first + per_batch + 1] - begin).to(torch.int32) * 8
        _decode_batch(stream[begin:end], edges, symbol_of, step_of, chunk_size, counted, first)
    return out


def _check_offsets(stream: Tensor, offsets: Tensor, num_symbols: int, chunk_size: int) -> int:
    """Number of chunks, if each has a number of bytes that its symbols can take."""
    if chunk_size < 1 or num_symbols < 0:
        raise ValueError(
            f"chunk_size must be positive and num_symbols not negative, "
            f"got {chunk_size} and {num_symbols}"
        )
    chunks = -(-num_symbols // chunk_size)
    if offsets.dim() != 1 or offsets.numel() != chunks + 1:
        raise ValueError(
            f"offsets must have {chunks + 1} entries for {num_symbols} symbols in chunks of "
            f"{chunk_size}, got shape {list(offsets.shape)}"
        )
    if int(offsets[0]) != 0 or int(offsets[-1]) != stream.numel():
        raise ValueError(
            f"offsets must run from 0 to {stream.numel()}, the stream's bytes, "
            f"got {int(offsets[0])} to {int(offsets[-1])}"
        )
    if not chunks:
        return 0
    counts = torch.full((chunks,), chunk_size, dtype=torch.int64, device=offsets.device)
    counts[-1] = num_symbols - (chunks - 1) * chunk_size
    sizes = offsets.diff()
    # From 1 bit to 12 a symbol: this also bounds what the decoder allocates by the stream.
    bad = (sizes < (counts + 7) // 8) | (sizes > (counts * MAX_CODE_LENGTH + 7) // 8)
    if bool(bad.any()):
        chunk = int(bad.nonzero()[0])
        raise ValueError(
            f"chunk {chunk} of {chunks} cannot hold {int(counts[chunk])} symbols "
            f"in {int(sizes[chunk])} bytes"
        )
    if min(chunk_size, num_symbols) > 1 << 27:
        raise ValueError(f"chunk_size must be at most {1 << 27}, got {chunk_size}")
    return chunks


def _decode_batch(
    stream: Tensor,
    edges: Tensor,
    symbol_of: Tensor,
    step_of: Tensor,
    chunk_size: int,
    out: Tensor,
    first_chunk: int,
) -> None:
    """Decode the chunks between ``edges`` (bits, int32 ``[chunks + 1]``) into ``out``.

    Every bit position is looked up at once, as if a code began there. What is serial in a
    Huffman stream, that a code ends where the next begins, becomes a table of jumps by 1, 2, 4 …
    symbols, each the last one applied twice.
    """
    device = stream.device
    data = torch.nn.functional.pad(stream, (0, 4)).to(torch.int32)
    three = data[:-2] | data[1:-1] << 8 | data[2:] << 16
    bit = torch.arange(8, dtype=torch.int32, device=device)
    window = ((three[:, None] >> bit) & (2**MAX_CODE_LENGTH - 1)).flatten()
    step = step_of.index_select(0, window)
    # A jump out of the data lands in the two zero bytes behind it and stays there.
    last = window.numel() - 1
    here = torch.arange(window.numel(), dtype=torch.int32, device=device)
    jumps = [(here + step.clamp(min=1)).clamp(max=last)]
    for _ in range(min(_LEVELS, (chunk_size - 1).bit_length())):
        jumps.append(jumps[-1].index_select(0, jumps[-1]))
    stride = 2 ** (len(jumps) - 1)

    chunks = edges.numel() - 1
    starts = torch.empty((-(-chunk_size // stride), chunks), dtype=torch.int32, device=device)
    starts[0] = edges[:-1]
    for i in range(1, len(starts)):
        torch.index_select(jumps[-1], 0, starts[i - 1], out=starts[i])
    position = starts.t()
    for jump in reversed(jumps[:-1]):
        after = jump.index_select(0, position.flatten()).view(position.shape)
        position = torch.stack([position, after], dim=-1).flatten(1)
    position = position[:, :chunk_size].flatten()[: out.numel()]
    code = window.index_select(0, position)
    out.copy_(symbol_of.index_select(0, code))

    step = step_of.index_select(0, code)
    if bool((step == 0).any()):
        chunk = int((step == 0).nonzero()[0]) // chunk_size + first_chunk
        raise ValueError(f"chunk {chunk} holds bits that are no code")
    final = torch.full((chunks,), chunk_size, dtype=torch.int64, device=device).cumsum(0) - 1
    final[-1] = out.numel() - 1
    end = position[final] + step[final]
    padding = edges[1:] - end
    bad = (padding < 0) | (padding > 7)
    byte = stream.index_select(0, edges[1:] // 8 - 1).to(torch.int32)
    bad |= (byte >> (8 - padding.clamp(0, 7))) != 0
    if bool(bad.any()):
        chunk = int(bad.nonzero()[0])
        raise ValueError(
            f"chunk {chunk + first_chunk} is corrupt: its codes end {int(padding[chunk])} bits "
            "before its bytes do, or the bits after them are not zero"
        )
