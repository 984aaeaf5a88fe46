"""int8_conv2d: every backend against exact integer arithmetic and a float64 epilogue."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import kernel_params
from hypothesis import given, settings
from hypothesis import strategies as st

import compressops as co
from compressops.ops.int8_conv2d import unpack
from compressops.ops.int8_linear import quantize_x

# On a processor limited to AVX-512 without VNNI, or with VBMI2, other sets' kernels run. In
# Triton's interpreter this file would take minutes: test_triton_int8_conv2d.py has fewer cases.
SAME = ("avx512", "avx512_vbmi2")
ALL_KERNELS = pytest.mark.parametrize(
    "kernel",
    [
        p
        for p in kernel_params("int8_conv2d")
        if p.values[0][2] not in SAME and p.values[0][:2] != ("cpu", "triton")
    ],
    indirect=True,
)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    n: int = 2
    c: int = 5
    h: int = 9
    w: int = 8
    k: int = 7
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: torch.dtype = torch.float32
    bias: bool = True
    activation: str = "none"

    def __str__(self) -> str:
        return repr(self).removeprefix("Case").replace(" ", "")

    @property
    def options(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups


CASES = [
    Case(),
    Case(n=0),
    Case(n=1, c=1, h=1, w=1, k=1, kernel=(1, 1), padding=(0, 0)),
    # 1 × 1: rows joined; channels and outputs on both sides of 4, 16 and 64
    *(Case(c=c, k=17, kernel=(1, 1), padding=(0, 0)) for c in (3, 4, 16, 17, 33)),
    *(Case(n=1, c=20, k=k) for k in (1, 15, 16, 31, 32, 48, 63, 64, 65, 131)),
    # pixels on both sides of blocks of 6, of vectors of 16 and of tasks of 54
    *(Case(n=1, h=h, w=w, k=19) for h, w in ((1, 1), (2, 3), (7, 7), (5, 11), (3, 33), (13, 17))),
    # more weights than a slice holds, ending within a run
    Case(n=1, c=133, h=6, w=6, k=20),
    Case(n=1, c=270, h=4, w=4, k=5, kernel=(1, 1), padding=(0, 0)),
    Case(c=3, h=23, w=21, k=16, kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    Case(kernel=(1, 4), padding=(0, 2)),
    Case(kernel=(5, 2), stride=(3, 1), padding=(1, 0)),
    Case(stride=(2, 3), dilation=(2, 1)),
    Case(dilation=(1, 2), padding=(0, 3)),
    # windows that lie in the padding altogether
    Case(padding=(4, 5)),
    Case(n=1, h=2, w=3, padding=(9, 0), dilation=(3, 1), stride=(4, 1)),
    Case(h=3, w=3, kernel=(5, 5), padding=(1, 1)),
    # groups, and groups of one channel
    Case(c=6, k=4, groups=2),
    Case(c=40, k=36, groups=2, dilation=(2, 2)),
    Case(c=12, k=6, groups=3, kernel=(1, 1), padding=(0, 0)),
    *(Case(c=c, k=c, groups=c) for c in (2, 16, 21, 67)),
    Case(c=67, k=67, groups=67, stride=(2, 2), kernel=(5, 3)),
    Case(c=5, k=15, groups=5),
    Case(c=6, k=3, groups=3),
    Case(n=7, c=64, h=16, w=16, k=8),  # not all images at once
    *(Case(dtype=dtype) for dtype in (torch.float16, torch.bfloat16)),
    Case(c=18, k=18, groups=18, dtype=torch.bfloat16, kernel=(1, 1), padding=(0, 0)),
    *(Case(activation=name) for name in ("relu", "gelu")),
    Case(bias=False, activation="relu"),
    Case(dtype=torch.float16, activation="gelu"),
]


def make(case: Case, device: torch.device, pack: bool = False, channels_last: bool = False):
    x = torch.randn(case.n, case.c, case.h, case.w, device=device).to(case.dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    shape = (case.k, case.c // case.groups, *case.kernel)
    weight = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    scales = torch.rand(case.k, device=device) / 127 + 1e-4
    bias = torch.randn(case.k, device=device) if case.bias else None
    packed, sums = co.ops.int8_conv2d_pack(weight, case.groups)
    return x, packed if pack else weight, scales, sums, bias, *case.options, case.activation


def reference(x, weight, scales, _sums, bias, stride, padding, dilation, groups, activation, *how):
    """The result before and after the activation: integer sums, exact (in float64 they are below
    2^53), and everything after them in float64."""
    q, x_scales, zeros = quantize_x(x.flatten(1), *how)
    codes = (q.cpu().long() - zeros.cpu()).view(x.shape).double()
    filters = unpack(weight, len(scales), x.shape[1] // groups).cpu().double()
    taps = filters.shape[2:]
    windows = F.unfold(codes, taps, dilation, padding, stride).unflatten(1, (groups, -1))
    total = filters.reshape(groups, len(scales) // groups, -1) @ windows
    reach = [dilation[i] * (taps[i] - 1) + 1 for i in (0, 1)]
    size = [(x.shape[2 + i] + 2 * padding[i] - reach[i]) // stride[i] + 1 for i in (0, 1)]
    total = total.reshape(len(x), len(scales), *size)
    assert total.equal(total.round())
    y = total * x_scales.cpu().double()[:, :, None, None]
    y = y * scales.cpu().double()[:, None, None]
    if bias is not None:
        y = y + bias.cpu().double()[:, None, None]
    return y, {"none": lambda v: v, "relu": torch.relu, "gelu": F.gelu}[activation](y)


def assert_matches(actual: torch.Tensor, args: tuple) -> None:
    """Rounding alone may differ: a few float32 roundings, and the last one to the dtype.

    The sums are exact, so the error is relative to each value; what cancels is the bias, and in
    gelu's tail 1 + erf, which is multiplied by the value before it.
    """
    before, expected = reference(*args)
    x, bias, activation = args[0], args[4], args[9]
    assert actual.dtype == x.dtype
    assert actual.shape == expected.shape
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    form = torch.channels_last if last else torch.contiguous_format
    assert actual.is_contiguous(memory_format=form)
    if actual.numel() == 0:
        return
    size = expected.abs() + 1e-30
    if bias is not None:
        size = size + bias.cpu().double().abs()[:, None, None]
    if activation == "gelu":
        size = size + before.abs()
    error = ((actual.cpu().double() - expected).abs() / size).max().item()
    assert error <= torch.finfo(x.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps, error


@ALL_KERNELS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_exact_sums(kernel: torch.device, case: Case) -> None:
    for pack in (False, True):
        args = make(case, kernel, pack, channels_last=not pack)
        assert_matches(co.ops.int8_conv2d(*args), args)


HOW = [
    (None, None, False),
    (torch.tensor(0.02), None, True),
    (torch.tensor(0.001), torch.tensor(-101, dtype=torch.int8), True),
]


@ALL_KERNELS
@pytest.mark.parametrize("how", HOW, ids=["asymmetric", "static", "zero"])
def test_other_quantizations(kernel: torch.device, how: tuple) -> None:
    how = tuple(v.to(kernel) if isinstance(v, torch.Tensor) else v for v in how)
    cases = (Case(c=21, k=20), Case(c=18, k=18, groups=18), Case(padding=(5, 5)))
    for case, shift in zip(cases, (0.0, 5.0, -5.0), strict=True):
        for channels_last in (False, True):
            x, *rest = make(case, kernel, True, channels_last)
            args = (x + shift, *rest, *how)
            assert_matches(co.ops.int8_conv2d(*args), args)
            args = (x * 1e30, *rest, *how)
            assert_matches(co.ops.int8_conv2d(*args), args)


@ALL_KERNELS
@pytest.mark.parametrize("groups", [1, 18])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_sums_are_exact(kernel: torch.device, groups: int, sign: float) -> None:
    c, taps = (8192, 4) if groups == 1 else (1, 300)
    x = torch.full((1, c * groups, 4, taps), sign * 127, device=kernel)
    weight = torch.full((18, c, 4, taps), -127, dtype=torch.int8, device=kernel)
    weight[9:] = 127
    packed, sums = co.ops.int8_conv2d_pack(weight, groups)
    y = co.ops.int8_conv2d(x, packed, torch.ones(18, device=kernel), sums, groups=groups)
    expected = torch.where(torch.arange(18, device=kernel) < 9, -sign, sign) * 127 * 127
    assert torch.equal(y[0, :, 0, 0], expected * (c * 4 * taps))


@ALL_KERNELS
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-30, 1e37])
def test_extreme_magnitudes(kernel: torch.device, magnitude: float) -> None:
    for symmetric in (True, False):
        for channels_last in (False, True):
            x, *rest = make(Case(n=1, bias=False), kernel, True, channels_last)
            args = (x / x.abs().max() * magnitude, *rest, None, None, symmetric)
            assert_matches(co.ops.int8_conv2d(*args), args)


@ALL_KERNELS
def test_strided_and_half_precision_input(kernel: torch.device) -> None:
    x, *rest = make(Case(n=4, c=6, k=9), kernel)
    whole = co.ops.int8_conv2d(x, *rest)
    wide = torch.randn(4, 12, 9, 16, device=kernel)
    wide[:, ::2, :, ::2] = x
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    for same in (wide[:, ::2, :, ::2], turned, x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(co.ops.int8_conv2d(same, *rest), whole)
    assert torch.equal(co.ops.int8_conv2d(x[::2], *rest), whole[::2])
    one = x[:1].expand(3, -1, -1, -1)
    assert torch.equal(co.ops.int8_conv2d(one, *rest), whole[:1].expand(3, -1, -1, -1))


@ALL_KERNELS
def test_quantization_rounds_half_to_even_and_keeps_the_range(kernel: torch.device) -> None:
    # max|x| = 127, so that x is its own code.
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -2.5, -127.0, 126.4], device=kernel)
    packed, sums = co.ops.int8_conv2d_pack(torch.ones(1, 1, 1, 1, dtype=torch.int8, device=kernel))
    x = values.view(1, 1, 2, 4)
    y = co.ops.int8_conv2d(x, packed, torch.ones(1, device=kernel), sums)
    assert y.flatten().tolist() == [127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -127.0, 126.0]


@ALL_KERNELS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_nan_and_inf_spoil_their_image_alone(
    kernel: torch.device, bad: float, activation: str
) -> None:
    how = (None, torch.tensor(0.02, device=kernel))
    for at in ((1, 0, 0, 0), (1, 4, 8, 7)):
        for scale in how:
            x, *rest = make(Case(n=3, activation=activation), kernel)
            sound = co.ops.int8_conv2d(x, *rest, scale)
            x[at] = bad
            y = co.ops.int8_conv2d(x, *rest, scale)
            assert y[1].isnan().all()
            assert torch.equal(y[[0, 2]], sound[[0, 2]])


@given(
    *(st.integers(1, 20) for _ in range(2)),
    *(st.integers(1, 12) for _ in range(2)),
    *(st.tuples(st.integers(1, 4), st.integers(1, 4)) for _ in range(3)),
    *(st.tuples(st.integers(0, 6), st.integers(0, 6)), st.integers(1, 4), st.integers(0, 2**32)),
)
@settings(max_examples=40)
def test_random_geometry(c, k, h, w, taps, stride, dilation, padding, groups, seed) -> None:
    for i, size in enumerate((h, w)):
        if size + 2 * padding[i] < dilation[i] * (taps[i] - 1) + 1:
            return
    torch.manual_seed(seed)
    case = Case(2, c * groups, h, w, k * groups, taps, stride, padding, dilation, groups)
    args = make(case, CPU, pack=bool(seed % 2), channels_last=bool(seed // 2 % 2))
    assert_matches(co.ops.int8_conv2d(*args), args)


def test_pack_round_trip() -> None:
    for k, c, groups in ((1, 1, 1), (16, 4, 1), (17, 5, 1), (34, 3, 2), (33, 1, 33), (6, 1, 3)):
        weight = torch.randint(-128, 128, (k, c, 2, 3), dtype=torch.int8)
        packed, sums = co.ops.int8_conv2d_pack(weight, groups)
        assert torch.equal(unpack(packed, k, c), weight)
        assert torch.equal(sums, weight.sum((1, 2, 3), dtype=torch.int32))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gradient_is_that_of_the_dequantized_layer(activation: str, groups: int) -> None:
    case = Case(c=6, k=6, stride=(2, 1), dilation=(1, 2), groups=groups)
    x, weight, scales, sums, bias, *options, _ = make(case, CPU, pack=True)
    x.requires_grad_()
    bias.requires_grad_()
    y = co.ops.int8_conv2d(x, weight, scales, sums, bias, *options, activation)
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, (x, bias), grad)

    dense = unpack(weight, 6, 6 // groups).double() * scales.double()[:, None, None, None]
    # The activation's slope is taken at the quantized layer's own value.
    point = co.ops.int8_conv2d(x, weight, scales, sums, bias, *options).double().detach()
    point.requires_grad_()
    slope = {"none": lambda v: v, "relu": torch.relu, "gelu": F.gelu}[activation]
    (inner,) = torch.autograd.grad(slope(point), point, grad.double())
    straight = x.detach().double().requires_grad_()
    (outer,) = torch.autograd.grad(F.conv2d(straight, dense, None, *options), straight, inner)
    assert torch.allclose(actual[0].double(), outer, atol=1e-5)
    assert torch.allclose(actual[1].double(), inner.sum((0, 2, 3)), atol=1e-5)


@ALL_KERNELS
def test_opcheck(kernel: torch.device) -> None:
    cases = (Case(activation="gelu"), Case(c=6, k=6, groups=6, dtype=torch.bfloat16))
    for case, pack in zip(cases, (False, True), strict=True):
        x, *rest = make(case, kernel, pack, channels_last=pack)
        args = (x.requires_grad_(), *rest)
        torch.library.opcheck(torch.ops.compressops.int8_conv2d.default, args)
    if kernel.type == "cpu":
        torch.library.opcheck(
            torch.ops.compressops_native.int8_conv2d.default,
            (x.detach(), *rest),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    x, *rest = make(Case(n=4), CPU, pack=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return co.ops.int8_conv2d(x * 2, *rest) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled(x[:3]), layer(x[:3]))


NAMES = (
    *("x", "weight", "weight_scales", "weight_sums", "bias"),
    *("stride", "padding", "dilation", "groups", "activation"),
)
BAD = {
    "x": [
        torch.randn(2, 5, 9, 8).double(),
        torch.randn(5, 9, 8),
        torch.randn(2, 6, 9, 8),
        torch.randn(2, 5, 0, 8),
        torch.randn(2, 0, 9, 8),
        torch.randn(2, 5, 9, 0),
        torch.randn(0, 5, 0, 0),
    ],
    "weight": [
        torch.zeros(7, 5, 3, 3),
        torch.zeros(7, 4, 3, 3, dtype=torch.int8),
        torch.zeros(7, 5, 0, 3, dtype=torch.int8),
        torch.zeros(1, 1, 3, 3, 1, 16, 4, dtype=torch.int8),
        torch.zeros(1, 3, 3, 16, 1, dtype=torch.int8),
        torch.zeros(7, 5, dtype=torch.int8),
        torch.zeros(1, 1, 1, 1, dtype=torch.int8).expand(7, 5, 300, 300),
    ],
    "weight_scales": [torch.ones(6), torch.ones(7).double(), torch.ones(7, 1), torch.ones(0)],
    "weight_sums": [torch.zeros(6, dtype=torch.int32), torch.zeros(7)],
    "bias": [torch.zeros(6), torch.zeros(7, dtype=torch.int64)],
    "stride": [[0, 1], [1], [1, 1, 1], [2**31, 1], [-1, 1]],
    "padding": [[-1, 0], [0], [2**31, 0], [2**62, 2**62]],
    "dilation": [[0, 1], [1], [2**62, 1], [8, 1]],
    "groups": [0, -1, 2, 5],
    "activation": ["swish", ""],
    "x_scale": [torch.ones(1), torch.tensor(1.0).double()],
    "x_zero": [torch.tensor(0, dtype=torch.int8)],
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("native", [False, True], ids=["public", "native"])
def test_bad_arguments_are_named_with_their_value(name: str, native: bool) -> None:
    good = dict(zip(NAMES, make(Case(), CPU), strict=True))
    op = torch.ops.compressops_native.int8_conv2d if native else co.ops.int8_conv2d
    for bad in BAD[name]:
        with pytest.raises(ValueError, match="int8_conv2d: argument '") as error:
            op(**{**good, name: bad})
        assert "got" in str(error.value)
    with pytest.raises(ValueError, match="'symmetric'"):
        op(**good, x_scale=torch.tensor(1.0), symmetric=False)
    with pytest.raises(ValueError, match="int8_conv2d_pack: argument 'weight'"):
        co.ops.int8_conv2d_pack(torch.zeros(3, 4, 1, 1))
    with pytest.raises(ValueError, match="int8_conv2d_pack: argument 'groups'"):
        co.ops.int8_conv2d_pack(good["weight"], 2)


def test_padding_beyond_reason_is_refused() -> None:
    x, packed, scales, sums, *_ = make(Case(n=1, h=1, w=1, kernel=(2, 2)), CPU, pack=True)
    far = 2**30
    with pytest.raises(ValueError, match="'padding' must be such that an image"):
        torch.ops.compressops_native.int8_conv2d(
            x, packed, scales, sums, None, [far, far], [far, far], [far, far]
        )
    # Of much padding with a near kernel little is kept.
    y = co.ops.int8_conv2d(x, packed, scales, sums, None, far, far)
    assert y.shape == (1, 7, 2, 2)
    assert y[:, :, 0].count_nonzero() == y[:, :, :, 0].count_nonzero() == 0
    assert y[:, :, 1, 1].count_nonzero() > 0
