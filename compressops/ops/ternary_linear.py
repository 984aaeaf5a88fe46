"""Linear layer on weights −1, 0, 1 in 2 bits, with scales, and int8 activations (W2A8)."""

from __future__ import annotations

import torch

from ..backends import register
from . import packed_linear
from .checks import require

OP = "ternary_linear"
CODES = packed_linear.Codes(OP, bits=2, zero=1)


def ternary_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    out_features: int,
    group_size: int | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """``activation(x @ W.T + bias)`` with W of −α, 0 and α, and an α for each group of inputs.

    Each row of ``x`` is quantized on the fly to int8 by its own largest magnitude, as `int8_linear`
    does. A group's sum is exact; the groups are added in float32. A row that holds NaN or Inf gives
    a row of NaN. The gradient with respect to ``x`` takes its quantization for the identity.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16, any strides, K ≤ 131072.
        weight, scales: as `ternary_linear_pack` makes them.
        out_features: N.
        group_size: inputs that share an α, a multiple of 16; None: the whole row.
        bias: float ``[N]`` or None.
        activation: ``"none"``, ``"relu"`` or ``"gelu"`` (exact).

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    return _call(x, weight, scales, out_features, group_size, bias, activation)


def ternary_linear_pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepare a weight for :func:`ternary_linear` on its device.

    Args:
        codes: int8 ``[N, K]`` of −1, 0 and 1.
        scales: float32 ``[N, groups]``, groups = ceil(K / group_size); or one α for all, ``[]``.
        group_size: a multiple of 16, or None: the whole row.
        out: where the packed weight goes, contiguous uint8. None: into memory of its own.

    Returns:
        weight and scales, to be passed on as they are.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    op = f"{OP}_pack"
    CODES.check_group_size(op, group_size)
    packed_linear.check_codes(op, "codes", codes, -1, 1)
    groups = (codes.shape[0], CODES.groups(codes.shape[1], group_size))
    fits = scales.dtype == torch.float32 and tuple(scales.shape) in ((), groups)
    require(fits, op, "scales", f"float32 {list(groups)} or []", scales)
    weight = CODES.pack(codes, out)
    return weight, packed_linear.pack_group_values(scales.expand(groups))


def ternary_linear_rows(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    out_features: int,
    in_features: int,
    group_size: int | None = None,
) -> torch.Tensor:
    """Rows of a weight of :func:`ternary_linear`, each value exactly its code times its α.

    Only the codes of these rows are read, and they are read from the kernel's own form: a table of
    embeddings can also be the weight of an output layer.

    Args:
        rows: int32 or int64 ``[...]``, from 0 to out_features − 1.
        weight, scales: as `ternary_linear_pack` makes them.
        out_features, in_features: N and K.
        group_size: as for :func:`ternary_linear`.

    Returns:
        float32 ``[..., K]``.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
        IndexError: a row number is not from 0 to N − 1 (on a GPU an assertion of the device).
    """
    op = f"{OP}_rows"
    require(rows.dtype in (torch.int32, torch.int64), op, "rows", "int32 or int64", rows)
    # For the checks of everything else, an input of no rows.
    x = scales.new_empty(0, in_features)
    packed_linear.check(CODES, x, weight, scales, None, out_features, group_size, None, "none")
    fits = rows.device == weight.device
    require(fits, op, "rows", f"on {weight.device}, as weight is", rows)
    return packed_linear.dequantize_rows(
        CODES, weight, scales, rows, out_features, in_features, group_size
    )


def _check(x, weight, scales, out_features, group_size=None, bias=None, activation="none") -> None:
    packed_linear.check(CODES, x, weight, scales, None, out_features, group_size, bias, activation)


def _eager(x, weight, scales, out_features, group_size=None, bias=None, activation="none"):
    args = (x, weight, scales, None, out_features, group_size, bias, activation)
    return packed_linear.eager(CODES, *args)


def _fake(x, weight, scales, out_features, group_size=None, bias=None, activation="none"):
    return x.new_empty((*x.shape[:-1], out_features))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, scales, ctx.out_features, group_size, bias, activation = inputs
    packed_linear.save(ctx, x, weight, scales, None, group_size, bias, activation, output)


def _backward(ctx, grad):
    def call(x, weight, scales, zeros, bias):
        return ternary_linear(x, weight, scales, ctx.out_features, ctx.group_size, bias)

    # Compiled graphs leave out arguments at the end that have their default.
    ctx.needs_bias_grad = any(ctx.needs_input_grad[5:6])
    grad_x, grad_bias = packed_linear.backward(CODES, ctx, grad, call)
    return grad_x, None, None, None, None, grad_bias, None


_call = register(
    OP, eager=_eager, fake=_fake, check=_check, setup_context=_setup_context, backward=_backward
)
