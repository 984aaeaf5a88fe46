"""Linear layer on a block-sparse weight, and its gradients, which stay as sparse."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from ..backends import register
from . import bsr
from .checks import activate, bias_gradient, require

OP = "bsr_linear"
GRAD_X = "bsr_linear_grad_x"
GRAD_VALUES = "bsr_linear_grad_values"


def bsr_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    activation: str = "none",
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

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value. Columns
            that do not ascend are refused by :func:`bsr_linear_pack` alone; here blocks stored
            twice add up.

    Source: Gray, Radford & Kingma 2017, "GPU Kernels for Block-Sparse Weights".
    """
    return _call(x, values, crow_indices, col_indices, out_features, bias, activation)


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


def check(x, values, crow_indices, col_indices, out_features, bias=None, activation="none") -> None:
    bsr.check_epilogue(OP, x, bias, out_features, activation)
    check_weight(OP, x, values, crow_indices, col_indices, out_features, x.shape[-1])


def check_weight(op, like, values, crow_indices, col_indices, out_features, in_features) -> None:
    require(values.device == like.device, op, "values", f"on {like.device}", values)
    bsr.check_structure(
        op, values, crow_indices, col_indices, out_features, in_features, bsr.DTYPES, (1,)
    )


def _guard(
    x, values, crow_indices, col_indices, out_features, bias=None, activation="none"
) -> str | None:
    check(x, values, crow_indices, col_indices, out_features, bias, activation)
    bsr.check_indices_once(OP, values, crow_indices, col_indices, x.shape[-1])
    return refusal(x, values, transposed=False)


def refusal(x: torch.Tensor, values: torch.Tensor, transposed: bool) -> str | None:
    if values.dim() == 4:
        return "values that were packed for a CPU"
    # Operands of two dtypes are multiplied in float32.
    common = x.dtype if x.dtype == values.dtype else torch.float32
    return bsr.refusal(values.shape[1:], common, transposed)


def _eager(
    x, values, crow_indices, col_indices, out_features, bias=None, activation="none"
) -> torch.Tensor:
    bsr.check_indices(OP, values, crow_indices, col_indices, x.shape[-1])
    indices = (crow_indices, col_indices, out_features, x.shape[-1])
    dense = bsr.bsr_to_dense(values.float(), *indices)
    y = F.linear(x.float(), dense, None if bias is None else bias.float())
    # Its 0 · NaN are not ours: once more without what no stored block meets.
    if not y.isfinite().all():
        y = _products(x.float(), values.float(), *indices)
        y = y if bias is None else y + bias.float()
    return activate(y, activation).to(x.dtype)


def _products(x, values, crow_indices, col_indices, out_features, in_features) -> torch.Tensor:
    """``x @ W.T`` of stored blocks alone, whatever x holds."""
    blocks = bsr.unpacked(values)
    r, c = blocks.shape[1:]
    rows, columns = bsr.grid((out_features, in_features), (r, c))
    tiles = F.pad(bsr.rows_of(x), (0, columns * c - in_features)).unflatten(1, (-1, c))
    col = col_indices.long()
    # What a block holds beyond K is ignored, whatever it is.
    beyond = col[:, None] * c + torch.arange(c, device=x.device) >= in_features
    blocks = blocks.masked_fill(beyond[:, None], 0)
    products = torch.einsum("mbc,brc->bmr", tiles[:, col], blocks)
    sums = x.new_zeros(rows, tiles.shape[0], r)
    sums.index_add_(0, bsr.row_indices(crow_indices), products)
    y = sums.transpose(0, 1).reshape(len(tiles), rows * r)[:, :out_features]
    return y.reshape(*x.shape[:-1], out_features)


def _fake(x, values, crow_indices, col_indices, out_features, *_args, **_options) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _setup_context(ctx, inputs, output) -> None:
    x, values, crow_indices, col_indices, ctx.out_features, bias, ctx.activation = inputs
    saved = output if ctx.activation == "relu" else None
    ctx.save_for_backward(x, values, crow_indices, col_indices, bias, saved)


def _backward(ctx, grad):
    x, values, crow_indices, col_indices, bias, output = ctx.saved_tensors
    # Compiled graphs leave out arguments at the end that have their default.
    needs_x, needs_values, _, _, _, needs_bias = (*ctx.needs_input_grad, False)[:6]
    if ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    elif ctx.activation == "gelu":
        before = _call(x, values, crow_indices, col_indices, ctx.out_features, bias, "none")
        grad = torch.ops.aten.gelu_backward(grad, before)
    grad_x = grad_values = grad_bias = None
    if needs_x:
        grad_x = bsr_linear_grad_x(grad, values, crow_indices, col_indices, x.shape[-1])
    if needs_values:
        grad_values = values_gradient(OP, [(grad, x)], values, crow_indices, col_indices)
    if bias is not None and needs_bias:
        grad_bias = bias_gradient(bsr.rows_of(grad), 0, bias)
    return grad_x, grad_values, None, None, None, grad_bias, None


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
    check_weight(GRAD_X, grad, values, crow_indices, col_indices, grad.shape[-1], in_features)


def _guard_grad_x(grad, values, crow_indices, col_indices, in_features) -> str | None:
    check_grad_x(grad, values, crow_indices, col_indices, in_features)
    bsr.check_indices_once(GRAD_X, values, crow_indices, col_indices, in_features)
    return refusal(grad, values, transposed=True)


def _eager_grad_x(grad, values, crow_indices, col_indices, in_features) -> torch.Tensor:
    bsr.check_indices(GRAD_X, values, crow_indices, col_indices, in_features)
    indices = (crow_indices, col_indices, grad.shape[-1], in_features)
    return (grad.float() @ bsr.bsr_to_dense(values.float(), *indices)).to(grad.dtype)


def _fake_grad_x(grad, values, crow_indices, col_indices, in_features) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _setup_grad_x(ctx, inputs, output) -> None:
    grad, values, crow_indices, col_indices, _ = inputs
    ctx.save_for_backward(grad, values, crow_indices, col_indices)


def _backward_grad_x(ctx, outer):
    grad, values, crow_indices, col_indices = ctx.saved_tensors
    first = second = None
    if ctx.needs_input_grad[0]:
        first = bsr_linear(outer, values, crow_indices, col_indices, grad.shape[-1])
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
        first = bsr_linear(x, outer, crow_indices, col_indices, grad.shape[-1])
    if ctx.needs_input_grad[1]:
        second = bsr_linear_grad_x(grad, outer, crow_indices, col_indices, x.shape[-1])
    return first, second, None, None, None


_call = register(
    OP,
    eager=_eager,
    fake=_fake,
    check=check,
    setup_context=_setup_context,
    backward=_backward,
    guard=_guard,
)
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
