"""Lossless coding of floats: every bit comes back, and the size is that of the exponents' code."""

from __future__ import annotations

import pytest
import torch

import compressops as co
from compressops.formats import (
    BlockSparse,
    FixedPoint,
    Float,
    Huffman,
    PackedTensor,
    Raw,
    Sparse,
)
from compressops.formats.checks import bits_of
from compressops.formats.coding import is_coded

MANY = 1 << 18
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check_bits(packed: PackedTensor, weight: torch.Tensor) -> None:
    """By the references and by the ops, into new memory and into a caller's."""
    for decoder in (None, co.ops.DECODER):
        assert torch.equal(bits_of(packed.unpack(decoder)), bits_of(weight))
        out = torch.full_like(weight, 3)
        assert packed.unpack(decoder, out=out) is out
        assert torch.equal(bits_of(out), bits_of(weight))
    again = PackedTensor.from_blob(packed.to_spec(), packed.to_blob())
    assert torch.equal(bits_of(again.unpack(co.ops.DECODER)), bits_of(weight))


@BY_DTYPE
@pytest.mark.parametrize("layout", [None, Sparse(), BlockSparse((4, 4))], ids=str)
def test_every_bit_comes_back(dtype: torch.dtype, layout) -> None:
    weight = (torch.randn(90, 31) * 0.02).to(dtype)
    weight[:, :9] = 0.0
    tiny = torch.finfo(dtype).smallest_normal
    special = [-0.0, 0.0, float("inf"), float("-inf"), float("nan"), tiny / 2, -tiny / 4, tiny]
    weight[7, : len(special)] = torch.tensor(special).to(dtype)
    # A signalling NaN with a payload, and a negative quiet one.
    weight.view(bits_of(weight).dtype)[8, :2] = bits_of(weight[7, 4:5]) ^ 5 | torch.tensor([0, 1])
    coded = PackedTensor.pack(weight, layout, coding=Huffman())
    assert any(name.endswith("_lengths") and name.startswith("codes") for name in coded.parts)
    check_bits(coded, weight)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_pattern_of_16_bits(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    # Uneven, so that the planes are coded.
    weight = torch.cat([patterns, patterns[:300].repeat(400)]).view(dtype)
    packed = PackedTensor.pack(weight, coding=Huffman())
    assert "codes_1_lengths" in packed.parts
    check_bits(packed, weight)


@BY_DTYPE
@pytest.mark.parametrize("chunk_size", [1000, 4096, 32768])
def test_weights_of_many_chunks(dtype: torch.dtype, chunk_size: int) -> None:
    for count in (MANY - 1, MANY + 1, 2 * MANY + 77):
        weight = torch.randn(count).to(dtype)
        packed = PackedTensor.pack(weight, coding=Huffman(chunk_size=chunk_size))
        assert torch.equal(packed.unpack(co.ops.DECODER), weight)


def test_wide_integers_of_many_chunks() -> None:
    weight = torch.randn(MANY + 99) * 0.01
    packed = PackedTensor.pack(weight, number=FixedPoint(11, 1), coding=Huffman(), lossy=True)
    assert torch.equal(packed.unpack(co.ops.DECODER), packed.unpack())
    raw = PackedTensor.pack(weight, number=FixedPoint(11, 1), coding=Raw(), lossy=True)
    assert torch.equal(raw.unpack(), packed.unpack())


def entropy(symbols: torch.Tensor) -> float:
    p = torch.bincount(symbols.int().flatten()).double()
    p = p[p > 0] / p.sum()
    return float(-(p * p.log2()).sum())


@BY_DTYPE
def test_the_size_is_that_of_the_exponents(dtype: torch.dtype) -> None:
    weight = (torch.randn(512, 512) * 0.02).to(dtype)
    packed = PackedTensor.pack(weight, coding=Huffman())
    bits = dtype.itemsize * 8
    exponents = (bits_of(weight).int() >> (bits - 9)) & 255
    best = weight.numel() * (bits - 8 + entropy(exponents)) / 8
    assert best < packed.nbytes < 1.01 * best
    bound = {torch.bfloat16: 0.68, torch.float16: 0.86, torch.float32: 0.85}[dtype]
    assert packed.nbytes < bound * weight.nbytes


@BY_DTYPE
def test_what_gains_little_stays_raw(dtype: torch.dtype) -> None:
    # All exponents as likely as any: nothing to be gained.
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integers)
    weight = torch.randint(info.min, info.max, (20_000,), dtype=integers).view(dtype)
    packed = PackedTensor.pack(weight, coding=Huffman())
    assert packed.nbytes == weight.nbytes
    assert not is_coded(packed.parts)
    check_bits(packed, weight)
    assert is_coded(PackedTensor.pack(torch.randn(20_000).to(dtype), coding=Huffman()).parts)
    assert not is_coded(PackedTensor.pack(torch.randn(20_000).to(dtype), coding=Raw()).parts)


def test_floats_of_a_shorter_float_are_coded_in_all_planes() -> None:
    weight = torch.randn(20_000).to(torch.bfloat16).float()
    packed = PackedTensor.pack(weight, coding=Huffman())
    assert packed.nbytes < 0.5 * weight.nbytes
    check_bits(packed, weight)


@pytest.mark.parametrize("out", ["strided", "wider"])
def test_out_of_another_form(out: str) -> None:
    weight = torch.randn(6, 5, 3, 3).to(torch.bfloat16)
    packed = PackedTensor.pack(weight, coding=Huffman())
    if out == "strided":
        given = torch.empty_like(weight, memory_format=torch.channels_last)
    else:
        given = torch.empty(weight.shape)
    strides = given.stride()
    assert packed.unpack(co.ops.DECODER, out=given) is given
    assert torch.equal(given, weight.to(given.dtype))
    assert given.stride() == strides
    packed = PackedTensor.pack(weight.float(), number=Float("bfloat16"), coding=Huffman())
    assert torch.equal(packed.unpack(out=torch.empty(weight.shape)), weight.float())
