"""The gradients of bsr_linear, as sparse as its weight."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from .. import schema
from ..backends import register
from . import bsr
from .checks import require

GRAD_X = "bsr_linear_grad_x"
GRAD_VALUES = "bsr_linear_grad_values"


def bsr_linear_grad_x(
    grad: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    in_features: int,
) -> torch.Tensor:
    """``grad @ W``: the gradient of the ``x`` of :func:`bsr_linear`, by its transposed blocks.

    Args:
        grad: ``[..., N]`` float32, float16 or bfloat16, any strides: the gradient of the result,
            before its activation.
        values, crow_indices, col_indices: as in :func:`bsr_linear`, packed or not.
        in_features: K.

    Returns:
        ``[..., K]`` in the dtype of ``grad``; differentiable.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    return _call_grad_x(grad, values, crow_indices, col_indices, in_features)


def bsr_linear_grad_values(
    grad: torch.Tensor,
    x: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    block_size: Sequence[int],
) -> torch.Tensor:
    """The stored blocks of ``grad.T @ x``, and no other entry of it (sampled dense-dense product):
    the gradient of the ``values`` of :func:`bsr_linear`.

    Args:
        grad: ``[..., N]`` float32, float16 or bfloat16, any strides: the gradient of the result,
            before its activation.
        x: ``[..., K]``, dtype of ``grad``, as many rows.
        crow_indices, col_indices: as in :func:`bsr_linear`, not packed.
        block_size: r and c.

    Returns:
        float32 ``[nnz, r, c]``, 0 beyond N and K; differentiable.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    return _call_grad_values(grad, x, crow_indices, col_indices, list(block_size))


def values_gradient(
    op: str,
    parts: Iterable[tuple[torch.Tensor, torch.Tensor]],
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
) -> torch.Tensor:
    """That of an op which makes products of ``values``: the sum over pairs of ``grad`` and ``x``,
    one or more. Packed values have none."""
    if values.dim() == 4:
        raise NotImplementedError(f"{op}: argument 'values' has no gradient where it is packed")
    block_size = values.shape[1:]
    gradients = (
        bsr_linear_grad_values(grad, x, crow_indices, col_indices, block_size) for grad, x in parts
    )
    return functools.reduce(torch.add, gradients).to(values.dtype)


def check_grad_x(grad, values, crow_indices, col_indices, in_features) -> None:
    require(
        grad.dim() >= 1 and grad.dtype in bsr.DTYPES,
        *(GRAD_X, "grad", "float32, float16 or bfloat16 [..., N]", grad),
    )
    bsr.check_weight(GRAD_X, grad, values, crow_indices, col_indices, grad.shape[-1], in_features)


def _guard_grad_x(grad, values, crow_indices, col_indices, in_features) -> str | None:
    check_grad_x(grad, values, crow_indices, col_indices, in_features)
    bsr.check_indices_once(GRAD_X, values, crow_indices, col_indices, in_features)
    return bsr.refusal(values, grad.dtype, transposed=True)


def _eager_grad_x(grad, values, crow_indices, col_indices, in_features) -> torch.Tensor:
    bsr.check_indices(GRAD_X, values, crow_indices, col_indices, in_features)
    indices = (crow_indices, col_indices, grad.shape[-1], in_features)
    return bsr.products(grad, values, *indices, transposed=True).to(grad.dtype)


def _fake_grad_x(grad, values, crow_indices, col_indices, in_features) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _setup_grad_x(ctx, inputs, output) -> None:
    grad, values, crow_indices, col_indices, _ = inputs
    ctx.save_for_backward(grad, values, crow_indices, col_indices)


def _backward_grad_x(ctx, outer):
    grad, values, crow_indices, col_indices = ctx.saved_tensors
    first = second = None
    if ctx.needs_input_grad[0]:
        first = schema.public_op("bsr_linear")(
            outer, values, crow_indices, col_indices, grad.shape[-1]
        )
    if ctx.needs_input_grad[1]:
        second = values_gradient(GRAD_X, [(grad, outer)], values, crow_indices, col_indices)
    return first, second, None, None, None


def check_grad_values(grad, x, crow_indices, col_indices, block_size) -> None:
    op = GRAD_VALUES
    fits = grad.dim() >= 1 and grad.dtype in bsr.DTYPES
    require(fits, op, "grad", "float32, float16 or bfloat16 [..., N]", grad)
    fits = x.dtype == grad.dtype and x.device == grad.device and x.dim() == grad.dim()
    fits = fits and x.shape[:-1] == grad.shape[:-1]
    form = f"{grad.dtype} {[*grad.shape[:-1], 'K']} on {grad.device}"
    require(fits, op, "x", form, x)
    r, _ = bsr.check_block_size(op, block_size)
    bsr.check_index_tensors(op, crow_indices, col_indices, grad.shape[-1], r, grad.device)


def _guard_grad_values(grad, x, crow_indices, col_indices, block_size) -> str | None:
    check_grad_values(grad, x, crow_indices, col_indices, block_size)
    columns = bsr.grid((grad.shape[-1], x.shape[-1]), block_size)[1]
    bsr.check_index_values_once(GRAD_VALUES, crow_indices, col_indices, columns)
    r, c = block_size
    if r % bsr.CELL == 0 and c % bsr.CELL == 0:
        return None
    return f"blocks of {r} × {c}: its tiles want multiples of {bsr.CELL}"


def _eager_grad_values(grad, x, crow_indices, col_indices, block_size) -> torch.Tensor:
    r, c = block_size
    N, K = grad.shape[-1], x.shape[-1]
    rows, columns = bsr.grid((N, K), block_size)
    bsr.check_index_values(GRAD_VALUES, crow_indices, col_indices, columns)
    dense = bsr.rows_of(grad).float().t() @ bsr.rows_of(x).float()
    padded = F.pad(dense, (0, columns * c - K, 0, rows * r - N))
    tiles = padded.view(rows, r, columns, c).transpose(1, 2)
    return tiles[bsr.row_indices(crow_indices), col_indices.long()]


def _fake_grad_values(grad, x, crow_indices, col_indices, block_size) -> torch.Tensor:
    return grad.new_empty((col_indices.shape[0], *block_size), dtype=torch.float32)


def _setup_grad_values(ctx, inputs, output) -> None:
    grad, x, crow_indices, col_indices, _ = inputs
    ctx.save_for_backward(grad, x, crow_indices, col_indices)


def _backward_grad_values(ctx, outer):
    grad, x, crow_indices, col_indices = ctx.saved_tensors
    first = second = None
    if ctx.needs_input_grad[0]:
        first = schema.public_op("bsr_linear")(x, outer, crow_indices, col_indices, grad.shape[-1])
    if ctx.needs_input_grad[1]:
        second = bsr_linear_grad_x(grad, outer, crow_indices, col_indices, x.shape[-1])
    return first, second, None, None, None


_call_grad_x = register(
    GRAD_X,
    eager=_eager_grad_x,
    fake=_fake_grad_x,
    check=check_grad_x,
    setup_context=_setup_grad_x,
    backward=_backward_grad_x,
    guard=_guard_grad_x,
)
_call_grad_values = register(
    GRAD_VALUES,
    eager=_eager_grad_values,
    fake=_fake_grad_values,
    check=check_grad_values,
    setup_context=_setup_grad_values,
    backward=_backward_grad_values,
    guard=_guard_grad_values,
)
