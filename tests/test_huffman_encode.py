"""huffman_encode: every backend writes the reference's bytes, and they decode to what was there."""

from __future__ import annotations

import pytest
import torch
from conftest import kernel_params
from hypothesis import given
from hypothesis import strategies as st

import compressops as co
from compressops.formats import Huffman, Int, PackedTensor
from compressops.formats.huffman import huffman_encode_reference, huffman_lengths

PARAMS = kernel_params("huffman_encode")
ALL_KERNELS = pytest.mark.parametrize("kernel", PARAMS, indirect=True)
ISAS = [p.values[0][2] for p in PARAMS if p.values[0][1] == "cpu"]


def skewed(count: int, alphabet: int, base: float = 0.75) -> torch.Tensor:
    """Symbols whose probabilities fall by a constant factor, spread over all bytes."""
    weights = base ** torch.arange(alphabet, dtype=torch.float64) + 1e-4
    picked = torch.multinomial(weights, max(1, count), replacement=True)[:count]
    return (picked * (255 // max(1, alphabet - 1))).to(torch.uint8)


def lengths_of(symbols: torch.Tensor, max_length: int = 12) -> torch.Tensor:
    return huffman_lengths(torch.bincount(symbols), max_length)


def check(symbols: torch.Tensor, lengths: torch.Tensor, chunk_size: int, kernel) -> None:
    made = co.ops.huffman_encode(symbols.to(kernel), lengths.to(kernel), chunk_size)
    expected = huffman_encode_reference(symbols, lengths, chunk_size)
    for found, tensor in zip(made, expected, strict=True):
        assert found.device == kernel
        assert found.dtype == tensor.dtype
        assert torch.equal(found.cpu(), tensor)
    count = symbols.numel()
    decoded = co.ops.huffman_decode(*made, lengths.to(kernel), count, chunk_size)
    assert torch.equal(decoded.cpu(), symbols)


@ALL_KERNELS
@pytest.mark.parametrize("alphabet", [1, 2, 3, 16, 52, 256])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 1000, 4097, 70_001])
def test_writes_the_bytes_of_the_reference(kernel, alphabet: int, count: int) -> None:
    symbols = skewed(count, alphabet)
    check(symbols, lengths_of(symbols), 32768, kernel)


@ALL_KERNELS
@pytest.mark.parametrize("chunk_size", [1, 3, 64, 100, 32767])
def test_chunk_sizes_and_limits(kernel, chunk_size: int) -> None:
    symbols = skewed(33_000 if chunk_size > 99 else 997, 200, 0.97)
    for max_length in (8, 12):
        check(symbols, lengths_of(symbols, max_length), chunk_size, kernel)


@ALL_KERNELS
def test_strided_symbols_and_a_code_of_more(kernel) -> None:
    symbols = skewed(5000, 40)
    lengths = lengths_of(torch.cat([symbols, torch.arange(256, dtype=torch.uint8)]))
    check(symbols[::3], lengths, 500, kernel)
    check(symbols[:0], lengths, 500, kernel)
    check(torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8), 7, kernel)


# Lengths of complete codes: a leaf is split again and again.
@st.composite
def codes(draw: st.DrawFn) -> list[int]:
    lengths = [1, 1]
    for at in draw(st.lists(st.integers(0, 255), max_size=254)):
        leaf = at % len(lengths)
        if lengths[leaf] < 12:
            lengths[leaf] += 1
            lengths.append(lengths[leaf])
    return draw(st.permutations(lengths + [0] * min(3, 256 - len(lengths))))


@given(code=codes(), data=st.data())
def test_any_code_on_every_instruction_set(code: list[int], data: st.DataObject) -> None:
    lengths = torch.tensor(code, dtype=torch.uint8)
    used = lengths.nonzero().flatten().tolist()
    drawn = data.draw(st.lists(st.sampled_from(used), max_size=300))
    symbols = torch.tensor(drawn, dtype=torch.uint8)
    chunk_size = data.draw(st.integers(1, 400))
    from compressops import _C

    try:
        for isa in ISAS:
            _C.limit_isa(isa)
            check(symbols, lengths, chunk_size, torch.device("cpu"))
    finally:
        _C.limit_isa("native")


def test_threads_write_the_same_bytes() -> None:
    symbols = skewed(400_000, 64)
    threads, lengths = torch.get_num_threads(), lengths_of(symbols)
    made = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made.append(co.ops.huffman_encode(symbols, lengths, 4096)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_packing_takes_the_kernel_it_is_given() -> None:
    weight, calls = torch.randn(70, 1000), []

    def encoder(*args):
        calls.append(args[0].numel())
        return co.ops.huffman_encode(*args)

    for number in (None, Int(4)):
        plain = PackedTensor.pack(weight, None, number, Huffman(), lossy=True)
        packed = PackedTensor.pack(weight, None, number, Huffman(), lossy=True, encoder=encoder)
        assert plain.to_spec() == packed.to_spec()
        assert torch.equal(plain.to_blob(), packed.to_blob())
    assert calls == [70_000, 70_000]


BYTES, CODE = torch.zeros(9, dtype=torch.uint8), torch.tensor([1, 2, 2], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("symbols", torch.zeros(9)),
        ("symbols", BYTES.view(3, 3)),
        ("lengths", CODE.int()),
        ("lengths", CODE.repeat(2)[::2]),
        ("lengths", torch.zeros(257, dtype=torch.uint8)),
        ("chunk_size", 0),
        ("chunk_size", 32769),
    ],
)
@pytest.mark.parametrize("native", [False, True], ids=["public", "native"])
def test_bad_arguments_are_named(name: str, bad, native: bool) -> None:
    op = torch.ops.compressops_native.huffman_encode if native else co.ops.huffman_encode
    arguments = {"symbols": BYTES, "lengths": CODE, "chunk_size": 4} | {name: bad}
    with pytest.raises(ValueError, match=f"huffman_encode: argument '{name}' must be .*, got "):
        op(**arguments)


@ALL_KERNELS
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 2], "Kraft sum"),
        ([1, 1, 1], "Kraft sum"),
        ([13, 1], "12"),
        ([0, 0], "no code|has a code"),
        ([1, 1], "symbols? .*2"),
        ([], "no code|has a code"),
    ],
    ids=str,
)
def test_codes_that_do_not_fit_are_errors(kernel, lengths: list[int], message: str) -> None:
    symbols = torch.tensor([0, 1, 2, 1], dtype=torch.uint8, device=kernel)
    table = torch.tensor(lengths, dtype=torch.uint8, device=kernel)
    with pytest.raises(ValueError, match=f"huffman_encode: .*({message})"):
        co.ops.huffman_encode(symbols, table, 3)


@ALL_KERNELS
def test_opcheck(kernel) -> None:
    symbols = skewed(300, 12)
    args = (symbols.to(kernel), lengths_of(symbols).to(kernel), 64)
    torch.library.opcheck(torch.ops.compressops.huffman_encode.default, args)


def test_compiles_to_one_graph() -> None:
    symbols = skewed(300, 12)

    def layer(symbols, lengths):
        stream, offsets = co.ops.huffman_encode(symbols, lengths, 64)
        return stream.int() + 1, offsets

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        lengths = lengths_of(symbols)
        for found, expected in zip(
            compiled(symbols, lengths), layer(symbols, lengths), strict=True
        ):
            assert torch.equal(found, expected)
