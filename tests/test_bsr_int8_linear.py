"""bsr_int8_linear: every backend against int8_linear's reference on the dense weight."""

from __future__ import annotations

import pytest
import torch
from bsr_cases import Case, grid
from conftest import kernel_params
from hypothesis import given
from hypothesis import strategies as st

import compressops as co
from compressops import backends

ALL_KERNELS = pytest.mark.parametrize("kernel", kernel_params("bsr_int8_linear"), indirect=True)
CASES = [
    *(Case(m, k, n) for m in (0, 1, 7) for k in (0, 1, 40) for n in (0, 1, 50)),
    *(Case(m, 100, 70) for m in (2, 3, 5, 6, 8, 13, 33)),
    *(Case(m, 150, 140, (b, b)) for m in (1, 20) for b in (4, 8, 16, 32, 128)),
    *(Case(m, 90, 70, block) for m in (1, 6) for block in ((1, 16), (16, 4), (24, 20), (2, 12))),
    *(Case(7, 64, 64, (32, 16), density) for density in (0.0, 1.0)),
    *(Case(3, 70, 50, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)),
    *(Case(3, 40, 50, activation=name) for name in ("relu", "gelu")),
    Case(1, 90, 587, activation="gelu"),  # more strips than are multiplied at once
    Case(3, 40, 24, bias=False),
    Case(130, 519, 231, (32, 32), 0.2),
]
QUANTIZATIONS = {
    "symmetric": {},
    "asymmetric": {"symmetric": False},
    "static": {"x_scale": torch.tensor(0.03)},
    "static with a zero point": {
        "x_scale": torch.tensor(0.02),
        "x_zero": torch.tensor(-37, dtype=torch.int8),
    },
}


def make(case: Case, device: torch.device, pack: bool = True) -> tuple[tuple, torch.Tensor]:
    """The arguments of bsr_int8_linear, and the dense weight."""
    x = torch.randn(case.m, case.k, device=device).to(case.dtype)
    weight = torch.randint(-127, 128, (case.n, case.k), dtype=torch.int8, device=device)
    plain = co.ops.bsr_from_dense(weight, case.block, case.keep().to(device))
    *packed, sums = co.ops.bsr_int8_linear_pack(*plain, case.n, case.k)
    scales = torch.rand(case.n, device=device) / 127 + 1e-4
    bias = torch.randn(case.n, device=device) if case.bias else None
    bsr = packed if pack else plain
    return (x, *bsr, scales, sums, bias, case.activation), co.ops.bsr_to_dense(
        *plain, case.n, case.k
    )


def assert_matches(actual, args, dense, **quantization) -> None:
    """The sums are exact: only float32's rounding of the epilogue may differ."""
    x, _, _, _, scales, sums, bias, activation = args
    assert torch.equal(sums, dense.sum(1, dtype=torch.int32))
    with backends.backend("eager"):
        expected = co.ops.int8_linear(
            x.float(), dense, scales, sums, bias, activation, **quantization
        )
    assert actual.dtype == x.dtype
    error = (actual.float() - expected).abs()
    size = expected.abs() + (0 if bias is None else bias.abs()) + (3 if activation == "gelu" else 0)
    eps = torch.finfo(x.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    assert (error <= eps * size + 1e-30).all(), (error / size).max().item()


@grid("bsr_int8_linear", CASES)
def test_matches_exact_sums(kernel: torch.device, case: Case) -> None:
    for pack in (False, True):
        args, dense = make(case, kernel, pack)
        assert_matches(co.ops.bsr_int8_linear(*args), args, dense)


@ALL_KERNELS
@pytest.mark.parametrize("how", QUANTIZATIONS)
@pytest.mark.parametrize("m", [1, 13])
def test_other_quantizations(kernel: torch.device, how: str, m: int) -> None:
    args, dense = make(Case(m, 70, 50), kernel)
    quantization = {
        key: value.to(kernel) if isinstance(value, torch.Tensor) else value
        for key, value in QUANTIZATIONS[how].items()
    }
    assert_matches(co.ops.bsr_int8_linear(*args, **quantization), args, dense, **quantization)


@ALL_KERNELS
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_sums_are_exact(kernel: torch.device, sign: int) -> None:
    k = 131072
    weight = torch.full((18, k), -127, dtype=torch.int8, device=kernel)
    weight[9:] = 127
    plain = co.ops.bsr_from_dense(weight, (16, 128))
    *bsr, sums = co.ops.bsr_int8_linear_pack(*plain, 18, k)
    x = torch.full((2, k), sign * 127.0, device=kernel)
    y = co.ops.bsr_int8_linear(x, *bsr, torch.ones(18, device=kernel), sums)
    expected = torch.where(torch.arange(18, device=kernel) < 9, -sign, sign) * 127.0 * 127 * k
    assert torch.equal(y, expected.expand(2, -1))


@ALL_KERNELS
@pytest.mark.parametrize("pack", [False, True])
def test_what_lies_beyond_the_edges_is_ignored(kernel: torch.device, pack: bool) -> None:
    weight = torch.randint(-127, 128, (50, 40), dtype=torch.int8, device=kernel)
    values, crow, col = co.ops.bsr_from_dense(weight, (16, 16))
    values[col == 2, :, 8:] = 99
    values[-3:, 2:] = 77
    *packed, sums = co.ops.bsr_int8_linear_pack(values, crow, col, 50, 40)
    bsr = packed if pack else (values, crow, col)
    args = (torch.randn(7, 40, device=kernel), *bsr, torch.rand(50, device=kernel) / 127, sums)
    args = (*args, None, "none")
    assert_matches(co.ops.bsr_int8_linear(*args), args, weight)


@given(
    st.integers(1, 20),
    st.integers(0, 80),
    st.integers(0, 80),
    st.tuples(st.integers(1, 40), st.integers(1, 10).map(lambda quarter: 4 * quarter)),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_random_shapes(m: int, k: int, n: int, block, density: float, seed: int) -> None:
    torch.manual_seed(seed)
    args, dense = make(Case(m, k, n, block, density), torch.device("cpu"), bool(seed % 2))
    assert_matches(co.ops.bsr_int8_linear(*args), args, dense)


@ALL_KERNELS
def test_nan_and_inf_spoil_their_row_alone(kernel: torch.device) -> None:
    (x, *rest), _ = make(Case(3, 40, 50, density=0.2), kernel)
    sound = co.ops.bsr_int8_linear(x, *rest)
    for bad in (torch.nan, torch.inf):
        spoilt = x.clone()
        spoilt[1, 39] = bad
        y = co.ops.bsr_int8_linear(spoilt, *rest)
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2]], sound[[0, 2]])


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_gradient_is_that_of_the_dequantized_layer(activation: str) -> None:
    args, dense = make(Case(5, 40, 50), torch.device("cpu"))
    x, *weight, bias, _ = args
    grad, leaves = torch.randn(5, 50), (x.requires_grad_(), bias.requires_grad_())
    y = co.ops.bsr_int8_linear(x, *weight, bias, activation)
    found = torch.autograd.grad(y, leaves, grad)
    y = co.ops.int8_linear(x, dense, *weight[3:], bias, activation)
    expected = torch.autograd.grad(y, leaves, grad)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@ALL_KERNELS
