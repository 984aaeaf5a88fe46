"""bsr_linear in Triton.

Semantics and argument forms: :func:`compressops.ops.bsr_linear`.
"""

from __future__ import annotations

import torch

from compressops.ops import bsr
from compressops.ops.bsr_linear import OP, check

from .bsr import multiply
from .tiles import rows_of


def bsr_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    row_order: torch.Tensor | None = None,
) -> torch.Tensor:
    """``activation(x @ W.T + bias)``, W in block-sparse rows; see
    :func:`compressops.ops.bsr_linear`."""
    check(x, values, crow_indices, col_indices, out_features, bias, activation, row_order)
    bsr.check_indices_once(OP, values, crow_indices, col_indices, x.shape[-1])
    bsr.check_row_order(OP, row_order, crow_indices)
    y = x.new_empty((*x.shape[:-1], out_features))
    if y.numel():
        # Launches go to the current device.
        with torch.cuda.device_of(x):
            multiply(rows_of(x), values, crow_indices, col_indices, None, y, bias, activation)
    return y
