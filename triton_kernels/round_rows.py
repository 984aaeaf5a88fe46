"""Rows of activations rounded to 8 bits: a program reads a row twice, and stores no codes.

Semantics: :func:`compressops.ops.round_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import require
from .quantize_rows import codes_of, range_of, scaling_of
from .rounding import cast
from .tiles import rows_of

OP = "round_rows"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def round_rows_kernel(
    x,
    y,
    x_stride,
    K,
    LARGEST: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per row of x [M, K] -> y [M, K], within ±LARGEST."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    top_bits, low, high = range_of(x + row * x_stride, K, ASYMMETRIC, BLOCK_K)
    finite, inverse, scale, zero = scaling_of(top_bits, low, high, x, x, False, ASYMMETRIC, False)
    for start in range(0, K, BLOCK_K):
        k = start + columns
        values = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        codes = codes_of(values, finite, inverse, zero, ASYMMETRIC)
        rounded = (codes.to(tl.float32) - zero) * scale
        # NaN stays.
        rounded = tl.where(rounded > LARGEST, LARGEST, rounded)
        rounded = tl.where(rounded < -LARGEST, -LARGEST, rounded)
        tl.store(y + row * K + k, cast(rounded, y.dtype.element_ty), mask=k < K)


def round_rows(x: torch.Tensor, symmetric: bool = True) -> torch.Tensor:
    """The values that the int8 codes of the rows of ``x`` stand for.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``.
        symmetric: of the quantization.

    Returns:
        ``[..., K]`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: ``x`` is not of that form.
    """
    fits = x.dim() >= 1 and x.dtype in DTYPES
    require(fits, OP, "x", "float32, float16 or bfloat16 [..., K]", x)
    y, rows = x.new_empty(x.shape), rows_of(x)
    M, K = rows.shape
    if y.numel() == 0:
        return y
    # Without fused multiply-adds every backend rounds alike.
    with torch.cuda.device_of(x):
        round_rows_kernel[(M,)](
            *(rows, y, rows.stride(0), K),
            LARGEST=torch.finfo(x.dtype).max,
            ASYMMETRIC=not symmetric,
            BLOCK_K=min(4096, triton.next_power_of_2(max(K, 16))),
            enable_fp_fusion=False,
        )
    return y
