"""Linear layer on 4-bit weights with a scale a group; activations int8 (W4A8) or as they are."""

from __future__ import annotations

import torch

from ..backends import register
from . import packed_linear
from .checks import require

OP = "int4_linear"
CODES = packed_linear.Codes(OP, bits=4, zero=8)


def int4_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    out_features: int,
    group_size: int | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    quantize_x: bool = True,
) -> torch.Tensor:
    """``activation(x @ W.T + bias)`` with W of 4-bit integers and a scale for each group of inputs.

    ``W[n, k] = (code[n, k] − zero[n, k // group_size]) · scale[n, k // group_size]``. Each row of
    ``x`` is quantized on the fly to int8 by its own largest magnitude, as `int8_linear` does. A
    group's sum is exact; the groups are added in float32. A row that holds NaN or Inf gives a row
    of NaN. The gradient with respect to ``x`` takes its quantization for the identity.

    With ``quantize_x=False`` (W4A16, W4A32) only the weight is quantized. Products are then those
    of the dtype of ``x``, or float32, with the weight rounded to that dtype at most; their sums are
    float32.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16, any strides, K ≤ 131072.
        weight, scales, zeros: as `int4_linear_pack` makes them; zeros None: all are symmetric.
        out_features: N.
        group_size: inputs that share a scale, a multiple of 16; None: the whole row.
        bias: float ``[N]`` or None.
        activation: ``"none"``, ``"relu"`` or ``"gelu"`` (exact).
        quantize_x: whether ``x`` is quantized.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    return _call(x, weight, scales, zeros, out_features, group_size, bias, activation, quantize_x)


def int4_linear_pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    group_size: int | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Prepare a weight for :func:`int4_linear` on its device.

    Args:
        codes: int8 ``[N, K]`` from −8 to 7.
        scales: float32 ``[N, groups]``, groups = ceil(K / group_size).
        zeros: int8 ``[N, groups]`` from −8 to 7, or None for 0.
        group_size: a multiple of 16, or None: the whole row.
        out: where the packed weight goes, contiguous uint8. None: into memory of its own.

    Returns:
        weight, scales, zeros, to be passed on as they are.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    op = f"{OP}_pack"
    CODES.check_group_size(op, group_size)
    packed_linear.check_codes(op, "codes", codes, -8, 7)
    if zeros is not None:
        packed_linear.check_codes(op, "zeros", zeros, -8, 7)
    groups = (codes.shape[0], CODES.groups(codes.shape[1], group_size))
    fits = scales.dtype == torch.float32 and tuple(scales.shape) == groups
    require(fits, op, "scales", f"float32 {list(groups)}", scales)
    if zeros is not None:
        require(tuple(zeros.shape) == groups, op, "zeros", f"int8 {list(groups)}", zeros)
        zeros = packed_linear.pack_group_values((zeros + 8).to(torch.uint8))
    weight = CODES.pack(codes, out)
    return weight, packed_linear.pack_group_values(scales), zeros


def _check(
    x,
    weight,
    scales,
    zeros,
    out_features,
    group_size=None,
    bias=None,
    activation="none",
    quantize_x=True,
) -> None:
    packed_linear.check(CODES, x, weight, scales, zeros, out_features, group_size, bias, activation)


def _eager(
    x,
    weight,
    scales,
    zeros,
    out_features,
    group_size=None,
    bias=None,
    activation="none",
    quantize_x=True,
) -> torch.Tensor:
    return packed_linear.eager(
        CODES, x, weight, scales, zeros, out_features, group_size, bias, activation, quantize_x
    )


def _fake(x, weight, scales, zeros, out_features, *_args, **_options):
    return x.new_empty((*x.shape[:-1], out_features))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, scales, zeros, ctx.out_features, group_size, bias, activation, quantized = inputs
    ctx.quantize_x = quantized
    packed_linear.save(ctx, x, weight, scales, zeros, group_size, bias, activation, output)


def _backward(ctx, grad):
    def call(x, weight, scales, zeros, bias):
        return int4_linear(
            *(x, weight, scales, zeros, ctx.out_features, ctx.group_size, bias, "none"),
            quantize_x=ctx.quantize_x,
        )

    # Compiled graphs leave out arguments at the end that have their default.
    ctx.needs_bias_grad = any(ctx.needs_input_grad[6:7])
    grad_x, grad_bias = packed_linear.backward(CODES, ctx, grad, call)
    return grad_x, None, None, None, None, None, grad_bias, None, None


_call = register(
    OP, eager=_eager, fake=_fake, check=_check, setup_context=_setup_context, backward=_backward
)
