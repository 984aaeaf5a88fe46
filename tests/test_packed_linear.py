"""int4_linear and ternary_linear: every backend against exact integer sums and a float64 rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import kernel_params, serving
from hypothesis import given
from hypothesis import strategies as st

import compressops as co
from compressops import backends
from compressops.ops import packed_linear
from compressops.ops.int8_linear import quantize_rows

# What overflows in a row of tiny values or of infinities is meant to; Triton's interpreter tells.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)
KERNELS = [
    pytest.param((op, *param.values[0]), id=f"{op}-{param.id}", marks=param.marks)
    for op in ("int4_linear", "ternary_linear")
    for param in kernel_params(op)
]
OF_INT4 = pytest.mark.parametrize(
    "kernel", [k for k in KERNELS if k.values[0][0] == "int4_linear"], indirect=True
)


@dataclass(frozen=True)
class Case:
    m: int
    k: int
    n: int
    group: int | None = None
    zeros: bool = False
    dtype: torch.dtype = torch.float32
    bias: bool = True
    activation: str = "none"
    quantize_x: bool = True


@dataclass(frozen=True)
class Layer:
    """A weight as integers, and what its op takes of it."""

    op: str
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group: int | None
    quantize_x: bool = True

    def args(self) -> tuple:
        n = len(self.codes)
        if self.op == "ternary_linear":
            weight, scales = co.ops.ternary_linear_pack(self.codes, self.scales, self.group)
            return weight, scales, n, self.group
        packed = co.ops.int4_linear_pack(self.codes, self.scales, self.zeros, self.group)
        return (*packed, n, self.group)

    def __call__(self, x, bias=None, activation="none") -> torch.Tensor:
        options = {} if self.quantize_x else {"quantize_x": False}
        return getattr(co.ops, self.op)(x, *self.args(), bias, activation, **options)

    def dense(self) -> torch.Tensor:
        """In float64."""
        k = self.codes.shape[1]
        size = min(self.group or k, k) or 1
        codes = self.codes.double()
        if self.zeros is not None:
            codes = codes - self.zeros.double().repeat_interleave(size, 1)[:, :k]
        return codes * self.scales.double().repeat_interleave(size, 1)[:, :k]


def make(op: str, case: Case, device: str = "cpu"):
    low, high = (-1, 2) if op == "ternary_linear" else (-8, 8)
    groups = -(-case.k // (case.group or max(1, case.k)))
    codes = torch.randint(low, high, (case.n, case.k), dtype=torch.int8, device=device)
    scales = torch.rand(case.n, groups, device=device) / 8 + 1e-3
    zeros = None
    if case.zeros and op == "int4_linear":
        zeros = torch.randint(-8, 8, (case.n, groups), dtype=torch.int8, device=device)
    x = torch.randn(case.m, case.k, device=device).to(case.dtype)
    bias = torch.randn(case.n, device=device) if case.bias else None
    return Layer(op, codes, scales, zeros, case.group, case.quantize_x), (x, bias, case.activation)


def assert_matches(actual: torch.Tensor, layer: Layer, x, bias, activation) -> None:
    """Rounding alone may differ: of sums in float32, the last one to the dtype and, where x is not
    quantized, of the weight to it."""
    eps, bits = torch.finfo(x.dtype).eps, 2**-22
    q, x_scales = quantize_rows(x) if layer.quantize_x else (x, x.new_ones(()))
    weight = layer.dense()
    y = (q.double() @ weight.t()) * x_scales.double()
    size = (q.double().abs() @ weight.abs().t()) * x_scales.double() + 1e-30
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    exact = {"none": lambda v: v, "relu": torch.relu, "gelu": F.gelu}[activation](y)
    assert actual.dtype == x.dtype
    assert actual.shape == exact.shape
    if actual.numel():
        if not layer.quantize_x:  # every product is rounded, and every sum
            bits = bits * max(1, x.shape[-1]) ** 0.5 + (eps / 2 if eps > 2**-22 else 0)
        # The last rounding is relative to the value, those before to the terms.
        allowed = eps / 2 * exact.abs() + bits * size
        assert ((actual.double() - exact).abs() <= allowed).all()


# Every number of rows and of panels that the CPU's kernels treat in another way.
ROWS_AND_PANELS = [
    *(Case(m, 129, 67, 32) for m in (2, 3, 4, 5, 12, 13)),
    *(Case(9, 40, n, 16, zeros=True) for n in (16, 31, 32, 33, 48, 63, 64)),
]
CASES = [
    *ROWS_AND_PANELS,
    *(Case(m, k, n) for m in (0, 1, 5) for k in (0, 1, 7, 64) for n in (0, 1, 17)),
    *(Case(m, 129, 67, 32) for m in (1, 25)),
    *(Case(9, 40, n, 16, zeros=True) for n in (15, 65)),
    *(Case(m, k, 20, 32, zeros=True) for m in (2, 9) for k in (8, 15, 16, 17, 31, 33, 200)),
    *(Case(m, 256, 40, group, zeros=True) for m in (1, 6) for group in (64, 128, 512, 2**62)),
    *(Case(3, 40, 24, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)),
    *(Case(m, 40, 24, activation=name) for m in (1, 7) for name in ("relu", "gelu")),
    Case(3, 40, 24, 16, bias=False),
    # Groups that a tile's depth does not divide, and such of several tiles.
    *(Case(m, 300, 20, group, zeros=True) for m in (3, 20) for group in (48, 80, 144, 256)),
]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
AS_THEY_ARE = [
    *(Case(m, k, n, quantize_x=False) for m in (0, 1, 5) for k in (0, 1, 64) for n in (0, 17)),
    *(
        Case(m, 131, 20, group, zeros=True, dtype=dtype, quantize_x=False)
        for m, group in ((1, 32), (9, 16), (20, 48), (70, 128), (2, None))
        for dtype in FLOATS
    ),
    *(
        Case(3, 40, 24, 16, dtype=dtype, activation=name, quantize_x=False)
        for dtype, name in zip(FLOATS, ("relu", "gelu", "none"), strict=True)
    ),
    Case(3, 40, 24, 16, bias=False, quantize_x=False),
    Case(130, 1031, 259, 128, zeros=True, dtype=torch.bfloat16, quantize_x=False),
]
LARGE = [Case(130, 1031, 259, 128, zeros=True), Case(1, 131072, 3), Case(6, 131072, 3, 128)]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[tuple[str, torch.device]]:
    """The op and the device of its tensors; one of its kernels serves."""
    op, *served = request.param
    with serving(*served) as device:
        yield op, device


def interpreted(op: str, device: torch.device) -> bool:
    """Triton's interpreter takes its time."""
    return backends.name(op, device.type) == "triton" and device.type == "cpu"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(kernel, case: Case) -> None:
    if case in ROWS_AND_PANELS and interpreted(*kernel):
        pytest.skip("nothing of its own to Triton")
    layer, args = make(kernel[0], case, kernel[1])
    assert_matches(layer(*args), layer, *args)