def test_opcheck(kernel: torch.device) -> None:
    for pack in (False, True):
        (x, *rest), _ = make(Case(4, 40, 50, activation="gelu"), kernel, pack)
        args = (x.requires_grad_(), *rest)
        torch.library.opcheck(torch.ops.compressops.bsr_int8_linear.default, args)


def test_compiles_to_one_graph() -> None:
    (x, *rest), _ = make(Case(4, 40, 50), torch.device("cpu"))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return co.ops.bsr_int8_linear(x * 2, *rest) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


INT32 = torch.int32
BAD = {
    "x": [torch.randn(3, 40).double(), torch.tensor(1.0), torch.randn(0, 131073)],
    "values": [
        torch.zeros(7, 16, 16),
        torch.zeros(7, 16, 6, dtype=torch.int8),
        torch.zeros(7, 4, 16, 1, dtype=torch.int8),
        torch.zeros(7, 4, 3, 4, dtype=torch.int8),
    ],
    "crow_indices": [
        torch.tensor([0, 3, 5, 7], dtype=INT32),
        torch.tensor([0, 3, 5, 6, 8], dtype=INT32),
        torch.tensor([0, 9, 5, 6, 7], dtype=INT32),
    ],
    "col_indices": [
        torch.tensor([0, 1, 2, 0, 1, 2], dtype=INT32),
        torch.tensor([0, 1, 3, 0, 1, 2, 2], dtype=INT32),
        torch.tensor([0, 1, -1, 0, 1, 2, 2], dtype=INT32),
    ],
    "weight_scales": [torch.ones(50).double(), torch.ones(50, 1)],
    "weight_sums": [torch.zeros(4, dtype=INT32), torch.zeros(50)],
    "bias": [torch.zeros(4), torch.zeros(50, dtype=torch.int64)],
    "activation": ["swish"],
    "x_zero": [torch.tensor(3, dtype=torch.int8)],
}


@pytest.mark.parametrize("name", BAD)
@ALL_KERNELS
def test_bad_arguments_are_named_with_their_value(kernel: torch.device, name: str) -> None:
    def on_device(value):
        return value.to(kernel) if isinstance(value, torch.Tensor) else value

    good = {
        "x": torch.randn(3, 40),
        "values": torch.zeros(7, 16, 16, dtype=torch.int8),
        "crow_indices": torch.tensor([0, 3, 5, 6, 7], dtype=INT32),
        "col_indices": torch.tensor([0, 1, 2, 0, 1, 2, 2], dtype=INT32),
        "weight_scales": torch.ones(50),
        "weight_sums": torch.zeros(50, dtype=INT32),
        "bias": torch.zeros(50),
    }
    good = {key: on_device(value) for key, value in good.items()}
    co.ops.bsr_int8_linear(**good)
    for bad in BAD[name]:
        with pytest.raises(ValueError, match="bsr_int8_linear: argument '") as error:
            co.ops.bsr_int8_linear(**{**good, name: on_device(bad)})
        assert "got" in str(error.value)
    for name in ("values", "crow_indices", "col_indices"):
        weight = {key: good[key] for key in ("values", "crow_indices", "col_indices")}
        for bad in BAD[name]:
            with pytest.raises(ValueError, match="bsr_int8_linear_pack: argument '"):
                co.ops.bsr_int8_linear_pack(
                    **{**weight, name: on_device(bad)}, out_features=50, in_features=40
                )
