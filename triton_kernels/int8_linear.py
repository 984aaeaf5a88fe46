"""int8_linear in Triton: quantize the rows of x, then an int8 matrix product with its epilogue.

Semantics and argument forms: :func:`compressops.ops.int8_linear`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import require
from .rounding import cast

OP = "int8_linear"
MAX_IN_FEATURES = 131072  # |sum| ≤ 127·128·K must fit in an int32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}

# Adding and subtracting 1.5 · 2^23 rounds a float32 of magnitude below 2^22 to an integer, halves
# to even, on every target and in the interpreter.
ROUND_MAGIC: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def quantize_rows_kernel(x, q, x_scales, x_stride, K, BLOCK_K: tl.constexpr):
    """One program per row of x [M, K] -> q [M, K] int8 and x_scales [M]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    # As bit patterns, magnitudes order like integers, with NaN above infinity: no NaN gets lost.
    amax_bits = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + columns
        values = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        amax_bits = tl.maximum(amax_bits, tl.abs(values).to(tl.int32, bitcast=True))
    top_bits = tl.max(amax_bits, 0)
    finite = top_bits < 0x7F800000
    amax = top_bits.to(tl.float32, bitcast=True)
    divisor = tl.where(finite & (amax > 0.0), amax, 1.0)
    inverse = tl.where(finite & (amax > 0.0), tl.div_rn(127.0, divisor), 0.0)
    tl.store(x_scales + row, tl.where(finite, tl.div_rn(amax, 127.0), float("nan")))
    for start in range(0, K, BLOCK_K):
        k = start + columns
        values = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        scaled = tl.where(finite, values, 0.0) * inverse
        scaled = tl.where(scaled == scaled, scaled, 0.0)  # 0 · inf, where 127 / amax overflows
        scaled = tl.minimum(tl.maximum(scaled, -127.0), 127.0)
        rounded = (scaled + ROUND_MAGIC) - ROUND_MAGIC
        tl.store(q + row * K + k, rounded.to(tl.int8), mask=k < K)


@triton.jit
def int8_linear_kernel(
    q,
    weight,
    x_scales,
    weight_scales,
    bias,
    y,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A program computes a [BLOCK_M, BLOCK_N] tile of y [M, N] = q [M, K] @ weight [N, K].T."""
    # Programs that run at the same time share rows of q and weight in L2.
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    rows_in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    in_group = program % (GROUP_M * tiles_n)
    tile_m = group * GROUP_M + in_group % rows_in_group
    tile_n = in_group // rows_in_group

    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + depth
        left = tl.load(
            q + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0
        )
        right = tl.load(
            weight + n[None, :] * K + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0
        )
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)

    x_scale = tl.load(x_scales + m, mask=m < M, other=0.0)
    weight_scale = tl.load(weight_scales + n, mask=n < N, other=0.0)
    value = sums.to(tl.float32) * (x_scale[:, None] * weight_scale[None, :])
    if HAS_BIAS:
        value = value + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == 1:
        value = tl.where(value < 0.0, 0.0, value)  # keeps NaN
    if ACTIVATION == 2:
        value = 0.5 * value * (1.0 + tl.erf(value * 0.70710678118654752))
    tl.store(
        y + m[:, None] * N + n[None, :],
        cast(value, y.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )


def block_sizes(M: int, N: int) -> dict[str, int]:
    """Tile and launch parameters for a shape.

    ``tl.dot`` wants at least 16 rows. With few rows the weight is all the traffic, and narrow tiles
    spread it over more multiprocessors; with many, large tiles read each byte for more operations.
    """
    if M <= 16:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3}
    if M * N < 1024 * 1024:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    weight_sums: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    symmetric: bool = True,
) -> torch.Tensor:
    """``activation(x @ (weight · weight_scales).T + bias)`` in int8.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16, any strides.
        weight: int8 ``[N, K]``, or as :func:`compressops.ops.int8_linear_pack` packs it.
        weight_scales: float32 ``[N]``.
        weight_sums: int32 ``[N]``; not needed here.
        bias: float ``[N]`` or None.
        activation: ``"none"``, ``"relu"`` or ``"gelu"``.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    fits = symmetric and x_scale is None and x_zero is None
    require(fits, OP, "symmetric", "True, without x_scale", symmetric)
    floats = "float32, float16 or bfloat16 [..., K]"
    require(x.dim() >= 1 and x.dtype in DTYPES, OP, "x", floats, x)
    K = x.shape[-1]
    require(K <= MAX_IN_FEATURES, OP, "x", f"at most {MAX_IN_FEATURES} wide (int32 sums)", x)
    vector = weight_scales.dim() == 1 and weight_scales.dtype == torch.float32
    require(vector, OP, "weight_scales", "float32 [N]", weight_scales)
    N = weight_scales.shape[0]
    if weight.dim() == 4 and weight.shape == (-(-N // 16), -(-K // 4), 16, 4):
        weight = weight.transpose(1, 2).reshape(16 * weight.shape[0], 4 * weight.shape[1])[:N, :K]
    fits = weight.dtype == torch.int8 and tuple(weight.shape) == (N, K)
    require(fits, OP, "weight", f"int8 [{N}, {K}] or packed", weight)
    fits = weight_sums.dtype == torch.int32 and tuple(weight_sums.shape) == (N,)
    require(fits, OP, "weight_sums", f"int32 [{N}]", weight_sums)
    if bias is not None:
        fits = bias.dtype in DTYPES and tuple(bias.shape) == (N,)
        require(fits, OP, "bias", f"float [{N}] or None", bias)
    known = activation in ACTIVATIONS
    require(known, OP, "activation", f"one of {tuple(ACTIVATIONS)}", repr(activation))
    named = {"weight": weight, "weight_scales": weight_scales, "bias": bias}
    for name, tensor in named.items():
        here = tensor is None or tensor.device == x.device
        require(here, OP, name, f"on {x.device}, as x is", tensor)
    y = x.new_empty((*x.shape[:-1], N))
    rows = x.reshape(-1, K) if K else x.new_empty((y.numel() // max(N, 1), 0))
    if rows.stride(-1) != 1 and K > 1:
        rows = rows.contiguous()
    M = rows.shape[0]
    if M == 0 or N == 0:
        return y
    q = torch.empty((M, K), dtype=torch.int8, device=x.device)
    x_scales = torch.empty(M, dtype=torch.float32, device=x.device)
    # Launches go to the current device. Without fused multiply-adds every backend rounds alike.
    with torch.cuda.device_of(x):
        quantize_rows_kernel[(M,)](
            *(rows, q, x_scales, rows.stride(0), K),
            BLOCK_K=min(4096, triton.next_power_of_2(max(K, 16))),
            enable_fp_fusion=False,
        )
        sizes = block_sizes(M, N)
        grid = (triton.cdiv(M, sizes["BLOCK_M"]) * triton.cdiv(N, sizes["BLOCK_N"]),)
        int8_linear_kernel[grid](
            *(q, weight.contiguous(), x_scales, weight_scales.contiguous()),
            x_scales if bias is None else bias.contiguous(),
            *(y, M, N, K),
            HAS_BIAS=bias is not None,
            ACTIVATION=ACTIVATIONS[activation],
            GROUP_M=8,
            enable_fp_fusion=False,
            **sizes,
        )
    return y
