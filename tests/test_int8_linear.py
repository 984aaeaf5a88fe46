"""int8_linear: every backend against exact integer arithmetic and a float64 epilogue."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import kernel_params
from hypothesis import given
from hypothesis import strategies as st

import compressops as co
from compressops import backends
from compressops.ops.int8_linear import _unpack, quantize_x

ALL_KERNELS = pytest.mark.parametrize("kernel", kernel_params("int8_linear"), indirect=True)


@dataclass(frozen=True)
class Case:
    m: int
    k: int
    n: int
    dtype: torch.dtype = torch.float32
    bias: bool = True
    activation: str = "none"


CASES = [
    *(Case(m, k, n) for m in (0, 1, 7) for k in (0, 1, 5, 64) for n in (0, 1, 17)),
    *(Case(m, 129, 67) for m in (1, 2, 5, 6, 7, 8, 13)),
    *(Case(9, 36, n) for n in (15, 16, 31, 48, 63, 64, 65)),
    *(Case(8, 36, n) for n in (16, 33, 47, 48, 49)),
    *(Case(9, k, 20) for k in (3, 4, 15, 16, 17, 31, 33)),
    *(Case(3, 40, 24, dtype) for dtype in (torch.float16, torch.bfloat16)),
    *(Case(3, 40, 24, activation=name) for name in ("relu", "gelu")),
    Case(3, 40, 24, bias=False),
    Case(2, 40, 24, torch.bfloat16, activation="gelu"),
]
LARGE = [Case(130, 1031, 259), Case(1, 131072, 3)]


def make(case: Case, device: torch.device, pack: bool = False):
    x = torch.randn(case.m, case.k, device=device).to(case.dtype)
    weight = torch.randint(-127, 128, (case.n, case.k), dtype=torch.int8, device=device)
    scales = torch.rand(case.n, device=device) / 127 + 1e-4
    bias = torch.randn(case.n, device=device) if case.bias else None
    packed, sums = co.ops.int8_linear_pack(weight)
    return x, packed if pack else weight, scales, sums, bias, case.activation


def reference(x, weight, scales, sums, bias, activation, **quantization):
    """Integer sums in int64, everything after them in float64."""
    q, x_scales, x_zeros = quantize_x(x, **quantization)
    rows = _unpack(weight, len(scales), x.shape[-1])
    total = (q.cpu().long() - x_zeros.cpu()) @ rows.cpu().long().t()
    y = total.double() * x_scales.cpu().double() * scales.cpu().double()
    if bias is not None:
        y = y + bias.cpu().double()
    if activation == "relu":
        y = y.relu()
    return F.gelu(y) if activation == "gelu" else y


def assert_matches(actual: torch.Tensor, args: tuple, **quantization) -> None:
    """Rounding alone may differ: a few float32 roundings, and the last one to the dtype.

    The sums are exact, so the error is relative to each value; what cancels is the bias, and in
    gelu's tail 1 + erf, where torch's own, which eager runs, is off by up to 1.2e-6.
    """
    expected = reference(*args, **quantization)
    x, *_, bias, activation = args
    assert actual.dtype == x.dtype
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    size = expected.abs() + 1e-30  # below, the scales' product is subnormal and loses bits
    if bias is not None:
        size = size + bias.cpu().double().abs()
    if activation == "gelu":
        size = size + (3 if backends.name("int8_linear", x.device.type) == "eager" else 1)
    error = ((actual.cpu().double() - expected).abs() / size).max().item()
    assert error <= torch.finfo(x.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps, error


@ALL_KERNELS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(kernel: torch.device, case: Case) -> None:
    for pack in (False, True):
        args = make(case, kernel, pack)
        assert_matches(co.ops.int8_linear(*args), args)


@pytest.mark.parametrize(
    "kernel", [p for p in kernel_params("int8_linear") if p.values[0][1] != "triton"], indirect=True
)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_matches_float64_on_large_shapes(kernel: torch.device, case: Case) -> None:
    args = make(case, kernel, pack=True)
    assert_matches(co.ops.int8_linear(*args), args)


@pytest.mark.parametrize(
    "kernel", [p for p in kernel_params("int8_linear") if p.values[0][1] != "triton"], indirect=True
)
@pytest.mark.parametrize("k", [4099, 131072])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_sums_are_exact(kernel: torch.device, k: int, sign: float) -> None:
    x = torch.full((2, k), sign * 127, device=kernel)
    weight = torch.full((18, k), -127, dtype=torch.int8, device=kernel)
    weight[9:] = 127
    packed, sums = co.ops.int8_linear_pack(weight)
    ones = torch.ones(18, device=kernel)
    y = co.ops.int8_linear(x, packed, ones, sums)
    expected = torch.where(torch.arange(18, device=kernel) < 9, -sign, sign) * 127 * 127 * k
    assert torch.equal(y, expected.expand(2, -1))


def gelu_of(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The epilogue alone: weights of 0 leave the bias."""
    x, n = torch.ones(1, 4, device=device), len(values)
    weight, sums = co.ops.int8_linear_pack(torch.zeros(n, 4, dtype=torch.int8, device=device))
    scales = torch.ones(n, device=device)
    return co.ops.int8_linear(x, weight, scales, sums, values.to(device), "gelu")[0].cpu()


