"""PackedTensor: bit-exact in every combination of axes, with the size that it says."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressops.formats import (
    BlockSparse,
    Coding,
    Dense,
    DynamicFixedPoint,
    FixedPoint,
    Float,
    Huffman,
    Int,
    Layout,
    LowRank,
    PackedTensor,
    Raw,
    Sparse,
    Ternary,
)
from compressops.formats.coding import Decoder, huffman_decode_reference
from compressops.formats.lowrank import low_rank_product

LAYOUTS = (
    Dense(),
    Sparse(),
    Sparse("bitmask"),
    Sparse("gaps"),
    BlockSparse((2, 3)),
    BlockSparse((16, 16)),
)
NUMBERS = (
    None,
    Float("bfloat16"),
    FixedPoint(4, 1),
    FixedPoint(12, 2),
    DynamicFixedPoint(6),
    DynamicFixedPoint(16),
    Int(8),
    Int(4, group_size=4),
    Int(8, symmetric=False),
    Int(3, group_size=5, symmetric=False),
    Ternary(),
    Ternary("group", group_size=4),
)
CODINGS = (Raw(), Huffman(), Huffman(max_length=8, chunk_size=7))
SHAPES = ((), (1,), (9,), (0, 3), (3, 0), (7, 13), (4, 3, 3, 3), (300, 2))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def check_round_trip(packed: PackedTensor, weight: torch.Tensor) -> None:
    assert packed.unpack().dtype == weight.dtype
    assert torch.equal(bits(packed.unpack()), bits(weight))
    spec, blob = json.loads(json.dumps(packed.to_spec())), packed.to_blob()
    assert blob.numel() == packed.nbytes == sum(spec["parts"].values())
    again = PackedTensor.from_blob(spec, blob)
    assert torch.equal(bits(again.unpack()), bits(weight))
    assert again.to_spec() == spec
    assert torch.equal(again.to_blob(), blob)
    described = PackedTensor.describe(spec)
    assert (described.density, described.ideal_nbytes) == (packed.density, packed.ideal_nbytes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_every_combination_is_bit_exact(layout: Layout, number):
    for i, (coding, shape) in enumerate(itertools.product(CODINGS, SHAPES)):
        dtype, density = DTYPES[i % 3], (0.0, 0.2, 1.0, 0.1)[i % 4]
        mask = torch.rand(shape) < density
        weight = torch.where(mask, torch.randn(shape), 0.0).to(dtype)
        params = number.fit(weight) if number else None
        weight = number.fake_quantize(weight, params) if number else weight
        packed = PackedTensor.pack(weight, layout, number, coding, params, mask)
        check_round_trip(packed, weight)


@given(data=st.data())
def test_random_weights_are_bit_exact(data: st.DataObject):
    shape = data.draw(st.lists(st.integers(0, 9), max_size=4).map(tuple))
    values = st.one_of(st.just(0.0), st.floats(width=32), st.sampled_from([-0.0, 1.0, -1.0]))
    count = math.prod(shape)
    weight = torch.tensor(data.draw(st.lists(values, min_size=count, max_size=count)))
    weight = weight.to(data.draw(st.sampled_from(DTYPES))).reshape(shape)
    layout, coding = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.sampled_from(CODINGS))
    check_round_trip(PackedTensor.pack(weight, layout, None, coding), weight)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_floats_keep_negative_zero_and_nan_payloads(layout: Layout):
    patterns = [0x7FC01234, -0x7FFFFFFF - 1, 0x7F800001, -1, 1, 0, 0x7F800000]
    weight = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    check_round_trip(PackedTensor.pack(weight, layout, coding=Huffman()), weight)


def test_six_bit_codes_take_six_bits():
    weight = torch.randn(100, 100)
    packed = PackedTensor.pack(weight, number=DynamicFixedPoint(6), lossy=True)
    assert packed.nbytes == 100 * 100 * 6 // 8 + 1
    assert packed.ideal_nbytes == 100 * 100 * 6 / 8
    assert packed.dense_codes().dtype == torch.int8


def gaussian(density: float, *shape: int) -> torch.Tensor:
    weight = torch.randn(shape)
    threshold = weight.abs().flatten().quantile(1 - density)
    return torch.where(weight.abs() > threshold, weight, 0.0)


def entropy_bytes(symbols: torch.Tensor) -> float:
    p = symbols.unique(return_counts=True)[1].double() / symbols.numel()
    return float(-(p * p.log2()).sum()) * symbols.numel() / 8


def test_pruned_and_quantized_comes_within_two_percent_of_the_entropy():
    weight = gaussian(0.1565, 192, 1728)
    packed = PackedTensor.pack(weight, Sparse(), DynamicFixedPoint(6), Huffman(), lossy=True)
    codes = packed.dense_codes()
    bound = entropy_bytes(codes != 0) + entropy_bytes(codes[codes != 0])
    assert packed.nbytes < 1.02 * bound


def test_auto_takes_the_smaller_index():
    for density, index in ((0.001, "gaps"), (0.5, "bitmask")):
        weight = gaussian(density, 100, 100)
        sizes = {
            name: PackedTensor.pack(weight, Sparse(name)).nbytes for name in ("bitmask", "gaps")
        }
        packed = PackedTensor.pack(weight, Sparse())
        assert packed.layout == Sparse(index)
        assert packed.nbytes == min(sizes.values())


def test_gaps_cross_any_distance():
    for where in ([], [0], [254], [255], [256], [509, 510, 511], [999], [0, 255, 510, 765]):
        weight = torch.zeros(1000)
        weight[where] = 1.0
        check_round_trip(PackedTensor.pack(weight, Sparse("gaps"), Ternary(), Raw()), weight)
        check_round_trip(PackedTensor.pack(weight, Sparse("gaps"), Ternary(), Huffman()), weight)


def test_huffman_never_makes_a_stream_larger():
    for count in (0, 1, 5, 100):
        weight = torch.randn(count)
        for number in (None, Int(8), DynamicFixedPoint(11)):
            raw = PackedTensor.pack(weight, Dense(), number, Raw(), lossy=True)
            coded = PackedTensor.pack(weight, Dense(), number, Huffman(), lossy=True)
            assert coded.nbytes <= raw.nbytes


def test_float_planes_code_the_exponent_and_leave_the_mantissa():
    weight = torch.randn(100, 100).to(torch.bfloat16)
    packed = PackedTensor.pack(weight, coding=Huffman())
    assert list(packed.parts) == ["codes_0", "codes_1", "codes_1_sizes", "codes_1_lengths"]
    assert packed.nbytes < 0.75 * weight.nbytes


def test_mask_counts_as_papers_do():
    weight = torch.tensor([[0.4, 0.001, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False, False]])
    packed = PackedTensor.pack(weight, Sparse(), DynamicFixedPoint(4), mask=mask, lossy=True)
    assert packed.meta["count"] == 1
    assert packed.density == 0.5
    assert packed.ideal_nbytes == 1.0
    with pytest.raises(ValueError, match="2 entries of the weight are not 0 where the mask"):
        PackedTensor.pack(weight, mask=~mask)
    with pytest.raises(ValueError, match=r"mask must be bool \[1, 4\], got torch.float32"):
        PackedTensor.pack(weight, mask=weight)


def test_a_weight_off_the_grid_is_refused_with_its_place():
    weight = torch.tensor([[0.5, 0.25], [0.3, 0.0]])
    with pytest.raises(ValueError, match=r"1 of 4 values would change, the first at \[1, 0\] from"):
        PackedTensor.pack(weight, number=FixedPoint(4, 1))
    packed = PackedTensor.pack(weight, number=FixedPoint(4, 1), lossy=True)
    assert packed.unpack()[1, 0] == 0.25
    with pytest.raises(ValueError, match=r"would change, the first at \[0\] from -0.0 to 0.0"):
        PackedTensor.pack(torch.tensor([-0.0]), number=Int(8))


def test_what_cannot_be_packed_is_named():
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        PackedTensor.pack(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="1 values that are NaN"):
        PackedTensor.pack(torch.tensor([math.nan]), number=Int(8), lossy=True)
    with pytest.raises(ValueError, match=r"scales of a weight \[2, 2\]"):
        PackedTensor.pack(torch.ones(2, 2), number=Int(8), params={"scales": torch.ones(3, 1)})


@pytest.mark.parametrize("number", [None, Int(8), Int(8, symmetric=False)], ids=str)
@pytest.mark.parametrize("coding", [Raw(), Huffman()], ids=str)
def test_nothing_shares_memory_with_what_it_came_from(number, coding: Coding):
    weight = torch.randn(4, 4)
    params = number.fit(weight) if number else {}
    packed = PackedTensor.pack(weight, number=number, coding=coding, params=params, lossy=True)
    expected = packed.unpack().clone()
    for tensor in (*params.values(), weight, packed.dense_codes(), packed.unpack()):
        tensor.zero_()
    assert torch.equal(packed.unpack(), expected)


def test_a_decoder_can_be_given():
    weight = gaussian(0.2, 64, 64)
    packed = PackedTensor.pack(weight, Sparse(), DynamicFixedPoint(6), Huffman(), lossy=True)
    calls = []

    def decode(stream, offsets, lengths, num_symbols, chunk_size, out):
        calls.append(num_symbols)
        return huffman_decode_reference(stream, offsets, lengths, num_symbols, chunk_size, out)

    assert torch.equal(packed.unpack(Decoder(symbols=decode)), packed.unpack())
    assert packed.meta["count"] in calls


@pytest.mark.parametrize("coding", [Raw(), Huffman()], ids=str)
def test_low_rank_is_its_factors(coding: Coding):
    weight = torch.randn(8, 2, 3, 3)
    packed = PackedTensor.pack(weight, LowRank(3), Int(8), coding, lossy=True)
    u, v = packed.factors()
    assert (u.shape, v.shape) == ((8, 3), (3, 18))
    product = low_rank_product(u.unpack(), v.unpack()).view(weight.shape)
    assert torch.equal(packed.unpack(), product)
    reference = (u.unpack().double() @ v.unpack().double()).view(weight.shape)
    torch.testing.assert_close(product, reference.float(), rtol=1e-6, atol=1e-6)
    check_round_trip(packed, product)
    assert packed.ideal_nbytes == u.ideal_nbytes + v.ideal_nbytes == 3 * (8 + 18)
    sparse = PackedTensor.pack(gaussian(0.3, 3, 18), Sparse(), Int(8), coding, lossy=True)
    mixed = PackedTensor.from_factors([u, sparse], (8, 2, 9), torch.float16)
    check_round_trip(mixed, mixed.unpack())


def test_low_rank_of_a_low_rank_weight_is_lossless_enough_to_check():
    with pytest.raises(ValueError, match="would change"):
        PackedTensor.pack(torch.randn(6, 6), LowRank(2))
    with pytest.raises(ValueError, match="rank 7 of a 6 × 6 matrix"):
        PackedTensor.pack(torch.randn(6, 6), LowRank(7), lossy=True)
    u = PackedTensor.pack(torch.randn(6, 2))
    with pytest.raises(ValueError, match=r"factors \[\(6, 2\), \(6, 2\)\] don't make"):
        PackedTensor.from_factors([u, u], (6, 6), torch.float32)
    square = PackedTensor.pack(torch.randn(2, 2), LowRank(1), lossy=True)
    with pytest.raises(ValueError, match="factor v is low-rank itself"):
        PackedTensor.from_factors([u, square], (6, 2), torch.float32)
    with pytest.raises(ValueError, match="no codes of its own"):
        square.dense_codes()
    with pytest.raises(ValueError, match="only LowRank has factors"):
        u.factors()


def test_copies_and_pickles():
    packed = PackedTensor.pack(gaussian(0.2, 9, 9), Sparse(), Int(4), Huffman(), lossy=True)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu")):
        assert torch.equal(other.unpack(), packed.unpack())
        assert other.to_spec() == packed.to_spec()
    assert repr(packed).startswith("PackedTensor([9, 9], torch.float32, Sparse(index='")


@pytest.mark.parametrize("axis", [*LAYOUTS, LowRank(3)], ids=str)
def test_layout_specs(axis: Layout):
    assert Layout.from_spec(json.loads(json.dumps(axis.to_spec()))) == axis


@pytest.mark.parametrize(
    ("axis", "spec", "message"),
    [
        (Layout, {"type": "Dense", "block": 3}, "Dense has no field 'block': known are none"),
        (Layout, {"type": "Sparse", "index": "csr"}, "auto, bitmask, gaps, got 'csr'"),
        (Layout, {"type": "BlockSparse", "block": [16]}, r"block must be \(rows, columns\)"),
        (Layout, {"type": "BlockSparse", "block": [16, 0]}, "from 1 to 1024, got 0"),
        (Layout, {"type": "LowRank", "rank": 0}, "rank must be an integer from 1 .* got 0"),
        (Layout, {"type": "_EntryLayout"}, "unknown layout"),
        (Coding, {"type": "Huffman", "max_length": 13}, "from 8 to 12, got 13"),
        (Coding, {"type": "Huffman", "chunk_size": 0}, "from 1 to 32768, got 0"),
        (Coding, {"type": "Zstd"}, "unknown coding 'Zstd': known are Huffman, Raw"),
    ],
)
def test_axis_errors(axis, spec, message):
    with pytest.raises(ValueError, match=message):
        axis.from_spec(spec)
