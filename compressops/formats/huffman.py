"""Length-limited Huffman codes: reference encoder and decoder, vectorised.

The stream is the one of ``docs/FORMAT.md``, "Huffman": codes of at most 12 bits, in chunks that
decode independently. Groups of 2^d symbols whose codes are of one length share all but their last d
bits, the prefix. A chunk holds the first bits of all prefixes, then the second bits grouped by the
first, and so on, and where a prefix ends the d bits of its symbols: a wavelet tree (Grossi, Gupta
and Vitter, SODA 2003) of the prefixes, whose levels decode without looking for where codes end.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_CODE_LENGTH = 12
MAX_SYMBOLS = 256
MAX_CHUNK_SIZE = 32768
# In front of a chunk's bits: the CRC-32 of all that follows, and the codec.
HEADER_BYTES = 5
CODEC = 2


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


def _groups(array: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The prefix lengths and the symbols of the groups, in the order of their prefixes: those of a
    length are cut as their number has bits, the largest first."""
    groups = []
    for length in range(1, MAX_CODE_LENGTH + 1):
        symbols = np.flatnonzero(array == length)
        while symbols.size:
            bits = symbols.size.bit_length() - 1
            groups.append((length - bits, length, symbols[: 1 << bits]))
            symbols = symbols[1 << bits :]
    return [(prefix, symbols) for prefix, _, symbols in sorted(groups, key=lambda g: g[:2])]


