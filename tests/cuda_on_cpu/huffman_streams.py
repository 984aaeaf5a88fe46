"""A plain Huffman coder, bit by bit, that shares nothing with the package's."""

from __future__ import annotations

import heapq
import zlib

import numpy as np

MAX_LENGTH = 12
CODEC = 2


def lengths_for(counts: np.ndarray) -> np.ndarray:
    """Code lengths, at most 12, of symbols with these counts; not optimal, but complete."""
    counts = [int(c) for c in counts]
    while True:
        heap = [(c, i, [s]) for i, (s, c) in enumerate((s, c) for s, c in enumerate(counts) if c)]
        lengths = np.zeros(len(counts), np.uint8)
        if len(heap) == 1:
            lengths[heap[0][2]] = 1
            return lengths
        heapq.heapify(heap)
        tie = len(counts)
        while len(heap) > 1:
            (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
            lengths[left + right] += 1
            heapq.heappush(heap, (a + b, tie, left + right))
            tie += 1
        if lengths.max() <= MAX_LENGTH:
            return lengths
        counts = [(c + 1) // 2 for c in counts]  # flatter, until the longest code fits


def codes_of(lengths: np.ndarray) -> dict[int, tuple[str, str]]:
    """Prefix and number of each symbol's code, as strings of bits in the order of the stream."""
    groups = []
    for length in range(1, MAX_LENGTH + 1):
        symbols = [s for s, n in enumerate(lengths) if n == length]
        for bits in range(min(length, 8), -1, -1):
            if len(symbols) >> bits & 1:
                groups.append((length - bits, bits, symbols[: 2**bits]))
                symbols = symbols[2**bits :]
    codes, prefix, previous = {}, 0, 0
    for length, bits, symbols in sorted(groups):
        prefix <<= length - previous
        start = format(prefix, f"0{length}b") if length else ""
        for i, symbol in enumerate(symbols):
            codes[symbol] = start, (format(i, f"0{bits}b")[::-1] if bits else "")
        prefix, previous = prefix + 1, length
    return codes


def framed(bits: str) -> np.ndarray:
    """A chunk with these bits: its CRC-32, its codec, and they."""
    data = np.packbits([int(bit) for bit in bits], bitorder="little").astype(np.uint8)
    return seal(np.concatenate([np.array([0, 0, 0, 0, CODEC], np.uint8), data]))


def seal(chunk: np.ndarray) -> np.ndarray:
    """The chunk with the CRC-32 that it should have."""
    checked = chunk[4:].tobytes()
    crc = np.frombuffer(zlib.crc32(checked).to_bytes(4, "little"), np.uint8)
    return np.concatenate([crc, chunk[4:]])


def encode(symbols: np.ndarray, lengths: np.ndarray, chunk_size: int):
    """The stream, uint8, and the chunks' offsets, int64."""
    codes = codes_of(lengths)
    chunks = []
    for i in range(0, len(symbols), chunk_size):
        below = {"": [codes[int(s)] for s in symbols[i : i + chunk_size]]}  # by prefix
        bits = ""
        while below:
            deeper = {}
            for begun in sorted(below):
                for prefix, number in below[begun]:
                    if prefix == begun:
                        bits += number
                    else:
                        bits += prefix[len(begun)]
                        deeper.setdefault(prefix[: len(begun) + 1], []).append((prefix, number))
            below = deeper
        chunks.append(framed(bits))
    offsets = np.cumsum([0, *map(len, chunks)]).astype(np.int64)
    return np.concatenate(chunks).astype(np.uint8), offsets


def decode_chunk(data: np.ndarray, lengths: np.ndarray, n: int) -> np.ndarray | None:
    """The n symbols of one chunk, or None if it is not sound."""
    if len(data) <= 5 or (seal(data) != data).any() or data[4] != CODEC:
        return None
    bits = "".join(map(str, np.unpackbits(data[5:], bitorder="little")))
    codes = codes_of(lengths)
    inner = {prefix[:i] for prefix, _ in codes.values() for i in range(len(prefix))}
    symbols = {code: symbol for symbol, code in codes.items()}
    widths = dict(codes.values())  # of each prefix, a number that has as many bits as any of its
    prefixes, found = [""] * n, np.zeros(n, np.uint8)
    going_on = list(range(n))
    while going_on:
        # Of a level's bits, those of each prefix stand together, in the order of the symbols.
        order, going_on = sorted(going_on, key=lambda i: prefixes[i]), []
        for i in order:
            here = prefixes[i]
            if here not in inner and here not in widths:
                return None
            width = 1 if here in inner else len(widths[here])
            if len(bits) < width:
                return None
            taken, bits = bits[:width], bits[width:]
            if here in inner:
                prefixes[i] += taken
                going_on.append(i)
            else:
                found[i] = symbols[here, taken]
    return None if len(bits) >= 8 or "1" in bits else found
