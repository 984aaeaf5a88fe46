"""A plain Huffman coder, bit by bit, that shares nothing with the package's."""

from __future__ import annotations

import heapq

import numpy as np

MAX_LENGTH = 12


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


def encode(symbols: np.ndarray, lengths: np.ndarray, chunk_size: int):
    """The stream, uint8, and the chunks' offsets, int64."""
    codes = codes_of(lengths)
    chunks = [
        np.packbits(
            [int(bit) for s in symbols[i : i + chunk_size] for bit in codes[int(s)]],
            bitorder="little",
        )
        for i in range(0, len(symbols), chunk_size)
    ]
    offsets = np.cumsum([0, *map(len, chunks)]).astype(np.int64)
    return np.concatenate(chunks).astype(np.uint8), offsets


def decode_chunk(data: np.ndarray, lengths: np.ndarray, n: int) -> np.ndarray | None:
    """The n symbols of one chunk, or None if it is not sound."""
    symbol_of = {code: symbol for symbol, code in codes_of(lengths).items()}
    bits = "".join(map(str, np.unpackbits(data, bitorder="little")))
    symbols, position, end = [], 0, 0
    while len(symbols) < n:
        end += 1
        if end > len(bits) or end - position > MAX_LENGTH:
            return None
        if bits[position:end] in symbol_of:
            symbols.append(symbol_of[bits[position:end]])
            position = end
    rest = bits[position:]
    return None if len(rest) >= 8 or "1" in rest else np.array(symbols, np.uint8)