@OF_INT4
@pytest.mark.parametrize("case", AS_THEY_ARE, ids=str)
def test_matches_float64_on_activations_as_they_are(kernel, case: Case) -> None:
    layer, args = make(kernel[0], case, kernel[1])
    assert_matches(layer(*args), layer, *args)


@OF_INT4
def test_small_scales_are_not_lost_in_float16(kernel) -> None:
    case = Case(2, 64, 17, 32, dtype=torch.float16, bias=False, quantize_x=False)
    layer, (x, _, _) = make(kernel[0], case, kernel[1])
    small = replace(layer, scales=layer.scales * 2.0**-17)
    assert_matches(small(x * 256), small, x * 256, None, "none")


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_matches_float64_on_large_shapes(kernel, case: Case) -> None:
    if interpreted(*kernel):
        case = replace(case, k=min(case.k, 4099))
    layer, args = make(kernel[0], case, kernel[1])
    assert_matches(layer(*args), layer, *args)


@pytest.mark.parametrize("m", [1, 4, 9])
@pytest.mark.parametrize("k", [4099, 131072])
def test_extreme_sums_are_exact(kernel, m: int, k: int) -> None:
    """The largest codes there are, each against the largest activation."""
    op, device = kernel
    if interpreted(op, device) and k > 4099:
        pytest.skip("takes seconds in the interpreter")
    codes = torch.full((18, k), 1 if op == "ternary_linear" else 7, dtype=torch.int8, device=device)
    codes[9:] = -1 if op == "ternary_linear" else -8
    layer = Layer(op, codes, torch.ones(18, 1, device=device), None, None)
    expected = codes[:, 0].double() * 127 * k
    for sign in (1, -1):
        y = layer(torch.full((m, k), 127.0 * sign, device=device))
        assert torch.equal(y, (sign * expected).float().expand(m, -1))


