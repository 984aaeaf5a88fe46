"""A plain Huffman coder, bit by bit, that shares nothing with the package's."""

from __future__ import annotations

import heapq
import zlib

import numpy as np

MAX_LENGTH = 12
CODEC = 1


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


def codes_of(lengths: np.ndarray) -> dict[int, str]:
    """Canonical codes as strings of bits, in the order in which the stream holds them."""
    codes, code, previous = {}, 0, 0
    for length, symbol in sorted((int(n), s) for s, n in enumerate(lengths) if n):
        code <<= length - previous
        codes[symbol] = format(code, f"0{length}b")
        code, previous = code + 1, length
    return codes


def tree_of(lengths: np.ndarray) -> dict[str, int | None]:
    """Each prefix of a code to its symbol, or to None where codes go on."""
    codes = codes_of(lengths)
    inner = {code[:i]: None for code in codes.values() for i in range(len(code))}
    return inner | {code: symbol for symbol, code in codes.items()}


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
            for prefix in sorted(below):
                bits += "".join(code[len(prefix)] for code in below[prefix])
                for code in below[prefix]:
                    start = code[: len(prefix) + 1]
                    if start != code:
                        deeper.setdefault(start, []).append(code)
            below = deeper
        chunks.append(framed(bits))
    offsets = np.cumsum([0, *map(len, chunks)]).astype(np.int64)
    return np.concatenate(chunks).astype(np.uint8), offsets


def decode_chunk(data: np.ndarray, lengths: np.ndarray, n: int) -> np.ndarray | None:
    """The n symbols of one chunk, or None if it is not sound."""
    if len(data) <= 5 or (seal(data) != data).any() or data[4] != CODEC:
        return None
    bits = "".join(map(str, np.unpackbits(data[5:], bitorder="little")))
    tree = tree_of(lengths)
    prefixes, level = [""] * n, 0
    while any(tree.get(prefix, 0) is None for prefix in prefixes):
        # Of a level's bits, those of each prefix stand together, in the order of the symbols.
        going_on = [i for i in range(n) if tree[prefixes[i]] is None]
        if len(bits) < len(going_on):
            return None
        order = sorted(going_on, key=lambda i: prefixes[i])
        for i, bit in zip(order, bits, strict=False):
            prefixes[i] += bit
        if any(prefix not in tree for prefix in prefixes):
            return None
        bits, level = bits[len(going_on) :], level + 1
    if len(bits) >= 8 or "1" in bits:
        return None
    return np.array([tree[prefix] for prefix in prefixes], np.uint8)
