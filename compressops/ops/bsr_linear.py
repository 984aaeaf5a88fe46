"""Linear layer on a block-sparse weight."""

from __future__ import annotations

import torch

from ..backends import register
from . import bsr
from .bsr_linear_grad import bsr_linear_grad_x, values_gradient
from .checks import activate, bias_gradient

OP = "bsr_linear"


def bsr_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    row_order: torch.Tensor | None = None,
) -> torch.Tensor:
    """``activation(x @ W.T + bias)`` with W ``[N, K]`` in block-sparse rows (BSR).

    Products are summed in float32. Only stored blocks are multiplied: an Inf or NaN in ``x`` that
    no stored block of a row meets leaves that row's output as it is, where a dense layer would
    multiply it by 0. What blocks hold beyond N or K is ignored.

    Differentiable with respect to ``x``, ``values`` and ``bias``, any number of times; the
    gradients multiply the stored blocks alone (:func:`bsr_linear_grad_x`,
    :func:`bsr_linear_grad_values`). Packed values have no gradient.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16, any strides.
        values: ``[nnz, r, c]`` of one of these dtypes, the stored blocks by rows, or all three as
            :func:`bsr_linear_pack` made them. Any r and c. The CPU's
            kernels want r to be a multiple of 16; CUDA's have none for others, nor for a c that is
            no whole number of 16 bytes (r and c change places for the gradient of x, and that of
            the values wants both to be multiples of 16): Triton serves those.
        crow_indices: int32 ``[ceil(N / r) + 1]``, where each row of blocks begins in ``values``.
        col_indices: int32 ``[nnz]``, columns of the grid of blocks, ascending in each row.
        out_features: N.
        bias: float ``[N]`` or None.
        activation: ``"none"``, ``"relu"`` or ``"gelu"`` (exact).
        row_order: int32 ``[ceil(N / r)]``, a permutation of the rows of blocks, or None. In this
            order CUDA's kernel takes them, so that those which :func:`bsr_row_order` puts side by
            side share inputs; other backends ignore it. It changes no result, but the order in
            which CUDA's kernel for few rows of ``x`` adds up floats.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value. Columns
            that do not ascend are refused by :func:`bsr_linear_pack` alone; here blocks stored
            twice add up.

    Source: Gray, Radford & Kingma 2017, "GPU Kernels for Block-Sparse Weights".
    """
    return _call(x, values, crow_indices, col_indices, out_features, bias, activation, row_order)


def bsr_linear_pack(
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    in_features: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prepare a weight for :func:`bsr_linear` on its device, after all checks of its indices.

    On a CPU the blocks are cut into strips of up to 16 outputs, the largest power of two that
    divides r, and transposed: ``[nnz · r / strip, c, strip, 1]`` in the dtype of ``values``, with
    indices of the strips. Elsewhere nothing changes.

    Args:
        values, crow_indices, col_indices: as in :func:`bsr_linear`.
        out_features, in_features: N and K.

    Returns:
        values, crow_indices, col_indices, to be passed on as they are.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    op = f"{OP}_pack"
    bsr.check_structure(
        op, values, crow_indices, col_indices, out_features, in_features, bsr.DTYPES, (1,)
    )
    return bsr.pack(op, values, crow_indices, col_indices, out_features, in_features)


def check(
    x,
    values,
    crow_indices,
    col_indices,
    out_features,
    bias=None,
    activation="none",
    row_order=None,
) -> None:
    bsr.check_epilogue(OP, x, bias, out_features, activation)
    bsr.check_weight(OP, x, values, crow_indices, col_indices, out_features, x.shape[-1])
    bsr.check_row_order(OP, row_order, crow_indices, values=False)


def _guard(
    x,
    values,
    crow_indices,
    col_indices,
    out_features,
    bias=None,
    activation="none",
    row_order=None,
) -> str | None:
    check(x, values, crow_indices, col_indices, out_features, bias, activation, row_order)
    bsr.check_indices_once(OP, values, crow_indices, col_indices, x.shape[-1])
    bsr.check_row_order(OP, row_order, crow_indices)
    return bsr.refusal(values, x.dtype)


def _eager(
    x,
    values,
    crow_indices,
    col_indices,
    out_features,
    bias=None,
    activation="none",
    row_order=None,
) -> torch.Tensor:
    bsr.check_indices(OP, values, crow_indices, col_indices, x.shape[-1])
    bsr.check_row_order(OP, row_order, crow_indices)
    y = bsr.products(x, values, crow_indices, col_indices, out_features, x.shape[-1])
    y = y if bias is None else y + bias.float()
    return activate(y, activation).to(x.dtype)


def _fake(x, values, crow_indices, col_indices, out_features, *_args, **_options) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _setup_context(ctx, inputs, output) -> None:
    x, *weight, ctx.out_features, bias, ctx.activation, row_order = inputs
    saved = output if ctx.activation == "relu" else None
    ctx.save_for_backward(x, *weight, bias, row_order, saved)


def _backward(ctx, grad):
    x, values, crow_indices, col_indices, bias, row_order, output = ctx.saved_tensors
    # Compiled graphs leave out arguments at the end that have their default.
    needs_x, needs_values, _, _, _, needs_bias = (*ctx.needs_input_grad, False)[:6]
    if ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    elif ctx.activation == "gelu":
        weight = (values, crow_indices, col_indices, ctx.out_features)
        before = _call(x, *weight, bias, "none", row_order)
        grad = torch.ops.aten.gelu_backward(grad, before)
    grad_x = grad_values = grad_bias = None
    if needs_x:
        grad_x = bsr_linear_grad_x(grad, values, crow_indices, col_indices, x.shape[-1])
    if needs_values:
        grad_values = values_gradient(OP, [(grad, x)], values, crow_indices, col_indices)
    if bias is not None and needs_bias:
        grad_bias = bias_gradient(bsr.rows_of(grad), 0, bias)
    return grad_x, grad_values, None, None, None, grad_bias, None, None


_call = register(
    OP,
    eager=_eager,
    fake=_fake,
    check=check,
    setup_context=_setup_context,
    backward=_backward,
    guard=_guard,
)
