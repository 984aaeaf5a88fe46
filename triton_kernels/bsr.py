"""What the ops on block-sparse weights share in Triton: the products with stored blocks.

Semantics and argument forms: :func:`compressops.ops.bsr_linear`. A program multiplies rows of x by
outputs of one row of blocks, over the inputs that its blocks store, and by nothing else. Where a
step of inputs fills a block's width evenly, steps are parts of blocks, read in one piece. Blocks of
any other width (1, 5, 24) are stored inputs one after the other, BLOCK_K of which are gathered for
a step, so that they fill tensor cores too. Blocks of any other height leave some outputs of a
tile empty.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from compressops.ops import bsr

from .tiles import ACTIVATIONS, GROUP_M, store_tile, tile_of_program, window_of

# BLOCK_M, BLOCK_N, BLOCK_K at most, warps and stages for few rows, for small and for large results.
# int32 sums and 16-bit operands leave room for large tiles; float32 has no tensor cores here.
TILES = {
    torch.int8: ((16, 64, 128, 4, 4), (64, 64, 64, 4, 4), (128, 128, 64, 8, 4)),
    torch.float16: ((16, 64, 64, 4, 5), (64, 64, 32, 4, 5), (128, 128, 32, 8, 4)),
    torch.float32: ((16, 32, 32, 4, 3), (32, 32, 32, 8, 3), (64, 32, 32, 8, 3)),
}
TILES[torch.bfloat16] = TILES[torch.float16]
# The shortest step that `tl.dot` takes.
LEAST_K = {torch.int8: 32, torch.float16: 16, torch.bfloat16: 16, torch.float32: 16}


class Windows(NamedTuple):
    """Rows of x that are windows of R × S pixels of images [N, C, H, W] of any strides: those that
    the output pixels [N, OH, OW] see, in the order kernel row, kernel column, channel."""

    channels: int
    size: tuple[int, int]  # H and W
    strides: tuple[int, int, int, int]  # of x
    out: tuple[int, int]
    taps: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@triton.jit
def bsr_multiply_kernel(
    x,
    values,
    starts,
    inputs,
    order,
    x_scales,
    x_zeros,
    scales,
    weight_sums,
    bias,
    y,
    M,
    N,
    K,
    x_stride,
    rows,
    nnz,
    windows,
    R: tl.constexpr,
    C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A program computes BLOCK_M rows of y [M, N] = x [M, K] @ W.T and up to BLOCK_N outputs of one
    of `rows` rows of blocks. TRANSPOSED: W is the stored matrix transposed, whose row of blocks i
    has the blocks order[starts[i]:starts[i + 1]]; inputs are their columns. Rows of x are the
    `windows` of images, if it is not None."""
    OUT: tl.constexpr = C if TRANSPOSED else R
    IN: tl.constexpr = R if TRANSPOSED else C
    PARTS: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    first_m, place = tile_of_program(M, rows * PARTS * BLOCK_N, BLOCK_M, BLOCK_N, GROUP_M)
    row, part = place // BLOCK_N // PARTS, place // BLOCK_N % PARTS
    m, out = first_m + tl.arange(0, BLOCK_M), part * BLOCK_N + tl.arange(0, BLOCK_N)
    n = row * OUT + out
    in_m, in_n = m < M, out < OUT
    depth = tl.arange(0, BLOCK_K)
    if windows is not None:
        # Of rows that are not there: any pixel, nobody stores their sums.
        pixel = tl.where(in_m, m, 0)
        size, steps, around = windows.out, windows.stride, windows.padding
        image, h, w = window_of(pixel, size[0], size[1], steps[0], steps[1], around[0], around[1])
    # Indices that are none must not lead out of the arrays.
    begin = tl.maximum(tl.load(starts + row), 0)
    count = tl.minimum(tl.load(starts + row + 1), nnz) - begin
    QUANTIZED: tl.constexpr = x.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if QUANTIZED else tl.float32
    WHOLE: tl.constexpr = IN % BLOCK_K == 0
    sums = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    steps = count * (IN // BLOCK_K) if WHOLE else tl.cdiv(count * IN, BLOCK_K)
    for step in range(0, steps):
        if WHOLE:
            at = begin + step // (IN // BLOCK_K)
            inside = step % (IN // BLOCK_K) * BLOCK_K + depth
            column = tl.load(inputs + at).to(tl.int64)
            block = (tl.load(order + at) if TRANSPOSED else at).to(tl.int64)
            k = column * IN + inside
            in_k = (k >= 0) & (k < K)
        else:
            stored = step * BLOCK_K + depth
            at, inside = begin + stored // IN, stored % IN
            there = stored < count * IN
            column = tl.load(inputs + at, mask=there, other=-1).to(tl.int64)
            if TRANSPOSED:
                block = tl.load(order + at, mask=there, other=0).to(tl.int64)
            else:
                block = at.to(tl.int64)
            k = column * IN + inside
            in_k = there & (k >= 0) & (k < K)
        if windows is None:
            source = m[:, None] * x_stride + k[None, :]
            in_x = in_m[:, None] & in_k[None, :]
        else:
            H, W = windows.size[0], windows.size[1]
            stride_n, stride_c, stride_h, stride_w = windows.strides
            tap = k // windows.channels
            at_h = h[:, None] + (tap // windows.taps[1] * windows.dilation[0])[None, :]
            at_w = w[:, None] + (tap % windows.taps[1] * windows.dilation[1])[None, :]
            source = (image * stride_n)[:, None] + ((k - tap * windows.channels) * stride_c)[
                None, :
            ]
            source += at_h * stride_h + at_w * stride_w
            in_x = (at_h >= 0) & (at_h < H) & (at_w >= 0) & (at_w < W) & in_k[None, :]
        left = tl.load(x + source, mask=in_x, other=0)
        # What lies beyond the last input meets zeros of x, which would keep a NaN.
        if TRANSPOSED:
            entry = (block * R + inside)[:, None] * C + out[None, :]
        else:
            entry = (block * R * C + inside)[:, None] + (out * C)[None, :]
        right = tl.load(values + entry, mask=in_k[:, None] & in_n[None, :], other=0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision="ieee", out_dtype=SUM)
    in_n = in_n & (n < N)
    # Outputs that are another row's are none of this tile's.
    n = tl.where(in_n, n, N)
    if QUANTIZED:
        if HAS_ZEROS:
            x_zero = tl.load(x_zeros + m, mask=in_m, other=0)
            sums -= x_zero[:, None] * tl.load(weight_sums + n, mask=in_n, other=0)[None, :]
        x_scale = tl.load(x_scales + m, mask=in_m, other=0.0)
        scale = tl.load(scales + n, mask=in_n, other=0.0)
        value = sums.to(tl.float32) * (x_scale[:, None] * scale[None, :])
    else:
        value = sums
    store_tile(y, value, bias, m, n, M, N, HAS_BIAS, ACTIVATION)


def block_sizes(M: int, N: int, dtype: torch.dtype, out: int, depth: int) -> dict[str, int]:
    """Tile and launch parameters for M × N results in ``dtype`` (int8 where x is quantized) of
    blocks of so many outputs and inputs."""
    tile = TILES[dtype][0 if M <= 16 else 1 if M * N < 1024 * 1024 else 2]
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    sizes = dict(zip(names, tile, strict=True))
    # The largest that fills blocks evenly; else the smallest that holds one.
    even = [size for size in (128, 64, 32, 16) if size <= sizes["BLOCK_N"] and out % size == 0]
    least = max(16, triton.next_power_of_2(out))
    sizes["BLOCK_N"] = even[0] if even else min(sizes["BLOCK_N"], least)
    steps = [size for size in (128, 64, 32, 16) if LEAST_K[dtype] <= size <= sizes["BLOCK_K"]]
    sizes["BLOCK_K"] = next((size for size in steps if depth % size == 0), min(steps[0], 64))
    return sizes


def interpreted() -> bool:
    """Triton's interpreter multiplies the bits of bfloat16 numbers as integers."""
    return not isinstance(bsr_multiply_kernel, triton.JITFunction)


def multiply(
    x: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    inputs: torch.Tensor,
    order: torch.Tensor | None,
    y: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    quantization: tuple | None = None,
    windows: Windows | None = None,
) -> None:
    """y ``[..., N]``, not empty, = activation(x ``[M, K]`` @ W.T + bias), W of ``values``
    ``[nnz, r, c]``, or packed.

    Args:
        starts, inputs: where each row of blocks begins, and their columns.
        order: None, or the blocks' numbers: W is the stored matrix transposed.
        quantization: of x in int8: x_scales, x_zeros or None, weight_scales and weight_sums.
        windows: x are images, whose windows are the rows.
    """
    N = y.shape[-1]
    M = y.numel() // N
    K = x.shape[1] if windows is None else math.prod(windows.taps) * windows.channels
    values = bsr.unpacked(values)
    nnz, r, c = values.shape
    out, depth = (r, c) if order is None else (c, r)
    same = x.dtype == values.dtype
    upcast = not same or (x.dtype == torch.bfloat16 and interpreted())
    sizes = block_sizes(M, N, torch.float32 if upcast else x.dtype, out, depth)
    rows = len(starts) - 1
    parts = triton.cdiv(out, sizes["BLOCK_N"])
    x_scales, x_zeros, scales, sums = quantization or (None,) * 4
    bsr_multiply_kernel[(triton.cdiv(M, sizes["BLOCK_M"]) * rows * parts,)](
        *(x, values.contiguous(), starts.contiguous(), inputs.contiguous()),
        *(starts if tensor is None else tensor.contiguous() for tensor in (order, x_scales)),
        *(starts if tensor is None else tensor.contiguous() for tensor in (x_zeros, scales, sums)),
        starts if bias is None else bias.contiguous(),
        *(y, M, N, K, x.stride(0), rows, nnz, windows),
        R=r,
        C=c,
        TRANSPOSED=order is not None,
        UPCAST=upcast,
        HAS_ZEROS=x_zeros is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=ACTIVATIONS[activation],
        GROUP_M=GROUP_M,
        # Without fused multiply-adds every backend rounds integers' sums alike.
        enable_fp_fusion=quantization is None,
        **sizes,
    )
