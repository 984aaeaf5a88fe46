"""2-D convolution on a block-sparse weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ..backends import register
from . import bsr
from .bsr_linear import bsr_linear
from .bsr_linear_grad import bsr_linear_grad_x, values_gradient
from .checks import bias_gradient, require
from .conv import MOST, check_pair, check_reach, check_steps, output_size, pair
from .winograd_domain import memory_format

OP = "bsr_conv2d"
_MOST_TAPS = 4096
# Elements of windows that gradients and the eager kernel gather at a time.
_PIECE = 1 << 22


def bsr_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_channels: int,
    kernel_size: int | Sequence[int],
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
    row_order: torch.Tensor | None = None,
) -> torch.Tensor:
    """``activation(conv2d(x, W) + bias)`` with W in block-sparse rows (BSR).

    W ``[K, C, R, S]`` is the matrix ``[K, R · S · C]`` of ``W.permute(0, 2, 3, 1)``: its inputs are
    in the order kernel row, kernel column, channel. Blocks of any size cut that matrix; those of
    one input, or of a divisor of C, lie within one position of the kernel. A convolution in groups
    is one whose blocks leave out the other groups' channels.

    Products are summed in float32, of stored blocks alone, as by :func:`bsr_linear`, whose kernel
    it is. Windows are read in place, on a CPU from the padded image; gradients, and the eager
    kernel, gather windows some megabytes at a time for :func:`bsr_linear` and its gradients.

    Differentiable with respect to ``x``, ``values`` and ``bias``, any number of times, by the
    stored blocks alone. Packed values have no gradient.

    Args:
        x: ``[N, C, H, W]`` float32, float16 or bfloat16, any strides, empty in N alone.
        values: ``[nnz, r, c]`` of one of these dtypes, the stored blocks by rows, or all three as
            :func:`bsr_linear_pack` made them of a weight ``[K, R · S · C]``. The CPU's kernels want
            r to be a multiple of 16; CUDA's have none for others, nor for a c or C of other than
            whole pieces of 16 bytes: Triton serves those.
        crow_indices: int32 ``[ceil(K / r) + 1]``, where each row of blocks begins in ``values``.
        col_indices: int32 ``[nnz]``, columns of the grid of blocks, ascending in each row.
        out_channels: K.
        kernel_size: R and S, up to 4096, or one integer for both.
        bias: float ``[K]`` or None.
        stride, padding, dilation: one integer, or two (rows, columns); padding is on each side.
        activation: ``"none"``, ``"relu"`` or ``"gelu"`` (exact).
        row_order: as in :func:`bsr_linear`.

    Returns:
        ``[N, K, OH, OW]`` in the dtype of ``x``, with OH = ⌊(H + 2·padding − dilation·(R − 1) − 1)
        / stride⌋ + 1; channels last where ``x`` is so and not contiguous too, else contiguous.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value. As of
            :func:`bsr_linear`, columns that do not ascend are refused in packing alone.

    Source: Gray, Radford & Kingma 2017, "GPU Kernels for Block-Sparse Weights"; Elsen et al. 2020,
    "Fast Sparse ConvNets" (arXiv 1911.09723), for blocks of several outputs of one input.
    """
    return _call(
        *(x, values, crow_indices, col_indices, out_channels, pair(kernel_size), bias),
        *(pair(stride), pair(padding), pair(dilation), activation, row_order),
    )


def check(
    x,
    values,
    crow_indices,
    col_indices,
    out_channels,
    kernel_size,
    bias=None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    activation="none",
    row_order=None,
) -> None:
    fits = x.dim() == 4 and x.dtype in bsr.DTYPES and all(size >= 1 for size in x.shape[1:])
    form = "float32, float16 or bfloat16 [N, C, H, W], empty in N alone"
    require(fits, OP, "x", form, x)
    check_pair(OP, "kernel_size", kernel_size, 1, _MOST_TAPS)
    check_steps(OP, stride, padding, dilation)
    check_reach(OP, x, kernel_size, stride, padding, dilation)
    require(out_channels >= 0, OP, "out_channels", "0 or more", out_channels)
    bsr.check_epilogue(OP, x, bias, out_channels, activation)
    width = _inputs(x, kernel_size)
    bsr.check_weight(OP, x, values, crow_indices, col_indices, out_channels, width)
    bsr.check_row_order(OP, row_order, crow_indices, values=False)


def _guard(
    x,
    values,
    crow_indices,
    col_indices,
    out_channels,
    kernel_size,
    bias=None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    activation="none",
    row_order=None,
) -> str | None:
    weight, steps = (values, crow_indices, col_indices), (stride, padding, dilation)
    check(x, *weight, out_channels, kernel_size, bias, *steps, activation, row_order)
    width = _inputs(x, kernel_size)
    bsr.check_indices_once(OP, *weight, width)
    bsr.check_row_order(OP, row_order, crow_indices)
    if width > MOST or any(x.shape[2 + i] + 2 * padding[i] > MOST for i in (0, 1)):
        return "its coordinates are numbers of 32 bits"
    piece = 16 // (x.dtype if x.dtype == values.dtype else torch.float32).itemsize
    if x.shape[1] % piece:
        return f"images of {x.shape[1]} channels: it reads {piece} at once"
    return bsr.refusal(values, x.dtype)


def _inputs(x: torch.Tensor, kernel_size: Sequence[int]) -> int:
    """Columns of the weight."""
    return kernel_size[0] * kernel_size[1] * x.shape[1]


def _windows(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """``[N, OH, OW, R, S, C]``: what each output sees, as a view of the padded images."""
    view = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    view = view.contiguous(memory_format=torch.channels_last)
    for i in (0, 1):
        reach = (kernel_size[i] - 1) * dilation[i] + 1
        view = view.unfold(2 + i, reach, stride[i])[..., :: dilation[i]]
    return view.permute(0, 2, 3, 4, 5, 1)


def _split(
    x: torch.Tensor, geometry: Sequence[Sequence[int]], *others: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """``x``, and others of as many images, some images at a time."""
    out = output_size(x, *geometry)
    count = max(1, _PIECE // (_inputs(x, geometry[0]) * out[0] * out[1]))
    return zip(*(tensor.split(count) for tensor in (x, *others)), strict=True)


def _eager(
    x,
    values,
    crow_indices,
    col_indices,
    out_channels,
    kernel_size,
    bias=None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    activation="none",
    row_order=None,
) -> torch.Tensor:
    bsr.check_indices(OP, values, crow_indices, col_indices, _inputs(x, kernel_size))
    bsr.check_row_order(OP, row_order, crow_indices)
    weight = (values, crow_indices, col_indices, out_channels, bias, activation)
    geometry = (kernel_size, stride, padding, dilation)
    y = torch.cat(
        [
            bsr_linear(_windows(images, *geometry).flatten(3), *weight)
            for (images,) in _split(x, geometry)
        ]
    )
    return y.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(x))


def _fake(
    x,
    values,
    crow_indices,
    col_indices,
    out_channels,
    kernel_size,
    bias=None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    activation="none",
    row_order=None,
) -> torch.Tensor:
    size = (x.shape[0], out_channels, *output_size(x, kernel_size, stride, padding, dilation))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _setup_context(ctx, inputs, output) -> None:
    x, values, crow_indices, col_indices, ctx.out_channels, kernel_size, bias = inputs[:7]
    *steps, ctx.activation, row_order = inputs[7:]
    ctx.geometry = (kernel_size, *steps)
    saved = output if ctx.activation == "relu" else None
    ctx.save_for_backward(x, values, crow_indices, col_indices, bias, row_order, saved)


def _backward(ctx, grad):
    x, values, crow_indices, col_indices, bias, row_order, output = ctx.saved_tensors
    indices, geometry = (crow_indices, col_indices), ctx.geometry
    # Compiled graphs leave out arguments at the end that have their default.
    needs_x, needs_values, *_, needs_bias = (*ctx.needs_input_grad, *(False,) * 5)[:7]
    if ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    elif ctx.activation == "gelu":
        weight = (values, *indices, ctx.out_channels)
        before = _call(x, *weight, geometry[0], bias, *geometry[1:], "none", row_order)
        grad = torch.ops.aten.gelu_backward(grad, before)
    parts = list(_split(x, geometry, grad.permute(0, 2, 3, 1)))
    grad_x = grad_values = grad_bias = None
    if needs_x:
        weight = (values, *indices, _inputs(x, geometry[0]))
        grad_x = torch.cat(
            [_folded(bsr_linear_grad_x(g, *weight), each, *geometry) for each, g in parts]
        )
    if needs_values:
        pairs = ((g, _windows(each, *geometry).flatten(3)) for each, g in parts)
        grad_values = values_gradient(OP, pairs, values, *indices)
    if bias is not None and needs_bias:
        grad_bias = bias_gradient(grad, (0, 2, 3), bias)
    return grad_x, grad_values, *(None,) * 4, grad_bias, *(None,) * 5


def _folded(
    windows: torch.Tensor,
    like: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """``[N, OH, OW, R · S · C]`` added up, in float32, where the windows lie in an image like
    ``like``."""
    # [N, OH · OW, R · S, C], to the order of fold.
    taps = windows.flatten(1, 2).unflatten(2, (-1, like.shape[1])).permute(0, 3, 2, 1)
    options = (list(kernel_size), list(dilation), list(padding), list(stride))
    return F.fold(taps.flatten(1, 2).float(), like.shape[2:], *options).to(like.dtype)


_call = register(
    OP,
    eager=_eager,
    fake=_fake,
    check=check,
    setup_context=_setup_context,
    backward=_backward,
    guard=_guard,
)
