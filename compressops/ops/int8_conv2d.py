"""2-D convolution on int8 weights and int8 activations, quantized image by image (W8A8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..backends import register
from .checks import ACTIVATIONS, activate, bias_gradient, message, require
from .conv import check_reach, check_steps, output_size, pair
from .int8_linear import check_quantization, max_terms, quantize_x
from .pack_panels import pack_panels, packed_out
from .winograd_domain import memory_format

OP = "int8_conv2d"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Panels of 16 output channels, 4 input channels side by side, as VNNI and dp4a multiply them; or
# rows of chunks of 16 input channels, as tensor cores do.
_PANEL, _DEPTH, _CHUNK = 16, 4, 16
# Input times output channels of a group from which on it makes enough of a matrix for those.
_MATRIX = 256


def int8_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    weight_sums: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "none",
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    symmetric: bool = True,
) -> torch.Tensor:
    """``activation(conv2d(x, weight · weight_scales) + bias)``, multiplied in integers.

    Each image of ``x`` is quantized on the fly to int8, as :func:`int8_linear` quantizes a row:
    symmetric (scale = max|x| / 127), asymmetric or static. The padding is an exact zero, and the
    sums are exact. An image that holds NaN or Inf gives an image of NaN. The gradient with respect
    to ``x`` takes the quantization of ``x`` for the identity (straight-through).

    The codes of an image lie in memory once, channels last, and windows of them are multiplied in
    place: there is no im2col.

    Args:
        x: ``[N, C, H, W]`` float32, float16 or bfloat16, any strides, empty in N alone.
        weight: int8 ``[K, C / groups, R, S]``, or as packed by :func:`int8_conv2d_pack`;
            C / groups · R · S ≤ 131072, and ≤ 65536 where the quantization is asymmetric or static.
        weight_scales: float32 ``[K]``.
        weight_sums: int32 ``[K]``, the sum of each filter of the int8 weight.
        bias: float ``[K]`` or None.
        stride, padding, dilation: one integer, or two (rows, columns); padding is on each side.
        groups: divides C and K.
        activation: ``"none"``, ``"relu"`` or ``"gelu"`` (exact).
        x_scale: float32 ``[]``, positive: the static scale of ``x``; None: dynamic.
        x_zero: int8 ``[]``, the static zero point; goes with ``x_scale``.
        symmetric: of the dynamic quantization.

    Returns:
        ``[N, K, OH, OW]`` in the dtype of ``x``, with OH = ⌊(H + 2·padding − dilation·(R − 1) − 1)
        / stride⌋ + 1; channels last where ``x`` is so and not contiguous too, else contiguous.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    return _call(
        *(x, weight, weight_scales, weight_sums, bias),
        *(pair(stride), pair(padding), pair(dilation)),
        *(groups, activation, x_scale, x_zero, symmetric),
    )


