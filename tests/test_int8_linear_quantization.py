"""int8_linear with static and with asymmetric activations: every backend against exact integers."""

from __future__ import annotations

import pytest
import torch
from conftest import kernel_params
from test_int8_linear import Case, assert_matches, make

import compressops as co
from compressops.ops.int8_linear import quantize_x

# 1 / scale overflows where a scale is that small, as it may; Triton's interpreter tells.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)
ALL_KERNELS = pytest.mark.parametrize("kernel", kernel_params("int8_linear"), indirect=True)
MODES = {
    "asymmetric": {"symmetric": False},
    "static": {"x_scale": 0.017},
    "static zero": {"x_scale": 0.017, "x_zero": -37},
}
ALL_MODES = pytest.mark.parametrize("mode", MODES)
CASES = [
    *(Case(m, k, n) for m, k, n in ((0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (7, 65, 17))),
    *(Case(m, 131, 67) for m in (1, 5, 20)),
    *(Case(9, k, 33) for k in (3, 15, 16, 33, 64)),
    *(Case(3, 40, 24, dtype) for dtype in (torch.float16, torch.bfloat16)),
    *(Case(3, 40, 24, activation=name) for name in ("relu", "gelu")),
    Case(3, 40, 24, bias=False),
]


def quantization(mode: str, device: torch.device) -> dict:
    dtypes = {"x_scale": torch.float32, "x_zero": torch.int8}
    return {
        name: torch.tensor(value, dtype=dtypes[name], device=device) if name in dtypes else value
        for name, value in MODES[mode].items()
    }


@ALL_KERNELS
@ALL_MODES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(kernel: torch.device, mode: str, case: Case) -> None:
    options = quantization(mode, kernel)
    for pack in (False, True):
        args = make(case, kernel, pack)
        assert_matches(co.ops.int8_linear(*args, **options), args, **options)


def rows_of_all_kinds() -> torch.Tensor:
    """[32, 40]: of every magnitude, of one sign, constant, on halves, beyond every static range."""
    x = torch.randn(32, 40)
    for row, magnitude in enumerate((1e-45, 1e-41, 1e-38, 1e-30, 1e-3, 2.0, 1e3, 1e30, 3.4e38)):
        x[row] *= magnitude / x[row].abs().max()
    x[9:12] = x[9:12].abs()
    x[12:15] = -x[12:15].abs()
    x[15] = 0
    x[16] = 1.5
    x[17] = -1.5
    x[18:20] = (torch.arange(80).view(2, 40) - 40) * 0.5 * 0.017
    x[20] = torch.arange(40) * 0.5
    x[20, 39] = 127.5  # the codes of half the row are halves
    x[21, 1:] = 0
    x[22] *= torch.logspace(-44, 0, 40)
    return x


@ALL_KERNELS
@ALL_MODES
def test_codes_are_bit_for_bit_those_of_eager(kernel: torch.device, mode: str) -> None:
    x, options = rows_of_all_kinds().to(kernel), quantization(mode, kernel)
    packed, sums = co.ops.int8_linear_pack(torch.eye(40).to(torch.int8))
    ones = torch.ones(40)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = x.to(dtype)
        q, scales, zeros = quantize_x(values, **options)
        assert q.unique().numel() > 150
        # In float32 throughout, so that no two codes share a result.
        y = co.ops.int8_linear(values.float(), packed, ones, sums, **options)
        expected = (q.int() - zeros).float() * scales
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", ["asymmetric", "static zero"])
def test_codes_are_the_nearest(mode: str) -> None:
    """Of what the range holds; and 0.0 is exact, so that padding costs nothing."""
    x, options = torch.randn(50, 64), quantization(mode, torch.device("cpu"))
    x[:, 7] = 0
    q, scales, zeros = quantize_x(x, **options)
    scales, zeros = scales.double(), zeros.double()
    low, high = (-128 - zeros) * scales, (127 - zeros) * scales
    found = (q.double() - zeros) * scales
    exact = x.double().clamp(low, high)
    assert ((found - exact).abs() <= scales * (0.5 + 1e-5)).all()
    assert (found[:, 7] == 0).all()
    if mode == "asymmetric":  # the range is the row's own, to half a step of the zero point's
        assert ((x - exact).abs() <= scales * (0.5 + 1e-5)).all()


@ALL_KERNELS
@ALL_MODES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_spoil_their_row_alone(kernel: torch.device, mode: str, bad: float) -> None:
    x, *rest = make(Case(4, 20, 5), kernel)
    options = quantization(mode, kernel)
    sound = co.ops.int8_linear(x, *rest, **options)
    x[1, 0] = x[2, 19] = bad
    y = co.ops.int8_linear(x, *rest, **options)
    assert y[1:3].isnan().all()
    assert torch.equal(y[[0, 3]], sound[[0, 3]])


@ALL_KERNELS
@pytest.mark.parametrize("scale", [1e-45, 1e-39, 1e-30, 1e30, 3e38])
def test_extreme_static_scales(kernel: torch.device, scale: float) -> None:
    x, weight, scales, sums, _, _ = make(Case(2, 20, 5), kernel)
    x[0, :3] = torch.tensor([0.0, 1e38, -1e38])
    static = torch.tensor(scale)
    y = co.ops.int8_linear(x, weight, scales, sums, None, "none", static)
    assert_matches(y, (x, weight, scales, sums, None, "none"), x_scale=static)


@ALL_KERNELS
@ALL_MODES
def test_strided_and_batched_input(kernel: torch.device, mode: str) -> None:
    x, *rest = make(Case(12, 20, 9), kernel)
    options = quantization(mode, kernel)
    whole = co.ops.int8_linear(x, *rest, **options)
    assert torch.equal(co.ops.int8_linear(x.view(3, 4, 20), *rest, **options), whole.view(3, 4, 9))
    assert torch.equal(co.ops.int8_linear(x.t().contiguous().t(), *rest, **options), whole)
    assert torch.equal(co.ops.int8_linear(x[::2], *rest, **options), whole[::2])
    assert torch.equal(co.ops.int8_linear(x[0], *rest, **options), whole[0])


@ALL_KERNELS
@pytest.mark.parametrize("k", [4099, 65536])
def test_extreme_sums_are_exact(kernel: torch.device, k: int) -> None:
    """All codes 255 from the zero point, against the largest weights."""
    weight = torch.full((18, k), -128, dtype=torch.int8)
    weight[9:] = 127
    packed, sums = co.ops.int8_linear_pack(weight)
    ones = torch.ones(18)
    for sign in (1.0, -1.0):
        x = torch.full((2, k), 255.0 * sign)
        y = co.ops.int8_linear(x, packed, ones, sums, symmetric=False)
        assert torch.equal(y, (weight[:, 0].double() * 255 * k * sign).float().expand(2, -1))


@ALL_KERNELS
@ALL_MODES
def test_opcheck(kernel: torch.device, mode: str) -> None:
    x, *rest = make(Case(4, 20, 9, activation="gelu"), kernel, pack=True)
    options = quantization(mode, kernel)
    co.ops.int8_linear(x, *rest, **options)
    torch.library.opcheck(
        torch.ops.compressops.int8_linear.default, (x.requires_grad_(), *rest), options
    )


BAD = {
    "x_scale": [torch.tensor(1.0).double(), torch.ones(1), torch.tensor(1)],
    "x_zero": [torch.tensor(1), torch.zeros(1, dtype=torch.int8)],
}


@ALL_KERNELS
def test_bad_arguments_are_named_with_their_value(kernel: torch.device) -> None:
    args, wide = make(Case(3, 8, 5), kernel), make(Case(1, 65537, 2), kernel)
    good = quantization("static zero", kernel)
    refused = [
        *((name, args, {**good, name: bad.to(kernel)}) for name in BAD for bad in BAD[name]),
        ("x_zero", args, {**good, "x_scale": None}),
        ("symmetric", args, {**good, "symmetric": False}),
        ("x", wide, good),
        ("x", wide, {"symmetric": False}),
    ]
    for name, arguments, options in refused:
        with pytest.raises(ValueError, match=f"int8_linear: argument '{name}'.*got"):
            co.ops.int8_linear(*arguments, **options)
