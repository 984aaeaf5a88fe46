"""Huffman codes: optimal under their limit, exact round trips, and no way past the decoder."""

from __future__ import annotations

import heapq
import itertools
import time

import numpy as np
import pytest
import torch
from cuda_on_cpu.huffman_streams import framed, seal
from hypothesis import given
from hypothesis import strategies as st

from compressops.formats.coding import (
    huffman_decode_reference,
    huffman_encode_reference,
    huffman_lengths,
    pack_bits,
    unpack_bits,
)


def encode(symbols: torch.Tensor, chunk_size: int = 32768, max_length: int = 12):
    counts = torch.bincount(symbols.long()) if symbols.numel() else []
    lengths = huffman_lengths(counts, max_length)
    return *huffman_encode_reference(symbols, lengths, chunk_size), lengths


def unlimited_bits(counts: list[int]) -> int:
    """Total bits of Huffman's own algorithm, without a limit."""
    heap, total = [c for c in counts if c], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        total += pair
        heapq.heappush(heap, pair)
    return total


@given(counts=st.lists(st.integers(0, 10_000), min_size=2, max_size=256))
def test_lengths_are_optimal_where_the_limit_does_not_bind(counts: list[int]):
    lengths = huffman_lengths(counts, 12).long()
    used = torch.tensor(counts) > 0
    assert torch.equal(lengths > 0, used)
    if used.sum() > 1:
        assert (2.0 ** -lengths[used].double()).sum() == 1
        bits = int((torch.tensor(counts) * lengths).sum())
        assert bits == unlimited_bits(counts) or lengths.max() == 12


@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=6),
    max_length=st.integers(3, 5),
)
def test_lengths_are_optimal_under_the_limit(counts: list[int], max_length: int):
    lengths = huffman_lengths(counts, max_length).tolist()
    assert max(lengths) <= max_length
    best = min(
        sum(c * n for c, n in zip(counts, choice, strict=True))
        for choice in itertools.product(range(1, max_length + 1), repeat=len(counts))
        if sum(2.0**-n for n in choice) <= 1
    )
    assert sum(c * n for c, n in zip(counts, lengths, strict=True)) == best


def test_skewed_counts_meet_the_limit():
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = huffman_lengths(fibonacci, 12)
    assert lengths.max() == 12
    assert (2.0 ** -lengths.double()).sum() == 1


@given(data=st.data())
def test_round_trip(data: st.DataObject):
    alphabet = data.draw(st.sampled_from([1, 2, 3, 64, 256]))
    count = data.draw(st.sampled_from([0, 1, 2, 63, 64, 65, 200]))
    chunk_size = data.draw(st.sampled_from([1, 2, 7, 64, 100, 4096]))
    values = data.draw(st.lists(st.integers(0, alphabet - 1), min_size=count, max_size=count))
    symbols = torch.tensor(values, dtype=torch.uint8)
    stream, offsets, lengths = encode(symbols, chunk_size)
    assert offsets.tolist()[0] == 0
    assert offsets[-1] == stream.numel()
    decoded = huffman_decode_reference(stream, offsets, lengths, count, chunk_size)
    assert torch.equal(decoded, symbols)


@pytest.mark.parametrize("count", [4095, 4096, 4097, 3 * 4096, 50_000])
def test_round_trip_over_many_chunks(count: int):
    symbols = (torch.randn(count) * 12 + 32).clamp(0, 63).to(torch.uint8)
    for chunk_size in (1000, 4096, 32768):
        stream, offsets, lengths = encode(symbols, chunk_size)
        decoded = huffman_decode_reference(stream, offsets, lengths, count, chunk_size)
        assert torch.equal(decoded, symbols)


def test_within_one_percent_of_the_entropy_on_bell_shaped_codes():
    symbols = (torch.randn(200_000) * 7 + 32).clamp(0, 63).to(torch.uint8)
    stream, offsets, _ = encode(symbols)
    p = torch.bincount(symbols.long()).double() / symbols.numel()
    entropy = float(-(p[p > 0] * p[p > 0].log2()).sum()) * symbols.numel() / 8
    assert stream.numel() + 2 * offsets.numel() < 1.01 * entropy