def exact_gelu(values: torch.Tensor) -> torch.Tensor:
    """In float64; the complement of erf does not cancel."""
    y = values.double()
    return 0.5 * y * torch.special.erfc(-y / math.sqrt(2))


@ALL_KERNELS
def test_gelu_is_as_exact_as_torchs(kernel: torch.device) -> None:
    values = torch.cat([torch.linspace(-14, 20, 3001), torch.logspace(-40, 1, 500)])
    values = torch.cat([values, -values[-500:], torch.tensor([0.0, -0.0])])
    exact = exact_gelu(values)
    found, theirs = gelu_of(values, kernel).double(), F.gelu(values).double()
    assert (found - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert (found - exact).square().mean() <= 4 * (theirs - exact).square().mean()


@pytest.mark.parametrize(
    "kernel", [p for p in kernel_params("int8_linear") if p.values[0][1] == "cpu"], indirect=True
)
def test_gelu_on_the_cpu_everywhere(kernel: torch.device) -> None:
    """Small values to a few units in the last place, large ones whole or gone."""
    small = torch.cat([torch.linspace(-0.5, 0.5, 100_003), torch.logspace(-37, -1, 4001)])
    found = gelu_of(small, kernel).double()
    assert ((found - exact_gelu(small)).abs() <= 3 * 2.0**-23 * exact_gelu(small).abs()).all()
    large = torch.cat([torch.linspace(5.5, 80, 999), torch.tensor([3.4e38, torch.inf])])
    assert (gelu_of(large, kernel) >= large * (1 - 2**-23)).all()
    assert (gelu_of(large, kernel) <= large).all()
    assert gelu_of(-large[:-1], kernel).abs().max() < 1.2e-6
    special = gelu_of(torch.tensor([torch.nan, -torch.inf, 0.0]), kernel)
    assert special[:2].isnan().all()
    assert special[2] == 0


@ALL_KERNELS
def test_strided_and_batched_input(kernel: torch.device) -> None:
    x, *rest = make(Case(12, 20, 9), kernel)
    whole = co.ops.int8_linear(x, *rest)
    batched = x.view(3, 4, 20)
    assert torch.equal(co.ops.int8_linear(batched, *rest), whole.view(3, 4, 9))
    assert torch.equal(co.ops.int8_linear(x.t().contiguous().t(), *rest), whole)
    assert torch.equal(co.ops.int8_linear(x[::2], *rest), whole[::2])
    wide = torch.randn(12, 40, device=kernel)
    wide[:, ::2] = x
    assert torch.equal(co.ops.int8_linear(wide[:, ::2], *rest), whole)
    assert torch.equal(co.ops.int8_linear(x[0], *rest), whole[0])


@ALL_KERNELS
def test_quantization_rounds_half_to_even_and_keeps_the_range(kernel: torch.device) -> None:
    # max|x| = 127, so that x is its own code: 0.5 → 0, 1.5 → 2, 2.5 → 2, −0.5 → 0, −2.5 → −2.
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -2.5, -127.0, 126.4]], device=kernel)
    identity = torch.eye(8, device=kernel).to(torch.int8)
    packed, sums = co.ops.int8_linear_pack(identity)
    y = co.ops.int8_linear(x, packed, torch.ones(8, device=kernel), sums)
    assert y.tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -127.0, 126.0]]


@ALL_KERNELS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 19])
def test_nan_and_inf_spoil_their_row_alone(kernel: torch.device, bad: float, column: int) -> None:
    x, *rest = make(Case(3, 20, 5), kernel)
    sound = co.ops.int8_linear(x, *rest)
    x[1, column] = bad
    y = co.ops.int8_linear(x, *rest)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], sound[[0, 2]])


