"""int4_linear and ternary_linear in Triton: a matrix product on codes of 2 or 4 bits.

Semantics and argument forms: :func:`compressops.ops.int4_linear`. The weight is read as
``Codes.pack_fragments`` has it: a tile of 512 bytes whole, 16 bytes a lane. Its codes become
``code − zero`` in registers: int8 where x is quantized, else numbers of x's dtype, of which all are
exact. The scale of a group multiplies its sum, in float32; a weight that was scaled first would be
rounded to x's dtype, and a small scale would be lost in float16.

With few rows the codes are all the traffic, N · K · bits / 8 bytes, and the scales add 32 bits a
group: 1/16 at groups of 128 inputs of 4 bits, 1/8 of 2 bits. A tile holds 64 inputs. Where groups
begin within one it is multiplied once for each of them, x being 0 outside: groups of 32 take twice
the multiplications, and as many bytes from the caches, but not from memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from compressops.ops.packed_linear import Codes, check, group_values

from .quantize_rows import quantize_rows
from .tiles import ACTIVATIONS, GROUP_M, rows_of, store_tile, tile_of_program

# Of a tile of the packing: its inputs, hence those of the smallest step, and its bytes.
TILE_K: tl.constexpr = tl.constexpr(64)
TILE_BYTES: tl.constexpr = tl.constexpr(512)
# BLOCK_M, BLOCK_N, BLOCK_K at most, warps and stages for few rows, for small and for large results.
# Narrow tiles spread few rows' weight over more multiprocessors, and long ones keep more of it on
# its way; large ones read each byte for more operations. float32 has no tensor cores, and holds a
# whole step's operands in registers: larger tiles would spill.
TILES = {
    torch.int8: ((16, 32, 256, 4, 4), (64, 64, 128, 4, 3), (128, 128, 128, 8, 3)),
    torch.float16: ((16, 32, 128, 4, 4), (64, 64, 64, 4, 3), (128, 128, 64, 8, 3)),
    torch.float32: ((16, 32, 64, 4, 3), (32, 32, 64, 8, 3), (32, 32, 64, 8, 3)),
}
TILES[torch.bfloat16] = TILES[torch.float16]


@triton.jit
def unpack(packed, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes [BLOCK_N, BLOCK_K] int8 of their bytes [panels, BLOCK_K · 8] in the order of
    ``Codes.pack_fragments``.

    A lane's 16 bytes hold what it gives to ``mma.sync``, so that nothing has to move between lanes.
    """
    if BITS == 4:
        codes = tl.join(packed & 15, packed >> 4)
    else:
        even = tl.join(packed & 3, (packed >> 4) & 3)
        codes = tl.join(even, tl.join((packed >> 2) & 3, packed >> 6))
    OUTPUTS: tl.constexpr = 8 // BITS
    WORDS: tl.constexpr = BITS // 2
    PANELS: tl.constexpr = BLOCK_N // (8 * OUTPUTS)
    TILES_K: tl.constexpr = BLOCK_K // TILE_K
    codes = tl.reshape(codes, (PANELS, TILES_K, 8, 4, OUTPUTS, WORDS, 4, 8 // BITS))
    codes = tl.permute(codes, (0, 4, 2, 1, 5, 7, 3, 6))
    return tl.reshape(codes, (BLOCK_N, BLOCK_K)).to(tl.int8)


@triton.jit
def packed_linear_kernel(
    x,
    weight,
    x_scales,
    scales,
    zeros,
    bias,
    y,
    M,
    N,
    K,
    x_stride,
    group_size,
    groups,
    steps,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A program computes a [BLOCK_M, BLOCK_N] tile of y [M, N] = x [M, K] @ W.T; x is int8 with
    x_scales [M], or float. A group of inputs is summed in so many steps of BLOCK_K inputs, ALIGNED
    where they fill it; else its first and last step hold other groups' inputs too."""
    first_m, first_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    in_m, in_n = m < M, n < N
    depth = tl.arange(0, BLOCK_K)
    # Panels of so many outputs, each a row of tiles.
    OUTPUTS: tl.constexpr = TILE_BYTES * 8 // (BITS * TILE_K)
    panel = first_n // OUTPUTS + tl.arange(0, BLOCK_N // OUTPUTS)
    panel_bytes = tl.cdiv(K, TILE_K) * TILE_BYTES
    in_panel = panel < tl.cdiv(N, OUTPUTS)
    place = tl.arange(0, BLOCK_K // TILE_K * TILE_BYTES)
    QUANTIZED: tl.constexpr = x.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if QUANTIZED else tl.float32
    sums = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, groups * steps):
        group = step // steps
        if ALIGNED:
            first = step * BLOCK_K
            k = first + depth
            in_k = k < K
        else:
            start = group * group_size
            first = start // TILE_K * TILE_K + step % steps * BLOCK_K
            k = first + depth
            in_k = (k >= start) & (k < tl.minimum(K, start + group_size))
        left = tl.load(
            x + m[:, None] * x_stride + k[None, :], mask=in_m[:, None] & in_k[None, :], other=0
        )
        if UPCAST:
            left = left.to(tl.float32)
        # Codes of no input of the group count 0 times: x is 0 there.
        byte = first // TILE_K * TILE_BYTES + place
        packed = tl.load(
            weight + panel[:, None] * panel_bytes + byte[None, :],
            mask=in_panel[:, None] & (byte < panel_bytes)[None, :],
            other=0,
        )
        codes = unpack(packed, BITS, BLOCK_N, BLOCK_K)
        if HAS_ZEROS:
            codes -= tl.load(zeros + group * N + n, mask=in_n, other=0).to(tl.int8)[:, None]
        else:
            codes -= ZERO
        right = tl.trans(codes.to(left.dtype))
        sums = tl.dot(left, right, sums, input_precision="ieee", out_dtype=SUM)
        if not ONE_GROUP:  # noqa: SIM102 - decided as it compiles
            if step % steps == steps - 1:
                scale = tl.load(scales + group * N + n, mask=in_n, other=0.0)
                total += sums.to(tl.float32) * scale[None, :]
                sums = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    if ONE_GROUP:
        total = sums.to(tl.float32) * tl.load(scales + n, mask=in_n, other=0.0)[None, :]
    if QUANTIZED:
        total = total * tl.load(x_scales + m, mask=in_m, other=0.0)[:, None]
    store_tile(y, total, bias, m, n, M, N, HAS_BIAS, ACTIVATION)


def block_sizes(M: int, N: int, dtype: torch.dtype, span: int) -> dict[str, int]:
    """Tile and launch parameters for a shape and x in ``dtype`` (int8 where it is quantized).
    A group's steps span so many inputs, see `span_of`.

    BLOCK_K is the largest that pads them by at most an eighth.
    """
    tile = TILES[dtype][0 if M <= 16 else 1 if M * N < 1024 * 1024 else 2]
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    sizes = dict(zip(names, tile, strict=True))
    tiles = triton.cdiv(span, TILE_K.value)
    while sizes["BLOCK_K"] > TILE_K.value:
        at_once = sizes["BLOCK_K"] // TILE_K.value
        if triton.cdiv(tiles, at_once) * at_once <= tiles * 9 / 8:
            break
        sizes["BLOCK_K"] //= 2
    return sizes


def span_of(group_size: int, groups: int) -> int:
    """Inputs from the tile in which a group begins to its end, at most."""
    return group_size + (TILE_K.value - math.gcd(group_size, TILE_K.value) if groups > 1 else 0)


def packed_linear(
    kind: Codes,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    out_features: int,
    group_size: int | None,
    bias: torch.Tensor | None,
    activation: str,
    quantize_x: bool,
) -> torch.Tensor:
    """The op of ``kind``: arguments, result and errors are those of its public function.

    Where x is not quantized, float32 must hold the sums of ``x · (code − zero)``.
    """
    check(kind, x, weight, scales, zeros, out_features, group_size, bias, activation)
    N, K = out_features, x.shape[-1]
    y = x.new_empty((*x.shape[:-1], N))
    if y.numel() == 0:
        return y
    rows, groups = rows_of(x), kind.groups(K, group_size)
    if weight.dim() == 1:  # the CPU's panels
        weight = kind.pack_fragments(kind.unpack(weight, N, K))
    scales = group_values(scales, N, groups).t().contiguous()
    if zeros is not None:
        zeros = group_values(zeros, N, groups).t().contiguous()
    # Groups longer than the row are the row.
    group_size = min(group_size or K, max(1, K))
    # Triton's interpreter multiplies the bits of bfloat16 numbers as integers.
    interpreted = not isinstance(packed_linear_kernel, triton.JITFunction)
    upcast = interpreted and x.dtype == torch.bfloat16 and not quantize_x
    # Launches go to the current device.
    with torch.cuda.device_of(x):
        x_scales = scales
        if quantize_x:
            rows, x_scales, _ = quantize_rows(rows)
        M = rows.shape[0]
        span = span_of(group_size, groups)
        sizes = block_sizes(M, N, rows.dtype, span)
        steps = triton.cdiv(span, sizes["BLOCK_K"])
        grid = (triton.cdiv(M, sizes["BLOCK_M"]) * triton.cdiv(N, sizes["BLOCK_N"]),)
        packed_linear_kernel[grid](
            *(rows, weight.contiguous(), x_scales, scales, scales if zeros is None else zeros),
            scales if bias is None else bias.contiguous(),
            *(y, M, N, K, rows.stride(0), group_size, groups, steps),
            BITS=kind.bits,
            ZERO=kind.zero,
            HAS_ZEROS=zeros is not None,
            ALIGNED=groups == 1 or group_size % sizes["BLOCK_K"] == 0,
            ONE_GROUP=groups == 1,
            UPCAST=upcast,
            HAS_BIAS=bias is not None,
            ACTIVATION=ACTIVATIONS[activation],
            GROUP_M=GROUP_M,
            **sizes,
        )
    return y
