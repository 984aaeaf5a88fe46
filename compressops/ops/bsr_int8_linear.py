"""Linear layer on a block-sparse int8 weight and dynamically quantized int8 activations."""

from __future__ import annotations

import torch

from ..backends import register
from . import bsr
from .bsr_linear_grad import bsr_linear_grad_x
from .checks import activate, bias_gradient, require
from .int8_linear import check_quantization, max_terms, quantize_x

OP = "bsr_int8_linear"
DEPTH = 4  # inputs that VNNI multiplies at once


def bsr_int8_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    weight_scales: torch.Tensor,
    weight_sums: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    symmetric: bool = True,
    row_order: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`int8_linear` with a weight ``[N, K]`` in block-sparse rows (BSR).

    Each row of ``x`` is quantized as there, the sums of products are exact, and they are scaled
    and finished as there. A row of ``x`` that holds NaN or Inf gives a row of NaN. The gradient
    with respect to ``x`` takes the quantization of ``x`` for the identity.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16, any strides; K ≤ 131072, and ≤ 65536 where
            the quantization is asymmetric or static.
        values: int8 ``[nnz, r, c]``, c a multiple of 4, the stored blocks by rows, or packed; what
            they hold beyond N and K is ignored.
        crow_indices: int32 ``[ceil(N / r) + 1]``, where each row of blocks begins in ``values``.
        col_indices: int32 ``[nnz]``, columns of the grid of blocks, ascending in each row.
        weight_scales: float32 ``[N]``.
        weight_sums: int32 ``[N]``, the sum of each row of the int8 weight.
            :func:`bsr_int8_linear_pack` makes it, and the three before it.
        bias: float ``[N]`` or None.
        activation: ``"none"``, ``"relu"`` or ``"gelu"`` (exact).
        x_scale, x_zero, symmetric: as in :func:`int8_linear`.
        row_order: as in :func:`bsr_linear`.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    return _call(
        *(x, values, crow_indices, col_indices, weight_scales, weight_sums),
        *(bias, activation, x_scale, x_zero, symmetric, row_order),
    )


