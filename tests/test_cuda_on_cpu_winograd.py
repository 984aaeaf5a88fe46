"""The CUDA kernels of winograd_conv2d, run on a CPU: results, bounds, races."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import harness
from winograd_bounds import BOUNDS

from compressops.ops.winograd_domain import transform_weight
from compressops.ops.winograd_transform import SUPPORTED

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="needs a C++20 compiler")
ORDERS = tuple(harness.ORDERS)
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(scope="module")
def library():
    return harness.build("winograd_conv2d")


@dataclass(frozen=True)
class Case:
    N: int = 1
    C: int = 5  # of a group, as K
    K: int = 7
    H: int = 9
    W: int = 11
    tile: int = 4
    r: int = 3
    flat: bool = False  # 1 × r
    padding: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: torch.dtype = FLOAT
    last: bool = False
    bias: bool = True
    activation: str = "none"
    kernel: str = "auto"
    scratch_bytes: int = 2**24

    @property
    def alpha(self) -> int:
        return self.tile + self.r - 1

    @property
    def fused(self) -> bool:
        return self.dtype != FLOAT and self.alpha ** (2 - self.flat) <= 16


def make(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x, weight and bias for outputs of about 1."""
    x = torch.randn(case.N, case.groups * case.C, case.H, case.W).to(case.dtype)
    if case.last:
        x = x.contiguous(memory_format=torch.channels_last)
    shape = (case.groups * case.K, case.C, 1 if case.flat else case.r, case.r)
    weight = torch.randn(shape) / max(1, shape[1] * shape[2] * shape[3]) ** 0.5
    return x, weight.to(case.dtype), torch.randn(shape[0]) if case.bias else None


def pack(weight: torch.Tensor, tile: int) -> torch.Tensor:
    return transform_weight(weight.double(), tile).to(weight.dtype).contiguous()


def run(library, case: Case, x, weight, bias, order: str = "forward") -> torch.Tensor:
    return harness.winograd_conv2d(
        *(library, x, weight, pack(weight, case.tile), bias, case.padding),
        *(case.groups, case.activation, case.tile),
        kernel=case.kernel,
        scratch_bytes=case.scratch_bytes,
        order=order,
    )


def check(case: Case, actual, x, weight, bias) -> None:
    if case.C * case.K == 0:  # torch's convolutions take neither for what it is
        expected = bias.double()[:, None, None].expand(actual.shape)
    else:
        expected = F.conv2d(
            *(x.double(), weight.double(), None if bias is None else bias.double()),
            padding=case.padding,
            groups=case.groups,
        )
    if case.activation == "relu":
        expected = expected.relu()
    elif case.activation == "gelu":
        expected = F.gelu(expected)
    assert actual.shape == expected.shape
    if actual.numel():
        error = (actual.double() - expected).abs().max().item()
        assert error <= BOUNDS[case.dtype][case.alpha], error


def run_and_check(library, case: Case, order: str = "forward") -> None:
    arguments = make(case)
    check(case, run(library, case, *arguments, order=order), *arguments)


ALL_DTYPES = pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT], ids=str)
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])