def int8_conv2d_pack(
    weight: torch.Tensor, groups: int = 1, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepare an int8 weight ``[K, C / groups, R, S]`` for :func:`int8_conv2d` on its device.

    Args:
        weight: int8 ``[K, C / groups, R, S]``.
        groups: of the convolution.
        out: where the packed weight goes, contiguous int8. None: into memory of its own.

    Returns:
        The packed weight and the sum of each filter, int32 ``[K]``. Packed is int8, zero padded,

        - of a depthwise convolution (groups = K > 1, one input channel each)
          ``[ceil(K / 16), R, S, 16, 1]``;
        - on a CPU, and of groups with C / groups · K / groups < 256 elsewhere,
          ``[groups, ceil(K / groups / 16), R, S, ceil(C / groups / 4), 16, 4]``;
        - of other weights elsewhere ``[groups, K / groups, R, S, ceil(C / groups / 16), 1, 16]``.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    op = "int8_conv2d_pack"
    fits = weight.dtype == torch.int8 and weight.dim() == 4
    require(fits, op, "weight", "an int8 tensor [K, C / groups, R, S]", weight)
    K, C = weight.shape[:2]
    divides = groups >= 1 and K % groups == 0
    require(divides, op, "groups", f"a divisor of {K} output channels", groups)
    cpu = weight.device.type == "cpu"
    panel, depth = block_of(K, C, groups, cpu)
    shape = packed_shape(tuple(weight.shape), groups, panel, depth)
    packed = packed_out(op, shape, weight, torch.int8, out)
    if not cpu or depth == 1:
        sums = weight.sum((1, 2, 3), dtype=torch.int32)
        return packed.copy_(pack_as(weight, groups, panel, depth)), sums
    rows, padding = weight.contiguous().flatten(2), -(K // groups) % _PANEL
    if padding and groups > 1:
        # The panels of a group are whole.
        rows = F.pad(rows.unflatten(0, (groups, -1)), (0, 0, 0, 0, 0, padding)).flatten(0, 1)
    sums = weight.new_empty(rows.shape[0], dtype=torch.int32)
    pack_panels(packed, rows, 8, 0, sums)
    return packed, sums if rows.shape[0] == K else sums.view(groups, -1)[:, : K // groups].flatten()


def packed_shape(
    shape: tuple[int, int, int, int], groups: int, panel: int, depth: int
) -> tuple[int, ...]:
    """Of a weight ``[K, C / groups, R, S]`` in blocks as `block_of` gives them."""
    K, C, R, S = shape
    if depth == 1:
        return -(-K // panel), R, S, panel, 1
    return groups, -(-(K // groups) // panel), R, S, -(-C // depth), panel, depth


def block_of(K: int, C: int, groups: int, cpu: bool) -> tuple[int, int]:
    """Output and input channels (C of a group) that lie side by side in a packed weight."""
    if _depthwise(K, C, groups):
        return _PANEL, 1
    few = groups > 1 and C * (K // groups) < _MATRIX
    return (_PANEL, _DEPTH) if cpu or few else (1, _CHUNK)


def pack_as(weight: torch.Tensor, groups: int, panel: int, depth: int) -> torch.Tensor:
    K, C, R, S = weight.shape
    # Channels of their own are the outputs of one group.
    groups = 1 if depth == 1 else groups
    panels, chunks = -(-(K // groups) // panel), -(-C // depth)
    rows = weight.reshape(groups, K // groups, C, R, S)
    padded = F.pad(rows, (0, 0, 0, 0, 0, -C % depth, 0, -(K // groups) % panel))
    blocks = padded.view(groups, panels, panel, chunks, depth, R, S)
    packed = blocks.permute(0, 1, 5, 6, 3, 2, 4).contiguous()
    return packed.view(panels, R, S, panel, 1) if depth == 1 else packed


def _packed_shape(weight, K: int, C: int, groups: int) -> tuple[int, ...]:
    """Of a packed weight of these channels (C of a group), by its own block and kernel size."""
    panel, depth = weight.shape[-2:]
    if _depthwise(K, C, groups):
        panel, depth = _PANEL, 1
    elif (panel, depth) not in ((_PANEL, _DEPTH), (1, _CHUNK)):
        panel, depth = _PANEL, _DEPTH
    return packed_shape((K, C, *kernel_size(weight)), groups, panel, depth)


def _depthwise(K: int, C: int, groups: int) -> bool:
    """Whether each of several groups has one input (C of a group) and one output channel."""
    return groups > 1 and groups == K and C == 1


def unpack(weight: torch.Tensor, K: int, C: int) -> torch.Tensor:
    """``[K, C / groups, R, S]`` of any form; C is that of one group."""
    if weight.dim() == 4:
        return weight
    if weight.dim() == 5:
        return weight.squeeze(-1).permute(0, 3, 1, 2).flatten(0, 1)[:K].unsqueeze(1)
    groups = weight.shape[0]
    rows = weight.permute(0, 1, 5, 4, 6, 2, 3).flatten(3, 4).flatten(1, 2)
    return rows[:, : K // groups, :C].flatten(0, 1)


def kernel_size(weight: torch.Tensor) -> tuple[int, int]:
    first = 1 if weight.dim() == 5 else 2
    return weight.shape[first], weight.shape[first + 1]


def _check_geometry(x, weight, K: int, stride, padding, dilation, groups: int) -> None:
    check_steps(OP, stride, padding, dilation)
    C = x.shape[1]
    divides = groups >= 1 and C % groups == 0 and K % groups == 0
    require(divides, OP, "groups", f"a divisor of {C} input and {K} output channels", groups)
    C //= groups
    fits = weight.dtype == torch.int8 and weight.dim() in (4, 5, 7)
    if fits:
        R, S = kernel_size(weight)
        form = (K, C, R, S) if weight.dim() == 4 else _packed_shape(weight, K, C, groups)
        fits = R >= 1 and S >= 1 and tuple(weight.shape) == form
    form = f"int8 [{K}, {C}, R, S] or that as int8_conv2d_pack makes it"
    require(fits, OP, "weight", form, weight)
    check_reach(OP, x, (R, S), stride, padding, dilation)


def check(
    x,
    weight,
    weight_scales,
    weight_sums,
    bias=None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    activation="none",
    x_scale=None,
    x_zero=None,
    symmetric=True,
) -> None:
    fits = x.dim() == 4 and x.dtype in _DTYPES and all(size >= 1 for size in x.shape[1:])
    form = "float32, float16 or bfloat16 [N, C, H, W], empty in N alone"
    require(fits, OP, "x", form, x)
    fits = weight_scales.dtype == torch.float32 and weight_scales.dim() == 1
    fits = fits and weight_scales.shape[0] >= 1
    require(fits, OP, "weight_scales", "float32 [K], K >= 1", weight_scales)
    K = weight_scales.shape[0]
    _check_geometry(x, weight, K, stride, padding, dilation, groups)
    R, S = kernel_size(weight)
    check_quantization(OP, x, x_scale, x_zero, symmetric)
    most = max_terms(x_scale, symmetric)
    fits = x.shape[1] // groups * R * S <= most
    require(fits, OP, "weight", f"of at most {most} inputs an output (int32 sums)", weight)
    fits = weight_sums.dtype == torch.int32 and tuple(weight_sums.shape) == (K,)
    require(fits, OP, "weight_sums", f"int32 [{K}]", weight_sums)
    if bias is not None:
        fits = bias.dtype in _DTYPES and tuple(bias.shape) == (K,)
        require(fits, OP, "bias", f"float [{K}] or None", bias)
    known = f"one of {ACTIVATIONS}"
    require(activation in ACTIVATIONS, OP, "activation", known, repr(activation))
    for name, tensor in (
        ("weight", weight),
        ("weight_scales", weight_scales),
        ("weight_sums", weight_sums),
        ("bias", bias),
    ):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(message(OP, name, f"on {x.device}, as x is", tensor))


def _eager(
    x,
    weight,
    weight_scales,
    weight_sums,
    bias=None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    activation="none",
    x_scale=None,
    x_zero=None,
    symmetric=True,
) -> torch.Tensor:
    q, scales, zeros = quantize_x(x.flatten(1), x_scale, x_zero, symmetric)
    filters = unpack(weight, weight_scales.shape[0], x.shape[1] // groups)
    # float64 holds every sum below 2^53 exactly, and has a convolution on every device.
    centred = (q.double() - zeros).view(x.shape)
    options = (list(stride), list(padding), list(dilation), groups)
    sums = F.conv2d(centred, filters.double(), None, *options).float()
    y = sums * (scales * weight_scales)[:, :, None, None]
    if bias is not None:
        y = y + bias.float()[:, None, None]
    y = activate(y, activation).to(x.dtype)
    return y.contiguous(memory_format=memory_format(x))


def _fake(
    x,
    weight,
    weight_scales,
    weight_sums,
    bias=None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    *_args,
    **_options,
) -> torch.Tensor:
    out = output_size(x, kernel_size(weight), stride, padding, dilation)
    size = (x.shape[0], weight_scales.shape[0], *out)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, weight_scales, weight_sums, bias, *geometry = inputs[:9]
    activation, x_scale, x_zero, symmetric = inputs[9:]
    ctx.geometry, ctx.activation, ctx.symmetric = geometry, activation, symmetric
    ctx.x = x.shape, x.dtype, memory_format(x)
    ctx.save_for_backward(
        *(weight, weight_scales, weight_sums, bias, x_scale, x_zero),
        *(() if activation == "none" else (output,) if activation == "relu" else (x,)),
    )


def _backward(ctx, grad):
    weight, weight_scales, weight_sums, bias, x_scale, x_zero, *saved = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    if ctx.activation == "relu":
        grad = torch.where(saved[0] > 0, grad, 0.0)
    elif ctx.activation == "gelu":
        before = _call(
            *(saved[0], weight, weight_scales, weight_sums, bias, *ctx.geometry),
            *("none", x_scale, x_zero, ctx.symmetric),
        )
        grad = torch.ops.aten.gelu_backward(grad, before)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        shape, dtype, form = ctx.x
        filters = unpack(weight, weight_scales.shape[0], shape[1] // groups)
        dequantized = filters.to(dtype) * weight_scales.to(dtype)[:, None, None, None]
        # Of x its shape and memory format alone matter.
        like = torch.empty(shape, dtype=dtype, device=grad.device, memory_format=form)
        grad_x = torch.ops.aten.convolution_backward(
            *(grad, like, dequantized, None, stride, padding, dilation, False, [0, 0], groups),
            [True, False, False],
        )[0]
    if bias is not None and ctx.needs_input_grad[4]:
        grad_bias = bias_gradient(grad, (0, 2, 3), bias)
    return (grad_x, None, None, None, grad_bias, *(None,) * 8)


_call = register(
    OP,
    eager=_eager,
    fake=_fake,
    check=check,
    setup_context=_setup_context,
    backward=_backward,
)