@pytest.mark.parametrize("quantize_x", [True, False], ids=["int8", "float"])
def test_strided_and_batched_input(kernel, quantize_x: bool) -> None:
    case = Case(12, 40, 9, 16, zeros=True, quantize_x=quantize_x or kernel[0] == "ternary_linear")
    layer, (x, bias, _) = make(kernel[0], case, kernel[1])
    whole = layer(x, bias)
    assert torch.equal(layer(x.view(3, 4, 40), bias), whole.view(3, 4, 9))
    assert torch.equal(layer(x.t().contiguous().t(), bias), whole)
    assert torch.equal(layer(x[::2], bias), whole[::2])
    wide = torch.randn(12, 80, device=kernel[1])
    wide[:, ::2] = x
    assert torch.equal(layer(wide[:, ::2], bias), whole)
    assert torch.equal(layer(x[0], bias), whole[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 39])
@pytest.mark.parametrize("quantize_x", [True, False], ids=["int8", "float"])
def test_nan_and_inf_spoil_their_row_alone(
    kernel, bad: float, column: int, quantize_x: bool
) -> None:
    case = Case(3, 40, 5, quantize_x=quantize_x or kernel[0] == "ternary_linear")
    layer, (x, bias, _) = make(kernel[0], case, kernel[1])
    sound = layer(x, bias)
    x[1, column] = bad
    y = layer(x, bias)
    assert (y[1].isnan() if case.quantize_x else ~y[1].isfinite()).all()
    assert torch.equal(y[[0, 2]], sound[[0, 2]])


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-30, 1e37])
def test_extreme_magnitudes(kernel, magnitude: float) -> None:
    layer, (x, _, _) = make(kernel[0], Case(2, 40, 5), kernel[1])
    x = x / x.abs().amax(-1, keepdim=True) * magnitude
    assert_matches(layer(x), layer, x, None, "none")


