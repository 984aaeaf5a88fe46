"""int4_linear in Triton: W4A8, and W4A16 or W4A32 where x stays as it is.

Semantics and argument forms: :func:`compressops.ops.int4_linear`.
"""

from __future__ import annotations

import torch

from compressops.ops.int4_linear import CODES

from .packed_linear import packed_linear


def int4_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    out_features: int,
    group_size: int | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    quantize_x: bool = True,
) -> torch.Tensor:
    """``activation(x @ W.T + bias)`` with W of 4 bits; see :func:`compressops.ops.int4_linear`."""
    args = (x, weight, scales, zeros, out_features, group_size, bias, activation, quantize_x)
    return packed_linear(CODES, *args)
