"""ternary_linear in Triton (W2A8).

Semantics and argument forms: :func:`compressops.ops.ternary_linear`.
"""

from __future__ import annotations

import torch

from compressops.ops.ternary_linear import CODES

from .packed_linear import packed_linear


def ternary_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    out_features: int,
    group_size: int | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """``activation(x @ W.T + bias)`` with W of −α, 0 and α; see
    :func:`compressops.ops.ternary_linear`."""
    args = (x, weight, scales, None, out_features, group_size, bias, activation)
    return packed_linear(CODES, *args, quantize_x=True)