def bsr_int8_linear_pack(
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    in_features: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prepare a weight for :func:`bsr_int8_linear` on its device, after all checks of its indices.

    On a CPU the blocks are cut into strips as :func:`bsr_linear_pack` does, each ``[c / 4, strip,
    4]``.

    Args:
        values: int8 ``[nnz, r, c]``, c a multiple of 4.
        crow_indices, col_indices: as in :func:`bsr_int8_linear`.
        out_features, in_features: N and K.

    Returns:
        values, crow_indices, col_indices and weight_sums, to be passed on as they are.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    op = f"{OP}_pack"
    _check_weight(op, values, crow_indices, col_indices, out_features, in_features)
    packed = bsr.pack(op, values, crow_indices, col_indices, out_features, in_features, DEPTH)
    blocks = bsr.unpacked(packed[0])
    rows = bsr.row_indices(packed[1])
    sums = blocks.new_zeros(len(packed[1]) - 1, blocks.shape[1], dtype=torch.int32)
    sums.index_add_(0, rows, blocks.sum(2, dtype=torch.int32))
    return *packed, sums.flatten()[:out_features].contiguous()


def _check_weight(op, values, crow_indices, col_indices, out_features, in_features) -> None:
    bsr.check_structure(
        op, values, crow_indices, col_indices, out_features, in_features, (torch.int8,), (DEPTH,)
    )
    fits = bsr.block_size_of(values)[1] % DEPTH == 0
    require(fits, op, "values", "of blocks whose columns are a multiple of 4", values)


def check(
    x,
    values,
    crow_indices,
    col_indices,
    weight_scales,
    weight_sums,
    bias=None,
    activation="none",
    x_scale=None,
    x_zero=None,
    symmetric=True,
    row_order=None,
) -> None:
    fits = weight_scales.dim() == 1 and weight_scales.dtype == torch.float32
    fits = fits and weight_scales.device == x.device
    require(fits, OP, "weight_scales", f"float32 [N] on {x.device}", weight_scales)
    N = weight_scales.shape[0]
    bsr.check_epilogue(OP, x, bias, N, activation)
    check_quantization(OP, x, x_scale, x_zero, symmetric)
    K, most = x.shape[-1], max_terms(x_scale, symmetric)
    require(most >= K, OP, "x", f"at most {most} wide (int32 sums)", x)
    require(values.device == x.device, OP, "values", f"on {x.device}, as x is", values)
    _check_weight(OP, values, crow_indices, col_indices, N, K)
    fits = weight_sums.dtype == torch.int32 and tuple(weight_sums.shape) == (N,)
    fits = fits and weight_sums.device == x.device
    require(fits, OP, "weight_sums", f"int32 [{N}] on {x.device}", weight_sums)
    bsr.check_row_order(OP, row_order, crow_indices, values=False)


def _guard(
    x,
    values,
    crow_indices,
    col_indices,
    weight_scales,
    weight_sums,
    bias=None,
    activation="none",
    x_scale=None,
    x_zero=None,
    symmetric=True,
    row_order=None,
) -> str | None:
    weight = (values, crow_indices, col_indices, weight_scales, weight_sums)
    check(x, *weight, bias, activation, x_scale, x_zero, symmetric, row_order)
    bsr.check_indices_once(OP, values, crow_indices, col_indices, x.shape[-1])
    bsr.check_row_order(OP, row_order, crow_indices)
    return bsr.refusal(values, x.dtype)


def _eager(
    x,
    values,
    crow_indices,
    col_indices,
    weight_scales,
    weight_sums,
    bias=None,
    activation="none",
    x_scale=None,
    x_zero=None,
    symmetric=True,
    row_order=None,
) -> torch.Tensor:
    bsr.check_indices(OP, values, crow_indices, col_indices, x.shape[-1])
    bsr.check_row_order(OP, row_order, crow_indices)
    q, scales, zeros = quantize_x(x, x_scale, x_zero, symmetric)
    shape = (weight_scales.shape[0], x.shape[-1])
    dense = bsr.bsr_to_dense(values.double(), crow_indices, col_indices, *shape)
    # float64 holds every sum below 2^53 exactly, and has a matrix product on every device.
    y = ((q.double() - zeros) @ dense.t()).float() * (scales * weight_scales)
    if bias is not None:
        y = y + bias.float()
    return activate(y, activation).to(x.dtype)


def _fake(x, values, crow_indices, col_indices, weight_scales, *_args, **_options) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight_scales.shape[0]))


def _setup_context(ctx, inputs, output) -> None:
    x, *weight, bias, ctx.activation, x_scale, x_zero, ctx.symmetric, row_order = inputs
    ctx.in_features = x.shape[-1]
    kept = {"none": None, "relu": output, "gelu": x}[ctx.activation]
    ctx.save_for_backward(*weight, bias, x_scale, x_zero, row_order, kept)


def _backward(ctx, grad):
    *weight, bias, x_scale, x_zero, row_order, kept = ctx.saved_tensors
    if ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, kept, 0)
    elif ctx.activation == "gelu":
        quantization = (x_scale, x_zero, ctx.symmetric)
        before = _call(kept, *weight, bias, "none", *quantization, row_order)
        grad = torch.ops.aten.gelu_backward(grad, before)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        values, crow_indices, col_indices, weight_scales, _ = weight
        scaled = grad * weight_scales.to(grad.dtype)
        codes = bsr.unpacked(values).to(grad.dtype)
        grad_x = bsr_linear_grad_x(scaled, codes, crow_indices, col_indices, ctx.in_features)
    # Compiled graphs leave out arguments at the end that have their default.
    if bias is not None and any(ctx.needs_input_grad[6:7]):
        grad_bias = bias_gradient(bsr.rows_of(grad), 0, bias)
    return grad_x, *(None,) * 5, grad_bias, *(None,) * 5


_call = register(
    OP,
    eager=_eager,
    fake=_fake,
    check=check,
    setup_context=_setup_context,
    backward=_backward,
    guard=_guard,
)
