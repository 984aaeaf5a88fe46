"""Numbers: the grid of each, what fitting promises, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressops.formats import DynamicFixedPoint, FixedPoint, Float, Int, Number, Ternary

NUMBERS = (
    Float(),
    Float("bfloat16"),
    FixedPoint(4, 1),
    FixedPoint(12, -2),
    FixedPoint(6, None, 0.05),
    DynamicFixedPoint(2),
    DynamicFixedPoint(6),
    DynamicFixedPoint(6, overflow=0.1),
    DynamicFixedPoint(16),
    Int(2),
    Int(8),
    Int(4, group_size=4),
    Int(8, symmetric=False),
    Int(3, group_size=5, symmetric=False),
    Ternary(),
    Ternary("row"),
    Ternary("group", group_size=3),
)
SHAPES = ((), (1,), (5,), (0, 3), (3, 0), (7, 13), (4, 3, 3, 3))


@pytest.mark.parametrize("number", NUMBERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantizing_twice_changes_nothing(number: Number, dtype: torch.dtype):
    for shape in SHAPES:
        weight = torch.randn(shape).to(dtype)
        number = number.for_network([weight])
        params = number.fit(weight)
        number.check_params(params, shape)
        codes = number.quantize(weight, params)
        assert codes.shape == weight.shape
        assert codes.dtype == number.code_dtype
        values = number.dequantize(codes, params, dtype)
        assert values.dtype == dtype
        assert torch.equal(number.fake_quantize(weight, params), values)
        assert torch.equal(number.fake_quantize(values, params), values)
        assert not torch.signbit(values[values == 0]).any() or number.is_float
        zeros = number.zero_codes(torch.empty(shape, dtype=number.code_dtype), params)
        assert torch.equal(number.dequantize(zeros, params), torch.zeros(shape))


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_spec_round_trip(number: Number):
    assert Number.from_spec(number.to_spec()) == number


@given(
    bits=st.integers(2, 16),
    p=st.integers(-120, 120),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
)
def test_fixed_point_is_the_published_formula(bits: int, p: int, values: list[float]):
    number = FixedPoint(bits, p)
    codes = number.quantize(torch.tensor(values), {})
    for x, q in zip(values, codes.tolist(), strict=True):
        exact = max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, round(math.ldexp(x, bits - p))))
        assert q == exact
    expected = np.ldexp(codes.double().numpy(), p - bits).astype(np.float32)
    assert np.array_equal(number.dequantize(codes, {}).numpy(), expected)


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50),
    bits=st.integers(2, 12),
    overflow=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_dynamic_fixed_point_takes_the_smallest_integer_length(values, bits, overflow):
    weight = torch.tensor(values)
    number = DynamicFixedPoint(bits, overflow)
    p = int(number.fit(weight)["integer_bits"])

    def rate(p: int) -> float:
        clips = [
            not -(2 ** (bits - 1)) <= round(math.ldexp(x, bits - p)) <= 2 ** (bits - 1) - 1
            for x in weight.tolist()
        ]
        return sum(clips) / max(1, sum(x != 0 for x in weight.tolist()))

    assert rate(p) <= overflow
    if any(values):
        assert p == -120 or rate(p - 1) > overflow
    else:
        assert p == 0


def test_integer_length_may_be_negative_and_ignores_pruned_entries():
    weight = torch.full((8,), 0.01)
    assert int(DynamicFixedPoint(6).fit(weight)["integer_bits"]) == -5
    spread = torch.cat([torch.ones(10), torch.full((90,), 0.01)])
    assert int(DynamicFixedPoint(6, 0.1).fit(spread)["integer_bits"]) == -5
    padded = torch.cat([spread[5:], torch.zeros(10_000)])
    assert int(DynamicFixedPoint(6, 0.05).fit(padded)["integer_bits"]) == 2


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38, 3e38])
def test_integer_lengths_end_where_float32_does(value: float):
    weight = torch.full((3,), value)
    number = FixedPoint(6).for_network([weight])
    assert number.integer_bits == int(DynamicFixedPoint(6).fit(weight)["integer_bits"])
    assert number.integer_bits == (120 if value > 1 else -120)
    assert torch.isfinite(number.fake_quantize(weight, {})).all()


def test_fixed_point_shares_one_integer_length():
    weights = [torch.tensor([0.1]), torch.tensor([5.0, -3.0])]
    number = FixedPoint(8).for_network(weights)
    assert number.integer_bits == 4
    assert number.for_network(weights[:1]) is number
    with pytest.raises(ValueError, match="integer_bits is None"):
        FixedPoint(8).fit(weights[0])


def test_int_scales_by_row_and_by_ragged_group():
    weight = torch.tensor([[1.0, -2.0, 4.0], [0.0, 0.0, 0.0]])
    assert torch.equal(Int(8).fit(weight)["scales"], torch.tensor([[4.0], [0.0]]) / 127)
    scales = Int(8, group_size=2).fit(weight)["scales"]
    assert torch.equal(scales, torch.tensor([[2.0, 4.0], [0.0, 0.0]]) / 127)
    params = Int(4, symmetric=False).fit(weight)
    codes = Int(4, symmetric=False).quantize(weight, params)
    assert codes[0].tolist() == [-1, -8, 7]
    assert params["zeros"].dtype == torch.int8


def test_ternary_is_twn():
    weight = torch.tensor([[1.0, -0.8, 0.1, -0.1]])
    params = Ternary().fit(weight)
    assert params["scales"].item() == pytest.approx(0.9)
    assert Ternary().quantize(weight, params).tolist() == [[1, -1, 0, 0]]
    ragged = Ternary("group", group_size=3).fit(torch.tensor([[1.0, 1.0, 1.0, 5.0]]))
    assert ragged["scales"].tolist() == [[1.0, 5.0]]


@pytest.mark.parametrize("number", [n for n in NUMBERS if not n.is_float], ids=str)
def test_nan_shows_in_training_and_is_refused_in_fitting(number: Number):
    weight = torch.randn(4, 6)
    number = number.for_network([weight])
    params = number.fit(weight)
    weight[1, 2] = math.nan
    assert number.fake_quantize(weight, params)[1, 2].isnan()
    with pytest.raises(ValueError, match="1 values that are NaN or infinite"):
        number.fit(weight)


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_float64_is_refused_by_name(number: Number):
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        number.for_network([torch.zeros(2)]).fit(torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "Posit"}, "unknown number 'Posit': known are DynamicFixedPoint, FixedPoint"),
        ({"type": "_BinaryPoint"}, "unknown number"),
        ({"type": ["Int"]}, "unknown number"),
        ({"bits": 4}, "with a 'type'"),
        (None, "with a 'type', got None"),
        ({"type": "Int"}, "missing 1 required positional argument: 'bits'"),
        ({"type": "Int", "bits": 9}, "bits must be an integer from 2 to 8, got 9"),
        ({"type": "Int", "bits": True}, "got True"),
        ({"type": "Int", "bits": 4.0}, "got 4.0"),
        ({"type": "Int", "bits": 4, "group_size": 0}, "group_size must be .* got 0"),
        ({"type": "Int", "bits": 4, "symmetric": 1}, "symmetric must be true or false, got 1"),
        ({"type": "Int", "bits": 4, "scale": 1}, "Int has no field 'scale'"),
        ({"type": "Float", "dtype": "float64"}, "got 'float64'"),
        ({"type": "DynamicFixedPoint", "bits": 17}, "from 2 to 16, got 17"),
        ({"type": "DynamicFixedPoint", "bits": 6, "overflow": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"type": "DynamicFixedPoint", "bits": 6, "overflow": math.nan}, "got nan"),
        ({"type": "FixedPoint", "bits": 4, "integer_bits": 121}, "from -120 to 120, got 121"),
        ({"type": "Ternary", "granularity": "column"}, "tensor, row, group, got 'column'"),
        ({"type": "Ternary", "granularity": "group"}, "group_size must be .* got None"),
        ({"type": "Ternary", "group_size": 4}, "group_size goes with"),
        ({"type": "Ternary", "threshold": -1}, r"threshold must be .* got -1"),
    ],
)
def test_errors_name_field_and_value(spec, message):
    with pytest.raises(ValueError, match=message):
        Number.from_spec(spec)


def test_params_of_another_shape_are_refused():
    params = Int(4, group_size=2).fit(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"scales of a weight \[3, 8\] must be .* \[3, 4\], got"):
        Int(4, group_size=2).check_params(params, (3, 8))
    with pytest.raises(ValueError, match=r"has parameters \['scales'\], got \[\]"):
        Int(4).check_params({}, (3, 8))
