"""huffman_decode: every backend, round trips, and every kind of corruption."""

from __future__ import annotations

import pytest
import torch
from conftest import kernel_params
from hypothesis import given
from hypothesis import strategies as st

import compressops as co
from compressops.formats.huffman import huffman_encode, huffman_lengths

PARAMS = kernel_params("huffman_decode")
ALL_KERNELS = pytest.mark.parametrize("kernel", PARAMS, indirect=True)
# Triton's interpreter takes a millisecond a symbol; test_triton_kernels.py has a grid of its size.
FAST_KERNELS = pytest.mark.parametrize(
    "kernel", [p for p in PARAMS if p.values[0][:2] != ("cpu", "triton")], indirect=True
)


def make(symbols: torch.Tensor, chunk_size: int, max_length: int = 12, device="cpu"):
    """The op's arguments for a stream that holds ``symbols``."""
    counts = torch.bincount(symbols.int(), minlength=1)
    lengths = huffman_lengths(counts, max_length)
    stream, offsets = huffman_encode(symbols, lengths, chunk_size)
    on_device = (t.to(device) for t in (stream, offsets, lengths))
    return (*on_device, symbols.numel(), chunk_size)


def skewed(count: int, alphabet: int, seed: int = 0) -> torch.Tensor:
    """Symbols whose probabilities fall by a constant factor, so that long codes occur."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.75 ** torch.arange(alphabet, dtype=torch.float64) + 1e-4
    picked = torch.multinomial(weights, max(1, count), replacement=True, generator=generator)
    return picked[:count].to(torch.uint8)


@FAST_KERNELS
@pytest.mark.parametrize("alphabet", [1, 2, 3, 16, 64, 256])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 1000, 4096, 4097, 20_000])
def test_round_trip(kernel: torch.device, alphabet: int, count: int) -> None:
    symbols = skewed(count, alphabet)
    args = make(symbols, 4096, device=kernel)
    decoded = co.ops.huffman_decode(*args)
    assert decoded.device == kernel
    assert torch.equal(decoded.cpu(), symbols)


@FAST_KERNELS
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64, 1000, 5000])
def test_chunk_sizes(kernel: torch.device, chunk_size: int) -> None:
    symbols = skewed(997, 40)
    assert torch.equal(
        co.ops.huffman_decode(*make(symbols, chunk_size, device=kernel)).cpu(), symbols
    )


@FAST_KERNELS
@pytest.mark.parametrize("max_length", [8, 9, 12])
def test_code_length_limits(kernel: torch.device, max_length: int) -> None:
    symbols = skewed(5000, 200)
    args = make(symbols, 512, max_length, kernel)
    assert args[2].max() <= max_length
    assert torch.equal(co.ops.huffman_decode(*args).cpu(), symbols)


@given(st.binary(max_size=300), st.integers(1, 70))
def test_any_bytes_round_trip(data: bytes, chunk_size: int) -> None:
    symbols = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()
    )
    assert torch.equal(co.ops.huffman_decode(*make(symbols, chunk_size)), symbols)


def flips(args, bit: int):
    stream = args[0].clone()
    stream[bit // 8] ^= 1 << (bit % 8)
    return (stream, *args[1:])


def test_backends_agree_on_every_flipped_bit() -> None:
    """A flipped bit is either an error for all or the same other symbols for all."""
    args = make(skewed(300, 12), 64)
    errors = 0
    for bit in range(8 * args[0].numel()):
        results = []
        for backend in ("eager", "cpu"):
            with co.backend(backend):
                try:
                    results.append(co.ops.huffman_decode(*flips(args, bit)).tolist())
                except ValueError:
                    results.append(None)
        assert results[0] == results[1]
        errors += results[0] is None
    assert errors > 0


@ALL_KERNELS
def test_corrupt_streams_are_errors(kernel: torch.device) -> None:
    stream, offsets, lengths, count, chunk_size = make(skewed(1000, 12), 64, device=kernel)

    def rejects(match: str, **changes) -> None:
        args = {
            "stream": stream,
            "offsets": offsets,
            "lengths": lengths,
            "num_symbols": count,
            "chunk_size": chunk_size,
        } | changes
        with pytest.raises(ValueError, match=match):
            co.ops.huffman_decode(**args)

    # Bytes missing, or more than the codes fill.
    rejects("offsets", stream=stream[:-1])
    rejects("offsets", stream=torch.cat([stream, stream[:1]]))
    shorter = offsets.clone()
    shorter[-1] -= 1
    rejects("huffman", stream=stream[:-1], offsets=shorter)
    longer = offsets.clone()
    longer[-1] += 1
    rejects("huffman", stream=torch.cat([stream, stream.new_zeros(1)]), offsets=longer)
    # Offsets that lie.
    for index, value in ((0, 1), (3, -1), (3, 10**9), (3, -(2**63)), (-1, 2**62)):
        lying = offsets.clone()
        lying[index] = value
        rejects("huffman", offsets=lying)
    moved = offsets.clone()
    moved[3] += 1
    rejects("huffman", offsets=moved)
    rejects("offsets", offsets=offsets[:-1])
    # Codes that are no prefix code: over- and under-subscribed, too long, none at all.
    for change in (1, 13, 255, 0):
        wrong = lengths.clone()
        wrong[int(lengths.argmax())] = change
        rejects("huffman", lengths=wrong)
    rejects("huffman", lengths=torch.zeros_like(lengths))
    rejects("huffman", lengths=lengths[:0])
    # Counts that lie.
    for wrong_count in (-1, count - chunk_size, count + chunk_size, 2**62, 2**63 - 1):
        rejects("num_symbols|offsets", num_symbols=wrong_count)
    rejects("huffman", num_symbols=count - 1)
    rejects("chunk_size", chunk_size=0)
    rejects("chunk_size", chunk_size=-5)


@ALL_KERNELS
def test_padding_bits_must_be_zero(kernel: torch.device) -> None:
    args = make(torch.tensor([0, 1, 1], dtype=torch.uint8), 3, device=kernel)
    assert args[0].numel() == 1  # three bits, five of padding
    with pytest.raises(ValueError, match="huffman"):
        co.ops.huffman_decode(*flips(args, 7))


@ALL_KERNELS
def test_random_bytes_never_crash(kernel: torch.device) -> None:
    lengths = huffman_lengths(torch.bincount(skewed(5000, 64).int()), 12).to(kernel)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        size = int(torch.randint(1, 400, (1,), generator=generator))
        stream = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).to(kernel)
        chunks = int(torch.randint(1, 6, (1,), generator=generator))
        inner = torch.randint(0, size + 1, (chunks - 1,), generator=generator).sort().values
        offsets = torch.tensor([0, *inner.tolist(), size], device=kernel)
        count = chunks * 50 - int(torch.randint(0, 50, (1,), generator=generator))
        if count > 8 * size:
            continue
        with pytest.raises(ValueError, match="huffman"):
            co.ops.huffman_decode(stream, offsets, lengths, count, 50)


def test_large_stream() -> None:
    symbols = skewed(3_000_000, 64)
    args = make(symbols, 4096)
    assert torch.equal(co.ops.huffman_decode(*args), symbols)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("stream", torch.zeros(4)),
        ("stream", torch.zeros(2, 2, dtype=torch.uint8)),
        ("stream", torch.zeros(8, dtype=torch.uint8)[::2]),
        ("offsets", torch.zeros(2, dtype=torch.int32)),
        ("lengths", torch.zeros(300, dtype=torch.uint8)),
        ("lengths", torch.zeros(3, dtype=torch.int8)),
    ],
)
@pytest.mark.parametrize("native", [False, True], ids=["public", "native"])
def test_bad_arguments_are_named(name: str, bad: torch.Tensor, native: bool) -> None:
    good = dict(
        zip(
            ("stream", "offsets", "lengths", "num_symbols", "chunk_size"),
            make(skewed(9, 4), 64),
            strict=True,
        )
    )
    op = torch.ops.compressops_native.huffman_decode if native else co.ops.huffman_decode
    with pytest.raises(ValueError, match=r"huffman_decode: argument '\w+' must be .*, got "):
        op(**{**good, name: bad})


@ALL_KERNELS
def test_opcheck(kernel: torch.device) -> None:
    args = make(skewed(300, 12), 64, device=kernel)
    torch.library.opcheck(torch.ops.compressops.huffman_decode.default, args)


def test_compiles_to_one_graph() -> None:
    args = make(skewed(300, 12), 64)

    def layer(*args):
        return co.ops.huffman_decode(*args).int() + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), layer(*args))
