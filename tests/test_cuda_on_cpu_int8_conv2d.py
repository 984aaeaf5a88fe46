"""The CUDA kernels of int8_conv2d, run on a CPU: bit for bit the results of the op's reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_on_cpu import harness
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_on_cpu import assert_same
from test_int8_conv2d import HOW, Case
from test_int8_conv2d import make as arguments

from compressops import backend
from compressops.ops import int8_conv2d
from compressops.ops.int8_conv2d import block_of, pack_as

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="needs a C++20 compiler")
CPU = torch.device("cpu")
ORDERS = tuple(harness.ORDERS)


@pytest.fixture(scope="module")
def library():
    return harness.build("int8_conv2d")


def packed_for_gpus(weight: torch.Tensor, groups: int, form: tuple[int, int] | None = None):
    form = form or block_of(*weight.shape[:2], groups, cpu=False)
    return pack_as(weight, groups, *form)


def check(library, args: tuple, form: tuple[int, int] | None = None, **how) -> torch.Tensor:
    x, weight, scales, sums, bias, *geometry, activation = args[:10]
    packed = packed_for_gpus(weight, geometry[3], form)
    y = harness.int8_conv2d(library, x, weight, packed, *args[2:], **how)
    with backend("eager"):
        expected = int8_conv2d(x, weight, scales, sums, bias, *geometry, activation, *args[10:])
    assert_same(y, expected, activation)
    return y


CASES = [
    Case(n=0),
    Case(n=1, c=1, h=1, w=1, k=1, kernel=(1, 1), padding=(0, 0)),
    *(Case(n=3, c=c, k=17, kernel=(1, 1), padding=(0, 0)) for c in (15, 16, 17, 64, 80)),
    *(Case(n=1, c=20, h=5, k=k) for k in (1, 63, 64, 65, 131)),
    *(Case(n=1, c=3, h=h, w=w) for h, w in ((1, 1), (8, 8), (5, 13), (13, 5))),
    Case(c=3, h=19, w=17, k=20, kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    Case(kernel=(1, 4), padding=(0, 2)),
    Case(c=34, kernel=(5, 2), stride=(3, 1), padding=(1, 0)),
    Case(c=50, stride=(2, 3), dilation=(2, 1)),
    Case(dilation=(1, 2), padding=(0, 3)),
    # windows that lie in the padding altogether
    Case(padding=(4, 5)),
    Case(n=1, h=2, w=3, padding=(9, 0), dilation=(3, 1), stride=(4, 1)),
    # groups that make a matrix, that do not, and of one channel
    Case(c=40, k=36, groups=2, dilation=(2, 2)),
    Case(n=1, c=96, k=140, h=4, groups=2, kernel=(3, 1)),
    Case(c=6, k=4, groups=2),
    Case(c=12, k=6, groups=3, kernel=(1, 1), padding=(0, 0)),
    Case(c=20, k=76, groups=4, stride=(2, 1)),
    Case(c=5, k=15, groups=5),
    Case(c=6, k=3, groups=3),
    *(Case(c=c, k=c, groups=c) for c in (2, 16, 21, 67)),
    Case(c=67, k=67, groups=67, stride=(2, 2), kernel=(5, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(library, case):
    """Both memory formats, of x and of y; every other time the weight is packed by the kernel."""
    for i, (x_last, y_last) in enumerate(itertools.product((False, True), repeat=2)):
        args = arguments(case, CPU, channels_last=x_last)
        order = ORDERS[(i + case.c + case.k) % len(ORDERS)]
        check(library, args, y_last=y_last, pack=bool(i % 2), order=order, max_blocks=5)


@pytest.mark.parametrize("kernel", ["tile64", "tile128"])
@pytest.mark.parametrize(
    "case",
    [
        Case(n=1, c=3, h=4, w=4),  # a step holds several taps
        Case(n=3, c=70, h=7, w=9, k=140, kernel=(2, 3)),  # more than a tile, and than its stages
        Case(n=1, c=33, h=25, w=24, k=5, kernel=(1, 1)),  # more than one group of tile rows
        Case(n=2, c=34, h=6, k=20, groups=2, padding=(1, 2)),
    ],
    ids=str,
)
def test_each_tile(library, case, kernel):
    check(library, arguments(case, CPU), kernel=kernel, order="random")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", [1, 4, 32])
def test_every_order(library, groups, order):
    case = Case(n=2, c=32, h=5, w=6, k=32, groups=groups, bias=False)
    check(library, arguments(case, CPU), order=order, y_last=order == "random")


@pytest.mark.parametrize("form", [(1, 16), (16, 4)])
def test_each_form_on_any_groups(library, form):
    for c, k, groups in ((5, 9, 1), (34, 40, 2), (6, 6, 6)):
        if (c // groups, k // groups) != (1, 1):
            check(library, arguments(Case(c=c, k=k, groups=groups), CPU), form)


@pytest.mark.parametrize("groups", [1, 3, 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_activations(library, dtype, groups):
    for activation, last in itertools.product(("none", "relu", "gelu"), (False, True)):
        case = Case(c=18, k=18, groups=groups, dtype=dtype, activation=activation)
        check(library, arguments(case, CPU, channels_last=last), y_last=last)


@pytest.mark.parametrize("how", HOW, ids=["asymmetric", "static", "zero"])
@pytest.mark.parametrize("groups", [1, 3, 18])
def test_other_quantizations(library, how, groups):
    for padding, shift in (((1, 1), 0.0), ((5, 5), 5.0), ((0, 2), -5.0)):
        for last in (False, True):
            case = Case(c=18, k=18, groups=groups, padding=padding, dtype=torch.float32)
            x, *rest = arguments(case, CPU, channels_last=last)
            for values in (x + shift, (x + shift) * 1e30, x * 1e-40, x * 0):
                check(library, (values, *rest, *how))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("how", [(), *HOW], ids=["symmetric", "asymmetric", "static", "zero"])
def test_nan_and_inf_spoil_their_image_alone(library, bad, how):
    for at, groups in itertools.product(((1, 0, 0, 0), (1, 5, 8, 7)), (1, 3)):
        x, *rest = arguments(Case(n=3, c=6, k=6, groups=groups, activation="relu"), CPU)
        x[at] = bad
        y = check(library, (x, *rest, *how))
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


def test_ranges_of_many_parts(library):
    """Every part of a large image counts, wherever its largest value is."""
    case = Case(n=2, c=2, h=129, w=160, k=1, kernel=(1, 1), stride=(64, 64), padding=(0, 0))
    for at in ((0, 0, 0, 0), (1, 1, 128, 159), (0, 1, 3, 64)):
        x, *rest = arguments(case, CPU)
        x[at] = 100.0
        check(library, (x, *rest, None, None, False), max_blocks=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_misaligned_and_repeated_images(library, dtype):
    case = Case(n=1, c=16, h=3, w=4, dtype=dtype)
    x, *rest = arguments(case, CPU, channels_last=True)
    moved = torch.empty(x.numel() + 3, dtype=dtype)[3:].as_strided(x.shape, x.stride()).copy_(x)
    assert torch.equal(check(library, (moved, *rest)), check(library, (x, *rest)))
    check(library, (x.expand(3, -1, -1, -1), *rest))


def test_extreme_sums_are_exact(library):
    for groups, c, taps in ((1, 4096, 8), (2, 2, 300), (18, 1, 300)):
        x = torch.full((1, c * groups, 4, taps), 127.0)
        weight = torch.full((18, c, 4, taps), -127, dtype=torch.int8)
        sums = weight.sum((1, 2, 3), dtype=torch.int32)
        geometry = ((1, 1), (0, 0), (1, 1), groups, "none")
        check(library, (x, weight, torch.ones(18), sums, None, *geometry))


@given(
    *(st.integers(1, 20) for _ in range(2)),
    *(st.integers(1, 9) for _ in range(2)),
    *(st.tuples(st.integers(1, 3), st.integers(1, 3)) for _ in range(3)),
    *(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.integers(1, 4), st.integers(0, 2**32)),
)
@settings(max_examples=25)
def test_random_geometry(library, c, k, h, w, taps, stride, dilation, padding, groups, seed):
    for i, size in enumerate((h, w)):
        if size + 2 * padding[i] < dilation[i] * (taps[i] - 1) + 1:
            return
    torch.manual_seed(seed)
    case = Case(2, c * groups, h, w, k * groups, taps, stride, padding, dilation, groups)
    args = arguments(case, CPU, channels_last=bool(seed & 1))
    check(library, args, y_last=bool(seed & 2), pack=bool(seed & 4))


def test_choice_of_tile(library):
    names = {number: name for name, number in harness.INT8_CONV2D_KERNELS.items()}

    def choose(n: int, c: int, k: int, size: int, groups: int = 1) -> str:
        case = Case(n=n, c=c, h=size, w=size, k=k, groups=groups)
        x, weight = (torch.empty(s, device="meta") for s in ((n, c, size, size), (k, c, 3, 3)))
        packed = packed_for_gpus(weight[:, : c // groups], groups)
        sizes = harness.int8_conv2d_sizes(x, packed, k, *case.options)
        return names[library.choose_int8_conv2d_kernel(sizes, harness.c_int64(132))]

    assert choose(32, 64, 64, 56) == "tile64"
    assert choose(32, 128, 128, 28) == "tile128"
    assert choose(1, 512, 512, 14) == "tile64"
    assert choose(32, 256, 256, 14, groups=4) == "tile64"