@given(
    st.sampled_from(["int4_linear", "ternary_linear"]),
    *(st.integers(0, most) for most in (9, 200, 70)),
    st.sampled_from([None, 16, 48, 128]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_random_shapes(op, m, k, n, group, zeros, seed) -> None:
    torch.manual_seed(seed)
    layer, args = make(op, Case(m, k, n, group, zeros))
    assert_matches(layer(*args), layer, *args)


@pytest.mark.parametrize("op", ["int4_linear", "ternary_linear"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pack_round_trip(op: str, device: str) -> None:
    codes = packed_linear.Codes(op, 4, 8) if op == "int4_linear" else packed_linear.Codes(op, 2, 1)
    for n, k in ((0, 0), (0, 3), (3, 0), (1, 1), (16, 8), (17, 5), (33, 63), (64, 16), (49, 100)):
        values = torch.randint(0, 2**codes.bits - (codes.bits == 2), (n, k), dtype=torch.uint8)
        weight = (
            codes.pack(values.view(torch.int8) - codes.zero)
            if device == "cpu"
            else codes.pack_fragments(values)
        )
        assert weight.shape == codes.packed_shape(n, k, torch.device(device))
        assert torch.equal(codes.unpack(weight, n, k), values)


@pytest.mark.parametrize("op", ["int4_linear", "ternary_linear"])
def test_fragments_are_those_that_are_documented(op: str) -> None:
    codes = packed_linear.Codes(op, 4, 8) if op == "int4_linear" else packed_linear.Codes(op, 2, 1)
    values = torch.randint(0, 2**codes.bits, (70, 200), dtype=torch.uint8)
    weight = codes.pack_fragments(values)
    outputs, lane_bytes = (2, 8) if codes.bits == 4 else (4, 4)
    for n in range(70):
        for k in range(200):
            lane, block, i = 4 * (n % 8) + k % 16 // 4, k % 64 // 16, k % 4
            per_word = 8 // codes.bits
            at = lane_bytes * (n // 8 % outputs) + 4 * (block // per_word) + i
            byte = int(weight[n // (8 * outputs), k // 64, 16 * lane + at])
            shift = codes.bits * (block % per_word)
            assert byte >> shift & (2**codes.bits - 1) == values[n, k]


@pytest.mark.parametrize("op", ["int4_linear", "ternary_linear"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("quantize_x", [True, False], ids=["int8", "float"])
def test_gradient_is_that_of_the_dequantized_layer(
    op: str, activation: str, quantize_x: bool
) -> None:
    case = Case(5, 48, 11, 16, zeros=True, quantize_x=quantize_x or op == "ternary_linear")
    layer, (x, bias, _) = make(op, case)
    x.requires_grad_()
    bias.requires_grad_()
    grad = torch.randn(5, 11)
    actual = torch.autograd.grad(layer(x, bias, activation), (x, bias), grad)
    # The activation's slope is taken at the quantized layer's own value.
    point = layer(x, bias).double().detach().requires_grad_()
    slope = {"none": lambda v: v, "relu": torch.relu, "gelu": F.gelu}[activation]
    (inner,) = torch.autograd.grad(slope(point), point, grad.double())
    assert torch.allclose(actual[0].double(), inner @ layer.dense(), atol=1e-5)
    assert torch.allclose(actual[1].double(), inner.sum(0), atol=1e-5)


def test_opcheck(kernel) -> None:
    op, device = kernel
    layer, (x, bias, _) = make(op, Case(4, 40, 9, 16, zeros=True), device)
    args = (x.requires_grad_(), *layer.args(), bias, "gelu")
    for options in ({}, {"quantize_x": False})[: 1 if op == "ternary_linear" else 2]:
        getattr(co.ops, op)(*args, **options)
        torch.library.opcheck(getattr(torch.ops.compressops, op).default, args, options)


@pytest.mark.parametrize("op", ["int4_linear", "ternary_linear"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(op: str, dynamic: bool) -> None:
    layer, (x, bias, _) = make(op, Case(4, 40, 9, 16, zeros=True))
    packed_args = layer.args()

    def run(x: torch.Tensor) -> torch.Tensor:
        return getattr(co.ops, op)(x * 2, *packed_args, bias) + 1

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(compiled(x), run(x))
    assert torch.equal(compiled(x[:3]), run(x[:3]))


BAD = {
    "x": [torch.randn(3, 40).double(), torch.tensor(1.0), torch.randn(0, 131073)],
    "weight": [torch.zeros(5, 20), torch.zeros(7, dtype=torch.uint8)],
    "scales": [torch.ones(4), torch.ones(48).double(), torch.ones(5, 3)],
    "zeros": [torch.zeros(48), torch.zeros(5, 3, dtype=torch.uint8)],
    "out_features": [-1, 17, 2**62],
    "group_size": [0, -16, 8, 24],
    "bias": [torch.zeros(4), torch.zeros(5, dtype=torch.int64)],
    "activation": ["swish", ""],
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("op", ["int4_linear", "ternary_linear"])
@pytest.mark.parametrize("native", [False, True], ids=["public", "native"])
def test_bad_arguments_are_named_with_their_value(op: str, name: str, native: bool) -> None:
    layer, (x, bias, _) = make(op, Case(3, 40, 5, 16, zeros=True))
    names = ["weight", "scales", "zeros", "out_features", "group_size"]
    if op == "ternary_linear":
        names.remove("zeros")
        if name == "zeros":
            pytest.skip("ternary_linear has none")
    good = {"x": x, **dict(zip(names, layer.args(), strict=True)), "bias": bias}
    call = getattr(torch.ops.compressops_native, op) if native else getattr(co.ops, op)
    for bad in BAD[name]:
        with pytest.raises(ValueError, match=f"{op}: argument '") as error:
            call(**{**good, name: bad})
        assert "got" in str(error.value)


@pytest.mark.parametrize("op", ["int4_linear", "ternary_linear"])
def test_bad_weights_are_refused_by_pack(op: str) -> None:
    pack = getattr(co.ops, f"{op}_pack")
    codes, scales = torch.zeros(3, 40, dtype=torch.int8), torch.ones(3, 1)
    for name, args in {
        "codes": (codes.float(), scales),
        "scales": (codes, torch.ones(3, 2)),
        "group_size": (codes, scales, None, 20)[: 2 if op == "ternary_linear" else 3],
    }.items():
        keyword = {"group_size": 20} if name == "group_size" else {}
        with pytest.raises(ValueError, match=f"{op}_pack: argument '{name}'"):
            pack(*args, **keyword)
    with pytest.raises(ValueError, match="got 8 to 8"):
        pack(codes + 8, scales)
