"""What the matrix products share: the order of their tiles, the windows that their rows may be, and
what follows the sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rounding import cast

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}
# Tile rows of which programs that run at the same time share the columns.
GROUP_M = 8


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column, int64, where this program's tile of [M, N] begins: see `tile_at`."""
    return tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)


@triton.jit
def tile_at(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column, int64, where tile number ``program`` of [M, N] begins.

    Programs that run at the same time share rows and columns in L2.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    rows_in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    in_group = program % (GROUP_M * tiles_n)
    tile_m = group * GROUP_M + in_group % rows_in_group
    tile_n = in_group // rows_in_group
    return tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N


@triton.jit
def window_of(m, OH, OW, stride_h, stride_w, padding_h, padding_w):
    """Image, and row and column where the windows of output pixels ``m`` begin."""
    line = m // OW
    image = line // OH
    row = (line - image * OH) * stride_h - padding_h
    return image, row, (m - line * OW) * stride_w - padding_w


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """One of ``ACTIVATIONS`` of float32 values."""
    if ACTIVATION == 1:
        value = tl.where(value < 0.0, 0.0, value)  # keeps NaN
    if ACTIVATION == 2:
        value = 0.5 * value * (1.0 + tl.erf(value * 0.70710678118654752))
    return value


@triton.jit
def store_tile(y, value, bias, m, n, M, N, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """y [M, N] of the tile = activation(value + bias), value in float32."""
    if HAS_BIAS:
        value = value + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + m[:, None] * N + n[None, :],
        cast(activate(value, ACTIVATION), y.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x ``[..., K]`` as ``[M, K]`` whose rows are contiguous; a copy only where it must be."""
    K = x.shape[-1]
    rows = x.reshape(-1, K) if K else x.new_empty((x.shape[:-1].numel(), 0))
    return rows.contiguous() if rows.stride(-1) != 1 and K > 1 else rows
