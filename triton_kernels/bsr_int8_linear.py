"""bsr_int8_linear in Triton: rows of x in int8, then bsr_linear's kernel with integer sums.

Semantics and argument forms: :func:`compressops.ops.bsr_int8_linear`.
"""

from __future__ import annotations

import torch

from compressops.ops import bsr
from compressops.ops.bsr_int8_linear import OP, check

from .bsr import multiply
from .quantize_rows import quantize_rows
from .tiles import rows_of


def bsr_int8_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    weight_scales: torch.Tensor,
    weight_sums: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    symmetric: bool = True,
    row_order: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`int8_linear` with a weight in block-sparse rows; see
    :func:`compressops.ops.bsr_int8_linear`."""
    indices = (crow_indices, col_indices)
    quantization = (x_scale, x_zero, symmetric)
    epilogue = (weight_scales, weight_sums, bias, activation)
    check(x, values, *indices, *epilogue, *quantization, row_order)
    bsr.check_indices_once(OP, values, *indices, x.shape[-1])
    bsr.check_row_order(OP, row_order, crow_indices)
    y = x.new_empty((*x.shape[:-1], len(weight_scales)))
    if y.numel():
        # Launches go to the current device.
        with torch.cuda.device_of(x):
            q, x_scales, x_zeros = quantize_rows(rows_of(x), *quantization)
            how = (x_scales, x_zeros, weight_scales, weight_sums)
            multiply(q, values, *indices, None, y, bias, activation, how)
    return y
