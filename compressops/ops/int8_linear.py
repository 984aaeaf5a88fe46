"""Linear layer on int8 weights and dynamically quantized int8 activations (W8A8)."""

from __future__ import annotations

import torch

from ..backends import register
from .bsr import rows_of
from .checks import ACTIVATIONS, activate, bias_gradient, message, require
from .pack_panels import pack_panels, packed_out

# |sum| ≤ 127·128·K must fit in an int32; with zero points it is 255·128·K.
MAX_IN_FEATURES = 131072
MAX_ASYMMETRIC_IN_FEATURES = 65536
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# CPU packing: panels of 16 output features, 4 input features side by side, as VNNI multiplies them.
_PANEL, _DEPTH = 16, 4


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    weight_sums: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    symmetric: bool = True,
) -> torch.Tensor:
    """``activation(x @ (weight · weight_scales).T + bias)``, multiplied in integers.

    Each row of ``x`` is quantized on the fly to int8, with halves rounded to even::

        symmetric   scale = max|x| / 127      zero = 0      q = round(x · 127 / max|x|)
        asymmetric  scale = (high − low) / 255  with low = min(x, 0), high = max(x, 0)
                    zero  = −128 − round(low / scale)
                    q     = clip(round(x · 255 / (high − low)) + zero, −128, 127)
        static      scale = x_scale, zero = x_zero or 0, the same for all rows
                    q     = clip(round(x · (1 / x_scale)) + zero, −128, 127)

        y[n] = (Σ_k (q[k] − zero) · weight[n, k]) · (scale · weight_scales[n]) + bias[n]

    The sum is exact. A row that holds NaN or Inf gives a row of NaN. The gradient with respect to
    ``x`` takes the quantization of ``x`` for the identity (straight-through).

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16, any strides; K ≤ 131072, and ≤ 65536 where
            the quantization is asymmetric or static.
        weight: int8 ``[N, K]``, or as packed by :func:`int8_linear_pack`.
        weight_scales: float32 ``[N]``.
        weight_sums: int32 ``[N]``, the sum of each row of the int8 weight.
        bias: float ``[N]`` or None.
        activation: ``"none"``, ``"relu"`` or ``"gelu"`` (exact).
        x_scale: float32 ``[]``, positive: the static scale of ``x``; None: dynamic.
        x_zero: int8 ``[]``, the static zero point; goes with ``x_scale``.
        symmetric: of the dynamic quantization.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    return _call(
        x, weight, weight_scales, weight_sums, bias, activation, x_scale, x_zero, symmetric
    )


def int8_linear_pack(
    weight: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepare an int8 weight ``[N, K]`` for :func:`int8_linear` on its device.

    Args:
        weight: int8 ``[N, K]``.
        out: where the packed weight goes, contiguous int8. None: into memory of its own.

    Returns:
        The packed weight (on a CPU ``[ceil(N/16), ceil(K/4), 16, 4]`` int8, zero padded; elsewhere
        ``[N, K]`` contiguous) and its row sums, int32 ``[N]``.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    op = "int8_linear_pack"
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(_message("weight", "an int8 tensor [N, K]", weight, op))
    if weight.device.type != "cpu" and out is None:
        return weight.contiguous(), weight.sum(1, dtype=torch.int32)
    packed = packed_out(op, packed_shape(*weight.shape, weight.device), weight, torch.int8, out)
    if weight.device.type != "cpu":
        return packed.copy_(weight), weight.sum(1, dtype=torch.int32)
    sums = weight.new_empty(weight.shape[0], dtype=torch.int32)
    pack_panels(packed, weight.contiguous().unsqueeze(2), 8, 0, sums)
    return packed, sums


def packed_shape(N: int, K: int, device: torch.device) -> tuple[int, ...]:
    """Of a weight as :func:`int8_linear_pack` makes it."""
    if device.type != "cpu":
        return N, K
    return -(-N // _PANEL), -(-K // _DEPTH), _PANEL, _DEPTH


def _unpack(weight: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """Row-major ``[N, K]`` of either form."""
    if weight.dim() == 2:
        return weight
    return weight.transpose(1, 2).flatten(2).flatten(0, 1)[:N, :K]


def _message(argument: str, requirement: str, value: object, op: str = "int8_linear") -> str:
    return message(op, argument, requirement, value)


def check_quantization(
    op: str,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    symmetric: bool,
) -> None:
    """Raise a ``ValueError`` unless x can be quantized so."""
    for name, tensor, dtype in (
        ("x_scale", x_scale, torch.float32),
        ("x_zero", x_zero, torch.int8),
    ):
        if tensor is not None:
            fits = tensor.dtype == dtype and tensor.dim() == 0 and tensor.device == x.device
            require(fits, op, name, f"{dtype} [] on {x.device} or None", tensor)
    require(x_zero is None or x_scale is not None, op, "x_zero", "None without x_scale", x_zero)
    fits = symmetric or x_scale is None
    require(fits, op, "symmetric", "True with x_scale (x_zero says it there)", symmetric)


def max_terms(x_scale: torch.Tensor | None, symmetric: bool) -> int:
    """Products whose sum is exact in int32, of x that is quantized so."""
    return MAX_IN_FEATURES if symmetric and x_scale is None else MAX_ASYMMETRIC_IN_FEATURES


def _check(
    x,
    weight,
    weight_scales,
    weight_sums,
    bias=None,
    activation="none",
    x_scale=None,
    x_zero=None,
    symmetric=True,
) -> None:
    if x.dim() < 1 or x.dtype not in _DTYPES:
        requirement = "float32, float16 or bfloat16 [..., K]"
        raise ValueError(_message("x", requirement, x))
    check_quantization("int8_linear", x, x_scale, x_zero, symmetric)
    most = max_terms(x_scale, symmetric)
    require(x.shape[-1] <= most, "int8_linear", "x", f"at most {most} wide (int32 sums)", x)
    if weight_scales.dim() != 1 or weight_scales.dtype != torch.float32:
        raise ValueError(_message("weight_scales", "float32 [N]", weight_scales))
    N, K = weight_scales.shape[0], x.shape[-1]
    packed = packed_shape(N, K, torch.device("cpu"))
    if weight.dtype != torch.int8 or tuple(weight.shape) not in ((N, K), packed):
        requirement = f"int8 [{N}, {K}] or packed {list(packed)}"
        raise ValueError(_message("weight", requirement, weight))
    if weight_sums.dtype != torch.int32 or tuple(weight_sums.shape) != (N,):
        raise ValueError(_message("weight_sums", f"int32 [{N}]", weight_sums))
    if bias is not None and (bias.dtype not in _DTYPES or tuple(bias.shape) != (N,)):
        raise ValueError(_message("bias", f"float [{N}] or None", bias))
    if activation not in ACTIVATIONS:
        raise ValueError(_message("activation", f"one of {ACTIVATIONS}", repr(activation)))
    for name, tensor in (
        ("weight", weight),
        ("weight_scales", weight_scales),
        ("weight_sums", weight_sums),
        ("bias", bias),
    ):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(_message(name, f"on {x.device}, as x is", tensor))


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations ``[..., K]`` to int8 codes ``[..., K]`` and float32 scales ``[..., 1]``."""
    x = x.float()
    if x.shape[-1] == 0:
        return x.to(torch.int8), x.new_zeros((*x.shape[:-1], 1))
    amax = x.abs().amax(-1, keepdim=True)
    finite = amax.isfinite()
    # As a tensor: torch divides by, and into, a Python number through a rounded reciprocal.
    top = amax.new_full((), 127.0)
    inverse = torch.where(finite & (amax > 0), top / amax, 0.0)
    # 0 · Inf, where amax is so small that 127 / amax overflows, counts as 0.
    scaled = torch.where(finite, x * inverse, 0.0).nan_to_num(nan=0.0).clamp(-127, 127)
    return scaled.round().to(torch.int8), torch.where(finite, amax / top, torch.nan)


