"""Calls the CUDA kernels of bsr_conv2d on a CPU, as ``harness`` builds them."""

from __future__ import annotations

import ctypes

import torch

from compressops.ops.conv import output_size

from .bsr_linear import KERNELS
from .harness import ACTIVATIONS, DTYPES, c_int64
from .harness import _call as call
from .harness import _pointer as pointer


def bsr_conv2d(
    library: ctypes.CDLL,
    x: torch.Tensor,
    weight: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out_channels: int,
    kernel_size: tuple[int, int],
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str = "none",
    *,
    kernel: str = "auto",
    splits: int = 0,
    order: str = "forward",
    row_order: torch.Tensor | None = None,
) -> torch.Tensor:
    """bsr_conv2d on ``x`` [N, C, H, W]; channels last as the kernel's result is."""
    N, C, H, W = x.shape
    out = output_size(x, kernel_size, stride, padding, dilation)
    pixels = x.permute(0, 2, 3, 1).contiguous()
    y = torch.full((N, *out, out_channels), 77.0, dtype=x.dtype)
    sizes = (N, out_channels, C, H, W, *out, *kernel_size, *stride, *padding, *dilation)
    sizes = (*sizes, *weight[0].shape, splits, KERNELS[kernel])
    sizes = (*sizes, ACTIVATIONS[activation], DTYPES[x.dtype])
    call(
        library.run_bsr_conv2d,
        ctypes.c_int(DTYPES[x.dtype]),
        (c_int64 * len(sizes))(*sizes),
        *map(pointer, (pixels, *weight, bias, y, row_order)),
        order=order,
    )
    return y.permute(0, 3, 1, 2)