@ALL_KERNELS
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-30, 1e37])
def test_extreme_magnitudes(kernel: torch.device, magnitude: float) -> None:
    x, weight, scales, sums, _, _ = make(Case(2, 20, 5), kernel)
    x = x / x.abs().amax(-1, keepdim=True) * magnitude
    # Results of ordinary size show wrong codes that results near zero would hide.
    for gain in (1.0, 1e30) if magnitude < 1e-20 else (1.0,):
        args = (x, weight, scales * gain, sums)
        assert_matches(co.ops.int8_linear(*args), (*args, None, "none"))


@given(st.integers(1, 9), st.integers(0, 70), st.integers(0, 70), st.integers(0, 2**32))
def test_random_shapes(m: int, k: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    args = make(Case(m, k, n), torch.device("cpu"), pack=bool(seed % 2))
    assert_matches(co.ops.int8_linear(*args), args)


def test_pack_round_trip() -> None:
    for n, k in ((0, 0), (1, 1), (16, 4), (17, 5), (33, 63)):
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        packed, sums = co.ops.int8_linear_pack(weight)
        assert torch.equal(_unpack(packed, n, k), weight)
        assert torch.equal(sums, weight.sum(1, dtype=torch.int32))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_gradient_is_that_of_the_dequantized_layer(activation: str) -> None:
    x, weight, scales, sums, bias, _ = make(Case(5, 24, 11), torch.device("cpu"), pack=True)
    x.requires_grad_()
    bias.requires_grad_()
    grad = torch.randn(5, 11)
    y = co.ops.int8_linear(x, weight, scales, sums, bias, activation)
    actual = torch.autograd.grad(y, (x, bias), grad)

    dense = (_unpack(weight, 11, 24).double() * scales.double()[:, None]).requires_grad_()
    # The activation's slope is taken at the quantized layer's own value.
    before = co.ops.int8_linear(x, weight, scales, sums, bias).double().detach()
    slope = {"none": lambda v: v, "relu": torch.relu, "gelu": F.gelu}[activation]
    point = before.requires_grad_()
    (inner,) = torch.autograd.grad(slope(point), point, grad.double())
    assert torch.allclose(actual[0].double(), inner @ dense, atol=1e-5)
    assert torch.allclose(actual[1].double(), inner.sum(0), atol=1e-5)


@ALL_KERNELS
def test_opcheck(kernel: torch.device) -> None:
    for pack in (False, True):
        x, *rest = make(Case(4, 20, 9, activation="gelu"), kernel, pack)
        args = (x.requires_grad_(), *rest)
        torch.library.opcheck(torch.ops.compressops.int8_linear.default, args)
    if kernel.type == "cpu":
        no_grad = (x.detach(), *rest)
        torch.library.opcheck(
            torch.ops.compressops_native.int8_linear.default,
            no_grad,
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    x, *rest = make(Case(4, 20, 9), torch.device("cpu"), pack=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return co.ops.int8_linear(x * 2, *rest) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled(x[:3]), layer(x[:3]))


BAD = {
    "x": [torch.randn(3, 8).double(), torch.tensor(1.0), torch.randn(2, 7), torch.randn(0, 131073)],
    "weight": [torch.zeros(5, 8), torch.zeros(5, 9, dtype=torch.int8), torch.zeros(2, 2, 16, 4)],
    "weight_scales": [torch.ones(4), torch.ones(5).double(), torch.ones(5, 1)],
    "weight_sums": [torch.zeros(4, dtype=torch.int32), torch.zeros(5)],
    "bias": [torch.zeros(4), torch.zeros(5, dtype=torch.int64)],
    "activation": ["swish", ""],
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("native", [False, True], ids=["public", "native"])
def test_bad_arguments_are_named_with_their_value(name: str, native: bool) -> None:
    good = dict(
        zip(
            ("x", "weight", "weight_scales", "weight_sums", "bias", "activation"),
            make(Case(3, 8, 5), torch.device("cpu")),
            strict=True,
        )
    )
    op = torch.ops.compressops_native.int8_linear if native else co.ops.int8_linear
    for bad in BAD[name]:
        with pytest.raises(ValueError, match="int8_linear: argument '") as error:
            op(**{**good, name: bad})
        assert "got" in str(error.value)
    x, *rest = make(Case(0, 0, 5), torch.device("cpu"))
    if co.backends.name("int8_linear", "cpu") == "cpu":
        with pytest.raises(ValueError, match=r"argument 'x'.*2\^63 elements"):
            co.ops.int8_linear(x.new_empty(2**62, 0), *rest)
    with pytest.raises(ValueError, match="int8_linear_pack: argument 'weight'"):
        co.ops.int8_linear_pack(torch.zeros(3, 4))