def quantize_x(
    x: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    symmetric: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations ``[..., K]`` as :func:`int8_linear` quantizes them: int8 codes, and float32
    scales and int32 zero points ``[..., 1]``."""
    if symmetric and x_scale is None:
        q, scales = quantize_rows(x)
        return q, scales, torch.zeros_like(scales, dtype=torch.int32)
    x = x.float()
    rows = x.new_zeros((*x.shape[:-1], 1))
    low, high = rows, rows
    if x.shape[-1]:
        low, high = (v.amin(-1, keepdim=True).clamp(max=0) for v in (x, -x))
        high = -high
    finite = low.isfinite() & high.isfinite()
    if x_scale is None:
        # Halved, so that the difference of two large values stays finite.
        range_ = torch.where(finite, high * 0.5 - low * 0.5, 0.0)
        levels = rows.new_full((), 127.5)
        inverse = torch.where(range_ > 0, levels / range_, 0.0)
        scales = torch.where(finite, range_ / levels, torch.nan)
        zeros = -128 - (low * inverse).nan_to_num(nan=0.0).clamp(min=-255).round()
    else:
        scales = torch.where(finite, x_scale, torch.nan)
        inverse = x_scale.new_ones(()) / x_scale
        zeros = rows if x_zero is None else x_zero.float().expand_as(rows)
    zeros = torch.where(finite, zeros, 0.0)
    scaled = torch.where(finite, x * inverse, 0.0).nan_to_num(nan=0.0)
    q = (scaled.round() + zeros).clamp(-128, 127).to(torch.int8)
    return q, scales, zeros.to(torch.int32)


def _eager(
    x,
    weight,
    weight_scales,
    weight_sums,
    bias=None,
    activation="none",
    x_scale=None,
    x_zero=None,
    symmetric=True,
) -> torch.Tensor:
    q, scales, zeros = quantize_x(x, x_scale, x_zero, symmetric)
    rows = _unpack(weight, weight_scales.shape[0], x.shape[-1])
    # float64 holds every sum below 2^53 exactly, and has a matrix product on every device.
    sums = ((q.double() - zeros) @ rows.double().t()).float()
    y = sums * (scales * weight_scales)
    if bias is not None:
        y = y + bias.float()
    return activate(y, activation).to(x.dtype)


def _fake(x, weight, weight_scales, *_args, **_options) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight_scales.shape[0]))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, weight_scales, weight_sums, bias, activation, x_scale, x_zero, symmetric = inputs
    ctx.activation, ctx.in_features, ctx.symmetric = activation, x.shape[-1], symmetric
    ctx.save_for_backward(
        *(weight, weight_scales, weight_sums, bias, x_scale, x_zero),
        *(() if activation == "none" else (output,) if activation == "relu" else (x,)),
    )


def _backward(ctx, grad):
    weight, weight_scales, weight_sums, bias, x_scale, x_zero, *saved = ctx.saved_tensors
    if ctx.activation == "relu":
        grad = torch.where(saved[0] > 0, grad, 0.0)
    elif ctx.activation == "gelu":
        quantization = (x_scale, x_zero, ctx.symmetric)
        before = int8_linear(
            *(saved[0], weight, weight_scales, weight_sums, bias), "none", *quantization
        )
        grad = torch.ops.aten.gelu_backward(grad, before)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        rows = _unpack(weight, weight_scales.shape[0], ctx.in_features)
        dequantized = rows.to(grad.dtype) * weight_scales.to(grad.dtype)[:, None]
        grad_x = grad @ dequantized
    if bias is not None and ctx.needs_input_grad[4]:
        grad_bias = bias_gradient(rows_of(grad), 0, bias)
    return grad_x, None, None, None, grad_bias, None, None, None, None


_call = register(
    "int8_linear",
    eager=_eager,
    fake=_fake,
    check=_check,
    setup_context=_setup_context,
    backward=_backward,
)
