"""Rows of activations rounded to 8 bits, as the integer products round them."""

from __future__ import annotations

import torch

from ..backends import register
from .checks import require
from .int8_linear import quantize_x

OP = "round_rows"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def round_rows(x: torch.Tensor, symmetric: bool = True) -> torch.Tensor:
    """The values that the int8 codes of ``x`` stand for, scale · (q − zero): each row (last
    dimension) is quantized by the range that it has, as :func:`int8_linear` does it (there are the
    formulas). Min–max of activations is TernaryBERT's (Zhang et al. 2020, arXiv:2009.12812,
    section 3.1).

    Gradients pass as they are (straight-through; nothing is clipped).

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``, of any strides.
        symmetric: with the largest magnitude as range and no zero point, else from the least value
            to the largest and 0.

    Returns:
        ``[..., K]`` in the dtype of ``x``, contiguous. A row that holds NaN or Inf is NaN. All
        others are finite: a value past the dtype's largest number becomes that.

    Raises:
        ValueError: ``x`` is not of that form.
    """
    return _call(x, symmetric)


def round_rows_reference(x: torch.Tensor, symmetric: bool = True) -> torch.Tensor:
    """:func:`round_rows` in plain PyTorch, of any float dtype."""
    q, scales, zeros = quantize_x(x, symmetric=symmetric)
    # Zero point and scale are rounded: a range's end may come to lie past the dtype's.
    most = min(torch.finfo(x.dtype).max, torch.finfo(torch.float32).max)
    return ((q.float() - zeros) * scales).clamp(-most, most).to(x.dtype).contiguous()


def _check(x, symmetric=True) -> None:
    del symmetric
    fits = x.dim() >= 1 and x.dtype in DTYPES
    require(fits, OP, "x", "float32, float16 or bfloat16 [..., K]", x)


def _fake(x, symmetric=True) -> torch.Tensor:
    del symmetric
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    del ctx, inputs, output


def _backward(ctx, grad):
    del ctx
    return grad, None


_call = register(
    OP,
    eager=round_rows_reference,
    fake=_fake,
    check=_check,
    setup_context=_setup_context,
    backward=_backward,
)
