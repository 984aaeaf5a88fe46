"""Winograd's transforms in one dimension, on tuples of tensors.

``compressops/ops/winograd_transform.py`` derives the matrices.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def input_transform(d, ALPHA: tl.constexpr):
    """Bᵀ d of a tuple of ALPHA tensors; the points are those of ``ops.winograd_transform``."""
    if ALPHA == 1:
        return d
    elif ALPHA == 4:
        return (d[0] - d[2], d[2] + d[1], d[2] - d[1], d[1] - d[3])
    elif ALPHA == 6:
        even_p, odd_p = d[4] - 2.25 * d[2], 0.625 * (d[3] - 2.25 * d[1])
        even_q, odd_q = d[4] - 0.390625 * d[2], 1.5 * (d[3] - 0.390625 * d[1])
        return (
            0.87890625 * d[0] + (d[4] - 2.640625 * d[2]),
            even_p + odd_p,
            even_p - odd_p,
            even_q + odd_q,
            even_q - odd_q,
            0.87890625 * d[1] + (d[5] - 2.640625 * d[3]),
        )
    else:
        even_1, odd_1 = d[2] + d[6] - 4.25 * d[4], d[1] + d[5] - 4.25 * d[3]
        even_2 = d[6] + 0.25 * d[2] - 1.25 * d[4]
        odd_2 = 0.5 * d[1] - 2.5 * d[3] + 2.0 * d[5]
        even_3 = d[6] + 4.0 * d[2] - 5.0 * d[4]
        odd_3 = 2.0 * d[1] - 2.5 * d[3] + 0.5 * d[5]
        return (
            d[0] - d[6] + 5.25 * (d[4] - d[2]),
            even_1 + odd_1,
            even_1 - odd_1,
            even_2 + odd_2,
            even_2 - odd_2,
            even_3 + odd_3,
            even_3 - odd_3,
            d[7] - d[1] + 5.25 * (d[3] - d[5]),
        )


@triton.jit
def pair(plus, minus, ODD: tl.constexpr):
    """What the products at the points p and -p add to an even or an odd row, but for p's power."""
    return plus - minus if ODD else plus + minus


@triton.jit
def output_transform(m, ALPHA: tl.constexpr, TILE: tl.constexpr):
    """Aᵀ m of a tuple of ALPHA tensors, a tuple of TILE."""
    if ALPHA == 1:
        return m
    else:
        outputs = ()
        for i in tl.static_range(TILE):
            if ALPHA == 6:
                value = 0.625**i * pair(m[1], m[2], i % 2) + 1.5**i * pair(m[3], m[4], i % 2)
            else:
                value = pair(m[1], m[2], i % 2)
            if ALPHA == 8:
                value += 2.0**i * pair(m[3], m[4], i % 2) + 0.5**i * pair(m[5], m[6], i % 2)
            if i == 0:
                value += m[0]
            if i == TILE - 1:
                # The published matrices of alpha = 4 carry the sign of infinity here.
                value += -m[ALPHA - 1] if ALPHA == 4 else m[ALPHA - 1]
            outputs += (value,)
        return outputs
