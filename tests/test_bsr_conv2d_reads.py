"""bsr_conv2d: what kernels read of images, and beside them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_bsr_conv2d import ALL_KERNELS, CPU, NATIVE, Case, dense_of, make

import compressops as co

IN_PLACE = pytest.mark.skipif(
    len(NATIVE) == 1, reason="the compiled kernel alone reads windows in place"
)


@ALL_KERNELS
@pytest.mark.parametrize("pack", [False, True])
def test_what_lies_beyond_the_edges_is_ignored(kernel: torch.device, pack: bool) -> None:
    """Also where x holds what no product may meet."""
    case = Case(c=3, k=50, block=(16, 16), density=1.0)  # 27 inputs
    x, values, crow, col, k, *rest = make(case, kernel)
    for bad in (0.0, torch.nan):
        x[:, 0, 0, 0] = bad
        whole = co.ops.bsr_conv2d(x, values, crow, col, k, *rest)
        spoilt = values.clone()
        spoilt[col == 1, :, 11:] = torch.nan
        spoilt[-2:, 2:] = torch.nan
        bsr = (spoilt, crow, col)
        bsr = co.ops.bsr_linear_pack(*bsr, k, 27) if pack else bsr
        found = co.ops.bsr_conv2d(x, *bsr, k, *rest)
        assert torch.allclose(found, whole, rtol=0, atol=0, equal_nan=True)
        assert not whole[:, :, 3:, 3:].isnan().any()


@ALL_KERNELS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_outputs_whose_blocks_they_meet(
    kernel: torch.device, bad: float
) -> None:
    """Outputs 0 to 15 see channel 0 at the upper left, 16 to 31 channel 1 at the lower right."""
    keep = torch.zeros(2, 18, dtype=torch.bool, device=kernel)
    keep[0, 0] = keep[1, 17] = True
    bsr = co.ops.bsr_from_dense(torch.rand(32, 18, device=kernel) + 1, (16, 1), keep)
    x = torch.randn(2, 2, 6, 7, device=kernel)
    sound = co.ops.bsr_conv2d(x, *bsr, 32, 3, None, 1, 1)
    x[1, 1, 3, 4] = bad
    y = co.ops.bsr_conv2d(x, *bsr, 32, 3, None, 1, 1)
    expected = sound.clone()
    expected[1, 16:, 2, 3] = bad
    assert torch.allclose(y, expected, equal_nan=True)


@ALL_KERNELS
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("block", [(16, 16), (16, 1)])
@pytest.mark.parametrize("geometry", [(3, 2, 1), (3, 1, 1), (1, 1, 0), (2, 1, 0)])
def test_nan_stays_in_its_image(
    kernel: torch.device, geometry: tuple[int, int, int], block: tuple[int, int], last: bool
) -> None:
    """Also where blocks reach beyond the last channel, and images are in memory together."""
    size, stride, padding = geometry
    case = Case(n=3, h=4, w=5, k=20, kernel=(size, size), block=block, density=1.0)
    case = replace(case, stride=(stride, stride), padding=(padding, padding))
    x, *rest = make(case, kernel, pack=last, last=last)
    sound = co.ops.bsr_conv2d(x, *rest)
    for image in range(3):
        spoilt = x.clone()
        spoilt[image] = torch.nan
        y = co.ops.bsr_conv2d(spoilt, *rest)
        others = [i for i in range(3) if i != image]
        assert torch.allclose(y[others], sound[others], atol=1e-5)
        assert y[image].isnan().any()


BESIDE_A_GUARD = """
import ctypes, mmap, torch
import compressops as co

torch.set_num_threads(64)
size, page = 8 * 993 * 4 * 4, mmap.PAGESIZE
end = -(-size // page) * page
memory = mmap.mmap(-1, end + page)
first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(first + end), page, 0) == 0
x = torch.frombuffer(memory, dtype=torch.float32, count=size // 4, offset=end - size)
x = x.view(1, 8, 993, 4).normal_()
weight = torch.randn(16, 8)
y = co.ops.bsr_conv2d(x, *co.ops.bsr_from_dense(weight, (16, 1)), 16, 1)
expected = torch.nn.functional.conv2d(x, weight[:, :, None, None])
assert torch.allclose(y, expected, atol=1e-5)
"""


@IN_PLACE
def test_threads_read_nothing_behind_an_image_in_place() -> None:
    """Rows in strips of 16, of which the last, of one row of 4 pixels, would be less than half a
    vector; behind the image is memory that nobody may read."""
    done = subprocess.run([sys.executable, "-c", BESIDE_A_GUARD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@IN_PLACE
def test_far_padding_takes_no_memory() -> None:
    x, *bsr, k, kernel, bias, _, _, _, activation = make(Case(n=1, h=1, w=1), CPU, pack=True)
    far, weight = 2**30, dense_of(*bsr, k, 5, kernel)
    y = co.ops.bsr_conv2d(x, *bsr, k, kernel, None, far, far, 1, activation)
    assert y.shape == (1, k, 2, 2)
    assert y[:, :, 0].count_nonzero() == y[:, :, :, 0].count_nonzero() == 0
    assert torch.allclose(y[0, :, 1, 1], (x[0, :, 0, 0] * weight[..., 0, 0]).sum(1), atol=1e-5)
    y = co.ops.bsr_conv2d(x, *bsr, k, kernel, bias, far, far, far, activation)
    assert torch.allclose(y, F.conv2d(x, weight, bias, 1, 1), atol=1e-5)
