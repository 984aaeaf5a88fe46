"""Gradient of `winograd_conv2d` with respect to its weights in the Winograd domain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..backends import register
from . import winograd_domain as domain
from .checks import require
from .winograd_transform import SUPPORTED

OP = "winograd_conv2d_grad"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def winograd_conv2d_grad(
    x: torch.Tensor,
    grad: torch.Tensor,
    kernel_size: Sequence[int],
    padding: Sequence[int] = (0, 0),
    groups: int = 1,
    tile: int = 4,
) -> torch.Tensor:
    """``Σ (A y Aᵀ) ⊙ (Bᵀ d B)`` over all tiles: the gradient of the transformed weights G g Gᵀ.

    That of the weights themselves is ``Gᵀ · G`` of it, :func:`winograd_conv2d_weight_grad`. It
    takes as many times fewer multiplications than the direct sum as the forward pass. It has no
    gradient itself: to differentiate through it raises ``NotImplementedError``.

    Args:
        x: ``[N, C, H, W]`` float32, float16 or bfloat16, any strides; float64 on the eager backend.
        grad: ``[N, K, H + 2·padding − rh + 1, W + 2·padding − r + 1]``, dtype of ``x``: the
            gradient of the convolution's result (before its activation).
        kernel_size: ``(r, r)`` or ``(1, r)``.
        padding, groups, tile: as in :func:`winograd_conv2d`.

    Returns:
        ``[P, K, C / groups]`` float32 (float64 for float64), P = alpha² positions or, in one
        dimension, alpha.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    return _call(x, grad, list(kernel_size), list(padding), groups, tile)


def winograd_conv2d_weight_grad(
    x: torch.Tensor,
    grad: torch.Tensor,
    kernel_size: Sequence[int],
    padding: Sequence[int] = (0, 0),
    groups: int = 1,
    tile: int = 4,
) -> torch.Tensor:
    """The gradient of the weights, ``[K, C / groups, *kernel_size]`` in the dtype of ``x``.

    Arguments and errors are those of :func:`winograd_conv2d_grad`; nor has it a gradient.
    """
    transformed = winograd_conv2d_grad(x, grad, kernel_size, padding, groups, tile)
    shape = (grad.shape[1], x.shape[1] // groups, *kernel_size)
    return domain.transform_weight_grad(transformed, shape, tile).to(x.dtype)


def _check(x, grad, kernel_size, padding=(0, 0), groups=1, tile=4) -> None:
    fits = x.dim() == 4 and x.dtype in _DTYPES
    require(fits, OP, "x", "float32, float16, bfloat16 or (eager) float64 [N, C, H, W]", x)
    divides = groups >= 1 and x.shape[1] % groups == 0
    require(divides, OP, "groups", f"a divisor of {x.shape[1]} input channels", groups)
    square = len(kernel_size) == 2 and kernel_size[0] in (1, kernel_size[1])
    tiles = [m for m, r in SUPPORTED if square and r == kernel_size[1]]
    require(bool(tiles), OP, "kernel_size", "r, r or 1, r with r of 3, 5 or 7", list(kernel_size))
    require(tile in tiles, OP, "tile", f"one of {tiles} for a kernel {kernel_size[1]} wide", tile)
    pair = len(padding) == 2 and all(0 <= p <= domain.MAX_PADDING for p in padding)
    require(pair, OP, "padding", "two integers from 0 to 2^60", list(padding))
    size = domain.output_size(x.shape, (0, 0, *kernel_size), padding)
    fits = grad.dim() == 4 and grad.dtype == x.dtype and grad.device == x.device
    fits = fits and grad.shape[0] == x.shape[0] and grad.shape[1] % groups == 0
    fits = fits and tuple(grad.shape[2:]) == size
    form = f"{x.dtype} [{x.shape[0]}, K, {size[0]}, {size[1]}] on {x.device}, K divided by groups"
    require(fits, OP, "grad", form, grad)


def _eager(x, grad, kernel_size, padding=(0, 0), groups=1, tile=4) -> torch.Tensor:
    shape = (grad.shape[1], x.shape[1] // groups, *kernel_size)
    down, across = domain.transforms(shape, tile)
    rows, columns = -(-grad.shape[2] // down.m), -(-grad.shape[3] // across.m)
    v = domain.input_tiles(x, shape, padding, groups, tile)  # [P, groups, C / groups, N · T]
    data = grad.to(v.dtype)
    edges = (0, columns * across.m - grad.shape[3], 0, rows * down.m - grad.shape[2])
    tiles = F.pad(data, edges).unfold(2, down.m, down.m).unfold(3, across.m, across.m)
    products = domain.matrix(down.at, data).t() @ tiles @ domain.matrix(across.at, data)
    N, K, P = grad.shape[0], grad.shape[1], down.alpha * across.alpha
    products = products.reshape(N, groups, K // groups, rows * columns, P).permute(4, 1, 2, 0, 3)
    products = products.reshape(P, groups, K // groups, N * rows * columns)
    return (products @ v.transpose(2, 3)).reshape(P, K, shape[1])


def _fake(x, grad, kernel_size, padding=(0, 0), groups=1, tile=4) -> torch.Tensor:
    shape = (grad.shape[1], x.shape[1] // groups, *kernel_size)
    down, across = domain.transforms(shape, tile)
    dtype = domain.accumulator(x.dtype)
    return x.new_empty((down.alpha * across.alpha, *shape[:2]), dtype=dtype)


def _backward(ctx, grad):
    # Without a formula autograd would only warn, and take the gradient for zero.
    raise NotImplementedError(
        f"{OP} is not differentiable; winograd_conv2d is, any number of times"
    )


_call = register(OP, eager=_eager, fake=_fake, check=_check, backward=_backward)
