"""int8_linear in Triton: quantize the rows of x, then an int8 matrix product with its epilogue.

Semantics and argument forms: :func:`compressops.ops.int8_linear`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compressops.ops.int8_linear import check_quantization, max_terms

from .checks import require
from .quantize_rows import quantize_rows
from .tiles import ACTIVATIONS, GROUP_M, rows_of, store_tile, tile_of_program

OP = "int8_linear"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def int8_linear_kernel(
    q,
    weight,
    x_scales,
    x_zeros,
    weight_scales,
    weight_sums,
    bias,
    y,
    M,
    N,
    K,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A program computes a [BLOCK_M, BLOCK_N] tile of y [M, N] = q [M, K] @ weight [N, K].T."""
    first_m, first_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
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

    if HAS_ZEROS:
        x_zero = tl.load(x_zeros + m, mask=m < M, other=0)
        sums -= x_zero[:, None] * tl.load(weight_sums + n, mask=n < N, other=0)[None, :]
    x_scale = tl.load(x_scales + m, mask=m < M, other=0.0)
    weight_scale = tl.load(weight_scales + n, mask=n < N, other=0.0)
    value = sums.to(tl.float32) * (x_scale[:, None] * weight_scale[None, :])
    store_tile(y, value, bias, m, n, M, N, HAS_BIAS, ACTIVATION)


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
        weight_sums: int32 ``[N]``, of the rows of the int8 weight.
        bias: float ``[N]`` or None.
        activation: ``"none"``, ``"relu"`` or ``"gelu"``.
        x_scale, x_zero: float32 and int8 ``[]``, the static quantization of ``x``, or None.
        symmetric: of the dynamic quantization.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    floats = "float32, float16 or bfloat16 [..., K]"
    require(x.dim() >= 1 and x.dtype in DTYPES, OP, "x", floats, x)
    K = x.shape[-1]
    check_quantization(OP, x, x_scale, x_zero, symmetric)
    most = max_terms(x_scale, symmetric)
    require(most >= K, OP, "x", f"at most {most} wide (int32 sums)", x)
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
    vectors = {"weight_scales": weight_scales, "weight_sums": weight_sums, "bias": bias}
    for name, tensor in {"weight": weight, **vectors}.items():
        here = tensor is None or tensor.device == x.device
        require(here, OP, name, f"on {x.device}, as x is", tensor)
    y = x.new_empty((*x.shape[:-1], N))
    rows = rows_of(x)
    M = rows.shape[0]
    if M == 0 or N == 0:
        return y
    # Launches go to the current device. Without fused multiply-adds every backend rounds alike.
    with torch.cuda.device_of(x):
        q, x_scales, x_zeros = quantize_rows(rows, x_scale, x_zero, symmetric)
        sizes = block_sizes(M, N)
        grid = (triton.cdiv(M, sizes["BLOCK_M"]) * triton.cdiv(N, sizes["BLOCK_N"]),)
        int8_linear_kernel[grid](
            *(q, weight.contiguous(), x_scales, x_scales if x_zeros is None else x_zeros),
            *(weight_scales.contiguous(), weight_sums.contiguous()),
            x_scales if bias is None else bias.contiguous(),
            *(y, M, N, K),
            HAS_ZEROS=x_zeros is not None,
            HAS_BIAS=bias is not None,
            ACTIVATION=ACTIVATIONS[activation],
            GROUP_M=GROUP_M,
            enable_fp_fusion=False,
            **sizes,
        )
    return y
