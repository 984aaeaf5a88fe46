"""bsr_conv2d in Triton: bsr_linear's kernel on windows that are read where they lie in the images.

Semantics and argument forms: :func:`compressops.ops.bsr_conv2d`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from compressops.ops import bsr
from compressops.ops.bsr_conv2d import OP, check
from compressops.ops.conv import output_size
from compressops.ops.winograd_domain import memory_format

from .bsr import Windows, multiply


def bsr_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
    row_order: torch.Tensor | None = None,
) -> torch.Tensor:
    """The op, on pairs for kernel_size, stride, padding and dilation; arguments and errors are its
    own."""
    weight, steps = (values, crow_indices, col_indices), (stride, padding, dilation)
    check(x, *weight, out_channels, kernel_size, bias, *steps, activation, row_order)
    N, channels, *size = x.shape
    bsr.check_indices_once(OP, *weight, math.prod(kernel_size) * channels)
    bsr.check_row_order(OP, row_order, crow_indices)
    out = output_size(x, kernel_size, *steps)
    y = x.new_empty((N, *out, out_channels))
    if y.numel():
        windows = Windows(channels, *map(tuple, (size, x.stride(), out, kernel_size, *steps)))
        # Launches go to the current device.
        with torch.cuda.device_of(x):
            multiply(x, *weight, None, y, bias, activation, windows=windows)
    return y.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(x))
