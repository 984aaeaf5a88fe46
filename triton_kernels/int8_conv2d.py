"""int8_conv2d in Triton: quantize the images of x, then an implicit int8 matrix product.

Semantics and argument forms: :func:`compressops.ops.int8_conv2d`. Groups that make too little of a
matrix are summed element by element, from the weights that dp4a kernels read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from compressops.ops.conv import output_size
from compressops.ops.int8_conv2d import block_of, check, kernel_size, pack_as, unpack
from compressops.ops.winograd_domain import memory_format

from .quantize_images import quantize_images
from .rounding import cast
from .tiles import ACTIVATIONS, GROUP_M, activate, tile_at, window_of


@triton.jit
def store_outputs(
    y,
    sums,
    m,
    k,
    inside,
    image,
    x_scales,
    x_zeros,
    weight_scales,
    weight_sums,
    bias,
    K,
    area,
    LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """y of pixels ``m``, a column, and channels ``k``, a row, of all K; where ``inside``."""
    x_scale = tl.load(x_scales + image)
    x_zero = tl.load(x_zeros + image)
    sums -= x_zero * tl.load(weight_sums + k, mask=k < K, other=0)
    weight_scale = tl.load(weight_scales + k, mask=k < K, other=0.0)
    value = sums.to(tl.float32) * (x_scale * weight_scale)
    if HAS_BIAS:
        value = value + tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
    value = cast(activate(value, ACTIVATION), y.dtype.element_ty)
    if LAST:
        tl.store(y + m * K + k, value, mask=inside)
    else:
        tl.store(y + (image * K + k) * area + (m - image * area), value, mask=inside)


@triton.jit
def int8_conv2d_kernel(
    q,
    weight,
    x_scales,
    x_zeros,
    weight_scales,
    weight_sums,
    bias,
    y,
    M,
    K,
    groups,
    slots,
    H,
    W,
    OH,
    OW,
    area,
    R,
    S,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A program computes BLOCK_M output pixels of BLOCK_N of the K channels of a group, of
    q [N, H · W, groups, slots] and weight [groups, K, R · S, slots]."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_N)
    group = tl.program_id(0) // tiles
    place = tl.program_id(0) - group * tiles
    first_m, first_n = tile_at(place, M, K, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    # Of rows that are not there: any pixel, nobody stores their sums.
    image, row, column = window_of(
        tl.where(m < M, m, 0), OH, OW, stride_h, stride_w, padding_h, padding_w
    )
    # The padding's codes are the zero point, which is taken off with the sums of whole filters.
    x_zero = tl.load(x_zeros + image).to(tl.int8)
    depth = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(slots, BLOCK_K)
    filters = weight + (group.to(tl.int64) * K + n) * R * S * slots
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for step in range(0, R * S * blocks):
        tap = step // blocks
        c = (step - tap * blocks) * BLOCK_K + depth
        h, w = row + tap // S * dilation_h, column + tap % S * dilation_w
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
        pixel = (image * H + h) * W + w
        left = tl.load(
            q + (pixel[:, None] * groups + group) * slots + c[None, :],
            mask=inside[:, None] & (c[None, :] < slots),
            other=x_zero[:, None],
        )
        right = tl.load(
            filters[None, :] + tap * slots + c[:, None],
            mask=(n[None, :] < K) & (c[:, None] < slots),
            other=0,
        )
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
    store_outputs(
        y,
        sums,
        m[:, None],
        group * K + n[None, :],
        (m[:, None] < M) & (n[None, :] < K),
        image[:, None],
        x_scales,
        x_zeros,
        weight_scales,
        weight_sums,
        bias,
        K * groups,
        area,
        LAST,
        HAS_BIAS,
        ACTIVATION,
    )


@triton.jit
def int8_conv2d_few_kernel(
    q,
    weight,
    x_scales,
    x_zeros,
    weight_scales,
    weight_sums,
    bias,
    y,
    M,
    K,
    groups,
    C,
    pixel_slots,
    H,
    W,
    OH,
    OW,
    area,
    R,
    S,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M output pixels of BLOCK_N of all channels, of C inputs each, of q
    [N, H · W, pixel_slots] and weight [groups, ceil(K / 16), R, S, ceil(C / 4), 16, 4] (DEPTH = 4)
    or, where each channel is a group, [ceil(groups / 16), R, S, 16] (DEPTH = 1)."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    image, row, column = window_of(
        tl.where(m < M, m, 0), OH, OW, stride_h, stride_w, padding_h, padding_w
    )
    x_zero = tl.load(x_zeros + image)
    group = k // K
    chunks = tl.cdiv(C, DEPTH)
    if DEPTH == 1:
        panel, in_panel = k // 16, k % 16
    else:
        in_group = k - group * K
        panel, in_panel = group * tl.cdiv(K, 16) + in_group // 16, in_group % 16
    known = k < K * groups
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for tap in range(0, R * S):
        h, w = row + tap // S * dilation_h, column + tap % S * dilation_w
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
        pixel = (image * H + h) * W + w
        for c in range(0, C):
            codes = tl.load(
                q + pixel[:, None] * pixel_slots + (group * chunks * DEPTH + c)[None, :],
                mask=inside[:, None] & known[None, :],
                other=0,
            ).to(tl.int32)
            codes = tl.where(inside[:, None], codes, x_zero[:, None])
            chunk = (panel * R * S + tap) * chunks + c // DEPTH
            weights = tl.load(
                weight + (chunk * 16 + in_panel) * DEPTH + c % DEPTH, mask=known, other=0
            )
            sums += codes * weights.to(tl.int32)[None, :]
    store_outputs(
        y,
        sums,
        m[:, None],
        k[None, :],
        (m[:, None] < M) & known[None, :],
        image[:, None],
        x_scales,
        x_zeros,
        weight_scales,
        weight_sums,
        bias,
        K * groups,
        area,
        LAST,
        HAS_BIAS,
        ACTIVATION,
    )


def block_sizes(M: int, K: int, slots: int) -> dict[str, int]:
    """Tile and launch parameters for output pixels, output channels and slots of a group.

    Large tiles read each byte for more operations, where there are enough of them; a step lies in
    one tap.
    """
    depth = max(32, min(128, triton.next_power_of_2(slots)))
    if K <= 64 or M * K < 1024 * 1024:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": depth, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": depth, "num_warps": 8, "num_stages": 3}


def int8_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    weight_sums: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    symmetric: bool = True,
) -> torch.Tensor:
    """The op, on pairs for stride, padding and dilation; arguments and errors are its own."""
    check(
        *(x, weight, weight_scales, weight_sums, bias, stride, padding, dilation, groups),
        *(activation, x_scale, x_zero, symmetric),
    )
    (N, C, H, W), all_K = x.shape, weight_scales.shape[0]
    R, S = kernel_size(weight)
    OH, OW = output_size(x, (R, S), stride, padding, dilation)
    C, K = C // groups, all_K // groups
    form = memory_format(x)
    y = torch.empty((N, all_K, OH, OW), dtype=x.dtype, device=x.device, memory_format=form)
    if N == 0:
        return y
    panel, depth = block_of(all_K, C, groups, cpu=False)
    if weight.dim() == 4 or tuple(weight.shape[-2:]) != (panel, depth):
        weight = pack_as(unpack(weight, all_K, C), groups, panel, depth)
    # Channels of their own are read four at a time by other kernels, and lie in one group here.
    code_groups, code_depth = (1, 4) if depth == 1 else (groups, depth)
    M = N * OH * OW
    # Launches go to the current device. Without fused multiply-adds every backend rounds alike.
    with torch.cuda.device_of(x):
        q, x_scales, x_zeros = quantize_images(
            x, code_groups, code_depth, x_scale, x_zero, symmetric
        )
        slots = q.shape[3]
        operands = (
            *(q, weight.contiguous(), x_scales, x_zeros),
            *(weight_scales.contiguous(), weight_sums.contiguous()),
            *(x_scales if bias is None else bias.contiguous(), y, M, K, groups),
        )
        geometry = (H, W, OH, OW, OH * OW, R, S, *stride, *padding, *dilation)
        options = {
            "LAST": form == torch.channels_last,
            "HAS_BIAS": bias is not None,
            "ACTIVATION": ACTIVATIONS[activation],
            "enable_fp_fusion": False,
        }
        if depth == 16:
            sizes = block_sizes(M, K, slots)
            tiles = triton.cdiv(M, sizes["BLOCK_M"]) * triton.cdiv(K, sizes["BLOCK_N"])
            int8_conv2d_kernel[(tiles * groups,)](
                *operands, slots, *geometry, GROUP_M=GROUP_M, **options, **sizes
            )
        else:
            sizes = {"BLOCK_M": 32, "BLOCK_N": 32}
            grid = (triton.cdiv(M, 32) * triton.cdiv(all_K, 32),)
            int8_conv2d_few_kernel[grid](
                *operands, C, code_groups * slots, *geometry, DEPTH=depth, **options, **sizes
            )
    return y
