"""Roundings that Triton's interpreter does differently from its compiler."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to_bfloat16(value):
    """The float32 nearest to ``value`` that bfloat16 holds: Triton's interpreter truncates."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)


@triton.jit
def cast(value, dtype: tl.constexpr):
    """A float32 ``value`` as ``dtype``, to the nearest."""
    if dtype == tl.bfloat16:
        value = round_to_bfloat16(value)
    return value.to(dtype)
