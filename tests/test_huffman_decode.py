"""huffman_decode: every backend, round trips, and every kind of corruption."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
from conftest import kernel_params
from cuda_on_cpu.huffman_streams import seal
from hypothesis import given
from hypothesis import strategies as st

import compressops as co
from compressops.formats.huffman import huffman_encode_reference, huffman_lengths

PARAMS = kernel_params("huffman_decode")
ALL_KERNELS = pytest.mark.parametrize("kernel", PARAMS, indirect=True)
# Triton's interpreter takes a millisecond a symbol; test_triton_kernels.py has a grid of its size.
FAST_KERNELS = pytest.mark.parametrize(
    "kernel", [p for p in PARAMS if p.values[0][:2] != ("cpu", "triton")], indirect=True
)
# What a result's size decides is decided in kernels.
NATIVE_KERNELS = pytest.mark.parametrize(
    "kernel", [p for p in PARAMS if p.values[0][1] not in ("eager", "triton")], indirect=True
)


def make(symbols: torch.Tensor, chunk_size: int, max_length: int = 12, device="cpu"):
    """The op's arguments for a stream that holds ``symbols``."""
    counts = torch.bincount(symbols.int(), minlength=1)
    lengths = huffman_lengths(counts, max_length)
    stream, offsets = huffman_encode_reference(symbols, lengths, chunk_size)
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


@NATIVE_KERNELS
@pytest.mark.parametrize("alphabet", [4, 200])
@pytest.mark.parametrize("chunk_size", [4096, 5000])
def test_what_is_larger_than_the_caches(kernel, alphabet: int, chunk_size: int) -> None:
    # 2^24 bytes are written another way, where a chunk's symbols are aligned, but for the last few.
    # Four symbols that are equally frequent have no node to merge.
    copies, size = 420, 10 * chunk_size
    block = torch.arange(size).byte() % 4 if alphabet == 4 else skewed(size, alphabet)
    stream, offsets, lengths, *_ = make(block, chunk_size)
    last, last_offsets = huffman_encode_reference(block[:1000], lengths, chunk_size)
    stream = torch.cat([stream.repeat(copies), last]).to(kernel)
    sizes = torch.cat([offsets.diff().repeat(copies), last_offsets.diff()])
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(kernel)
    count = copies * size + 1000
    assert count > 1 << 24
    whole = torch.empty(count + 65, dtype=torch.uint8, device=kernel)
    for start in (0, 1):
        out, behind = whole.fill_(255)[start:].split([count, 65 - start])
        co.ops.huffman_decode(stream, offsets, lengths.to(kernel), count, chunk_size, out)
        assert torch.equal(out[:-1000].view(copies, -1).cpu(), block.expand(copies, -1))
        assert torch.equal(out[-1000:].cpu(), block[:1000])
        assert bool((behind == 255).all())


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


def sealed(args):
    """The arguments with CRCs that suit the stream, whatever was done to it."""
    stream, bounds = args[0].cpu().numpy(), args[1].tolist()
    chunks = [seal(stream[a:b]) for a, b in itertools.pairwise(bounds)]
    return (torch.from_numpy(np.concatenate(chunks)).to(args[0].device), *args[1:])


@FAST_KERNELS
def test_every_flipped_bit_of_a_small_stream_is_an_error(kernel: torch.device) -> None:
    args = make(skewed(300, 12), 64, device=kernel)
    for bit in range(8 * args[0].numel()):
        with pytest.raises(ValueError, match=r"huffman_decode: .*chunk \d"):
            co.ops.huffman_decode(*flips(args, bit))


def test_flipped_bits_of_64_kilobytes_are_errors() -> None:
    """Every 997th bit; tests/fuzz flips all of them."""
    args = make(skewed(160_000, 64), 32768)
    assert args[0].numel() > 1 << 16
    for bit in range(0, 8 * args[0].numel(), 997):
        with pytest.raises(ValueError, match=r"chunk \d: its CRC"):
            co.ops.huffman_decode(*flips(args, bit))


def test_backends_agree_on_damage_that_the_crc_hides() -> None:
    """With the CRC made to fit, a flipped bit is an error for all or the same symbols for all."""
    args = make(skewed(300, 12), 64)
    errors = 0
    for bit in range(8 * args[0].numel()):
        results = []
        damaged = sealed(flips(args, bit))
        for backend in ("eager", "cpu"):
            with co.backend(backend):
                try:
                    results.append(co.ops.huffman_decode(*damaged).tolist())
                except ValueError:
                    results.append(None)
        assert results[0] == results[1]
        errors += results[0] is None
    assert 0 < errors < 8 * args[0].numel()


