"""bsr_linear_grad_values in Triton: a program computes a tile of one stored block.

Semantics and argument forms: :func:`compressops.ops.bsr_linear_grad_values`. Blocks of fewer than
16 outputs or inputs leave the rest of a tile of the tensor cores empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from compressops.ops import bsr
from compressops.ops.bsr_linear_grad import GRAD_VALUES, check_grad_values

from .bsr import interpreted
from .tiles import rows_of


@triton.jit
def bsr_grad_values_kernel(
    grad,
    x,
    block_rows,
    col_indices,
    result,
    M,
    N,
    K,
    grad_stride,
    x_stride,
    R: tl.constexpr,
    C: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Of result [nnz, R, C], the blocks of grad [M, N].T @ x [M, K], a [BLOCK_R, BLOCK_C] tile."""
    TILES_R: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0).to(tl.int64)
    block, tile = program // (TILES_R * TILES_C), program % (TILES_R * TILES_C)
    out = tile // TILES_C * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = tile % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.load(block_rows + block).to(tl.int64) * R + out
    k = tl.load(col_indices + block).to(tl.int64) * C + inside
    # Indices that are none must not lead out of the arrays.
    in_n = (out < R) & (n >= 0) & (n < N)
    in_k = (inside < C) & (k >= 0) & (k < K)
    depth = tl.arange(0, BLOCK_M)
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + depth.to(tl.int64)
        left = tl.load(
            grad + m[None, :] * grad_stride + n[:, None],
            mask=in_n[:, None] & (m < M)[None, :],
            other=0,
        )
        right = tl.load(
            x + m[:, None] * x_stride + k[None, :], mask=(m < M)[:, None] & in_k[None, :], other=0
        )
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    place = result + block * (R * C) + out[:, None] * C + inside[None, :]
    tl.store(place, sums, mask=(out < R)[:, None] & (inside < C)[None, :])


def block_sizes(dtype: torch.dtype, block_size: Sequence[int]) -> dict[str, int]:
    """Tile and launch parameters for blocks of a size and grad and x in ``dtype``."""
    most = 32 if dtype == torch.float32 else 128
    rows, columns = (min(most, max(16, triton.next_power_of_2(side))) for side in block_size)
    return {
        **{"BLOCK_R": rows, "BLOCK_C": columns, "BLOCK_M": 32 if most == 32 else 64},
        **{"num_warps": 8 if rows * columns > 64 * 64 else 4, "num_stages": 3},
    }


def bsr_linear_grad_values(
    grad: torch.Tensor,
    x: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    block_size: Sequence[int],
) -> torch.Tensor:
    """The stored blocks of ``grad.T @ x``; see
    :func:`compressops.ops.bsr_linear_grad_values`."""
    check_grad_values(grad, x, crow_indices, col_indices, block_size)
    (r, c), nnz = block_size, len(col_indices)
    left, right = rows_of(grad), rows_of(x)
    (M, N), K = left.shape, right.shape[1]
    columns = bsr.grid((N, K), block_size)[1]
    bsr.check_index_values_once(GRAD_VALUES, crow_indices, col_indices, columns)
    result = grad.new_empty((nnz, r, c), dtype=torch.float32)
    if result.numel():
        sizes = block_sizes(grad.dtype, block_size)
        tiles = triton.cdiv(r, sizes["BLOCK_R"]) * triton.cdiv(c, sizes["BLOCK_C"])
        # Launches go to the current device.
        with torch.cuda.device_of(grad):
            bsr_grad_values_kernel[(nnz * tiles,)](
                *(left, right, bsr.rows_of_blocks(crow_indices, nnz), col_indices.contiguous()),
                *(result, M, N, K, left.stride(0), right.stride(0)),
                R=r,
                C=c,
                UPCAST=grad.dtype == torch.bfloat16 and interpreted(),
                **sizes,
            )
    return result
