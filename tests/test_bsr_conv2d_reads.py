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
