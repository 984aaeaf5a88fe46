"""Calls the CUDA kernels of the block-sparse ops on a CPU, as ``harness`` builds them."""

from __future__ import annotations

import ctypes

import torch

from .harness import ACTIVATIONS, DTYPES, c_int64
from .harness import _call as call
from .harness import _pointer as pointer

KERNELS = {"auto": -1, "narrow": 0, "middle": 1, "wide": 2}


def bsr_multiply(
    library: ctypes.CDLL,
    x: torch.Tensor,
    weight: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out_features: int,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    quantization: tuple | None = None,
    *,
    transposed: bool = False,
    kernel: str = "auto",
    splits: int = 0,
    order: str = "forward",
    row_order: torch.Tensor | None = None,
) -> torch.Tensor:
    """bsr_linear or its gradient of x (``transposed``) on ``x`` ``[M, K]`` (dense rows); with
    ``quantization`` (weight_scales, weight_sums, x_scale, x_zero, symmetric) bsr_int8_linear."""
    (M, K), (values, crow, col) = x.shape, weight
    scales, sums, x_scale, x_zero, symmetric = quantization or (None, None, None, None, True)
    sorted_columns, blocks = torch.sort(col, stable=True) if transposed else (None, None)
    y = torch.full((M, out_features), 77.0, dtype=x.dtype)
    sizes = (M, out_features, K, x.stride(0), *values.shape, splits, KERNELS[kernel])
    scaling = 2 if x_scale is not None else int(not symmetric)
    sizes = (*sizes, ACTIVATIONS[activation], DTYPES[x.dtype], scaling)
    call(
        library.run_bsr_linear,
        *map(ctypes.c_int, (DTYPES[x.dtype], quantization is not None, transposed)),
        (c_int64 * len(sizes))(*sizes),
        *map(pointer, (x, values, crow, col, sorted_columns, blocks, bias)),
        *map(pointer, (scales, sums, x_scale, x_zero, y, row_order)),
        order=order,
    )
    return y


def bsr_grad_values(
    library: ctypes.CDLL,
    grad: torch.Tensor,
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    block_size: tuple[int, int],
    *,
    order: str = "forward",
) -> torch.Tensor:
    """bsr_linear_grad_values on contiguous ``grad`` ``[M, N]`` and ``x`` ``[M, K]``."""
    result = torch.full((len(col), *block_size), 77.0)
    sizes = (*grad.shape, x.shape[1], *result.shape)
    call(
        library.run_bsr_grad_values,
        ctypes.c_int(DTYPES[x.dtype]),
        (c_int64 * len(sizes))(*sizes),
        *map(pointer, (grad, x, crow, col, result)),
        order=order,
    )
    return result