@ALL_KERNELS
@pytest.mark.parametrize("chunk_size", [64, 1000])
def test_decodes_into_a_buffer(kernel: torch.device, chunk_size: int) -> None:
    symbols = skewed(300, 12)
    args = make(symbols, chunk_size, device=kernel)
    buffer = torch.full((306,), 0x5A, dtype=torch.uint8, device=kernel)
    out = buffer[3:303]
    assert co.ops.huffman_decode(*args, out=out) is out
    assert torch.equal(out.cpu(), symbols)
    assert buffer[:3].tolist() == buffer[303:].tolist() == [0x5A] * 3


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(299, dtype=torch.uint8),
        torch.empty(2, 150, dtype=torch.uint8),
        torch.empty(300, dtype=torch.int8),
        torch.empty(600, dtype=torch.uint8)[::2],
        torch.empty(300, dtype=torch.uint8, device="meta"),
    ],
    ids=["short", "matrix", "dtype", "strided", "device"],
)
def test_buffers_that_do_not_fit_are_errors(out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"huffman_decode: argument 'out' must be .*, got "):
        co.ops.huffman_decode(*make(skewed(300, 12), 64), out=out)


@FAST_KERNELS
def test_a_result_that_overwrites_the_offsets_stays_inside(kernel: torch.device) -> None:
    symbols = torch.zeros(300, dtype=torch.uint8, device=kernel)
    wild = torch.tensor([0, 1 << 45, (1 << 45) + 105, (1 << 45) + 210])
    symbols[40:72] = wild.view(torch.uint8)  # what the first chunk writes over the offsets
    lengths = torch.full((256,), 8, dtype=torch.uint8, device=kernel)
    stream, offsets = co.ops.huffman_encode(symbols, lengths, 100)
    memory = torch.zeros(100, dtype=torch.int64, device=kernel)
    memory[5:9] = offsets
    out = memory.view(torch.uint8)[:300]
    with contextlib.suppress(ValueError):
        co.ops.huffman_decode(stream, memory[5:9], lengths, 300, 100, out=out)


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
    rejects("chunk_size", chunk_size=32769)


@ALL_KERNELS
def test_padding_bits_must_be_zero(kernel: torch.device) -> None:
    args = make(torch.tensor([0, 1, 1], dtype=torch.uint8), 3, device=kernel)
    assert args[0].numel() == 6  # a header, three bits, five of padding
    with pytest.raises(ValueError, match="huffman"):
        co.ops.huffman_decode(*sealed(flips(args, 47)))


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
        if int(offsets.diff().min()) >= 4:
            stream = sealed((stream, offsets))[0]
        count = chunks * 50 - int(torch.randint(0, 50, (1,), generator=generator))
        if count > 8 * size:
            continue
        with pytest.raises(ValueError, match="huffman"):
            co.ops.huffman_decode(stream, offsets, lengths, count, 50)


def test_large_stream() -> None:
    symbols = skewed(3_000_000, 64)
    args = make(symbols, 4096)
    assert torch.equal(co.ops.huffman_decode(*args), symbols)


@FAST_KERNELS
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 9, 64, 131, 4001])
def test_groups_behind_any_number_of_bits(kernel: torch.device, bits: int, count: int) -> None:
    # Half of the symbols have numbers of so many bits, which begin where the others' bit ends.
    lengths = torch.full((2**bits + 1,), bits + 1, dtype=torch.uint8)
    lengths[0] = 1
    if bits == 8:
        lengths = torch.full((256,), 8, dtype=torch.uint8)
    symbols = torch.randint(0, len(lengths), (count,)) * torch.randint(0, 2, (count,))
    symbols = symbols.to(torch.uint8)
    stream, offsets = huffman_encode_reference(symbols, lengths, 999)
    args = (*(t.to(kernel) for t in (stream, offsets, lengths)), count, 999)
    assert torch.equal(co.ops.huffman_decode(*args).cpu(), symbols)


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
    out = torch.empty(300, dtype=torch.uint8, device=kernel)
    into = (*args[:3], 64, out)
    torch.library.opcheck(torch.ops.compressops.huffman_decode_out.default, into)


def test_compiles_to_one_graph() -> None:
    args = make(skewed(300, 12), 64)

    def layer(*args):
        out = torch.empty(args[3], dtype=torch.uint8)
        return co.ops.huffman_decode(*args).int() + co.ops.huffman_decode(*args, out=out)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), layer(*args))
