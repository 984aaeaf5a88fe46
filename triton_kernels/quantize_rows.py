"""Rows of activations to int8, as the integer matrix products multiply them.

Semantics: :func:`compressops.ops.int8_linear`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Adding and subtracting 1.5 · 2^23 rounds a float32 of magnitude below 2^22 to an integer, halves
# to even, on every target and in the interpreter.
ROUND_MAGIC: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def round_within(value, BOUND: tl.constexpr):
    """``value`` clipped to ±BOUND and rounded, halves to even; of NaN 0."""
    value = tl.where(value == value, value, 0.0)
    value = tl.minimum(tl.maximum(value, -BOUND), BOUND)
    return (value + ROUND_MAGIC) - ROUND_MAGIC


@triton.jit
def scaling_of(
    top_bits,
    low,
    high,
    x_scale,
    x_zero,
    STATIC: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """Of values whose largest magnitude has these bits and which lie between low ≤ 0 and high ≥ 0:
    whether they are finite, the inverse scale, the scale (NaN where they are not) and the zero
    point, in float32. STATIC reads x_scale [] and x_zero []."""
    finite = top_bits < 0x7F800000
    if STATIC:
        scale = tl.load(x_scale)
        inverse = tl.div_rn(1.0, scale)
    else:
        if ASYMMETRIC:
            # Halved, so that the difference of two large values stays finite.
            reach = high * 0.5 - low * 0.5
            levels = 127.5
        else:
            reach = top_bits.to(tl.float32, bitcast=True)
            levels = 127.0
        wide = finite & (reach > 0.0)
        inverse = tl.where(wide, tl.div_rn(levels, tl.where(wide, reach, 1.0)), 0.0)
        scale = tl.div_rn(reach, levels)
    if ASYMMETRIC:
        lowest = tl.where(finite, low, 0.0) * inverse
        lowest = tl.where(lowest == lowest, lowest, 0.0)  # 0 · inf, where levels / reach overflows
        zero = tl.minimum(round_within(-128.0 - lowest, 512.0), 127.0)
    elif HAS_ZERO:
        zero = tl.load(x_zero).to(tl.float32)
    else:
        zero = scale * 0.0
    zero = tl.where(finite & (zero == zero), zero, 0.0)
    return finite, inverse, tl.where(finite, scale, float("nan")), zero


@triton.jit
def range_of(x, K, ASYMMETRIC: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of the row of K values at ``x``: the largest magnitude's bits and, where they are asked for,
    the least value and the largest, or 0."""
    columns = tl.arange(0, BLOCK_K)
    # As bit patterns, magnitudes order like integers, with NaN above infinity: no NaN gets lost.
    amax_bits = tl.zeros([BLOCK_K], tl.int32)
    low = tl.zeros([BLOCK_K], tl.float32)
    high = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + columns
        values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        amax_bits = tl.maximum(amax_bits, tl.abs(values).to(tl.int32, bitcast=True))
        if ASYMMETRIC:
            low, high = tl.minimum(low, values), tl.maximum(high, values)
    return tl.max(amax_bits, 0), tl.min(low, 0), tl.max(high, 0)


@triton.jit
def codes_of(values, finite, inverse, zero, SHIFTED: tl.constexpr):
    """float32 ``values`` as int8 codes. SHIFTED: static or asymmetric."""
    scaled = tl.where(finite, values, 0.0) * inverse
    if SHIFTED:
        # ±512 lies outside the codes, whatever the zero point.
        code = tl.minimum(tl.maximum(round_within(scaled, 512.0) + zero, -128.0), 127.0)
    else:
        code = round_within(scaled, 127.0)
    return code.to(tl.int8)


@triton.jit
def quantize_rows_kernel(
    x,
    q,
    x_scales,
    x_zeros,
    x_scale,
    x_zero,
    x_stride,
    K,
    STATIC: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per row of x [M, K] -> q [M, K] int8, x_scales [M] and, where there are zero
    points (ASYMMETRIC or HAS_ZERO), x_zeros [M] int32. STATIC reads x_scale [] and x_zero []."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    top_bits, low, high = range_of(x + row * x_stride, K, ASYMMETRIC, BLOCK_K)
    finite, inverse, scale, zero = scaling_of(
        top_bits, low, high, x_scale, x_zero, STATIC, ASYMMETRIC, HAS_ZERO
    )
    tl.store(x_scales + row, scale)
    if ASYMMETRIC or HAS_ZERO:
        tl.store(x_zeros + row, zero.to(tl.int32))
    for start in range(0, K, BLOCK_K):
        k = start + columns
        values = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        codes = codes_of(values, finite, inverse, zero, STATIC or ASYMMETRIC)
        tl.store(q + row * K + k, codes, mask=k < K)


def quantize_rows(
    rows: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    symmetric: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """rows ``[M, K]``, each contiguous, to int8 ``[M, K]``, scales float32 ``[M]`` and zero points
    int32 ``[M]``, None where all are 0."""
    M, K = rows.shape
    q = torch.empty((M, K), dtype=torch.int8, device=rows.device)
    x_scales = torch.empty(M, dtype=torch.float32, device=rows.device)
    x_zeros = None
    if not symmetric or x_zero is not None:
        x_zeros = torch.empty(M, dtype=torch.int32, device=rows.device)
    # Without fused multiply-adds every backend rounds alike.
    quantize_rows_kernel[(M,)](
        *(rows, q, x_scales, x_scales if x_zeros is None else x_zeros),
        x_scales if x_scale is None else x_scale,
        x_scales if x_zero is None else x_zero,
        *(rows.stride(0), K),
        STATIC=x_scale is not None,
        ASYMMETRIC=not symmetric,
        HAS_ZERO=x_zero is not None,
        BLOCK_K=min(4096, triton.next_power_of_2(max(K, 16))),
        enable_fp_fusion=False,
    )
    return q, x_scales, x_zeros
