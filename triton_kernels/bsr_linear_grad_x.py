"""bsr_linear_grad_x in Triton: bsr_linear's kernel on the transposed matrix.

Semantics and argument forms: :func:`compressops.ops.bsr_linear_grad_x`.
"""

from __future__ import annotations

import torch

from compressops.ops import bsr
from compressops.ops.bsr_linear_grad import GRAD_X, check_grad_x

from .bsr import multiply
from .tiles import rows_of


def bsr_linear_grad_x(
    grad: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    in_features: int,
) -> torch.Tensor:
    """``grad @ W``; see :func:`compressops.ops.bsr_linear_grad_x`."""
    check_grad_x(grad, values, crow_indices, col_indices, in_features)
    bsr.check_indices_once(GRAD_X, values, crow_indices, col_indices, in_features)
    y = grad.new_empty((*grad.shape[:-1], in_features))
    if y.numel():
        _, columns = bsr.grid((grad.shape[-1], in_features), bsr.block_size_of(values))
        # Launches go to the current device.
        with torch.cuda.device_of(grad):
            transposed = bsr.transposed(crow_indices, col_indices, columns)
            multiply(rows_of(grad), values, *transposed, y)
    return y