@given(data=st.data())
def test_a_corrupt_stream_is_an_error_or_symbols(data: st.DataObject):
    symbols = (torch.arange(300) ** 2 % 23).to(torch.uint8)
    stream, offsets, lengths = encode(symbols, 70)
    tensors = {"stream": stream.clone(), "offsets": offsets.clone(), "lengths": lengths.clone()}
    target = tensors[data.draw(st.sampled_from(sorted(tensors)))]
    at = data.draw(st.integers(0, target.numel() - 1))
    target[at] = data.draw(st.integers(0, 255)) - (50 if target.dtype == torch.int64 else 0)
    try:
        decoded = huffman_decode_reference(*tensors.values(), 300, 70)
    except ValueError:
        return
    assert decoded.shape == (300,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [1, 2, 2, 2]}, "Kraft sum of 4 symbols is 5120/4096"),
        ({"lengths": [1, 2]}, "Kraft sum"),
        ({"lengths": [2]}, "Kraft sum"),
        ({"lengths": [13, 1]}, "at most 12, got 13"),
        ({"lengths": [0] * 257}, "at most 256"),
        ({"lengths": [0, 0]}, "lengths have no code for the 5 symbols"),
        ({"offsets": [0, 1]}, "offsets must have 3 entries"),
        ({"offsets": [0, 6, 13]}, "offsets must run from 0 to 12"),
        ({"offsets": [1, 6, 12]}, "offsets must run from 0 to 12"),
        ({"offsets": [0, 13, 12]}, "chunk 0 of 2 cannot hold 3 symbols in 13 bytes"),
        ({"offsets": [0, 5, 12]}, "chunk 0 of 2 cannot hold 3 symbols in 5 bytes"),
        ({"chunks": ["1111111", "101"]}, "chunk 0 is corrupt: its codes end 2 bits before"),
        ({"chunks": ["0010", "10111"]}, "chunk 1 is corrupt: its codes end 5 bits before"),
        ({"chunks": ["0010", "10"]}, None),
        ({"flip": 2}, "chunk 0 is corrupt: its CRC is [0-9a-f]{8}, not the"),
        ({"codec": 1}, "chunk 0 has codec 1; there is only 2"),
        ({"num_symbols": -1}, "num_symbols must not be negative, got -1"),
        ({"chunk_size": 0}, "chunk_size must be 1 to 32768, got 0"),
        ({"chunk_size": 32769}, "chunk_size must be 1 to 32768, got 32769"),
    ],
)
def test_errors_name_chunk_and_value(change, message):
    # Codes 0, 10 and 11, chunks of three: a a b | c a.
    change = {"chunks": ["0010", "101"], "offsets": [0, 6, 12], "lengths": [1, 2, 2]} | change
    first, second = map(framed, change.pop("chunks"))
    first[4] = change.pop("codec", 2)
    stream = np.concatenate([seal(first), second])
    if "flip" in change:
        stream[change.pop("flip")] ^= 16
    values = {"num_symbols": 5, "chunk_size": 3} | change
    values["stream"] = torch.from_numpy(stream)
    values["offsets"] = torch.tensor(values["offsets"])
    values["lengths"] = torch.tensor(values["lengths"], dtype=torch.uint8)
    if message is None:  # zeros behind the bits stand for codes as well as any
        assert huffman_decode_reference(**values).tolist() == [0, 0, 1, 1, 0]
        return
    with pytest.raises(ValueError, match=message):
        huffman_decode_reference(**values)


def test_a_lone_symbol_takes_a_bit_and_its_other_code_is_refused():
    symbols = torch.full((16,), 9, dtype=torch.uint8)
    stream, offsets, lengths = encode(symbols)
    assert stream.numpy().tolist() == framed(16 * "0").tolist()
    stream = torch.from_numpy(framed(15 * "0" + "1"))
    with pytest.raises(ValueError, match="bits that are no code"):
        huffman_decode_reference(stream, offsets, lengths, 16, 4096)


@given(bits=st.integers(1, 16), data=st.data())
def test_a_code_takes_its_bits_and_no_more(bits: int, data: st.DataObject):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack_bits(torch.tensor(codes, dtype=torch.int32), bits)
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    size = -(-len(codes) * bits // 8)
    assert packed.numpy().tobytes() == number.to_bytes(size, "little")
    unpacked = unpack_bits(packed, len(codes), bits).numpy().astype(np.int64)
    assert (unpacked & (2**bits - 1)).tolist() == codes
    with pytest.raises(ValueError, match=f"take {size} bytes, got {size + 1}"):
        unpack_bits(torch.zeros(size + 1, dtype=torch.uint8), len(codes), bits)


def test_millions_of_symbols_take_no_python_loop_over_symbols():
    symbols = torch.randint(0, 50, (1_300_000,), dtype=torch.uint8)
    start = time.perf_counter()
    stream, offsets, lengths = encode(symbols, 4096)
    decoded = huffman_decode_reference(stream, offsets, lengths, symbols.numel(), 4096)
    # A loop over symbols takes over a minute; this takes half a second on an idle core.
    assert time.perf_counter() - start < 30
    assert torch.equal(decoded, symbols)
