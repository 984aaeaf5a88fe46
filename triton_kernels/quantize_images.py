"""Images of activations to int8, channels last, each by one scale.

Semantics: :func:`compressops.ops.int8_conv2d`. A first kernel finds the ranges of an image's parts,
and every program of a second those of the whole image from them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .quantize_rows import codes_of, scaling_of

# Parts of an image, and elements of one that a program finds the range of, at least.
MAX_PARTS, PART_ELEMENTS = 128, 16384


@triton.jit
def image_ranges_kernel(x, ranges, stride_n, elements, parts, span, BLOCK: tl.constexpr):
    """A program per part of an image without gaps -> ranges [N, parts, 3] float32: the bits of the
    largest magnitude, the lowest value below 0, the highest above."""
    image = (tl.program_id(0) // parts).to(tl.int64)
    first = (tl.program_id(0) % parts).to(tl.int64) * span
    offsets = tl.arange(0, BLOCK)
    # As bit patterns, magnitudes order like integers, with NaN above infinity: no NaN gets lost.
    top_bits = tl.zeros([BLOCK], tl.int32)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for start in range(0, span, BLOCK):
        i = first + start + offsets
        inside = (start + offsets < span) & (i < elements)
        values = tl.load(x + image * stride_n + i, mask=inside, other=0.0).to(tl.float32)
        top_bits = tl.maximum(top_bits, tl.abs(values).to(tl.int32, bitcast=True))
        low, high = tl.minimum(low, values), tl.maximum(high, values)
    to = ranges + tl.program_id(0).to(tl.int64) * 3
    tl.store(to, tl.max(top_bits, 0).to(tl.float32, bitcast=True))
    tl.store(to + 1, tl.min(low, 0))
    tl.store(to + 2, tl.max(high, 0))


@triton.jit
def quantize_images_kernel(
    x,
    ranges,
    q,
    x_scales,
    x_zeros,
    x_scale,
    x_zero,
    stride_n,
    stride_c,
    stride_p,
    pixels,
    channels,
    slots,
    pixel_slots,
    parts,
    STATIC: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Pixels of an image, a column, by slots of codes, a row -> q [N, pixels, pixel_slots]; of each
    ``slots`` the first ``channels`` are a group's, the others mean 0."""
    down, along = tl.cdiv(pixels, BLOCK_P), tl.cdiv(pixel_slots, BLOCK_C)
    image = (tl.program_id(0) // (down * along)).to(tl.int64)
    block = tl.program_id(0) % (down * along)
    part = tl.arange(0, PARTS)
    place = ranges + image * parts * 3 + part * 3
    top = tl.load(place, mask=part < parts, other=0.0).to(tl.int32, bitcast=True)
    low = tl.load(place + 1, mask=part < parts, other=0.0)
    high = tl.load(place + 2, mask=part < parts, other=0.0)
    finite, inverse, scale, zero = scaling_of(
        tl.max(top, 0),
        tl.min(low, 0),
        tl.max(high, 0),
        x_scale,
        x_zero,
        STATIC,
        ASYMMETRIC,
        HAS_ZERO,
    )
    if block == 0:
        tl.store(x_scales + image, scale)
        tl.store(x_zeros + image, zero.to(tl.int32))
    pixel = (block // along).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    slot = (block % along).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (pixel < pixels) & (slot < pixel_slots)
    c, group = slot % slots, slot // slots
    values = tl.load(
        x + image * stride_n + pixel * stride_p + (group * channels + c) * stride_c,
        mask=inside & (c < channels),
        other=0.0,
    ).to(tl.float32)
    codes = codes_of(values, finite, inverse, zero, STATIC or ASYMMETRIC)
    tl.store(q + (image * pixels + pixel) * pixel_slots + slot, codes, mask=inside)


def quantize_images(
    x: torch.Tensor,
    groups: int,
    depth: int,
    x_scale: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    symmetric: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x ``[N, C, H, W]`` to int8 ``[N, H · W, groups, slots]``, slots: C / groups rounded up to a
    multiple of ``depth``; scales float32 ``[N]`` and zero points int32 ``[N]``."""
    N, C, H, W = x.shape
    last = x.is_contiguous(memory_format=torch.channels_last)
    x = x if last else x.contiguous()
    channels = C // groups
    slots = -(-channels // depth) * depth
    q = torch.empty((N, H * W, groups, slots), dtype=torch.int8, device=x.device)
    x_scales = torch.empty(N, dtype=torch.float32, device=x.device)
    x_zeros = torch.empty(N, dtype=torch.int32, device=x.device)
    elements = C * H * W
    parts = min(MAX_PARTS, -(-elements // PART_ELEMENTS))
    ranges = torch.empty((N, parts, 3), dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(elements))
    image_ranges_kernel[(N * parts,)](
        *(x, ranges, x.stride(0), elements, parts, -(-elements // parts)), BLOCK=block
    )
    block_p, block_c = min(64, triton.next_power_of_2(H * W)), 32
    blocks = triton.cdiv(H * W, block_p) * triton.cdiv(groups * slots, block_c)
    # Without fused multiply-adds every backend rounds alike.
    quantize_images_kernel[(N * blocks,)](
        *(x, ranges, q, x_scales, x_zeros),
        x_scales if x_scale is None else x_scale,
        x_zeros if x_zero is None else x_zero,
        *(x.stride(0), 1 if last else H * W, C if last else 1),
        *(H * W, channels, slots, groups * slots, parts),
        STATIC=x_scale is not None,
        ASYMMETRIC=not symmetric,
        HAS_ZERO=x_zero is not None,
        PARTS=triton.next_power_of_2(parts),
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        enable_fp_fusion=False,
    )
    return q, x_scales, x_zeros
