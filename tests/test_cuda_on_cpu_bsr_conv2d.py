"""bsr_conv2d's CUDA kernels, run on a CPU: see tests/cuda_on_cpu."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cuda_on_cpu import harness
from cuda_on_cpu.bsr_conv2d import bsr_conv2d
from cuda_on_cpu.harness import KernelError, Plant
from test_bsr_conv2d import CPU, Case, assert_matches, make
from test_cuda_on_cpu_bsr import KERNELS, ORDERS, any_order

import compressops as co

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="no C++ compiler")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def library():
    return harness.build("bsr_conv2d")


# Of 16 bytes are 8 channels in 16 bits, and 4 in float32.
SIXTEEN = Case(n=2, c=16, h=6, w=5, k=34, block=(16, 16))
CASES = [
    SIXTEEN,
    Case(n=1, c=8, h=1, w=1, k=1, kernel=(1, 1), padding=(0, 0), block=(16, 8)),
    # blocks across positions of the kernel, and beyond its end
    replace(SIXTEEN, c=8, h=4),
    replace(SIXTEEN, c=24, n=1, block=(32, 32)),
    *(replace(SIXTEEN, density=density, n=1) for density in (0.0, 1.0)),
    replace(SIXTEEN, n=1, h=9, w=11, stride=(2, 3), padding=(0, 2), activation="relu"),
    replace(SIXTEEN, n=1, h=7, w=9, kernel=(2, 4), dilation=(3, 1), block=(16, 64), bias=False),
    # windows that lie outside altogether
    replace(SIXTEEN, n=1, h=2, w=3, padding=(9, 5), dilation=(3, 1), stride=(4, 3)),
    replace(SIXTEEN, n=3, h=8, w=9, k=130, kernel=(1, 1), padding=(0, 0), activation="gelu"),
]


def run(library, case: Case, **options) -> None:
    args = make(case, CPU, last=True)
    x, values, crow, col, k, kernel, bias, *rest = args
    order = ORDERS[(case.c + case.h + case.w + case.n) % len(ORDERS)]
    weight = (values, crow, col)
    options["row_order"] = any_order(crow) if options.pop("ordered", False) else None
    y = bsr_conv2d(library, x, weight, k, kernel, bias, *rest, order=order, **options)
    args = (x.contiguous(memory_format=torch.channels_last), *args[1:])
    assert_matches(y.contiguous(memory_format=torch.channels_last), args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(library, case, dtype):
    run(library, replace(case, dtype=dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("splits", [1, 3])
def test_every_kernel(library, kernel, splits):
    case = replace(SIXTEEN, dtype=torch.bfloat16, k=140)
    for ordered in (False, True):
        run(library, case, kernel=kernel, splits=splits, ordered=ordered)


def test_what_no_stored_block_meets_is_not_read(library):
    """NaN where no window with a stored block there reaches."""
    keep = torch.zeros(2, 9, dtype=torch.bool)
    keep[0, 0] = keep[1, 8] = True
    weight = co.ops.bsr_from_dense(torch.rand(32, 144) + 1, (16, 16), keep)
    x = torch.randn(1, 16, 6, 7)
    arguments = (weight, 32, (3, 3), None, (1, 1), (1, 1), (1, 1))
    sound = bsr_conv2d(library, x, *arguments)
    x[0, 3, 2, 4] = torch.nan
    y = bsr_conv2d(library, x, *arguments)
    expected = sound.clone()
    expected[0, :16, 3, 5] = expected[0, 16:, 1, 3] = torch.nan
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~y.isnan()], expected[~y.isnan()])


def test_indices_that_are_none_stay_within_the_arrays(library):
    x, values, crow, col, k, kernel, bias, *rest = make(replace(SIXTEEN, density=0.7), CPU)
    for bad in (-1, -(2**31), 9, 2**31 - 1):
        for index in (crow, col):
            broken = index.clone()
            broken[1:3] = bad
            weight = (values, broken, col) if index is crow else (values, crow, broken)
            bsr_conv2d(library, x, weight, k, kernel, bias, *rest, splits=2)


WINDOWS = "bsr_windows.cuh"
PLANTS = {
    "a row too low": (
        Plant(WINDOWS, "static_cast<unsigned>(windows.H) ||", "static_cast<unsigned>(-1) ||"),
        'global array "x".* out of bounds|wrong result',
    ),
    "dilation of the other side": (
        Plant(WINDOWS, "row * windows.dilation_h, ", "row * windows.dilation_w, "),
        "wrong result",
    ),
    "padding left out": (
        Plant(WINDOWS, "row * windows.stride_h - windows.padding_h", "row * windows.stride_h"),
        "wrong result",
    ),
    "missing __syncthreads": (
        Plant("bsr_linear.cuh", "__syncthreads();  // the windows", "// the windows"),
        'race on shared array "shared"|never written',
    ),
}


@pytest.fixture(scope="module")
def planted():
    """All of them, built two at a time."""
    with ThreadPoolExecutor(2) as pool:
        futures = {
            name: pool.submit(harness.build, "bsr_conv2d", plant, ("CUDA_ON_CPU_BF16_ONLY",))
            for name, (plant, _) in PLANTS.items()
        }
        return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_mistakes_are_found(planted, name):
    case = replace(SIXTEEN, dtype=torch.bfloat16, dilation=(2, 1), padding=(2, 1), h=5)
    try:
        run(planted[name], case)
    except KernelError as error:
        verdict = str(error)
    except AssertionError:
        verdict = "wrong result"
    else:
        verdict = "right result"
    with pytest.raises(AssertionError, match=PLANTS[name][1]):
        raise AssertionError(verdict)