@ALL_DTYPES
@LAYOUTS
@pytest.mark.parametrize(("tile", "r"), SUPPORTED)
def test_every_size_of_tile_and_kernel(library, tile, r, last, dtype):
    for flat in (False, True):
        padding = (0 if flat else r // 2, r // 2)
        case = Case(2, tile=tile, r=r, flat=flat, padding=padding, last=last, dtype=dtype)
        run_and_check(library, case, ORDERS[(tile + r) % 4])


# Each height with one of the widths, rather than with all.
SIZES = [(size, (7 * size) % 19 + 1) for size in range(1, 20)]


@LAYOUTS
@pytest.mark.parametrize("tile", [2, 4, 6])
def test_every_height_and_width(library, tile, last):
    for i, (H, W) in enumerate(SIZES):
        padding = ((1, 1), (0, 2), (2, 0), (3, 3))[i % 4]
        if H + 2 * padding[0] < 3 or W + 2 * padding[1] < 3:
            continue
        dtype = (FLOAT, HALF)[(i + last) % 2]
        case = Case(1 + i % 2, 3, 4, H, W, tile=tile, padding=padding, last=last, dtype=dtype)
        run_and_check(library, case, ORDERS[i % 4])


# (C, K, tile, kernel)
CHANNELS = [
    *((C, K, 2, "auto") for C, K in ((1, 1), (8, 8), (15, 33), (33, 15), (66, 2))),
    *((C, K, 2, "shallow") for C, K in ((1, 1), (15, 33), (66, 2))),
    *((C, K, 4, "small") for C, K in ((1, 9), (8, 16), (9, 65), (65, 7), (129, 2))),
    *((C, K, 4, "large") for C, K in ((3, 1), (70, 130))),
]


@ALL_DTYPES
@LAYOUTS
def test_channels(library, last, dtype):
    for i, (C, K, tile, kernel) in enumerate(CHANNELS):
        if kernel == "shallow" and dtype == FLOAT:  # is never fused
            continue
        case = Case(1, C, K, 7, 10, tile, last=last, dtype=dtype, kernel=kernel, bias=i % 2 == 0)
        run_and_check(library, case, ORDERS[i % 4])


@ALL_DTYPES
@LAYOUTS
@pytest.mark.parametrize(("tile", "flat"), [(2, False), (4, False), (4, True)])
def test_groups_and_chunks(library, tile, flat, last, dtype):
    # 1 byte of scratch: a chunk of 128 tiles and one group.
    cases = (
        (2, 6, 5, 85, 1, (1, 1), "auto"),
        (3, 8, 16, 9, 2**24, (9, 8), "auto"),
        (5, 1, 1, 7, 2**18, (1, 1), "auto"),
        (2, 6, 70, 45, 1, (1, 1), "large"),
    )
    for groups, C, K, W, scratch_bytes, padding, kernel in cases:
        case = Case(
            *(3, C, K, 13, W, tile, 3, flat, padding, groups, dtype, last),
            scratch_bytes=scratch_bytes,
        )
        run_and_check(library, replace(case, kernel="auto" if case.fused else kernel))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_in_every_order(library, dtype, order):
    cases = [(2, "auto", True), (4, "small", False), (6, "small", True)]
    cases += [(2, "shallow", False)] if dtype == HALF else []
    for tile, kernel, last in cases:
        case = Case(1, 70, 40, 9, 9, tile, last=last, dtype=dtype, kernel=kernel)
        run_and_check(library, case, order)


@ALL_DTYPES
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activations(library, activation, dtype):
    for tile, last, bias in itertools.product((2, 4), (False, True), (False, True)):
        case = Case(tile=tile, last=last, bias=bias, activation=activation, dtype=dtype, K=6, W=12)
        run_and_check(library, case)


def views(x: torch.Tensor) -> list[torch.Tensor]:
    """``x`` with other strides and other alignments."""
    N, C, H, W = x.shape
    every = torch.zeros(N, C + 2, H, 2 * W, dtype=x.dtype)
    every[:, 1 : C + 1, :, ::2] = x
    inner = torch.zeros(N, H + 1, W + 3, C + 4, dtype=x.dtype)
    inner[:, 1:, 2 : W + 2, 3 : C + 3] = x.permute(0, 2, 3, 1)
    even = torch.zeros(N, H, W, C + 4, dtype=x.dtype)
    even[..., 2 : C + 2] = x.permute(0, 2, 3, 1)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return [
        every[:, 1 : C + 1, :, ::2],
        inner[:, 1:, 2 : W + 2, 3 : C + 3].permute(0, 3, 1, 2),
        even[..., 2 : C + 2].permute(0, 3, 1, 2),
        shifted,
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        x[:, :1].expand(N, C, H, W),
    ]


@ALL_DTYPES
@pytest.mark.parametrize("tile", [2, 4])
def test_strides_and_alignment(library, tile, dtype):
    case = Case(2, 8, 8, 6, 9, tile, dtype=dtype)
    x, weight, bias = make(case)
    for view in views(x):
        check(case, run(library, case, view, weight, bias), view, weight, bias)
    moved = torch.cat([x.new_zeros(1), pack(weight, tile).flatten()])[1:].view(-1, 8, 8)
    y = harness.winograd_conv2d(library, x, weight, moved, bias, (1, 1), tile=tile)
    check(case, y, x, weight, bias)


@ALL_DTYPES
@LAYOUTS
@pytest.mark.parametrize("tile", [2, 4])
def test_of_nothing(library, tile, last, dtype):
    for N, C, K in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        case = Case(N, C, K, 5, 6, tile, dtype=dtype, last=last)
        arguments = make(case)
        check(case, run(library, case, *arguments), *arguments)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("tile", [2, 4, 6])
def test_magnitudes(library, tile, dtype):
    """Nothing overflows or vanishes on the way that would not in the result."""
    case = Case(1, 64, 8, 12, 12, tile, dtype=dtype, bias=False)
    x, weight, _ = make(case)
    plain = run(library, case, x, weight, None).double()
    sizes = (2.0**-10, 2.0**4) if dtype == HALF else (2.0**-60, 2.0**60)
    for size in sizes:
        scaled = run(library, case, x * size, weight, None).double() / size
        limit = BOUNDS[HALF][case.alpha] if dtype == HALF else 0  # its smallest lose digits
        assert (scaled - plain).abs().max() <= limit
    extreme = torch.full_like(x, 64) * x.sign()
    assert run(library, case, extreme, weight, None).isfinite().all()


# Sizes of x beyond what M in float16 holds unscaled: one bad sum must not cost the others theirs.
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(FLOAT, 1.0), (HALF, 1.0), (BFLOAT, 1.0), (BFLOAT, 2.0**40), (BFLOAT, 2.0**-40)],
    ids=str,
)
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_tiles(library, bad, tile, dtype, size):
    case = Case(2, 3, 4, 16, 16, tile, dtype=dtype, padding=(0, 0), bias=size == 1)
    x, weight, bias = make(case)
    x *= size
    sound = run(library, case, x, weight, bias)
    x[1, 2, 8, 8] = bad
    y = run(library, case, x, weight, bias)
    low, high = (8 - 2) // tile * tile, 8 // tile * tile + tile
    assert not y[1, :, 6:9, 6:9].isfinite().any()
    y[1, :, low:high, low:high] = sound[1, :, low:high, low:high]
    assert torch.equal(y, sound)