def huffman_encode_reference(
    symbols: Tensor, lengths: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Encode ``symbols`` (uint8 ``[N]``) with the code of ``lengths`` (uint8 ``[S]``),
    with numpy; symbols on a GPU are copied from there, and what they become back.

    Returns:
        ``(stream, offsets)``: uint8 ``[B]`` and int64 ``[chunks + 1]``, on the symbols' device.

    Raises:
        ValueError: ``lengths`` are no prefix code, a symbol has no code, or ``chunk_size`` is not
            1 to 32768.
    """
    _check_chunk_size(chunk_size)
    array = check_lengths(lengths)
    values = symbols.cpu().numpy()
    codes = [np.zeros(MAX_SYMBOLS, dtype=np.int64) for _ in range(4)]
    at = 0  # of the prefix, in units of the longest
    for prefix, members in _groups(array):
        bits = members.size.bit_length() - 1
        whole = at >> (MAX_CODE_LENGTH - prefix), prefix, np.arange(members.size), bits
        for table, value in zip(codes, whole, strict=True):
            table[members] = value
        at += 1 << (MAX_CODE_LENGTH - prefix)
    has_code = np.isin(values, np.flatnonzero(array))
    if not has_code.all():
        raise ValueError(f"symbol {values[~has_code][0]} has no code: its length is 0")
    chunks = [
        _encode_chunk(*(table[values[start : start + chunk_size]] for table in codes))
        for start in range(0, values.size, chunk_size)
    ]
    offsets = np.cumsum([0, *map(len, chunks)], dtype=np.int64)
    stream = np.frombuffer(b"".join(chunks), dtype=np.uint8)
    made = torch.from_numpy(stream.copy()), torch.from_numpy(offsets)
    return made[0].to(symbols.device), made[1].to(symbols.device)


def _encode_chunk(
    prefixes: np.ndarray, lengths: np.ndarray, numbers: np.ndarray, bits: np.ndarray
) -> bytes:
    """Of symbols' codes: a prefix of a length, and a number of so many bits behind it."""
    levels = []
    for level in range(int(lengths.max()) + 1):
        # The codes that go on, in the order of their first `level` bits.
        here = np.flatnonzero(lengths >= level)
        begun = prefixes[here] >> (lengths[here] - level)
        here = here[np.argsort(begun.astype(np.uint16), kind="stable")]
        left = lengths[here] - level
        # The next bit of the prefix; or, where it ends, the number.
        next_bit = prefixes[here] >> np.maximum(left - 1, 0) & 1
        values = np.where(left > 0, next_bit, numbers[here])
        widths = np.where(left > 0, 1, bits[here])
        each = np.arange(widths.max(initial=0))
        levels.append((values[:, None] >> each & 1)[each < widths[:, None]])
    flags = np.packbits(np.concatenate(levels).astype(np.uint8), bitorder="little")
    checked = bytes([CODEC]) + flags.tobytes()
    return zlib.crc32(checked).to_bytes(4, "little") + checked


@dataclass(frozen=True)
class HuffmanTree:
    """The tree of a code's prefixes, without what has no bits.

    Args:
        nodes: level by level from the root, in the order of their prefixes: of a group its symbols,
            2^d of them; of an inner node what its bits 0 and 1 lead to, a node or a symbol s as
            ``-1 - s``.
        lone: the only symbol of the code, 1 bit long, which has no sibling; else ``None``.
    """

    nodes: list[np.ndarray | tuple[int, int]]
    lone: int | None


def huffman_tree(lengths: Tensor) -> HuffmanTree:
    """The tree of the code of ``lengths``; raises as :func:`check_lengths`."""
    array = check_lengths(lengths)
    used = np.flatnonzero(array)
    if used.size <= 1:
        return HuffmanTree([], int(used[0]) if used.size else None)
    groups, kinds, links = _groups(array), [], []
    level, places = 0, 1
    while places:
        # Groups have the first prefixes of a level, inner nodes the others.
        here = [symbols for prefix, symbols in groups if prefix == level]
        inner = places - len(here)
        for symbols in (*here, *[None] * inner):
            if symbols is not None and symbols.size == 1:
                links.append(-1 - int(symbols[0]))
            else:
                links.append(len(kinds))
                kinds.append(symbols)
        level, places = level + 1, 2 * inner
    pairs = zip(links[1::2], links[2::2], strict=True)  # behind the root
    return HuffmanTree([next(pairs) if kind is None else kind for kind in kinds], None)


def huffman_decode_reference(
    stream: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    num_symbols: int,
    chunk_size: int,
    out: Tensor | None = None,
) -> Tensor:
    """Decode a chunked Huffman stream with numpy; one on a GPU is copied from there and back.

    Args:
        stream: uint8 ``[B]``.
        offsets: int64 ``[chunks + 1]``, byte offset of each chunk in ``stream``, then B.
        lengths: uint8 ``[S]``, S ≤ 256, code length of each symbol, 0 = absent.
        num_symbols: N, the symbols in the stream.
        chunk_size: symbols in a chunk, at most 32768; the last chunk may hold fewer.
        out: uint8 ``[N]``: where they go, and then what is returned.

    Returns:
        uint8 ``[N]``.

    Raises:
        ValueError: the lengths are no complete prefix code, the offsets don't fit the stream, or
            a chunk's checksum or codec is wrong, or it does not end where its bytes end.
    """
    chunks = _check_offsets(stream, offsets, num_symbols, chunk_size)
    tree = huffman_tree(lengths)
    if chunks and not tree.nodes and tree.lone is None:
        raise ValueError(f"lengths have no code for the {num_symbols} symbols")
    data, bounds = stream.cpu().numpy(), offsets.tolist()
    symbols = np.empty(num_symbols, dtype=np.uint8)
    for chunk in range(chunks):
        part = symbols[chunk * chunk_size : (chunk + 1) * chunk_size]
        try:
            _decode_chunk(data[bounds[chunk] : bounds[chunk + 1]], tree, part)
        except ValueError as error:
            raise ValueError(f"chunk {chunk} {error}") from None
    found = torch.from_numpy(symbols).to(stream.device)
    return found if out is None else out.copy_(found)


def _check_chunk_size(chunk_size: int) -> None:
    if not 1 <= chunk_size <= MAX_CHUNK_SIZE:
        raise ValueError(f"chunk_size must be 1 to {MAX_CHUNK_SIZE}, got {chunk_size}")


def _check_offsets(stream: Tensor, offsets: Tensor, num_symbols: int, chunk_size: int) -> int:
    """Number of chunks, if each has a number of bytes that its symbols can take."""
    _check_chunk_size(chunk_size)
    if num_symbols < 0:
        raise ValueError(f"num_symbols must not be negative, got {num_symbols}")
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
    sizes = offsets.diff() - HEADER_BYTES
    # From 1 bit to 12 a symbol: this also bounds what the decoder allocates by the stream.
    bad = (sizes < (counts + 7) // 8) | (sizes > (counts * MAX_CODE_LENGTH + 7) // 8)
    # A difference that wraps around is one of offsets outside of the stream.
    bad |= (offsets[:-1] < 0) | (offsets[1:] > stream.numel())
    if bool(bad.any()):
        chunk = int(bad.nonzero()[0])
        raise ValueError(
            f"chunk {chunk} of {chunks} cannot hold {int(counts[chunk])} symbols "
            f"in {int(offsets[chunk + 1]) - int(offsets[chunk])} bytes"
        )
    return chunks


def _decode_chunk(data: np.ndarray, tree: HuffmanTree, out: np.ndarray) -> None:
    stated = int.from_bytes(data[:4].tobytes(), "little")
    found = zlib.crc32(data[4:].tobytes())
    if found != stated:
        raise ValueError(f"is corrupt: its CRC is {found:08x}, not the {stated:08x} that it states")
    if data[4] != CODEC:
        raise ValueError(f"has codec {data[4]}; there is only {CODEC}")
    bits = np.unpackbits(data[HEADER_BYTES:], bitorder="little").view(bool)
    if tree.lone is not None:
        _check_end(bits, out.size)
        if bits.any():
            raise ValueError("holds bits that are no code")
        out[:] = tree.lone
        return
    # Downwards: how many symbols are below each node, and its bits. They stand one after the other.
    counts, start, found = {0: out.size}, 0, []
    for at, node in enumerate(tree.nodes):
        width = node.size.bit_length() - 1 if isinstance(node, np.ndarray) else 1
        mine = bits[start : start + counts[at] * width]
        start += counts[at] * width
        found.append(mine)
        if isinstance(node, tuple):
            taken = int(np.count_nonzero(mine))
            counts |= dict(zip(node, (mine.size - taken, taken), strict=True))
    _check_end(bits, start)
    # Upwards: the symbols below an inner node are those below its children, merged.
    below: dict[int, np.ndarray] = {}
    for at in reversed(range(len(tree.nodes))):
        node, mine = tree.nodes[at], found[at]
        if isinstance(node, np.ndarray):
            width = node.size.bit_length() - 1
            merged = node[mine.reshape(-1, width) @ (1 << np.arange(width))]
        else:
            merged = np.empty(counts[at], dtype=np.uint8)
            for child, here in zip(node, (~mine, mine), strict=True):
                merged[here] = below.pop(child) if child >= 0 else -1 - child
        below[at] = merged
    out[:] = below[0]


def _check_end(bits: np.ndarray, used: int) -> None:
    """Raise a ``ValueError`` unless the bits end at ``used``, but for less than 8 zeros."""
    left = bits.size - used
    if not 0 <= left < 8 or bits[used:].any():
        raise ValueError(
            f"is corrupt: its codes end {left} bits before its bytes do, or the bits after them "
            "are not zero"
        )