def test_plan(library):
    """What runs on an H200, and how much memory it takes."""

    def plan(N, C, K, size, tile, r=3, **options):
        x = torch.empty(N, C, size, size, device="meta")
        return harness.winograd_plan(
            library, x, torch.empty(K, C, r, r, device="meta"), (1, 1), tile=tile, **options
        )

    assert plan(8, 256, 256, 56, 2)[0] == "fused"
    assert plan(8, 256, 256, 56, 2, shared_kib=163)[0] == "fused"  # sm_80
    assert plan(8, 256, 256, 56, 2, shared_kib=99)[0] == "shallow"  # sm_86, sm_89
    assert plan(8, 256, 256, 56, 2, half=False)[0] == "large"
    kernel, tiles, groups, scratch = plan(64, 256, 256, 56, 4)
    assert (kernel, groups) == ("large", 1)
    assert tiles % 128 == 0
    assert scratch <= 51 * 2**20
    assert plan(1, 512, 512, 14, 4)[0] == "small"
    assert plan(1, 8, 8, 5, 4)[:3] == ("small", 4, 1)
    for last in (False, True):
        assert plan(64, 512, 512, 28, 4, last=last)[0] == "large"


def test_kernels_that_do_not_serve_say_so(library):
    case = Case(kernel="fused")
    with pytest.raises(harness.KernelError, match="launch failed with error 1"):
        run(library, case, *make(case))
